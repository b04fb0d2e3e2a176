package through

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/maps"
)

// TestSource has a host with two devices and a service's address of its own.
func TestSource(t *testing.T) {
	host, peer := mustNamespace(t), mustNamespace(t)
	cable(host, "w0", peer, "p0")
	cable(host, "w1", peer, "p1")
	for name, list := range map[string][]string{
		"lo": {"192.0.2.20/32", "2001:db8::20/128"},
		"w0": {"10.0.0.1/24", "fd00::1/64", "169.254.7.7/16"},
		"w1": {"192.0.2.10/32", "10.0.1.1/24", "2001:db8::10/128", "fd00:1::1/64"},
	} {
		for _, text := range list {
			host.add(name, netip.MustParsePrefix(text))
		}
	}
	fading := ipAddress(netip.MustParsePrefix("fd00:1::9/64"))
	fading.PreferedLft, fading.ValidLft = 0, 1000
	fading.Flags |= unix.IFA_F_DEPRECATED
	host.must(host.AddrReplace(host.link("w1"), fading))
	services := map[netip.Addr]bool{service4: true, service6: true, netip.MustParseAddr("192.0.2.20"): true}
	s := &Stack{avoid: func(a netip.Addr) bool { return services[a] }, routes: host.Handle}
	for _, test := range []struct {
		name, service, source, device string
		vlan                          [2]uint16
		want                          string // "": none
	}{
		{name: "as the host would", service: "192.0.2.10", source: "10.0.7.7", device: "w0", want: "10.0.7.7"},
		{name: "as the host would, IPv6", service: "2001:db8::10", source: "fd00:7::7", device: "w0", want: "fd00:7::7"},
		{name: "mapped", service: "192.0.2.10", source: "::ffff:10.0.7.7", device: "w0", want: "10.0.7.7"},
		{name: "other family: of the device", service: "192.0.2.10", source: "fd00:1::1", device: "w1", want: "10.0.1.1"},
		{name: "other family, IPv6: of the device", service: "2001:db8::10", source: "10.0.1.1", device: "w1", want: "fd00:1::1"},
		{name: "a service's", service: "192.0.2.10", source: "192.0.2.10", device: "w1", want: "10.0.1.1"},
		{name: "another service's", service: "192.0.2.30", source: "192.0.2.20", device: "w1", want: "10.0.1.1"},
		{name: "none known", service: "192.0.2.10", device: "w0", want: "10.0.0.1"},
		{name: "the device has none: any", service: "192.0.2.10", device: "p", want: "10.0.0.1"},
		{name: "link-local for a global service", service: "2001:db8::10", source: "fe80::1", device: "w0", want: "fd00::1"},
		{name: "tags, but no device above", service: "192.0.2.10", device: "w1", vlan: [2]uint16{5}, want: "10.0.1.1"},
	} {
		d := Destination{Service: netip.AddrPortFrom(netip.MustParseAddr(test.service), 443), Method: maps.MethodIPIP}
		if test.source != "" {
			d.Source = netip.MustParseAddr(test.source)
		}
		d.Hop.VLAN, d.Hop.Interface = test.vlan, 4711
		if test.device != "p" {
			d.Hop.Interface = uint32(host.link(test.device).Attrs().Index)
		}
		if got, err := s.source(&d); err != nil || got != netip.MustParseAddr(test.want) {
			t.Errorf("%s: %v, %v: want %s", test.name, got, err, test.want)
		}
	}
	for _, name := range []string{"w0", "w1"} {
		list, err := host.AddrList(host.link(name), netlink.FAMILY_V4)
		host.must(err)
		for _, a := range list {
			host.must(host.AddrDel(host.link(name), &a))
		}
	}
	d := Destination{
		Service: netip.AddrPortFrom(service4, 443), Method: maps.MethodIPIP, Backend: netip.MustParseAddr("fd00::2"),
		Source: netip.MustParseAddr("fd00::1"),
	}
	const want = "the host has no IPv4 address that fd00::2 could answer: a check through ipip needs one"
	if a, err := s.source(&d); err == nil || err.Error() != want {
		t.Errorf("without an IPv4 address: %v, %v", a, err)
	}
}

// TestTold: each source address is told once, before its first connection, and again where that failed.
func TestTold(t *testing.T) {
	var told []netip.Addr
	no := errors.New("no room")
	fail := true
	tell := once(func(a netip.Addr) error {
		told = append(told, a)
		if fail {
			return no
		}
		return nil
	})
	if err := tell(service4); !errors.Is(err, no) {
		t.Error(err)
	}
	fail = false
	for range 2 {
		for _, a := range []netip.Addr{service4, service6} {
			if err := tell(a); err != nil {
				t.Error(err)
			}
		}
	}
	if want := []netip.Addr{service4, service4, service6}; !slices.Equal(told, want) {
		t.Errorf("told %v: want %v", told, want)
	}
	if err := once(nil)(service4); err != nil {
		t.Error(err)
	}
}

func TestChoosePorts(t *testing.T) {
	for _, test := range []struct {
		name        string
		first, last uint16
		avoid       func(uint16) bool
		count       int
		most, least uint16
	}{
		{"Linux' own range", 32768, 60999, nil, 1024, 65535, 64512},
		{"a range to the end", 32768, 65535, nil, 1024, 32767, 31744},
		{"a little left above", 1024, 65500, nil, 35 + 512, 65535, 512},
		{"nothing left above", 1024, 65535, nil, 512, 1023, 512},
		{"nothing left", 1, 65535, nil, 0, 0, 0},
		{"some avoided", 32768, 60999, func(p uint16) bool { return p%2 == 1 }, 1024, 65534, 63488},
		{"the last one avoided", 32768, 60999, func(p uint16) bool { return p == 65535 }, 1024, 65534, 64511},
	} {
		got := ChoosePorts(test.first, test.last, test.avoid)
		if len(got) != test.count {
			t.Errorf("%s: %d ports: want %d", test.name, len(got), test.count)
			continue
		}
		seen := make(map[uint16]bool)
		for _, p := range got {
			if seen[p] || p >= test.first && p <= test.last || p > test.most || p < test.least || test.avoid != nil && test.avoid(p) {
				t.Errorf("%s: port %d", test.name, p)
			}
			seen[p] = true
		}
		if test.count > 0 && (!seen[test.most] || !seen[test.least]) {
			t.Errorf("%s: from %d to %d: want %d to %d", test.name, slices.Min(got), slices.Max(got), test.least, test.most)
		}
	}
}
