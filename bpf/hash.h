// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The one hash of Fairlead. Every edge host, the kernel and Go (maps/hash.go) compute the same number for a tuple.
//
// Words are the packet's bytes read little-endian. Each 64-bit word is folded in by a multiplication and a shift, both
// bijections, and the sum is finished by MurmurHash3's 64-bit finalizer (Appleby 2011, fmix64), which has full
// avalanche.
#pragma once

#include "packet.h"

#define HASH_FOLD 0x9e3779b97f4a7c15ULL

static __always_inline __u64 hash_fold(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * HASH_FOLD;
	return hash ^ (hash >> 32);
}

static __always_inline __u64 hash_finish(__u64 hash)
{
	hash ^= hash >> 33;
	hash *= 0xff51afd7ed558ccdULL;
	hash ^= hash >> 33;
	hash *= 0xc4ceb9fe1a85ec53ULL;
	return hash ^ (hash >> 33);
}

static __always_inline __u64 hash_pair(__u32 low, __u32 high)
{
	return (__u64)low | (__u64)high << 32;
}

// hash_of is the hash of a connection, by its client's tuple: addresses, ports and protocol. Its high half chooses the
// slot, its low half the places in the bitmaps.
static __always_inline __u64 hash_of(__u8 family, const union tuple *tuple, __u8 protocol)
{
	__u64 hash;

	if (family == FAMILY_IPV4) {
		hash = hash_fold(0, hash_pair(tuple->v4.saddr, tuple->v4.daddr));
		hash ^= (__u64)tuple->v4.sport | (__u64)tuple->v4.dport << 16;
	} else {
		hash = hash_fold(0, hash_pair(tuple->v6.saddr[0], tuple->v6.saddr[1]));
		hash = hash_fold(hash, hash_pair(tuple->v6.saddr[2], tuple->v6.saddr[3]));
		hash = hash_fold(hash, hash_pair(tuple->v6.daddr[0], tuple->v6.daddr[1]));
		hash = hash_fold(hash, hash_pair(tuple->v6.daddr[2], tuple->v6.daddr[3]));
		hash ^= (__u64)tuple->v6.sport | (__u64)tuple->v6.dport << 16;
	}
	return hash_finish(hash ^ (__u64)protocol << 32);
}

static __always_inline __u64 hash_tuple(const struct flow *flow)
{
	return hash_of(flow->family, &flow->tuple, flow->protocol);
}

// hash_client is the hash of the client's address alone: `affinity: client`. It leaves the service out, so that a
// client finds the same backend on two ports whose services have the same backends.
static __always_inline __u64 hash_client(const struct flow *flow)
{
	__u64 hash;

	if (flow->family == FAMILY_IPV4) {
		hash = hash_fold(0, flow->tuple.v4.saddr);
	} else {
		hash = hash_fold(0, hash_pair(flow->tuple.v6.saddr[0], flow->tuple.v6.saddr[1]));
		hash = hash_fold(hash, hash_pair(flow->tuple.v6.saddr[2], flow->tuple.v6.saddr[3]));
	}
	return hash_finish(hash);
}

// slot_of maps the high half of a hash to a slot without a division (Lemire 2019, "Fast random integer generation in an
// interval").
static __always_inline __u32 slot_of(__u64 hash, __u32 ring_size)
{
	return (hash >> 32) * ring_size >> 32;
}
