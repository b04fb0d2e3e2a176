//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The harness: the programs `give_…` make the next frame and hand it to the program that is to be measured, so that
// BPF_PROG_TEST_RUN, whose repeats leave the packet as the last one made it, gives every repeat a frame of its own.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum words {
	HEADER_WORDS4 = 7, // Ethernet, IPv4 and TCP headers, in words of 8 bytes, rounded up
	HEADER_WORDS6 = 10,
};

// What one frame differs in from the template. IPv6: the last words of its addresses.
struct ends {
	__be32 saddr;
	__be32 daddr;
	__be16 sport;
	__be16 dport;
	__sum16 ip_check; // IPv4
	__sum16 l4_check; // where TCP has its checksum
};

// The frames, in the order in which they come: read from front to back, so that the reading is foreseen by the CPU
// whatever the order of the connections.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ends);
} order SEC(".maps");

// Who is given frames. Each has its own place and its own program that gives, so that the JIT makes jumps of them all.
enum taker {
	TAKER_PLANE, // the data plane
	TAKER_NOTHING,
	TAKER_FLOOR,
	TAKER_DISTURBANCE,
	TAKER_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, TAKER_COUNT);
	__type(key, enum taker);
	__type(value, __u32);
} takers SEC(".maps");

volatile const __u8 ipv6 = 0;

__u64 template[HEADER_WORDS6]; // the headers of every frame
__u32 frame_length = 0;
__u32 frame_count = 0; // in use of `order`
__u32 frame_next = 0;
__u32 lost = 0;		     // repeats that did not come to whom they were for
__s64 head = 0;		     // where the frame began in the first repeat
volatile __s64 position = 0; // where it begins now
__s32 disturbance = 0;	     // bytes by which the data plane makes the frame longer

// unmove undoes what the last repeat did to the frame's length: at the head for what encapsulates, then at the tail for
// what cuts.
static __always_inline bool unmove(struct xdp_md *ctx)
{
	__u32 size;

	// A pointer becomes a number by way of memory.
	position = ctx->data;
	if (!head)
		head = position;
	if (head != position && bpf_xdp_adjust_head(ctx, head - position))
		return false;
	size = ctx->data_end - ctx->data;
	return size == frame_length || !bpf_xdp_adjust_tail(ctx, (int)frame_length - (int)size);
}

static __always_inline int give(struct xdp_md *ctx, enum taker taker)
{
	__u32 words = ipv6 ? HEADER_WORDS6 : HEADER_WORDS4, at = frame_next;
	struct ends *ends = bpf_map_lookup_elem(&order, &at);
	struct tcphdr *tcp;
	struct ethhdr *eth;

	if (!ends || !unmove(ctx))
		goto out;
	frame_next = at + 1 == frame_count ? 0 : at + 1;
	eth = (void *)(long)ctx->data;
	if ((void *)eth + words * 8 > (void *)(long)ctx->data_end)
		goto out;
	if (ipv6) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		for (int i = 0; i < HEADER_WORDS6; i++)
			((__u64 *)eth)[i] = template[i];
		ip->saddr.s6_addr32[3] = ends->saddr;
		ip->daddr.s6_addr32[3] = ends->daddr;
		tcp = (void *)(ip + 1);
	} else {
		struct iphdr *ip = (void *)(eth + 1);

		for (int i = 0; i < HEADER_WORDS4; i++)
			((__u64 *)eth)[i] = template[i];
		ip->saddr = ends->saddr;
		ip->daddr = ends->daddr;
		ip->check = ends->ip_check;
		tcp = (void *)(ip + 1);
	}
	tcp->source = ends->sport;
	tcp->dest = ends->dport;
	tcp->check = ends->l4_check;
	bpf_tail_call(ctx, &takers, taker);
out:
	lost++;
	return XDP_ABORTED;
}

SEC("xdp")
int give_plane(struct xdp_md *ctx)
{
	return give(ctx, TAKER_PLANE);
}

SEC("xdp")
int give_nothing(struct xdp_md *ctx)
{
	return give(ctx, TAKER_NOTHING);
}

SEC("xdp")
int give_floor(struct xdp_md *ctx)
{
	return give(ctx, TAKER_FLOOR);
}

SEC("xdp")
int give_disturbance(struct xdp_md *ctx)
{
	return give(ctx, TAKER_DISTURBANCE);
}

// take_nothing shows what the harness itself takes.
SEC("xdp")
int take_nothing(struct xdp_md *ctx)
{
	return XDP_PASS;
}

// take_disturbance moves the frame's end as the data plane does, and does nothing else: the harness with and without it
// shows what moving there and back takes.
SEC("xdp")
int take_disturbance(struct xdp_md *ctx)
{
	if (disturbance > 0)
		bpf_xdp_adjust_head(ctx, -disturbance);
	else if (disturbance < 0)
		bpf_xdp_adjust_tail(ctx, disturbance);
	return XDP_PASS;
}

// take_floor is the floor, the least that forwards: look as far as the ports, exchange the MAC addresses, send back.
SEC("xdp")
int take_floor(struct xdp_md *ctx)
{
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = (void *)(long)ctx->data;
	__u8 mac[ETH_ALEN];
	__be16 *ports;

	if ((void *)(eth + 1) > end)
		return XDP_PASS;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_TCP)
			return XDP_PASS;
		ports = (void *)ip + ip->ihl * 4;
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || ip->nexthdr != IPPROTO_TCP)
			return XDP_PASS;
		ports = (void *)(ip + 1);
	} else {
		return XDP_PASS;
	}
	if ((void *)(ports + 2) > end || !ports[0] || !ports[1])
		return XDP_PASS;
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return XDP_TX;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
