package probe

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"fairlead/maps"
)

var random = rand.New(rand.NewPCG(1, 2))

// randomly is a connection with every number drawn.
func randomly(v6 bool, timestamps bool, tags ...uint16) *maps.Connection {
	address := func() netip.Addr {
		var b [16]byte
		for i := range b {
			b[i] = uint8(random.Uint32())
		}
		if v6 {
			b[0] = 0x20
			return netip.AddrFrom16(b)
		}
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	end := func() netip.AddrPort { return netip.AddrPortFrom(address(), uint16(random.Uint32())) }
	c := &maps.Connection{
		Tuple:       maps.Tuple{Source: end(), Destination: end(), Protocol: unix.IPPROTO_TCP},
		SequenceEnd: random.Uint32(), Acknowledgement: random.Uint32(),
		Hop: maps.Hop{MAC: [6]byte{2, 1, 2, 3, 4, 5}, SourceMAC: [6]byte{2, 6, 7, 8, 9, 10}, Interface: 3},
	}
	if timestamps {
		c.Timestamp, c.TimestampEcho = random.Uint32()|1, random.Uint32()
	}
	copy(c.Hop.VLAN[:], tags)
	return c
}

func TestFrame(t *testing.T) {
	const outer = maps.Tag8021AD
	for _, v6 := range []bool{false, true} {
		for _, timestamps := range []bool{false, true} {
			for _, tags := range [][]uint16{nil, {7}, {4094}, {outer | 100}, {outer | 100, 7}, {100, 7}, {outer | 1, outer | 2}} {
				t.Run(fmt.Sprintf("v6=%t timestamps=%t tags=%v", v6, timestamps, tags), func(t *testing.T) {
					for range 50 {
						checkFrame(t, randomly(v6, timestamps, tags...), tags)
					}
					// Numbers at their edges.
					c := randomly(v6, timestamps, tags...)
					c.Acknowledgement = 0
					checkFrame(t, c, tags)
					c.Timestamp, c.TimestampEcho = 0, 7
					checkFrame(t, c, tags)
				})
			}
		}
	}
	udp := randomly(false, false)
	udp.Tuple.Protocol = unix.IPPROTO_UDP
	if b := Frame(udp); b != nil {
		t.Errorf("a probe for UDP: %x", b)
	}
	if b := AppendFrame([]byte("before"), udp); string(b) != "before" {
		t.Errorf("a probe for UDP: %q", b)
	}
}

// checkFrame reads a connection's frame by gopacket and holds every field against what it is to be.
func checkFrame(t *testing.T, c *maps.Connection, tags []uint16) {
	t.Helper()
	b := AppendFrame([]byte("before"), c)
	if string(b[:6]) != "before" || !cmp.Equal(b[6:], Frame(c)) {
		t.Fatal("what stood before the frame is not there any more, or it differs")
	}
	p := gopacket.NewPacket(b[6:], layers.LayerTypeEthernet, gopacket.Default)
	if err := p.ErrorLayer(); err != nil {
		t.Fatal(err.Error())
	}
	eth := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	if [6]byte(eth.DstMAC) != c.Hop.MAC || [6]byte(eth.SrcMAC) != c.Hop.SourceMAC {
		t.Errorf("from %v to %v", eth.SrcMAC, eth.DstMAC)
	}
	kind, at := eth.EthernetType, 1
	for _, tag := range tags {
		dot1q, ok := p.Layers()[at].(*layers.Dot1Q)
		want := layers.EthernetTypeDot1Q
		if tag&maps.Tag8021AD != 0 {
			want = layers.EthernetTypeQinQ
		}
		if !ok || kind != want || dot1q.VLANIdentifier != tag&0xfff || dot1q.Priority != 0 || dot1q.DropEligible {
			t.Fatalf("tag %x: type %v, %+v", tag, kind, dot1q)
		}
		kind = dot1q.Type
		at++
	}
	source, destination := c.Tuple.Destination, c.Tuple.Source
	switch ip := p.Layers()[at].(type) {
	case *layers.IPv4:
		if kind != layers.EthernetTypeIPv4 || ip.Flags != layers.IPv4DontFragment || ip.TTL != 64 || ip.FragOffset != 0 ||
			ip.TOS != 0 || len(ip.Options) > 0 || !ip.SrcIP.Equal(net.IP(source.Addr().AsSlice())) ||
			!ip.DstIP.Equal(net.IP(destination.Addr().AsSlice())) || int(ip.Length) != 20+len(ip.Payload) {
			t.Errorf("type %v, %+v", kind, ip)
		}
	case *layers.IPv6:
		if kind != layers.EthernetTypeIPv6 || ip.HopLimit != 64 || ip.TrafficClass != 0 || !ip.SrcIP.Equal(source.Addr().AsSlice()) ||
			!ip.DstIP.Equal(destination.Addr().AsSlice()) || int(ip.Length) != len(ip.Payload) {
			t.Errorf("type %v, %+v", kind, ip)
		}
	default:
		t.Fatalf("%v", p)
	}
	tcp, ok := p.Layers()[at+1].(*layers.TCP)
	if !ok || len(p.Layers()) != at+3 { // the last is the octet
		t.Fatalf("%v", p)
	}
	if err := tcp.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
		t.Fatal(err)
	}
	if err, wrong := p.VerifyChecksums(); err != nil || len(wrong) > 0 {
		t.Errorf("checksums: %v, %+v", err, wrong)
	}
	if tcp.Checksum == 0 || uint16(tcp.SrcPort) != source.Port() || uint16(tcp.DstPort) != destination.Port() ||
		tcp.Seq != c.Acknowledgement-1 || tcp.Ack != c.SequenceEnd || !tcp.ACK || tcp.SYN || tcp.FIN || tcp.RST || tcp.PSH ||
		tcp.URG || tcp.ECE || tcp.CWR || tcp.NS || tcp.Window == 0 || tcp.Urgent != 0 || !slices.Equal(tcp.Payload, []byte{0}) {
		t.Errorf("%+v", tcp)
	}
	if c.Timestamp == 0 && c.TimestampEcho == 0 {
		if len(tcp.Options) != 0 {
			t.Errorf("options: %v", tcp.Options)
		}
		return
	}
	if len(tcp.Options) != 3 || tcp.Options[0].OptionType != layers.TCPOptionKindNop ||
		tcp.Options[1].OptionType != layers.TCPOptionKindNop || tcp.Options[2].OptionType != layers.TCPOptionKindTimestamps {
		t.Fatalf("options: %v", tcp.Options)
	}
	value, echo, ok := timestampsOf(tcp)
	if !ok || value != c.TimestampEcho || echo != c.Timestamp {
		t.Errorf("timestamp %d, echo %d; the client's: %d, %d", value, echo, c.Timestamp, c.TimestampEcho)
	}
}
