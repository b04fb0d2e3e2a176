package config

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// listed returns a good file with a service of fields, in line 2, and two backends, in lines 4 and 5, which have more.
func listed(fields, more string) string {
	return "services:\n- {name: chat, " + fields + ",\n  backends: [\n    {name: ws1, address: 10.0.0.11" + more +
		"},\n    {name: ws2, address: 10.0.0.12" + more + "}]}\n"
}

// TestLoadLists reads a file with several addresses, ports and outer sources, written in all their ways.
func TestLoadLists(t *testing.T) {
	path := filepath.Join("testdata", "lists.yaml")
	cfg, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := []Service{{
		Name: "games", Address: netip.MustParseAddr("192.0.2.20"), Port: 443,
		Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.20"), netip.MustParseAddr("192.0.2.21")},
		Ports:     []PortRange{{443, 444}, {27015, 27050}},
		Protocol:  ProtocolUDP, Method: MethodGUE, IdleTimeout: 2 * time.Minute,
		TunnelSources: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("2001:db8:9::/64")},
		Backends: []Backend{{Name: "g1", Address: netip.MustParseAddr("10.0.0.21"), Weight: 1},
			{Name: "g2", Address: netip.MustParseAddr("2001:db8:1::22"), Weight: 1}},
	}, {
		Name: "mail", Address: netip.MustParseAddr("2001:db8::25"), Port: 465,
		Addresses: []netip.Addr{netip.MustParseAddr("2001:db8::25")},
		Ports:     []PortRange{{465, 465}, {587, 587}},
		Protocol:  ProtocolTCP, Method: MethodNAT, IdleTimeout: 24 * time.Hour,
		Backends: []Backend{{Name: "m1", Address: netip.MustParseAddr("2001:db8:1::25"), Port: 25, Weight: 1}},
	}, {
		Name: "web", Address: netip.MustParseAddr("192.0.2.30"), Port: 443,
		Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.30")},
		Ports:     []PortRange{{443, 443}},
		Protocol:  ProtocolTCP, Method: MethodIPIP, IdleTimeout: 24 * time.Hour,
		TunnelSources: []netip.Prefix{netip.MustParsePrefix("10.9.1.7/32")},
		Backends:      []Backend{{Name: "w1", Address: netip.MustParseAddr("10.0.0.31"), Port: 443, Weight: 1}},
	}}
	for i := range want {
		s := &want[i]
		s.Affinity, s.RingSize, s.OnBackendDown = AffinityConnection, 65537, DownReset
		s.Health, s.Balance = Health{Type: HealthNone}, Balance{Mode: BalanceHash}
		s.ProxyProtocol, s.Announce, s.AllDown, s.ResetRate = ProxyNone, AnnounceAuto, AllDownOpen, 20000
	}
	if diff := cmp.Diff(want, cfg.Services, asValue); diff != "" {
		t.Errorf("lists.yaml (-want +got):\n%s", diff)
	}
	if errs := cfg.Unsupported(); errs != nil {
		t.Errorf("lists.yaml is unsupported: %v", errs)
	}
}

func TestEndpoints(t *testing.T) {
	s := mustParse(t, listed("addresses: [192.0.2.11, 192.0.2.10], ports: [8001, 80, 8002-8003], method: dsr", "")).Services[0]
	var got []string
	for at := range s.Endpoints() {
		got = append(got, at.String())
	}
	want := []string{
		"192.0.2.11:80", "192.0.2.11:8001", "192.0.2.11:8002", "192.0.2.11:8003",
		"192.0.2.10:80", "192.0.2.10:8001", "192.0.2.10:8002", "192.0.2.10:8003",
	}
	if diff := cmp.Diff(want, got); diff != "" || s.EndpointCount() != len(want) {
		t.Errorf("%d endpoints (-want +got):\n%s", s.EndpointCount(), diff)
	}
	for at := range s.Endpoints() { // it may be left
		if at != netip.MustParseAddrPort("192.0.2.11:80") || s.Address != at.Addr() || s.Port != at.Port() {
			t.Errorf("the first is %v, by its fields %v and %d", at, s.Address, s.Port)
		}
		break
	}
	whole := mustParse(t, listed("address: 192.0.2.10, ports: [1-65535], method: dsr", "")).Services[0]
	count := 0
	for range whole.Endpoints() {
		count++
	}
	if count != 65535 || whole.EndpointCount() != count {
		t.Errorf("ports 1-65535 are %d endpoints, said to be %d", count, whole.EndpointCount())
	}
}

