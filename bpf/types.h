// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// What the programs, the maps and Go share: every constant and every layout. bpf2go makes the Go of it; nothing here is
// written twice. Addresses and ports are in network byte order, all else in the host's. Padding has a name.
#pragma once

#include <linux/types.h>

// A change of a layout or of a meaning below is a new schema version: it is part of the pin path.
enum schema {
	SCHEMA_VERSION = 3,
};

enum limits {
	MAX_SERVICES = 4096,
	MAX_SERVICE_KEYS = 65536, // a service may have several addresses and ports
	MAX_BACKENDS = 16384,
	MAX_SOURCES = 1024,
	MAX_POOLS = 65536,
	MAX_POOLS_A_BACKEND = 16,
	MAX_ADDRESSES = 65536,
	MAX_DEVICES = 1024,
	MAX_FRAGMENTS = 16384,
	MAX_RING_SIZE = 8388593, // the largest prime below 2^23
	MAX_NAME = 64,
	MAX_FAILURE = 128,
	BITMAP_BITS = 1 << 20, // 128 KiB: small enough for L2
	BITMAP_WORDS = BITMAP_BITS / 64,
	TICK_SHIFT = 24, // a tick is 2^24 ns, 16.8 ms; 32 bits of them are 834 days
	TEND_RECORDS = 64,
	FILL_PORTS = 1024,
	PORT_NUMBERS = 65536,
	GUE_PORT = 6080,	// of IANA
	QUOTE_MAX = 512,	// bytes of a packet that our ICMP errors quote
	CHECK_FRAME_MAX = 2048, // bytes of a frame that answers a check
	CHECK_RING_BYTES = 1 << 22,
	JOURNAL_RING_BYTES = 1 << 24,
};

// Who uses a CPU's scratch room: packets, or the daemon's program `tend`, which packets may interrupt.
enum room {
	ROOM_PACKETS = 0,
	ROOM_TEND = 1,
	ROOM_COUNT,
};

enum family {
	FAMILY_IPV4 = 4,
	FAMILY_IPV6 = 6,
};

enum method {
	METHOD_FULLNAT = 1,
	METHOD_NAT = 2,
	METHOD_DSR = 3,
	METHOD_IPIP = 4,
	METHOD_GUE = 5,
};

