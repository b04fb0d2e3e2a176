package packet

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"fairlead/bpf"
)

// unseen tells the methods whose backends' replies go past us.
func unseen(method bpf.FairleadMethod) bool { return !rewrites(method) }

// udpScene is a service over UDP.
func udpScene(t *testing.T, f family, method bpf.FairleadMethod, p plan) *scene {
	t.Helper()
	p.udp = true
	return newScene(t, f, method, p)
}

// Where replies are seen, one confirms; the connection is young until its client sends again.
func TestUDPReplied(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, _ plan) {
		for _, twoArms := range []bool{false, true} {
			t.Run(fmt.Sprintf("twoArms=%t", twoArms), func(t *testing.T) {
				s := udpScene(t, f, w.method, plan{backends: 3, twoArms: twoArms})
				c := s.newClient()
				c.send(c.datagram("anybody?"), forwardNew)
				half, found := s.halfOpen(c.client, f.service)
				if !found || half.Backend != c.backend || half.State != 0 {
					t.Fatalf("half-open entry %+v, found %t", half, found)
				}
				for range 3 { // however often it asks
					c.send(c.datagram(""), forwardHalfOpen)
				}
				c.absent()
				s.count(0, 0)

				c.reply(c.response("yes"), replyHalfOpen, confirmed)
				s.count(1, 1)
				c.state(young)
				if entry := c.entry(); entry.Backend != c.backend || entry.Generation != half.Generation ||
					entry.Opened != half.First || entry.Service != 1 {
					t.Errorf("entry %+v after half-open entry %+v", entry, half)
				}
				if _, found := s.halfOpen(c.client, f.service); found {
					t.Error("the half-open entry stayed after the confirmation")
				}
				c.reply(c.response("are you there?"), replyTable)
				c.state(young)
				c.send(c.datagram("yes"), forwardTable, matured)
				c.state(0)
				s.count(1, 0)
				for range 3 {
					c.send(c.datagram("ping"), forwardTable)
					c.reply(c.response("pong"), replyTable)
				}

				// Idle, and taken back by either end.
				s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
				c.send(c.datagram("I am back"), forwardTable, takenBack)
				s.tendWant("mark idle", tendDone, c.asSeen(tendMarkIdle))
				c.reply(c.response("so am I"), replyTable, takenBack)
				s.remove(c)
				s.count(0, 0)
				c.reply(c.response("hello?"), passReplyUnknown)
				c.send(c.datagram("who?"), forwardNew)
				s.checkTables()
			})
		}
	})
}

// Where they go past us, a packet a second after the first confirms, and one a second later shows a client that is there
// to stay: from then on the ring answers alone.
func TestUDPUnseen(t *testing.T) {
	eachWay(t, unseen, func(t *testing.T, f family, w way, p plan) {
		p.backends = 3
		s := udpScene(t, f, w.method, p)
		c := s.newClient()
		c.send(c.datagram("anybody?"), forwardNew)
		if !s.exception(c.client, f.service) {
			t.Error("no exception bit of a half-open connection")
		}
		half, _ := s.halfOpen(c.client, f.service)
		s.await(half.First + udpProof)
		c.send(c.datagram("anybody?"), forwardHalfOpen, confirmed)
		s.count(1, 1)
		c.state(young | noReplies)
		if entry := c.entry(); entry.Opened != half.First {
			t.Errorf("opened at tick %d, its first packet was seen at %d", entry.Opened, half.First)
		}
		if s.fresh(c.client, f.service) {
			t.Error("a young connection has its fresh bit")
		}
		s.await(half.First + 2*udpProof)
		c.send(c.datagram("anybody?"), forwardTable, matured)
		s.count(1, 0)
		c.state(noReplies)
		c.send(c.datagram("anybody?"), forwardTable)
		s.rebuildExceptions()
		before := c.entry()
		c.send(c.datagram("fast"), forwardRing)
		if after := c.entry(); after != before {
			t.Errorf("the fast path touched the table: %+v, was %+v", after, before)
		}
		s.editControl(func(block *bpf.FairleadControlBlock) { block.Epoch++ })
		c.send(c.datagram("looked up"), forwardTable)
		c.send(c.datagram("fast"), forwardRing)

		// Less than that shows nothing.
		for range 50 {
			c = s.newClient()
			c.send(c.datagram("anybody?"), forwardNew)
			if !c.early(udpProof, forwardHalfOpen) {
				continue
			}
			c.absent()
			c.age(udpProof)
			c.send(c.datagram("anybody?"), forwardHalfOpen, confirmed)
			if !c.early(2*udpProof, forwardTable) {
				continue
			}
			c.state(young | noReplies)
			return
		}
		t.Error("the clock went on by too much, each time")
	})
}

