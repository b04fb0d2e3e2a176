// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Checksums changed by what changes, not summed anew (RFC 1624). One's complement sums don't ask for the byte order.
#pragma once

#include <linux/types.h>

static __always_inline __u64 checksum_change(__u64 sum, __u32 old, __u32 new)
{
	return sum + (__u32)~old + new;
}

static __always_inline __u64 checksum_change16(__u64 sum, __u16 old, __u16 new)
{
	return sum + (__u16)~old + new;
}

static __always_inline __sum16 checksum_finish(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__sum16)~sum;
}

static __always_inline __u64 checksum_start(__sum16 checksum)
{
	return (__u16)~checksum;
}
