// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Addresses of XDP's own: the host does not hold them, so ARP, NDP and echo are answered here. The daemon has asked
// before whether anyone else has them; who asks now, does so too late, and is answered (RFC 5227, section 2.4; RFC
// 4862, section 5.4).
#pragma once

#include "answer.h"
#include "counters.h"
#include "forward.h"

static __always_inline __u32 address_flags(__u8 family, const void *address)
{
	__u32 *flags;

	if (family == FAMILY_IPV4) {
		__be32 key = *(const __be32 *)address;

		flags = bpf_map_lookup_elem(&addresses4, &key);
		APART(flags, FAMILY_IPV4);
	} else {
		struct address6 key;

		__builtin_memcpy(&key, address, sizeof(key));
		flags = bpf_map_lookup_elem(&addresses6, &key);
		APART(flags, FAMILY_IPV6);
	}
	return flags ? *flags : 0;
}

static __always_inline __u32 destination_flags(const struct flow *flow)
{
	return flow->family == FAMILY_IPV4 ? address_flags(FAMILY_IPV4, &flow->tuple.v4.daddr)
					   : address_flags(FAMILY_IPV6, flow->tuple.v6.daddr);
}

static __always_inline struct device *device_of(struct xdp_md *ctx)
{
	__u32 ifindex = ctx->ingress_ifindex;

	return bpf_map_lookup_elem(&devices, &ifindex);
}

#define ARP_ETHERNET 1
#define ARP_REQUEST 1
#define ARP_REPLY 2

// arp_ipv4 is ARP for IPv4 over Ethernet (RFC 826).
struct arp_ipv4 {
	__be16 hardware;
	__be16 network;
	__u8 hardware_length;
	__u8 network_length;
	__be16 operation;
	__u8 sender_mac[ETH_ALEN];
	__u8 sender[4];
	__u8 target_mac[ETH_ALEN];
	__u8 target[4];
} __attribute__((packed));

// arp_way takes any ARP packet; the host sees all that is not answered here.
__noinline int arp_way(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct device *device = device_of(ctx);
	struct arp_ipv4 *arp;
	__be32 sender, target;

	if (!room)
		return XDP_PASS;
	arp = data + (room->flow.l3 & 31);
	if ((void *)(eth + 1) > end || (void *)(arp + 1) > end || !device || arp->hardware != bpf_htons(ARP_ETHERNET) ||
	    arp->network != bpf_htons(ETH_P_IP) || arp->hardware_length != ETH_ALEN || arp->network_length != 4 ||
	    arp->operation != bpf_htons(ARP_REQUEST) || (arp->sender_mac[0] & 1) || room->flow.group & GROUP_FROM)
		goto pass;
	__builtin_memcpy(&sender, arp->sender, 4);
	__builtin_memcpy(&target, arp->target, 4);
	// Who announces our address asks for nothing: the daemon has to hear of it.
	if (sender == target || !(address_flags(FAMILY_IPV4, &target) & ADDRESS_OWN))
		goto pass;
	arp->operation = bpf_htons(ARP_REPLY);
	__builtin_memcpy(arp->target_mac, arp->sender_mac, ETH_ALEN);
	__builtin_memcpy(arp->target, &sender, 4);
	__builtin_memcpy(arp->sender_mac, device->mac, ETH_ALEN);
	__builtin_memcpy(arp->sender, &target, 4);
	__builtin_memcpy(eth->h_dest, arp->target_mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, device->mac, ETH_ALEN);
	count_verdict(ANSWER_ARP);
	return XDP_TX;
pass:
	count_verdict(PASS_NOT_OURS);
	return XDP_PASS;
}

// neighbor_message is a solicitation, and with its option an advertisement (RFC 4861, sections 4.3 and 4.4).
struct neighbor_message {
	struct icmp_header icmp;
	__be32 target[4];
	__u8 option;
	__u8 option_length; // in 8 bytes
	__u8 mac[ETH_ALEN];
};

#define NEIGHBOR_SOLICITED 0x40000000
#define NEIGHBOR_OVERRIDE 0x20000000
#define NEIGHBOR_TARGET_MAC 2
#define NEIGHBOR_HOP_LIMIT 255

