//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The harness: `give` makes the next frame and hands it to the program whose turn it is, so that BPF_PROG_TEST_RUN,
// whose repeats leave the packet as the last one made it, gives every repeat a frame of its own.
//
// The order of frames is cut into pieces. Of each piece every program in turn is given all frames, and the time that
// each took is noted: what is compared was measured within the same milliseconds, and a piece in which the CPU did
// something else stands out from the others.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum sizes {
	HEADER_WORDS4 = 7, // Ethernet, IPv4 and TCP headers, in words of 8 bytes, rounded up
	HEADER_WORDS6 = 10,
	OFFSET_MAX = 126,
};

// What one frame differs in from the template. IPv6: the last words of its addresses.
struct ends {
	__be32 saddr;
	__be32 daddr;
	__be16 sport;
	__be16 dport;
	__sum16 ip_check; // IPv4
	__sum16 l4_check; // of what stands behind the IP header
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

// Who is given a piece, in this order.
enum turn {
	TURN_TOUCH, // nobody: then the piece is in the cache for all of the others
	TURN_NOTHING,
	TURN_FLOOR,
	TURN_DISTURBANCE,
	TURN_PLANE, // the data plane
	TURN_COUNT,
};

// The program of each turn. Each has its own place and its own call, so that the JIT makes jumps of them all.
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, TURN_COUNT);
	__type(key, enum turn);
	__type(value, __u32);
} takers SEC(".maps");

// How long each turn took.
struct piece {
	__u64 ns[TURN_COUNT];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct piece);
} pieces SEC(".maps");

volatile const __u8 ipv6 = 0;
volatile const __u32 piece_size = 1; // in frames

// What all frames of an order share.
struct frame_set {
	__u64 template[HEADER_WORDS6]; // their headers
	__u32 length;
	__u32 count; // in use of `order`
	__u32 l4;    // offset of the ports,
	__u32 check; // and of the checksum behind the IP header
	__s32 moved; // bytes by which the data plane makes them longer
	__u32 pad;
};

struct frame_set frames = {};

// A run of the harness.
struct run_state {
	__u64 since;	  // when the turn in hand began
	__s64 head;	  // where the frame began in the first repeat
	__u32 first_turn; // of each piece
	__u32 turn;	  // TURN_COUNT: the next piece begins
	__u32 next;	  // frame of the order
	__u32 left;	  // frames of this turn
	__u32 rest;	  // frames behind the piece in hand
	__u32 piece;	  // number of the piece in hand,
	__u32 first;	  // its first frame,
	__u32 length;	  // and its length
	__u32 finished;
	__u32 lost; // repeats that did not come to whom they were for
};

struct run_state run = {};

volatile __s64 position = 0; // where the frame begins now
__u64 settled = 0;

// turn_over notes how long the turn took that is over, and begins the next one; false: there is none.
static __always_inline bool turn_over(void)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 at = run.piece, over = run.turn;
	struct piece *piece = bpf_map_lookup_elem(&pieces, &at);

	if (!piece)
		return false;
	if (over < TURN_COUNT)
		piece->ns[over] = now - run.since;
	if (over < TURN_PLANE) {
		run.next = run.first;
		run.turn = over + 1;
		if (run.turn == TURN_DISTURBANCE && !frames.moved)
			run.turn = TURN_PLANE;
	} else {
		if (over == TURN_PLANE)
			run.piece++;
		if (!run.rest)
			return false;
		run.length = run.rest < piece_size ? run.rest : piece_size;
		run.rest -= run.length;
		run.first = run.next;
		run.turn = run.first_turn;
	}
	run.left = run.length;
	run.since = bpf_ktime_get_ns();
	return true;
}

// unmove undoes what the last repeat did to the frame's length: at the head for what encapsulates, then at the tail for
// what cuts.
static __always_inline bool unmove(struct xdp_md *ctx)
{
	__u32 size;

	// A pointer becomes a number by way of memory.
	position = ctx->data;
	if (!run.head)
		run.head = position;
	if (run.head != position && bpf_xdp_adjust_head(ctx, run.head - position))
		return false;
	size = ctx->data_end - ctx->data;
	return size == frames.length || !bpf_xdp_adjust_tail(ctx, (int)frames.length - (int)size);
}

