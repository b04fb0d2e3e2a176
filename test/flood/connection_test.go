package flood

import (
	"fmt"
	"math/rand/v2"
	"net/netip"

	"fairlead/maps"
)

// connection is a connection as its two ends see it, and where its handshake went.
type connection struct {
	site  site
	tuple maps.Tuple
	hash  uint64

	backend    uint8          // its number; 0: none
	from, to   netip.AddrPort // both ends as the backend sees them
	seq, ack   uint32         // the client's next sequence number, and what it acknowledges
	generation uint32         // of its entry, once it is established
}

// client is the number-th connection to a site: 60,000 ports, then the next client address. Floods come from others.
func (s site) client(number uint32) *connection {
	host, port := number/60000, uint16(number%60000)
	a := netip.AddrFrom4([4]byte{198, 18, byte(host >> 8), byte(host)})
	if s.v6 {
		a = netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 14: byte(host >> 8), 15: byte(host)})
	}
	k := &connection{
		site: s, seq: rand.Uint32(), ack: rand.Uint32(),
		tuple: maps.Tuple{Source: netip.AddrPortFrom(a, 1024+port), Destination: s.service(), Protocol: 6},
	}
	k.hash = k.tuple.Hash()
	return k
}

// backendOf tells whom a client's packet went to, as a packet of its method looks; 0: to nobody.
func (k *connection) backendOf(l landing) uint8 {
	if l.action != xdpTX && l.action != xdpRedirect || l.mac[0] != 2 || l.mac[1] != 0xb || l.mac[2] != k.site.number {
		return 0
	}
	number := l.mac[3]
	address := k.site.backend(number)
	from, to, tunnel := k.tuple.Source, k.tuple.Destination, netip.Addr{}
	switch k.site.method {
	case maps.MethodFullNAT:
		to = netip.AddrPortFrom(address, servicePort)
		if from = l.source; from.Addr() != k.site.address(kindSource, 1) && from.Addr() != k.site.address(kindSource, 2) {
			return 0
		}
	case maps.MethodNAT:
		to = netip.AddrPortFrom(address, servicePort)
	case maps.MethodIPIP, maps.MethodGUE:
		tunnel = address
	}
	if l.source != from || l.destination != to || l.tunnel != tunnel || l.gue != (k.site.method == maps.MethodGUE) {
		return 0
	}
	return number
}

// send sends a packet from the client as it is given.
func (k *connection) send(c *cpu, flags uint8, seq, acknowledgement uint32, payload int) landing {
	return c.run(&segment{k.tuple.Source, k.tuple.Destination, seq, acknowledgement, flags, payload}, clientMAC)
}

// check holds a landing against where the connection's handshake went.
func (k *connection) check(what string, l landing) error {
	if k.backend == 0 || k.backendOf(l) != k.backend || l.source != k.from || l.destination != k.to {
		return fmt.Errorf("%v, %v: %s: %v, its handshake went to backend %d (%v > %v)", k.site, k.tuple, what, l, k.backend,
			k.from, k.to)
	}
	return nil
}

// reply sends a packet of the backend's, which must reach the client as the service's, where replies pass.
func (k *connection) reply(c *cpu, what string, flags uint8, seq, acknowledgement uint32, payload int) error {
	if k.site.method.Stateless() {
		return nil
	}
	l := c.run(&segment{k.to, k.from, seq, acknowledgement, flags, payload}, backendMAC)
	if (l.action != xdpTX && l.action != xdpRedirect) || l.source != k.tuple.Destination ||
		l.destination != k.tuple.Source || l.mac != clientMAC {
		return fmt.Errorf("%v, %v: %s: %v", k.site, k.tuple, what, l)
	}
	return nil
}

// open sends the client's SYN and notes where it went. False: it was refused.
func (k *connection) open(c *cpu) bool {
	l := k.send(c, syn, k.seq-1, 0, 0)
	k.backend, k.from, k.to = k.backendOf(l), l.source, l.destination
	return k.backend != 0
}

// accept is the backend's SYN-ACK.
func (k *connection) accept(c *cpu) error {
	return k.reply(c, "SYN-ACK", syn|ack, k.ack-1, k.seq, 0)
}

// acknowledge is a bare ACK of the client's: the one that ends the handshake, and any other.
func (k *connection) acknowledge(c *cpu) error {
	return k.check("ACK", k.send(c, ack, k.seq, k.ack, 0))
}

// say is a message of the client's.
func (k *connection) say(c *cpu) error {
	k.seq += 4
	return k.check("data", k.send(c, ack|psh, k.seq-4, k.ack, 4))
}

// talk is a message of the client's, one of the backend's, and the client's ACK of that.
func (k *connection) talk(c *cpu) error {
	if err := k.say(c); err != nil {
		return err
	}
	k.ack += 4
	if err := k.reply(c, "answer", ack|psh, k.ack-4, k.seq, 4); err != nil {
		return err
	}
	return k.acknowledge(c)
}

// establish is a handshake and a message each way.
func (k *connection) establish(c *cpu) error {
	if !k.open(c) {
		return fmt.Errorf("%v, %v: SYN refused", k.site, k.tuple)
	}
	for _, step := range []func(*cpu) error{k.accept, k.acknowledge, k.talk} {
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
		k := s.client(first + uint32(i))
		all[i] = k
		p.must(k.establish(p.cpu))
		c, found := p.entry(k)
		if !found || c.State&^maps.StateStateless != 0 {
			p.Fatalf("%v, %v: established, and in the connection table %t, %v", k.site, k.tuple, found, c.State)
		}
		k.generation = c.Generation
	}
	return all
}

// untouched checks that the connections' entries are those that their handshakes made, and established: nothing has
// evicted one, even if it has come back since.
func (p *plane) untouched(when string, all []*connection) {
	p.Helper()
	missing, changed := 0, 0
	for _, k := range all {
		c, found := p.entry(k)
		switch {
		case !found:
			missing++
		case c.Generation != k.generation || c.State&^maps.StateStateless != 0:
			changed++
		}
	}
	if missing+changed > 0 {
		p.Errorf("%s: of %d established connections %d are not in the connection table and %d are not as they were", when,
			len(all), missing, changed)
	}
}

// everyone lets each connection talk, which must go to its own backend.
func (p *plane) everyone(when string, all []*connection) {
	p.Helper()
	wrong := 0
	for _, k := range all {
		if err := k.talk(p.cpu); err != nil {
			if wrong++; wrong <= 3 {
				p.Errorf("%s: %v", when, err)
			}
		}
	}
	if wrong > 0 {
		p.Errorf("%s: %d of %d connections moved", when, wrong, len(all))
	}
}
