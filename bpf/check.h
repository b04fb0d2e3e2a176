// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Checks through their method (`via: service`): the daemon sends a backend frames as a client's would come to it, and
// the backend answers from the service's address, which the host's own stack knows nothing of. So the daemon gets the
// frame.
#pragma once

#include "counters.h"
#include "maps.h"
#include "own.h"
#include "packet.h"
#include "settings.h"

// check_answer says whether a packet to a port of checks comes from a service's address, whatever its port, and to
// where checks come from: a client may have the same port. Verified by itself: its branches would be walked for every
// way on.
__noinline int check_answer(void)
{
	struct scratch *room = scratch_get();
	struct flow *flow;

	if (!room)
		return false;
	flow = &room->flow;
	if (!(destination_flags(flow) & ADDRESS_CHECK))
		return false;
	return !!((flow->family == FAMILY_IPV4 ? address_flags(FAMILY_IPV4, &flow->tuple.v4.saddr)
					       : address_flags(FAMILY_IPV6, flow->tuple.v6.saddr)) &
		  ADDRESS_SERVICE);
}

// check_take hands the frame to the daemon. Where that has no room for it, it is lost, as on a wire.
__noinline int check_take(struct xdp_md *ctx)
{
	__u32 length = bpf_xdp_get_buff_len(ctx), kept = length;
	struct check_frame *frame;

	count_verdict(PASS_CHECK);
	frame = bpf_ringbuf_reserve(&check_frames, sizeof(*frame), 0);
	if (!frame)
		return XDP_DROP;
	frame->ifindex = ctx->ingress_ifindex;
	frame->length = length;
	if (kept > CHECK_FRAME_MAX)
		kept = CHECK_FRAME_MAX;
	kept--;
	barrier_var(kept);
	kept = (kept & (CHECK_FRAME_MAX - 1)) + 1;
	if (bpf_xdp_load_bytes(ctx, 0, frame->data, kept)) {
		bpf_ringbuf_discard(frame, 0);
		return XDP_DROP;
	}
	bpf_ringbuf_submit(frame, 0);
	return XDP_DROP;
}
