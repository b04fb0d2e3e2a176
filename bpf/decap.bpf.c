//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The program of `fairlead decap`, for backends of the methods ipip and gue that have no such device. It opens what
// comes in a tunnel to an address of the host's and hands the inner packet to the host's stack. Nothing else is
// touched.
#include "decap_inner.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline enum verdict open(struct packet *pkt)
{
	__be16 type = outer_ethernet(pkt);
	enum verdict verdict;

	if (type == bpf_htons(ETH_P_IP))
		verdict = outer_ipv4(pkt);
	else if (type == bpf_htons(ETH_P_IPV6))
		verdict = outer_ipv6(pkt);
	else
		return PASS_NOT_TUNNEL;
	if (verdict != GO_ON)
		return verdict;
	verdict = inner_find(pkt);
	if (verdict != GO_ON)
		return verdict;
	verdict = inner_congestion(pkt);
	if (verdict != GO_ON)
		return verdict;
	return inner_strip(pkt);
}

SEC("xdp.frags")
int fairlead_decap(struct xdp_md *ctx)
{
	struct packet pkt = {.ctx = ctx};
	enum verdict verdict = open(&pkt);

	count_verdict(verdict);
	return verdict >= DROP_TRUNCATED ? XDP_DROP : XDP_PASS;
}
