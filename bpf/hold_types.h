// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// What the program of `fairlead hold`, its maps and Go share: every constant and every layout. Padding has a name.
#pragma once

#include <linux/types.h>

// A change of a layout or of a meaning below is a new schema version: it is part of the pin path.
enum schema {
	SCHEMA_VERSION = 1,
};

enum limits {
	MAX_PREFIXES = 262144, // of each map
};

// What the program decided for a frame. The prefix says what was done with it; Go takes the names from here.
enum verdict {
	PASS_OTHER,    // nothing of ours
	PASS_FRAGMENT, // a later fragment of TCP or UDP: without its first, which is dropped if it is ours, it does
		       // nothing
	PASS_SOCKET,  // to a source address and port of ours, and the host has a socket that it is for
	DROP_SERVICE, // to a service
	DROP_SOURCE,  // to a source address of fullnat, in its port range
	DROP_BACKEND, // from a backend, to wherever its replies by nat or fullnat go
	VERDICT_COUNT,
};

// Keys of the tries. The last field is a port by its first bits, so that a range of ports is a few entries.

// to4 and to6 are where a packet goes.
struct to4 {
	__u32 length; // bits that count
	__u8 protocol;
	__u8 pad[1];
	__u8 address[4];
	__be16 port;
};

struct to6 {
	__u32 length;
	__u8 protocol;
	__u8 pad[1];
	__u8 address[16];
	__be16 port;
};

// from4 and from6 are whom a packet comes from, and the port that it goes to.
struct from4 {
	__u32 length;
	__u8 protocol;
	__u8 pad[3];
	__u8 address[4];
	__be16 port;
	__be16 to;
};

struct from6 {
	__u32 length;
	__u8 protocol;
	__u8 pad[3];
	__u8 address[16];
	__be16 port;
	__be16 to;
};

struct counter_set {
	__u64 verdicts[VERDICT_COUNT];
};

// Types that Go needs and no map's layout names: debug information keeps only what is used.
struct shared_types {
	enum schema schema;
	enum limits limits;
	enum verdict verdict;
};