// What the program decided for a packet. The prefix says what was done with it; Go takes the names from here.
enum verdict {
	PASS_NOT_OURS,	     // no service has this address, port and protocol: the host's stack takes it
	PASS_FRAGMENT,	     // a later fragment of nothing we know: the host's stack takes it
	PASS_REPLY_UNKNOWN,  // to a source address and port of ours, of no connection we know: the host's stack answers
	PASS_ICMP,	     // ICMP about nothing we know: the host's stack takes it
	PASS_TUNNEL_ERROR,   // ICMP about an outer packet of ours: noted, and the host's stack takes it
	PASS_CHECK,	     // a backend's answer to a check through its method: the daemon takes it
	FORWARD_RING,	     // fast path: a settled slot, no exception, fresh
	FORWARD_TABLE,	     // an entry of the connection table decided
	FORWARD_HALF_OPEN,   // an entry of the half-open table decided
	FORWARD_NEW,	     // a SYN, or UDP's first packet, its backend chosen from the ring
	FORWARD_ADOPTED,     // in mid-connection and unknown: the ring decided, the connection table noted it
	FORWARD_UNKNOWN,     // in mid-connection and unknown: the ring decided, nobody noted it
	FORWARD_ICMP,	     // an ICMP error about a backend's packet, to that backend
	FORWARD_FRAGMENT,    // a later fragment, the way of its first
	FORWARD_RESET,	     // a client's packet of a condemned connection, to its backend: as RST
	REPLY_TABLE,	     // a backend's packet, back to the client of an established connection
	REPLY_HALF_OPEN,     // the same for a connection not confirmed yet
	REPLY_ICMP,	     // an ICMP error about a client's packet, to that client
	REPLY_FRAGMENT,	     // a later fragment of a backend's packet, the way of its first
	ANSWER_ARP,	     // who has an address of XDP's own: answered
	ANSWER_NDP,	     // the same over IPv6
	ANSWER_ECHO,	     // a ping to an address of XDP's own: answered
	ANSWER_TOO_BIG,	     // longer than the way it has to go takes: its sender is told by ICMP
	RESET_UNKNOWN,	     // RST: in mid-connection, unknown, and the method needs state
	RESET_NO_BACKEND,    // RST: the service has no backend that takes new connections
	RESET_TABLE_FULL,    // RST: the connection table is full and the method needs state
	RESET_NO_PORT,	     // RST: every source port towards this backend is in use
	RESET_BACKEND_DOWN,  // RST: the backend is down and the service's policy is reset
	RESET_LEAVING,	     // RST: the service is leaving and takes no new connections
	RESET_CONDEMNED,     // RST, to either end: the connection was closed by command
	RESET_REPLY_UNKNOWN, // RST to a backend: to an address of XDP's own, of no connection we know
	DROP_TRUNCATED,	     // shorter than its headers say
	DROP_BAD_HEADER,     // lengths that contradict each other
	DROP_BAD_FLAGS,	     // TCP flags that no client's packet carries
	DROP_BAD_SOURCE,     // from an address that no host has
	DROP_LATER_FRAGMENT, // to an address of XDP's own, a later fragment whose first was not seen
	DROP_UNKNOWN_RST,    // RST for a connection nobody knows: never answered
	DROP_NO_NEIGHBOR,    // the backend's next hop is not known
	DROP_TTL,	     // time to live used up
	DROP_TOO_BIG,	     // longer than the way takes, and its sender wants it fragmented: not done here
	DROP_ANSWER_LIMITED, // an ICMP answer was due, but too many were sent in this moment
	DROP_NO_HEADROOM,    // the device leaves no room in front of the packet for outer headers or tags
	DROP_NO_RING,	     // no ring, backend, source address or method for it: a configuration half taken away
	VERDICT_COUNT,
};

// What happened beside the verdict.
enum event {
	EVENT_CONFIRMED,	// a connection entered the connection table
	EVENT_MATURED,		// a young entry showed that both ends talk
	EVENT_ADOPTION_LIMITED, // not adopted: too many at once
	EVENT_YOUNG_LIMITED,	// not noted: the young entries' budget is spent
	EVENT_TABLE_FULL,	// not noted: the connection table is full
	EVENT_INSERT_FAILED,	// not noted: the kernel had no memory for the entry at that moment
	EVENT_CLOSING,		// a FIN or RST that fits started closing
	EVENT_CLOSING_UNFIT,	// a FIN or RST whose numbers don't fit the connection: forwarded, not believed
	EVENT_TAKEN_BACK,	// traffic showed an entry marked closing or idle to be alive
	EVENT_PORT_STOLEN,	// a half-open connection lost its source port to a newer one
	EVENT_RESOLVED_SELF,	// an exception whose bit was missing was given it
	EVENT_REMOVED,		// an entry left the connection table
	EVENT_COLLISION,	// nat: another connection's way back was in the way: another backend was chosen
	EVENT_PATH_MTU,		// the way to a tunnel's end takes less than was known
	EVENT_JOURNAL_LOST, // what became of a connection could not be told: the daemon reads too slowly, or not at all
	EVENT_COUNT,
};

struct tuple4 {
	__be32 saddr;
	__be32 daddr;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};

struct tuple6 {
	__be32 saddr[4];
	__be32 daddr[4];
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};

union tuple {
	struct tuple4 v4;
	struct tuple6 v6;
};