// early sends a datagram of the connection a little before it is so old. False: it was too late.
func (c *conversation) early(old uint32, v verdict) bool {
	c.Helper()
	const before = 6 // ticks
	first := c.tick() - old + before
	c.age(c.first() - first)
	data := c.datagram("so soon?")
	frame := data.bytes()
	action, out := c.run(c.Fairlead, frame, c.from)
	if c.tick()-first >= old {
		c.want = c.counted()
		return false
	}
	c.check(frame, c.from, action, out, expectation{
		verdict: v, frame: c.forwarded(data, 0).bytes(), service: c.scene.service.id, backend: c.backend, to: c.its().ifindex,
	})
	return true
}

// TCP and UDP of the same addresses and ports are two services, and their connections don't meet.
func TestUDPBesideTCP(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		over := newScene(t, f, method, plan{backends: 2, ports: 8})
		under := over.beside(f.service, method, plan{backends: 2, ports: 8, udp: true})
		for range 6 {
			tcp, udp := over.newClient(), under.newClient()
			if tcp.client != udp.client {
				t.Fatalf("%s and %s, want the same", tcp.client, udp.client)
			}
			udp.send(udp.datagram("anybody?"), forwardNew)
			tcp.open()
			udp.finishOpening()
			tcp.send(tcp.segment(fin|ack, ""), forwardTable, tcp.closingAlone()...)
			udp.send(udp.datagram("still here"), forwardTable)
			udp.state(map[bool]uint32{true: 0, false: noReplies}[rewrites(method)])
			if rewrites(method) {
				tcp.reply(tcp.answer(rst, ""), replyTable, closingSeen)
				udp.reply(udp.response("so am I"), replyTable)
			}
		}
		over.count(12, 0)
	})
}

// Headers in all their shapes are forwarded there and back.
func TestUDPVariants(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := udpScene(t, f, method, plan{backends: 2})
		for _, v := range variants(f) {
			t.Run(v.name, func(t *testing.T) {
				s.in(t)
				c := s.newClient()
				first := c.datagram("first")
				v.make(&first)
				c.send(first, forwardNew)
				c.finishOpening()
				s.rebuildExceptions()
				data := c.datagram("data")
				v.make(&data)
				c.send(data, c.settledVerdict())
				if rewrites(method) {
					data := c.response("data")
					v.make(&data)
					c.reply(data, replyTable)
				}
			})
		}
	})
}