// TestOneSpelling holds that a configuration is the same however its lists are written.
func TestOneSpelling(t *testing.T) {
	for _, same := range [][]string{
		{"address: 192.0.2.10, port: 443, method: gue", "addresses: [192.0.2.10], ports: [443], method: gue",
			"addresses: [192.0.2.10], ports: [443-443], method: gue", "address: 192.0.2.10, port: 443, method: gue, tunnel_source: []"},
		{"address: 192.0.2.10, ports: [80, 443-445], method: dsr", "address: 192.0.2.10, ports: [444, 445, 443, 80], method: dsr"},
		{"address: 192.0.2.10, port: 1, method: ipip, tunnel_source: [10.9.0.1, '2001:db8:9::/64']",
			"address: 192.0.2.10, port: 1, method: ipip, tunnel_source: ['2001:db8:9::/64', 10.9.0.1/32]"},
		{"address: 192.0.2.10, port: 1, method: ipip, tunnel_source: 10.9.0.1",
			"address: 192.0.2.10, port: 1, method: ipip, tunnel_source: [10.9.0.1]"},
	} {
		first := mustParse(t, listed(same[0], ""))
		for _, text := range same[1:] {
			if got := mustParse(t, listed(text, "")); !got.Equal(first) {
				t.Errorf("%s\nis not %s (-that +this):\n%s", text, same[0], cmp.Diff(first, got, asValue))
			}
		}
	}
	a := mustParse(t, listed("addresses: [192.0.2.10, 192.0.2.11], port: 443", ""))
	b := mustParse(t, listed("addresses: [192.0.2.11, 192.0.2.10], port: 443", ""))
	if a.Equal(b) {
		t.Error("the order of addresses, whose first names the service, is lost")
	}
}

// TestBackendPorts is what a backend's port is, by method and by how many ports the service has.
func TestBackendPorts(t *testing.T) {
	for _, test := range []struct {
		ports   string
		given   string
		methods string
		want    uint16
	}{
		{"port: 443", "", "fullnat nat dsr ipip gue", 443},
		{"ports: [443]", "", "fullnat nat dsr ipip gue", 443},
		{"ports: [443-443]", "", "fullnat nat dsr ipip gue", 443},
		{"port: 443", ", port: 443", "fullnat nat dsr ipip gue", 443},
		{"ports: [443]", ", port: 80", "fullnat nat", 80},
		{"ports: [443, 80]", "", "dsr ipip gue", 0},
		{"ports: [8000-8001]", "", "dsr ipip gue", 0},
		{"ports: [443, 80]", ", port: 8080", "fullnat nat", 8080},
		{"ports: [8000-8001]", ", port: 8000", "fullnat nat", 8000},
	} {
		for _, method := range strings.Fields(test.methods) {
			text := listed("address: 192.0.2.10, "+test.ports+", method: "+method, test.given)
			for _, b := range mustParse(t, text).Services[0].Backends {
				if b.Port != test.want {
					t.Errorf("%s backend %s%s: port %d, want %d", method, test.ports, test.given, b.Port, test.want)
				}
			}
		}
	}
}

