// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Answering RST, in the name of the service: the frame is turned round, cut to bare headers and sent back
// (RFC 9293, section 3.10.7.1).
#pragma once

#include "answer.h"
#include "forward.h"

#define RESET_TTL 64
#define FRAME_MIN 60 // shorter frames may not leave some cards; the rest is zeroed

struct reset_numbers {
	__be32 sequence;
	__be32 acknowledgement;
	__u8 flags;
};

static __always_inline void reset_tcp(struct tcphdr *tcp, __be16 sport, __be16 dport,
				      const struct reset_numbers *numbers)
{
	__builtin_memset(tcp, 0, sizeof(*tcp));
	tcp->source = sport;
	tcp->dest = dport;
	tcp->seq = numbers->sequence;
	tcp->ack_seq = numbers->acknowledgement;
	tcp->doff = sizeof(*tcp) / 4;
	((__u8 *)tcp)[13] = numbers->flags;
}

// reset_answer answers the client's packet in hand. Pointers into the packet end here.
__noinline int reset_answer(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct reset_numbers numbers;
	struct flow *of;
	__u32 length = bpf_xdp_get_buff_len(ctx), headers, target, l3;
	union tuple tuple;
	__u8 family;

	if (!room)
		return XDP_DROP;
	of = &room->flow;
	family = of->family;
	tuple = of->tuple;
	l3 = of->l3 & 31;
	headers = l3 + sizeof(struct tcphdr) + (family == FAMILY_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	if (of->flags & TCP_ACK) {
		numbers.sequence = bpf_htonl(of->acknowledgement);
		numbers.acknowledgement = 0;
		numbers.flags = TCP_RST;
	} else {
		numbers.sequence = 0;
		numbers.acknowledgement = bpf_htonl(of->sequence_end);
		numbers.flags = TCP_RST | TCP_ACK;
	}
	target = headers;
	if (target < FRAME_MIN)
		target = length < FRAME_MIN ? length : FRAME_MIN;
	if (length > target && bpf_xdp_adjust_tail(ctx, (int)target - (int)length))
		return XDP_DROP;

	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	__u8 mac[ETH_ALEN];
	if (family == FAMILY_IPV4) {
		struct iphdr *ip = data + l3;
		struct tcphdr *tcp = (void *)(ip + 1);
		__u64 sum;

		if ((void *)(eth + 1) > end || (void *)(tcp + 1) > end)
			return XDP_DROP;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 4;
		ip->ihl = sizeof(*ip) / 4;
		ip->tot_len = bpf_htons(sizeof(*ip) + sizeof(*tcp));
		ip->frag_off = bpf_htons(0x4000); // don't fragment: an ID of zero is right (RFC 6864)
		ip->ttl = RESET_TTL;
		ip->protocol = IPPROTO_TCP;
		ip->saddr = tuple.v4.daddr;
		ip->daddr = tuple.v4.saddr;
		ip->check = checksum_finish(sum_words(0, ip, sizeof(*ip)));
		reset_tcp(tcp, tuple.v4.dport, tuple.v4.sport, &numbers);
		sum = sum_words(0, &ip->saddr, 8) + bpf_htons(IPPROTO_TCP) + bpf_htons(sizeof(*tcp));
		tcp->check = checksum_finish(sum_words(sum, tcp, sizeof(*tcp)));
		__u8 *padding = (void *)(tcp + 1);
		for (int i = 0; i < 6; i++, padding++)
			if ((void *)(padding + 1) <= end)
				*padding = 0;
	} else {
		struct ipv6hdr *ip = data + l3;
		struct tcphdr *tcp = (void *)(ip + 1);
		__u64 sum;

		if ((void *)(eth + 1) > end || (void *)(tcp + 1) > end)
			return XDP_DROP;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 6;
		ip->payload_len = bpf_htons(sizeof(*tcp));
		ip->nexthdr = IPPROTO_TCP;
		ip->hop_limit = RESET_TTL;
		__builtin_memcpy(&ip->saddr, tuple.v6.daddr, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, tuple.v6.saddr, sizeof(ip->daddr));
		reset_tcp(tcp, tuple.v6.dport, tuple.v6.sport, &numbers);
		sum = sum_words(0, &ip->saddr, 32) + bpf_htons(IPPROTO_TCP) + bpf_htons(sizeof(*tcp));
		tcp->check = checksum_finish(sum_words(sum, tcp, sizeof(*tcp)));
	}
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return XDP_TX;
}
