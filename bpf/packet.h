// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Step 1 of a packet's way: parse. Ethernet, IPv4 with options or IPv6 with extension headers, ports; the TCP header
// only once the packet is known to be ours. Every bound is checked.
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "settings.h"
#include "types.h"

#define MAX_EXTENSIONS 6
#define IPV4_FRAGMENT 0x3fff // more fragments, or an offset
#define IPV4_OFFSET 0x1fff
#define IPV6_OFFSET 0xfff8
#define IPV6_MORE 0x0001

enum tcp_flag {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_ACK = 0x10,
};

// The family fills a word of its own: the verifier follows a constant through the stack only then, and so knows which
// of the two IP headers is there.
struct packet {
	struct xdp_md *ctx;
	__u64 family;
	struct ethhdr *eth;
	union {
		struct iphdr *v4;
		struct ipv6hdr *v6;
	} ip;
	union {
		void *l4;
		struct tcphdr *tcp;
	};
	__u32 l4_length; // bytes from the TCP header to the packet's end, as the IP header says
	__u32 length;	 // of the frame
	bool first_fragment;
	struct flow *flow; // in the scratch room
};

enum parsed {
	PARSED_OURS_MAYBE, // addresses and ports are known
	PARSED_NOT_OURS,
	PARSED_LATER_FRAGMENT,
};

static __always_inline void *packet_end(const struct packet *pkt)
{
	return (void *)(long)pkt->ctx->data_end;
}

// parse_ports reads the ports, which stand first in TCP and UDP alike.
static __always_inline bool parse_ports(struct packet *pkt, void *l4, __be16 *sport, __be16 *dport)
{
	__be16 *ports = l4;

	if ((void *)(ports + 2) > packet_end(pkt))
		return false;
	*sport = ports[0];
	*dport = ports[1];
	pkt->l4 = l4;
	return true;
}

static __always_inline enum parsed parse_ipv4(struct packet *pkt, void *l3)
{
	struct iphdr *ip = l3;
	__u32 header, total;

	if ((void *)(ip + 1) > packet_end(pkt) || ip->version != 4)
		return PARSED_NOT_OURS;
	if (ip->protocol != IPPROTO_TCP)
		return PARSED_NOT_OURS;
	header = ip->ihl * 4;
	if (header < sizeof(*ip))
		return PARSED_NOT_OURS;
	if (ip->frag_off & bpf_htons(IPV4_FRAGMENT)) {
		if (ip->frag_off & bpf_htons(IPV4_OFFSET))
			return PARSED_LATER_FRAGMENT;
		pkt->first_fragment = true;
	}
	total = bpf_ntohs(ip->tot_len);
	pkt->ip.v4 = ip;
	pkt->family = pkt->flow->family = FAMILY_IPV4;
	pkt->flow->protocol = IPPROTO_TCP;
	pkt->l4_length = total > header ? total - header : 0;
	pkt->flow->tuple.v4.saddr = ip->saddr;
	pkt->flow->tuple.v4.daddr = ip->daddr;
	if (!parse_ports(pkt, l3 + header, &pkt->flow->tuple.v4.sport, &pkt->flow->tuple.v4.dport))
		return PARSED_NOT_OURS;
	return PARSED_OURS_MAYBE;
}

// extension is what IPv6 extension headers have in common; the length is in 8-byte units, the first not counted
// (RFC 8200, section 4). In a fragment header (4.5) that byte is reserved, and the offset and M flag follow.
struct extension {
	__u8 next;
	__u8 length;
	__be16 fragment;
};

