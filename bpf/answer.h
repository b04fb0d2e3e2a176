// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Answering with an ICMP error, in the name of the address that the packet in hand went to: too big, or port
// unreachable (RFC 792, RFC 1191, RFC 4443). The packet is quoted behind it, up to QUOTE_MAX bytes.
#pragma once

#include "forward.h"

#define ANSWER_TTL 64

// icmp_header is that of ICMP (RFC 792) and of ICMPv6 (RFC 4443) alike. What `rest` holds is the type's own. Linux'
// headers of that name ask for a C library.
struct icmp_header {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be32 rest;
};

enum icmp_type {
	ICMP_ECHO_REPLY = 0,
	ICMP_UNREACHABLE = 3,
	ICMP_ECHO_REQUEST = 8,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETER_PROBLEM = 12,
	ICMP6_UNREACHABLE = 1,
	ICMP6_TOO_BIG = 2,
	ICMP6_PARAMETER_PROBLEM = 4,
	ICMP6_ECHO_REQUEST = 128,
	ICMP6_ECHO_REPLY = 129,
	ICMP6_SOLICITATION = 135,
	ICMP6_ADVERTISEMENT = 136,
};

enum icmp_code {
	ICMP_PORT_UNREACHABLE = 3,
	ICMP_FRAGMENTATION_NEEDED = 4,
	ICMP6_PORT_UNREACHABLE = 4,
};

enum answer {
	ANSWER_MTU,  // room->mtu is what the way takes
	ANSWER_PORT, // nobody is at this port
};

struct answer4 {
	struct iphdr ip;
	struct icmp_header icmp;
};

struct answer6 {
	struct ipv6hdr ip;
	struct icmp_header icmp;
};

static __always_inline __u64 sum_words(__u64 sum, const void *words, int bytes)
{
	for (int i = 0; i < bytes / 4; i++)
		sum += ((const __u32 *)words)[i];
	return sum;
}

// icmp_answer answers as `send` does in forward.h. Pointers into the packet end here.
__noinline int icmp_answer(struct xdp_md *ctx, __u32 answer)
{
	struct scratch *room = scratch_get();
	__u32 length = bpf_xdp_get_buff_len(ctx), l3, quote, headers;
	__u8 link[MAX_L3_OFFSET], mac[ETH_ALEN];
	struct flow *flow;
	__u64 sum;

	if (!room)
		return -DROP_NO_RING;
	flow = &room->flow;
	l3 = flow->l3;
	if (l3 < ETH_HLEN || l3 > MAX_L3_OFFSET || l3 + sizeof(struct iphdr) + 8 > length)
		return -DROP_TRUNCATED;
	quote = flow->length;
	if (quote > length - l3)
		quote = length - l3;
	if (quote > QUOTE_MAX)
		quote = QUOTE_MAX;
	// Verifiers of 6.1 want to see that it is 1 at least.
	quote--;
	barrier_var(quote);
	quote = (quote & (QUOTE_MAX - 1)) + 1;
	if (length > l3 + quote && bpf_xdp_adjust_tail(ctx, (int)(l3 + quote) - (int)length))
		return -DROP_TRUNCATED;
	__builtin_memset(room->quote, 0, sizeof(room->quote));
	if (bpf_xdp_load_bytes(ctx, 0, link, sizeof(link)) || bpf_xdp_load_bytes(ctx, l3, room->quote, quote))
		return -DROP_TRUNCATED;
	__builtin_memcpy(mac, link, ETH_ALEN);
	__builtin_memcpy(link, link + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(link + ETH_ALEN, mac, ETH_ALEN);
	headers = flow->family == FAMILY_IPV4 ? sizeof(struct answer4) : sizeof(struct answer6);
	if (bpf_xdp_adjust_head(ctx, -(int)headers))
		return -DROP_NO_HEADROOM;
	if (bpf_xdp_store_bytes(ctx, 0, link, sizeof(link)))
		return -DROP_TRUNCATED;
	sum = (__u32)bpf_csum_diff(NULL, 0, (void *)room->quote, sizeof(room->quote), 0);
	if (flow->family == FAMILY_IPV4) {
		struct answer4 to = {};

		to.ip.version = 4;
		to.ip.ihl = sizeof(to.ip) / 4;
		to.ip.tot_len = bpf_htons(sizeof(to) + quote);
		to.ip.frag_off = bpf_htons(IPV4_DONT);
		to.ip.ttl = ANSWER_TTL;
		to.ip.protocol = IPPROTO_ICMP;
		to.ip.saddr = flow->tuple.v4.daddr;
		to.ip.daddr = flow->tuple.v4.saddr;
		to.ip.check = checksum_finish(sum_words(0, &to.ip, sizeof(to.ip)));
		to.icmp.type = ICMP_UNREACHABLE;
		to.icmp.code = answer == ANSWER_MTU ? ICMP_FRAGMENTATION_NEEDED : ICMP_PORT_UNREACHABLE;
		if (answer == ANSWER_MTU)
			to.icmp.rest = bpf_htonl(room->mtu);
		to.icmp.check = checksum_finish(sum_words(sum, &to.icmp, sizeof(to.icmp)));
		if (bpf_xdp_store_bytes(ctx, l3, &to, sizeof(to)))
			return -DROP_TRUNCATED;
	} else {
		struct answer6 to = {};

		to.ip.version = 6;
		to.ip.payload_len = bpf_htons(sizeof(to.icmp) + quote);
		to.ip.nexthdr = IPPROTO_ICMPV6;
		to.ip.hop_limit = ANSWER_TTL;
		__builtin_memcpy(&to.ip.saddr, flow->tuple.v6.daddr, sizeof(to.ip.saddr));
		__builtin_memcpy(&to.ip.daddr, flow->tuple.v6.saddr, sizeof(to.ip.daddr));
		to.icmp.type = answer == ANSWER_MTU ? ICMP6_TOO_BIG : ICMP6_UNREACHABLE;
		to.icmp.code = answer == ANSWER_MTU ? 0 : ICMP6_PORT_UNREACHABLE;
		if (answer == ANSWER_MTU)
			to.icmp.rest = bpf_htonl(room->mtu);
		sum = sum_words(sum, &to.ip.saddr, 2 * sizeof(to.ip.saddr));
		sum += to.ip.payload_len + bpf_htons(IPPROTO_ICMPV6);
		to.icmp.check = checksum_finish(sum_words(sum, &to.icmp, sizeof(to.icmp)));
		if (bpf_xdp_store_bytes(ctx, l3, &to, sizeof(to)))
			return -DROP_TRUNCATED;
	}
	return XDP_TX;
}
