// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// What a packet says of its connection: alive, closing, or nothing to be believed.
//
// FIN and RST only start closing; traffic that could not come from an end that has closed takes the entry back. A
// client's FIN or RST counts only if its numbers fit (in the spirit of RFC 5961): a blind one moves nothing.
#pragma once

#include "clock.h"
#include "connections.h"

// How far numbers may be from the last ones noted: behind, for what was overtaken; ahead, where replies are seen and so
// every packet is, what fits in flight; elsewhere what a client may send between two touches, at 200 Mbit/s in an
// epoch.
#define FIT_BEHIND (1U << 16)
#define FIT_AHEAD (1U << 21)
#define FIT_AHEAD_STATELESS (1U << 24)
// How far behind an end's FIN its retransmissions may be. They take the closing back, but the FIN is not forgotten.
#define FIN_NEAR (1U << 16)

static __always_inline bool closing(__u32 state)
{
	if (state & (STATE_CLIENT_RESET | STATE_BACKEND_RESET))
		return true;
	// Where replies aren't seen, the client's FIN is all there will be.
	if (state & STATE_STATELESS)
		return state & STATE_CLIENT_FIN;
	return (state & STATE_CLIENT_FIN) && (state & STATE_BACKEND_FIN);
}

static __always_inline bool fits(const struct connection *conn, __u32 sequence)
{
	__u32 ahead = conn->state & STATE_STATELESS ? FIT_AHEAD_STATELESS : FIT_AHEAD;

	return sequence - conn->sequence_end + FIT_BEHIND < FIT_BEHIND + ahead;
}

static __always_inline void touch(struct connection *conn, __u32 now)
{
	if (conn->seen != now)
		conn->seen = now;
}

// numbers_note notes what a packet that is believed says. A keep-alive of the client's own stands one before where it
// is (RFC 9293, section 3.8.4).
static __always_inline void numbers_note(struct connection *conn, const struct flow *flow)
{
	if (conn->sequence_end - flow->sequence_end > 1)
		conn->sequence_end = flow->sequence_end;
	if (conn->acknowledgement != flow->acknowledgement)
		conn->acknowledgement = flow->acknowledgement;
	if (conn->timestamp != flow->timestamp)
		conn->timestamp = flow->timestamp;
	if (conn->timestamp_echo != flow->timestamp_echo)
		conn->timestamp_echo = flow->timestamp_echo;
}

static __always_inline void state_change(struct connection *conn, __u32 clear, __u32 set)
{
	if (conn->state & clear)
		__sync_fetch_and_and(&conn->state, ~clear);
	if ((conn->state & set) != set)
		__sync_fetch_and_or(&conn->state, set);
}

// UDP has no numbers: a client that goes on sending stands for a client that is there.
#define UDP_PROOF 60 // ticks, 1 s

static __always_inline bool both_moved(const struct connection *conn, const struct flow *flow, __u32 now)
{
	if (use_udp && flow->protocol == IPPROTO_UDP)
		return !(conn->state & STATE_STATELESS) || since(now, conn->opened) >= 2 * UDP_PROOF;
	return flow->sequence_end != conn->base_sequence && flow->acknowledgement != conn->base_acknowledgement;
}

// journal_matured tells of an entry that is young no more. It is never the one that `connection` of the scratch room is
// about: that is on its way into the table.
__noinline int journal_matured(struct connection *conn)
{
	struct scratch *room = scratch_get();

	if (!use_journal || !room || !conn)
		return 0;
	room->connection = *conn;
	return journal_tell(ROOM_PACKETS, JOURNAL_CHANGED, conn->generation);
}

static __always_inline void young_matures(struct control_block *ctl, struct connection *conn, const struct flow *flow,
					  __u32 now)
{
	if (!both_moved(conn, flow, now))
		return;
	if (__sync_fetch_and_and(&conn->state, ~STATE_YOUNG) & STATE_YOUNG) {
		__sync_fetch_and_add(&ctl->young, -1);
		count_event(EVENT_MATURED);
		journal_matured(conn);
	}
}

// taken_back is what a plain packet so far behind a FIN disproves of it: nothing, where it stands at the FIN; the
// closing, where it may be a retransmission; else the FIN as such.
static __always_inline __u32 taken_back(__u32 state, __u32 fin, __u32 known, __u32 behind)
{
	if (!(state & known) || behind >= FIN_NEAR)
		return fin | known;
	return behind ? fin : 0;
}