#define NEIGHBOR_OPTIONS 8 // looked at, at most
#define NEIGHBOR_SOURCE_MAC 1
#define SOLICITATION_LENGTH 24

// neighbor_valid says whether a solicitation is one that RFC 4861, section 7.1.1, has its receivers take.
__noinline int neighbor_valid(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	__u32 length, at = SOLICITATION_LENGTH;
	const __be32 *source, *target;
	struct neighbor_message *message;
	__u8 hop_limit, option[2];
	struct flow *flow;
	bool probe;
	__u64 sum;

	if (!room)
		return false;
	flow = &room->flow;
	message = (void *)room->quote;
	length = flow->length - sizeof(struct ipv6hdr);
	if (flow->l4 != flow->l3 + sizeof(struct ipv6hdr) ||
	    flow->length < sizeof(struct ipv6hdr) + SOLICITATION_LENGTH || length > sizeof(room->quote) ||
	    bpf_xdp_load_bytes(ctx, flow->l3 + 7, &hop_limit, 1) || hop_limit != NEIGHBOR_HOP_LIMIT)
		return false;
	length--;
	barrier_var(length);
	length = (length & (QUOTE_MAX - 1)) + 1;
	__builtin_memset(room->quote, 0, sizeof(room->quote));
	if (bpf_xdp_load_bytes(ctx, flow->l4, room->quote, length))
		return false;
	if (message->icmp.type != ICMP6_SOLICITATION || message->icmp.code)
		return false;
	sum = (__u32)bpf_csum_diff(NULL, 0, (void *)room->quote, sizeof(room->quote), 0);
	sum += sum_words(0, flow->tuple.v6.saddr, 32) + bpf_htons(length) + bpf_htons(IPPROTO_ICMPV6);
	if (checksum_finish(sum))
		return false;
	source = flow->tuple.v6.saddr;
	target = flow->tuple.v6.daddr;
	probe = !(source[0] | source[1] | source[2] | source[3]);
	if (!probe && !source_possible())
		return false;
	// Who probes asks the solicited-node group.
	if (probe && (target[0] != bpf_htonl(0xff020000) || target[1] || target[2] != bpf_htonl(1) ||
		      *(const __u8 *)&target[3] != 0xff))
		return false;
	for (int i = 0; i < NEIGHBOR_OPTIONS && at < length; i++) {
		if (at + 2 > length || bpf_xdp_load_bytes(ctx, flow->l4 + at, option, sizeof(option)) || !option[1] ||
		    at + option[1] * 8 > length || (probe && option[0] == NEIGHBOR_SOURCE_MAC))
			return false;
		at += option[1] * 8;
	}
	return true;
}

