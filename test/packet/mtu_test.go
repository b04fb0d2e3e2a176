package packet

import (
	"bytes"
	"fmt"
	"testing"

	"fairlead/bpf"
)

// asLong is the segment with such a payload that its IP packet is so long.
func (s segment) asLong(length int) segment {
	s.payload = nil
	s.payload = bytes.Repeat([]byte("Fairlead"), length/8+1)[:length-len(s.packet())]
	return s
}

// long is the client's next, its IP packet so long; longAnswer the backend's.
func (c *conversation) long(length int) segment {
	s := c.segment(ack, "").asLong(length)
	if !s.udp {
		c.seq = s.end()
	}
	return s
}

func (c *conversation) longAnswer(length int) segment {
	s := c.answer(ack, "").asLong(length)
	if !s.udp {
		c.ack = s.end()
	}
	return s
}

// What its way does not take is not sent there. Its sender is told how much it takes, outer headers not counted, where
// nobody may cut the packet up; else that would have to be done, which it is not here, and the packet is dropped by name.
func TestTooBig(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			p.mtu, p.twoArms = 1400, true
			s := newScene(t, f, w.method, p)
			s.must(s.Devices.Put(uint32(theKernel.front.index), bpf.FairleadDevice{Mtu: 1300, Mac: edgeMAC}))
			c := s.newClient().open()
			s.rebuildExceptions()
			takes := 1400 - int(w.overhead())
			c.tooBigFor = uint32(takes)
			for _, length := range []int{takes - 1, takes} {
				c.send(c.long(length), c.settledVerdict())
			}
			for _, length := range []int{takes + 1, takes + 2, 1500, 3400} {
				c.send(c.long(length), answerTooBig)
			}
			if f.name == "ipv4" {
				free := c.long(takes)
				free.df = false
				c.send(free, c.settledVerdict())
				free = c.long(takes + 1)
				free.df = false
				c.send(free, dropTooBig)
			}
			// What Ethernet pads is not the packet's.
			padded := c.long(takes)
			padded.padding = make([]byte, 9)
			c.send(padded, c.settledVerdict())
			// Its last hop is here: that is told after, and a new connection's packet is no other.
			tired := c.long(takes + 1)
			tired.ttl = 1
			c.send(tired, answerTooBig)
			d := s.newClient()
			first := d.segment(syn, "").asLong(takes + 1)
			d.tooBigFor = uint32(takes)
			d.send(first, answerTooBig)
			if !rewrites(w.method) {
				return
			}

			c.tooBigFor = 1300
			c.reply(c.longAnswer(1300), replyTable)
			c.reply(c.longAnswer(1301), answerTooBig)
			c.reply(c.longAnswer(3400), answerTooBig)
			if f.name == "ipv4" {
				free := c.longAnswer(1300)
				free.df = false
				c.reply(free, replyTable)
				free = c.longAnswer(1301)
				free.df = false
				c.reply(free, dropTooBig)
			}
			// Back by the device that it came by, a packet fits: it fitted in.
			s.must(s.Devices.Put(uint32(theKernel.back.index), bpf.FairleadDevice{Mtu: 1300, Mac: backMAC}))
			c.from = theKernel.back
			c.send(c.long(200), forwardTable)
			c.reply(c.longAnswer(1301), replyTable)
		})
	})
}

// Lengths are asked about where they may matter: what any way takes is not, nor where no limit is known, nor where the
// kernel shows several segments as one and cuts them up again behind us. In outer packets it could not.
func TestTooBigNotAsked(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		s := newScene(t, f, w.method, p)
		c := s.newClient().open()
		s.backends[0].mtu = 400
		s.setBackend(s.backends[0])
		short := 576 - int(w.overhead())
		c.send(c.long(short), forwardTable)
		if f.name == "ipv4" {
			c.tooBigFor = 400 - w.overhead()
			c.send(c.long(short+1), answerTooBig)
		}

		s.backends[0].mtu = 0
		s.setBackend(s.backends[0])
		c.send(c.long(3400), forwardTable)
	})
}

// overhead is the length of the outer headers towards a backend.
func (b backend) overhead() uint32 {
	return way{method: b.method, outer: map[bool]int{true: 0, false: 1}[b.address.Addr().Is4()]}.overhead()
}

