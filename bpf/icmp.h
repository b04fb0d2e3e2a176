// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// ICMP and ICMPv6. Errors follow the packet that they quote: one about a backend's packet goes to that backend, one
// about a client's packet that went to a backend goes to that client, and each is made to say what its receiver knows
// (RFC 5508, section 4; RFC 2003, section 4, for tunnels). As few as 8 bytes of TCP may be quoted (RFC 792).
#pragma once

#include "own.h"
#include "reply.h"
#include "tunnel.h"

#define QUOTED_MIN 8	    // bytes of TCP or UDP
#define TCP_CHECKSUM_END 18 // so many bytes of TCP hold its checksum

static __always_inline bool icmp_error(__u8 family, __u8 type)
{
	if (family == FAMILY_IPV4)
		return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
	return type >= ICMP6_UNREACHABLE && type <= ICMP6_PARAMETER_PROBLEM;
}

// quoted_ipv4 and quoted_ipv6 read the quoted IP header and answer the protocol it carries, 0 where nothing is to be
// known by it.
static __always_inline __u8 quoted_ipv4(struct xdp_md *ctx, struct quoted *q)
{
	struct iphdr ip;

	if (bpf_xdp_load_bytes(ctx, q->l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < sizeof(ip) / 4 ||
	    ip.frag_off & bpf_htons(IPV4_OFFSET))
		return 0;
	q->l4 = q->l3 + ip.ihl * 4;
	q->tuple.v4.saddr = ip.saddr;
	q->tuple.v4.daddr = ip.daddr;
	q->tuple.v4.protocol = ip.protocol;
	return ip.protocol;
}

static __always_inline __u8 quoted_ipv6(struct xdp_md *ctx, struct quoted *q)
{
	struct extension ext;
	struct ipv6hdr ip;
	__u32 at;
	__u8 next;

	if (bpf_xdp_load_bytes(ctx, q->l3, &ip, sizeof(ip)) || ip.version != 6)
		return 0;
	at = q->l3 + sizeof(ip);
	next = ip.nexthdr;
	for (int i = 0; i < MAX_EXTENSIONS && known_extension(next); i++) {
		if (bpf_xdp_load_bytes(ctx, at, &ext, sizeof(ext)))
			return 0;
		if (next == IPPROTO_FRAGMENT && ext.fragment & bpf_htons(IPV6_OFFSET))
			return 0;
		at += next == IPPROTO_FRAGMENT ? 8 : 8 + ext.length * 8;
		next = ext.next;
	}
	q->l4 = at;
	__builtin_memcpy(q->tuple.v6.saddr, &ip.saddr, sizeof(q->tuple.v6.saddr));
	__builtin_memcpy(q->tuple.v6.daddr, &ip.daddr, sizeof(q->tuple.v6.daddr));
	q->tuple.v6.protocol = next;
	return next;
}

static __always_inline bool to_sender(const struct flow *flow, const struct quoted *q)
{
	__u32 differ = 0;

	if (flow->family == FAMILY_IPV4)
		return flow->tuple.v4.daddr == q->tuple.v4.saddr;
	for (int i = 0; i < 4; i++)
		differ |= flow->tuple.v6.daddr[i] ^ q->tuple.v6.saddr[i];
	return !differ;
}

// icmp_quoted reads what an ICMP error is about into the scratch room and answers the protocol of it.
__noinline int icmp_quoted(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	__u8 icmp[8], protocol;
	struct quoted *q;
	struct flow *flow;
	__be16 ports[2];
	__u32 end;

	if (!room)
		return 0;
	flow = &room->flow;
	q = &room->quoted;
	__builtin_memset(q, 0, sizeof(*q));
	end = flow->l3 + flow->length;
	q->icmp = flow->l4;
	q->l3 = flow->l4 + sizeof(icmp);
	if (flow->fragment || bpf_xdp_load_bytes(ctx, q->icmp, icmp, sizeof(icmp)) ||
	    !icmp_error(flow->family, icmp[0]))
		return 0;
	q->type = icmp[0];
	if (flow->family == FAMILY_IPV4) {
		if (q->type == ICMP_UNREACHABLE && icmp[1] == ICMP_FRAGMENTATION_NEEDED)
			q->mtu = icmp[6] << 8 | icmp[7];
		protocol = quoted_ipv4(ctx, q);
	} else {
		if (q->type == ICMP6_TOO_BIG)
			q->mtu = (__u32)icmp[4] << 24 | icmp[5] << 16 | icmp[6] << 8 | icmp[7];
		protocol = quoted_ipv6(ctx, q);
	}
	// An error goes to whoever sent the packet.
	if (!protocol || !to_sender(flow, q))
		return 0;
	if (q->l4 > end)
		return 0;
	q->l4_length = end - q->l4;
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP)
		return protocol;
	if (q->l4_length < QUOTED_MIN || bpf_xdp_load_bytes(ctx, q->l4, ports, sizeof(ports)))
		return 0;
	if (flow->family == FAMILY_IPV4) {
		q->tuple.v4.sport = ports[0];
		q->tuple.v4.dport = ports[1];
	} else {
		q->tuple.v6.sport = ports[0];
		q->tuple.v6.dport = ports[1];
	}
	return protocol;
}

