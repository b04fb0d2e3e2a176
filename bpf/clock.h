// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The coarse clock: ticks of 2^24 ns since the host's start. Only the tables need it; the fast path asks no clock.
#pragma once

#include <bpf/bpf_helpers.h>

#include "types.h"

static __always_inline __u32 clock_now(void)
{
	return bpf_ktime_get_coarse_ns() >> TICK_SHIFT;
}
