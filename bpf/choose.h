// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Step 3: choose the backend of a client's packet. By ring alone where that is right, else by the tables.
#pragma once

#include "clock.h"
#include "connections.h"
#include "ports.h"
#include "ring.h"
#include "track.h"

// A 64th of the connection table is kept for connections whose method needs an entry and whose handshake is under way.
#define HANDSHAKE_SHARE 64
#define NEW_TRIES 4 // slots tried for a new connection whose own slot's backend can't be reached

// choice is the answer of a global function, so plain values again.
struct choice {
	__u32 backend;
	__u16 source; // fullnat
	__be16 source_port;
	__u32 new;
};

static __always_inline bool is_udp(const struct flow *flow)
{
	return use_udp && flow->protocol == IPPROTO_UDP;
}

// stateless tells the methods whose packets from clients need nothing but the backend's name.
static __always_inline bool stateless(__u8 method)
{
	return method == METHOD_DSR || method == METHOD_IPIP || method == METHOD_GUE;
}

// serves says whether a backend may have the packets of a connection opened then. With all backends down newcomers are
// tried on them, while what was opened before is lost.
static __always_inline bool serves(const struct backend *backend, __u32 opened)
{
	if (backend->flags & BACKEND_UP)
		return true;
	return backend->flags & BACKEND_TRIED && (__s32)(opened - backend->down_at) >= 0;
}

#define SLOT_ABSENT 0xffffffffU // no such ring

static __always_inline __u32 slot_at(const struct service *service, __u32 slot)
{
	__u32 *word = ring_entry(service, slot);

	return word ? *(volatile __u32 *)word : SLOT_ABSENT;
}

static __always_inline __u32 slot_look(const struct flow *flow, const struct service *service)
{
	return slot_at(service, slot_of(slot_hash(flow, service), service->ring_size));
}

// connection_insert puts the connection in hand into the connection table. An entry that is to differ from its slot has
// its exception bit first. False: there is no room, as counted.
__noinline int connection_insert(struct half_open *from, struct service *service, __u32 state, __u32 now)
{
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();
	struct scratch *room = scratch_get();
	struct connection *value, *old;
	struct backend *backend;
	struct flow *flow;
	long failed;

	if (!from || !service || !ctl || !bits || !room)
		return false;
	if (!room_left(ctl, 0)) {
		count_event(EVENT_TABLE_FULL);
		return false;
	}
	if (state & STATE_YOUNG && ctl->young >= (__s64)young_budget) {
		count_event(EVENT_YOUNG_LIMITED);
		return false;
	}
	flow = &room->flow;
	value = &room->connection;
	__builtin_memset(value, 0, sizeof(*value));
	value->backend = from->backend;
	value->generation = from->generation;
	value->tag = tag_of(flow->hash);
	value->seen = now;
	value->state = state;
	value->source = from->source;
	value->source_port = from->source_port;
	value->sequence_end = flow->flags & TCP_FIN ? flow->sequence_end - 1 : flow->sequence_end;
	value->acknowledgement = flow->acknowledgement;
	value->hop = from->hop;
	value->service = from->service;
	value->opened = from->first;
	value->base_sequence = from->client_sequence[1];
	value->base_acknowledgement = flow->acknowledgement;
	if (!is_udp(flow)) {
		value->timestamp = flow->timestamp;
		value->timestamp_echo = flow->timestamp_echo;
	}

	// Who is young is an exception as well: its next packets must be looked at, whoever shares its fresh bit.
	if (state & STATE_YOUNG || (slot_look(flow, service) & SLOT_BACKEND) != value->backend)
		exception_note(ctl, bits, flow->hash);
	// Only an entry whose backend is down gives way, or one that was condemned.
	old = connection_find(flow->family, &flow->tuple, flow->hash);
	if (old) {
		if (old->generation == from->generation)
			return true;
		backend = backend_get(old->backend);
		if (backend && serves(backend, old->opened) && !(old->state & STATE_CONDEMNED))
			return false;
		connection_remove(old->generation, ROOM_PACKETS);
	}
	failed = BY_FAMILY(flow->family, &flow->tuple, connections4, connections6, bpf_map_update_elem, value,
			   BPF_NOEXIST);
	if (failed == -EEXIST) // another CPU was first, with a packet of the same connection
		return true;
	if (failed) {
		count_event(EVENT_INSERT_FAILED);
		return false;
	}
	__sync_fetch_and_add(&ctl->connections, 1);
	if (state & STATE_YOUNG)
		__sync_fetch_and_add(&ctl->young, 1);
	count_event(EVENT_CONFIRMED);
	journal_tell(ROOM_PACKETS, JOURNAL_OPENED, value->generation);
	return true;
}