// UDP's checksums are mended, never repaired. None stays none, and a sum that comes out as zero, which would say that
// there is none, is all ones.
func TestUDPChecksums(t *testing.T) {
	eachWay(t, rewrites, func(t *testing.T, f family, w way, p plan) {
		s := udpScene(t, f, w.method, p)
		c := s.newClient().open()
		b := s.backends[0]
		random := rand.New(rand.NewPCG(3, 4))
		for range 300 {
			payload := make([]byte, random.IntN(64))
			for i := range payload {
				payload[i] = byte(random.Uint32())
			}
			data, answer := c.datagram(string(payload)), c.response(string(payload))
			data.noChecksum = random.IntN(4) == 0
			answer.noChecksum = random.IntN(4) == 0
			c.send(data, forwardTable)
			c.reply(answer, replyTable)
		}

		// A payload makes the sum zero as it goes in, or as it comes out: on the wire it is all ones.
		ones := func(name string, s segment, as segment) segment {
			s.payload, as.payload = []byte("\x00\x00"), []byte("\x00\x00")
			at := as.checksumOffset()
			sum := slices.Clone(as.bytes()[at : at+2])
			s.payload, as.payload = sum, sum
			if got := binary.BigEndian.Uint16(as.bytes()[at:]); got != 0xffff {
				t.Fatalf("%s: checksum %#x, want all ones", name, got)
			}
			return s
		}
		data := c.datagram("")
		c.send(ones("sent", data, data), forwardTable)
		data = c.datagram("")
		c.send(ones("forwarded", data, data.between(c.source, b.address)), forwardTable)
		data = c.response("")
		c.reply(ones("answered", data, data), replyTable)
		data = c.response("")
		c.reply(ones("returned", data, data.between(f.service, c.client)), replyTable)

		for _, wrong := range []uint16{0x0001, 0x8000, 0x1234, 0xfffe} {
			data := c.datagram("what")
			frame := data.bytes()
			at := data.checksumOffset()
			binary.BigEndian.PutUint16(frame[at:], binary.BigEndian.Uint16(frame[at:])^wrong)
			action, out := s.run(s.Fairlead, frame, theKernel.front)
			s.check(frame, theKernel.front, action, out,
				expectation{verdict: forwardTable, frame: out, service: 1, backend: 1, to: theKernel.front.index})
			sent := data.between(c.source, b.address)
			if before, after := data.residual(frame), sent.residual(out); before != after || before == 0 {
				t.Errorf("checksum wrong by %#x came out wrong by %#x", before, after)
			}
		}
	})
}

// Lengths that contradict each other are dropped, and so is what was cut short; bytes behind the datagram are not ours to
// judge.
func TestUDPLengths(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := udpScene(t, f, method, plan{})
		c := s.newClient().open()
		s.rebuildExceptions()
		lengths := func(packet segment, give func(segment, []byte, verdict, ...event)) {
			t.Helper()
			at := packet.transportOffset() + 4
			whole := uint16(8 + len(packet.payload))
			for length, v := range map[uint16]verdict{
				0: dropBadHeader, 7: dropBadHeader, whole + 1: dropBadHeader, 0xffff: dropBadHeader,
			} {
				frame := packet.bytes()
				binary.BigEndian.PutUint16(frame[at:], length)
				give(packet, frame, v)
			}
			frame := packet.bytes()
			for n := ethernetHeader; n < len(frame); n++ {
				v := dropTruncated
				if n < packet.transportOffset()+4 {
					v = passNotOurs
				}
				give(packet, frame[:n], v)
			}
			// An IP packet that ends in the UDP header.
			short := packet
			short.payload = nil
			frame = short.bytes()
			if f.name == "ipv4" {
				binary.BigEndian.PutUint16(frame[ethernetHeader+2:], 27)
			} else {
				binary.BigEndian.PutUint16(frame[ethernetHeader+4:], 7)
			}
			give(short, frame, dropBadHeader)
		}
		lengths(c.datagram("payload"), c.sendRaw)
		if rewrites(method) {
			lengths(c.response("payload"), c.replyRaw)
		}
	})
}

// Nobody who could take it: the client is told by ICMP that nobody is at the port, and hears its own packet again.
func TestUDPRefused(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		// Room for as many answers as there are variants.
		s := udpScene(t, f, method, plan{backends: 2, settings: []setting{constant("answers_a_tick", uint32(1000))}})
		living := s.newClient().open()
		s.rebuildExceptions()
		refused := func(v verdict) {
			t.Helper()
			for _, variant := range variants(f) {
				c := s.newClient()
				first := c.datagram(strings.Repeat("x", len(variant.name)))
				variant.make(&first)
				c.send(first, v)
				if _, found := s.halfOpen(c.client, f.service); found {
					t.Fatal("a refused packet is in the half-open table")
				}
			}
			// About what is quoted at most.
			for _, length := range []int{0, 1, 400, 511, 512, 513, 1472} {
				c := s.newClient()
				c.send(c.datagram(strings.Repeat("q", length)), v)
			}
		}
		s.service.flags |= bpf.FairleadServiceFlagSERVICE_LEAVING
		s.setService(s.service)
		refused(resetLeaving)
		living.send(living.datagram("I stay"), living.settledVerdict())
		s.service.flags &^= bpf.FairleadServiceFlagSERVICE_LEAVING
		for slot := range s.service.ring {
			s.service.ring[slot] = uint32(bpf.FairleadSlotSLOT_NONE | bpf.FairleadSlotSLOT_UNSETTLED)
		}
		s.setService(s.service)
		refused(resetNoBackend)
		living.send(living.datagram("I stay"), forwardTable)
	})
}