// icmp_step takes one from the packet's time to live, for whoever routes. False: it is used up.
__noinline int icmp_step(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	void *end = (void *)(long)ctx->data_end;
	struct packet pkt = {.ctx = ctx};
	void *l3;

	if (!room)
		return false;
	l3 = (void *)(long)ctx->data + (room->flow.l3 & 31);
	if (room->flow.family == FAMILY_IPV4) {
		if (l3 + sizeof(struct iphdr) > end)
			return false;
		pkt.family = FAMILY_IPV4;
		pkt.ip.v4 = l3;
		return ttl_decrement(&pkt);
	}
	if (l3 + sizeof(struct ipv6hdr) > end)
		return false;
	pkt.family = FAMILY_IPV6;
	pkt.ip.v6 = l3;
	return ttl_decrement(&pkt);
}

// icmp_checksum replaces the checksum at an offset by one that a change asks for, and answers by how much it changed.
static __always_inline __u64 icmp_checksum(struct xdp_md *ctx, __u32 at, __u64 change, bool udp)
{
	__sum16 old, new;

	if (bpf_xdp_load_bytes(ctx, at, &old, sizeof(old)) || (udp && !old))
		return 0;
	new = checksum_finish(checksum_start(old) + change);
	if (udp && !new)
		new = 0xffff;
	if (bpf_xdp_store_bytes(ctx, at, &new, sizeof(new)))
		return 0;
	return checksum_change16(0, old, new);
}

// icmp_inside gives the quoted TCP or UDP header its ports and its checksum, and answers by how much the quoted bytes
// changed, the quoted addresses included.
static __always_inline __u64 icmp_inside(struct xdp_md *ctx, struct quoted *q, __u64 addresses, __be32 *old,
					 __be32 *new, __u8 protocol)
{
	__u64 change = addresses + (__u32)bpf_csum_diff(old, 4, new, 4, 0);

	if (bpf_xdp_store_bytes(ctx, q->l4, new, 4))
		return 0;
	if (protocol == IPPROTO_UDP)
		return change + icmp_checksum(ctx, q->l4 + 6, change, true);
	if (q->l4_length >= TCP_CHECKSUM_END)
		return change + icmp_checksum(ctx, q->l4 + 16, change, false);
	return change;
}

