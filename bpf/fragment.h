// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Fragments follow their first, which alone has the ports: where it went is noted under addresses, identification and,
// for IPv4, protocol (RFC 791, section 3.2; RFC 8200, section 4.5). Where our address takes the place of many others',
// they get an identification of ours: the receiver tells packets apart by nothing else.
#pragma once

#include "icmp.h"

// fragment_key_of leaves the key of the packet in hand in the scratch room.
static __always_inline bool fragment_key_of(struct xdp_md *ctx, struct scratch *room)
{
	struct fragment_key *key = &room->fragment_key;
	struct flow *flow = &room->flow;
	__be16 id = 0;

	__builtin_memset(key, 0, sizeof(*key));
	key->family = flow->family;
	if (flow->family == FAMILY_IPV4) {
		key->saddr[0] = flow->tuple.v4.saddr;
		key->daddr[0] = flow->tuple.v4.daddr;
		key->protocol = flow->protocol;
		if (bpf_xdp_load_bytes(ctx, flow->l3 + 4, &id, sizeof(id)))
			return false;
		key->id = id;
		return true;
	}
	__builtin_memcpy(key->saddr, flow->tuple.v6.saddr, sizeof(key->saddr));
	__builtin_memcpy(key->daddr, flow->tuple.v6.daddr, sizeof(key->daddr));
	return !bpf_xdp_load_bytes(ctx, flow->extension + 4, &key->id, sizeof(key->id));
}

// fragment_identify gives the fragment in hand an identification of ours.
static __always_inline bool fragment_identify(struct xdp_md *ctx, struct flow *flow, __u32 old, __u32 id)
{
	__be16 word = id;

	if (flow->family == FAMILY_IPV6)
		return !bpf_xdp_store_bytes(ctx, flow->extension + 4, &id, sizeof(id));
	if (bpf_xdp_store_bytes(ctx, flow->l3 + 4, &word, sizeof(word)))
		return false;
	icmp_checksum(ctx, flow->l3 + 10, checksum_change16(0, old, word), false);
	return true;
}

// fragment_note notes where the first fragment in hand goes, as room->fragment has it.
static __always_inline int fragment_note(struct xdp_md *ctx, struct scratch *room)
{
	struct fragment *fragment = &room->fragment;

	if (!fragment_key_of(ctx, room))
		return false;
	fragment->tick = clock_now();
	if (fragment->rewrite) {
		fragment->id = identification();
		if (room->flow.family == FAMILY_IPV4)
			fragment->id &= 0xffff;
		if (!fragment_identify(ctx, &room->flow, room->fragment_key.id, fragment->id))
			return false;
	}
	bpf_map_update_elem(&fragments, &room->fragment_key, fragment, BPF_ANY);
	return true;
}

// fragment_of_client is a first fragment from a client on its way to a backend.
__noinline int fragment_of_client(struct xdp_md *ctx, __u32 backend_id, __u32 service_id, __u32 source_id)
{
	struct scratch *room = scratch_get();
	struct backend *backend = backend_get(backend_id);
	struct fragment *fragment;

	if (!room || !backend)
		return false;
	fragment = &room->fragment;
	__builtin_memset(fragment, 0, sizeof(*fragment));
	fragment->backend = backend_id;
	fragment->service = service_id;
	fragment->hash = room->flow.hash;
	if (!stateless(backend->method)) {
		fragment->rewrite = true;
		__builtin_memcpy(fragment->daddr, backend->address, sizeof(fragment->daddr));
		if (use_nat && backend->method == METHOD_NAT) {
			if (room->flow.family == FAMILY_IPV4)
				fragment->saddr[0] = room->flow.tuple.v4.saddr;
			else
				__builtin_memcpy(fragment->saddr, room->flow.tuple.v6.saddr, sizeof(fragment->saddr));
		} else {
			struct source *source = bpf_map_lookup_elem(&sources, &source_id);

			if (!source)
				return false;
			__builtin_memcpy(fragment->saddr, source->address, sizeof(fragment->saddr));
		}
	}
	return fragment_note(ctx, room);
}

