// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Method nat: the service's address and port become the backend's. The backend sees the client's own address, and its
// way to clients leads by us.
#pragma once

#include "rewrite.h"

static __always_inline int nat_forward(struct packet *pkt, struct backend *backend)
{
	const union tuple *from = &pkt->flow->tuple;
	bool done;

	if (pkt->family == FAMILY_IPV4)
		done = rewrite4(pkt, from->v4.saddr, backend->address[0], from->v4.sport, backend->port);
	else
		done = rewrite6(pkt, from->v6.saddr, backend->address, from->v6.sport, backend->port);
	return done ? send_to(pkt, backend_hop(backend)) : -DROP_TRUNCATED;
}