// icmp_translate4 makes an error say, outside and inside, what room->quoted has for its receiver.
__noinline int icmp_translate4(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	__u64 addresses, sum;
	struct quoted *q;
	__be32 pair[2];
	__u32 l3;

	if (!room)
		return false;
	q = &room->quoted;
	l3 = room->flow.l3;
	pair[0] = q->saddr[0];
	pair[1] = q->daddr[0];
	icmp_checksum(ctx, l3 + 10, (__u32)bpf_csum_diff((__be32 *)&room->kept, 8, pair, 8, 0), false);
	if (bpf_xdp_store_bytes(ctx, l3 + 12, pair, sizeof(pair)) ||
	    bpf_xdp_store_bytes(ctx, q->l3 + 12, &q->to, sizeof(pair)))
		return false;
	addresses = (__u32)bpf_csum_diff((__be32 *)&q->tuple, 8, (__be32 *)&q->to, 8, 0);
	sum = icmp_inside(ctx, q, addresses, (__be32 *)&q->tuple.v4.sport, (__be32 *)&q->to.v4.sport,
			  q->tuple.v4.protocol);
	sum += icmp_checksum(ctx, q->l3 + 10, addresses, false);
	icmp_checksum(ctx, q->icmp + 2, sum, false);
	return true;
}

__noinline int icmp_translate6(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	__u64 addresses, sum;
	struct quoted *q;
	__u32 l3;

	if (!room)
		return false;
	q = &room->quoted;
	l3 = room->flow.l3;
	if (bpf_xdp_store_bytes(ctx, l3 + 8, q->saddr, 16) || bpf_xdp_store_bytes(ctx, l3 + 24, q->daddr, 16) ||
	    bpf_xdp_store_bytes(ctx, q->l3 + 8, &q->to, 32))
		return false;
	addresses = (__u32)bpf_csum_diff((__be32 *)&q->tuple, 32, (__be32 *)&q->to, 32, 0);
	sum = icmp_inside(ctx, q, addresses, (__be32 *)&q->tuple.v6.sport, (__be32 *)&q->to.v6.sport,
			  q->tuple.v6.protocol);
	// The outer addresses count in ICMPv6's checksum as well (RFC 4443, section 2.3).
	sum += (__u32)bpf_csum_diff((__be32 *)&room->kept, 32, q->saddr, 32, 0);
	icmp_checksum(ctx, q->icmp + 2, sum, false);
	return true;
}

static __always_inline int icmp_translate(struct xdp_md *ctx, __u8 family)
{
	return family == FAMILY_IPV4 ? icmp_translate4(ctx) : icmp_translate6(ctx);
}

// locate finds the backend of the client's tuple in hand, and changes nothing.
static __always_inline bool locate(const struct flow *flow, const struct service *service, struct choice *choice)
{
	struct connection *conn = connection_find(flow->family, &flow->tuple, flow->hash);
	struct backend *backend;
	struct half_open *half;
	__u32 word;

	if (conn) {
		choice->backend = conn->backend;
		choice->source = conn->source;
		choice->source_port = conn->source_port;
		return true;
	}
	// Of one that lost its port to another, nothing is known any more.
	half = half_open_find(flow->family, &flow->tuple, flow->hash, clock_now());
	if (half && (half->state & HALF_STATELESS || half_paired(half))) {
		choice->backend = half->backend;
		choice->source = half->source;
		choice->source_port = half->source_port;
		return true;
	}
	word = slot_look(flow, service);
	if (word == SLOT_ABSENT)
		return false;
	choice->backend = word & SLOT_BACKEND;
	backend = backend_get(choice->backend);
	return backend && stateless(backend->method);
}

