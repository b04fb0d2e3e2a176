// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The replies' way back: a backend's packet to a source address of ours. Its entry names the client's tuple, the
// client's entry must carry the same generation number, or else nobody is known.
#pragma once

#include "choose.h"
#include "clock.h"
#include "connections.h"
#include "fullnat.h"
#include "hash.h"
#include "track.h"

// source_find is the source address of fullnat that a packet goes to, port and all.
static __always_inline struct source *source_find(const struct flow *flow)
{
	__u32 *id;
	struct source *source;
	__u16 port;

	if (flow->family == FAMILY_IPV4) {
		port = bpf_ntohs(flow->tuple.v4.dport);
		id = bpf_map_lookup_elem(&sources4, &flow->tuple.v4.daddr);
		APART(id, FAMILY_IPV4);
	} else {
		port = bpf_ntohs(flow->tuple.v6.dport);
		id = bpf_map_lookup_elem(&sources6, flow->tuple.v6.daddr);
		APART(id, FAMILY_IPV6);
	}
	if (!id)
		return NULL;
	source = bpf_map_lookup_elem(&sources, id);
	return source && port >= source->first_port && port <= source->last_port ? source : NULL;
}

// nat_backend_find tells whether a packet comes from a backend by nat, port and all.
static __always_inline bool nat_backend_find(const struct flow *flow)
{
	void *found;

	if (flow->family == FAMILY_IPV4) {
		struct service_key4 key = {
			.address = flow->tuple.v4.saddr,
			.port = flow->tuple.v4.sport,
			.protocol = flow->protocol,
		};

		found = bpf_map_lookup_elem(&nat_backends4, &key);
		APART(found, FAMILY_IPV4);
		return found;
	}
	struct service_key6 key = {
		.port = flow->tuple.v6.sport,
		.protocol = flow->protocol,
	};
	__builtin_memcpy(key.address, flow->tuple.v6.saddr, sizeof(key.address));
	found = bpf_map_lookup_elem(&nat_backends6, &key);
	APART(found, FAMILY_IPV6);
	return found;
}

// udp_replied confirms a half-open connection of UDP that its backend has answered. The flow in hand is the client's
// meanwhile.
__noinline int udp_replied(struct half_open *half, __u32 now)
{
	struct scratch *room = scratch_get();
	struct service *service;
	struct flow *flow;

	if (!half || !room)
		return false;
	flow = &room->flow;
	room->kept = flow->tuple;
	flow->tuple = room->reply_choice.client;
	flow->hash = hash_tuple(flow);
	service = service_find(flow);
	if (service)
		confirm(half, service, STATE_YOUNG, now);
	flow->tuple = room->kept;
	return true;
}

// gives_way says whether an entry's way back is that of a newer, half-open connection as well, and now its alone: by
// nat the two have the same. It does where the client's packets ask the newer one: the entry is condemned, or not
// served.
static __always_inline bool gives_way(const struct connection *conn, const union tuple *client, __u32 now)
{
	struct scratch *room = scratch_get();
	struct backend *backend = backend_get(conn->backend);
	struct half_open *half;

	if (!room || conn->source_port)
		return false;
	if (!(conn->state & STATE_CONDEMNED) && backend && serves(backend, conn->opened))
		return false;
	half = BY_FAMILY(room->flow.family, client, half_open4, half_open6, bpf_map_lookup_elem);
	return half && half->backend == conn->backend && since(now, half->first) < half_open_life;
}

// reply_choose leaves its choice in the scratch room.
__noinline int reply_choose(void)
{
	struct scratch *room = scratch_get();
	struct reply_choice *choice;
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();
	__u32 now = clock_now();
	struct connection *conn;
	struct half_open *half;
	struct way_back *back;
	struct flow *flow;
	__u64 hash = 0;

	if (!room || !ctl || !bits)
		return PASS_REPLY_UNKNOWN;
	flow = &room->flow;
	choice = &room->reply_choice;
	back = reply_find(flow->family, &flow->tuple, &choice->client);
	if (back) {
		conn = BY_FAMILY(flow->family, &choice->client, connections4, connections6, bpf_map_lookup_elem);
		if (conn && conn->generation == back->generation &&
		    !((conn->state & STATE_CONDEMNED || flow->flags & TCP_SYN || is_udp(flow)) &&
		      gives_way(conn, &choice->client, now))) {
			if (conn->state & STATE_CONDEMNED && !(flow->flags & TCP_RST)) {
				state_change(conn, 0, STATE_BACKEND_TOLD);
				return RESET_CONDEMNED;
			}
			if (flow->flags & TCP_SYN) {
				reborn(conn, flow, now);
			} else {
				if (flow->flags & (TCP_FIN | TCP_RST) || conn->state)
					hash = hash_of(flow->family, &choice->client, flow->protocol);
				track_backend(ctl, bits, conn, flow, hash, now);
			}
			choice->hop = conn->hop;
			choice->backend = conn->backend;
			choice->service = conn->service;
			return REPLY_TABLE;
		}
	}

	back = half_reply_find(flow->family, &flow->tuple, &choice->client);
	if (back) {
		half = BY_FAMILY(flow->family, &choice->client, half_open4, half_open6, bpf_map_lookup_elem);
		if (half && half->generation == back->generation && since(now, half->first) < half_open_life) {
			if ((flow->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == (TCP_SYN | TCP_ACK)) {
				// It answers this client's SYN, not that of one whose port this was.
				if (flow->acknowledgement - half->client_sequence[0] > 0xffff &&
				    flow->acknowledgement - half->client_sequence[1] > 0xffff)
					return PASS_REPLY_UNKNOWN;
				half->backend_sequence = flow->sequence + 1;
				if (!(half->state & HALF_SYN_ACK))
					count_answer(traffic_of_backend(half->backend), true);
				half->state |= HALF_SYN_ACK;
			} else if (flow->flags & TCP_RST && !(half->state & HALF_SYN_ACK)) {
				count_answer(traffic_of_backend(half->backend), false);
			}
			choice->hop = half->hop;
			choice->backend = half->backend;
			choice->service = half->service;
			if (is_udp(flow)) {
				half->state |= HALF_SYN_ACK;
				udp_replied(half, now);
			}
			return REPLY_HALF_OPEN;
		}
	}
	return PASS_REPLY_UNKNOWN;
}

// reply_known tells whether a packet that can't be read whole belongs to a connection of ours at all.
__noinline int reply_known(void)
{
	struct scratch *room = scratch_get();

	return room && (reply_find(room->flow.family, &room->flow.tuple, NULL) ||
			half_reply_find(room->flow.family, &room->flow.tuple, NULL));
}
