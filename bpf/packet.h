// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Step 1 of a packet's way: parse. Ethernet, up to two VLAN tags, IPv4 with options or IPv6 with extension headers,
// ports; the TCP or UDP header only once the packet is known to be ours. Every bound is checked.
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "settings.h"
#include "types.h"

#define MAX_EXTENSIONS 6
#define MAX_TAGS 2
#define MAX_L3_OFFSET (ETH_HLEN + MAX_TAGS * 4)
#define IPV4_DONT 0x4000     // don't fragment
#define IPV4_FRAGMENT 0x3fff // more fragments, or an offset
#define IPV4_OFFSET 0x1fff
#define IPV6_OFFSET 0xfff8
#define IPV6_MORE 0x0001
#define PLAIN_FRAME 1522 // longer ones may be in several buffers, whatever their IP packet needs
#define IPV6_LEAST 1280	 // what every way takes (RFC 8200, section 5)

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
		struct udphdr *udp;
	};
	__u32 l4_length;   // bytes from the TCP or UDP header to the packet's end, as the IP header says
	__u32 length;	   // of the frame
	struct flow *flow; // in the scratch room
};

enum parsed {
	PARSED_OURS_MAYBE, // addresses and ports are known
	PARSED_NOT_OURS,
	PARSED_LATER_FRAGMENT,
	PARSED_ICMP,
	PARSED_ARP,
};

// struct tag_header is what stands behind the Ethernet addresses' type where that names a tag (IEEE 802.1Q).
struct tag_header {
	__be16 control;
	__be16 type; // of what follows
};

static __always_inline void *packet_end(const struct packet *pkt)
{
	return (void *)(long)pkt->ctx->data_end;
}

static __always_inline bool wanted_protocol(__u8 protocol)
{
	return (use_tcp && protocol == IPPROTO_TCP) || (use_udp && protocol == IPPROTO_UDP);
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
	struct flow *flow = pkt->flow;
	__u32 header, total;

	if ((void *)(ip + 1) > packet_end(pkt) || ip->version != 4)
		return PARSED_NOT_OURS;
	if (!wanted_protocol(ip->protocol) && ip->protocol != IPPROTO_ICMP)
		return PARSED_NOT_OURS;
	header = ip->ihl * 4;
	if (header < sizeof(*ip))
		return PARSED_NOT_OURS;
	total = bpf_ntohs(ip->tot_len);
	pkt->ip.v4 = ip;
	pkt->family = flow->family = FAMILY_IPV4;
	flow->protocol = ip->protocol;
	flow->length = total;
	flow->l4 = flow->l3 + header;
	flow->fragment = 0;
	pkt->l4_length = total > header ? total - header : 0;
	flow->tuple.v4.saddr = ip->saddr;
	flow->tuple.v4.daddr = ip->daddr;
	*(__u32 *)&flow->tuple.v4.protocol = ip->protocol;
	if (ip->frag_off & bpf_htons(IPV4_FRAGMENT)) {
		if (ip->frag_off & bpf_htons(IPV4_OFFSET))
			return PARSED_LATER_FRAGMENT;
		flow->fragment = 1;
	}
	if (ip->protocol == IPPROTO_ICMP)
		return PARSED_ICMP;
	if (!parse_ports(pkt, l3 + header, &flow->tuple.v4.sport, &flow->tuple.v4.dport))
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

static __always_inline bool known_extension(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	       next == IPPROTO_FRAGMENT;
}

static __always_inline enum parsed parse_ipv6(struct packet *pkt, void *l3)
{
	struct ipv6hdr *ip = l3;
	struct flow *flow = pkt->flow;
	void *at = ip + 1;
	__u32 skipped = 0, payload;
	bool later = false;
	__u8 next;

	if (at > packet_end(pkt) || ip->version != 6)
		return PARSED_NOT_OURS;
	next = ip->nexthdr;
	flow->fragment = 0;
	for (int i = 0; i < MAX_EXTENSIONS && !wanted_protocol(next) && next != IPPROTO_ICMPV6; i++) {
		struct extension *ext = at;
		__u32 length;

		// Hop-by-hop options stand first or nowhere (RFC 8200, section 4.1).
		if (!known_extension(next) || (i && next == IPPROTO_HOPOPTS))
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
			if (ext->fragment & bpf_htons(IPV6_OFFSET | IPV6_MORE))
				flow->extension = flow->l3 + sizeof(*ip) + skipped;
			if (ext->fragment & bpf_htons(IPV6_OFFSET)) {
				next = ext->next;
				later = true;
				break;
			}
			if (ext->fragment & bpf_htons(IPV6_MORE))
				flow->fragment = 1;
		}
		next = ext->next;
		skipped += length;
		at += length;
	}
	payload = bpf_ntohs(ip->payload_len);
	pkt->ip.v6 = ip;
	pkt->family = flow->family = FAMILY_IPV6;
	flow->protocol = next;
	flow->length = payload + sizeof(*ip);
	flow->l4 = flow->l3 + sizeof(*ip) + skipped;
	pkt->l4_length = payload > skipped ? payload - skipped : 0;
	__builtin_memcpy(flow->tuple.v6.saddr, &ip->saddr, sizeof(flow->tuple.v6.saddr));
	__builtin_memcpy(flow->tuple.v6.daddr, &ip->daddr, sizeof(flow->tuple.v6.daddr));
	*(__u32 *)&flow->tuple.v6.protocol = next;
	if (later)
		return PARSED_LATER_FRAGMENT;
	if (next == IPPROTO_ICMPV6)
		return PARSED_ICMP;
	if (!wanted_protocol(next) || !parse_ports(pkt, at, &flow->tuple.v6.sport, &flow->tuple.v6.dport))
		return PARSED_NOT_OURS;
	return PARSED_OURS_MAYBE;
}