// icmp_to_backend sends an error about a backend's packet to that backend. The flow in hand is the client's. It answers
// as `send` does in forward.h.
__noinline int icmp_to_backend(struct xdp_md *ctx, struct service *service)
{
	struct scratch *room = scratch_get();
	struct choice choice = {};
	struct backend *backend;
	struct source *source;
	struct quoted *q;
	struct flow *flow;
	__u32 source_id;

	if (!room || !service)
		return -PASS_ICMP;
	flow = &room->flow;
	q = &room->quoted;
	if (!locate(flow, service, &choice))
		return -PASS_ICMP;
	backend = backend_get(choice.backend);
	if (!backend)
		return -DROP_NO_RING;
	if (!(backend->flags & BACKEND_NEIGHBOR))
		return -DROP_NO_NEIGHBOR;
	// Errors are never answered with errors (RFC 1122, section 3.2.2).
	if (!backend_takes(room, backend))
		return -DROP_TOO_BIG;
	if (!icmp_step(ctx))
		return -DROP_TTL;
	if (!stateless(backend->method)) {
		bool nat = use_nat && backend->method == METHOD_NAT;

		// What the backend sent: from its own address and port to the one that it takes for the client's.
		if (!reply_tuple(flow, backend, choice.source, choice.source_port, &q->to))
			return -DROP_NO_RING;
		__builtin_memcpy(q->daddr, backend->address, sizeof(q->daddr));
		source_id = choice.source;
		source = bpf_map_lookup_elem(&sources, &source_id);
		if (nat) {
			if (flow->family == FAMILY_IPV4)
				q->saddr[0] = room->kept.v4.saddr;
			else
				__builtin_memcpy(q->saddr, room->kept.v6.saddr, sizeof(q->saddr));
		} else if (source) {
			__builtin_memcpy(q->saddr, source->address, sizeof(q->saddr));
		}
		if (!icmp_translate(ctx, flow->family))
			return -DROP_TRUNCATED;
	}
	count_in(traffic_of_service(service->id), bpf_xdp_get_buff_len(ctx), false);
	count_in(traffic_of_backend(choice.backend), bpf_xdp_get_buff_len(ctx), false);
	return tunnels(backend) ? tunnel_send(ctx, backend) : send_tagged(ctx, backend_hop(backend));
}

// icmp_to_client sends an error about a packet that went to a backend to the client that it came from. The flow in hand
// is that of the backend's replies.
__noinline int icmp_to_client(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	struct reply_choice *choice;
	struct connection *conn;
	struct half_open *half;
	struct way_back *back;
	struct quoted *q;
	struct flow *flow;

	if (!room)
		return -PASS_ICMP;
	flow = &room->flow;
	q = &room->quoted;
	choice = &room->reply_choice;
	back = reply_find(flow->family, &flow->tuple, &choice->client);
	if (back) {
		conn = BY_FAMILY(flow->family, &choice->client, connections4, connections6, bpf_map_lookup_elem);
		if (!conn || conn->generation != back->generation)
			return -PASS_ICMP;
		choice->hop = conn->hop;
		choice->backend = conn->backend;
		choice->service = conn->service;
	} else {
		back = half_reply_find(flow->family, &flow->tuple, &choice->client);
		if (!back)
			return -PASS_ICMP;
		half = BY_FAMILY(flow->family, &choice->client, half_open4, half_open6, bpf_map_lookup_elem);
		if (!half || half->generation != back->generation || since(clock_now(), half->first) >= half_open_life)
			return -PASS_ICMP;
		choice->hop = half->hop;
		choice->backend = half->backend;
		choice->service = half->service;
	}
	if (!device_takes(ctx, room, &choice->hop))
		return -DROP_TOO_BIG;
	if (!icmp_step(ctx))
		return -DROP_TTL;
	// What the client sent, and where it went.
	q->to = choice->client;
	if (flow->family == FAMILY_IPV4) {
		q->saddr[0] = choice->client.v4.daddr;
		q->daddr[0] = choice->client.v4.saddr;
	} else {
		__builtin_memcpy(q->saddr, choice->client.v6.daddr, sizeof(q->saddr));
		__builtin_memcpy(q->daddr, choice->client.v6.saddr, sizeof(q->daddr));
	}
	if (!icmp_translate(ctx, flow->family))
		return -DROP_TRUNCATED;
	count_reply(traffic_of_service(choice->service), bpf_xdp_get_buff_len(ctx));
	count_reply(traffic_of_backend(choice->backend), bpf_xdp_get_buff_len(ctx));
	return send_tagged(ctx, &choice->hop);
}