// half_paired looks up the way back of a half-open connection, and whether both entries are of one kind; false: its
// port was taken from it. The way back's tuple and value are left in the scratch room.
__noinline int half_paired(struct half_open *half)
{
	struct scratch *room = scratch_get();
	struct backend *backend;
	struct way_back *back;

	if (!half || !room)
		return false;
	backend = backend_get(half->backend);
	if (!backend || !reply_tuple(&room->flow, backend, half->source, half->source_port, &room->port.reply))
		return false;
	back = half_reply_find(room->flow.family, &room->port.reply, NULL);
	if (!back || back->generation != half->generation)
		return false;
	room->back = *back;
	return true;
}

// confirm lets a half-open connection into the connection table, and then takes it out of the half-open one.
__noinline int confirm(struct half_open *half, struct service *service, __u32 state, __u32 now)
{
	struct backend *backend;
	struct scratch *room = scratch_get();
	struct flow *flow;
	int failed;

	if (!half || !service || !room)
		return false;
	flow = &room->flow;
	if (half->state & HALF_STATELESS) {
		if (!connection_insert(half, service, state, now))
			return false;
		half_open_remove(flow->family, &flow->tuple);
		return true;
	}

	backend = backend_get(half->backend);
	if (!backend || !half_paired(half) || !connection_insert(half, service, state, now))
		return false;
	failed = reply_insert(false);
	if (failed && failed != -EEXIST) {
		connection_remove(half->generation, ROOM_PACKETS);
		count_event(EVENT_INSERT_FAILED);
		return false;
	}
	half_open_remove(flow->family, &flow->tuple);
	BY_FAMILY(flow->family, &room->port.reply, half_replies4, half_replies6, bpf_map_delete_elem);
	if (use_fullnat && half->source_port)
		ports_look_after(backend, room->back.pool, now);
	return true;
}

// established is a packet whose connection is in the connection table.
static __always_inline enum verdict established(const struct flow *flow, const struct service *service,
						struct connection *conn, __u32 now, struct choice *choice)
{
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();
	__u32 word;

	choice->backend = conn->backend;
	choice->source = conn->source;
	choice->source_port = conn->source_port;
	if (!ctl || !bits)
		return FORWARD_TABLE;
	if (flow->flags & TCP_SYN) {
		// A SYN on a living connection, a spoofed one or a reused tuple: it goes where the connection is. An
		// entry that was about to go waits for what becomes of it.
		fresh_clear(ctl, bits, flow->hash);
		if (conn->state & ~(STATE_STATELESS | STATE_YOUNG)) {
			touch(conn, now);
			state_change(conn, STATE_IDLE, 0);
		}
		return FORWARD_TABLE;
	}
	if (track_client(ctl, bits, conn, flow, now)) {
		// Replies go back by the hop this packet came from, and so does whatever else its client is told.
		if (*(__u32 *)conn->hop.mac != *(__u32 *)flow->from.mac ||
		    *(__u16 *)&conn->hop.mac[4] != *(__u16 *)&flow->from.mac[4] ||
		    conn->hop.ifindex != flow->from.ifindex || *(__u32 *)conn->hop.vlan != *(__u32 *)flow->from.vlan)
			conn->hop = flow->from;
	}
	if (!(service->flags & SERVICE_RING_FIRST))
		return FORWARD_TABLE;
	word = slot_look(flow, service);
	if ((word & SLOT_BACKEND) == conn->backend) {
		if (conn->state == STATE_STATELESS)
			fresh_set(ctl, bits, flow->hash);
	} else if (!(word & SLOT_UNSETTLED) && !exception_test(ctl, bits, flow->hash)) {
		exception_note(ctl, bits, flow->hash);
		count_event(EVENT_RESOLVED_SELF);
	}
	return FORWARD_TABLE;
}