func TestEndpointRefusals(t *testing.T) {
	all := func(method string) string { return "address: 192.0.2.10, port: 443, method: " + method }
	second := func(fields string) string {
		return listed(all("dsr"), "") + "- {name: web, " + fields + ", method: dsr, backends: [{name: b, address: 10.0.0.20}]}\n"
	}
	tests := []struct {
		name, text string
		want       []string
	}{
		// one or several
		{"no address", listed("port: 443", ""), []string{
			"2: services[0].address: is missing: write address: and its value, or addresses: and a list"}},
		{"no port", listed("address: 192.0.2.10", ""), []string{
			"2: services[0].port: is missing: write port: and its value, or ports: and a list"}},
		{"address twice over", listed("address: 192.0.2.10, addresses: [192.0.2.10], port: 443", ""), []string{
			"2: services[0].addresses: address is given too, in line 2: keep one of the two"}},
		{"port twice over", listed("address: 192.0.2.10, ports: [80],\n  port: 443", ""), []string{
			"2: services[0].ports: port is given too, in line 3: keep one of the two"}},
		{"both wrong besides", listed("address: 192.0.2.10, addresses: [224.0.0.1], ports: [http], port: 0", ""), []string{
			"2: services[0].addresses: address is given too, in line 2: keep one of the two",
			"2: services[0].addresses[0]: 224.0.0.1 is a multicast address: write a unicast address",
			"2: services[0].ports: port is given too, in line 2: keep one of the two",
			"2: services[0].ports[0]: \"http\" is not a port or a range of ports: take a number from 1 to 65535, or two, as in 8000-8100",
			"2: services[0].port: \"0\" is not a port: take a number from 1 to 65535"}},
		{"no addresses", listed("addresses: [], port: 443", ""), []string{
			"2: services[0].addresses: the list is empty: list one at least, or take the line out"}},
		{"no ports", listed("address: 192.0.2.10, ports: []", ""), []string{
			"2: services[0].ports: the list is empty: list one at least, or take the line out"}},
		{"addresses null", listed("addresses: , port: 443", ""), []string{
			"2: services[0].addresses: has no value: write a list, or take the line out"}},
		{"ports null beside port", listed("address: 192.0.2.10, port: 443, ports: ", ""), []string{
			"2: services[0].ports: has no value: write a list, or take the line out"}},
		{"port null beside ports", listed("address: 192.0.2.10, port: , ports: [443]", ""), []string{
			"2: services[0].port: has no value: write one, or take the line out"}},
		{"addresses a value", listed("addresses: 192.0.2.10, port: 443", ""), []string{
			"2: services[0].addresses: is a single value where a list belongs: write it in [ ], or each item after a dash"}},
		{"ports a value", listed("address: 192.0.2.10, ports: 80-90", ""), []string{
			"2: services[0].ports: is a single value where a list belongs: write it in [ ], or each item after a dash"}},
		{"port a range", listed("address: 192.0.2.10, port: 80-90", ""), []string{
			"2: services[0].port: \"80-90\" is not a port: write ports: [80-90]"}},
		{"port a range of one", listed("address: 192.0.2.10, port: 80-80", ""), []string{
			"2: services[0].port: \"80-80\" is not a port: write ports: [80]"}},

		// the items
		{"addresses item empty", listed("addresses: [192.0.2.10, ~], port: 443", ""), []string{
			"2: services[0].addresses[1]: has no value: write one, or take the line out"}},
		{"addresses item", listed("addresses: [192.0.2.10, '::ffff:192.0.2.11', 'fe80::1', 0.0.0.0], port: 443", ""), []string{
			"2: services[0].addresses[1]: ::ffff:192.0.2.11 is an IPv4 address mapped into IPv6: write 192.0.2.11",
			"2: services[0].addresses[2]: fe80::1 is a link-local address without an interface: add its interface, as in fe80::1%eth0",
			"2: services[0].addresses[3]: 0.0.0.0 is the unspecified address: write the address itself"}},
		{"address listed twice", listed("addresses: [192.0.2.10, 192.0.2.11, 192.0.2.10], port: 443", ""), []string{
			"2: services[0].addresses[2]: 192.0.2.10 is listed already: list each address once"}},
		{"address listed twice but for its interface", listed("addresses: ['fe80::1%eth0', 'fe80::1%eth1'], port: 443, method: gue", ""), []string{
			"2: services[0].addresses[1]: fe80::1%eth1 is listed already: list each address once"}},
		{"two families", listed("addresses: [192.0.2.10, '2001:db8::10'], port: 443", ""), []string{
			"2: services[0].addresses[1]: 2001:db8::10 is IPv6, but 192.0.2.10 before it is IPv4: give the IPv6 addresses a service of their own"}},
		{"two families, the other way", listed("addresses: ['2001:db8::10', 192.0.2.10], port: 443, method: gue", ""), []string{
			"2: services[0].addresses[1]: 192.0.2.10 is IPv4, but 2001:db8::10 before it is IPv6: give the IPv4 addresses a service of their own"}},
		{"port zero", listed("address: 192.0.2.10, ports: [0-5], method: dsr", ""), []string{
			"2: services[0].ports[0]: \"0-5\" is not a port or a range of ports: take a number from 1 to 65535, or two, as in 8000-8100"}},
		{"port large", listed("address: 192.0.2.10, ports: [443, 65536], method: dsr", ""), []string{
			"2: services[0].ports[1]: \"65536\" is not a port or a range of ports: take a number from 1 to 65535, or two, as in 8000-8100"}},
		{"ports reversed", listed("address: 192.0.2.10, ports: [443, 90-80], method: dsr", ""), []string{
			"2: services[0].ports[1]: \"90-80\" ends before it begins: write 80-90"}},
		{"ports of three", listed("address: 192.0.2.10, ports: [1-2-3], method: dsr", ""), []string{
			"2: services[0].ports[0]: \"1-2-3\" is not a port or a range of ports: take a number from 1 to 65535, or two, as in 8000-8100"}},
		{"port listed twice", listed("address: 192.0.2.10, ports: [80, 443, 80], method: dsr", ""), []string{
			"2: services[0].ports[2]: 80 is listed already: list each port once"}},
		{"ports overlap", listed("address: 192.0.2.10, ports: [8000-8100, 8100-8200, 8050, 1-65535, 7999, 8101], method: dsr", ""), []string{
			"2: services[0].ports[1]: 8100-8200 overlaps 8000-8100, which is listed already: list each port once",
			"2: services[0].ports[2]: 8050 overlaps 8000-8100, which is listed already: list each port once",
			"2: services[0].ports[3]: 1-65535 overlaps 8000-8100, which is listed already: list each port once"}},
		{"too many together", "services:\n" + strings.Repeat("- {name: NAME, address: 192.0.2.10, ports: [1-65535], method: dsr, backends: [{name: a, address: 10.0.0.1}]}\n", 2), []string{
			"2: services: 131070 pairs of address and port altogether are over the limit of 65536: divide them between hosts",
			"3: services[1].name: service NAME stands in line 2 already: give it a name of its own"}},
		{"too many of one", listed("addresses: [192.0.2.10, 192.0.2.11], ports: [1-32769], method: dsr", ""), []string{
			"2: services: 65538 pairs of address and port altogether are over the limit of 65536: divide them between hosts"}},

		// backends
		{"several ports, a port under dsr", listed("address: 192.0.2.10, ports: [80, 443], method: dsr", ", port: 80"), []string{
			"4: services[0].backends[0].port: under dsr packets arrive with the port that the client chose of the service's several: leave the port out, or take method fullnat or nat",
			"5: services[0].backends[1].port: under dsr packets arrive with the port that the client chose of the service's several: leave the port out, or take method fullnat or nat"}},
		{"several ports, a port under ipip", strings.Replace(listed("address: 192.0.2.10, ports: [80-81], method: ipip", ""), "10.0.0.11", "10.0.0.11, port: 80", 1), []string{
			"4: services[0].backends[0].port: under ipip packets arrive with the port that the client chose of the service's several: leave the port out, or take method fullnat or nat"}},
		{"several ports, a port under gue", strings.Replace(listed("address: 192.0.2.10, ports: [80-81], method: gue", ""), "10.0.0.11", "10.0.0.11, port: 80", 1), []string{
			"4: services[0].backends[0].port: under gue packets arrive with the port that the client chose of the service's several: leave the port out, or take method fullnat or nat"}},
		{"several ports, none under fullnat", listed("address: 192.0.2.10, ports: [80-81]", ""), []string{
			"4: services[0].backends[0].port: is missing, and under fullnat the service's several ports become one of the backend's: write port: and that one, or take method dsr, ipip or gue",
			"5: services[0].backends[1].port: is missing, and under fullnat the service's several ports become one of the backend's: write port: and that one, or take method dsr, ipip or gue"}},
		{"several ports, none under nat", strings.Replace(listed("address: 192.0.2.10, ports: [80, 90], method: nat", ", port: 80"), ".12, port: 80", ".12", 1), []string{
			"5: services[0].backends[1].port: is missing, and under nat the service's several ports become one of the backend's: write port: and that one, or take method dsr, ipip or gue"}},
		{"several ports, one of them refused, none under nat", strings.Replace(listed("address: 192.0.2.10, ports: [80, x], method: nat", ", port: 80"), ".12, port: 80", ".12", 1), []string{
			"2: services[0].ports[1]: \"x\" is not a port or a range of ports: take a number from 1 to 65535, or two, as in 8000-8100",
			"5: services[0].backends[1].port: is missing, and under nat the service's several ports become one of the backend's: write port: and that one, or take method dsr, ipip or gue"}},
		{"several ports, one address twice", strings.Replace(listed("address: 192.0.2.10, ports: [80, 90], method: dsr", ""), "10.0.0.12", "10.0.0.11", 1), []string{
			"5: services[0].backends[1].address: 10.0.0.11 is backend ws1 of line 4 already: take one of them out; a weight gives a backend a larger share"}},
		{"backend is one of several addresses and ports", second("addresses: [192.0.2.40, 10.0.0.12], ports: [80, 400-500]"), []string{
			"5: services[0].backends[1].address: 10.0.0.12:443 tcp is the address of service web, so that connections would go in a circle: write the address of the server itself"}},
		{"backend of several ports is a service", listed("address: 192.0.2.10, ports: [80, 400-500], method: gue", "") +
			"- {name: web, address: 10.0.0.12, ports: [81-399, 450], method: dsr, backends: [{name: b, address: 10.0.0.20}]}\n", []string{
			"5: services[0].backends[1].address: 10.0.0.12:450 tcp is the address of service web, so that connections would go in a circle: write the address of the server itself"}},
		{"families under dsr", listed("addresses: ['2001:db8::10', '2001:db8::11'], port: 443, method: dsr", ""), []string{
			"4: services[0].backends[0].address: 10.0.0.11 is IPv4, but clients come by IPv6, and dsr can't cross: take an IPv6 address, or method ipip or gue",
			"5: services[0].backends[1].address: 10.0.0.12 is IPv4, but clients come by IPv6, and dsr can't cross: take an IPv6 address, or method ipip or gue"}},

		// services against each other
		{"a port in another's range", second("address: 192.0.2.10, ports: [1-442, 443, 500]"), []string{
			"6: services[1].address: 192.0.2.10:443 tcp is service chat of line 2 already: make them one service, or take another address or port"}},
		{"an address in another's list", second("addresses: [192.0.2.9,\n  192.0.2.10, 192.0.2.11], port: 443"), []string{
			"7: services[1].addresses[1]: 192.0.2.10:443 tcp is service chat of line 2 already: make them one service, or take another address or port"}},
		{"ranges that overlap", "services:\n" +
			"- {name: a, addresses: [192.0.2.1, 192.0.2.2], ports: [100-200, 300-400], method: dsr, backends: [{name: b, address: 10.0.0.20}]}\n" +
			"- {name: b, addresses: [192.0.2.2, 192.0.2.3], ports: [50-99, 201], method: dsr, backends: [{name: b, address: 10.0.0.20}]}\n" +
			"- {name: c, addresses: [192.0.2.3, 192.0.2.2, '192.0.2.1'], ports: [90-110, 150, 390-410], method: dsr, backends: [{name: b, address: 10.0.0.20}]}\n", []string{
			"4: services[2].addresses[0]: 192.0.2.3:90-99 tcp is service b of line 3 already: make them one service, or take another address or port",
			"4: services[2].addresses[1]: 192.0.2.2:90-99 tcp is service b of line 3 already: make them one service, or take another address or port",
			"4: services[2].addresses[1]: 192.0.2.2:100-110 tcp is service a of line 2 already: make them one service, or take another address or port",
			"4: services[2].addresses[1]: 192.0.2.2:150 tcp is service a of line 2 already: make them one service, or take another address or port",
			"4: services[2].addresses[1]: 192.0.2.2:390-400 tcp is service a of line 2 already: make them one service, or take another address or port",
			"4: services[2].addresses[2]: 192.0.2.1:100-110 tcp is service a of line 2 already: make them one service, or take another address or port",
			"4: services[2].addresses[2]: 192.0.2.1:150 tcp is service a of line 2 already: make them one service, or take another address or port",
			"4: services[2].addresses[2]: 192.0.2.1:390-400 tcp is service a of line 2 already: make them one service, or take another address or port"}},
		{"ranges of an IPv6 address", "services:\n" +
			"- {name: a, address: '2001:db8::1', ports: [100-200], protocol: udp, method: dsr, backends: [{name: b, address: '2001:db8::20'}]}\n" +
			"- {name: b, address: '2001:db8::1', ports: [150-250], protocol: udp, method: dsr, backends: [{name: b, address: '2001:db8::20'}]}\n", []string{
			"3: services[1].address: [2001:db8::1]:150-200 udp is service a of line 2 already: make them one service, or take another address or port"}},
		{"source ports over a range", listed("addresses: [192.0.2.10, 192.0.2.11], ports: [80, 5000-6000], source_addresses: [192.0.2.11],\n  source_ports: 1024-32767", ", port: 80"), []string{
			"3: services[0].source_ports: ports 1024-32767 of 192.0.2.11 hold port 5000 of service chat on that address: take a range without it"}},
		{"source ports inside a range", listed("addresses: [192.0.2.10, 192.0.2.11], ports: [80, 5000-6000], source_addresses: [192.0.2.11],\n  source_ports: 5500-5600", ", port: 80"), []string{
			"3: services[0].source_ports: ports 5500-5600 of 192.0.2.11 hold port 5500 of service chat on that address: take a range without it"}},
	}
	for _, test := range tests {
		if diff := cmp.Diff(test.want, refused(test.text)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

func TestEndpointsAccepted(t *testing.T) {
	two := func(first, second string) string {
		return listed(first, "") + "- {name: web, " + second + ", backends: [{name: b, address: 10.0.0.20}]}\n"
	}
	for name, text := range map[string]string{
		"ranges side by side":       two("address: 192.0.2.10, ports: [80, 100-200], method: dsr", "address: 192.0.2.10, ports: [81-99, 201], method: dsr"),
		"lists side by side":        two("addresses: [192.0.2.10, 192.0.2.12], port: 80", "addresses: [192.0.2.11, 192.0.2.13], port: 80"),
		"one list by both":          two("addresses: [192.0.2.10, 192.0.2.12], port: 53", "addresses: [192.0.2.10, 192.0.2.12], port: 53, protocol: udp"),
		"all pairs":                 listed("addresses: [192.0.2.10, 192.0.2.11], ports: [1-32768], method: dsr", ""),
		"all pairs of two":          two("address: 192.0.2.10, ports: [1-65535], method: dsr", "address: 192.0.2.11, port: 1"),
		"families cross under gue":  listed("addresses: ['2001:db8::10', '2001:db8::11'], ports: [1, 2], method: gue", ""),
		"families cross under ipip": listed("addresses: ['2001:db8::10', '2001:db8::11'], ports: [1, 2], method: ipip", ""),
		"a backend beside a service": two("address: 192.0.2.10, ports: [80, 400-500], method: gue",
			"address: 10.0.0.12, ports: [81-399, 501], method: dsr"),
		"a backend of another protocol": two("address: 192.0.2.10, ports: [80, 81], method: gue",
			"address: 10.0.0.12, ports: [80, 81], protocol: udp, method: dsr"),
		"source ports between": listed("addresses: [192.0.2.10, 192.0.2.11], ports: [80, 5000-6000], source_addresses: [192.0.2.11], source_ports: 81-4999", ", port: 80"),
		"source ports of an address not listed": listed("addresses: [192.0.2.10, 192.0.2.11], ports: [80, 5000-6000], source_addresses: [192.0.2.12], source_ports: 1-65535",
			", port: 80"),
	} {
		if errs := refused(text); len(errs) > 0 {
			t.Errorf("%s: %s", name, strings.Join(errs, "\n"))
		}
	}
}

func TestServiceWithin(t *testing.T) {
	cfg := mustParse(t, listed("addresses: [192.0.2.10, 192.0.2.11], ports: [443, 8000-8100], method: dsr", "")+
		"- {name: web, address: 192.0.2.11, ports: [80, 8101-8200], method: dsr, backends: [{name: b, address: 10.0.0.20}]}\n")
	for _, test := range []struct {
		address string
		ports   PortRange
		service string
		port    uint16 // of that service, the lowest within
	}{
		{"192.0.2.10", PortRange{1, 443}, "chat", 443},
		{"192.0.2.10", PortRange{443, 443}, "chat", 443},
		{"192.0.2.10", PortRange{1, 442}, "", 0},
		{"192.0.2.10", PortRange{444, 7999}, "", 0},
		{"192.0.2.10", PortRange{444, 8000}, "chat", 8000},
		{"192.0.2.10", PortRange{8050, 8060}, "chat", 8050},
		{"192.0.2.10", PortRange{8101, 65535}, "", 0},
		{"192.0.2.10", PortRange{}, "", 0},
		{"192.0.2.11", PortRange{1, 65535}, "web", 80},
		{"192.0.2.11", PortRange{81, 65535}, "chat", 443},
		{"192.0.2.11", PortRange{8090, 65535}, "chat", 8090},
		{"192.0.2.11", PortRange{8101, 65535}, "web", 8101},
		{"192.0.2.12", PortRange{1, 65535}, "", 0},
	} {
		s, ok := cfg.ServiceWithin(netip.MustParseAddr(test.address), ProtocolTCP, test.ports)
		port, within := s.PortWithin(test.ports)
		if s.Name != test.service || ok != (test.service != "") || port != test.port || within != ok {
			t.Errorf("%s %v: service %q (%v), its port %d (%v), want %q and %d", test.address, test.ports, s.Name, ok,
				port, within, test.service, test.port)
		}
		if _, ok := cfg.ServiceWithin(netip.MustParseAddr(test.address), ProtocolUDP, test.ports); ok {
			t.Errorf("%s %v: udp took tcp's port", test.address, test.ports)
		}
	}
	zone := mustParse(t, listed("address: fe80::1%eth0, port: 443, method: ipip", ""))
	if _, ok := zone.ServiceWithin(netip.MustParseAddr("fe80::1%eth1"), ProtocolTCP, PortRange{443, 443}); !ok {
		t.Error("a link-local address counts once for each interface, which the data plane does not tell apart")
	}
	if _, ok := new(Config).ServiceWithin(netip.MustParseAddr("192.0.2.10"), ProtocolTCP, PortRange{1, 65535}); ok {
		t.Error("a configuration without services has one")
	}
}

// TestEndpointsAgree compares what is found by ranges with what is found by looking at each pair alone.
func TestEndpointsAgree(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	accepted := 0
	for range 3000 {
		data := make([]byte, 3+random.IntN(40))
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		if agree(t, data) {
			accepted++
		}
		if t.Failed() {
			return
		}
	}
	if accepted == 0 || accepted == 3000 {
		t.Errorf("%d of 3000 configurations were accepted: one side was never tried", accepted)
	}
}

// FuzzEndpoints asks of services with any lists of a few addresses and ports what TestEndpointsAgree does.
func FuzzEndpoints(f *testing.F) {
	for _, seed := range []string{"", "abc", "aaaaaaaaaaaa", "0123456789abcdef", "\x00\x05\x01\x02\x09\x01\x05\x01\x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) { agree(t, data) })
}

// agree makes services of data's bytes, and reports whether the configuration was accepted.
func agree(t *testing.T, data []byte) bool {
	t.Helper()
	next := func(n int) int {
		if len(data) == 0 {
			return 0
		}
		b := data[0]
		data = data[1:]
		return int(b) % n
	}
	type pair struct {
		at       netip.AddrPort
		protocol string
	}
	address := func() netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(next(4))}) }
	owners, right := map[pair]string{}, true
	var text strings.Builder
	text.WriteString("services:\n")
	for i := range 1 + next(4) {
		name, protocol := fmt.Sprint("s", i), []string{"tcp", "udp"}[next(2)]
		addresses := map[netip.Addr]bool{}
		for range 1 + next(2) {
			addresses[address()] = true
		}
		ports, spelled := map[uint16]bool{}, []string{}
		for range 1 + next(3) {
			first := 1 + next(12)
			last := first + next(4)
			spelled = append(spelled, fmt.Sprintf("%d-%d", first, last))
			for port := first; port <= last; port++ {
				right = right && !ports[uint16(port)]
				ports[uint16(port)] = true
			}
		}
		for a := range addresses {
			for port := range ports {
				p := pair{netip.AddrPortFrom(a, port), protocol}
				if owners[p] != "" {
					right = false
				}
				owners[p] = name
			}
		}
		list := []string{}
		for a := range addresses {
			list = append(list, a.String())
		}
		slices.Sort(list)
		fmt.Fprintf(&text, "- {name: %s, addresses: [%s], ports: [%s], protocol: %s, method: gue, backends: [{name: b, address: 10.0.0.1}]}\n",
			name, strings.Join(list, ", "), strings.Join(spelled, ", "), protocol)
	}
	cfg, err := parse("edge.yaml", []byte(text.String()), testHost)
	if (err == nil) != right {
		t.Errorf("error %v, want one: %v, of\n%s", err, !right, &text)
	}
	if err != nil {
		return false
	}
	got := map[pair]string{}
	for _, s := range cfg.Services {
		count := 0
		for at := range s.Endpoints() {
			got[pair{at, s.Protocol.String()}] = s.Name
			count++
		}
		if count != s.EndpointCount() {
			t.Errorf("%d endpoints, said to be %d", count, s.EndpointCount())
		}
	}
	if !maps.Equal(got, owners) {
		t.Errorf("endpoints %v, want %v, of\n%s", got, owners, &text)
	}
	first := uint16(1 + next(20))
	asked := PortRange{first, first + uint16(next(8))}
	for last := range 4 {
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(last)})
		want, wantPort := "", uint16(0)
		for port := range asked.All() {
			if want = owners[pair{netip.AddrPortFrom(a, port), "tcp"}]; want != "" {
				wantPort = port
				break
			}
		}
		s, ok := cfg.ServiceWithin(a, ProtocolTCP, asked)
		port, within := s.PortWithin(asked)
		if s.Name != want || ok != (want != "") || port != wantPort || within != ok {
			t.Errorf("%v %v: service %q port %d, want %q port %d, of\n%s", a, asked, s.Name, port, want, wantPort, &text)
		}
	}
	return true
}