// tunnel_error notes what an error says of the way to a tunnel's end; false: it is not about an outer packet of ours.
__noinline int tunnel_error(void)
{
	struct scratch *room = scratch_get();
	struct quoted *q;
	struct path *path;
	__u8 family, protocol;
	__be16 dport;
	__u32 mtu;

	if (!room)
		return false;
	q = &room->quoted;
	family = room->flow.family;
	__builtin_memset(&room->path, 0, sizeof(room->path));
	room->path.family = family;
	if (family == FAMILY_IPV4) {
		protocol = q->tuple.v4.protocol;
		dport = q->tuple.v4.dport;
		room->path.address[0] = q->tuple.v4.daddr;
	} else {
		protocol = q->tuple.v6.protocol;
		dport = q->tuple.v6.dport;
		__builtin_memcpy(room->path.address, q->tuple.v6.daddr, sizeof(room->path.address));
	}
	if (protocol != IPPROTO_IPIP && protocol != IPPROTO_IPV6 &&
	    (protocol != IPPROTO_UDP || dport != bpf_htons(GUE_PORT)))
		return false;
	path = bpf_map_lookup_elem(&paths, &room->path);
	if (!path)
		return false;
	mtu = q->mtu;
	if (!mtu)
		return true;
	if (mtu < (family == FAMILY_IPV4 ? PATH_MTU_MIN : IPV6_LEAST))
		mtu = family == FAMILY_IPV4 ? PATH_MTU_MIN : IPV6_LEAST;
	// That a way takes more again, only time tells, no router (RFC 1191, section 6.3; RFC 8201, section 4).
	if (path->mtu && mtu >= path->mtu && since(clock_now(), path->tick) <= path_mtu_life)
		return true;
	count_event(EVENT_PATH_MTU);
	path->mtu = mtu;
	path->tick = clock_now();
	return true;
}

// icmp_way takes any ICMP packet; the host sees all that is not for us.
__noinline int icmp_way(struct xdp_md *ctx)
{
	struct scratch *room = scratch_get();
	int protocol = 0, action = -PASS_ICMP;
	struct service *service;
	__u32 verdict = PASS_ICMP;
	struct flow *flow;
	bool alone; // to us and nobody else, from someone

	if (!room)
		return XDP_PASS;
	flow = &room->flow;
	alone = !flow->group && source_possible();
	// All of the message, and its header at least.
	if (flow->l3 + flow->length > bpf_xdp_get_buff_len(ctx) ||
	    flow->l4 + sizeof(struct icmp_header) > flow->l3 + flow->length)
		goto out;
	if (alone)
		protocol = icmp_quoted(ctx);
	if (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP) {
		room->kept = flow->tuple;
		turned_round(flow->family, &room->quoted.tuple, &flow->tuple);
		flow->protocol = protocol;
		flow->hash = hash_tuple(flow);
		service = service_find(flow);
		if (service) {
			verdict = FORWARD_ICMP;
			action = icmp_to_backend(ctx, service);
		} else if (use_fullnat || use_nat) {
			verdict = REPLY_ICMP;
			action = icmp_to_client(ctx);
		}
		if (action < 0)
			verdict = -action;
	}
	if (verdict == PASS_ICMP && protocol && use_tunnel && tunnel_error())
		verdict = PASS_TUNNEL_ERROR;
	if (verdict == PASS_ICMP && !protocol) {
		if (flow->family == FAMILY_IPV6 && !(flow->group & GROUP_FROM) && neighbor_answer(ctx)) {
			verdict = ANSWER_NDP;
			action = XDP_TX;
		} else if (alone && echo_answer(ctx)) {
			verdict = ANSWER_ECHO;
			action = XDP_TX;
		}
	}
out:
	count_verdict(verdict);
	if (verdict >= DROP_TRUNCATED)
		return XDP_DROP;
	return action < 0 ? XDP_PASS : action;
}