// half_opened is a packet whose connection is not confirmed yet; it may be what confirms it.
static __always_inline enum verdict half_opened(struct flow *flow, struct service *service, struct half_open *half,
						__u32 now, struct choice *choice)
{
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();
	struct connection *conn;
	__u32 state = 0;

	choice->backend = half->backend;
	choice->source = half->source;
	choice->source_port = half->source_port;
	if (!ctl || !bits || flow->flags & TCP_RST)
		return FORWARD_HALF_OPEN;
	if (is_udp(flow)) {
		// Where replies are seen, one has confirmed it already, if there was room; elsewhere a client that goes
		// on sending does.
		if (half->state & HALF_STATELESS ? since(now, half->first) >= UDP_PROOF : half->state & HALF_SYN_ACK)
			confirm(half, service, half->state & HALF_STATELESS ? STATE_STATELESS | STATE_YOUNG : 0, now);
		return FORWARD_HALF_OPEN;
	}
	if (flow->flags & TCP_SYN) {
		fresh_clear(ctl, bits, flow->hash);
		half->client_sequence[1] = flow->sequence + 1;
		return FORWARD_HALF_OPEN;
	}
	if (!(half->state & HALF_STATELESS)) {
		// The backend's SYN-ACK, then the client's matching ACK. What a backend may have sent with TCP Fast
		// Open (RFC 7413) fits into the window.
		if (!(half->state & HALF_SYN_ACK) || flow->acknowledgement - half->backend_sequence > 0xffff)
			return FORWARD_HALF_OPEN;
	} else {
		// No replies to be seen: the client's ACK behind its own SYN makes a young entry, and numbers that have
		// both moved on since make a grown one.
		if (flow->sequence - half->client_sequence[0] > 0xffff &&
		    flow->sequence - half->client_sequence[1] > 0xffff)
			return FORWARD_HALF_OPEN;
		state = STATE_STATELESS | STATE_YOUNG;
		if (half->state & HALF_ACK && flow->sequence_end != half->client_sequence[1] &&
		    flow->acknowledgement != half->base_acknowledgement)
			state = STATE_STATELESS;
		if (!(half->state & HALF_ACK))
			half->base_acknowledgement = flow->acknowledgement;
		half->state |= HALF_ACK;
	}
	if (confirm(half, service, state, now) && flow->flags & TCP_FIN) {
		conn = connection_find(flow->family, &flow->tuple, flow->hash);
		if (conn)
			track_client(ctl, bits, conn, flow, now);
	}
	return FORWARD_HALF_OPEN;
}

static __always_inline bool takes_new(const struct backend *backend)
{
	return backend->flags & (BACKEND_UP | BACKEND_TRIED) &&
	       (backend->flags & (BACKEND_NEIGHBOR | BACKEND_LEAVING)) == BACKEND_NEIGHBOR;
}

static __always_inline bool same_tuple(__u8 family, const union tuple *a, const union tuple *b)
{
	const __u32 *left = (const __u32 *)a, *right = (const __u32 *)b;
	__u32 differ = 0;

	for (int i = 0; i < (int)sizeof(struct tuple4) / 4; i++)
		differ |= left[i] ^ right[i];
	if (family == FAMILY_IPV6)
		for (int i = sizeof(struct tuple4) / 4; i < (int)sizeof(struct tuple6) / 4; i++)
			differ |= left[i] ^ right[i];
	return !differ;
}

// nat_way_free says whether no other connection has the way back that the flow in hand would have from a backend by
// nat, and leaves its tuple in the scratch room: one client port to two services that share a backend gives one.
__noinline int nat_way_free(struct backend *backend, __u32 now)
{
	struct scratch *room = scratch_get();
	struct way_back *back;
	union tuple *client;
	struct flow *flow;

	if (!backend || !room)
		return false;
	flow = &room->flow;
	client = &room->reply_choice.client;
	nat_tuple(backend, &flow->tuple, &room->port.reply);
	if (reply_find(flow->family, &room->port.reply, client) && !same_tuple(flow->family, client, &flow->tuple))
		return false;
	back = half_reply_find(flow->family, &room->port.reply, client);
	return !back || since(now, back->first) >= half_open_life || same_tuple(flow->family, client, &flow->tuple);
}

