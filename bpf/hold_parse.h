// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Parsing for `fairlead hold`: up to two VLAN tags, IPv4 with options or IPv6 with extension headers, the ports of TCP
// and UDP. Every bound is checked. What can't be read passes: the host's stack can't read it either.
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "hold_types.h"

#define MAX_TAGS 2
#define MAX_EXTENSIONS 6
#define IPV4_OFFSET 0x1fff
#define IPV6_OFFSET 0xfff8

// A step's answer when the packet's way goes on.
#define GO_ON VERDICT_COUNT

struct packet {
	struct xdp_md *ctx;
	__u32 l3; // where the IP header begins in the frame
	__u8 protocol;
	bool syn; // TCP, with SYN and without ACK
	__be16 sport;
	__be16 dport;
};

struct tag_header {
	__be16 control;
	__be16 type; // of what follows
};

// ports stand first in TCP and UDP alike.
struct ports {
	__be16 sport;
	__be16 dport;
};

// extension is what IPv6 extension headers have in common; the length is in 8-byte units, the first not counted
// (RFC 8200, section 4). In a fragment header (4.5) that byte is reserved, and the offset follows.
struct extension {
	__u8 next;
	__u8 length;
	__be16 fragment;
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

static __always_inline bool held_protocol(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

// parse_ethernet finds the IP header, behind up to two VLAN tags, and answers its type; 0: there is none.
static __always_inline __be16 parse_ethernet(struct packet *pkt)
{
	struct ethhdr *eth = packet_at(pkt, 0);
	struct tag_header *tag = (void *)(eth + 1);
	__be16 type;

	if ((void *)tag > packet_end(pkt))
		return 0;
	type = eth->h_proto;
	pkt->l3 = sizeof(*eth);
	for (int i = 0; i < MAX_TAGS && is_tag(type); i++, tag++) {
		if ((void *)(tag + 1) > packet_end(pkt))
			return 0;
		type = tag->type;
		pkt->l3 += sizeof(*tag);
	}
	return type;
}

static __always_inline enum verdict parse_ports(struct packet *pkt, void *l4)
{
	enum { FLAGS = 13, SYN = 0x02, ACK = 0x10 };
	struct ports *ports = l4;
	__u8 *flags = l4 + FLAGS;

	if ((void *)(ports + 1) > packet_end(pkt))
		return PASS_OTHER;
	pkt->sport = ports->sport;
	pkt->dport = ports->dport;
	if (pkt->protocol == IPPROTO_TCP && (void *)(flags + 1) <= packet_end(pkt))
		pkt->syn = (*flags & (SYN | ACK)) == SYN;
	return GO_ON;
}

static __always_inline enum verdict parse_ipv4(struct packet *pkt)
{
	struct iphdr *ip = packet_at(pkt, pkt->l3);
	__u32 header;

	if ((void *)(ip + 1) > packet_end(pkt) || ip->version != 4 || !held_protocol(ip->protocol))
		return PASS_OTHER;
	header = ip->ihl * 4;
	if (header < sizeof(*ip))
		return PASS_OTHER;
	if (ip->frag_off & bpf_htons(IPV4_OFFSET))
		return PASS_FRAGMENT;
	pkt->protocol = ip->protocol;
	return parse_ports(pkt, (void *)ip + header);
}

static __always_inline bool is_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	       next == IPPROTO_FRAGMENT;
}

static __always_inline enum verdict parse_ipv6(struct packet *pkt)
{
	struct ipv6hdr *ip = packet_at(pkt, pkt->l3);
	void *at = ip + 1;
	bool later = false;
	__u8 next;

	if (at > packet_end(pkt) || ip->version != 6)
		return PASS_OTHER;
	next = ip->nexthdr;
	for (int i = 0; i < MAX_EXTENSIONS && !held_protocol(next); i++) {
		struct extension *ext = at;
		__u32 length = 8;

		if (!is_extension(next) || (void *)(ext + 1) > packet_end(pkt))
			return PASS_OTHER;
		if (next != IPPROTO_FRAGMENT) {
			length += ext->length * 8;
		} else if (ext->fragment & bpf_htons(IPV6_OFFSET)) {
			next = ext->next;
			later = true;
			break;
		}
		next = ext->next;
		at += length;
	}
	// What stands first in the fragmented part of a later fragment may be an extension header: such pass as all
	// else does.
	if (!held_protocol(next))
		return PASS_OTHER;
	if (later)
		return PASS_FRAGMENT;
	pkt->protocol = next;
	return parse_ports(pkt, at);
}
