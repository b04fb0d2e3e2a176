//go:build ignore

// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The data plane of Fairlead. This file reads from top to bottom as a packet's way; each step has a header of its own.
#include "packet.h"
#include "check.h"
#include "choose.h"
#include "counters.h"
#include "dsr.h"
#include "fragment.h"
#include "fullnat.h"
#include "icmp.h"
#include "nat.h"
#include "own.h"
#include "reply.h"
#include "reset.h"
#include "ring.h"
#include "tend.h"
#include "tunnel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// answer tells the sender of the packet in hand why it goes no further, or drops it: as the verdict says. It answers
// what XDP is to do.
static __always_inline int answer(struct packet *pkt, enum verdict verdict)
{
	bool icmp = verdict == ANSWER_TOO_BIG || is_udp(pkt->flow);
	int action = XDP_DROP;

	// RST is never answered with RST.
	if (verdict >= RESET_UNKNOWN && verdict <= RESET_REPLY_UNKNOWN && pkt->flow->flags & TCP_RST)
		verdict = DROP_UNKNOWN_RST;
	if (verdict < DROP_TRUNCATED) {
		if (!icmp)
			action = reset_answer(pkt->ctx);
		else if (budget_spend(BUDGET_ANSWERS, answers_a_tick, clock_now()))
			action = icmp_answer(pkt->ctx, verdict == ANSWER_TOO_BIG ? ANSWER_MTU : ANSWER_PORT);
		else
			action = -DROP_ANSWER_LIMITED;
		if (action < 0) {
			verdict = -action;
			action = XDP_DROP;
		}
	}
	count_verdict(verdict);
	return action;
}

// refuse ends the way of a client's packet that goes to no backend.
static __always_inline int refuse(struct packet *pkt, struct service *service, enum verdict verdict)
{
	count_refused(traffic_of_service(service->id));
	return answer(pkt, verdict);
}

// method_forward is the method's own part of step 5: a row for each.
static __always_inline int method_forward(struct packet *pkt, struct backend *backend, const struct choice *choice)
{
	switch (backend->method) {
	case METHOD_FULLNAT:
		return use_fullnat ? fullnat_forward(pkt, backend, choice->source, choice->source_port) : -DROP_NO_RING;
	case METHOD_NAT:
		return use_nat ? nat_forward(pkt, backend) : -DROP_NO_RING;
	case METHOD_DSR:
		return use_dsr ? dsr_forward(pkt, backend) : -DROP_NO_RING;
	case METHOD_IPIP:
	case METHOD_GUE:
		return use_tunnel ? tunnel_send(pkt->ctx, backend) : -DROP_NO_RING;
	}
	return -DROP_NO_RING; // an entry that was taken away
}

// forward is step 5: what every method asks first, then the method's own part.
static __always_inline int forward(struct packet *pkt, struct scratch *room, struct service *service,
				   struct choice *choice, enum verdict verdict)
{
	struct backend *backend = backend_get(choice->backend);
	__u32 flags, length = pkt->length;
	int action;

	if (!backend)
		return refuse(pkt, service, DROP_NO_RING);
	flags = backend->flags;
	if (!(flags & BACKEND_NEIGHBOR))
		return refuse(pkt, service, DROP_NO_NEIGHBOR);
	if (verdict == FORWARD_RESET) {
		action = reset_onward(pkt->ctx, backend, choice->source, choice->source_port);
		if (action < 0)
			return refuse(pkt, service, -action);
		count_verdict(verdict);
		count_in(traffic_of_service(service->id), length, false);
		count_in(traffic_of_backend(choice->backend), length, false);
		return action;
	}
	if (!backend_takes(room, backend))
		return refuse(pkt, service, too_big(pkt));
	if (!ttl_decrement(pkt))
		return refuse(pkt, service, DROP_TTL);
	if (pkt->flow->fragment && !fragment_of_client(pkt->ctx, choice->backend, service->id, choice->source))
		return refuse(pkt, service, DROP_NO_RING);
	action = method_forward(pkt, backend, choice);
	if (action < 0)
		return refuse(pkt, service, -action);
	count_verdict(verdict);
	count_in(traffic_of_service(service->id), length, choice->new);
	count_in(traffic_of_backend(choice->backend), length, choice->new);
	return action;
}