// opening is a SYN, or UDP's first packet, of a connection nobody knows.
__noinline int opening(struct service *service, struct choice *choice)
{
	__u32 now = clock_now();
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();
	struct backend *backend = NULL;
	struct scratch *room = scratch_get();
	struct half_open *half;
	struct flow *flow;
	bool any = false, collided = false;
	__u64 hash, own;
	int failed;

	if (!service || !choice || !ctl || !bits || !room)
		return DROP_NO_RING;
	flow = &room->flow;
	half = &room->half;
	__builtin_memset(half, 0, sizeof(*half));
	fresh_clear(ctl, bits, flow->hash);
	if (service->flags & SERVICE_LEAVING)
		return RESET_LEAVING;
	hash = own = slot_hash(flow, service);
	for (int i = 0; i < NEW_TRIES; i++) {
		__u32 word;

		if (i > 0)
			hash = hash_finish(hash + i);
		word = slot_at(service, slot_of(hash, service->ring_size));
		if (word == SLOT_ABSENT)
			return DROP_NO_RING;
		half->backend = word & SLOT_BACKEND;
		if (half->backend == SLOT_NONE)
			continue;
		any = true;
		backend = backend_get(half->backend);
		if (backend && takes_new(backend)) {
			if (!use_nat || backend->method != METHOD_NAT || nat_way_free(backend, now))
				break;
			count_event(EVENT_COLLISION);
			collided = true;
		}
		backend = NULL;
	}
	if (!backend && collided)
		return RESET_NO_PORT;
	if (!backend)
		return any ? DROP_NO_NEIGHBOR : RESET_NO_BACKEND;

	half->generation = generation_next();
	half->tag = tag_of(flow->hash);
	half->first = now;
	half->client_sequence[0] = half->client_sequence[1] = flow->sequence + 1;
	half->service = service->id;
	half->hop = flow->from;
	if (stateless(backend->method)) {
		half->state = HALF_STATELESS;
	} else {
		bool fullnat = use_fullnat && backend->method == METHOD_FULLNAT;

		if (!room_left(ctl, connection_capacity / HANDSHAKE_SHARE)) {
			count_event(EVENT_TABLE_FULL);
			return RESET_TABLE_FULL;
		}
		if (fullnat && !port_take(backend, flow->hash >> 20, now))
			return RESET_NO_PORT;
		__builtin_memset(&room->back, 0, sizeof(room->back));
		room->back.generation = half->generation;
		room->back.first = now;
		if (fullnat) {
			room->back.pool = room->port.pool;
			half->source = room->port.source;
			half->source_port = room->port.port;
		}
		failed = reply_insert(true);
		if (fullnat)
			port_handed_out();
		if (failed)
			return RESET_TABLE_FULL;
	}
	// Where the ring may answer alone, the tables must yet be asked for what confirms this connection, whoever
	// shares its fresh bit; and an entry on another slot's backend has its exception bit first.
	if (stateless(backend->method) || hash != own)
		exception_note(ctl, bits, flow->hash);
	BY_FAMILY(flow->family, &flow->tuple, half_open4, half_open6, bpf_map_update_elem, half, BPF_ANY);
	choice->backend = half->backend;
	choice->source = half->source;
	choice->source_port = half->source_port;
	choice->new = true;
	return FORWARD_NEW;
}

// unknown is a packet in mid-connection that no table knows: the ring decides, where its method can do without more.
__noinline int unknown(struct service *service, struct choice *choice)
{
	__u32 now = clock_now();
	struct scratch *room = scratch_get();
	struct half_open *as;
	struct flow *flow;
	struct backend *backend;
	__u32 word;

	if (!service || !choice || !room)
		return DROP_NO_RING;
	flow = &room->flow;
	word = slot_look(flow, service);
	if (word == SLOT_ABSENT)
		return DROP_NO_RING;
	choice->backend = word & SLOT_BACKEND;
	backend = backend_get(choice->backend);
	if (!backend)
		return RESET_NO_BACKEND;
	if (!stateless(backend->method))
		return RESET_UNKNOWN;
	if (!(backend->flags & BACKEND_UP))
		return service->on_backend_down == DOWN_RESET ? RESET_BACKEND_DOWN : FORWARD_UNKNOWN;
	if (flow->flags & (TCP_FIN | TCP_RST))
		return FORWARD_UNKNOWN;
	if (!budget_spend(BUDGET_ADOPTIONS, adoptions_a_tick, now)) {
		count_event(EVENT_ADOPTION_LIMITED);
		return FORWARD_UNKNOWN;
	}
	as = &room->half;
	__builtin_memset(as, 0, sizeof(*as));
	as->backend = choice->backend;
	as->generation = generation_next();
	as->service = service->id;
	as->first = now;
	as->client_sequence[1] = flow->sequence_end;
	as->hop = flow->from;
	return connection_insert(as, service, STATE_STATELESS | STATE_YOUNG, now) ? FORWARD_ADOPTED : FORWARD_UNKNOWN;
}

