//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The data plane of Fairlead. This file reads from top to bottom as a packet's way; each step has a header of its own.
#include "packet.h"
#include "choose.h"
#include "counters.h"
#include "dsr.h"
#include "fullnat.h"
#include "reply.h"
#include "reset.h"
#include "ring.h"
#include "tend.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// refuse ends the way of a client's packet that goes to no backend.
static __always_inline int refuse(struct packet *pkt, struct service *service, enum verdict verdict)
{
	// RST is never answered with RST.
	if (verdict >= RESET_UNKNOWN && verdict <= RESET_LEAVING && pkt->flow->flags & TCP_RST)
		verdict = DROP_UNKNOWN_RST;
	count_verdict(verdict);
	count_refused(traffic_of_service(service->id));
	if (verdict >= DROP_TRUNCATED)
		return XDP_DROP;
	return reset_answer(pkt->ctx);
}

// forward is step 5: what every method asks first, then the method's own part.
static __always_inline int forward(struct packet *pkt, struct service *service, struct choice *choice,
				   enum verdict verdict)
{
	struct backend *backend = backend_get(choice->backend);
	bool fullnat = use_fullnat && choice->source_port;
	__u32 source_id = choice->source, flags;
	struct source *source = bpf_map_lookup_elem(&sources, &source_id);

	// Entries whose backend, source address or method was taken away.
	if (!backend || !source || (!fullnat && !use_dsr))
		return refuse(pkt, service, DROP_NO_RING);
	flags = backend->flags;
	if (!(flags & BACKEND_UP) && service->on_backend_down == DOWN_RESET)
		return refuse(pkt, service, RESET_BACKEND_DOWN);
	if (!(flags & BACKEND_NEIGHBOR))
		return refuse(pkt, service, DROP_NO_NEIGHBOR);
	if (!ttl_decrement(pkt))
		return refuse(pkt, service, DROP_TTL);

	count_verdict(verdict);
	count_in(traffic_of_service(service->id), pkt->length, choice->new);
	count_in(traffic_of_backend(choice->backend), pkt->length, choice->new);
	if (fullnat)
		return fullnat_forward(pkt, backend, source, choice->source_port);
	return dsr_forward(pkt, backend);
}

static __always_inline int client_way(struct packet *pkt, struct service *service)
{
	struct choice choice = {};
	enum verdict verdict;

	verdict = parse_tcp(pkt);
	if (verdict != PASS_NOT_OURS)
		return refuse(pkt, service, verdict);
	pkt->flow->hash = hash_tuple(pkt->flow);
	verdict = choose(pkt, service, &choice);
	if (verdict >= RESET_UNKNOWN)
		return refuse(pkt, service, verdict);
	return forward(pkt, service, &choice, verdict);
}

static __always_inline int reply_way(struct packet *pkt, struct scratch *room)
{
	enum verdict verdict;

	verdict = parse_tcp(pkt);
	if (verdict == PASS_NOT_OURS) {
		verdict = reply_choose();
		// As in choose(): what another CPU confirmed meanwhile is in the first table now.
		if (verdict == PASS_REPLY_UNKNOWN)
			verdict = reply_choose();
	} else if (!reply_known()) {
		verdict = PASS_REPLY_UNKNOWN;
	}
	if (verdict < DROP_TRUNCATED && verdict != PASS_REPLY_UNKNOWN && !ttl_decrement(pkt))
		verdict = DROP_TTL;
	count_verdict(verdict);
	if (verdict == PASS_REPLY_UNKNOWN)
		return XDP_PASS;
	if (verdict >= DROP_TRUNCATED)
		return XDP_DROP;
	count_reply(traffic_of_service(room->reply_choice.service), pkt->length);
	count_reply(traffic_of_backend(room->reply_choice.backend), pkt->length);
	return fullnat_reply(pkt, &room->reply_choice.client, &room->reply_choice.hop);
}

SEC("xdp")
int fairlead(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct packet pkt = {.ctx = ctx};
	struct service *service;

	if (!room)
		return XDP_ABORTED;
	pkt.flow = &room->flow;
	switch (parse(&pkt)) {
	case PARSED_OURS_MAYBE:
		break;
	case PARSED_LATER_FRAGMENT:
		count_verdict(PASS_FRAGMENT);
		return XDP_PASS;
	default:
		count_verdict(PASS_NOT_OURS);
		return XDP_PASS;
	}
	service = service_find(&room->flow);
	if (service)
		return client_way(&pkt, service);
	if (use_fullnat && reply_is_ours(&room->flow))
		return reply_way(&pkt, room);
	count_verdict(PASS_NOT_OURS);
	return XDP_PASS;
}
