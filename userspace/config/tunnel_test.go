package config

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tunnelled returns a good file whose ipip service has source, in line 6, as its tunnel_source.
func tunnelled(source string) string { return service("method: ipip\n  tunnel_source: " + source) }

func TestTunnelSource(t *testing.T) {
	ipv4, ipv6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")
	for _, test := range []struct{ text, ipv4, ipv6 string }{
		{"10.9.0.1", "10.9.0.1/32", ""},
		{"10.9.0.1/32", "10.9.0.1/32", ""},
		{"[10.9.0.0/24]", "10.9.0.0/24", ""},
		{"11.0.0.0/8", "11.0.0.0/8", ""},
		{"'2001:db8:9::/64'", "", "2001:db8:9::/64"},
		{"'2001:db9::/32'", "", "2001:db9::/32"},
		{"'2001:db8:9::1'", "", "2001:db8:9::1/128"},
		{"['2001:db8:9::1', 10.9.0.0/30]", "10.9.0.0/30", "2001:db8:9::1/128"},
		{"[]", "", ""},
	} {
		s := mustParse(t, tunnelled(test.text)).Services[0]
		for _, family := range []struct {
			backend netip.Addr
			want    string
		}{{ipv4, test.ipv4}, {ipv6, test.ipv6}} {
			got, ok := s.TunnelSource(family.backend)
			if ok != (family.want != "") || ok && got != netip.MustParsePrefix(family.want) {
				t.Errorf("%s: towards %v from %v (%v), want %q", test.text, family.backend, got, ok, family.want)
			}
		}
	}
	if got := mustParse(t, service("method: gue")).Services[0].TunnelSources; got != nil {
		t.Errorf("tunnel sources by default: %v", got)
	}
}