// client_told notes that a client is about to get a RST, if its packet is its own: a stranger's makes one that it does
// not believe. A RST of its own ends the connection as well.
static __always_inline void client_told(const struct flow *flow, struct connection *conn, __u32 now)
{
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();

	if (!ctl || !bits || !fits(conn, flow->sequence))
		return;
	exception_note(ctl, bits, flow->hash);
	conn->marked = now;
	touch(conn, now);
	state_change(conn, 0, STATE_CONDEMNED | STATE_CLIENT_TOLD | (flow->flags & TCP_RST ? STATE_CLIENT_RESET : 0));
}

// condemned is a packet of a connection that was closed by command. Its backend is told first, by a RST made of it,
// then the client: there is one packet to answer with at a time.
static __always_inline enum verdict condemned(struct flow *flow, struct connection *conn, bool alive, __u32 now,
					      struct choice *choice)
{
	choice->backend = conn->backend;
	choice->source = conn->source;
	choice->source_port = conn->source_port;
	if (alive && !fits(conn, flow->sequence))
		return RESET_CONDEMNED;
	if (alive && (flow->flags & TCP_RST || !(conn->state & STATE_BACKEND_TOLD))) {
		// A keep-alive of the client's own, with a byte or without (RFC 9293, section 3.8.4): its backend would
		// not believe a RST from where it has been.
		if (conn->sequence_end - flow->sequence == 1 && flow->sequence_end - flow->sequence <= 1)
			flow->sequence++;
		conn->marked = now;
		touch(conn, now);
		state_change(conn, 0,
			     STATE_BACKEND_TOLD | (flow->flags & TCP_RST ? STATE_CLIENT_RESET | STATE_CLIENT_TOLD : 0));
		return FORWARD_RESET;
	}
	client_told(flow, conn, now);
	return alive ? RESET_CONDEMNED : RESET_BACKEND_DOWN;
}

// backend_lost is a packet of a connection whose backend is down: the service's policy decides.
static __always_inline enum verdict backend_lost(struct flow *flow, struct service *service, struct connection *conn,
						 __u32 now, struct choice *choice)
{
	struct backend *backend;
	__u32 word;

	if (service->on_backend_down == DOWN_REHASH && conn->state & STATE_STATELESS) {
		word = slot_look(flow, service) & SLOT_BACKEND;
		backend = backend_get(word);
		if (backend && stateless(backend->method) && backend->flags & BACKEND_UP)
			conn->backend = word;
	} else if (service->on_backend_down != DOWN_KEEP) {
		client_told(flow, conn, now);
		return RESET_BACKEND_DOWN;
	}
	return established(flow, service, conn, now, choice);
}

// lost_for_good tells whether the service's policy has nothing for a connection whose backend is down but its end.
static __always_inline bool lost_for_good(const struct service *service, const struct connection *conn)
{
	return service->on_backend_down == DOWN_RESET ||
	       (service->on_backend_down == DOWN_REHASH && !(conn->state & STATE_STATELESS));
}

#define NOT_IN_TABLES VERDICT_COUNT

