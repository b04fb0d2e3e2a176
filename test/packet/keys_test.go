package packet

import (
	"net/netip"
	"testing"

	"fairlead/bpf"
)

// also is the same service at another address and port: its ring, its backends, its counters.
func (s *scene) also(address netip.AddrPort) *scene {
	s.Helper()
	other := *s
	other.service.address = address
	other.setService(service{
		id: s.service.id, address: address, protocol: s.service.protocol, flags: s.service.flags, policy: s.service.policy,
		ring: s.service.ring,
	})
	return &other
}

// A service has as many addresses and ports as it likes: one ring, one set of counters, and connections that don't meet.
func TestManyKeys(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, method, plan{backends: 3, udp: p.udp})
			if !rewrites(method) {
				// What the client's packet has is what the backend gets.
				for _, b := range s.backends {
					b.address = netip.AddrPortFrom(b.address.Addr(), 0)
					s.setBackend(b)
				}
			}
			all := []*scene{s}
			for _, address := range []netip.AddrPort{
				netip.AddrPortFrom(f.service.Addr(), 8443),
				netip.AddrPortFrom(plus(f.service.Addr(), 1), f.service.Port()),
				netip.AddrPortFrom(plus(f.service.Addr(), 2), 1),
				netip.AddrPortFrom(plus(f.service.Addr(), 2), 65535),
			} {
				all = append(all, s.also(address))
			}
			var open []*conversation
			for i, key := range all {
				client := netip.AddrPortFrom(f.client, 40000)
				if method == nat { // one way back each
					client = netip.AddrPortFrom(f.client, uint16(40000+i))
				}
				open = append(open, key.clientAt(client).open())
			}
			for _, c := range open {
				c.send(c.segment(ack|psh, "data"), forwardTable)
				if rewrites(method) {
					c.reply(c.answer(ack|psh, "data"), replyTable)
				}
			}
			s.count(int64(len(all)), 0)
			if connections := s.counted().Services[1].Connections; connections != uint64(len(all)) {
				t.Errorf("the service counts %d connections, want %d", connections, len(all))
			}
			// A port of one address and an address of another are nobody's.
			c := s.newClient()
			stranger := c.segment(syn, "").between(c.client, netip.AddrPortFrom(plus(f.service.Addr(), 1), 8443))
			c.send(stranger, passNotOurs)

			// One key leaves, the others stay.
			leaving := all[1]
			leaving.service.flags |= bpf.FairleadServiceFlagSERVICE_LEAVING
			leaving.setService(leaving.service)
			c = leaving.clientAt(netip.AddrPortFrom(f.client, 50000))
			c.send(c.segment(syn, ""), resetLeaving)
			open[1].send(open[1].segment(ack, "I stay"), forwardTable)
			d := s.clientAt(netip.AddrPortFrom(f.client, 50001))
			d.open()
		})
	})
}
