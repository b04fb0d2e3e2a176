// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The inner packet: is it whole, what does it take over from the outer one, and how it comes to stand alone.
#pragma once

#include "decap_outer.h"

// The ECN field (RFC 3168, section 5).
enum ecn {
	ECN_NOT_ECT = 0,
	ECN_ECT_1 = 1,
	ECN_ECT_0 = 2,
	ECN_CE = 3,
};

static __always_inline enum verdict inner_ipv4(struct packet *pkt)
{
	struct iphdr *ip = packet_at(pkt, pkt->inner);
	__u32 header, total;

	if (pkt->protocol == IPPROTO_IPV6)
		return DROP_INNER_HEADER;
	if (pkt->room < sizeof(*ip))
		return DROP_INNER_LENGTH;
	if ((void *)(ip + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	header = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (header < sizeof(*ip))
		return DROP_INNER_HEADER;
	if (total < header || total > pkt->room)
		return DROP_INNER_LENGTH;
	return GO_ON;
}

static __always_inline enum verdict inner_ipv6(struct packet *pkt)
{
	struct ipv6hdr *ip = packet_at(pkt, pkt->inner);

	if (pkt->protocol == IPPROTO_IPIP)
		return DROP_INNER_HEADER;
	if (pkt->room < sizeof(*ip))
		return DROP_INNER_LENGTH;
	if ((void *)(ip + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	if (sizeof(*ip) + bpf_ntohs(ip->payload_len) > pkt->room)
		return DROP_INNER_LENGTH;
	pkt->inner6 = true;
	return GO_ON;
}

// inner_find looks at what the outer packet holds. GUE's variant 1 is an IP packet, told from other variants by the
// first four bits: an IP version, 4 or 6.
static __always_inline enum verdict inner_find(struct packet *pkt)
{
	__u8 *first = packet_at(pkt, pkt->inner);

	if (!pkt->room)
		return pkt->protocol == IPPROTO_UDP ? PASS_OTHER_GUE : DROP_INNER_LENGTH;
	if ((void *)(first + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	switch (*first >> 4) {
	case 4:
		return inner_ipv4(pkt);
	case 6:
		return inner_ipv6(pkt);
	}
	return pkt->protocol == IPPROTO_UDP ? PASS_OTHER_GUE : DROP_INNER_HEADER;
}

// inner_set_ecn writes the field, and mends IPv4's checksum. The field stands in the header's first two bytes.
static __always_inline void inner_set_ecn(struct packet *pkt, void *header, __u8 ecn)
{
	struct ipv6hdr *ipv6 = header;
	struct iphdr *ipv4 = header;
	__u16 before, after;

	if (pkt->inner6) {
		ipv6->flow_lbl[0] = (ipv6->flow_lbl[0] & ~0x30) | ecn << 4;
		return;
	}
	before = *(__u16 *)header;
	ipv4->tos = (ipv4->tos & ~3) | ecn;
	after = *(__u16 *)header;
	ipv4->check = checksum_finish(checksum_change16(checksum_start(ipv4->check), before, after));
}

// inner_congestion hands on what the outer header says of congestion on the way: the table of RFC 6040, section 4.2.
// The DSCP stays the inner packet's own (RFC 2983).
static __always_inline enum verdict inner_congestion(struct packet *pkt)
{
	struct iphdr *ipv4 = packet_at(pkt, pkt->inner);
	struct ipv6hdr *ipv6 = (void *)ipv4;
	__u8 inner, outer = pkt->ecn, result;

	// Either family's header is at least as long as IPv4's.
	if ((void *)(ipv4 + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	inner = pkt->inner6 ? ipv6->flow_lbl[0] >> 4 & 3 : ipv4->tos & 3;
	if (outer == ECN_NOT_ECT || outer == inner)
		return GO_ON;
	result = inner;
	switch (inner) {
	case ECN_NOT_ECT:
		// Not to pass it on is all that tells its sender.
		if (outer == ECN_CE)
			return DROP_CONGESTION;
		count_event(EVENT_CONGESTION_STRANGE);
		break;
	case ECN_CE:
		if (outer == ECN_ECT_1)
			count_event(EVENT_CONGESTION_STRANGE);
		break;
	case ECN_ECT_0:
		result = outer; // ECT(1) is the more severe of the two, where they differ in severity at all
		break;
	case ECN_ECT_1:
		if (outer == ECN_CE)
			result = outer;
		else
			count_event(EVENT_CONGESTION_STRANGE);
		break;
	}
	if (result == inner)
		return GO_ON;
	if (result == ECN_CE)
		count_event(EVENT_CONGESTION_MARKED);
	inner_set_ecn(pkt, ipv4, result);
	return GO_ON;
}

static __always_inline enum verdict opened_kind(const struct packet *pkt)
{
	return OPENED_4IN4 + pkt->inner6 + 2 * pkt->outer6 + 4 * (pkt->protocol == IPPROTO_UDP);
}

// inner_strip takes the outer headers out: addresses and tags move up to the inner packet, and the type becomes its.
static __always_inline enum verdict inner_strip(struct packet *pkt)
{
	struct ethhdr *eth = packet_at(pkt, 0);
	__u8 addresses[2 * ETH_ALEN];
	__u32 tags[MAX_TAGS] = {}, *tag;
	__be16 *type;

	tag = (void *)eth + sizeof(addresses);
	if ((void *)(eth + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	__builtin_memcpy(addresses, eth, sizeof(addresses));
	// A tag as it stands in the frame: its own type, then its control field.
	for (int i = 0; i < MAX_TAGS && i < pkt->tags; i++) {
		if ((void *)(tag + i + 1) > packet_end(pkt))
			return DROP_TRUNCATED;
		tags[i] = tag[i];
	}
	// Refused only where less than an Ethernet header would be left.
	if (bpf_xdp_adjust_head(pkt->ctx, pkt->inner - pkt->outer))
		return DROP_TRUNCATED;
	eth = packet_at(pkt, 0);
	tag = (void *)eth + sizeof(addresses);
	if ((void *)(eth + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	__builtin_memcpy(eth, addresses, sizeof(addresses));
	for (int i = 0; i < MAX_TAGS && i < pkt->tags; i++, tag++) {
		if ((void *)(tag + 1) > packet_end(pkt))
			return DROP_TRUNCATED;
		*tag = tags[i];
	}
	type = (void *)tag;
	if ((void *)(type + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	*type = pkt->inner6 ? bpf_htons(ETH_P_IPV6) : bpf_htons(ETH_P_IP);
	return opened_kind(pkt);
}