// make_frame makes the next frame of the order.
static __always_inline bool make_frame(struct xdp_md *ctx)
{
	__u32 words = ipv6 ? HEADER_WORDS6 : HEADER_WORDS4, at = run.next, l4 = frames.l4, check = frames.check;
	struct ends *ends = bpf_map_lookup_elem(&order, &at);
	__be16 *ports, *place;
	struct ethhdr *eth;
	void *end;

	if (!ends || !unmove(ctx))
		return false;
	run.next = at + 1 == frames.count ? 0 : at + 1;
	barrier(); // the pointers are read anew, as pointers
	eth = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if ((void *)eth + words * 8 > end || l4 > OFFSET_MAX || check > OFFSET_MAX)
		return false;
	ports = (void *)eth + l4;
	place = (void *)eth + check;
	if ((void *)(ports + 2) > end || (void *)(place + 1) > end)
		return false;
	if (ipv6) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		for (int i = 0; i < HEADER_WORDS6; i++)
			((__u64 *)eth)[i] = frames.template[i];
		ip->saddr.s6_addr32[3] = ends->saddr;
		ip->daddr.s6_addr32[3] = ends->daddr;
	} else {
		struct iphdr *ip = (void *)(eth + 1);

		for (int i = 0; i < HEADER_WORDS4; i++)
			((__u64 *)eth)[i] = frames.template[i];
		ip->saddr = ends->saddr;
		ip->daddr = ends->daddr;
		ip->check = ends->ip_check;
	}
	ports[0] = ends->sport;
	ports[1] = ends->dport;
	*place = ends->l4_check;
	return true;
}

SEC("xdp.frags")
int give(struct xdp_md *ctx)
{
	if (!run.left && !turn_over()) {
		run.finished = 1;
		return XDP_PASS;
	}
	run.left--;
	if (!make_frame(ctx))
		goto out;
	// A frame that a card has written lies still when the program begins. An atomic operation waits for the writes
	// above; else reading them back in other widths would stall the CPU, some programs more, some less.
	__sync_fetch_and_add(&settled, 1);
	switch (run.turn) {
	case TURN_TOUCH:
		bpf_tail_call_static(ctx, &takers, TURN_TOUCH);
		break;
	case TURN_NOTHING:
		bpf_tail_call_static(ctx, &takers, TURN_NOTHING);
		break;
	case TURN_FLOOR:
		bpf_tail_call_static(ctx, &takers, TURN_FLOOR);
		break;
	case TURN_DISTURBANCE:
		bpf_tail_call_static(ctx, &takers, TURN_DISTURBANCE);
		break;
	case TURN_PLANE:
		bpf_tail_call_static(ctx, &takers, TURN_PLANE);
		break;
	}
out:
	run.lost++;
	return XDP_ABORTED;
}

// take_nothing shows what the harness itself takes.
SEC("xdp.frags")
int take_nothing(struct xdp_md *ctx)
{
	return XDP_PASS;
}

// take_disturbance moves the frame's end as the data plane does, and does nothing else: the harness with and without it
// shows what moving there and back takes.
SEC("xdp.frags")
int take_disturbance(struct xdp_md *ctx)
{
	if (frames.moved > 0)
		bpf_xdp_adjust_head(ctx, -frames.moved);
	else if (frames.moved < 0)
		bpf_xdp_adjust_tail(ctx, frames.moved);
	return XDP_PASS;
}

// take_floor is the floor, the least that forwards: look as far as the ports, exchange the MAC addresses, send back.
SEC("xdp.frags")
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

		if ((void *)(ip + 1) > end || !ip->protocol)
			return XDP_PASS;
		ports = (void *)ip + ip->ihl * 4;
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end || !ip->nexthdr)
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
