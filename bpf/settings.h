// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Load-time constants. The loader writes them before the program is verified, and the verifier cuts out what they make
// unreachable: a configuration pays only for what it uses.
#pragma once

#include "types.h"

volatile const __u8 use_ipv4 = 1;
volatile const __u8 use_ipv6 = 1;
volatile const __u8 use_fullnat = 1;
volatile const __u8 use_nat = 1;
volatile const __u8 use_dsr = 1;
volatile const __u8 use_tunnel = 1; // ipip or gue
volatile const __u8 use_tcp = 1;
volatile const __u8 use_udp = 1;
volatile const __u8 use_affinity_client = 1;
volatile const __u8 use_checks = 1;  // some go through their method
volatile const __u8 use_journal = 0; // the daemon reads what is told of connections

// Capacity of the connection table, in connections.
volatile const __u32 connection_capacity = 1048576;
// How many of them may be young.
volatile const __u32 young_budget = 131072;
// Adoptions of unknown connections, a tick and CPU.
volatile const __u32 adoptions_a_tick = 256;
// ICMP answers, a tick and CPU: 3,800 a second (RFC 4443, section 2.4 (f), and RFC 1812, section 4.3.2.8, ask for a
// limit).
volatile const __u32 answers_a_tick = 64;
// How long a path MTU holds that a router told us, in ticks: 10 minutes (RFC 1191, section 6.3).
volatile const __u32 path_mtu_life = 35763;
// How long later fragments follow their first, in ticks: 30 s, Linux' own (RFC 8200, section 4.5, has 60).
volatile const __u32 fragment_life = 1788;
// Life of a half-open connection from its first SYN, in ticks: 75 s, past Linux' own five retries of a SYN-ACK (63 s).
volatile const __u32 half_open_life = 4471;

struct shared_types *volatile const shared_types;