struct service_key4 {
	__be32 address;
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

struct service_key6 {
	__be32 address[4];
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

struct address6 {
	__be32 address[4];
};

// What an address is to us.
enum address_flag {
	ADDRESS_SERVICE = 1,
	ADDRESS_SOURCE = 2, // of fullnat
	ADDRESS_TUNNEL = 4, // an outer source address
	ADDRESS_OWN = 8,    // XDP's own, and announced: ARP, NDP and echo are answered
	ADDRESS_CHECK = 16, // the host's own, that checks through a method come from
};

// What a port number may be to us: a look here spares most packets that are not ours any look-up.
enum port_flag {
	PORT_SERVICE = 1, // as destination: some service's
	PORT_SOURCE = 2,  // as destination: fullnat's
	PORT_BACKEND = 4, // as source: of a backend by nat
	PORT_CHECK = 8,	  // as destination: that checks through a method come from
};

struct port_set {
	__u8 flags[PORT_NUMBERS]; // by number, in network byte order
};

// What is known of a device by its number.
struct device {
	__u32 mtu;
	__u8 mac[6];
	__u16 pad;
};

enum service_flag {
	SERVICE_AFFINITY_CLIENT = 1, // the slot is chosen by the client's address alone
	SERVICE_LEAVING = 2,	     // no new connections
	SERVICE_RING_FIRST = 4,	     // some backend's method needs no state: the fast path is worth a look
};

enum down_policy {
	DOWN_RESET = 0,
	DOWN_KEEP = 1,
	DOWN_REHASH = 2,
};

struct service {
	__u32 id;
	__u32 ring_size;
	__u16 flags;
	__u8 on_backend_down;
	__u8 pad;
};

// A slot of a ring: the backend's number and whether the slot is unsettled.
enum slot {
	SLOT_BACKEND = 0x00ffffff,
	SLOT_NONE = 0x00ffffff, // no backend takes new connections
	SLOT_UNSETTLED = 1U << 31,
};

enum tag {
	TAG_ID = 0x0fff,
	TAG_8021AD = 0x1000, // its EtherType is 0x88a8, not 0x8100
};

// Where a frame goes next: the device, the Ethernet addresses and the VLAN tags it carries there, outermost first,
// 0 for none.
struct hop {
	__u8 mac[6];
	__u8 source_mac[6];
	__u32 ifindex;
	__u16 vlan[2];
};

enum backend_flag {
	BACKEND_UP = 1,
	BACKEND_NEIGHBOR = 2, // its next hop is known
	BACKEND_LEAVING = 4,  // out of the configuration; lives on for its connections
	BACKEND_TRIED = 8,    // down as all are: newcomers are tried on it, and their connections stay
};

// A backend's next hop is written into the half that is not in use, then `hop_index` is turned: no frame carries half
// of each.
struct backend {
	__be32 address[4]; // IPv4 in the first
	__be16 port;	   // 0: as the client's packet has it
	__u8 family;
	__u8 method;
	__u32 flags;
	__u32 service;
	__u32 mtu;
	__u32 hop_index;
	__u8 protocol;
	__u8 pad[3];
	__u32 down_at;		 // tick: what was opened before is lost while the backend is down
	__be32 tunnel_source[4]; // outer source address of ipip and gue
	__be32 tunnel_mask;	 // bits of its last word that vary with the connection
	struct hop hop[2];
	__u32 pool_count;
	__u32 pools[MAX_POOLS_A_BACKEND];
};

// A source address of fullnat and the ports it may use, both ends included.
struct source {
	__be32 address[4];
	__u16 first_port;
	__u16 last_port;
	__u8 family;
	__u8 pad[3];
};

// The port queue of one source address towards one backend's address and port.
struct pool {
	__u32 source;	   // number of the source address
	__be32 address[4]; // of the backend, for the daemon: the programs come here by the backend
	__be16 port;
	__u8 family; // 0: this number is free
	__u8 protocol;
};

enum connection_state {
	STATE_YOUNG = 1,	    // not shown to be talking both ways yet
	STATE_IDLE = 2,		    // idle for its timeout: an exception, until a packet or its removal
	STATE_CLIENT_FIN = 4,	    // the client has ended its side
	STATE_CLIENT_FIN_KNOWN = 8, // client_fin holds
	STATE_BACKEND_FIN = 16,
	STATE_BACKEND_FIN_KNOWN = 32,
	STATE_CLIENT_RESET = 64, // the client's last packet was a RST
	STATE_BACKEND_RESET = 128,
	STATE_STATELESS = 256,	   // its method sees no replies
	STATE_CONDEMNED = 512,	   // answers RST to whatever follows
	STATE_BACKEND_TOLD = 1024, // condemned: its backend got a RST
	STATE_CLIENT_TOLD = 2048,  // condemned: its client got a RST
};

struct connection {
	__u32 backend;
	__u32 generation; // the same in this entry and in the one for the way back
	__u32 tag;	  // of its key: shows that the element was not given to another key while it was read
	__u32 seen;	  // tick of its last packet
	__u32 state;
	__u16 source; // fullnat: number of the source address
	__be16 source_port;
	__u32 sequence_end;    // of the client's last packet
	__u32 acknowledgement; // of the client's last packet
	struct hop hop;	       // where the client's packets come from, and so where replies go
	__u32 service;
	__u32 opened;	  // tick
	__u32 marked;	  // tick of the mark idle, or of the last step of closing
	__u32 client_fin; // sequence number behind the client's FIN
	__u32 backend_fin;
	__u32 base_sequence; // young: of the handshake
	__u32 base_acknowledgement;
	// Of the timestamp option of the client's last packet (RFC 7323); both 0: it has none.
	__u32 timestamp;
	__u32 timestamp_echo;
};

enum half_state {
	HALF_SYN_ACK = 1,   // the backend has answered; backend_sequence holds
	HALF_ACK = 2,	    // the client has answered; base_acknowledgement holds
	HALF_STATELESS = 4, // its method sees no replies
};

struct half_open {
	__u32 backend;
	__u32 generation;
	__u32 tag;
	__u32 first; // tick of the first SYN: its life is counted from here, whatever follows
	__u32 state;
	__u16 source;
	__be16 source_port;
	__u32 client_sequence[2]; // behind the first and the latest SYN
	__u32 backend_sequence;	  // behind the SYN of the SYN-ACK
	__u32 base_acknowledgement;
	struct hop hop;
	__u32 service;
};

// Whether a source port's number is in its pool's queue. It stays there while its connection is half-open.
enum token {
	TOKEN_QUEUED = 0,
	TOKEN_OUT = 1,
	TOKEN_GONE = 2, // the entry is being removed
};

// The way back of fullnat, keyed by the tuple of the backend's packets. What both families share stands first.
struct way_back {
	__u32 generation;
	__u32 token;
	__u32 first; // tick of the SYN
	__u32 pool;
};

struct reply4 {
	struct way_back back;
	struct tuple4 client;
};

struct reply6 {
	struct way_back back;
	struct tuple6 client;
};

// One writer each: the daemon writes the first line, the programs the others.
struct control_block {
	__u32 epoch;
	__u32 exception_index; // which exception bitmap is asked
	__u32 exception_both;  // a rebuild is under way: both are written
	__u32 pad[13];
	__s64 connections; // entries in the connection table
	__u64 pad2[7];
	__s64 young; // young ones among them
	__u64 pad3[7];
	__u64 identifications; // given to fragments
	__u64 pad4[7];
};

struct bitmap_set {
	__u64 exception[2][BITMAP_WORDS];
	__u64 fresh[2][BITMAP_WORDS];
};

// Whom a frame's Ethernet addresses name. One to or from a group of hosts is no router's to forward or to answer
// (RFC 1122, section 3.3.6; RFC 1812, section 5.3.4).
enum frame_group {
	GROUP_TO = 1,
	GROUP_FROM = 2,
};

// flow is what the tables are asked with: a packet's or a connection's tuple, and what the TCP header says.
struct flow {
	__u64 hash;	   // of the client's tuple
	union tuple tuple; // as on the wire
	__u32 sequence;
	__u32 sequence_end; // behind the payload, and behind a FIN or SYN
	__u32 acknowledgement;
	__u32 timestamp; // both 0: none
	__u32 timestamp_echo;
	__u8 family;
	__u8 protocol;
	__u8 flags;	 // of TCP
	__u8 fragment;	 // the first of several
	__u32 length;	 // of the IP packet
	__u16 l3;	 // where in the frame the IP header begins,
	__u16 l4;	 // and what it carries,
	__u16 extension; // IPv6: and the fragment header
	__u16 group;	 // enum frame_group
	__u16 loose;	 // its way takes less than IPv6's least: outer packets may be fragmented
	struct hop from; // the way back
};

struct port_choice {
	__u32 pool;
	__u32 source;
	__be16 port;
	__u16 pad;
	union tuple reply;
	__u32 popped; // a number just taken from a queue
};

struct reply_choice {
	union tuple client;
	struct hop hop;
	__u32 backend;
	__u32 service;
};

// What a CPU may do so many times in a tick.
struct budget {
	__u32 tick;
	__u32 left;
};

// The tick of a jiffy.
struct clock {
	__u64 jiffies;
	__u32 tick;
	__u32 pad;
};

enum budget_kind {
	BUDGET_ADOPTIONS = 0,
	BUDGET_ANSWERS = 1,
	BUDGET_COUNT,
};

// The end of a tunnel, and what is known of the way to it.
struct path_key {
	__be32 address[4];
	__u32 family;
};

struct path {
	__u32 mtu; // 0: nothing was said
	__u32 tick;
};

// A RST about to be made of the packet in hand, as it is to be on the wire.
struct reset {
	union tuple tuple;
	__u32 sequence;
	__u32 acknowledgement;
	__u32 flags;
};

// What becomes of entries of the connection table, for the daemon to keep on disk.
enum journal_what {
	JOURNAL_OPENED = 1,
	JOURNAL_CHANGED = 2, // in what is kept of it: it has matured
	JOURNAL_CLOSED = 3,  // tuple and generation alone
};

struct journal_event {
	__u32 what;
	__u32 family;
	struct tuple6 tuple; // IPv4: a struct tuple4 stands in its first 16 bytes
	struct connection connection;
};

// A frame that answers a check through a method, for the daemon.
struct check_frame {
	__u32 ifindex;
	__u32 length; // bytes of the frame; no more than CHECK_FRAME_MAX of them are here
	__u8 data[CHECK_FRAME_MAX];
};

// The fragments of one packet.
struct fragment_key {
	__be32 saddr[4];
	__be32 daddr[4];
	__u32 id;
	__u8 protocol; // IPv4
	__u8 family;
	__u16 pad;
};

// Where they go, as their first did.
struct fragment {
	__u32 tick; // of the first
	__u32 backend;
	__u32 service;
	__u32 id;      // fullnat: they get one of ours
	__u32 reply;   // from a backend to a client
	__u32 rewrite; // the addresses below replace theirs
	__u32 hash;    // of the connection
	__be32 saddr[4];
	__be32 daddr[4];
	struct hop hop; // of a reply
};

// What an ICMP error says of the packet that it is about.
struct quoted {
	union tuple tuple; // as quoted
	union tuple to;	   // what its receiver is to see there
	__u16 icmp;	   // offsets in the frame
	__u16 l3;
	__u16 l4;
	__u16 l4_length; // how much of it is there
	__u32 mtu;
	__be32 saddr[4]; // the outer addresses that its receiver is to see
	__be32 daddr[4];
	__u8 type;
	__u8 pad[3];
};

// Room for what is too large for the stack of 512 bytes that nested functions share, and for keys: Linux 6.1 takes a
// map's key from the stack or from a map's value, not from memory that a global function was given.
struct scratch {
	struct flow flow; // of the packet, or of the connection, in hand
	struct connection connection;
	struct half_open half;
	struct port_choice port;
	struct way_back back;
	union tuple removed; // the way back of a connection being removed
	union tuple kept;    // of the packet, while the flow in hand is another
	struct reply_choice reply_choice;
	struct quoted quoted;
	struct fragment_key fragment_key;
	struct fragment fragment;
	struct path_key path;
	struct reset reset;
	__u32 mtu; // that a packet was too big for
	__u8 quote[QUOTE_MAX];
};

struct counter_set {
	__u64 verdicts[VERDICT_COUNT];
	__u64 events[EVENT_COUNT];
};

struct traffic {
	__u64 packets; // from clients
	__u64 bytes;
	__u64 connections;   // new: SYNs given a backend
	__u64 refused;	     // answered RST or dropped
	__u64 reply_packets; // from backends
	__u64 reply_bytes;
	__u64 answered; // where replies are seen: SYNs that the backend answered SYN-ACK,
	__u64 rejected; // or RST
};

// What checks say of a backend. The programs don't ask; they go by its flags.
enum health {
	HEALTH_NONE = 0, // not checked
	HEALTH_UNKNOWN = 1,
	HEALTH_UP = 2,
	HEALTH_DOWN = 3,
	HEALTH_HELD = 4, // down, and held there as it has flapped
};

// Why a backend has not the weight, or not the connections, that the configuration and its checks alone would give it.
enum order {
	ORDER_DRAIN = 1,	// by command
	ORDER_WEIGHT = 2,	// by command
	ORDER_DISABLED = 4,	// by configuration
	ORDER_CHECK_DRAIN = 8,	// by its check's answer
	ORDER_CHECK_MAINT = 16, // by its check's answer
	ORDER_CHECK_WEIGHT = 32,
	ORDER_SLOW_START = 64,
};

// What a service makes of its backends' checks.
enum standing {
	STANDING_ALL_DOWN = 1, // all are down
	STANDING_PANIC = 2,    // so few are up that the checks' verdict is off
};

// Names, for whoever reads the maps; the programs don't.
struct service_label {
	__u8 name[MAX_NAME];
	__be32 address[4];
	__be16 port;
	__u8 family; // 0: this number is free
	__u8 protocol;
	__u32 ring_size;
	__u32 flags;
	__u32 standing;	    // enum standing
	__u64 idle_timeout; // ns
};

struct backend_label {
	__u8 name[MAX_NAME];
	__u32 used;		   // 0: this number is free
	__u32 weight;		   // as configured or by command
	__u32 configured;	   // weight in the configuration
	__u32 percent;		   // how much of its weight it has in the ring
	__u32 health;		   // enum health
	__u32 orders;		   // enum order
	__u32 since;		   // tick of `health`
	__u32 failed;		   // tick of the last failed check; 0: none
	__u8 failure[MAX_FAILURE]; // its reason
	__u8 reason[MAX_NAME];	   // why there is no next hop
};

// `tend` looks after entries for the daemon, and looks again as it does so: a record is obeyed only where the entry is
// still as it was seen.
enum tend_what {
	TEND_NOTHING = 0,
	TEND_MARK_IDLE = 1,
	TEND_REMOVE = 2,
	TEND_REMOVE_HALF_OPEN = 3,
	TEND_CONDEMN = 4,
	TEND_DONE = 100,    // the program's answer: obeyed
	TEND_CHANGED = 101, // not obeyed: the entry has changed since
	TEND_ABSENT = 102,  // not obeyed: no such entry
};

struct tend_record {
	__u32 what;
	__u32 generation;
	__u32 seen;
	struct tuple6 tuple; // IPv4: a struct tuple4 stands in its first 16 bytes
};

struct tend_request {
	__u32 family;
	__u32 count;
	__u32 pad[2];
	struct tend_record records[TEND_RECORDS];
};

struct fill_request {
	__u32 pool;
	__u32 first_port;
	__u32 count; // at most FILL_PORTS
	__u32 pad;
};

// Types that Go needs and no map's layout names: debug information keeps only what is used.
struct shared_types {
	enum schema schema;
	enum limits limits;
	enum family family;
	enum method method;
	enum verdict verdict;
	enum event event;
	enum service_flag service_flag;
	enum down_policy down_policy;
	enum slot slot;
	enum address_flag address_flag;
	enum port_flag port_flag;
	enum tag tag;
	enum backend_flag backend_flag;
	enum connection_state connection_state;
	enum half_state half_state;
	enum token token;
	enum tend_what tend_what;
	enum health health;
	enum order order;
	enum standing standing;
	struct check_frame check_frame;
	enum journal_what journal_what;
	struct journal_event journal_event;
	struct tend_request tend_request;
	struct fill_request fill_request;
};
