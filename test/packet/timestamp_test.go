package packet

import (
	"encoding/binary"
	"fmt"
	"testing"

	"fairlead/bpf"

	"github.com/gopacket/gopacket/layers"
)

var nop = layers.TCPOption{OptionType: layers.TCPOptionKindNop}

// timestamps is the option (RFC 7323, section 3.2).
func timestamps(value, echo uint32) layers.TCPOption {
	data := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, value), echo)
	return layers.TCPOption{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: data}
}

// stamped is the segment with the option where all but SYNs have it (RFC 7323, appendix A).
func (s segment) stamped(value, echo uint32) segment {
	s.options = []layers.TCPOption{nop, nop, timestamps(value, echo)}
	return s
}

// stamps fails where the connection's entry has other timestamps.
func (c *conversation) stamps(value, echo uint32) {
	c.Helper()
	if entry := c.entry(); entry.Timestamp != value || entry.TimestampEcho != echo {
		c.Errorf("timestamps %#x, %#x; want %#x, %#x", entry.Timestamp, entry.TimestampEcho, value, echo)
	}
}

// epoch begins the next one: of each connection the next packet is looked up.
func (s *scene) epoch() {
	s.Helper()
	s.editControl(func(block *bpf.FairleadControlBlock) { block.Epoch++ })
}

// The client's timestamps are noted as its numbers are: of the packet that confirms, and of each that is believed and
// looked up.
func TestTimestamps(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2, ports: 100})
		// opened is a new connection whose last packet of the handshake has the option, or has not.
		opened := func(change func(segment) segment) *conversation {
			c := s.newClient()
			c.send(c.segment(syn, "").stamped(0x11111111, 0x22222222), forwardNew)
			if rewrites(method) {
				c.reply(c.answer(syn|ack, "").stamped(0x33333333, 0x11111111), replyHalfOpen)
			} else {
				c.answer(syn|ack, "")
			}
			c.send(change(c.segment(ack, "")), forwardHalfOpen, confirmed)
			return c
		}
		c := opened(func(s segment) segment { return s })
		c.stamps(0, 0)
		c = opened(func(s segment) segment { return s.stamped(0xfedcba98, 0x76543210) })
		c.stamps(0xfedcba98, 0x76543210)
		if rewrites(method) { // the backend's are not the client's
			c.reply(c.answer(ack, "hello").stamped(0x55555555, 0x66666666), replyTable)
			c.stamps(0xfedcba98, 0x76543210)
			c.send(c.segment(ack, "hello").stamped(0, 1), forwardTable)
		} else {
			c.answer(ack, "hello")
			c.send(c.segment(ack, "hello").stamped(0, 1), forwardTable, matured)
		}
		c.stamps(0, 1)
		for _, stamps := range [][2]uint32{{1, 0}, {0xffffffff, 0xffffffff}, {0x80, 0x0100}, {0x80, 0x0101}, {0x81, 0x0101}} {
			s.rebuildExceptions()
			s.epoch()
			c.send(c.segment(ack, "data").stamped(stamps[0], stamps[1]), forwardTable)
			c.stamps(stamps[0], stamps[1])
		}
		if !rewrites(method) { // by ring alone, nothing is noted
			c.send(c.segment(ack, "data").stamped(7, 8), forwardRing)
			c.stamps(0x81, 0x0101)
			s.epoch()
		}
		before := c.entry()
		c.send(c.segment(syn, "").stamped(9, 9), forwardTable)
		c.stays(before)
		c.seq--
		c.send(c.segment(ack, "data"), forwardTable)
		c.stamps(0, 0)
		s.epoch()

		// Of a packet that isn't believed nothing is.
		c.send(c.segment(ack, "data").stamped(20, 21), forwardTable)
		seq := c.seq
		for _, flags := range []uint8{fin | ack, rst, rst | ack} {
			c.send(c.segment(flags, "").atSequence(seq+1<<31).stamped(66, 67), forwardTable, closingUnfit)
			c.stamps(20, 21)
		}
		if rewrites(method) {
			c.send(c.segment(ack, "").atSequence(seq+1<<31).stamped(66, 67), forwardTable)
			c.stamps(20, 21)
			c.send(c.segment(ack, "").atSequence(seq-fitBehind-1).stamped(66, 67), forwardTable)
			c.stamps(20, 21)
		}
		c.seq = seq
		// A FIN is a packet of its own right, a RST none to go by.
		c.send(c.segment(fin|ack, "").stamped(30, 31), forwardTable, c.closingAlone()...)
		c.stamps(30, 31)
		c = opened(func(s segment) segment { return s.stamped(40, 41) })
		c.send(c.segment(rst|ack, "").stamped(50, 51), forwardTable, closingSeen)
		c.stamps(40, 41)
		c.send(c.segment(ack|psh, "I live").stamped(60, 61), forwardTable, takenBack)
		c.stamps(60, 61)

		// Of a condemned connection they are no longer asked for.
		c.condemn()
		c.send(c.segment(ack, "").stamped(70, 71), forwardReset)
		c.send(c.segment(ack, "").stamped(80, 81), resetCondemned)
		c.stamps(60, 61)
		if !rewrites(method) {
			c = s.newClient()
			c.send(c.segment(ack, "adopted").stamped(90, 91), forwardAdopted, confirmed)
			c.stamps(90, 91)
		}
	})
}

