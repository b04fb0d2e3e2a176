// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The outer packet: is it a tunnel's, is it for us, is it sound? Every bound is checked. What is not known to be a
// tunnel's packet for us is left to the host's stack; what is, and is broken, is dropped.
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "checksum.h"
#include "decap_maps.h"

#define MAX_TAGS 2
#define IPV4_FRAGMENT 0x3fff // more fragments, or an offset
#define IPV4_OFFSET 0x1fff
#define IPV6_FRAGMENT 0xfff9
#define IPV6_OFFSET 0xfff8
#define MAX_IPV4_WORDS 15

// A step's answer when the packet's way goes on.
#define GO_ON VERDICT_COUNT

struct packet {
	struct xdp_md *ctx;
	__u32 tags;	// VLAN tags
	__u32 outer;	// where the outer header begins in the frame
	__u32 inner;	// and the inner one
	__u32 room;	// bytes that the outer packet has for the inner one
	__u32 protocol; // of the outer header: IPPROTO_IPIP, IPPROTO_IPV6, or IPPROTO_UDP for GUE
	bool outer6;
	bool inner6;
	__u8 ecn; // of the outer header
};

struct tag_header {
	__be16 control;
	__be16 type; // of what follows
};

// extension6 is an IPv6 fragment header (RFC 8200, section 4.5).
struct extension6 {
	__u8 next;
	__u8 reserved;
	__be16 fragment;
	__be32 id;
};

static __always_inline void *packet_at(const struct packet *pkt, __u32 offset)
{
	return (void *)(long)pkt->ctx->data + offset;
}

static __always_inline void *packet_end(const struct packet *pkt)
{
	return (void *)(long)pkt->ctx->data_end;
}

static __always_inline bool is_tag(__be16 type)
{
	return type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD);
}

// outer_ethernet finds the outer IP header, behind up to two VLAN tags, and answers its type; 0: there is none.
static __always_inline __be16 outer_ethernet(struct packet *pkt)
{
	struct ethhdr *eth = packet_at(pkt, 0);
	struct tag_header *tag = (void *)(eth + 1);
	__be16 type;

	if ((void *)tag > packet_end(pkt))
		return 0;
	type = eth->h_proto;
	for (int i = 0; i < MAX_TAGS && is_tag(type); i++, tag++) {
		if ((void *)(tag + 1) > packet_end(pkt))
			return 0;
		type = tag->type;
		pkt->tags++;
	}
	pkt->outer = sizeof(*eth) + pkt->tags * sizeof(*tag);
	return type;
}

static __always_inline bool is_gue(const struct packet *pkt, struct udphdr *udp)
{
	return (void *)(udp + 1) <= packet_end(pkt) && udp->dest == bpf_htons(gue_port);
}

static __always_inline bool source4_wanted(const struct iphdr *ip)
{
	struct prefix4 key = {.length = 32};

	if (!use_sources)
		return true;
	__builtin_memcpy(key.address, &ip->saddr, sizeof(key.address));
	return bpf_map_lookup_elem(&sources4, &key);
}

static __always_inline bool source6_wanted(const struct ipv6hdr *ip)
{
	struct prefix6 key = {.length = 128};

	if (!use_sources)
		return true;
	__builtin_memcpy(key.address, &ip->saddr, sizeof(key.address));
	return bpf_map_lookup_elem(&sources6, &key);
}

static __always_inline bool checksum_right(const struct packet *pkt, struct iphdr *ip, __u32 header)
{
	__u32 *word = (void *)ip;
	__u64 sum = 0;

	for (__u32 i = 0; i < MAX_IPV4_WORDS && i * sizeof(*word) < header; i++, word++) {
		// Else the compiler reckons the turns from the end of the packet, which the verifier forbids.
		barrier_var(word);
		if ((void *)(word + 1) > packet_end(pkt))
			return false;
		sum += *word;
	}
	return checksum_finish(sum) == 0;
}

