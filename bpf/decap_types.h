// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// What the program of `fairlead decap`, its maps and Go share: every constant and every layout. Padding has a name.
#pragma once

#include <linux/types.h>

// A change of a layout or of a meaning below is a new schema version: it is part of the pin path.
enum schema {
	SCHEMA_VERSION = 1,
};

enum limits {
	MAX_ADDRESSES = 1024,
	MAX_PREFIXES = 1024,
	GUE_PORT = 6080, // of IANA
};

// What the program decided for a frame. The prefix says what was done with it; Go takes the names from here. All that
// passes unopened, and all that was opened, goes to the host's stack.
enum verdict {
	PASS_NOT_TUNNEL,    // none of the formats that are opened
	PASS_OTHER_ADDRESS, // to an address that nothing is opened for
	PASS_OTHER_SOURCE,  // from outside of the sources that were named
	PASS_FRAGMENT,	    // a fragment of an outer packet: joining them is the stack's
	PASS_EXTENSION,	    // to an address of ours, an IPv6 extension header first: what is behind is not looked at
	PASS_OTHER_GUE,	    // to GUE's port, but no IP packet stands directly behind the UDP header
	OPENED_4IN4,	    // the inner family, then the outer one: see opened_kind()
	OPENED_6IN4,
	OPENED_4IN6,
	OPENED_6IN6,
	OPENED_GUE_4IN4,
	OPENED_GUE_6IN4,
	OPENED_GUE_4IN6,
	OPENED_GUE_6IN6,
	DROP_TRUNCATED,	   // the frame ends before the outer packet does, or before the headers do
	DROP_BAD_HEADER,   // an outer IPv4 header of less than 20 bytes
	DROP_BAD_CHECKSUM, // the outer IPv4 header's
	DROP_BAD_LENGTH,   // the outer lengths leave no room for their own headers, or UDP's is longer than IP's
	DROP_INNER_HEADER, // not of the family that the outer header says, or an IPv4 header of less than 20 bytes
	DROP_INNER_LENGTH, // the inner packet is longer than the outer one has room for, or shorter than its own header
	DROP_CONGESTION,   // congestion was experienced on the way, and the inner packet can't say so
	VERDICT_COUNT,
};

// What was met besides. The prefix EVENT_ is not part of the name.
enum event {
	EVENT_CONGESTION_MARKED,  // an opened packet got the mark that its outer header had
	EVENT_CONGESTION_STRANGE, // inner and outer ECN fields as no tunnel makes them: opened as RFC 6040 says
	EVENT_COUNT,
};

struct address6 {
	__u8 bytes[16];
};

// Keys of the tries: prefixes by length, then address.
struct prefix4 {
	__u32 length;
	__u8 address[4];
};

struct prefix6 {
	__u32 length;
	__u8 address[16];
};

struct counter_set {
	__u64 verdicts[VERDICT_COUNT];
	__u64 events[EVENT_COUNT];
};

// Types that Go needs and no map's layout names: debug information keeps only what is used.
struct shared_types {
	enum schema schema;
	enum limits limits;
	enum verdict verdict;
	enum event event;
};