static __always_inline int client_way(struct packet *pkt, struct scratch *room, struct service *service)
{
	struct choice choice = {};
	enum verdict verdict;

	if (pkt->family == FAMILY_IPV4 ? !source_possible4(pkt->flow->tuple.v4.saddr) : !source_possible())
		return refuse(pkt, service, DROP_BAD_SOURCE);
	verdict = parse_transport(pkt);
	if (verdict != PASS_NOT_OURS)
		return refuse(pkt, service, verdict);
	pkt->flow->hash = hash_tuple(pkt->flow);
	verdict = choose(pkt, service, &choice);
	if (verdict >= RESET_UNKNOWN)
		return refuse(pkt, service, verdict);
	return forward(pkt, room, service, &choice, verdict);
}

static __always_inline int reply_way(struct packet *pkt, struct scratch *room)
{
	struct reply_choice *choice = &room->reply_choice;
	__u32 length;
	enum verdict verdict;
	int action;

	verdict = parse_transport(pkt);
	length = pkt->length;
	if (verdict == PASS_NOT_OURS) {
		verdict = reply_choose();
		// As in choose(): what another CPU confirmed meanwhile is in the first table now.
		if (verdict == PASS_REPLY_UNKNOWN)
			verdict = reply_choose();
	} else if (!reply_known()) {
		// What can't be read can't be answered either.
		if (destination_flags(pkt->flow) & ADDRESS_OWN)
			return answer(pkt, verdict);
		count_verdict(PASS_REPLY_UNKNOWN);
		return XDP_PASS;
	}
	if (verdict == PASS_REPLY_UNKNOWN) {
		// At an address of XDP's own nobody else would answer the backend.
		if (destination_flags(pkt->flow) & ADDRESS_OWN)
			return answer(pkt, source_possible() ? RESET_REPLY_UNKNOWN : DROP_BAD_SOURCE);
		count_verdict(verdict);
		return XDP_PASS;
	}
	if (verdict >= RESET_UNKNOWN)
		return answer(pkt, verdict);
	if (!device_takes(pkt->ctx, room, &choice->hop))
		return answer(pkt, too_big(pkt));
	if (!ttl_decrement(pkt))
		return answer(pkt, DROP_TTL);
	if (pkt->flow->fragment && !fragment_of_backend(pkt->ctx))
		return answer(pkt, DROP_NO_RING);
	action = rewrite_reply(pkt, &choice->client, &choice->hop);
	if (action < 0)
		return answer(pkt, -action);
	count_verdict(verdict);
	count_reply(traffic_of_service(choice->service), length);
	count_reply(traffic_of_backend(choice->backend), length);
	return action;
}

SEC("xdp.frags")
int fairlead(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct packet pkt = {.ctx = ctx};
	struct port_set *near;
	struct service *service;
	__u32 zero = 0;
	struct flow *flow;
	__be16 sport, dport;

	near = bpf_map_lookup_elem(&port_flags, &zero);
	if (!room || !near)
		return XDP_ABORTED;
	pkt.flow = flow = &room->flow;
	switch (parse(&pkt)) {
	case PARSED_OURS_MAYBE:
		break;
	case PARSED_LATER_FRAGMENT:
		return fragment_way(ctx);
	case PARSED_ICMP:
		return icmp_way(ctx);
	case PARSED_ARP:
		return arp_way(ctx);
	default:
		count_verdict(PASS_NOT_OURS);
		return XDP_PASS;
	}
	if (flow->group) {
		count_verdict(PASS_NOT_OURS);
		return XDP_PASS;
	}
	sport = flow->family == FAMILY_IPV4 ? flow->tuple.v4.sport : flow->tuple.v6.sport;
	dport = flow->family == FAMILY_IPV4 ? flow->tuple.v4.dport : flow->tuple.v6.dport;
	if (near->flags[dport] & PORT_SERVICE) {
		service = service_find(flow);
		if (service)
			return client_way(&pkt, room, service);
	}
	if (use_checks && near->flags[dport] & PORT_CHECK && check_answer())
		return check_take(ctx);
	if ((use_fullnat && near->flags[dport] & PORT_SOURCE && source_find(flow)) ||
	    (use_nat && near->flags[sport] & PORT_BACKEND && nat_backend_find(flow)))
		return reply_way(&pkt, room);
	count_verdict(PASS_NOT_OURS);
	return XDP_PASS;
}