// Elsewhere than at its usual place the option is not looked for, nor beyond the header, nor in what stands there instead.
func TestTimestampsElsewhere(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{backends: 2})
		c := s.newClient()
		c.open()
		sack := layers.TCPOption{OptionType: layers.TCPOptionKindSACK, OptionLength: 10, OptionData: []byte("\x01\x02\x03\x04\x05\x06\x07\x08")}
		other := layers.TCPOption{OptionType: 9, OptionLength: 10, OptionData: sack.OptionData}
		short := timestamps(5, 6)
		short.OptionLength = 8
		short.OptionData = short.OptionData[:6]
		bare := "\x01\x01\x08\x0a\x00\x00\x00\x05\x00\x00\x00\x06"
		noted := uint32(0x1000)
		for name, change := range map[string]func(*segment) bool{
			"usual":                    func(s *segment) bool { return true },
			"others behind it":         func(s *segment) bool { s.options = append(s.options, nop, nop, sack); return true },
			"no payload":               func(s *segment) bool { s.payload = nil; return true },
			"none":                     func(s *segment) bool { s.options = nil; return false },
			"first of all, no padding": func(s *segment) bool { s.options = s.options[2:]; return false },
			"padding behind it":        func(s *segment) bool { s.options = append(s.options[2:], nop, nop); return false },
			"one of padding":           func(s *segment) bool { s.options = s.options[1:]; return false },
			"three of padding":         func(s *segment) bool { s.options = append([]layers.TCPOption{nop}, s.options...); return false },
			"behind another": func(s *segment) bool {
				s.options = append([]layers.TCPOption{nop, nop, sack}, s.options...)
				return false
			},
			"another of its length":      func(s *segment) bool { s.options = []layers.TCPOption{nop, nop, other}; return false },
			"of a length not its own":    func(s *segment) bool { s.options = []layers.TCPOption{nop, nop, short, nop, nop}; return false },
			"padding alone":              func(s *segment) bool { s.options = []layers.TCPOption{nop, nop, nop, nop}; return false },
			"in the payload, no options": func(s *segment) bool { s.options, s.payload = nil, []byte(bare); return false },
			"behind the packet":          func(s *segment) bool { s.options, s.payload, s.padding = nil, nil, []byte(bare); return false },
		} {
			t.Run(name, func(t *testing.T) {
				s.in(t)
				for _, urgent := range []bool{false, true} {
					noted += 0x10
					c.send(c.segment(ack, "").stamped(noted, noted+1), forwardTable)
					c.stamps(noted, noted+1)
					noted += 0x10
					data := c.segment(ack|psh, "data").stamped(noted, noted+1)
					if urgent {
						data.flags, data.urgent = data.flags|urg, 2
					}
					there := change(&data)
					c.seq = data.end()
					s.rebuildExceptions()
					s.epoch()
					c.send(data, forwardTable)
					if there {
						c.stamps(noted, noted+1)
					} else {
						c.stamps(0, 0)
					}
					s.epoch()
				}
			})
			s.in(t)
		}

		// A header that ends in the option, or before it: what follows is payload, whatever it looks like.
		for words := byte(5); words <= 9; words++ {
			t.Run(fmt.Sprint(words, " words"), func(t *testing.T) {
				s.in(t)
				s.epoch()
				data := c.segment(ack, "data").stamped(77, 78)
				c.seq = data.sequence
				frame := data.bytes()
				at := data.transportOffset() + 12
				sum := data.checksumOffset()
				change := uint32(words)<<12 | uint32(frame[at]&0x0f)<<8
				was := uint32(frame[at]) << 8
				// The checksum is right again: its word less the change (RFC 1624).
				check := uint32(^binary.BigEndian.Uint16(frame[sum:])) + ^was&0xffff + change
				for check > 0xffff {
					check = check&0xffff + check>>16
				}
				binary.BigEndian.PutUint16(frame[sum:], ^uint16(check))
				frame[at] = byte(change >> 8)
				c.sendShaped(data, frame, forwardTable)
				if words >= 8 {
					c.stamps(77, 78)
				} else {
					c.stamps(0, 0)
				}
				if entry := c.entry(); entry.SequenceEnd != data.sequence+uint32(len(data.payload))+(8-uint32(words))*4 {
					t.Errorf("sequence end %d behind a header of %d words", entry.SequenceEnd, words)
				}
			})
			s.in(t)
		}
	})
}

