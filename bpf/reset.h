// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Making a RST of the packet in hand: the answer to its sender, turned round and sent back in the name of the service
// (RFC 9293, section 3.10.7.1), or the end of a condemned connection, sent on to its backend.
#pragma once

#include "answer.h"
#include "fullnat.h"
#include "tunnel.h"

#define RESET_TTL 64
#define FRAME_MIN 60 // shorter frames may not leave some cards; the rest is zeroed

static __always_inline void reset_tcp(struct tcphdr *tcp, __be16 sport, __be16 dport, const struct reset *reset)
{
	__builtin_memset(tcp, 0, sizeof(*tcp));
	tcp->source = sport;
	tcp->dest = dport;
	tcp->seq = bpf_htonl(reset->sequence);
	tcp->ack_seq = bpf_htonl(reset->acknowledgement);
	tcp->doff = sizeof(*tcp) / 4;
	((__u8 *)tcp)[13] = reset->flags;
}

// reset_write cuts the frame in hand to bare headers and writes those of IP and TCP as room->reset has them. Pointers
// into the packet end here.
__noinline int reset_write(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	__u32 length = bpf_xdp_get_buff_len(ctx), headers, target, l3;
	struct reset *reset;
	__u64 sum;
	__u8 family;

	if (!room)
		return false;
	reset = &room->reset;
	family = room->flow.family;
	l3 = room->flow.l3 & 31;
	headers = l3 + sizeof(struct tcphdr) + (family == FAMILY_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	target = headers;
	if (target < FRAME_MIN)
		target = length < FRAME_MIN ? length : FRAME_MIN;
	if (length > target && bpf_xdp_adjust_tail(ctx, (int)target - (int)length))
		return false;

	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	if (family == FAMILY_IPV4) {
		struct iphdr *ip = data + l3;
		struct tcphdr *tcp = (void *)(ip + 1);

		if ((void *)(tcp + 1) > end)
			return false;
		__builtin_memset(ip, 0, sizeof(*ip));
		ip->version = 4;
		ip->ihl = sizeof(*ip) / 4;
		ip->tot_len = bpf_htons(sizeof(*ip) + sizeof(*tcp));
		ip->frag_off = bpf_htons(0x4000); // don't fragment: an ID of zero is right (RFC 6864)
		ip->ttl = RESET_TTL;
		ip->protocol = IPPROTO_TCP;
		ip->saddr = reset->tuple.v4.saddr;
		ip->daddr = reset->tuple.v4.daddr;
		ip->check = checksum_finish(sum_words(0, ip, sizeof(*ip)));
		reset_tcp(tcp, reset->tuple.v4.sport, reset->tuple.v4.dport, reset);
		sum = sum_words(0, &ip->saddr, 8) + bpf_htons(IPPROTO_TCP) + bpf_htons(sizeof(*tcp));
		tcp->check = checksum_finish(sum_words(sum, tcp, sizeof(*tcp)));
		__u8 *padding = (void *)(tcp + 1);
		for (int i = 0; i < 6; i++, padding++)
			if ((void *)(padding + 1) <= end)
				*padding = 0;
		return true;
	}
	struct ipv6hdr *ip = data + l3;
	struct tcphdr *tcp = (void *)(ip + 1);

	if ((void *)(tcp + 1) > end)
		return false;
	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 6;
	ip->payload_len = bpf_htons(sizeof(*tcp));
	ip->nexthdr = IPPROTO_TCP;
	ip->hop_limit = RESET_TTL;
	__builtin_memcpy(&ip->saddr, reset->tuple.v6.saddr, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, reset->tuple.v6.daddr, sizeof(ip->daddr));
	reset_tcp(tcp, reset->tuple.v6.sport, reset->tuple.v6.dport, reset);
	sum = sum_words(0, &ip->saddr, 32) + bpf_htons(IPPROTO_TCP) + bpf_htons(sizeof(*tcp));
	tcp->check = checksum_finish(sum_words(sum, tcp, sizeof(*tcp)));
	return true;
}

// reset_answer answers the packet in hand.
__noinline int reset_answer(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct reset *reset;
	__u8 mac[ETH_ALEN];
	struct flow *flow;

	if (!room)
		return XDP_DROP;
	flow = &room->flow;
	reset = &room->reset;
	turned_round(flow->family, &flow->tuple, &reset->tuple);
	if (flow->flags & TCP_ACK) {
		reset->sequence = flow->acknowledgement;
		reset->acknowledgement = 0;
		reset->flags = TCP_RST;
	} else {
		reset->sequence = 0;
		reset->acknowledgement = flow->sequence_end;
		reset->flags = TCP_RST | TCP_ACK;
	}
	if (!reset_write(ctx))
		return XDP_DROP;
	struct ethhdr *eth = (void *)(long)ctx->data;
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return XDP_DROP;
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return XDP_TX;
}

// reset_onward sends a RST made of the client's packet in hand to its backend, by whatever method. Its number is where
// the packet began: nothing of it has reached the backend. It answers as `send` does in forward.h.
__noinline int reset_onward(struct xdp_md *ctx, struct backend *backend, __u32 source_id, __u32 source_port)
{
	struct scratch *room = scratch_get();
	struct reset *reset;
	struct flow *flow;

	if (!room || !backend)
		return -DROP_NO_RING;
	flow = &room->flow;
	reset = &room->reset;
	reset->sequence = flow->sequence;
	reset->acknowledgement = flow->flags & TCP_ACK ? flow->acknowledgement : 0;
	reset->flags = TCP_RST | (flow->flags & TCP_ACK);
	if (stateless(backend->method)) {
		reset->tuple = flow->tuple;
	} else {
		if (!reply_tuple(flow, backend, source_id, source_port, &room->removed))
			return -DROP_NO_RING;
		turned_round(flow->family, &room->removed, &reset->tuple);
	}
	if (!reset_write(ctx))
		return -DROP_TRUNCATED;
	flow->length =
		sizeof(struct tcphdr) + (flow->family == FAMILY_IPV4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	return tunnels(backend) ? tunnel_send(ctx, backend) : send_tagged(ctx, backend_hop(backend));
}
