// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Step 5: forward. What every method shares: how much the way takes, time to live, Ethernet addresses, VLAN tags and
// the device. What sends a packet answers what XDP is to do with it, or, below zero, the verdict that says why not.
#pragma once

#include "checksum.h"
#include "clock.h"
#include "maps.h"
#include "packet.h"

// ttl_decrement is for whoever routes. False: it is used up.
static __always_inline bool ttl_decrement(struct packet *pkt)
{
	if (pkt->family == FAMILY_IPV6) {
		if (pkt->ip.v6->hop_limit <= 1)
			return false;
		pkt->ip.v6->hop_limit--;
		return true;
	}
	struct iphdr *ip = pkt->ip.v4;
	if (ip->ttl <= 1)
		return false;
	__u16 *word = (__u16 *)&ip->ttl, old = *word;
	ip->ttl--;
	ip->check = checksum_finish(checksum_change16(checksum_start(ip->check), old, *word));
	return true;
}

static __always_inline __u32 tags_of(const struct hop *hop)
{
	return !hop->vlan[0] ? 0 : !hop->vlan[1] ? 1 : 2;
}

static __always_inline __be16 family_type(__u8 family)
{
	return family == FAMILY_IPV4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);
}

// link_write writes a frame's Ethernet addresses, tags and type.
static __always_inline bool link_write(void *data, void *end, const struct hop *hop, __be16 type)
{
	struct ethhdr *eth = data;
	__be16 *next_type = data + 2 * ETH_ALEN;
	struct tag_header *tag = (void *)(eth + 1);

	if ((void *)(eth + 1) > end)
		return false;
	__builtin_memcpy(eth->h_dest, hop->mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, hop->source_mac, ETH_ALEN);
	for (int i = 0; i < MAX_TAGS; i++, tag++) {
		__u16 word = hop->vlan[i];

		if (!word)
			break;
		if ((void *)(tag + 1) > end)
			return false;
		*next_type = word & TAG_8021AD ? bpf_htons(ETH_P_8021AD) : bpf_htons(ETH_P_8021Q);
		tag->control = bpf_htons(word & TAG_ID);
		next_type = &tag->type;
	}
	*next_type = type;
	return true;
}

static __always_inline int leave(struct xdp_md *ctx, const struct hop *hop)
{
	if (hop->ifindex == ctx->ingress_ifindex)
		return XDP_TX;
	return bpf_redirect(hop->ifindex, 0);
}

// send_tagged is for frames that carry VLAN tags, come or go. Pointers into the packet end here.
__noinline int send_tagged(struct xdp_md *ctx, struct hop *hop)
{
	struct scratch *room = scratch_get();
	int longer;

	if (!room || !hop)
		return -DROP_NO_RING;
	longer = ETH_HLEN + (int)tags_of(hop) * 4 - (int)room->flow.l3;
	if (longer && bpf_xdp_adjust_head(ctx, -longer))
		return -DROP_NO_HEADROOM;
	if (!link_write((void *)(long)ctx->data, (void *)(long)ctx->data_end, hop, family_type(room->flow.family)))
		return -DROP_TRUNCATED;
	return leave(ctx, hop);
}

static __always_inline int send_to(struct packet *pkt, struct hop *hop)
{
	if (*(__u32 *)hop->vlan || pkt->flow->l3 != ETH_HLEN)
		return send_tagged(pkt->ctx, hop);
	__builtin_memcpy(pkt->eth->h_dest, hop->mac, ETH_ALEN);
	__builtin_memcpy(pkt->eth->h_source, hop->source_mac, ETH_ALEN);
	return leave(pkt->ctx, hop);
}

static __always_inline struct hop *backend_hop(struct backend *backend)
{
	return &backend->hop[backend->hop_index & 1];
}

#define PATH_MTU_MIN 576 // what a router may not say less of (RFC 791, section 3.2)

static __always_inline bool tunnels(const struct backend *backend)
{
	return use_tunnel && (backend->method == METHOD_IPIP || backend->method == METHOD_GUE);
}

// overhead is the length of the outer headers towards a backend.
static __always_inline __u32 overhead(const struct backend *backend)
{
	if (!tunnels(backend))
		return 0;
	return (backend->family == FAMILY_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) +
	       (backend->method == METHOD_GUE ? sizeof(struct udphdr) : 0);
}

// path_mtu is what routers have said that the way to a tunnel's end takes. 0: nothing.
__noinline int path_mtu(struct backend *backend)
{
	struct scratch *room = scratch_get();
	struct path *path;

	if (!backend || !room)
		return 0;
	__builtin_memcpy(room->path.address, backend->address, sizeof(room->path.address));
	room->path.family = backend->family;
	path = bpf_map_lookup_elem(&paths, &room->path);
	if (!path || !path->mtu || since(clock_now(), path->tick) > path_mtu_life)
		return 0;
	return path->mtu;
}

// backend_takes says whether a packet is short enough for its way to a backend; if not, what it takes is left in the
// scratch room.
static __always_inline bool backend_takes(struct scratch *room, struct backend *backend)
{
	__u32 outer = overhead(backend), length = room->flow.length + outer, mtu = backend->mtu;

	if (length <= PATH_MTU_MIN)
		return true;
	room->flow.loose = false;
	if (outer) {
		__u32 told = path_mtu(backend);

		// No IPv6 sender may be told of less than its least. What is no longer goes out, to be fragmented
		// outside (RFC 4213, section 3.2.2).
		if (told && room->flow.family == FAMILY_IPV6 && backend->family == FAMILY_IPV4 &&
		    told < IPV6_LEAST + outer) {
			told = IPV6_LEAST + outer;
			room->flow.loose = true;
		}
		if (told && (!mtu || told < mtu))
			mtu = told;
	}
	if (!mtu || length <= mtu)
		return true;
	room->mtu = mtu - outer;
	if (room->flow.family == FAMILY_IPV6 && room->mtu < IPV6_LEAST)
		room->mtu = IPV6_LEAST;
	return false;
}

// device_takes says the same of another device than the one that a packet came by.
static __always_inline bool device_takes(struct xdp_md *ctx, struct scratch *room, const struct hop *hop)
{
	__u32 ifindex = hop->ifindex;
	struct device *device;

	if (room->flow.length <= PATH_MTU_MIN || ifindex == ctx->ingress_ifindex)
		return true;
	device = bpf_map_lookup_elem(&devices, &ifindex);
	if (!device || !device->mtu || room->flow.length <= device->mtu)
		return true;
	room->mtu = device->mtu;
	return false;
}

// too_big is what becomes of a packet that its way does not take.
static __always_inline enum verdict too_big(const struct packet *pkt)
{
	if (pkt->family == FAMILY_IPV4 ? !(pkt->ip.v4->frag_off & bpf_htons(IPV4_DONT))
				       : pkt->flow->length <= IPV6_LEAST)
		return DROP_TOO_BIG;
	return ANSWER_TOO_BIG;
}
