// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Step 5: forward. What every method shares: time to live, Ethernet addresses and the device.
#pragma once

#include "checksum.h"
#include "maps.h"
#include "packet.h"

// ttl_decrement is for whoever routes. False: it is used up.
static __always_inline bool ttl_decrement(struct packet *pkt)
{
	if (pkt->family == FAMILY_IPV6) {
		if (pkt->ip.v6->hop_limit <= 1)
			return false;
		pkt->ip.v6->hop_limit--;
		return true;
	}
	struct iphdr *ip = pkt->ip.v4;
	if (ip->ttl <= 1)
		return false;
	__u16 *word = (__u16 *)&ip->ttl, old = *word;
	ip->ttl--;
	ip->check = checksum_finish(checksum_change16(checksum_start(ip->check), old, *word));
	return true;
}

static __always_inline int send_to(struct packet *pkt, const struct hop *hop)
{
	__builtin_memcpy(pkt->eth->h_dest, hop->mac, ETH_ALEN);
	__builtin_memcpy(pkt->eth->h_source, hop->source_mac, ETH_ALEN);
	if (hop->ifindex == pkt->ctx->ingress_ifindex)
		return XDP_TX;
	return bpf_redirect(hop->ifindex, 0);
}
