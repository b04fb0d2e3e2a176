package maps

import (
	"encoding/binary"
	"math"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// The expected numbers were computed by bpf/hash.h itself, compiled for the host. They must never change: edge hosts of
// different versions share their connections by them.
func TestHashGolden(t *testing.T) {
	for _, want := range []struct {
		source, destination     string
		protocol                uint8
		hash, client            uint64
		slot, exception, f1, f2 uint32 // slot of 65537; fresh bits of the epochs 1 and 0xdeadbeef
	}{
		{"0.0.0.0:0", "0.0.0.0:0", 0, 0, 0, 0, 0, 0, 0},
		{"192.0.2.1:49152", "198.51.100.10:443", 6, 0x7aceb598c016c52a, 0x539b552800983f50, 31439, 0x6c52a, 0xdaf52, 0xd0558},
		{"192.0.2.1:49153", "198.51.100.10:443", 6, 0xdeae0418c3f414d4, 0x539b552800983f50, 57006, 0x414d4, 0x2b269, 0xbdc82},
		{"192.0.2.1:443", "198.51.100.10:49152", 6, 0x849f9aafddcf4cda, 0x539b552800983f50, 33952, 0xf4cda, 0x667d2, 0x1bc0c},
		{"198.51.100.10:49152", "192.0.2.1:443", 6, 0x8ead9fdb89cf9775, 0xaffe78497b0b5006, 36526, 0xf9775, 0x27410, 0xcc168},
		{"192.0.2.1:49152", "198.51.100.10:443", 17, 0x68c5f5c2caa10384, 0x539b552800983f50, 26822, 0x10384, 0x6d58d, 0x11eec},
		{"255.255.255.255:65535", "255.255.255.255:65535", 255,
			0x3ae7dc26985412bd, 0xab60e1de682b9893, 15080, 0x412bd, 0xbb974, 0x3ad52},
		{"[::]:0", "[::]:0", 0, 0, 0, 0, 0, 0, 0},
		{"[2001:db8::1]:49152", "[2001:db8:ffff::10]:443", 6,
			0x951d22a95188371b, 0xfbfb5e8689d908b9, 38173, 0x8371b, 0x4206d, 0x25bde},
		{"[2001:db8::2]:49152", "[2001:db8:ffff::10]:443", 6,
			0xfb1a9333334ed98d, 0xfdb225a0fe3be531, 64283, 0xed98d, 0x81a30, 0xea333},
		{"[2001:db8::1]:49152", "[2001:db8:ffff::10]:443", 17,
			0x4a09b1c0f66b6084, 0xfbfb5e8689d908b9, 18953, 0xb6084, 0x55381, 0x4f8da},
		{"[102:304:506:708:90a:b0c:d0e:f10]:258", "[1112:1314:1516:1718:191a:1b1c:1d1e:1f20]:772", 6,
			0x8863dfd2d62d17ff, 0x1caa8220982ea2aa, 34916, 0xd17ff, 0xef4e1, 0x61cfe},
	} {
		tuple := Tuple{netip.MustParseAddrPort(want.source), netip.MustParseAddrPort(want.destination), want.protocol}
		hash := tuple.Hash()
		if hash != want.hash {
			t.Errorf("hash of %+v is %#016x, want %#016x", tuple, hash, want.hash)
			continue
		}
		if client := HashClient(tuple.Source.Addr()); client != want.client {
			t.Errorf("hash of client %s is %#016x, want %#016x", tuple.Source.Addr(), client, want.client)
		}
		if slot := SlotOf(hash, 65537); slot != want.slot {
			t.Errorf("slot of %#016x is %d, want %d", hash, slot, want.slot)
		}
		if bit := ExceptionBit(hash); bit != want.exception {
			t.Errorf("exception bit of %#016x is %#05x, want %#05x", hash, bit, want.exception)
		}
		if f1, f2 := FreshBit(hash, 1), FreshBit(hash, 0xdeadbeef); f1 != want.f1 || f2 != want.f2 {
			t.Errorf("fresh bits of %#016x are %#05x and %#05x, want %#05x and %#05x", hash, f1, f2, want.f1, want.f2)
		}
	}
}

func TestSlotOfBounds(t *testing.T) {
	for _, size := range []uint32{1, 2, 3, 65537, math.MaxUint32} {
		if first, last := SlotOf(math.MaxUint32, size), SlotOf(math.MaxUint64, size); first != 0 || last != size-1 {
			t.Errorf("ring of %d: the least high half has slot %d, the greatest %d; want 0 and %d", size, first, last, size-1)
		}
	}
}

// address4 and address6 count from a base: the client numbered i of a run of neighbours.
func address4(base string, i uint32) netip.Addr {
	bytes := netip.MustParseAddr(base).As4()
	binary.BigEndian.PutUint32(bytes[:], binary.BigEndian.Uint32(bytes[:])+i)
	return netip.AddrFrom4(bytes)
}

func address6(base string, prefixes, i uint64) netip.Addr {
	bytes := netip.MustParseAddr(base).As16()
	binary.BigEndian.PutUint64(bytes[:8], binary.BigEndian.Uint64(bytes[:8])+prefixes)
	binary.BigEndian.PutUint64(bytes[8:], binary.BigEndian.Uint64(bytes[8:])+i)
	return netip.AddrFrom16(bytes)
}

// What real clients have in common: neighbouring addresses and ports. The inputs are fixed, so the outcome is too.
func TestHashSpreadsStructuredInput(t *testing.T) {
	const many = 1 << 19
	service4, service6 := netip.MustParseAddrPort("198.51.100.10:443"), netip.MustParseAddrPort("[2001:db8:ffff::10]:443")
	tcp := func(source netip.Addr, port uint32, service netip.AddrPort) uint64 {
		return Tuple{netip.AddrPortFrom(source, uint16(port)), service, 6}.Hash()
	}
	one4, one6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, input := range []struct {
		name  string
		count uint32
		hash  func(i uint32) uint64
	}{
		{"v4 source ports", 1 << 16, func(i uint32) uint64 { return tcp(one4, i, service4) }},
		{"v4 even source ports", 1 << 15, func(i uint32) uint64 { return tcp(one4, 2*i, service4) }},
		{"v4 service ports", 1 << 16, func(i uint32) uint64 {
			return tcp(one4, 40000, netip.AddrPortFrom(service4.Addr(), uint16(i)))
		}},
		{"v4 addresses", many, func(i uint32) uint64 { return tcp(address4("10.0.0.0", i), 40000, service4) }},
		{"v4 networks", 1 << 16, func(i uint32) uint64 { return tcp(address4("10.0.0.1", i<<8), 40000, service4) }},
		{"v4 addresses and ports", many, func(i uint32) uint64 {
			return tcp(address4("10.0.0.0", i>>7), 32768+i&127, service4)
		}},
		{"v4 ports that follow addresses", 1 << 16, func(i uint32) uint64 { return tcp(address4("10.0.0.0", i), i, service4) }},
		{"v4 clients alone", many, func(i uint32) uint64 { return HashClient(address4("10.0.0.0", i)) }},
		{"v6 source ports", 1 << 16, func(i uint32) uint64 { return tcp(one6, i, service6) }},
		{"v6 addresses", many, func(i uint32) uint64 {
			return tcp(address6("2001:db8::", 0, uint64(i)), 40000, service6)
		}},
		{"v6 networks", many, func(i uint32) uint64 {
			return tcp(address6("2001:db8::1", uint64(i), 0), 40000, service6)
		}},
		{"v6 addresses and ports", many, func(i uint32) uint64 {
			return tcp(address6("2001:db8::", 0, uint64(i>>7)), 32768+i&127, service6)
		}},
		{"v6 clients alone", many, func(i uint32) uint64 { return HashClient(address6("2001:db8::", uint64(i), 1)) }},
	} {
		t.Run(input.name, func(t *testing.T) {
			hashes := make([]uint64, input.count)
			for i := range hashes {
				hashes[i] = input.hash(uint32(i))
			}
			for _, place := range []struct {
				name    string
				buckets uint32
				of      func(hash uint64) uint32
			}{
				{"slot of 1021", 1021, func(hash uint64) uint32 { return SlotOf(hash, 1021) }},
				{"slot of 65537", 65537, func(hash uint64) uint32 { return SlotOf(hash, 65537) }},
				{"exception bit, low", 1 << 10, func(hash uint64) uint32 { return ExceptionBit(hash) & 1023 }},
				{"exception bit, high", 1 << 10, func(hash uint64) uint32 { return ExceptionBit(hash) >> 10 }},
				{"slot with exception bit", 31 * 32, func(hash uint64) uint32 { return SlotOf(hash, 31)*32 + ExceptionBit(hash)&31 }},
				{"fresh bit, epoch 0", 1 << 10, func(hash uint64) uint32 { return FreshBit(hash, 0) >> 10 }},
				{"fresh bit, epoch 1", 1 << 10, func(hash uint64) uint32 { return FreshBit(hash, 1) & 1023 }},
				{"fresh bit, epoch 7", 1 << 10, func(hash uint64) uint32 { return FreshBit(hash, 7) >> 10 }},
			} {
				if input.count < 5*place.buckets {
					continue // too few in each bucket for chi-square to mean anything
				}
				counts := make([]float64, place.buckets)
				for _, hash := range hashes {
					counts[place.of(hash)]++
				}
				expected, square := float64(input.count)/float64(place.buckets), 0.0
				for _, count := range counts {
					square += (count - expected) * (count - expected) / expected
				}
				// For so many degrees of freedom, chi-square is nearly normal: mean df, variance 2 df.
				freedom := float64(place.buckets - 1)
				if deviations := (square - freedom) / math.Sqrt(2*freedom); math.Abs(deviations) > 4.5 {
					t.Errorf("%s: chi-square %.0f with %.0f degrees of freedom, %+.1f standard deviations from even",
						place.name, square, freedom, deviations)
				}
			}
		})
	}
}

// Each bit of a tuple, turned over, turns over each bit of its hash in half of all cases.
func TestHashAvalanche(t *testing.T) {
	const samples = 4000
	random := rand.New(rand.NewPCG(2016, 34))
	for name, length := range map[string]int{"v4": 13, "v6": 37} {
		hash := func(bytes []byte) uint64 {
			wide := (length - 5) / 2
			source, _ := netip.AddrFromSlice(bytes[:wide])
			destination, _ := netip.AddrFromSlice(bytes[wide : 2*wide])
			ports := bytes[2*wide:]
			return Tuple{
				netip.AddrPortFrom(source, binary.BigEndian.Uint16(ports)),
				netip.AddrPortFrom(destination, binary.BigEndian.Uint16(ports[2:])), ports[4],
			}.Hash()
		}
		bytes := make([]byte, length)
		for bit := range 8 * length {
			var turned [64]int
			for range samples {
				for i := range bytes {
					bytes[i] = byte(random.Uint32())
				}
				before := hash(bytes)
				bytes[bit/8] ^= 1 << (bit % 8)
				for changed := before ^ hash(bytes); changed != 0; changed &= changed - 1 {
					turned[bits.TrailingZeros64(changed)]++
				}
			}
			for i, count := range turned {
				if rate := float64(count) / samples; math.Abs(rate-0.5) > 0.05 {
					t.Errorf("%s: bit %d of the tuple turns bit %d of the hash in %.3f of cases", name, bit, i, rate)
				}
			}
		}
	}
}

// Connections that share a fresh bit must part in the next epoch, or one would delay the other's touch for ever.
func TestFreshBitParts(t *testing.T) {
	random := rand.New(rand.NewPCG(10, 20))
	hashes := make([]uint64, 200_000)
	for i := range hashes {
		hashes[i] = random.Uint64()
	}
	for _, epoch := range []uint32{0, 1, 2, 7, 1 << 20, math.MaxUint32} {
		first := make(map[uint32]uint64, len(hashes))
		shared, again := 0, 0
		for _, hash := range hashes {
			other, ok := first[FreshBit(hash, epoch)]
			if !ok {
				first[FreshBit(hash, epoch)] = hash
			} else if uint32(other) != uint32(hash) {
				shared++
				if FreshBit(hash, epoch+1) == FreshBit(other, epoch+1) {
					again++
				}
			}
		}
		if shared < 10_000 || again > 3 {
			t.Errorf("epoch %d: of %d pairs that share a fresh bit %d share it in the next epoch too", epoch, shared, again)
		}
	}
}

func TestHashDoesNotAllocate(t *testing.T) {
	tuple := Tuple{netip.MustParseAddrPort("[2001:db8::1]:49152"), netip.MustParseAddrPort("[2001:db8:ffff::10]:443"), 6}
	var sum uint64
	hash := func() { sum += tuple.Hash() + HashClient(tuple.Source.Addr()) }
	if allocations := testing.AllocsPerRun(100, hash); allocations != 0 {
		t.Errorf("hashing allocates %v times", allocations)
	}
}

func BenchmarkTupleHash(b *testing.B) {
	for name, tuple := range map[string]Tuple{
		"v4": {netip.MustParseAddrPort("192.0.2.1:49152"), netip.MustParseAddrPort("198.51.100.10:443"), 6},
		"v6": {netip.MustParseAddrPort("[2001:db8::1]:49152"), netip.MustParseAddrPort("[2001:db8:ffff::10]:443"), 6},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				tuple.Hash()
			}
		})
	}
}