// So is one whose method needs room that there is not: in the table, or among the ports.
func TestUDPNoRoom(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, method := range []bpf.FairleadMethod{fullnat, nat} {
			t.Run(fmt.Sprint("table full, method ", method), func(t *testing.T) {
				s := udpScene(t, f, method, plan{ports: 8, settings: []setting{constant("connection_capacity", uint32(3))}})
				early := s.newClient()
				early.send(early.datagram(""), forwardNew)
				for range 3 {
					s.newClient().open()
				}
				late := s.newClient()
				late.send(late.datagram("me too"), resetTableFull, tableFull)
				// Whose first packet there was room for is served while half-open, and noted once there is room again.
				early.reply(early.response("yes"), replyHalfOpen, tableFull)
				early.send(early.datagram("good"), forwardHalfOpen, tableFull)
				s.count(3, 0)
			})
		}
		s := udpScene(t, f, fullnat, plan{ports: 2})
		a, b := s.newClient().open(), s.newClient().open()
		c := s.newClient()
		c.send(c.datagram("me too"), resetNoPort)
		s.remove(a)
		c.send(c.datagram("now?"), forwardNew)
		c.finishOpening()
		if c.source != a.source {
			t.Errorf("given %s, want %s, which had come home", c.source, a.source)
		}
		b.reply(b.response("untouched"), replyTable)

		// Who is half-open may be robbed, as over TCP, and is new again then.
		s = udpScene(t, f, fullnat, plan{ports: 1})
		robbed, thief := s.newClient(), s.newClient()
		robbed.send(robbed.datagram("mine"), forwardNew)
		thief.send(thief.datagram("mine"), forwardNew, portStolen)
		thief.finishOpening()
		robbed.send(robbed.datagram("mine!"), resetNoPort)
		s.count(1, 0)
	})
}

// A backend that is down: its clients are told, or not, by the service's policy.
func TestUDPBackendDown(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		for _, policy := range []bpf.FairleadDownPolicy{
			bpf.FairleadDownPolicyDOWN_RESET, bpf.FairleadDownPolicyDOWN_KEEP, bpf.FairleadDownPolicyDOWN_REHASH,
		} {
			t.Run(fmt.Sprint("policy ", policy), func(t *testing.T) {
				s := udpScene(t, f, method, plan{backends: 2, policy: policy})
				c, other := s.clientOf(1).open(), s.clientOf(2).open()
				half := s.clientOf(1)
				half.send(half.datagram("anybody?"), forwardNew)
				s.rebuildExceptions()
				s.backends[0].flags &^= bpf.FairleadBackendFlagBACKEND_UP
				s.setBackend(s.backends[0])
				for slot, backend := range s.service.ring {
					if backend == 1 {
						s.service.ring[slot] = 2 | uint32(bpf.FairleadSlotSLOT_UNSETTLED)
					}
				}
				s.setRing(1, s.service.ring)
				switch {
				case policy == bpf.FairleadDownPolicyDOWN_RESET,
					policy == bpf.FairleadDownPolicyDOWN_REHASH && rewrites(method):
					// Told once. Then it is new, as it can't say that it begins anew.
					c.send(c.datagram("are you there?"), resetBackendDown)
					before := s.control().Connections
					c.backend = 2
					c.send(c.datagram("anybody?"), forwardNew)
					if rewrites(method) {
						c.reply(c.response("yes"), replyHalfOpen, removed, confirmed)
					} else {
						c.age(udpProof)
						c.send(c.datagram("anybody?"), forwardHalfOpen, removed, confirmed)
					}
					if after := s.control().Connections; after != before {
						t.Errorf("%d connections, were %d", after, before)
					}
					if c.entry().Backend != 2 {
						t.Error("the new connection's entry names the old backend")
					}
				case policy == bpf.FairleadDownPolicyDOWN_REHASH:
					c.backend = 2
					c.send(c.datagram("are you there?"), forwardTable)
					if c.entry().Backend != 2 {
						t.Error("the rehashed connection's entry names its old backend")
					}
				default:
					c.send(c.datagram("are you there?"), forwardTable)
				}
				other.send(other.datagram(""), other.settledVerdict())

				// Who was half-open has no handshake to lose.
				half.backend = 2
				half.send(half.datagram("anybody?"), forwardNew)
				half.finishOpening()
			})
		}
	})
}