// track_client answers whether the packet is believed.
static __always_inline bool track_client(struct control_block *ctl, struct bitmap_set *bits, struct connection *conn,
					 const struct flow *flow, __u32 now)
{
	__u32 before = conn->state;

	if (flow->flags & (TCP_FIN | TCP_RST)) {
		if (!fits(conn, flow->sequence)) {
			count_event(EVENT_CLOSING_UNFIT);
			return false;
		}
		exception_note(ctl, bits, flow->hash);
		conn->marked = now;
		touch(conn, now);
		if (flow->flags & TCP_RST) {
			state_change(conn, STATE_IDLE, STATE_CLIENT_RESET);
		} else {
			conn->client_fin = flow->sequence_end;
			numbers_note(conn, flow);
			state_change(conn, STATE_IDLE | STATE_CLIENT_RESET, STATE_CLIENT_FIN | STATE_CLIENT_FIN_KNOWN);
		}
		if (!closing(before) && closing(conn->state))
			count_event(EVENT_CLOSING);
		return true;
	}

	touch(conn, now);
	if (!(before & STATE_STATELESS) && !fits(conn, flow->sequence)) {
		// Alive or a stranger's: it is not let go of, but neither are its numbers believed.
		state_change(conn, STATE_IDLE, 0);
		return false;
	}
	numbers_note(conn, flow);
	if (!(before & ~STATE_STATELESS))
		return true;
	if (before & STATE_YOUNG)
		young_matures(ctl, conn, flow, now);
	// Behind its FIN a client sends nothing but acknowledgements that stand there. Told and not condemned is UDP
	// alone.
	state_change(conn,
		     STATE_IDLE | STATE_CLIENT_RESET | STATE_CLIENT_TOLD |
			     taken_back(before, STATE_CLIENT_FIN, STATE_CLIENT_FIN_KNOWN,
					conn->client_fin - flow->sequence_end),
		     0);
	if (before & STATE_CLIENT_FIN_KNOWN && flow->sequence_end == conn->client_fin)
		state_change(conn, 0, STATE_CLIENT_FIN);
	if ((before & STATE_IDLE) || (closing(before) && !closing(conn->state)))
		count_event(EVENT_TAKEN_BACK);
	if (closing(conn->state)) {
		exception_note(ctl, bits, flow->hash);
		conn->marked = now;
	}
	return true;
}

// reborn is a backend's SYN-ACK on an entry of the connection table: the client has used its tuple again and the
// backend has taken the new connection. (A SYN that the backend did not believe gets an ACK from it, RFC 9293,
// section 3.10.7.4.)
static __always_inline void reborn(struct connection *conn, const struct flow *flow, __u32 now)
{
	if (!(flow->flags & TCP_ACK))
		return;
	touch(conn, now);
	if (closing(conn->state))
		count_event(EVENT_TAKEN_BACK);
	conn->sequence_end = flow->acknowledgement;
	conn->acknowledgement = flow->sequence + 1;
	state_change(conn, ~(STATE_YOUNG | STATE_STATELESS), 0);
}

// track_backend does the same for a backend's packet, whose word is taken without comparing numbers.
static __always_inline void track_backend(struct control_block *ctl, struct bitmap_set *bits, struct connection *conn,
					  const struct flow *flow, __u64 client_hash, __u32 now)
{
	__u32 before = conn->state;

	touch(conn, now);
	// What the backend acknowledges is the truth about its client: numbers that were far off (restored ones) heal.
	if (flow->flags & TCP_ACK && !fits(conn, flow->acknowledgement))
		conn->sequence_end = flow->acknowledgement;
	if (flow->flags & TCP_RST) {
		state_change(conn, STATE_IDLE, STATE_BACKEND_RESET);
	} else if (flow->flags & TCP_FIN) {
		conn->backend_fin = flow->sequence_end;
		state_change(conn, STATE_IDLE | STATE_BACKEND_RESET, STATE_BACKEND_FIN | STATE_BACKEND_FIN_KNOWN);
	} else if (before & ~(STATE_STATELESS | STATE_YOUNG)) {
		state_change(conn,
			     STATE_IDLE | STATE_BACKEND_RESET | STATE_CLIENT_TOLD |
				     taken_back(before, STATE_BACKEND_FIN, STATE_BACKEND_FIN_KNOWN,
						conn->backend_fin - flow->sequence_end),
			     0);
		if (before & STATE_BACKEND_FIN_KNOWN && flow->sequence_end == conn->backend_fin)
			state_change(conn, 0, STATE_BACKEND_FIN);
		if ((before & STATE_IDLE) || (closing(before) && !closing(conn->state)))
			count_event(EVENT_TAKEN_BACK);
	}
	if (closing(conn->state)) {
		exception_note(ctl, bits, client_hash);
		conn->marked = now;
		if (!closing(before))
			count_event(EVENT_CLOSING);
	}
}
