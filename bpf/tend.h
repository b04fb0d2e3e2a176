// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Programs for the daemon to call: what only the kernel can do without a race, or in one go. They are given their
// request as a packet (BPF_PROG_TEST_RUN) and never attached.
#pragma once

#include "connections.h"
#include "hash.h"
#include "track.h"

static __always_inline __u32 tend_connection(struct tend_record *record, struct flow *client)
{
	struct connection *conn = connection_find(client->family, &client->tuple, client->hash);
	struct control_block *ctl = control_get();
	struct bitmap_set *bits = bitmaps_get();

	if (!ctl || !bits || !conn || conn->generation != record->generation)
		return TEND_ABSENT;
	if (record->what == TEND_CONDEMN) {
		exception_note(ctl, bits, client->hash);
		conn->marked = clock_now();
		state_change(conn, 0, STATE_CONDEMNED);
		return TEND_DONE;
	}
	if (conn->seen != record->seen)
		return TEND_CHANGED;
	if (record->what == TEND_REMOVE && !closing(conn->state) && !(conn->state & (STATE_IDLE | STATE_CONDEMNED)))
		return TEND_CHANGED;
	if (record->what == TEND_REMOVE)
		return connection_remove(record->generation, ROOM_TEND) ? TEND_DONE : TEND_ABSENT;
	exception_note(ctl, bits, client->hash);
	conn->marked = clock_now();
	state_change(conn, 0, STATE_IDLE);
	return TEND_DONE;
}

static __always_inline __u32 tend_half_open(struct tend_record *record, struct flow *client)
{
	struct half_open *half = BY_FAMILY(client->family, &client->tuple, half_open4, half_open6, bpf_map_lookup_elem);

	if (!half || half->generation != record->generation)
		return TEND_ABSENT;
	if (since(clock_now(), half->first) < half_open_life)
		return TEND_CHANGED;
	half_open_remove(client->family, &client->tuple);
	return TEND_DONE;
}

// tend_one is verified by itself, once, and called for each record.
__noinline int tend_one(struct xdp_md *ctx, __u32 index)
{
	struct tend_request *request = (void *)(long)ctx->data;
	struct tend_record *record;
	struct scratch *room = scratch_of(ROOM_TEND);
	struct flow *client;

	if (!room || index >= TEND_RECORDS || (void *)(request + 1) > (void *)(long)ctx->data_end)
		return 0;
	client = &room->flow;
	client->family = request->family;
	record = &request->records[index];
	if ((void *)(record + 1) > (void *)(long)ctx->data_end)
		return 0;
	if (client->family == FAMILY_IPV4) {
		__builtin_memcpy(&client->tuple.v4, &record->tuple, sizeof(client->tuple.v4));
		client->protocol = client->tuple.v4.protocol;
	} else {
		client->tuple.v6 = record->tuple;
		client->protocol = client->tuple.v6.protocol;
	}
	client->hash = hash_tuple(client);
	switch (record->what) {
	case TEND_MARK_IDLE:
	case TEND_REMOVE:
	case TEND_CONDEMN:
		record->what = tend_connection(record, client);
		break;
	case TEND_REMOVE_HALF_OPEN:
		record->what = tend_half_open(record, client);
		break;
	}
	return 0;
}

SEC("xdp")
int tend(struct xdp_md *ctx)
{
	for (__u32 i = 0; i < TEND_RECORDS; i++)
		tend_one(ctx, i);
	return XDP_PASS;
}

// fill puts new port numbers into a pool's queue of unused ones.
SEC("xdp")
int fill(struct xdp_md *ctx)
{
	struct fill_request *request = (void *)(long)ctx->data;
	__u32 index, first, count, number;
	void *queue;

	if ((void *)(request + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	index = request->pool;
	first = request->first_port;
	count = request->count;
	queue = ports_of(index, PORTS_UNUSED);
	if (!queue)
		return XDP_ABORTED;
	for (__u32 i = 0; i < FILL_PORTS; i++) {
		if (i >= count)
			break;
		number = first + i;
		if (bpf_map_push_elem(queue, &number, 0))
			return XDP_DROP;
	}
	return XDP_PASS;
}