// neighbor_answer answers a solicitation; false: it is not for us.
__noinline int neighbor_answer(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct device *device = device_of(ctx);
	struct neighbor_message *message;
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct address6 target;
	struct ipv6hdr *ip;
	struct ethhdr *eth = data;
	struct flow *flow;
	__u32 l3, length;
	bool probe;
	__u64 sum;

	if (!room || !device)
		return false;
	flow = &room->flow;
	l3 = flow->l3 & 31;
	ip = data + l3;
	message = (void *)(ip + 1);
	if ((void *)(eth + 1) > end || (void *)message->mac - 2 > end || message->icmp.type != ICMP6_SOLICITATION)
		return false;
	__builtin_memcpy(&target, message->target, sizeof(target));
	if (!(address_flags(FAMILY_IPV6, &target) & ADDRESS_OWN) || !neighbor_valid(ctx))
		return false;
	length = l3 + sizeof(*ip) + sizeof(*message);
	if (bpf_xdp_adjust_tail(ctx, (int)length - (int)bpf_xdp_get_buff_len(ctx)))
		return false;

	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	eth = data;
	barrier_var(l3);
	ip = data + (l3 & 31);
	message = (void *)(ip + 1);
	if ((void *)(eth + 1) > end || (void *)(message + 1) > end)
		return false;
	// Who probes has no address yet: all nodes hear the answer (RFC 4861, section 7.2.4).
	probe = !(flow->tuple.v6.saddr[0] | flow->tuple.v6.saddr[1] | flow->tuple.v6.saddr[2] |
		  flow->tuple.v6.saddr[3]);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	if (probe) {
		eth->h_dest[0] = eth->h_dest[1] = 0x33;
		eth->h_dest[2] = eth->h_dest[3] = eth->h_dest[4] = 0;
		eth->h_dest[5] = 1;
	}
	__builtin_memcpy(eth->h_source, device->mac, ETH_ALEN);
	*(__be32 *)ip = bpf_htonl(6U << 28);
	ip->payload_len = bpf_htons(sizeof(*message));
	ip->nexthdr = IPPROTO_ICMPV6;
	ip->hop_limit = NEIGHBOR_HOP_LIMIT;
	__builtin_memcpy(&ip->daddr, flow->tuple.v6.saddr, sizeof(ip->daddr));
	if (probe) {
		ip->daddr.in6_u.u6_addr32[0] = bpf_htonl(0xff020000);
		ip->daddr.in6_u.u6_addr32[3] = bpf_htonl(1);
	}
	__builtin_memcpy(&ip->saddr, &target, sizeof(ip->saddr));
	__builtin_memset(message, 0, sizeof(*message));
	message->icmp.type = ICMP6_ADVERTISEMENT;
	message->icmp.rest = bpf_htonl(NEIGHBOR_OVERRIDE | (probe ? 0 : NEIGHBOR_SOLICITED));
	__builtin_memcpy(message->target, &target, sizeof(message->target));
	message->option = NEIGHBOR_TARGET_MAC;
	message->option_length = 1;
	__builtin_memcpy(message->mac, device->mac, ETH_ALEN);
	sum = sum_words(0, &ip->saddr, 2 * sizeof(ip->saddr)) + bpf_htons(sizeof(*message)) + bpf_htons(IPPROTO_ICMPV6);
	message->icmp.check = checksum_finish(sum_words(sum, message, sizeof(*message)));
	return true;
}

#define ECHO_REACH 511 // of an offset that isn't known, the verifier is shown so many bits

// echo_answer answers a ping to an address of XDP's own; false: it is none.
__noinline int echo_answer(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct icmp_header *icmp;
	struct flow *flow;
	__u8 mac[ETH_ALEN];
	__u16 old;

	if (!room)
		return false;
	flow = &room->flow;
	if (flow->l4 > ECHO_REACH)
		return false;
	icmp = data + (flow->l4 & ECHO_REACH);
	if ((void *)(eth + 1) > end || (void *)(icmp + 1) > end || flow->fragment || icmp->code)
		return false;
	if (!(destination_flags(flow) & ADDRESS_OWN))
		return false;
	old = *(__u16 *)icmp;
	if (flow->family == FAMILY_IPV4) {
		struct iphdr *ip = data + (flow->l3 & 31);
		__u16 *ttl = (__u16 *)&ip->ttl, before;

		if (icmp->type != ICMP_ECHO_REQUEST || (void *)(ip + 1) > end)
			return false;
		icmp->type = ICMP_ECHO_REPLY;
		before = *ttl;
		ip->ttl = ANSWER_TTL;
		ip->check = checksum_finish(checksum_change16(checksum_start(ip->check), before, *ttl));
		ip->saddr = flow->tuple.v4.daddr;
		ip->daddr = flow->tuple.v4.saddr;
	} else {
		struct ipv6hdr *ip = data + (flow->l3 & 31);

		if (icmp->type != ICMP6_ECHO_REQUEST || (void *)(ip + 1) > end)
			return false;
		icmp->type = ICMP6_ECHO_REPLY;
		ip->hop_limit = ANSWER_TTL;
		__builtin_memcpy(&ip->saddr, flow->tuple.v6.daddr, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, flow->tuple.v6.saddr, sizeof(ip->daddr));
	}
	icmp->check = checksum_finish(checksum_change16(checksum_start(icmp->check), old, *(__u16 *)icmp));
	// Of one's complement's two zeros both are right, but for a message of nothing but zeros: that takes this one.
	if (flow->family == FAMILY_IPV4 && !icmp->check)
		icmp->check = 0xffff;
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return true;
}
