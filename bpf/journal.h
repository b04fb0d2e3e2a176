// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Telling the daemon what becomes of entries of the connection table. It looks often enough by itself, so it is not
// woken.
#pragma once

#include "counters.h"
#include "maps.h"
#include "settings.h"

// journal_tell is verified by itself: it is called from several places. Of what closed there is no connection to tell.
__noinline int journal_tell(__u32 whose_room, __u32 what, __u32 generation)
{
	struct scratch *room = scratch_of(whose_room);
	struct journal_event *event;

	if (!use_journal || !room)
		return 0;
	event = bpf_ringbuf_reserve(&journal, sizeof(*event), 0);
	if (!event) {
		count_event(EVENT_JOURNAL_LOST);
		return 0;
	}
	event->what = what;
	event->family = room->flow.family;
	event->tuple = room->flow.tuple.v6;
	if (what == JOURNAL_CLOSED)
		__builtin_memset(&event->connection, 0, sizeof(event->connection));
	else
		event->connection = room->connection;
	event->connection.generation = generation;
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 1;
}
