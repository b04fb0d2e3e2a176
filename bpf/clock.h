// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The coarse clock: ticks of 2^24 ns since the host's start. Only the tables need it; the fast path asks no clock.
#pragma once

#include <bpf/bpf_helpers.h>

#include "maps.h"

// clock_now asks the kernel's clock once a jiffy, of which a tick has several: the count of jiffies is a word in
// memory, the clock a call.
static __always_inline __u32 clock_now(void)
{
	__u32 zero = 0;
	struct clock *clock = bpf_map_lookup_elem(&clocks, &zero);
	__u64 jiffies = bpf_jiffies64();

	if (!clock)
		return 0;
	if (clock->jiffies != jiffies) {
		clock->tick = bpf_ktime_get_coarse_ns() >> TICK_SHIFT;
		clock->jiffies = jiffies;
	}
	return clock->tick;
}

// since is the age of a tick. One just ahead, of a CPU whose clock turned first, has age 0.
static __always_inline __u32 since(__u32 now, __u32 then)
{
	__s32 age = now - then;

	return age > 0 ? age : 0;
}
