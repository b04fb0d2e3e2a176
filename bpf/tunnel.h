// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Methods ipip and gue: the client's packet goes to the backend inside another one, as it came but for its time to
// live. The backend opens it, holds the service's address and answers the client itself.
//
// ipip is IP in IP of all four kinds (RFC 2003, RFC 2473, RFC 4213); gue puts a UDP header between the two, so that
// cards spread connections over their queues (draft-ietf-intarea-gue, variant 1: no header of its own).
#pragma once

#include "forward.h"

#define TUNNEL_TTL 64
#define GUE_SOURCE_PORT 49152 // the first of those nobody has registered (RFC 6335), and 14 bits behind it

// service_class is the packet's DSCP and ECN.
static __always_inline __u8 service_class4(const struct iphdr *ip)
{
	return ip->tos;
}

static __always_inline __u8 service_class6(const struct ipv6hdr *ip)
{
	return bpf_ntohs(*(__be16 *)ip) >> 4;
}

static __always_inline __u8 inner_protocol(__u8 family)
{
	return family == FAMILY_IPV4 ? IPPROTO_IPIP : IPPROTO_IPV6;
}

// identification numbers packets that may be fragmented: those of one pair of addresses must differ (RFC 6864).
static __always_inline __u32 identification(void)
{
	__u32 zero = 0;
	struct control_block *ctl = bpf_map_lookup_elem(&control, &zero);

	return ctl ? __sync_fetch_and_add(&ctl->identifications, 1) : 0;
}

static __always_inline void outer4(struct iphdr *ip, const struct backend *backend, const struct flow *flow,
				   __u8 service_class, bool dont, bool gue)
{
	__u64 sum = 0;

	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 4;
	ip->ihl = sizeof(*ip) / 4;
	ip->tos = service_class; // ECN as RFC 6040, section 4.1, has it in normal mode
	ip->tot_len = bpf_htons(flow->length + overhead(backend));
	if (dont)
		ip->frag_off = bpf_htons(IPV4_DONT);
	else
		ip->id = identification();
	ip->ttl = TUNNEL_TTL;
	ip->protocol = gue ? IPPROTO_UDP : inner_protocol(flow->family);
	ip->saddr = backend->tunnel_source[0] | ((__u32)flow->hash & backend->tunnel_mask);
	ip->daddr = backend->address[0];
	for (int i = 0; i < (int)sizeof(*ip) / 4; i++)
		sum += ((__u32 *)ip)[i];
	ip->check = checksum_finish(sum);
}

static __always_inline void outer6(struct ipv6hdr *ip, const struct backend *backend, const struct flow *flow,
				   __u8 service_class, bool gue)
{
	__builtin_memset(ip, 0, sizeof(*ip));
	*(__be32 *)ip = bpf_htonl(6U << 28 | (__u32)service_class << 20);
	ip->payload_len = bpf_htons(flow->length + (gue ? sizeof(struct udphdr) : 0));
	ip->nexthdr = gue ? IPPROTO_UDP : inner_protocol(flow->family);
	ip->hop_limit = TUNNEL_TTL;
	__builtin_memcpy(&ip->saddr, backend->tunnel_source, sizeof(ip->saddr));
	ip->saddr.in6_u.u6_addr32[3] |= (__u32)flow->hash & backend->tunnel_mask;
	__builtin_memcpy(&ip->daddr, backend->address, sizeof(ip->daddr));
}

// tunnel_send is verified by itself, once, and not for every way to it. Pointers into the packet end here.
__noinline int tunnel_send(struct xdp_md *ctx, struct backend *backend)
{
	struct scratch *room = scratch_get();
	bool gue, ipv4, dont = true;
	__u32 link, outer;
	struct flow *flow;
	struct hop *hop;
	__u8 service_class;
	void *data, *end;

	if (!room || !backend)
		return -DROP_NO_RING;
	flow = &room->flow;
	hop = backend_hop(backend);
	gue = backend->method == METHOD_GUE;
	ipv4 = backend->family == FAMILY_IPV4;

	data = (void *)(long)ctx->data + (flow->l3 & 31);
	end = (void *)(long)ctx->data_end;
	if (data + sizeof(struct iphdr) > end)
		return -DROP_TRUNCATED;
	if (flow->family == FAMILY_IPV4) {
		struct iphdr *inner = data;

		service_class = service_class4(inner);
		dont = inner->frag_off & bpf_htons(IPV4_DONT);
	} else {
		service_class = service_class6(data);
		dont = flow->length + overhead(backend) <= PATH_MTU_MIN || !flow->loose;
	}

	link = ETH_HLEN + tags_of(hop) * 4;
	outer = overhead(backend);
	if (bpf_xdp_adjust_head(ctx, (int)flow->l3 - (int)(link + outer)))
		return -DROP_NO_HEADROOM;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (!link_write(data, end, hop, family_type(backend->family)))
		return -DROP_TRUNCATED;
	barrier_var(link);
	data += link & 31;
	if (ipv4) {
		if (data + sizeof(struct iphdr) > end)
			return -DROP_TRUNCATED;
		outer4(data, backend, flow, service_class, dont, gue);
		data += sizeof(struct iphdr);
	} else {
		if (data + sizeof(struct ipv6hdr) > end)
			return -DROP_TRUNCATED;
		outer6(data, backend, flow, service_class, gue);
		data += sizeof(struct ipv6hdr);
	}
	if (gue) {
		struct udphdr *udp = data;

		if ((void *)(udp + 1) > end)
			return -DROP_TRUNCATED;
		udp->source = bpf_htons(GUE_SOURCE_PORT | ((flow->hash >> 16) & 0x3fff));
		udp->dest = bpf_htons(GUE_PORT);
		udp->len = bpf_htons(flow->length + sizeof(*udp));
		udp->check = 0; // the inner packet has its own (RFC 6935)
	}
	return leave(ctx, hop);
}
