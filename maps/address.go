package maps

import (
	"encoding/binary"
	"net/netip"

	"fairlead/bpf"
)

// The maps hold addresses and ports in network byte order. Go reads these bytes as numbers of the host's own order, as
// the generated types have it: the functions here are the only places that turn them.

func addressWords(a netip.Addr) (words [4]uint32) {
	if a.Is4() {
		b := a.As4()
		words[0] = binary.NativeEndian.Uint32(b[:])
		return words
	}
	b := a.As16()
	for i := range words {
		words[i] = binary.NativeEndian.Uint32(b[i*4:])
	}
	return words
}

func wordAddress4(word uint32) netip.Addr {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], word)
	return netip.AddrFrom4(b)
}

func wordsAddress(family uint8, words [4]uint32) netip.Addr {
	if family == familyIPv4 {
		return wordAddress4(words[0])
	}
	var b [16]byte
	for i, w := range words {
		binary.NativeEndian.PutUint32(b[i*4:], w)
	}
	return netip.AddrFrom16(b)
}

func portWire(port uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], port)
	return binary.NativeEndian.Uint16(b[:])
}

const (
	familyIPv4 = uint8(bpf.FairleadFamilyFAMILY_IPV4)
	familyIPv6 = uint8(bpf.FairleadFamilyFAMILY_IPV6)
)

func familyOf(a netip.Addr) uint8 {
	if a.Is4() {
		return familyIPv4
	}
	return familyIPv6
}

func tuple4(t Tuple) bpf.FairleadTuple4 {
	return bpf.FairleadTuple4{
		Saddr: addressWords(t.Source.Addr())[0], Daddr: addressWords(t.Destination.Addr())[0],
		Sport: portWire(t.Source.Port()), Dport: portWire(t.Destination.Port()), Protocol: t.Protocol,
	}
}

func tuple6(t Tuple) bpf.FairleadTuple6 {
	return bpf.FairleadTuple6{
		Saddr: addressWords(t.Source.Addr()), Daddr: addressWords(t.Destination.Addr()),
		Sport: portWire(t.Source.Port()), Dport: portWire(t.Destination.Port()), Protocol: t.Protocol,
	}
}

func fromTuple4(k *bpf.FairleadTuple4) Tuple {
	return Tuple{
		Source:      netip.AddrPortFrom(wordAddress4(k.Saddr), portWire(k.Sport)),
		Destination: netip.AddrPortFrom(wordAddress4(k.Daddr), portWire(k.Dport)),
		Protocol:    k.Protocol,
	}
}

func fromTuple6(k *bpf.FairleadTuple6) Tuple {
	return Tuple{
		Source:      netip.AddrPortFrom(wordsAddress(familyIPv6, k.Saddr), portWire(k.Sport)),
		Destination: netip.AddrPortFrom(wordsAddress(familyIPv6, k.Daddr), portWire(k.Dport)),
		Protocol:    k.Protocol,
	}
}

// name reads a label's text, which ends at the first zero byte.
func name(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

func label(s string) (b [bpf.FairleadLimitsMAX_NAME]byte) {
	copy(b[:len(b)-1], s)
	return b
}
