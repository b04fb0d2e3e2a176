package maps

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// BitmapBits is the number of bits in a service's exception bitmap and in each of its two fresh bitmaps.
const BitmapBits = 1 << bitmapOrder

const (
	bitmapOrder = 20

	hashFold  = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio, odd
	freshFold = 0x9e3779b1         // 2^32 divided by the golden ratio, to the nearest prime
)

// Tuple is a connection as a client's packet carries it: from the client to the service. Both addresses are of one
// family, 4-byte or 16-byte, and neither is an IPv4-mapped IPv6 address.
type Tuple struct {
	Source, Destination netip.AddrPort
	Protocol            uint8 // IANA protocol number
}

// Hash is hash_tuple of bpf/hash.h, bit for bit: the hash of addresses, ports and protocol on which every edge host and
// both planes agree. Its high half chooses the slot ([SlotOf]), its low half the places in the bitmaps ([ExceptionBit],
// [FreshBit]). Words are wire bytes read little-endian, whatever the host's byte order.
func (t Tuple) Hash() uint64 {
	source, destination := t.Source.Addr(), t.Destination.Addr()
	var hash uint64
	if source.Is4() && destination.Is4() {
		hash = fold(0, word4(source)|word4(destination)<<32)
	} else {
		hash = fold16(fold16(0, source), destination)
	}
	hash ^= uint64(bits.ReverseBytes16(t.Source.Port())) | uint64(bits.ReverseBytes16(t.Destination.Port()))<<16
	return finish(hash ^ uint64(t.Protocol)<<32)
}

// HashClient is hash_client of bpf/hash.h: the hash of the client's address alone, used in place of [Tuple.Hash] to
// choose the slot of a service with `affinity: client`.
func HashClient(client netip.Addr) uint64 {
	if client.Is4() {
		return finish(fold(0, word4(client)))
	}
	return finish(fold16(0, client))
}

// SlotOf is slot_of of bpf/hash.h: it maps the high half of a hash to a slot in [0, ringSize) without a division
// (Lemire 2019, "Fast random integer generation in an interval").
func SlotOf(hash uint64, ringSize uint32) uint32 {
	return uint32((hash >> 32) * uint64(ringSize) >> 32)
}

// ExceptionBit is a connection's place in the exception bitmap, below [BitmapBits].
func ExceptionBit(hash uint64) uint32 {
	return uint32(hash) & (BitmapBits - 1)
}

// FreshBit is a connection's place in the fresh bitmap of an epoch, below [BitmapBits]. It moves with the epoch, so that
// two connections which share a bit in one epoch do not share it in the next.
func FreshBit(hash uint64, epoch uint32) uint32 {
	return uint32(hash) * (epoch*freshFold | 1) >> (32 - bitmapOrder)
}

func word4(address netip.Addr) uint64 {
	bytes := address.As4()
	return uint64(binary.LittleEndian.Uint32(bytes[:]))
}

func fold(hash, word uint64) uint64 {
	hash = (hash ^ word) * hashFold
	return hash ^ hash>>32
}

func fold16(hash uint64, address netip.Addr) uint64 {
	bytes := address.As16()
	hash = fold(hash, binary.LittleEndian.Uint64(bytes[:8]))
	return fold(hash, binary.LittleEndian.Uint64(bytes[8:]))
}

// finish is MurmurHash3's 64-bit finalizer (Appleby 2011, fmix64).
func finish(hash uint64) uint64 {
	hash ^= hash >> 33
	hash *= 0xff51afd7ed558ccd
	hash ^= hash >> 33
	hash *= 0xc4ceb9fe1a85ec53
	return hash ^ hash>>33
}