// turned_round is the tuple of packets the other way.
static __always_inline void turned_round(__u8 family, const union tuple *from, union tuple *to)
{
	__builtin_memset(to, 0, sizeof(*to));
	if (family == FAMILY_IPV4) {
		to->v4.saddr = from->v4.daddr;
		to->v4.daddr = from->v4.saddr;
		to->v4.sport = from->v4.dport;
		to->v4.dport = from->v4.sport;
		to->v4.protocol = from->v4.protocol;
	} else {
		__builtin_memcpy(to->v6.saddr, from->v6.daddr, sizeof(to->v6.saddr));
		__builtin_memcpy(to->v6.daddr, from->v6.saddr, sizeof(to->v6.daddr));
		to->v6.sport = from->v6.dport;
		to->v6.dport = from->v6.sport;
		to->v6.protocol = from->v6.protocol;
	}
}

static __always_inline bool is_tag(__be16 type)
{
	return type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD);
}

static __always_inline __u16 tag_word(__be16 type, __be16 control)
{
	return (bpf_ntohs(control) & TAG_ID) | (type == bpf_htons(ETH_P_8021AD) ? TAG_8021AD : 0);
}

// parse_tags notes the VLANs of a frame. A tag of identifier 0 is a priority, no VLAN, but takes its place all the
// same. It answers the type of what follows.
static __always_inline __be16 parse_tags(struct packet *pkt, __u32 *offset)
{
	struct tag_header *tag = (void *)(pkt->eth + 1);
	struct flow *flow = pkt->flow;
	__be16 type = pkt->eth->h_proto;
	__u32 place = 0;

	*(__u32 *)flow->from.vlan = 0;
	for (int i = 0; i < MAX_TAGS && is_tag(type); i++, tag++) {
		if ((void *)(tag + 1) > packet_end(pkt))
			return 0;
		if (tag->control & bpf_htons(TAG_ID))
			flow->from.vlan[place++ & 1] = tag_word(type, tag->control);
		type = tag->type;
		*offset += sizeof(*tag);
	}
	return type;
}

static __always_inline bool source_possible4(__be32 address)
{
	__u8 first = *(__u8 *)&address;

	return first != 127 && (__u8)(first - 1) < 223;
}

// source_possible says whether a host may have the source address of the packet in hand (RFC 1122, section 3.2.1.3;
// RFC 4291, sections 2.5.2, 2.5.3 and 2.7). Verified by itself: its branches would be walked for every way on.
__noinline int source_possible(void)
{
	struct scratch *room = scratch_get();
	const __be32 *words;
	__u8 first;

	if (!room)
		return false;
	if (room->flow.family == FAMILY_IPV4)
		return source_possible4(room->flow.tuple.v4.saddr);
	words = room->flow.tuple.v6.saddr;
	first = *(const __u8 *)words;
	return first != 0xff && (words[0] | words[1] | words[2] || (words[3] && words[3] != bpf_htonl(1)));
}