func TestTunnelSourceRefusals(t *testing.T) {
	const at, first, second = "7: services[0].tunnel_source", "7: services[0].tunnel_source[0]", "7: services[0].tunnel_source[1]"
	tests := []struct {
		name, text string
		want       []string
	}{
		// where it belongs
		{"fullnat", service("tunnel_source: 10.9.0.1"), []string{
			"6: services[0].tunnel_source: method fullnat puts no outer header around packets: take it out, or take method ipip or gue"}},
		{"nat", service("tunnel_source: [10.9.0.0/24]\n  method: nat"), []string{
			"6: services[0].tunnel_source: method nat puts no outer header around packets: take it out, or take method ipip or gue"}},
		{"dsr", service("method: dsr\n  tunnel_source: '2001:db8::/64'"), []string{
			at + ": method dsr puts no outer header around packets: take it out, or take method ipip or gue"}},
		{"null", tunnelled(""), []string{at + ": has no value: write an address or prefix, or take the line out"}},
		{"null in a list", tunnelled("[~]"), []string{first + ": has no value: write one, or take the line out"}},
		{"mapping", tunnelled("{a: b}"), []string{at + ": is a mapping where one value belongs: write one value"}},
		{"list in a list", tunnelled("[[10.9.0.1]]"), []string{first + ": is a list where one value belongs: write one value"}},
		{"tag", tunnelled("!!str 10.9.0.1"), []string{at + ": tag !!str is not understood: take it out"}},
		{"alias", tunnelled("*a"), []string{at + ": alias *a has no anchor before it: define &a above"}},
		{"two of IPv4", tunnelled("[10.9.0.0/24, 10.9.1.1]"), []string{
			second + ": 10.9.1.1 is a second IPv4 source beside 10.9.0.0/24: write one for each family; a prefix holds several addresses"}},
		{"two of IPv6", tunnelled("['2001:db8:9::1', '2001:db8:9::/64']"), []string{
			second + ": 2001:db8:9::/64 is a second IPv6 source beside 2001:db8:9::1: write one for each family; a prefix holds several addresses"}},

		// what it may be
		{"name", tunnelled("eth0"), []string{at + ": \"eth0\" is not an IP address or prefix: write it as 10.9.0.0/24, 10.9.0.1 or 2001:db8:9::/64"}},
		{"mask", tunnelled("10.9.0.0/255.255.255.0"), []string{
			at + ": \"10.9.0.0/255.255.255.0\" is not an IP address or prefix: write it as 10.9.0.0/24, 10.9.0.1 or 2001:db8:9::/64"}},
		{"longer than an address", tunnelled("10.9.0.0/33"), []string{
			at + ": \"10.9.0.0/33\" is not an IP address or prefix: write it as 10.9.0.0/24, 10.9.0.1 or 2001:db8:9::/64"}},
		{"port", tunnelled("10.9.0.1:80"), []string{at + ": \"10.9.0.1:80\" is not an IP address or prefix: write it as 10.9.0.0/24, 10.9.0.1 or 2001:db8:9::/64"}},
		{"empty", tunnelled("''"), []string{at + ": \"\" is not an IP address or prefix: write it as 10.9.0.0/24, 10.9.0.1 or 2001:db8:9::/64"}},
		{"prefix with a zone", tunnelled("fe80::1%eth0/64"), []string{
			at + ": \"fe80::1%eth0/64\" is not an IP address or prefix: write it as 10.9.0.0/24, 10.9.0.1 or 2001:db8:9::/64"}},
		{"host bits", tunnelled("10.9.0.17/24"), []string{
			at + ": 10.9.0.17/24 has bits set after its first 24: write 10.9.0.0/24, or 10.9.0.17 for that address alone"}},
		{"host bits of IPv6", tunnelled("2001:db8:9::1/64"), []string{
			at + ": 2001:db8:9::1/64 has bits set after its first 64: write 2001:db8:9::/64, or 2001:db8:9::1 for that address alone"}},
		{"short", tunnelled("10.0.0.0/7"), []string{at + ": 10.0.0.0/7 is shorter than /8: take one of /8 to /32"}},
		{"all", tunnelled("0.0.0.0/0"), []string{at + ": 0.0.0.0/0 is shorter than /8: take one of /8 to /32"}},
		{"short of IPv6", tunnelled("2001:d00::/31"), []string{at + ": 2001:d00::/31 is shorter than /32: take one of /32 to /128"}},
		{"all of IPv6", tunnelled("'::/0'"), []string{at + ": ::/0 is shorter than /32: take one of /32 to /128"}},
		{"unspecified", tunnelled("0.0.0.0"), []string{at + ": 0.0.0.0 is the unspecified address: take addresses of a network of yours"}},
		{"holds the unspecified", tunnelled("0.0.0.0/8"), []string{at + ": 0.0.0.0/8 holds the unspecified address: take addresses of a network of yours"}},
		{"unspecified of IPv6", tunnelled("'::'"), []string{at + ": :: is the unspecified address: take addresses of a network of yours"}},
		{"holds the unspecified of IPv6", tunnelled("'::/32'"), []string{at + ": ::/32 holds the unspecified address: take addresses of a network of yours"}},
		{"loopback", tunnelled("127.0.0.1"), []string{at + ": 127.0.0.1 is a loopback address: take addresses of a network of yours"}},
		{"holds loopback", tunnelled("127.0.0.0/8"), []string{at + ": 127.0.0.0/8 holds loopback addresses: take addresses of a network of yours"}},
		{"loopback of IPv6", tunnelled("::1"), []string{at + ": ::1 is a loopback address: take addresses of a network of yours"}},
		{"link-local", tunnelled("169.254.1.1"), []string{at + ": 169.254.1.1 is a link-local address: take addresses of a network of yours"}},
		{"holds link-local", tunnelled("169.0.0.0/8"), []string{at + ": 169.0.0.0/8 holds link-local addresses: take addresses of a network of yours"}},
		{"link-local of IPv6", tunnelled("fe80::1"), []string{at + ": fe80::1 is a link-local address: take addresses of a network of yours"}},
		{"link-local with interface", tunnelled("fe80::1%eth0"), []string{at + ": fe80::1%eth0 is a link-local address: take addresses of a network of yours"}},
		{"holds link-local of IPv6", tunnelled("'fe80::/64'"), []string{at + ": fe80::/64 holds link-local addresses: take addresses of a network of yours"}},
		{"interface", tunnelled("2001:db8::1%eth0"), []string{at + ": 2001:db8::1%eth0 names an interface, which only link-local addresses need: write 2001:db8::1"}},
		{"multicast", tunnelled("224.0.0.1"), []string{at + ": 224.0.0.1 is a multicast address: take addresses of a network of yours"}},
		{"holds multicast", tunnelled("239.1.0.0/16"), []string{at + ": 239.1.0.0/16 holds multicast addresses: take addresses of a network of yours"}},
		{"multicast of IPv6", tunnelled("ff02::1"), []string{at + ": ff02::1 is a multicast address: take addresses of a network of yours"}},
		{"holds multicast of IPv6", tunnelled("'ff05:1::/32'"), []string{at + ": ff05:1::/32 holds multicast addresses: take addresses of a network of yours"}},
		{"broadcast", tunnelled("255.255.255.255"), []string{at + ": 255.255.255.255 is the broadcast address: take addresses of a network of yours"}},
		{"holds broadcast", tunnelled("255.255.255.0/24"), []string{at + ": 255.255.255.0/24 holds the broadcast address: take addresses of a network of yours"}},
		{"v4-mapped", tunnelled("::ffff:10.9.0.1"), []string{at + ": ::ffff:10.9.0.1 is an IPv4 address mapped into IPv6: write 10.9.0.1"}},
		{"holds v4-mapped", tunnelled("::ffff:10.9.0.0/120"), []string{at + ": ::ffff:10.9.0.0/120 holds IPv4 addresses mapped into IPv6: write 10.9.0.0/24"}},
		{"holds v4-mapped with host bits", tunnelled("::ffff:10.9.0.1/120"), []string{at + ": ::ffff:10.9.0.1/120 holds IPv4 addresses mapped into IPv6: write 10.9.0.0/24"}},
		{"holds all v4-mapped and more", tunnelled("::fffe:0:0/95"), []string{at + ": ::fffe:0:0/95 holds IPv4 addresses mapped into IPv6: take addresses of a network of yours"}},

		// whom it may not be
		{"a backend", tunnelled("10.0.0.12"), []string{at + ": 10.0.0.12 is the address of backend ws2 of service chat: take addresses that no service and no backend has"}},
		{"holds a backend", tunnelled("10.0.0.0/24"), []string{at + ": 10.0.0.0/24 holds 10.0.0.11, the address of backend ws1 of service chat: take addresses that no service and no backend has"}},
		{"the service", tunnelled("192.0.2.10"), []string{at + ": 192.0.2.10 is the address of service chat: take addresses that no service and no backend has"}},
		{"holds another service", two("method: gue\n  tunnel_source: ['2001:db8:9::/64', 198.51.100.0/24]", "name: web, addresses: [192.0.2.10, 198.51.100.7], port: 80"), []string{
			second + ": 198.51.100.0/24 holds 198.51.100.7, the address of service web: take addresses that no service and no backend has"}},
		{"holds a backend of another", tunnelled("'2001:db8:9::/64'") + "- {name: web, address: '2001:db8::1', port: 80, backends: [{name: b, address: '2001:db8:9::5'}]}\n", []string{
			at + ": 2001:db8:9::/64 holds 2001:db8:9::5, the address of backend b of service web: take addresses that no service and no backend has"}},
	}
	for _, test := range tests {
		if diff := cmp.Diff(test.want, refused(test.text)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

func TestTunnelSourcesAccepted(t *testing.T) {
	for name, text := range map[string]string{
		"just below a backend":       tunnelled("10.0.0.8/31"),
		"just above the backends":    tunnelled("10.0.0.13"),
		"of one family alone":        with("method: gue\n  tunnel_source: 10.9.0.0/24", "{name: ws2, address: '2001:db8::2'}"),
		"one for several services":   two("method: gue\n  tunnel_source: 10.9.0.0/24", "name: web, address: 192.0.2.10, port: 80, method: ipip, tunnel_source: 10.9.0.0/24"),
		"by alias":                   two("method: gue\n  tunnel_source: &t [10.9.0.0/24]", "name: web, address: 192.0.2.10, port: 80, method: ipip, tunnel_source: *t"),
		"by alias of one":            two("method: gue\n  tunnel_source: &t 10.9.0.1", "name: web, address: 192.0.2.10, port: 80, method: ipip, tunnel_source: [*t]"),
		"an empty list under any":    service("tunnel_source: []"),
		"a source of fullnat's":      two("method: gue\n  tunnel_source: 10.9.0.0/24", "name: web, address: 192.0.2.10, port: 80, source_addresses: [10.9.0.1]"),
		"the shortest":               tunnelled("[11.0.0.0/8, '2001:db8::/32']"),
		"link-local backend, beside": with("method: gue\n  tunnel_source: '2001:db8:9::/64'", "{name: ws2, address: fe80::1%eth0}"),
	} {
		if errs := refused(text); len(errs) > 0 {
			t.Errorf("%s: %s", name, strings.Join(errs, "\n"))
		}
	}
}

// FuzzTunnelSource asks of any text: it is refused with words, or it is a prefix all of whose addresses, at its two ends
// and where the fuzzer points, would be taken as addresses, and that comes back the same when it is written out.
func FuzzTunnelSource(f *testing.F) {
	for _, seed := range []string{"", "10.9.0.0/24", "10.9.0.1", "10.9.0.1/24", "2001:db8::/64", "fe80::1%eth0", "::ffff:10.9.0.0/120", "0.0.0.0/0",
		"::/0", "169.0.0.0/8", "255.255.0.0/16", "::fffe:0:0/95", "1.2.3.4/032", "1.2.3.4:5", "::%a/1"} {
		f.Add(seed, []byte("0123456789abcdef"))
	}
	f.Fuzz(func(t *testing.T, text string, point []byte) {
		p, bad := parseTunnelSource(text)
		if bad != nil {
			if bad.problem == "" || bad.remedy == "" {
				t.Errorf("%q is refused without words", text)
			}
			return
		}
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4() && p.Bits() < minTunnel4 || p.Addr().Is6() && p.Bits() < minTunnel6 {
			t.Errorf("%q was taken as %v", text, p)
		}
		for _, written := range []string{p.String(), plainPrefix(p)} {
			if again, bad := parseTunnelSource(written); bad != nil || again != p {
				t.Errorf("%q was taken as %v, and that as %v, %v", text, p, again, bad)
			}
		}
		at := func(bits func(i int) byte) netip.Addr {
			b := p.Addr().AsSlice()
			for i := p.Bits(); i < p.Addr().BitLen(); i++ {
				b[i/8] |= bits(i) << (7 - i%8)
			}
			a, _ := netip.AddrFromSlice(b)
			return a
		}
		for _, a := range []netip.Addr{p.Addr(), at(func(int) byte { return 1 }), at(func(i int) byte {
			if i/8 >= len(point) {
				return 0
			}
			return point[i/8] >> (7 - i%8) & 1
		})} {
			if _, bad := parseAddress(a.String()); bad != nil || a.IsLoopback() || !p.Contains(a) {
				t.Errorf("%q was taken as %v, which holds %v: %v", text, p, a, bad)
			}
		}
	})
}
