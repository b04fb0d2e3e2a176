// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Source ports of fullnat.
//
// A pool is one source address towards one backend's address and port; each of its port numbers is in one place only:
// - in the queue of unused ports: the head is the one longest unused, so that a backend's TIME_WAIT has had most time;
// - in the queue of ports handed out, from the SYN on, whatever becomes of that connection. The half-open table is an
//   LRU and tells nobody whom it evicts: so the head of this queue is looked at with each SYN and each confirmation,
//   and goes back to the unused ones if its connection is gone;
// - in neither, once the connection was found confirmed: its end puts the number back.
// When no unused port is left, the oldest half-open connection loses its own: a flood of SYNs hurts its own kind only.
#pragma once

#include "connections.h"

// These functions are global, each verified once by itself: inlined, their loops would be walked for every way in.
#define PORT_LOOKS 4	   // heads looked at, at most, by one packet
#define PORT_TRIES 24	   // ports tried, at most, when none is unused
#define PORT_HANDSHAKE 179 // ticks, 3 s: so long a half-open connection is left alone if at all possible

// port_pop takes the head of a queue, port_peek looks at it; both say whether it has one. The number goes by way of the
// scratch room: verifiers of 7.2 and 7.3 take a queue that came from a map of maps to have values as large as those of
// the largest map of all, and so everything above a number on the stack to be overwritten.
static __always_inline bool port_pop(void *queue, __u32 *number)
{
	struct scratch *room = scratch_get();

	if (!room || bpf_map_pop_elem(queue, &room->port.popped))
		return false;
	*number = room->port.popped;
	return true;
}

static __always_inline bool port_peek(void *queue, __u32 *number)
{
	struct scratch *room = scratch_get();

	if (!room || bpf_map_peek_elem(queue, &room->port.popped))
		return false;
	*number = room->port.popped;
	return true;
}

enum port_use {
	PORT_FREE,
	PORT_HALF_OPEN,
	PORT_CONFIRMED,
	PORT_BUSY, // in the middle of being removed
};

// port_use looks at what became of a number of the queue of ports handed out, and leaves its tuple in the scratch room.
// A connection's token leaves that queue here; PORT_CONFIRMED means that it must not be put back.
__noinline int port_use(struct backend *backend, __u32 source, __u32 number, __u32 now)
{
	struct scratch *room = scratch_get();
	struct way_back *back;

	if (!backend || !room || !fullnat_tuple(backend, source, bpf_htons(number), &room->port.reply))
		return PORT_BUSY;
	back = reply_find(backend->family, &room->port.reply, NULL);
	if (back) {
		if (__sync_val_compare_and_swap(&back->token, TOKEN_QUEUED, TOKEN_OUT) == TOKEN_QUEUED)
			return PORT_CONFIRMED;
		return PORT_BUSY;
	}
	back = half_reply_find(backend->family, &room->port.reply, NULL);
	if (back && since(now, back->first) < half_open_life)
		return PORT_HALF_OPEN;
	// It may have been confirmed between the two looks.
	return reply_find(backend->family, &room->port.reply, NULL) ? PORT_BUSY : PORT_FREE;
}

// port_head_age is how long ago, in ticks, the oldest of the ports handed out was, if its connection is half-open yet:
// none behind it is older. Else PORT_NO_AGE.
#define PORT_NO_AGE 0x7fffffff

__noinline int port_head_age(struct backend *backend, __u32 pool_id, __u32 now)
{
	struct pool *pool = bpf_map_lookup_elem(&pools, &pool_id);
	void *out = ports_of(pool_id, PORTS_HANDED_OUT);
	struct scratch *room = scratch_get();
	struct way_back *back;
	__u32 number;

	if (!backend || !pool || !out || !room || !port_peek(out, &number) ||
	    !fullnat_tuple(backend, pool->source, bpf_htons(number), &room->port.reply))
		return PORT_NO_AGE;
	back = half_reply_find(backend->family, &room->port.reply, NULL);
	return back ? since(now, back->first) : PORT_NO_AGE;
}

