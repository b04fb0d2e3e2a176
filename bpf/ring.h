// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Step 2, the service, and the ring's part of step 3.
#pragma once

#include "hash.h"
#include "maps.h"
#include "packet.h"

static __always_inline struct service *service_find(const struct flow *flow)
{
	struct service *service;

	if (flow->family == FAMILY_IPV4) {
		struct service_key4 key = {
			.address = flow->tuple.v4.daddr,
			.port = flow->tuple.v4.dport,
			.protocol = flow->protocol,
		};

		service = bpf_map_lookup_elem(&services4, &key);
		APART(service, FAMILY_IPV4);
		return service;
	}
	struct service_key6 key = {
		.port = flow->tuple.v6.dport,
		.protocol = flow->protocol,
	};
	__builtin_memcpy(key.address, flow->tuple.v6.daddr, sizeof(key.address));
	service = bpf_map_lookup_elem(&services6, &key);
	APART(service, FAMILY_IPV6);
	return service;
}

// slot_hash is what chooses the slot: in affinity by client, all of a client's connections share one.
static __always_inline __u64 slot_hash(const struct flow *flow, const struct service *service)
{
	if (use_affinity_client && service->flags & SERVICE_AFFINITY_CLIENT)
		return hash_client(flow);
	return flow->hash;
}

static __always_inline __u32 *ring_entry(const struct service *service, __u32 slot)
{
	__u32 id = service->id;
	void *ring = bpf_map_lookup_elem(&rings, &id);

	return ring ? bpf_map_lookup_elem(ring, &slot) : NULL;
}

static __always_inline struct backend *backend_get(__u32 id)
{
	return bpf_map_lookup_elem(&backends, &id);
}