// A device that nobody has told us of takes what comes.
func TestTooBigForUnknownDevice(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{twoArms: true})
		c := s.newClient().open()
		front := uint32(theKernel.front.index)
		s.must(s.Devices.Put(front, bpf.FairleadDevice{Mtu: 1400, Mac: edgeMAC}))
		c.tooBigFor = 1400
		c.reply(c.longAnswer(1500), answerTooBig)
		s.must(s.Devices.Delete(front))
		c.reply(c.longAnswer(1500), replyTable)
		s.must(s.Devices.Put(front, bpf.FairleadDevice{Mac: edgeMAC}))
		c.reply(c.longAnswer(1500), replyTable)
	})
}

// Such answers have a limit, a tick, as all of ours by ICMP.
func TestTooBigLimited(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, fullnat, plan{mtu: 1400, settings: []setting{constant("answers_a_tick", uint32(0))}})
		c := s.newClient().open()
		c.send(c.long(1401), dropLimited)
		c.send(c.long(1400), forwardTable)
	})
}

// What a router has told of the way to a tunnel's end holds for its time.
func TestPathMTULife(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		const life = 60
		p.settings = []setting{constant("path_mtu_life", uint32(life))}
		s := newScene(t, f, w.method, p)
		c := s.newClient().open()
		end := s.backends[0].address.Addr()
		told := s.tick()
		s.must(s.Paths.Put(pathKey(end), bpf.FairleadPath{Mtu: 1400, Tick: told}))
		takes := 1400 - int(w.overhead())
		c.tooBigFor = uint32(takes)
		if s.tick()-told < life-20 {
			c.send(c.long(takes), forwardTable)
			c.send(c.long(takes+1), answerTooBig)
		}
		s.await(told + life + 1)
		c.send(c.long(takes+1), forwardTable)
	})
}

// The least of all limits counts: of the way's first device, and of what lies behind it.
func TestPathMTULeast(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		for _, limits := range [][2]uint32{{1500, 1400}, {1400, 1500}, {0, 1400}, {1400, 0}} {
			t.Run(fmt.Sprintf("device %d, path %d", limits[0], limits[1]), func(t *testing.T) {
				p.mtu = limits[0]
				s := newScene(t, f, w.method, p)
				s.backends[0].mtu = limits[0]
				s.setBackend(s.backends[0])
				c := s.newClient().open()
				s.must(s.Paths.Put(pathKey(s.backends[0].address.Addr()), bpf.FairleadPath{Mtu: limits[1], Tick: s.tick()}))
				takes := 1400 - int(w.overhead())
				c.tooBigFor = uint32(takes)
				c.send(c.long(takes), forwardTable)
				c.send(c.long(takes+1), answerTooBig)
			})
		}
	})
}

// No sender of IPv6 may be told of less than 1280 bytes (RFC 8200, section 5). Where a tunnel over IPv4 takes less, what is
// no longer than that goes out to be fragmented outside (RFC 4213, section 3.2.2).
func TestPathMTUBelowLeast(t *testing.T) {
	f, p := families[1], plan{outer: &families[0]}
	for _, method := range []bpf.FairleadMethod{ipip, gue} {
		t.Run(fmt.Sprint("method ", method), func(t *testing.T) {
			s := newScene(t, f, method, p)
			c := s.newClient().open()
			s.rebuildExceptions()
			outer := s.backends[0].overhead()
			tell := func(size uint32) {
				t.Helper()
				c.loose = size < 1280+outer
				s.must(s.Paths.Put(pathKey(s.backends[0].address.Addr()), bpf.FairleadPath{Mtu: size, Tick: s.tick()}))
			}
			for _, size := range []uint32{576, 1279, 1279 + outer, 1280 + outer} {
				tell(size)
				for _, length := range []int{100, 575 - int(outer), 576 - int(outer), 577 - int(outer), 575, 576, 577, 1279, 1280} {
					c.send(c.long(length), forwardRing)
				}
				c.tooBigFor = 1280
				c.send(c.long(1281), answerTooBig)
				c.send(c.long(1500), answerTooBig)
				c.send(c.long(100), forwardRing)
			}
			tell(1281 + outer)
			c.send(c.long(1281), forwardRing)
			c.tooBigFor = 1281
			c.send(c.long(1282), answerTooBig)

			// Not so where the next device takes no more: there it would be lost.
			s.backends[0].mtu = 1000
			s.setBackend(s.backends[0])
			c.send(c.long(1280), dropTooBig)
		})
	}
}
