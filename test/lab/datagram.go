package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
)

// A datagram of a flow is a head, a server's name in answers, and then filling up to its size, which follows from
// the head, so that each end knows every byte of what the other sends. Numbers are in network byte order.
//
//	0 magic   4 kind   5 length of the name   6 size of the answer asked for
//	8 flow   16 sequence   24 the server's number for the flow   32 name, filling
const (
	datagramMagic = 0x666c6f77 // flow
	datagramHead  = 32

	kindQuestion = 1
	kindAnswer   = 2

	// minDatagram leaves room for a name.
	minDatagram = datagramHead + 32
	// MaxWhole is the largest datagram that fits 1500 bytes of Ethernet inside any tunnel over IPv6.
	MaxWhole = 1400
	// A client's first datagram has 1200 bytes at least, as QUIC's (RFC 9000, section 14.1).
	initialDatagram = 1200
)

// datagram is what a datagram's head says.
type datagram struct {
	kind     byte
	flow     uint64 // chosen by the client, at random
	sequence uint64 // of the question, from 1
	answer   int    // of a question: bytes that its answer is to have
	server   string // of an answer: who gives it
	number   uint64 // of an answer: the server's number for the flow
}

// encode makes a datagram of so many bytes.
func (d datagram) encode(size int) []byte {
	b := make([]byte, datagramHead, max(size, datagramHead+len(d.server)))
	binary.BigEndian.PutUint32(b, datagramMagic)
	b[4], b[5] = d.kind, byte(len(d.server))
	binary.BigEndian.PutUint16(b[6:], uint16(d.answer))
	binary.BigEndian.PutUint64(b[8:], d.flow)
	binary.BigEndian.PutUint64(b[16:], d.sequence)
	binary.BigEndian.PutUint64(b[24:], d.number)
	b = append(b, d.server...)
	filling := b[len(b):cap(b)]
	d.fill(filling)
	return b[:cap(b)]
}

func (d datagram) fill(filling []byte) {
	var seed [32]byte
	seed[0] = d.kind
	binary.BigEndian.PutUint64(seed[8:], d.flow)
	binary.BigEndian.PutUint64(seed[16:], d.sequence)
	rand.NewChaCha8(seed).Read(filling)
}

var errNoDatagram = errors.New("not a flow's datagram")

// decode reads a datagram and compares its filling.
func decodeDatagram(b []byte) (d datagram, err error) {
	if len(b) < datagramHead || binary.BigEndian.Uint32(b) != datagramMagic || len(b) < datagramHead+int(b[5]) {
		return d, fmt.Errorf("%w: %d bytes, %.8x", errNoDatagram, len(b), b)
	}
	d = datagram{
		kind: b[4], answer: int(binary.BigEndian.Uint16(b[6:])), flow: binary.BigEndian.Uint64(b[8:]),
		sequence: binary.BigEndian.Uint64(b[16:]), number: binary.BigEndian.Uint64(b[24:]),
	}
	got := b[datagramHead:]
	d.server, got = string(got[:b[5]]), got[b[5]:]
	want := make([]byte, len(got))
	d.fill(want)
	for i := range got {
		if got[i] != want[i] {
			return d, fmt.Errorf("byte %d of %d is %#x, not %#x", len(b)-len(got)+i, len(b), got[i], want[i])
		}
	}
	return d, nil
}