static __always_inline enum parsed parse(struct packet *pkt)
{
	void *data = (void *)(long)pkt->ctx->data;
	struct ethhdr *eth = data;
	__u32 offset = sizeof(*eth);
	__be16 type;

	if ((void *)(eth + 1) > packet_end(pkt))
		return PARSED_NOT_OURS;
	pkt->eth = eth;
	pkt->length = packet_end(pkt) - data;
	type = parse_tags(pkt, &offset);
	pkt->flow->l3 = offset;
	pkt->flow->group = (eth->h_dest[0] & 1) | (eth->h_source[0] & 1) << 1;
	// Read back, it is some number to the verifier, which so follows one way on, not one for each count of tags.
	offset = *(volatile __u16 *)&pkt->flow->l3 & 31;
	if (use_ipv4 && type == bpf_htons(ETH_P_IP))
		return parse_ipv4(pkt, data + offset);
	if (use_ipv6 && type == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(pkt, data + offset);
	if (use_ipv4 && type == bpf_htons(ETH_P_ARP))
		return PARSED_ARP;
	return PARSED_NOT_OURS;
}

// whole says whether the frame holds all of what its IP header says. It may hold more (Ethernet pads). Of a frame in
// several buffers only the first lies at hand.
static __always_inline bool whole(struct packet *pkt)
{
	__u32 needed = pkt->flow->l3 + pkt->flow->length;

	if (needed > pkt->length || pkt->length > PLAIN_FRAME)
		pkt->length = bpf_xdp_get_buff_len(pkt->ctx);
	return needed <= pkt->length;
}

static __always_inline enum verdict parse_tcp(struct packet *pkt)
{
	struct tcphdr *tcp = pkt->l4;
	struct flow *flow = pkt->flow;
	__u32 header, payload;

	if ((void *)(tcp + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	header = tcp->doff * 4;
	if (header < sizeof(*tcp) || header > pkt->l4_length)
		return DROP_BAD_HEADER;
	if (!whole(pkt))
		return DROP_TRUNCATED;
	payload = pkt->l4_length - header;
	flow->flags = ((__u8 *)tcp)[13];
	flow->sequence = bpf_ntohl(tcp->seq);
	flow->acknowledgement = bpf_ntohl(tcp->ack_seq);
	flow->sequence_end = flow->sequence + payload + !!(flow->flags & TCP_SYN) + !!(flow->flags & TCP_FIN);
	return PASS_NOT_OURS;
}

static __always_inline enum verdict parse_udp(struct packet *pkt)
{
	struct udphdr *udp = pkt->l4;
	struct flow *flow = pkt->flow;
	__u32 length;

	if ((void *)(udp + 1) > packet_end(pkt))
		return DROP_TRUNCATED;
	length = bpf_ntohs(udp->len);
	// A first fragment holds a part of what the UDP header counts.
	if (length < sizeof(*udp) || pkt->l4_length < sizeof(*udp) || (!flow->fragment && length > pkt->l4_length))
		return DROP_BAD_HEADER;
	if (!whole(pkt))
		return DROP_TRUNCATED;
	flow->flags = 0;
	flow->sequence = flow->sequence_end = flow->acknowledgement = 0;
	return PASS_NOT_OURS;
}

// parse_transport reads the TCP or UDP header of a packet that is ours. PASS_NOT_OURS says that all is well.
static __always_inline enum verdict parse_transport(struct packet *pkt)
{
	struct flow *flow = pkt->flow;

	__builtin_memcpy(flow->from.mac, pkt->eth->h_source, ETH_ALEN);
	__builtin_memcpy(flow->from.source_mac, pkt->eth->h_dest, ETH_ALEN);
	flow->from.ifindex = pkt->ctx->ingress_ifindex;
	if (use_udp && flow->protocol == IPPROTO_UDP)
		return parse_udp(pkt);
	return parse_tcp(pkt);
}
