// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The maps of `fairlead hold`, and counting. The loader writes all maps but the counters.
#pragma once

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#include "hold_types.h"

struct shared_types *volatile const shared_types;

#define TRIE(NAME, KEY)                                                                                                \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_LPM_TRIE);                                                                   \
		__type(key, KEY);                                                                                      \
		__type(value, __u32);                                                                                  \
		__uint(max_entries, MAX_PREFIXES);                                                                     \
		__uint(map_flags, BPF_F_NO_PREALLOC);                                                                  \
	} NAME SEC(".maps")

// Where packets go that are held: services, and source addresses of fullnat. The value is the verdict.
TRIE(held_to4, struct to4);
TRIE(held_to6, struct to6);
// Whose packets are held: backends whose replies come by here. The value is the verdict.
TRIE(held_from4, struct from4);
TRIE(held_from6, struct from6);

// Verdicts by CPU. The program alone.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct counter_set);
	__uint(max_entries, 1);
} hold_counters SEC(".maps");

static __always_inline void count_verdict(__u32 verdict)
{
	__u32 zero = 0;
	struct counter_set *all = bpf_map_lookup_elem(&hold_counters, &zero);

	// The compiler knows the verdict to be in bounds and would leave out the check that the verifier needs.
	barrier_var(verdict);
	if (all && verdict < VERDICT_COUNT)
		all->verdicts[verdict]++;
}
