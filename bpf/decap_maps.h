// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The maps and load-time constants of `fairlead decap`, and counting. The command writes all maps but the counters.
#pragma once

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#include "decap_types.h"

// The UDP port that GUE comes to.
volatile const __u16 gue_port = GUE_PORT;
// Whether only what comes from the named sources is opened.
volatile const __u8 use_sources = 1;

struct shared_types *volatile const shared_types;

#define MAP(TYPE, NAME, KEY, VALUE, ENTRIES, FLAGS)                                                                    \
	struct {                                                                                                       \
		__uint(type, TYPE);                                                                                    \
		__type(key, KEY);                                                                                      \
		__type(value, VALUE);                                                                                  \
		__uint(max_entries, ENTRIES);                                                                          \
		__uint(map_flags, FLAGS);                                                                              \
	} NAME SEC(".maps")

// The addresses that tunnels end at. The values say nothing.
MAP(BPF_MAP_TYPE_HASH, addresses4, __be32, __u32, MAX_ADDRESSES, 0);
MAP(BPF_MAP_TYPE_HASH, addresses6, struct address6, __u32, MAX_ADDRESSES, 0);
// The prefixes that tunnels may come from, if not from anywhere. The values say nothing.
MAP(BPF_MAP_TYPE_LPM_TRIE, sources4, struct prefix4, __u32, MAX_PREFIXES, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_LPM_TRIE, sources6, struct prefix6, __u32, MAX_PREFIXES, BPF_F_NO_PREALLOC);
// Verdicts and events by CPU. The program alone.
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, counters, __u32, struct counter_set, 1, 0);

static __always_inline void count_verdict(__u32 verdict)
{
	__u32 zero = 0;
	struct counter_set *all = bpf_map_lookup_elem(&counters, &zero);

	// The compiler knows the verdict to be in bounds and would leave out the check that the verifier needs.
	barrier_var(verdict);
	if (all && verdict < VERDICT_COUNT)
		all->verdicts[verdict]++;
}

static __always_inline void count_event(enum event event)
{
	__u32 zero = 0;
	struct counter_set *all = bpf_map_lookup_elem(&counters, &zero);

	if (all)
		all->events[event]++;
}
