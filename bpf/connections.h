// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The connection table and the half-open table, there and back. What they are made of is known here and nowhere else.
#pragma once

#include <asm-generic/errno-base.h>

#include "bitmaps.h"
#include "clock.h"
#include "counters.h"
#include "journal.h"
#include "maps.h"
#include "packet.h"

// By family: a map of each kind.
#define BY_FAMILY(family, tuple, map4, map6, call, ...)                                                                \
	({                                                                                                             \
		__typeof__(call(&map4, &(tuple)->v4, ##__VA_ARGS__)) by_family;                                        \
                                                                                                                       \
		if ((family) == FAMILY_IPV4) {                                                                         \
			by_family = call(&map4, &(tuple)->v4, ##__VA_ARGS__);                                          \
			APART(by_family, FAMILY_IPV4);                                                                 \
		} else {                                                                                               \
			by_family = call(&map6, &(tuple)->v6, ##__VA_ARGS__);                                          \
			APART(by_family, FAMILY_IPV6);                                                                 \
		}                                                                                                      \
		by_family;                                                                                             \
	})

static __always_inline __u32 tag_of(__u64 hash)
{
	return (__u32)hash;
}

// connection_find answers NULL as well where the element was given to another key under our eyes.
static __always_inline struct connection *connection_find(__u8 family, const union tuple *client, __u64 hash)
{
	struct connection *conn = BY_FAMILY(family, client, connections4, connections6, bpf_map_lookup_elem);

	return conn && conn->tag == tag_of(hash) ? conn : NULL;
}

static __always_inline struct half_open *half_open_find(__u8 family, const union tuple *client, __u64 hash, __u32 now)
{
	struct half_open *half = BY_FAMILY(family, client, half_open4, half_open6, bpf_map_lookup_elem);

	return half && half->tag == tag_of(hash) && since(now, half->first) < half_open_life ? half : NULL;
}

static __always_inline void half_open_remove(__u8 family, const union tuple *client)
{
	BY_FAMILY(family, client, half_open4, half_open6, bpf_map_delete_elem);
}

// The look-ups of a way back also tell the client's tuple, to whoever wants to know it.
#define REPLY_LOOK_UP(type, map, key, family)                                                                          \
	do {                                                                                                           \
		struct type *entry = bpf_map_lookup_elem(&map, &reply->key);                                           \
                                                                                                                       \
		APART(entry, family);                                                                                  \
		if (!entry)                                                                                            \
			return NULL;                                                                                   \
		if (client)                                                                                            \
			client->key = entry->client;                                                                   \
		return &entry->back;                                                                                   \
	} while (0)

static __always_inline struct way_back *reply_find(__u8 family, const union tuple *reply, union tuple *client)
{
	if (family == FAMILY_IPV4)
		REPLY_LOOK_UP(reply4, replies4, v4, FAMILY_IPV4);
	REPLY_LOOK_UP(reply6, replies6, v6, FAMILY_IPV6);
}

static __always_inline struct way_back *half_reply_find(__u8 family, const union tuple *reply, union tuple *client)
{
	if (family == FAMILY_IPV4)
		REPLY_LOOK_UP(reply4, half_replies4, v4, FAMILY_IPV4);
	REPLY_LOOK_UP(reply6, half_replies6, v6, FAMILY_IPV6);
}

// reply_insert puts the way back of the flow in hand, key and value as they are in the scratch room. It answers as
// bpf_map_update_elem does.
__noinline int reply_insert(__u32 half)
{
	struct scratch *room = scratch_get();
	long failed;

	if (!room)
		return -EINVAL;
	if (room->flow.family == FAMILY_IPV4) {
		struct reply4 value = {.back = room->back, .client = room->flow.tuple.v4};

		if (!half) {
			failed = bpf_map_update_elem(&replies4, &room->port.reply.v4, &value, BPF_NOEXIST);
			APART(failed, FAMILY_IPV4);
			return failed;
		}
		failed = bpf_map_update_elem(&half_replies4, &room->port.reply.v4, &value, BPF_ANY);
		APART(failed, FAMILY_IPV4);
		return failed;
	}
	struct reply6 value = {.back = room->back, .client = room->flow.tuple.v6};

	if (!half) {
		failed = bpf_map_update_elem(&replies6, &room->port.reply.v6, &value, BPF_NOEXIST);
		APART(failed, FAMILY_IPV6);
		return failed;
	}
	failed = bpf_map_update_elem(&half_replies6, &room->port.reply.v6, &value, BPF_ANY);
	APART(failed, FAMILY_IPV6);
	return failed;
}

// fullnat_tuple is the tuple of the packets that a backend by fullnat sends back to a source address and port.
static __always_inline bool fullnat_tuple(const struct backend *backend, __u32 source_id, __be16 source_port,
					  union tuple *reply)
{
	struct source *source = bpf_map_lookup_elem(&sources, &source_id);

	if (!source)
		return false;
	__builtin_memset(reply, 0, sizeof(*reply));
	if (backend->family == FAMILY_IPV4) {
		reply->v4.saddr = backend->address[0];
		reply->v4.sport = backend->port;
		reply->v4.daddr = source->address[0];
		reply->v4.dport = source_port;
		reply->v4.protocol = backend->protocol;
	} else {
		__builtin_memcpy(reply->v6.saddr, backend->address, sizeof(reply->v6.saddr));
		reply->v6.sport = backend->port;
		__builtin_memcpy(reply->v6.daddr, source->address, sizeof(reply->v6.daddr));
		reply->v6.dport = source_port;
		reply->v6.protocol = backend->protocol;
	}
	return true;
}

// nat_tuple is the same for nat, where the backend answers the client's own address.
static __always_inline void nat_tuple(const struct backend *backend, const union tuple *client, union tuple *reply)
{
	__builtin_memset(reply, 0, sizeof(*reply));
	if (backend->family == FAMILY_IPV4) {
		reply->v4.saddr = backend->address[0];
		reply->v4.sport = backend->port;
		reply->v4.daddr = client->v4.saddr;
		reply->v4.dport = client->v4.sport;
		reply->v4.protocol = backend->protocol;
	} else {
		__builtin_memcpy(reply->v6.saddr, backend->address, sizeof(reply->v6.saddr));
		reply->v6.sport = backend->port;
		__builtin_memcpy(reply->v6.daddr, client->v6.saddr, sizeof(reply->v6.daddr));
		reply->v6.dport = client->v6.sport;
		reply->v6.protocol = backend->protocol;
	}
}

static __always_inline bool reply_tuple(const struct flow *client, const struct backend *backend, __u32 source_id,
					__be16 source_port, union tuple *reply)
{
	if (!use_nat || backend->method != METHOD_NAT)
		return fullnat_tuple(backend, source_id, source_port, reply);
	nat_tuple(backend, &client->tuple, reply);
	return true;
}

enum port_queue_kind {
	PORTS_UNUSED = 0,
	PORTS_HANDED_OUT = 1,
};

static __always_inline void *ports_of(__u32 pool, enum port_queue_kind kind)
{
	__u32 index = pool * 2 + kind;

	return bpf_map_lookup_elem(&ports, &index);
}

// generation_next gives numbers that no living pair of entries shares: a count of each CPU's own.
static __always_inline __u32 generation_next(void)
{
	__u32 zero = 0;
	__u32 *count = bpf_map_lookup_elem(&generations, &zero);

	return count ? ++*count << 8 | (bpf_get_smp_processor_id() & 0xff) : 0;
}

// room_left says whether the connection table takes one more, and leaves so many places as are kept back.
static __always_inline bool room_left(const struct control_block *ctl, __u32 kept_back)
{
	return ctl->connections < (__s64)connection_capacity - (__s64)kept_back;
}

// connection_remove takes out the entry of the flow in hand, if it is of this generation, and its way back, and gives
// the source port back to its queue. The way back goes before that: until the port is in its queue again, nobody can be
// given it.
__noinline int connection_remove(__u32 generation, __u32 whose_room)
{
	struct scratch *room = scratch_of(whose_room);
	struct flow *client;
	struct connection *conn;
	struct control_block *ctl = control_get();
	struct backend *backend;
	struct way_back *back;
	__u32 state, source, id, token, pool, number;
	__be16 port;
	void *queue;

	if (!ctl || !room)
		return 0;
	client = &room->flow;
	conn = connection_find(client->family, &client->tuple, client->hash);
	if (!conn || conn->generation != generation)
		return 0;
	state = conn->state;
	source = conn->source;
	port = conn->source_port;
	id = conn->backend;
	if (BY_FAMILY(client->family, &client->tuple, connections4, connections6, bpf_map_delete_elem))
		return 0;
	__sync_fetch_and_add(&ctl->connections, -1);
	// It may have matured, and been counted so, since `state` was read.
	if (state & STATE_YOUNG && __sync_fetch_and_and(&conn->state, ~STATE_YOUNG) & STATE_YOUNG)
		__sync_fetch_and_add(&ctl->young, -1);
	count_event(EVENT_REMOVED);
	journal_tell(whose_room, JOURNAL_CLOSED, generation);
	if (state & STATE_STATELESS)
		return 1;

	backend = bpf_map_lookup_elem(&backends, &id);
	if (!backend || !reply_tuple(client, backend, source, port, &room->removed))
		return 1;
	back = reply_find(client->family, &room->removed, NULL);
	if (!back || back->generation != generation)
		return 1;
	pool = back->pool;
	token = __sync_lock_test_and_set(&back->token, TOKEN_GONE);
	BY_FAMILY(client->family, &room->removed, replies4, replies6, bpf_map_delete_elem);
	if (!port || token != TOKEN_OUT)
		return 1;
	number = bpf_ntohs(port);
	queue = ports_of(pool, PORTS_UNUSED);
	if (queue)
		bpf_map_push_elem(queue, &number, 0);
	return 1;
}
