package announce

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	ourMAC   = mac{2, 0, 0, 0, 0, 1}
	otherMAC = mac{2, 0, 0, 0, 0, 2}
)

func TestGroupOf(t *testing.T) {
	for address, want := range map[string]struct{ group, mac string }{
		"2001:db8::1":                   {"ff02::1:ff00:1", "33:33:ff:00:00:01"},
		"fe80::abcd:ef12:3456%eth0":     {"ff02::1:ff12:3456", "33:33:ff:12:34:56"},
		"fd00:1:2:3:4:5:aabb:ccdd":      {"ff02::1:ffbb:ccdd", "33:33:ff:bb:cc:dd"},
		"2001:db8:ffff:ffff::feff:ffff": {"ff02::1:ffff:ffff", "33:33:ff:ff:ff:ff"},
	} {
		group := solicitedNode(netip.MustParseAddr(address))
		if group.String() != want.group || groupMAC(group).String() != want.mac {
			t.Errorf("%s: %s %s", address, group, groupMAC(group))
		}
	}
}

// change is a frame with some of its bytes replaced; its ICMPv6 checksum is put right again.
func change(frame []byte, at int, with ...byte) []byte {
	b := bytes.Clone(frame)
	copy(b[at:], with)
	if protocolOf(b) != unix.ETH_P_IPV6 {
		return b
	}
	icmp := ethernetLength + ipv6Length
	if b[20] == unix.IPPROTO_HOPOPTS {
		icmp += hopByHopLength
	}
	b[icmp+2], b[icmp+3] = 0, 0
	return sealICMP(b, icmp, netip.AddrFrom16([16]byte(b[22:])), netip.AddrFrom16([16]byte(b[38:])))
}

func TestParse(t *testing.T) {
	vip4, vip6, peer6 := netip.MustParseAddr(vip4), netip.MustParseAddr(vip6), netip.MustParseAddr("fd00::2")
	const l4 = ethernetLength + ipv6Length
	solicitation := buildNDP(otherMAC, peer6, solicitedNode(vip6), icmpSolicitation, 0, vip6, optionSourceMAC)
	advertisement := announcementFrame(otherMAC, vip6)
	router := netip.MustParseAddr("fe80::1")
	query := func(code uint16, rest int) []byte {
		m := binary.BigEndian.AppendUint16([]byte{icmpMLDQuery, 0, 0, 0}, code)
		return buildMLD(otherMAC, router, allNodes, append(m, make([]byte, 18+rest)...))
	}
	dad := func(option uint8) []byte {
		return buildNDP(otherMAC, netip.IPv6Unspecified(), solicitedNode(vip6), icmpSolicitation, 0, vip6, option)
	}
	bare := buildNDP(otherMAC, vip6, allNodes, icmpAdvertisement, 0, vip6, 0)
	report := reportFrame(otherMAC, router, recordToExclude, []netip.Addr{solicitedNode(vip6), allNodes})
	is := func(k kind, address netip.Addr, host mac) *message {
		return &message{kind: k, address: address, host: host}
	}
	for name, test := range map[string]struct {
		frame []byte
		want  *message
	}{
		"ARP probe":                 {probeFrame(otherMAC, vip4), is(probed, vip4, otherMAC)},
		"ARP announcement":          {announcementFrame(otherMAC, vip4), is(used, vip4, otherMAC)},
		"ARP answer to a probe":     {answerFrame(otherMAC, vip4, ourMAC), is(used, vip4, otherMAC)},
		"ARP padded":                {append(probeFrame(otherMAC, vip4), make([]byte, 18)...), is(probed, vip4, otherMAC)},
		"ARP cut":                   {probeFrame(otherMAC, vip4)[:41], nil},
		"ARP of other hardware":     {change(probeFrame(otherMAC, vip4), 15, 6), nil},
		"ARP of another protocol":   {change(probeFrame(otherMAC, vip4), 16, 9), nil},
		"reverse ARP":               {change(announcementFrame(otherMAC, vip4), 21, 3), nil},
		"ARP reply from nobody":     {change(probeFrame(otherMAC, vip4), 21, 2), nil},
		"ARP from a group":          {change(announcementFrame(otherMAC, vip4), 22, 0x33), nil},
		"ARP from no MAC":           {change(announcementFrame(otherMAC, vip4), 22, 0, 0, 0, 0, 0, 0), nil},
		"ARP from another's frame":  {change(announcementFrame(otherMAC, vip4), 7, 8, 8, 8), is(used, vip4, otherMAC)},
		"DAD":                       {probeFrame(otherMAC, vip6), is(probed, vip6, otherMAC)},
		"DAD to another group":      {change(probeFrame(otherMAC, vip6), l4-1, 0x11), nil},
		"DAD with a MAC":            {dad(optionSourceMAC), nil},
		"DAD with a nonce":          {dad(14), is(probed, vip6, otherMAC)},
		"solicitation by an owner":  {solicitation, is(used, peer6, otherMAC)},
		"solicitation by proxy":     {change(solicitation, l4+ndpLength+3, 7), is(used, peer6, mac{2, 7, 0, 0, 0, 2})},
		"advertisement":             {advertisement, is(used, vip6, otherMAC)},
		"advertisement without MAC": {bare, is(used, vip6, otherMAC)},
		"advertisement cut":         {advertisement[:len(advertisement)-1], nil},
		"advertisement routed":      {change(advertisement, 21, 254), nil},
		"advertisement with code":   {change(advertisement, l4+1, 1), nil},
		"advertisement of a group":  {change(advertisement, l4+8, 0xff), nil},
		"option of no length":       {change(advertisement, l4+ndpLength+1, 0), nil},
		"option too long":           {change(advertisement, l4+ndpLength+1, 2), nil},
		"MAC of a group":            {change(advertisement, l4+ndpLength+2, 1), nil},
		"wrong checksum":            {append(bytes.Clone(advertisement[:len(advertisement)-1]), 0xee), nil},
		"IPv4 in IPv6's place":      {change(advertisement, 14, 0x45), nil},
		"redirect":                  {change(advertisement, l4, 137), nil},
		"query, version 1":          {query(10000, 0), &message{kind: queried, within: 10 * time.Second, old: true}},
		"query, version 2":          {query(1000, 4), &message{kind: queried, within: time.Second}},
		"query, long":               {query(0xb005, 4), &message{kind: queried, within: 0x1005 << 6 * time.Millisecond}},
		"query, version 1, longest": {query(0xffff, 0), &message{kind: queried, within: 65535 * time.Millisecond, old: true}},
		"query from afar":           {change(query(1000, 4), 22, 0x20, 0x01), nil},
		"query routed":              {change(query(1000, 4), 21, 2), nil},
		"report":                    {report, nil},
		"old report":                {oldReportFrame(otherMAC, router, solicitedNode(vip6)), nil},
		"IPv4":                      {append(ethernet(ourMAC, otherMAC, unix.ETH_P_IP, 0), make([]byte, 40)...), nil},
		"next to nothing":           {make([]byte, 13), nil},
	} {
		got, ok := parse(test.frame)
		if ok != (test.want != nil) || ok && got != *test.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, ok, test.want)
		}
	}
}

