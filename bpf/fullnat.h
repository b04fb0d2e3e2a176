// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Method fullnat: both addresses and both ports are replaced, there and back. The backend sees one of our source
// addresses and needs no setting up.
#pragma once

#include "rewrite.h"

static __always_inline int fullnat_forward(struct packet *pkt, struct backend *backend, __u32 source_id, __be16 port)
{
	struct source *source = bpf_map_lookup_elem(&sources, &source_id);
	bool done;

	if (!source || !port)
		return -DROP_NO_RING;
	if (pkt->family == FAMILY_IPV4)
		done = rewrite4(pkt, source->address[0], backend->address[0], port, backend->port);
	else
		done = rewrite6(pkt, source->address, backend->address, port, backend->port);
	return done ? send_to(pkt, backend_hop(backend)) : -DROP_TRUNCATED;
}
