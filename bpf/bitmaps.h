// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// The two kinds of bitmap that let the ring answer alone.
//
// An exception bit says: ask the table. Sharing one costs a look-up, no more. A fresh bit says: this connection was
// seen in the table, agreeing with the ring, in this epoch. Sharing one may delay a touch by an epoch; as the places
// change each epoch, nobody shares for long. Neither ever redirects a packet.
#pragma once

#include "maps.h"
#include "settings.h"

static __always_inline struct control_block *control_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline struct bitmap_set *bitmaps_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&bitmaps, &zero);
}

static __always_inline __u32 exception_bit(__u64 hash)
{
	return (__u32)hash & (BITMAP_BITS - 1);
}

static __always_inline __u32 fresh_bit(__u64 hash, __u32 epoch)
{
	return ((__u32)hash * (epoch * 0x9e3779b1U | 1)) >> 12;
}

static __always_inline bool bit_test(const __u64 *words, __u32 bit)
{
	return words[(bit >> 6) & (BITMAP_WORDS - 1)] >> (bit & 63) & 1;
}

// A bit that is set already is not written: the cache line stays shared between CPUs.
static __always_inline void bit_set(__u64 *words, __u32 bit)
{
	__u64 mask = 1ULL << (bit & 63);
	__u64 *word = &words[(bit >> 6) & (BITMAP_WORDS - 1)];

	if (!(*(volatile __u64 *)word & mask))
		__sync_fetch_and_or(word, mask);
}

static __always_inline void bit_clear(__u64 *words, __u32 bit)
{
	__u64 mask = 1ULL << (bit & 63);
	__u64 *word = &words[(bit >> 6) & (BITMAP_WORDS - 1)];

	if (*(volatile __u64 *)word & mask)
		__sync_fetch_and_and(word, ~mask);
}

static __always_inline bool exception_test(struct control_block *ctl, struct bitmap_set *bits, __u64 hash)
{
	return bit_test(bits->exception[ctl->exception_index & 1], exception_bit(hash));
}

static __always_inline bool fresh_test(struct control_block *ctl, struct bitmap_set *bits, __u64 hash)
{
	__u32 epoch = ctl->epoch;

	return bit_test(bits->fresh[epoch & 1], fresh_bit(hash, epoch));
}

static __always_inline void fresh_set(struct control_block *ctl, struct bitmap_set *bits, __u64 hash)
{
	__u32 epoch = ctl->epoch;

	bit_set(bits->fresh[epoch & 1], fresh_bit(hash, epoch));
}

static __always_inline void fresh_clear(struct control_block *ctl, struct bitmap_set *bits, __u64 hash)
{
	__u32 epoch = ctl->epoch;

	bit_clear(bits->fresh[epoch & 1], fresh_bit(hash, epoch));
}

// exception_note is for whoever creates an entry on another backend than its slot's, or marks one: first the exception
// bit, then the fresh one. During a rebuild both bitmaps are told, so that the new one lacks nobody.
static __always_inline void exception_note(struct control_block *ctl, struct bitmap_set *bits, __u64 hash)
{
	__u32 index = ctl->exception_index & 1;

	bit_set(bits->exception[index], exception_bit(hash));
	if (ctl->exception_both)
		bit_set(bits->exception[index ^ 1], exception_bit(hash));
	fresh_clear(ctl, bits, hash);
}
