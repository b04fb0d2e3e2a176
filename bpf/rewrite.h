// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Rewriting of addresses and ports, with the checksums of IP, TCP and UDP mended: what fullnat and nat share.
#pragma once

#include "forward.h"

// checksum_place is where TCP or UDP keeps its checksum. NULL: not in the frame.
static __always_inline __sum16 *checksum_place(struct packet *pkt)
{
	if (use_udp && pkt->flow->protocol == IPPROTO_UDP)
		return (void *)(pkt->udp + 1) <= packet_end(pkt) ? &pkt->udp->check : NULL;
	return (void *)(pkt->tcp + 1) <= packet_end(pkt) ? &pkt->tcp->check : NULL;
}

// checksum_mend writes a changed sum. UDP's zero means that there is none, and stays; a computed zero is written as all
// ones (RFC 768).
static __always_inline void checksum_mend(struct packet *pkt, __sum16 *check, __u64 change)
{
	bool udp = use_udp && pkt->flow->protocol == IPPROTO_UDP;
	__sum16 sum;

	if (udp && !*check)
		return;
	sum = checksum_finish(checksum_start(*check) + change);
	*check = udp && !sum ? 0xffff : sum;
}

// ports_rewrite is what both families have in common. `addresses` is by how much the addresses have changed.
static __always_inline void ports_rewrite(struct packet *pkt, __sum16 *check, __u64 addresses, __be16 sport,
					  __be16 dport)
{
	__be16 *ports = pkt->l4;
	__u64 change = checksum_change16(addresses, ports[0], sport);

	checksum_mend(pkt, check, checksum_change16(change, ports[1], dport));
	ports[0] = sport;
	ports[1] = dport;
}

static __always_inline bool rewrite4(struct packet *pkt, __be32 saddr, __be32 daddr, __be16 sport, __be16 dport)
{
	struct iphdr *ip = pkt->ip.v4;
	__sum16 *check = checksum_place(pkt);
	__u64 addresses;

	if (!check)
		return false;
	addresses = checksum_change(0, ip->saddr, saddr);
	addresses = checksum_change(addresses, ip->daddr, daddr);
	ip->check = checksum_finish(checksum_start(ip->check) + addresses);
	ip->saddr = saddr;
	ip->daddr = daddr;
	ports_rewrite(pkt, check, addresses, sport, dport);
	return true;
}

static __always_inline bool rewrite6(struct packet *pkt, const __be32 *saddr, const __be32 *daddr, __be16 sport,
				     __be16 dport)
{
	struct ipv6hdr *ip = pkt->ip.v6;
	__be32 *source = ip->saddr.in6_u.u6_addr32, *destination = ip->daddr.in6_u.u6_addr32;
	__sum16 *check = checksum_place(pkt);
	__u64 addresses = 0;

	if (!check)
		return false;
	for (int i = 0; i < 4; i++) {
		addresses = checksum_change(addresses, source[i], saddr[i]);
		addresses = checksum_change(addresses, destination[i], daddr[i]);
		source[i] = saddr[i];
		destination[i] = daddr[i];
		barrier_var(addresses); // one word after the other: the stack has no room for all
	}
	ports_rewrite(pkt, check, addresses, sport, dport);
	return true;
}

// rewrite_reply makes a backend's packet one from the service's address and port to the client.
static __always_inline int rewrite_reply(struct packet *pkt, const union tuple *client, struct hop *hop)
{
	bool done;

	if (pkt->family == FAMILY_IPV4)
		done = rewrite4(pkt, client->v4.daddr, client->v4.saddr, client->v4.dport, client->v4.sport);
	else
		done = rewrite6(pkt, client->v6.daddr, client->v6.saddr, client->v6.dport, client->v6.sport);
	return done ? send_to(pkt, hop) : -DROP_TRUNCATED;
}