// sendShaped sends a frame whose TCP header says another length than the segment's: it leaves as it came but for what its
// way changes, which the segment's own frame shows.
func (c *conversation) sendShaped(s segment, frame []byte, v verdict) {
	c.Helper()
	action, out := c.run(c.Fairlead, frame, c.from)
	b := c.its()
	want := c.forwarded(s, 0).bytes()
	at := len(want) - (len(frame) - s.transportOffset()) // of the TCP header
	in := s.transportOffset()
	want[at+12] = frame[in+12]
	// Both checksums differ from the segments' own by the same.
	if rewrites(c.method) {
		sum := uint32(binary.BigEndian.Uint16(want[at+16:])) +
			uint32(binary.BigEndian.Uint16(frame[in+16:])) + uint32(^binary.BigEndian.Uint16(s.bytes()[in+16:]))
		for sum > 0xffff {
			sum = sum&0xffff + sum>>16
		}
		binary.BigEndian.PutUint16(want[at+16:], uint16(sum))
	} else {
		copy(want[at+16:at+18], frame[in+16:])
	}
	c.check(frame, c.from, action, out, expectation{verdict: v, frame: want, to: b.ifindex, service: c.scene.service.id, backend: c.backend})
}

// A frame whose first buffer ends within the option, or before it, has none at hand.
func TestTimestampsSplit(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{})
		c := s.newClient().open()
		data := c.segment(ack, "").stamped(77, 78).asLong(2000)
		frame := data.bytes()
		at := data.transportOffset()
		for first := at + 20; first <= at+36; first++ {
			c.send(c.segment(ack, "").stamped(1, 2).atSequence(data.sequence), forwardTable)
			c.stamps(1, 2)
			action, out, ok := s.runSplit(frame, first, c.from)
			if !ok {
				t.Skip("before Linux 6.18, the kernel's test run does not split a frame where it is told to")
			}
			s.check(frame, c.from, action, out, expectation{
				verdict: forwardTable, frame: c.forwarded(data, 0).bytes(), to: c.its().ifindex, service: 1, backend: 1,
			})
			if first >= at+32 {
				c.stamps(77, 78)
			} else {
				c.stamps(0, 0)
			}
		}
	})
}

// UDP has no options: what stands in a datagram is its own.
func TestTimestampsUDP(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := udpScene(t, f, method, plan{})
		// Where TCP's options would stand, behind 20 bytes of header, of which UDP's has eight.
		payload := "\x00\x00\x00\x00\x80\x10\x00\x00\x00\x00\x00\x00\x01\x01\x08\x0a\x00\x00\x00\x05\x00\x00\x00\x06"
		// Nor are they those of the packet before.
		over := s.beside(f.service, method, plan{})
		d := over.newClient()
		d.send(d.segment(syn, "").stamped(5, 6), forwardNew)
		c := s.newClient()
		c.send(c.datagram(payload), forwardNew)
		d.seq--
		d.send(d.segment(syn, "").stamped(5, 6), forwardHalfOpen)
		if rewrites(method) {
			c.reply(c.response(payload), replyHalfOpen, confirmed)
			c.stamps(0, 0)
			c.send(c.datagram(payload), forwardTable, matured)
		} else {
			c.age(udpProof)
			c.send(c.datagram(payload), forwardHalfOpen, confirmed)
			c.stamps(0, 0)
			c.age(udpProof)
			c.send(c.datagram(payload), forwardTable, matured)
		}
		c.stamps(0, 0)
	})
}