static __always_inline enum parsed parse_ipv6(struct packet *pkt, void *l3)
{
	struct ipv6hdr *ip = l3;
	void *at = ip + 1;
	__u32 skipped = 0, payload;
	__u8 next;

	if (at > packet_end(pkt) || ip->version != 6)
		return PARSED_NOT_OURS;
	next = ip->nexthdr;
	for (int i = 0; i < MAX_EXTENSIONS && next != IPPROTO_TCP; i++) {
		struct extension *ext = at;
		__u32 length;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			return PARSED_NOT_OURS;
		if ((void *)(ext + 1) > packet_end(pkt))
			return PARSED_NOT_OURS;
		length = 8;
		if (next != IPPROTO_FRAGMENT) {
			length += ext->length * 8;
			// With segments left, the packet is on its way to another address (RFC 8200, section 4.4).
			if (next == IPPROTO_ROUTING && ((__u8 *)&ext->fragment)[1])
				return PARSED_NOT_OURS;
		} else {
			// An atomic fragment, offset 0 and no more, is a whole packet (RFC 6946).
			if (ext->fragment & bpf_htons(IPV6_OFFSET))
				return PARSED_LATER_FRAGMENT;
			pkt->first_fragment |= (ext->fragment & bpf_htons(IPV6_MORE)) != 0;
		}
		next = ext->next;
		skipped += length;
		at += length;
	}
	if (next != IPPROTO_TCP)
		return PARSED_NOT_OURS;
	payload = bpf_ntohs(ip->payload_len);
	pkt->ip.v6 = ip;
	pkt->family = pkt->flow->family = FAMILY_IPV6;
	pkt->flow->protocol = IPPROTO_TCP;
	pkt->l4_length = payload > skipped ? payload - skipped : 0;
	__builtin_memcpy(pkt->flow->tuple.v6.saddr, &ip->saddr, sizeof(pkt->flow->tuple.v6.saddr));
	__builtin_memcpy(pkt->flow->tuple.v6.daddr, &ip->daddr, sizeof(pkt->flow->tuple.v6.daddr));
	if (!parse_ports(pkt, at, &pkt->flow->tuple.v6.sport, &pkt->flow->tuple.v6.dport))
		return PARSED_NOT_OURS;
	return PARSED_OURS_MAYBE;
}

static __always_inline enum parsed parse(struct packet *pkt)
{
	void *data = (void *)(long)pkt->ctx->data;
	struct ethhdr *eth = data;

	if ((void *)(eth + 1) > packet_end(pkt))
		return PARSED_NOT_OURS;
	pkt->eth = eth;
	pkt->length = packet_end(pkt) - data;
	if (use_ipv4 && eth->h_proto == bpf_htons(ETH_P_IP))
		return parse_ipv4(pkt, eth + 1);
	if (use_ipv6 && eth->h_proto == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(pkt, eth + 1);
	return PARSED_NOT_OURS;
}

// parse_tcp reads the TCP header of a packet that is ours. PASS_NOT_OURS says that all is well.
static __always_inline enum verdict parse_tcp(struct packet *pkt)
{
	struct tcphdr *tcp = pkt->l4;
	__u32 header, payload;

	if (pkt->first_fragment)
		return DROP_FRAGMENT;
	if ((void *)(tcp + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	header = tcp->doff * 4;
	if (header < sizeof(*tcp) || header > pkt->l4_length)
		return DROP_BAD_HEADER;
	// The frame may be longer than its packet (Ethernet pads), never shorter.
	if ((void *)tcp - (void *)pkt->eth + pkt->l4_length > pkt->length)
		return DROP_TRUNCATED;
	payload = pkt->l4_length - header;
	pkt->flow->flags = ((__u8 *)tcp)[13];
	pkt->flow->sequence = bpf_ntohl(tcp->seq);
	pkt->flow->acknowledgement = bpf_ntohl(tcp->ack_seq);
	pkt->flow->sequence_end =
		pkt->flow->sequence + payload + !!(pkt->flow->flags & TCP_SYN) + !!(pkt->flow->flags & TCP_FIN);
	__builtin_memcpy(pkt->flow->from.mac, pkt->eth->h_source, ETH_ALEN);
	__builtin_memcpy(pkt->flow->from.source_mac, pkt->eth->h_dest, ETH_ALEN);
	pkt->flow->from.ifindex = pkt->ctx->ingress_ifindex;
	pkt->flow->from.vlan[0] = pkt->flow->from.vlan[1] = 0;
	return PASS_NOT_OURS;
}