// ports_look_after takes confirmed ports out of the queue of those handed out and brings forgotten ones home, as far as
// the first that is half-open: that one stays the oldest.
__noinline int ports_look_after(struct backend *backend, __u32 pool_id, __u32 now)
{
	struct pool *pool = bpf_map_lookup_elem(&pools, &pool_id);
	void *unused = ports_of(pool_id, PORTS_UNUSED), *out = ports_of(pool_id, PORTS_HANDED_OUT);
	__u32 number;

	if (!backend || !pool || !unused || !out)
		return 0;
	for (int i = 0; i < PORT_LOOKS; i++) {
		// Another CPU may take the head between the look and the pop: what was popped counts, not what was
		// seen.
		if (port_head_age(backend, pool_id, now) < half_open_life || !port_pop(out, &number))
			return 0;
		switch (port_use(backend, pool->source, number, now)) {
		case PORT_CONFIRMED:
			break;
		case PORT_FREE:
			bpf_map_push_elem(unused, &number, 0);
			break;
		default:
			bpf_map_push_elem(out, &number, 0);
		}
	}
	return 0;
}

enum port_try {
	PORT_TAKEN,
	PORT_NONE_HERE,
	PORT_TRY_AGAIN,
};

// port_chosen leaves the choice in the scratch room.
static __always_inline int port_chosen(struct backend *backend, __u32 pool_id, struct pool *pool, __u32 number)
{
	struct scratch *room = scratch_get();

	if (!room || !fullnat_tuple(backend, pool->source, bpf_htons(number), &room->port.reply))
		return PORT_NONE_HERE;
	room->port.pool = pool_id;
	room->port.source = pool->source;
	room->port.port = bpf_htons(number);
	return PORT_TAKEN;
}

// port_try_unused takes a pool's port that was unused for longest.
__noinline int port_try_unused(struct backend *backend, __u32 pool_id, __u32 now)
{
	struct pool *pool = bpf_map_lookup_elem(&pools, &pool_id);
	void *unused = ports_of(pool_id, PORTS_UNUSED);
	__u32 number;

	if (!backend || !pool || !unused)
		return PORT_NONE_HERE;
	ports_look_after(backend, pool_id, now);
	if (!port_pop(unused, &number))
		return PORT_NONE_HERE;
	return port_chosen(backend, pool_id, pool, number);
}

// port_try_half_open takes a port from the oldest half-open connection of a pool.
__noinline int port_try_half_open(struct backend *backend, __u32 pool_id, __u32 now)
{
	struct pool *pool = bpf_map_lookup_elem(&pools, &pool_id);
	void *out = ports_of(pool_id, PORTS_HANDED_OUT);
	__u32 number;
	int use;

	if (!backend || !pool || !out || !port_pop(out, &number))
		return PORT_NONE_HERE;
	use = port_use(backend, pool->source, number, now);
	if (use == PORT_CONFIRMED)
		return PORT_TRY_AGAIN;
	if (use == PORT_BUSY) {
		bpf_map_push_elem(out, &number, 0);
		return PORT_TRY_AGAIN;
	}
	if (use != PORT_FREE)
		count_event(EVENT_PORT_STOLEN);
	return port_chosen(backend, pool_id, pool, number);
}

static __always_inline __u32 pool_at(const struct backend *backend, __u32 place)
{
	return backend->pools[place & (MAX_POOLS_A_BACKEND - 1)];
}

// port_handed_out puts the port in the scratch room into its pool's queue. Its way back must stand before: who looks
// after the queue takes a port without one for forgotten.
__noinline int port_handed_out(void)
{
	struct scratch *room = scratch_get();
	__u32 number;
	void *out;

	if (!room)
		return 0;
	number = bpf_ntohs(room->port.port);
	out = ports_of(room->port.pool, PORTS_HANDED_OUT);
	if (out)
		bpf_map_push_elem(out, &number, 0);
	return 0;
}

// port_take chooses a source port towards a backend and leaves it in the scratch room: first among the unused ones,
// pool after pool, the client's own choice of pool first; then from half-open connections, in pools whose oldest has
// had its time if there is one. False: all are in use.
__noinline int port_take(struct backend *backend, __u64 hash, __u32 now)
{
	__u32 pool_count, place;

	if (!backend)
		return false;
	pool_count = backend->pool_count;
	if (!pool_count || pool_count > MAX_POOLS_A_BACKEND)
		return false;
	place = (__u32)hash % pool_count;
	for (__u32 i = 0; i < MAX_POOLS_A_BACKEND; i++) {
		if (i >= pool_count)
			break;
		if (port_try_unused(backend, pool_at(backend, (place + i) % pool_count), now) == PORT_TAKEN)
			return true;
	}
	for (__u32 i = 0; i < PORT_TRIES; i++) {
		__u32 pool_id = pool_at(backend, (place + i) % pool_count);

		if (i < pool_count && port_head_age(backend, pool_id, now) < PORT_HANDSHAKE)
			continue;
		if (port_try_half_open(backend, pool_id, now) == PORT_TAKEN)
			return true;
	}
	return false;
}