// outer_lengths holds what the outer headers say of their lengths against each other and against the frame. The frame
// may hold more (Ethernet pads); of one in several buffers, all count.
static __always_inline enum verdict outer_lengths(struct packet *pkt, __u32 header, __u32 total)
{
	__u32 length;

	if (total < header)
		return DROP_BAD_LENGTH;
	if (pkt->outer + total > bpf_xdp_get_buff_len(pkt->ctx))
		return DROP_TRUNCATED;
	pkt->inner = pkt->outer + header;
	pkt->room = total - header;
	if (pkt->protocol == IPPROTO_UDP) {
		struct udphdr *udp = packet_at(pkt, pkt->inner);

		if ((void *)(udp + 1) > packet_end(pkt))
			return DROP_TRUNCATED;
		length = bpf_ntohs(udp->len);
		if (length < sizeof(*udp) || length > pkt->room)
			return DROP_BAD_LENGTH;
		// The checksum is not asked for: senders of tunnels leave it zero (RFC 6935), and the inner packet has
		// its own.
		pkt->inner += sizeof(*udp);
		pkt->room = length - sizeof(*udp);
	}
	return GO_ON;
}

static __always_inline enum verdict outer_ipv4(struct packet *pkt)
{
	struct iphdr *ip = packet_at(pkt, pkt->outer);
	__u32 header;

	if ((void *)(ip + 1) > packet_end(pkt) || ip->version != 4)
		return PASS_NOT_TUNNEL;
	header = ip->ihl * 4;
	pkt->protocol = ip->protocol;
	switch (pkt->protocol) {
	case IPPROTO_IPIP:
	case IPPROTO_IPV6:
		break;
	case IPPROTO_UDP:
		// A later fragment has no port: only its first is known to be GUE.
		if (header < sizeof(*ip) || ip->frag_off & bpf_htons(IPV4_OFFSET) || !is_gue(pkt, (void *)ip + header))
			return PASS_NOT_TUNNEL;
		break;
	default:
		return PASS_NOT_TUNNEL;
	}
	if (!bpf_map_lookup_elem(&addresses4, &ip->daddr))
		return PASS_OTHER_ADDRESS;
	if (!source4_wanted(ip))
		return PASS_OTHER_SOURCE;
	if (ip->frag_off & bpf_htons(IPV4_FRAGMENT))
		return PASS_FRAGMENT;
	if (header < sizeof(*ip))
		return DROP_BAD_HEADER;
	if ((void *)ip + header > packet_end(pkt))
		return DROP_TRUNCATED;
	if (!checksum_right(pkt, ip, header))
		return DROP_BAD_CHECKSUM;
	pkt->ecn = ip->tos & 3;
	return outer_lengths(pkt, header, bpf_ntohs(ip->tot_len));
}

static __always_inline enum verdict outer_ipv6(struct packet *pkt)
{
	struct ipv6hdr *ip = packet_at(pkt, pkt->outer);
	struct extension6 *extension = (void *)(ip + 1);
	__u32 header = sizeof(*ip);
	bool ours, fragment = false, later = false;

	if ((void *)extension > packet_end(pkt) || ip->version != 6)
		return PASS_NOT_TUNNEL;
	ours = bpf_map_lookup_elem(&addresses6, &ip->daddr);
	pkt->protocol = ip->nexthdr;
	if (pkt->protocol == IPPROTO_FRAGMENT) {
		if ((void *)(extension + 1) > packet_end(pkt))
			return PASS_NOT_TUNNEL;
		// An atomic fragment, offset 0 and no more, is a whole packet (RFC 6946).
		fragment = extension->fragment & bpf_htons(IPV6_FRAGMENT);
		later = extension->fragment & bpf_htons(IPV6_OFFSET);
		pkt->protocol = extension->next;
		header += sizeof(*extension);
	}
	switch (pkt->protocol) {
	case IPPROTO_IPIP:
	case IPPROTO_IPV6:
		break;
	case IPPROTO_UDP:
		if (later || !is_gue(pkt, (void *)ip + header))
			return PASS_NOT_TUNNEL;
		break;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
		// Options may ask for what only a stack can do. Fairlead sends none.
		return ours ? PASS_EXTENSION : PASS_NOT_TUNNEL;
	default:
		return PASS_NOT_TUNNEL;
	}
	if (!ours)
		return PASS_OTHER_ADDRESS;
	if (!source6_wanted(ip))
		return PASS_OTHER_SOURCE;
	if (fragment)
		return PASS_FRAGMENT;
	pkt->ecn = ip->flow_lbl[0] >> 4 & 3;
	pkt->outer6 = true;
	return outer_lengths(pkt, header, sizeof(*ip) + bpf_ntohs(ip->payload_len));
}
