package packet

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"fairlead/bpf"

	"github.com/cilium/ebpf"
)

// A connection's life inside of outer packets, of all kinds: IPv4 and IPv6 in IPv4 and IPv6, with and without UDP between.
func TestLifeTunnel(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		p.backends = 3
		eachProtocol(t, p, func(t *testing.T, p plan) {
			for _, p.twoArms = range []bool{false, true} {
				s := newScene(t, f, w.method, p)
				c := s.newClient().open()
				s.count(1, 0)
				s.rebuildExceptions()
				c.send(c.segment(ack|psh, "by ring alone"), forwardRing)
				if !p.udp {
					c.send(c.segment(fin|ack, ""), forwardTable, closingSeen)
				}
				s.remove(c)
				s.count(0, 0)
			}
		})
	})
}

// The outer header repeats all of DSCP and ECN (RFC 6040, normal mode), whatever else the inner one says; time to live is
// the tunnel's own outside and counted inside.
func TestTunnelHeaders(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		s := newScene(t, f, w.method, p)
		c := s.newClient().open()
		s.rebuildExceptions()
		for tos := range 256 {
			data := c.segment(ack, "data")
			data.tos, data.ttl, data.flowLabel = uint8(tos), uint8(255-tos%254), uint32(tos)<<12|0xfff
			data.id, data.padding = uint16(tos)<<8, make([]byte, tos%3)
			c.send(data, forwardRing)
		}
		var tired segment
		for _, tired.ttl = range []uint8{0, 1} {
			data := c.segment(ack, "")
			data.ttl = tired.ttl
			c.send(data, dropTTL)
		}
	})
}

// Where a client's packet may be fragmented, so may the outer one be, and has a number of its own; else the number is zero
// (RFC 6864) and the outer one may not either. IPv6's may never be.
func TestTunnelFragmentation(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		s := newScene(t, f, w.method, p)
		c := s.newClient().open()
		for _, start := range []uint64{0, 0xfffe, 0x1_0000_fffe} { // numbers wrap
			s.editControl(func(block *bpf.FairleadControlBlock) { block.Identifications = start })
			given := start
			for i := range 6 {
				data := c.segment(ack, "data")
				data.df = i%3 == 0
				c.send(data, forwardTable)
				if !data.df && f.name == "ipv4" && families[w.outer].name == "ipv4" {
					given++
				}
				if now := s.control().Identifications; now != given {
					t.Fatalf("%d numbers given, want %d", now-start, given-start)
				}
			}
		}
	})
}

// The outer source address varies from connection to connection, within what it may, so that many queues of a backend's
// card get some; and so do gue's ports. A connection's packets have the same at all times.
func TestTunnelSources(t *testing.T) {
	eachWay(t, tunnels, func(t *testing.T, f family, w way, p plan) {
		outer := families[w.outer]
		for mask, least := range map[[4]byte]int{{}: 1, {3: 1}: 2, {3: 0x0f}: 16, {3: 0xff}: 150, {2: 0x0f, 3: 0xff}: 230} {
			s := newScene(t, f, w.method, p)
			b := &s.backends[0]
			b.tunnelMask = binary.NativeEndian.Uint32(mask[:])
			b.tunnelSource = netip.PrefixFrom(outer.tunnel, outer.tunnel.BitLen()-12).Masked().Addr()
			s.setBackend(*b)
			seen, ports := map[netip.Addr]bool{}, map[uint16]bool{}
			for range 256 {
				c := s.newClient()
				var of [2]outerEnds
				for i := range of {
					data := c.segment(syn, "").bytes()
					_, out := s.run(s.Fairlead, data, c.from)
					of[i] = outerEndsOf(out, w.method)
				}
				s.want = s.counted()
				if of[0] != of[1] {
					t.Fatalf("one connection's outer packets are from %v and %v", of[0], of[1])
				}
				prefix := netip.PrefixFrom(b.tunnelSource, b.tunnelSource.BitLen()-12)
				if !prefix.Contains(of[0].source) || of[0].destination != b.address.Addr() {
					t.Fatalf("outer packet %v, want from %v to %v", of[0], prefix, b.address.Addr())
				}
				seen[of[0].source], ports[of[0].port] = true, true
			}
			if len(seen) < least || mask == [4]byte{} && len(seen) > 1 {
				t.Errorf("256 connections have %d outer sources, want %d or more where %x may vary", len(seen), least, mask)
			}
			if w.method != gue {
				continue
			}
			if len(ports) < 240 {
				t.Errorf("256 connections have %d outer ports", len(ports))
			}
			for port := range ports {
				if port < 49152 {
					t.Errorf("outer port %d is somebody's", port)
				}
			}
		}
	})
}

// outerEnds are an outer packet's.
type outerEnds struct {
	source, destination netip.Addr
	port                uint16 // gue
}

func outerEndsOf(frame []byte, method bpf.FairleadMethod) (ends outerEnds) {
	ip := frame[ethernetHeader:]
	transport := ip[40:]
	if ip[0]>>4 == 4 {
		ends.source, ends.destination = netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
		transport = ip[20:]
	} else {
		ends.source, ends.destination = netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:]))
	}
	if method == gue {
		ends.port = binary.BigEndian.Uint16(transport)
	}
	return ends
}

// A device that leaves too little room in front of packets can't be sent through: a packet that is encapsulated again and
// again, its outer headers being for the same service, comes to an end by name.
func TestNoHeadroom(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, f, gue, plan{udp: true, outer: &f, fixed: true})
			s.service.address = netip.AddrPortFrom(s.backends[0].address.Addr(), guePort)
			s.setService(s.service)
			c := s.newClient()
			data := c.datagram("inside").bytes()
			const headroom = 256 - 40 // of XDP, less what the kernel keeps there
			outer := int(f.ipHeader()) + 8
			times := headroom / outer
			var action uint32
			s.must(theKernel.do(s.cpu, func() (err error) {
				action, err = s.Fairlead.Run(&ebpf.RunOptions{
					Data: data, DataOut: make([]byte, len(data)+512), Repeat: uint32(times + 1),
					Context: xdpMD{DataEnd: uint32(len(data)), IngressIfindex: uint32(c.from.index)},
				})
				return err
			}))
			for i := range times {
				s.want.Verdicts[forwardNew]++
				for _, traffic := range []*bpf.FairleadTraffic{&s.want.Services[1], &s.want.Backends[1]} {
					traffic.Packets++
					traffic.Connections++
					traffic.Bytes += uint64(len(data) + i*outer)
				}
			}
			if action != xdpDrop {
				t.Errorf("action %d, want %d", action, xdpDrop)
			}
			s.want.Verdicts[dropNoHeadroom]++
			s.want.Services[1].Refused++
			s.checkCounters(verdictNames[dropNoHeadroom])
			if !t.Failed() {
				provoked.Lock()
				defer provoked.Unlock()
				provoked.verdicts[dropNoHeadroom] = true
			}
		})
	}
}
