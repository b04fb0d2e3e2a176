package packet

import (
	"net/netip"
	"testing"

	"fairlead/bpf"
)

const dropBadSource = bpf.FairleadVerdictDROP_BAD_SOURCE

// Addresses that no host has are neither forwarded nor answered; their neighbours are forwarded.
func TestSources(t *testing.T) {
	bad := map[string][]string{
		"ipv4": {"0.0.0.0", "0.255.255.255", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.1.2.3", "240.0.0.1",
			"255.255.255.255"},
		"ipv6": {"::", "::1", "ff00::", "ff02::1", "ffff::1"},
	}
	good := map[string][]string{
		"ipv4": {"1.0.0.0", "126.255.255.255", "128.0.0.1", "223.255.255.255"},
		"ipv6": {"::2", "1::", "fe80::1", "feff::1", "0:0:1::"},
	}
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		for _, a := range bad[f.name] {
			c := s.clientAt(netip.AddrPortFrom(netip.MustParseAddr(a), 40000))
			c.send(c.segment(syn, ""), dropBadSource)
			c.send(c.segment(ack, "data"), dropBadSource)
			c.send(c.segment(rst, ""), dropBadSource)
		}
		for _, a := range good[f.name] {
			c := s.clientAt(netip.AddrPortFrom(netip.MustParseAddr(a), 40000))
			c.send(c.segment(syn, ""), forwardNew)
		}
	})
}

// A frame to or from a group of hosts is no router's, whatever IP address it carries.
func TestGroups(t *testing.T) {
	group := [6]byte{1, 0, 0x5e, 0, 0, 1}
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		s := newScene(t, f, method, plan{})
		c := s.newClient()
		for _, change := range []func(*segment){
			func(p *segment) { p.ethDestination = group },
			func(p *segment) { p.ethDestination = [6]byte{255, 255, 255, 255, 255, 255} },
			func(p *segment) { p.ethSource = group },
		} {
			packet := c.segment(syn, "")
			change(&packet)
			c.send(packet, passNotOurs)
		}
		c.open()
		packet := c.segment(ack|psh, "data")
		packet.ethDestination = group
		c.send(packet, passNotOurs)
	})
}
