package pinning

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"

	"fairlead/maps"
)

// connection is a connection as its two ends see it, and where its handshake went. Its numbers may be moved by two CPUs
// at a time.
type connection struct {
	site  site
	tuple maps.Tuple
	hash  uint64

	pin             pin
	source, backend netip.AddrPort // fullnat: both ends as the backend sees them
	seq, ack        atomic.Uint32  // the client's next sequence number, and what it acknowledges
	last            atomic.Uint32  // tick of its last packet
}

// client is the number-th connection to a site: 60,000 ports, then the next client address.
func (s site) client(number uint32) *connection {
	host, port := number/60000, uint16(number%60000)
	a := netip.AddrFrom4([4]byte{198, 18, byte(host >> 8), byte(host)})
	if s.v6 {
		a = netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 14: byte(host >> 8), 15: byte(host)})
	}
	k := &connection{site: s, tuple: maps.Tuple{
		Source: netip.AddrPortFrom(a, clientPorts+port), Destination: s.service(), Protocol: 6,
	}}
	k.hash = k.tuple.Hash()
	k.seq.Store(rand.Uint32())
	k.ack.Store(rand.Uint32())
	return k
}

// pinOf tells whom a client's packet went to.
func (k *connection) pinOf(l landing) pin {
	if l.action != xdpTX && l.action != xdpRedirect || l.mac[0] != 2 || l.mac[1] != 0xb {
		return pin{}
	}
	p := pin{site: l.mac[2], backend: l.mac[3], method: fullnat}
	if l.destination == k.tuple.Destination {
		p.method = dsr
		if l.source != k.tuple.Source {
			return pin{}
		}
	} else if _, kind, host := numbersOf(l.destination.Addr()); kind != kindBackend || host != p.backend {
		return pin{}
	}
	return p
}

// moved is a packet that went elsewhere than to where its connection's handshake went.
type moved struct {
	k    *connection
	what string
	l    landing
}

func (m *moved) Error() string {
	return fmt.Sprintf("%v: %s: %v, its handshake went to %v (%v > %v)", m.k.tuple, m.what, m.l, m.k.pin, m.k.source,
		m.k.backend)
}

// send sends a packet from the client as it is given.
func (k *connection) send(c *cpu, flags uint8, seq, acknowledgement uint32, payload int) landing {
	s := segment{k.tuple.Source, k.tuple.Destination, seq, acknowledgement, flags, payload}
	k.last.Store(maps.Now())
	return c.run(&s, clientMAC)
}

// check holds a landing against the connection's pin.
func (k *connection) check(what string, l landing) error {
	if k.pinOf(l) != k.pin || k.pin == (pin{}) {
		return &moved{k, what, l}
	}
	if k.pin.method == fullnat && (l.source != k.source || l.destination != k.backend) {
		return &moved{k, what, l}
	}
	return nil
}

// reply sends a packet of the backend's, which must reach the client as the service's. Under dsr no such packet passes.
func (k *connection) reply(c *cpu, what string, flags uint8, seq, acknowledgement uint32, payload int) error {
	if k.pin.method != fullnat {
		return nil
	}
	k.last.Store(maps.Now())
	l := k.replied(c, flags, seq, acknowledgement, payload)
	if (l.action != xdpTX && l.action != xdpRedirect) || l.source != k.tuple.Destination ||
		l.destination != k.tuple.Source || l.mac != clientMAC {
		return &moved{k, what, l}
	}
	return nil
}

func (k *connection) replied(c *cpu, flags uint8, seq, acknowledgement uint32, payload int) landing {
	return c.run(&segment{k.backend, k.source, seq, acknowledgement, flags, payload}, backendMAC)
}

// open sends the client's SYN and notes where it went. False: it was refused.
func (k *connection) open(c *cpu) bool {
	l := k.send(c, syn, k.seq.Load()-1, 0, 0)
	k.pin, k.source, k.backend = k.pinOf(l), l.source, l.destination
	return k.pin != pin{}
}

// openAgain is the client's SYN once more.
func (k *connection) openAgain(c *cpu) error {
	return k.check("SYN again", k.send(c, syn, k.seq.Load()-1, 0, 0))
}

// accept is the backend's SYN-ACK.
func (k *connection) accept(c *cpu) error {
	return k.reply(c, "SYN-ACK", syn|ack, k.ack.Load()-1, k.seq.Load(), 0)
}

// acknowledge is a bare ACK of the client's: the one that ends the handshake, and any other.
func (k *connection) acknowledge(c *cpu) error {
	return k.check("ACK", k.send(c, ack, k.seq.Load(), k.ack.Load(), 0))
}

// say is a message of the client's, answer one of the backend's. The backend's acknowledgements are left out.
func (k *connection) say(c *cpu) error {
	return k.check("data", k.send(c, ack|psh, k.seq.Add(4)-4, k.ack.Load(), 4))
}

func (k *connection) answer(c *cpu) error {
	return k.reply(c, "answer", ack|psh, k.ack.Add(4)-4, k.seq.Load(), 4)
}

// talk is a message both ways.
func (k *connection) talk(c *cpu) error {
	if err := k.say(c); err != nil {
		return err
	}
	return k.answer(c)
}

// end is the client's FIN, endBackend the backend's.
func (k *connection) end(c *cpu) error {
	return k.check("FIN", k.send(c, fin|ack, k.seq.Add(1)-1, k.ack.Load(), 0))
}

func (k *connection) endBackend(c *cpu) error {
	return k.reply(c, "the backend's FIN", fin|ack, k.ack.Add(1)-1, k.seq.Load(), 0)
}

// reset is the client's RST, resetBackend the backend's.
func (k *connection) reset(c *cpu) error {
	return k.check("RST", k.send(c, rst, k.seq.Load(), 0, 0))
}

func (k *connection) resetBackend(c *cpu) error {
	return k.reply(c, "the backend's RST", rst, k.ack.Load(), 0, 0)
}

// establish is a handshake and a message each way, after which both ends have been heard.
func (k *connection) establish(c *cpu) error {
	if !k.open(c) {
		return fmt.Errorf("%v: SYN refused", k.tuple)
	}
	for _, step := range []func(*cpu) error{k.accept, k.acknowledge, k.talk, k.talk} {
		if err := step(c); err != nil {
			return err
		}
	}
	return nil
}

// established makes connections first to first+n-1 of a site.
func (p *plane) established(s site, first, n uint32) []*connection {
	p.Helper()
	all := make([]*connection, n)
	for i := range all {
		all[i] = s.client(first + uint32(i))
		p.must(all[i].establish(p.cpu))
	}
	return all
}
