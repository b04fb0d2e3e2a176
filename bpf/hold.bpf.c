//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The program of `fairlead hold`, for the time in which no data plane is attached: it drops what the host's own stack
// would answer with RST (or ICMP port unreachable), and so end connections that are to be kept. Whoever sent it sends
// again. Nothing else is touched.
#include "hold_maps.h"
#include "hold_parse.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define BITS(TYPE) (8 * (sizeof(TYPE) - sizeof(__u32)))

// host_has_socket says whether the stack has a socket that the packet is for, and so a better answer than RST. A
// listener is one for the first packet of a connection alone: to all others it answers RST.
static __always_inline bool host_has_socket(const struct packet *pkt, struct bpf_sock_tuple *tuple, __u32 size)
{
	struct bpf_sock *found;
	bool has;

	if (pkt->protocol == IPPROTO_UDP) {
		found = bpf_sk_lookup_udp(pkt->ctx, tuple, size, BPF_F_CURRENT_NETNS, 0);
		if (!found)
			return false;
		bpf_sk_release(found);
		return true;
	}
	found = bpf_skc_lookup_tcp(pkt->ctx, tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!found)
		return false;
	has = found->state != BPF_TCP_LISTEN || pkt->syn;
	bpf_sk_release(found);
	return has;
}

static __always_inline enum verdict hold_ipv4(struct packet *pkt)
{
	enum verdict verdict = parse_ipv4(pkt);
	struct iphdr *ip = packet_at(pkt, pkt->l3);
	struct from4 from = {.length = BITS(from), .protocol = pkt->protocol, .port = pkt->sport, .to = pkt->dport};
	struct to4 to = {.length = BITS(to), .protocol = pkt->protocol, .port = pkt->dport};
	struct bpf_sock_tuple tuple = {};
	__u32 *held;

	if (verdict != GO_ON)
		return verdict;
	if ((void *)(ip + 1) > packet_end(pkt))
		return PASS_OTHER;
	__builtin_memcpy(from.address, &ip->saddr, sizeof(from.address));
	__builtin_memcpy(to.address, &ip->daddr, sizeof(to.address));
	held = bpf_map_lookup_elem(&held_from4, &from);
	if (held)
		return *held;
	held = bpf_map_lookup_elem(&held_to4, &to);
	if (!held)
		return PASS_OTHER;
	if (*held != DROP_SOURCE)
		return *held;
	tuple.ipv4.saddr = ip->saddr;
	tuple.ipv4.daddr = ip->daddr;
	tuple.ipv4.sport = pkt->sport;
	tuple.ipv4.dport = pkt->dport;
	return host_has_socket(pkt, &tuple, sizeof(tuple.ipv4)) ? PASS_SOCKET : DROP_SOURCE;
}

static __always_inline enum verdict hold_ipv6(struct packet *pkt)
{
	enum verdict verdict = parse_ipv6(pkt);
	struct ipv6hdr *ip = packet_at(pkt, pkt->l3);
	struct from6 from = {.length = BITS(from), .protocol = pkt->protocol, .port = pkt->sport, .to = pkt->dport};
	struct to6 to = {.length = BITS(to), .protocol = pkt->protocol, .port = pkt->dport};
	struct bpf_sock_tuple tuple = {};
	__u32 *held;

	if (verdict != GO_ON)
		return verdict;
	if ((void *)(ip + 1) > packet_end(pkt))
		return PASS_OTHER;
	__builtin_memcpy(from.address, &ip->saddr, sizeof(from.address));
	__builtin_memcpy(to.address, &ip->daddr, sizeof(to.address));
	held = bpf_map_lookup_elem(&held_from6, &from);
	if (held)
		return *held;
	held = bpf_map_lookup_elem(&held_to6, &to);
	if (!held)
		return PASS_OTHER;
	if (*held != DROP_SOURCE)
		return *held;
	__builtin_memcpy(tuple.ipv6.saddr, &ip->saddr, sizeof(tuple.ipv6.saddr));
	__builtin_memcpy(tuple.ipv6.daddr, &ip->daddr, sizeof(tuple.ipv6.daddr));
	tuple.ipv6.sport = pkt->sport;
	tuple.ipv6.dport = pkt->dport;
	return host_has_socket(pkt, &tuple, sizeof(tuple.ipv6)) ? PASS_SOCKET : DROP_SOURCE;
}

SEC("xdp.frags")
int fairlead_hold(struct xdp_md *ctx)
{
	struct packet pkt = {.ctx = ctx};
	__be16 type = parse_ethernet(&pkt);
	enum verdict verdict = PASS_OTHER;

	if (type == bpf_htons(ETH_P_IP))
		verdict = hold_ipv4(&pkt);
	else if (type == bpf_htons(ETH_P_IPV6))
		verdict = hold_ipv6(&pkt);
	count_verdict(verdict);
	return verdict >= DROP_SERVICE ? XDP_DROP : XDP_PASS;
}