// Answers have a limit, a tick: what is over it is dropped by name.
func TestUDPAnswersLimited(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		leaving := func(limit uint32) *scene {
			return udpScene(t, f, dsr, plan{flags: bpf.FairleadServiceFlagSERVICE_LEAVING,
				settings: []setting{constant("answers_a_tick", limit)}})
		}
		s := leaving(0)
		for range 3 {
			c := s.newClient()
			c.send(c.datagram("anybody?"), dropLimited)
		}
		s = leaving(2)
		first := s.tick()
		for range 50 {
			c := s.newClient()
			_, _ = s.run(s.Fairlead, c.datagram("").bytes(), c.from)
		}
		ticks := uint64(s.tick() - first + 1)
		counted := s.counted()
		answered, dropped := counted.Verdicts[resetLeaving], counted.Verdicts[dropLimited]
		if answered < 2 || answered > 2*ticks || answered+dropped != 50 || counted.Services[1].Refused != 50 {
			t.Errorf("%d answered and %d not in %d ticks of 2, refused %d", answered, dropped, ticks,
				counted.Services[1].Refused)
		}
	})
}

// Young entries have a budget: over UDP as well, whoever finds it spent is served as half-open, and one whose client goes
// on after a reply is grown at once.
func TestUDPYoungBudget(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		for _, method := range []bpf.FairleadMethod{fullnat, nat, dsr} {
			t.Run(fmt.Sprint("method ", method), func(t *testing.T) {
				s := udpScene(t, f, method, plan{settings: []setting{constant("young_budget", uint32(1))}})
				first, second := s.newClient(), s.newClient()
				for _, c := range []*conversation{first, second} {
					c.send(c.datagram("anybody?"), forwardNew)
				}
				if !rewrites(method) {
					first.age(udpProof)
					second.age(udpProof)
					first.send(first.datagram("still here"), forwardHalfOpen, confirmed)
					second.send(second.datagram("me too"), forwardHalfOpen, youngLimited)
					s.count(1, 1)
					return
				}
				first.reply(first.response("yes"), replyHalfOpen, confirmed)
				second.reply(second.response("yes"), replyHalfOpen, youngLimited)
				second.reply(second.response("yes?"), replyHalfOpen, youngLimited)
				s.count(1, 1)
				second.send(second.datagram("good"), forwardHalfOpen, confirmed)
				s.count(2, 1)
				second.state(0)
				second.reply(second.response("good"), replyTable)
				first.send(first.datagram("good"), forwardTable, matured)
				s.count(2, 0)
			})
		}
	})
}

// Fairlead routes datagrams too.
func TestUDPTimeToLive(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := udpScene(t, f, method, plan{})
		c := s.newClient().open()
		for _, ttl := range []uint8{0, 1} {
			data := c.datagram("far from home")
			data.ttl = ttl
			c.send(data, dropTTL)
			if rewrites(method) {
				data = c.response("far from home")
				data.ttl = ttl
				c.reply(data, dropTTL)
			}
		}
	})
}

// What a configuration doesn't use of the two protocols is not looked at.
func TestProtocolsOff(t *testing.T) {
	for _, udp := range []bool{false, true} {
		for _, f := range families {
			for off, found := range map[string]bool{"use_tcp": udp, "use_udp": !udp} {
				t.Run(fmt.Sprintf("%s/udp=%t/%s", off, udp, f.name), func(t *testing.T) {
					t.Parallel()
					s := newScene(t, f, fullnat, plan{udp: udp, settings: []setting{constant(off, uint8(0))}})
					c := s.newClient()
					if !found {
						c.send(c.segment(syn, ""), passNotOurs)
						return
					}
					c.open()
					c.send(c.segment(ack, "data"), forwardTable)
					c.reply(c.answer(ack, "data"), replyTable)
				})
			}
		}
	}
}
