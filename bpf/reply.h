// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The replies' way back: a backend's packet to a source address of ours. Its entry names the client's tuple, the
// client's entry must carry the same generation number, or else nobody is known.
#pragma once

#include "clock.h"
#include "connections.h"
#include "fullnat.h"
#include "hash.h"
#include "track.h"

static __always_inline bool reply_is_ours(const struct flow *flow)
{
	__u32 *id;
	struct source *source;
	__u16 port;

	if (flow->family == FAMILY_IPV4) {
		port = bpf_ntohs(flow->tuple.v4.dport);
		id = bpf_map_lookup_elem(&sources4, &flow->tuple.v4.daddr);
	} else {
		struct address6 key;

		port = bpf_ntohs(flow->tuple.v6.dport);
		__builtin_memcpy(key.address, flow->tuple.v6.daddr, sizeof(key.address));
		id = bpf_map_lookup_elem(&sources6, &key);
	}
	if (!id)
		return false;
	source = bpf_map_lookup_elem(&sources, id);
	return source && port >= source->first_port && port <= source->last_port;
}

static __always_inline __u64 hash_of_client(const struct flow *flow, const union tuple *client)
{
	struct flow as = {.family = flow->family, .protocol = flow->protocol, .tuple = *client};

	return hash_tuple(&as);
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
		if (conn && conn->generation == back->generation) {
			if (flow->flags & TCP_SYN) {
				reborn(conn, flow, now);
			} else {
				if (flow->flags & (TCP_FIN | TCP_RST) || conn->state)
					hash = hash_of_client(flow, &choice->client);
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
		if (half && half->generation == back->generation && now - half->first < half_open_life) {
			if ((flow->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == (TCP_SYN | TCP_ACK)) {
				// It answers this client's SYN, not that of one whose port this was.
				if (flow->acknowledgement - half->client_sequence[0] > 0xffff &&
				    flow->acknowledgement - half->client_sequence[1] > 0xffff)
					return PASS_REPLY_UNKNOWN;
				half->backend_sequence = flow->sequence + 1;
				half->state |= HALF_SYN_ACK;
			}
			choice->hop = half->hop;
			choice->backend = half->backend;
			choice->service = half->service;
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