// fragment_of_backend is a first fragment from a backend on its way to a client, as room->reply_choice has it.
__noinline int fragment_of_backend(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct reply_choice *choice;
	struct fragment *fragment;

	if (!room)
		return false;
	fragment = &room->fragment;
	choice = &room->reply_choice;
	__builtin_memset(fragment, 0, sizeof(*fragment));
	fragment->backend = choice->backend;
	fragment->service = choice->service;
	fragment->reply = true;
	fragment->rewrite = true;
	fragment->hop = choice->hop;
	if (room->flow.family == FAMILY_IPV4) {
		fragment->saddr[0] = choice->client.v4.daddr;
		fragment->daddr[0] = choice->client.v4.saddr;
	} else {
		__builtin_memcpy(fragment->saddr, choice->client.v6.daddr, sizeof(fragment->saddr));
		__builtin_memcpy(fragment->daddr, choice->client.v6.saddr, sizeof(fragment->daddr));
	}
	return fragment_note(ctx, room);
}

// fragment_rewrite gives a later fragment the addresses and the identification of its first.
__noinline int fragment_rewrite(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct fragment *fragment;
	struct flow *flow;
	__be32 pair[2];
	__u64 change;

	if (!room)
		return false;
	fragment = &room->fragment;
	flow = &room->flow;
	if (!fragment_identify(ctx, flow, room->fragment_key.id, fragment->id))
		return false;
	if (flow->family == FAMILY_IPV6)
		return !bpf_xdp_store_bytes(ctx, flow->l3 + 8, fragment->saddr, 32);
	pair[0] = fragment->saddr[0];
	pair[1] = fragment->daddr[0];
	change = checksum_change(0, flow->tuple.v4.saddr, pair[0]);
	change = checksum_change(change, flow->tuple.v4.daddr, pair[1]);
	if (bpf_xdp_store_bytes(ctx, flow->l3 + 12, pair, sizeof(pair)))
		return false;
	icmp_checksum(ctx, flow->l3 + 10, change, false);
	return true;
}

// fragment_follow sends a later fragment the way of its first. It answers as `send` does in forward.h.
__noinline int fragment_follow(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct fragment *fragment, *noted;
	struct backend *backend;
	__u32 length = bpf_xdp_get_buff_len(ctx);

	if (!room || !fragment_key_of(ctx, room))
		return -PASS_FRAGMENT;
	noted = bpf_map_lookup_elem(&fragments, &room->fragment_key);
	if (!noted || since(clock_now(), noted->tick) > fragment_life)
		return destination_flags(&room->flow) & ADDRESS_OWN ? -DROP_LATER_FRAGMENT : -PASS_FRAGMENT;
	fragment = &room->fragment;
	*fragment = *noted;
	room->flow.hash = fragment->hash;
	if (room->flow.l3 + room->flow.length > length)
		return -DROP_TRUNCATED;
	// The headers are all there (IPv6: the fragment header among them).
	if ((room->flow.family == FAMILY_IPV4 ? room->flow.l4 : room->flow.extension + 8) >
	    room->flow.l3 + room->flow.length)
		return -DROP_BAD_HEADER;
	backend = backend_get(fragment->backend);
	if (!backend)
		return -DROP_NO_RING;
	if (!fragment->reply && !(backend->flags & BACKEND_NEIGHBOR))
		return -DROP_NO_NEIGHBOR;
	// It is about the first of them, which carries the ports, that its sender is told.
	if (fragment->reply ? !device_takes(ctx, room, &fragment->hop) : !backend_takes(room, backend))
		return -DROP_TOO_BIG;
	if (!icmp_step(ctx))
		return -DROP_TTL;
	if (fragment->rewrite && !fragment_rewrite(ctx))
		return -DROP_TRUNCATED;
	if (fragment->reply) {
		count_reply(traffic_of_service(fragment->service), length);
		count_reply(traffic_of_backend(fragment->backend), length);
		return send_tagged(ctx, &fragment->hop);
	}
	count_in(traffic_of_service(fragment->service), length, false);
	count_in(traffic_of_backend(fragment->backend), length, false);
	return tunnels(backend) ? tunnel_send(ctx, backend) : send_tagged(ctx, backend_hop(backend));
}

// fragment_way takes any later fragment; the host sees all that is not for us.
__noinline int fragment_way(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	__u32 verdict;
	int action;

	if (!room)
		return XDP_PASS;
	action = room->flow.group ? -PASS_FRAGMENT : fragment_follow(ctx);
	verdict = action < 0 ? -action : room->fragment.reply ? REPLY_FRAGMENT : FORWARD_FRAGMENT;
	count_verdict(verdict);
	if (action >= 0)
		return action;
	return verdict >= DROP_TRUNCATED ? XDP_DROP : XDP_PASS;
}