// FuzzParse asks of any bytes: what is read of them can be said in frames that are read alike.
func FuzzParse(f *testing.F) {
	for _, address := range []netip.Addr{netip.MustParseAddr(vip4), netip.MustParseAddr(vip6)} {
		f.Add(probeFrame(ourMAC, address))
		f.Add(announcementFrame(ourMAC, address))
		f.Add(answerFrame(ourMAC, address, otherMAC))
	}
	vip, router := netip.MustParseAddr(vip6), netip.MustParseAddr("fe80::1")
	f.Add(buildNDP(ourMAC, router, solicitedNode(vip), icmpSolicitation, 0, vip, optionSourceMAC))
	f.Add(buildMLD(ourMAC, router, allNodes, append([]byte{icmpMLDQuery, 0, 0, 0, 0x90, 5, 0, 0}, make([]byte, 20)...)))
	f.Add(buildMLD(ourMAC, router, allNodes, append([]byte{icmpMLDQuery, 0, 0, 0, 0, 5, 0, 0}, make([]byte, 16)...)))
	f.Add(reportFrame(ourMAC, router, recordIsExclude, []netip.Addr{solicitedNode(vip)}))
	f.Fuzz(func(t *testing.T, data []byte) {
		// Few bytes that come by chance have a checksum that fits.
		if len(data) > ethernetLength+ipv6Length+hopByHopLength+4 && protocolOf(data) == unix.ETH_P_IPV6 {
			end := ethernetLength + ipv6Length + int(binary.BigEndian.Uint16(data[18:]))
			if end > ethernetLength+ipv6Length+hopByHopLength+4 && end <= len(data) {
				data = change(data[:end], 0)
			}
		}
		before := bytes.Clone(data)
		m, ok := parse(data)
		if !bytes.Equal(before, data) {
			t.Fatal("the frame was changed")
		}
		if !ok {
			return
		}
		var again []byte
		switch m.kind {
		case used:
			again = announcementFrame(m.host, m.address)
		case probed:
			again = probeFrame(m.host, m.address)
		case queried:
			if m.within < 0 || m.within > 0x1fff<<10*time.Millisecond || m.address.IsValid() {
				t.Errorf("%+v", m)
			}
			return
		}
		if !m.address.IsValid() || m.address.IsMulticast() && m.address.Is6() || m.address.Zone() != "" || !m.host.oneHost() {
			t.Errorf("%+v", m)
		}
		if got, ok := parse(again); !ok || got != m {
			t.Errorf("%+v; said again: %+v, %v", m, got, ok)
		}
	})
}
