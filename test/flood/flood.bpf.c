//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The driver: `flood` makes the next packet of a flood and hands it to the program that is flooded. A run of many
// repeats (BPF_PROG_TEST_RUN) is that many packets.
//
// `table_first` is what the data plane is compared with: a balancer whose connections stand in an LRU table alone.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum sizes {
	HEADER_WORDS = 10, // Ethernet, IPv6 and TCP headers, in words of 8 bytes, rounded up
	FRAME = HEADER_WORDS * 8,
	TARGETS = 16,
};

// What a connection of a flood sends, one after the other.
enum step {
	STEP_SYN,
	STEP_ACK,  // as if the SYN had been answered
	STEP_MORE, // an ACK whose numbers have both moved on
};

// A service that is flooded.
struct target {
	__u64 template[HEADER_WORDS]; // headers of a packet to it; what differs from packet to packet is 0
	__u32 ipv6;
	__u32 pad;
};

struct attack {
	struct target targets[TARGETS]; // whose turn it is in a circle
	__u32 target_count;
	enum step first; // step that a connection begins with,
	__u32 steps;	 // and how many packets it has
	__u32 pad;
	__u64 seed; // all of a connection follows from this and its number
};

struct attack plan = {};

struct advance {
	__u64 made; // packets
	__u64 lost; // that did not come to whom they were for
	__s64 head; // where the frame began in the first repeat of this run
};

struct advance progress = {};

volatile __s64 position = 0; // where the frame begins now

// The program that is flooded.
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} flooded SEC(".maps");

// mix is splitmix64's: numbers in a row become random ones (Steele, Lea, Flood 2014).
static __always_inline __u64 mix(__u64 word)
{
	word *= 0x9e3779b97f4a7c15ULL;
	word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ULL;
	word = (word ^ (word >> 27)) * 0x94d049bb133111ebULL;
	return word ^ (word >> 31);
}

// unmove undoes what the last repeat did to the frame's ends.
static __always_inline bool unmove(struct xdp_md *ctx)
{
	__u32 size;

	// A pointer becomes a number by way of memory.
	position = ctx->data;
	if (!progress.head)
		progress.head = position;
	if (progress.head != position && bpf_xdp_adjust_head(ctx, progress.head - position))
		return false;
	size = ctx->data_end - ctx->data;
	return size == FRAME || !bpf_xdp_adjust_tail(ctx, FRAME - (int)size);
}

// packet_make makes packet `number` of the flood.
static __always_inline bool packet_make(struct xdp_md *ctx, __u64 number)
{
	__u64 connection = number / plan.steps, who = mix(plan.seed + 2 * connection),
	      says = mix(plan.seed + 2 * connection + 1);
	__u32 step = plan.first + number % plan.steps, sequence = says, acknowledgement = says >> 32;
	struct target *target = &plan.targets[connection % plan.target_count & (TARGETS - 1)];
	struct tcphdr *tcp;
	struct ethhdr *eth;
	void *end;

	if (!unmove(ctx))
		return false;
	barrier(); // the pointers are read anew, as pointers
	eth = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if ((void *)eth + FRAME > end)
		return false;
	for (int i = 0; i < HEADER_WORDS; i++)
		((__u64 *)eth)[i] = target->template[i];
	if (target->ipv6) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		ip->saddr.s6_addr32[1] = says >> 16;
		ip->saddr.s6_addr32[2] = who;
		ip->saddr.s6_addr32[3] = who >> 24;
		tcp = (void *)(ip + 1);
	} else {
		struct iphdr *ip = (void *)(eth + 1);

		// 11.0.0.0 to 120.255.255.255: where no connection of the tests comes from.
		ip->saddr = bpf_htonl((11 + (who >> 24 & 0xff) % 110) << 24 | (who & 0xffffff));
		tcp = (void *)(ip + 1);
	}
	tcp->source = who >> 40 | bpf_htons(1024);
	tcp->seq = bpf_htonl(sequence);
	switch (step) {
	case STEP_SYN:
		tcp->syn = 1;
		break;
	case STEP_ACK:
		tcp->ack = 1;
		tcp->seq = bpf_htonl(sequence + 1);
		tcp->ack_seq = bpf_htonl(acknowledgement);
		break;
	default:
		tcp->ack = 1;
		tcp->seq = bpf_htonl(sequence + 101);
		tcp->ack_seq = bpf_htonl(acknowledgement + 100);
	}
	return true;
}

SEC("xdp.frags")
int flood(struct xdp_md *ctx)
{
	if (packet_make(ctx, progress.made++))
		bpf_tail_call_static(ctx, &flooded, 0);
	progress.lost++;
	return XDP_ABORTED;
}

// nothing shows what the driver itself takes.
SEC("xdp.frags")
int nothing(struct xdp_md *ctx)
{
	return XDP_PASS;
}

struct ends {
	__be32 saddr[4]; // IPv4 in the first
	__be32 daddr[4];
	__be16 sport;
	__be16 dport;
};

// Connections of the balancer that goes by its table alone.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct ends);
	__type(value, __u32);
} table SEC(".maps");

// table_first looks every packet up once, and notes who is not there.
SEC("xdp.frags")
int table_first(struct xdp_md *ctx)
{
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct ends ends = {};
	struct tcphdr *tcp;
	__u32 backend = 1;

	if ((void *)(eth + 1) > end)
		return XDP_PASS;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = (void *)(eth + 1);

		tcp = (void *)(ip + 1);
		if ((void *)(tcp + 1) > end || ip->protocol != IPPROTO_TCP || ip->ihl * 4 != sizeof(*ip))
			return XDP_PASS;
		ends.saddr[0] = ip->saddr;
		ends.daddr[0] = ip->daddr;
	} else {
		struct ipv6hdr *ip = (void *)(eth + 1);

		tcp = (void *)(ip + 1);
		if ((void *)(tcp + 1) > end || eth->h_proto != bpf_htons(ETH_P_IPV6) || ip->nexthdr != IPPROTO_TCP)
			return XDP_PASS;
		__builtin_memcpy(ends.saddr, &ip->saddr, sizeof(ends.saddr));
		__builtin_memcpy(ends.daddr, &ip->daddr, sizeof(ends.daddr));
	}
	ends.sport = tcp->source;
	ends.dport = tcp->dest;
	if (!bpf_map_lookup_elem(&table, &ends))
		bpf_map_update_elem(&table, &ends, &backend, BPF_ANY);
	return XDP_TX;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
