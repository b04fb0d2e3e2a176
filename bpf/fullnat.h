// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Method fullnat: both addresses and both ports are replaced, there and back. The backend sees one of our source
// addresses and needs no setting up.
#pragma once

#include "forward.h"

// rewrite replaces addresses and ports and mends the checksums of IP and TCP.
static __always_inline void rewrite4(struct packet *pkt, const struct tuple4 *to)
{
	const struct tuple4 *from = &pkt->flow->tuple.v4;
	struct iphdr *ip = pkt->ip.v4;
	struct tcphdr *tcp = pkt->tcp;
	__u64 addresses, sum;

	addresses = checksum_change(0, from->saddr, to->saddr);
	addresses = checksum_change(addresses, from->daddr, to->daddr);
	ip->check = checksum_finish(checksum_start(ip->check) + addresses);
	sum = checksum_start(tcp->check) + addresses;
	sum = checksum_change16(sum, from->sport, to->sport);
	sum = checksum_change16(sum, from->dport, to->dport);
	tcp->check = checksum_finish(sum);
	ip->saddr = to->saddr;
	ip->daddr = to->daddr;
	tcp->source = to->sport;
	tcp->dest = to->dport;
}

static __always_inline void rewrite6(struct packet *pkt, const struct tuple6 *to)
{
	const struct tuple6 *from = &pkt->flow->tuple.v6;
	struct ipv6hdr *ip = pkt->ip.v6;
	struct tcphdr *tcp = pkt->tcp;
	__u64 sum = checksum_start(tcp->check);

	for (int i = 0; i < 4; i++) {
		sum = checksum_change(sum, from->saddr[i], to->saddr[i]);
		sum = checksum_change(sum, from->daddr[i], to->daddr[i]);
	}
	sum = checksum_change16(sum, from->sport, to->sport);
	sum = checksum_change16(sum, from->dport, to->dport);
	tcp->check = checksum_finish(sum);
	__builtin_memcpy(&ip->saddr, to->saddr, sizeof(to->saddr));
	__builtin_memcpy(&ip->daddr, to->daddr, sizeof(to->daddr));
	tcp->source = to->sport;
	tcp->dest = to->dport;
}

static __always_inline int fullnat_forward(struct packet *pkt, struct backend *backend, const struct source *source,
					   __be16 port)
{
	if (pkt->family == FAMILY_IPV4) {
		struct tuple4 to = {
			.saddr = source->address[0],
			.daddr = backend->address[0],
			.sport = port,
			.dport = backend->port,
		};
		rewrite4(pkt, &to);
	} else {
		struct tuple6 to = {.sport = port, .dport = backend->port};
		__builtin_memcpy(to.saddr, source->address, sizeof(to.saddr));
		__builtin_memcpy(to.daddr, backend->address, sizeof(to.daddr));
		rewrite6(pkt, &to);
	}
	return send_to(pkt, &backend->hop[backend->hop_index & 1]);
}

// fullnat_reply sends a backend's packet to the client, from the service's address and port.
static __always_inline int fullnat_reply(struct packet *pkt, const union tuple *client, const struct hop *hop)
{
	if (pkt->family == FAMILY_IPV4) {
		struct tuple4 to = {
			.saddr = client->v4.daddr,
			.daddr = client->v4.saddr,
			.sport = client->v4.dport,
			.dport = client->v4.sport,
		};
		rewrite4(pkt, &to);
	} else {
		struct tuple6 to = {.sport = client->v6.dport, .dport = client->v6.sport};
		__builtin_memcpy(to.saddr, client->v6.daddr, sizeof(to.saddr));
		__builtin_memcpy(to.daddr, client->v6.saddr, sizeof(to.daddr));
		rewrite6(pkt, &to);
	}
	return send_to(pkt, hop);
}