// by_tables asks the connection table, then the half-open one. An entry that was condemned, or whose backend is down,
// gives way to a newer half-open one, and to a SYN; else it is answered as condemned, or by the service's policy for
// backends that are down. NOT_IN_TABLES: the ring has to decide.
__noinline int by_tables(struct service *service, struct choice *choice)
{
	__u32 now = clock_now();
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();
	struct scratch *room = scratch_get();
	struct connection *conn;
	struct backend *backend;
	struct half_open *half;
	bool alive = false;
	struct flow *flow;

	if (!service || !choice || !room)
		return DROP_NO_RING;
	flow = &room->flow;
	conn = connection_find(flow->family, &flow->tuple, flow->hash);
	if (conn) {
		backend = backend_get(conn->backend);
		alive = backend && serves(backend, conn->opened);
		if (alive && !(conn->state & STATE_CONDEMNED))
			return established(flow, service, conn, now, choice);
	}
	half = half_open_find(flow->family, &flow->tuple, flow->hash, now);
	if (half) {
		backend = backend_get(half->backend);
		if (backend && serves(backend, half->first) && (half->state & HALF_STATELESS || half_paired(half)))
			return half_opened(flow, service, half, now, choice);
	}
	if (!conn)
		return NOT_IN_TABLES;
	if (is_udp(flow) && (conn->state & STATE_CONDEMNED || lost_for_good(service, conn))) {
		// Its client is told once. What it sends then is new: UDP has no other way to say so.
		if (conn->state & STATE_CLIENT_TOLD)
			return NOT_IN_TABLES;
		if (ctl && bits)
			exception_note(ctl, bits, flow->hash);
		conn->marked = now;
		touch(conn, now);
		state_change(conn, 0, STATE_IDLE | STATE_CLIENT_TOLD);
		return conn->state & STATE_CONDEMNED ? RESET_CONDEMNED : RESET_BACKEND_DOWN;
	}
	if (flow->flags & TCP_SYN)
		return NOT_IN_TABLES;
	if (conn->state & STATE_CONDEMNED)
		return condemned(flow, conn, alive, now, choice);
	return backend_lost(flow, service, conn, now, choice);
}

#define TIMESTAMP_OPTION 0x0101080a // two of padding, kind 8, length 10

// timestamps_note reads a timestamp option where all but SYNs have it: behind two bytes of padding, first of all
// options (RFC 7323, appendix A).
static __always_inline void timestamps_note(struct packet *pkt)
{
	struct flow *flow = pkt->flow;
	__be32 *option = (void *)(pkt->tcp + 1);

	flow->timestamp = flow->timestamp_echo = 0;
	if (is_udp(flow) || (void *)(option + 3) > packet_end(pkt) || pkt->tcp->doff < 8 ||
	    option[0] != bpf_htonl(TIMESTAMP_OPTION))
		return;
	flow->timestamp = bpf_ntohl(option[1]);
	flow->timestamp_echo = bpf_ntohl(option[2]);
}

static __always_inline enum verdict choose(struct packet *pkt, struct service *service, struct choice *choice)
{
	struct flow *flow = pkt->flow;
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();
	struct backend *backend;
	__u32 verdict, word;

	// A client's packet is a SYN, a RST, or carries an ACK.
	if (!is_udp(flow) && (flow->flags & TCP_SYN ? flow->flags & (TCP_ACK | TCP_FIN | TCP_RST)
						    : !(flow->flags & (TCP_ACK | TCP_RST))))
		return DROP_BAD_FLAGS;
	// The fast path: no table is read and no clock asked.
	if ((use_dsr || use_tunnel) && service->flags & SERVICE_RING_FIRST &&
	    !(flow->flags & (TCP_SYN | TCP_FIN | TCP_RST)) && ctl && bits) {
		word = slot_look(flow, service);
		if (!(word & SLOT_UNSETTLED) && !exception_test(ctl, bits, flow->hash) &&
		    fresh_test(ctl, bits, flow->hash)) {
			choice->backend = word & SLOT_BACKEND;
			backend = backend_get(choice->backend);
			if (backend && stateless(backend->method) && backend->flags & BACKEND_UP)
				return FORWARD_RING;
		}
	}
	timestamps_note(pkt);
	verdict = by_tables(service, choice);
	if (verdict != NOT_IN_TABLES)
		return verdict;
	if (flow->flags & TCP_SYN || is_udp(flow))
		return opening(service, choice);
	// What was confirmed by another CPU between the looks into the two tables is in the first one now.
	verdict = by_tables(service, choice);
	if (verdict != NOT_IN_TABLES)
		return verdict;
	return unknown(service, choice);
}