// TestManyEndpoints checks what stands at the limits; what grew faster than them would not end in the time of a test.
func TestManyEndpoints(t *testing.T) {
	var singles, addresses, clash []string
	for i := range 65535 {
		singles = append(singles, fmt.Sprint(65535-i))
	}
	for i := range maxEndpoints {
		addresses = append(addresses, fmt.Sprintf("10.100.%d.%d", i>>8, i&255))
	}
	const apart, length = 8, 16
	for i := range maxServices {
		clash = append(clash, fmt.Sprintf("- {name: s%d, address: 10.200.0.%d, ports: [%d-%d], method: dsr, backends: "+
			"[{name: a, address: 10.0.0.1}]}", i, i%apart, 1+i, length+i))
	}
	for name, test := range map[string]struct {
		text   string
		errors int
	}{
		"every port, falling": {listed("address: 192.0.2.10, ports: ["+strings.Join(singles, ", ")+"], method: dsr", ""), 0},
		"addresses":           {listed("addresses: ["+strings.Join(addresses, ", ")+"], port: 1", ""), 0},
		"ranges that overlap": {"services:\n" + strings.Join(clash, "\n") + "\n", maxServices - apart},
	} {
		if errs := refused(test.text); len(errs) != test.errors {
			t.Errorf("%s: %d errors, want %d: %.300s", name, len(errs), test.errors, errs)
		}
	}
}
