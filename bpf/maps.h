// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Every map, what it holds and who writes it. Names are at most 15 characters, the kernel's limit. The loader sets the
// sizes of the tables from the configuration.
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "types.h"

// APART keeps a family's look-up apart from the other family's. Of two that differ in the map alone the compiler makes
// one, of a map chosen before; then the kernel can't call that map's code by name, and goes by a pointer, which costs
// 20 ns.
#define APART(result, family) asm volatile("" : "+r"(result) : "i"(family))

#define MAP(TYPE, NAME, KEY, VALUE, ENTRIES, FLAGS)                                                                    \
	struct {                                                                                                       \
		__uint(type, TYPE);                                                                                    \
		__type(key, KEY);                                                                                      \
		__type(value, VALUE);                                                                                  \
		__uint(max_entries, ENTRIES);                                                                          \
		__uint(map_flags, FLAGS);                                                                              \
		__uint(pinning, LIBBPF_PIN_BY_NAME);                                                                   \
	} NAME SEC(".maps")

// The switches of the data plane and the counts of the connection table. Daemon: epoch and exception bitmap; programs:
// counts.
MAP(BPF_MAP_TYPE_ARRAY, control, __u32, struct control_block, 1, BPF_F_MMAPABLE);
// Exception and fresh bitmaps. Set by programs and daemon, cleared by the daemon alone (a SYN's fresh bit excepted).
MAP(BPF_MAP_TYPE_ARRAY, bitmaps, __u32, struct bitmap_set, 1, BPF_F_MMAPABLE);

// Services by address, port and protocol. Daemon.
MAP(BPF_MAP_TYPE_HASH, services4, struct service_key4, struct service, MAX_SERVICE_KEYS, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, services6, struct service_key6, struct service, MAX_SERVICE_KEYS, BPF_F_NO_PREALLOC);
// Backends by number. Daemon.
MAP(BPF_MAP_TYPE_ARRAY, backends, __u32, struct backend, MAX_BACKENDS, 0);
// Source addresses of fullnat by number, and their numbers by address. Daemon.
MAP(BPF_MAP_TYPE_ARRAY, sources, __u32, struct source, MAX_SOURCES, 0);
MAP(BPF_MAP_TYPE_HASH, sources4, __be32, __u32, MAX_SOURCES, 0);
MAP(BPF_MAP_TYPE_HASH, sources6, struct address6, __u32, MAX_SOURCES, 0);
// Port pools by number. Daemon.
MAP(BPF_MAP_TYPE_ARRAY, pools, __u32, struct pool, MAX_POOLS, 0);
// What our addresses are to us. Daemon.
MAP(BPF_MAP_TYPE_HASH, addresses4, __be32, __u32, MAX_ADDRESSES, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, addresses6, struct address6, __u32, MAX_ADDRESSES, BPF_F_NO_PREALLOC);
// Backends by nat, by address, port and protocol: how many have this one. Daemon.
MAP(BPF_MAP_TYPE_HASH, nat_backends4, struct service_key4, __u32, MAX_BACKENDS, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, nat_backends6, struct service_key6, __u32, MAX_BACKENDS, BPF_F_NO_PREALLOC);
// What port numbers may be to us. Daemon.
MAP(BPF_MAP_TYPE_ARRAY, port_flags, __u32, struct port_set, 1, BPF_F_MMAPABLE);
// Devices by number. Daemon.
MAP(BPF_MAP_TYPE_HASH, devices, __u32, struct device, MAX_DEVICES, BPF_F_NO_PREALLOC);
// The ways to the ends of tunnels. Daemon makes the entries, programs note what they learn.
MAP(BPF_MAP_TYPE_HASH, paths, struct path_key, struct path, MAX_BACKENDS, BPF_F_NO_PREALLOC);
// Names. Daemon; read by the command line alone.
MAP(BPF_MAP_TYPE_ARRAY, service_info, __u32, struct service_label, MAX_SERVICES, 0);
MAP(BPF_MAP_TYPE_ARRAY, backend_info, __u32, struct backend_label, MAX_BACKENDS, 0);

// A ring: slot to backend. The daemon builds it aside and swaps it whole.
struct ring_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 65537);
	__uint(map_flags, BPF_F_INNER_MAP);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_SERVICES);
	__type(key, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct ring_map);
} rings SEC(".maps");

// A pool's two queues of port numbers, at twice its number: unused, and handed out. See ports.h. Filled by the program
// `fill`, then moved by the programs.
struct port_queue {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, 65536);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_POOLS * 2);
	__type(key, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__array(values, struct port_queue);
} ports SEC(".maps");

// Connection table: established connections by the tuple of the client's packets. Programs alone.
MAP(BPF_MAP_TYPE_HASH, connections4, struct tuple4, struct connection, 1048576, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, connections6, struct tuple6, struct connection, 1048576, BPF_F_NO_PREALLOC);
// Their ways back by the tuple of the backend's packets. Programs alone.
MAP(BPF_MAP_TYPE_HASH, replies4, struct tuple4, struct reply4, 1048576, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, replies6, struct tuple6, struct reply6, 1048576, BPF_F_NO_PREALLOC);
// Half-open table and its ways back. Programs alone.
MAP(BPF_MAP_TYPE_LRU_HASH, half_open4, struct tuple4, struct half_open, 131072, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, half_open6, struct tuple6, struct half_open, 131072, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, half_replies4, struct tuple4, struct reply4, 131072, 0);
MAP(BPF_MAP_TYPE_LRU_HASH, half_replies6, struct tuple6, struct reply6, 131072, 0);

// Room for values on their way into the tables. Programs alone.
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, scratch, __u32, struct scratch, ROOM_COUNT, 0);
// Packets of which a first fragment was seen. Programs alone.
MAP(BPF_MAP_TYPE_LRU_HASH, fragments, struct fragment_key, struct fragment, MAX_FRAGMENTS, 0);
// What is left of this tick's budgets. Programs alone.
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, budgets, __u32, struct budget, BUDGET_COUNT, 0);
// The clock as each CPU last saw it. Programs alone.
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, clocks, __u32, struct clock, 1, 0);
// Backends' answers to checks through their methods. Programs write, the daemon reads.
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, CHECK_RING_BYTES);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} check_frames SEC(".maps");
// What becomes of connections. Programs write, the daemon reads, and keeps it on disk.
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, JOURNAL_RING_BYTES);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} journal SEC(".maps");
// Numbers for the generations of connections. Programs alone.
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, generations, __u32, __u32, 1, 0);

// Counters: verdicts and events, traffic by service and by backend. Programs alone.
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, counters, __u32, struct counter_set, 1, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, service_traffic, __u32, struct traffic, MAX_SERVICES, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, backend_traffic, __u32, struct traffic, MAX_BACKENDS, 0);

static __always_inline struct scratch *scratch_of(__u32 room)
{
	return bpf_map_lookup_elem(&scratch, &room);
}

static __always_inline struct scratch *scratch_get(void)
{
	return scratch_of(ROOM_PACKETS);
}
