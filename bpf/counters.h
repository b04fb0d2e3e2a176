// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Step 6: count. Everything that a packet can meet has a name and is counted per CPU.
#pragma once

#include "maps.h"

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

static __always_inline struct traffic *traffic_of_service(__u32 id)
{
	return bpf_map_lookup_elem(&service_traffic, &id);
}

static __always_inline struct traffic *traffic_of_backend(__u32 id)
{
	return bpf_map_lookup_elem(&backend_traffic, &id);
}

// count_in counts a client's packet that goes to a backend.
static __always_inline void count_in(struct traffic *traffic, __u32 bytes, bool new)
{
	if (!traffic)
		return;
	traffic->packets++;
	traffic->bytes += bytes;
	traffic->connections += new;
}

static __always_inline void count_reply(struct traffic *traffic, __u32 bytes)
{
	if (!traffic)
		return;
	traffic->reply_packets++;
	traffic->reply_bytes += bytes;
}

// count_answer counts a backend's first answer to a SYN.
static __always_inline void count_answer(struct traffic *traffic, bool accepted)
{
	if (!traffic)
		return;
	if (accepted)
		traffic->answered++;
	else
		traffic->rejected++;
}

static __always_inline void count_refused(struct traffic *traffic)
{
	if (traffic)
		traffic->refused++;
}

// budget_spend spends one of what a CPU may do so many times in a tick.
static __always_inline bool budget_spend(__u32 kind, __u32 a_tick, __u32 now)
{
	struct budget *budget = bpf_map_lookup_elem(&budgets, &kind);

	if (!budget)
		return false;
	if (budget->tick != now) {
		budget->tick = now;
		budget->left = a_tick;
	}
	if (!budget->left)
		return false;
	budget->left--;
	return true;
}
