package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/maps"
)

// TestRun measures everything, shortly: every row is there, and of the packets that it says.
func TestRun(t *testing.T) {
	got := make(map[string]string)
	if err := Run(context.Background(), Options{Quick: true}, func(r Result) error {
		var verdicts []string
		for name := range r.Verdicts {
			verdicts = append(verdicts, name)
		}
		slices.Sort(verdicts)
		row := strings.Join([]string{r.Method, string(r.Family), string(r.Outer), r.Protocol, r.Case}, " ")
		got[row] = strings.Join(verdicts, " ")
		t.Logf("%s: %v ns (%v to %v), %v times the floor of %v; harness %v", row, r.Nanoseconds, r.Lowest, r.Highest,
			r.Ratio, r.Floor, r.Harness)
		if r.Connections != 1000 || r.Runs != 1 || r.Repeats < 8192 {
			t.Errorf("%s: %d connections, %d runs of %d repeats", row, r.Connections, r.Runs, r.Repeats)
		}
		if exceptions := r.Exceptions > 250 && r.Exceptions < 420; exceptions != (r.Case == Restarted) {
			t.Errorf("%s: %d of 1000 connections are exceptions", row, r.Exceptions)
		}
		if r.Lowest > r.Nanoseconds || r.Highest < r.Nanoseconds || r.Harness <= 0 || r.Kernel == "" || r.CPU == "" {
			t.Errorf("%s: not a result: %+v", row, r)
		}
		// Where the CPU has anything to do, it takes time.
		if r.Case != UDP && r.Nanoseconds <= 0 {
			t.Errorf("%s: %v ns", row, r.Nanoseconds)
		}
		if compared := r.Case == Settled || r.Case == Unsettled || r.Case == Restarted || r.Case == Replies; compared !=
			(r.Growth > 0) {
			t.Errorf("%s: %v times the fewest connections", row, r.Growth)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	ours := map[string]string{
		Settled: "forward_ring", Unsettled: "forward_table", New: "forward_new",
	}
	strange := map[string]string{
		OtherPort: "pass_not_ours", OtherAddress: "pass_not_ours", UDP: "pass_not_ours", OtherProtocol: "pass_not_ours",
		ICMP: "pass_icmp", ICMPError: "pass_icmp",
	}
	tables := map[string]string{Settled: "forward_table", Replies: "reply_table", Refused: "reset_unknown"}
	tunnel := map[string]string{Settled: "forward_ring", Unsettled: "forward_table"}
	want := make(map[string]string)
	add := func(row string, all ...map[string]string) {
		for _, verdicts := range all {
			for name, given := range verdicts {
				want[row+" "+name] = given
			}
		}
	}
	for family, other := range map[Family]Family{IPv4: IPv6, IPv6: IPv4} {
		add(fmt.Sprintf("dsr %s  tcp", family), ours, strange, map[string]string{Restarted: "forward_ring forward_table"})
		add(fmt.Sprintf("fullnat %s  tcp", family), ours, strange, tables, map[string]string{SourcePort: "pass_not_ours"})
		add(fmt.Sprintf("fullnat %s  udp", family), map[string]string{Settled: "forward_table", Replies: "reply_table"})
		add(fmt.Sprintf("nat %s  tcp", family), ours, strange, tables, map[string]string{BackendPort: "pass_not_ours"})
		add(fmt.Sprintf("ipip %s %s tcp", family, family), tunnel)
		add(fmt.Sprintf("gue %s %s tcp", family, other), tunnel)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts by row (-want +got):\n%s", diff)
	}
}

func mustPlane(t *testing.T, of setting, connections int) *plane {
	t.Helper()
	p, err := newPlane(of, connections, smallHalfOpen, quickRepeats, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	if err := p.establish(connections, false); err != nil {
		t.Fatal(err)
	}
	return p
}

var dsr = setting{method: maps.MethodDSR, protocol: unix.IPPROTO_TCP}

// TestTunnelledDatagrams: UDP by a method that sees no replies, which takes its time, in a tunnel of another family.
func TestTunnelledDatagrams(t *testing.T) {
	p := mustPlane(t, setting{method: maps.MethodGUE, protocol: unix.IPPROTO_UDP, ipv6: true}, 10)
	o, err := Options{Quick: true}.filled()
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.measure(context.Background(), &o, p.talk(Settled, p.established))
	if err != nil {
		t.Fatal(err)
	}
	if r.Verdicts["forward_ring"] != uint64(r.Repeats) || r.Family != IPv6 || r.Outer != IPv4 || r.Protocol != "udp" {
		t.Errorf("not of such packets: %+v", r)
	}
}

// TestWrong: no figure of packets that don't go where they should, or that aren't counted.
func TestWrong(t *testing.T) {
	p := mustPlane(t, dsr, 10)
	for name, spoil := range map[string]func(*kind){
		"verdicts given: 20000 forward_ring": func(k *kind) { k.verdicts = all(bpf.FairleadVerdictFORWARD_TABLE, 10) },
		"action 3, expected 2":               func(k *kind) { k.action = xdpPass },
		"left as": func(k *kind) {
			forwarded := k.expect
			k.expect = func(i int, in frame) (frame, error) {
				out, err := forwarded(i, in)
				if err == nil {
					out.bytes[len(out.bytes)-1]++
				}
				return out, err
			}
		},
	} {
		k := p.talk(Settled, p.established)
		spoil(&k)
		o, err := Options{Quick: true}.filled()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.measure(context.Background(), &o, k); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("measure: %v; want an error that says %q", err, name)
		}
	}
	// As many as it says, and one byte less in each.
	k := p.talk(Settled, p.established)
	if err := p.harness.load(k.template, k.paths); err != nil {
		t.Fatal(err)
	}
	if err := p.counted(k.verdicts, len(k.template.bytes)-1, func() error { return p.harness.give(1) }); err == nil ||
		!strings.Contains(err.Error(), "expected: {Packets:10 Bytes:970") {
		t.Errorf("counted: %v; want an error that tells the bytes", err)
	}
}

// TestUnmove: a frame made longer or shorter is as it was for the next repeat.
func TestUnmove(t *testing.T) {
	p := mustPlane(t, dsr, 10)
	h := p.harness
	if err := h.Takers.Put(harnessTurnTURN_PLANE, h.TakeDisturbance); err != nil {
		t.Fatal(err)
	}
	paths := p.inwards(p.established)
	template := p.template(talking, paths)
	if err := h.load(template, paths); err != nil {
		t.Fatal(err)
	}
	for _, by := range []int{-30, 0, 20, 40} {
		if err := h.move(by); err != nil {
			t.Fatal(err)
		}
		for i := range paths {
			_, out, err := h.show(i, len(paths)+3)
			if err != nil {
				t.Fatal(err)
			}
			want := template.clone()
			want.setEnds(paths[i].from, paths[i].to)
			if len(out) != len(want.bytes)+by {
				t.Fatalf("by %d: %d bytes of %d", by, len(out), len(want.bytes))
			}
			// What was cut off comes back as zeroes: payload that nobody reads.
			out, headers := out[max(by, 0):], want.l4+tcpSize
			if diff := cmp.Diff(want.bytes[:headers], out[:headers]); diff != "" {
				t.Errorf("by %d, frame %d (-want +got):\n%s", by, i, diff)
			}
		}
	}
}

// TestTurns: everybody is given every frame, each piece in turn, and how long each took is noted.
func TestTurns(t *testing.T) {
	const connections = 100
	p := mustPlane(t, dsr, connections)
	h, paths := p.harness, p.inwards(p.established)
	if err := h.load(p.template(talking, paths), paths); err != nil {
		t.Fatal(err)
	}
	for passes, pieces := range map[int]int{1: 1, 11: 2, 51: 5} {
		for _, moved := range []int{0, 20} {
			if err := h.move(moved); err != nil {
				t.Fatal(err)
			}
			if err := h.give(1); err != nil {
				t.Fatal(err)
			}
			got := make([]harnessPiece, pieces+1)
			if _, err := h.pieces.WriteAt(memory(got), 0); err != nil {
				t.Fatal(err)
			}
			if err := p.counted(all(bpf.FairleadVerdictFORWARD_RING, passes*connections), len(h.frame.bytes), func() error {
				_, err := h.time(passes)
				return err
			}); err != nil {
				t.Errorf("%d passes, moved by %d: %v", passes, moved, err)
			}
			if _, err := h.pieces.ReadAt(memory(got), 0); err != nil {
				t.Fatal(err)
			}
			for i, piece := range got {
				for turn, ns := range piece.Ns {
					noted := i < pieces && (moved != 0 || harnessTurn(turn) != harnessTurnTURN_DISTURBANCE)
					if (ns > 0) != noted {
						t.Errorf("%d passes, moved by %d: piece %d, turn %d: %d ns", passes, moved, i, turn, ns)
					}
				}
			}
		}
	}
}

func TestOptions(t *testing.T) {
	for want, o := range map[string]Options{
		"are possible":       {Connections: []int{1, MaxConnections + 1}},
		"1 to":               {Connections: []int{0}},
		"at least one":       {Runs: -1},
		"only [dsr ipip":     {Methods: []maps.Method{0}},
		"one of [ipv4 ipv6]": {Families: []Family{"ipx"}},
	} {
		if err := Run(context.Background(), o, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Run: %v; want an error that says %q", err, want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Run(ctx, Options{Quick: true}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Run, cancelled: %v", err)
	}
}

// TestOrder: entries of the order are the checksums of whole frames.
func TestOrder(t *testing.T) {
	for _, ends := range [][3]string{
		{"100.64.1.2:1024", "192.0.2.10:443", "100.127.255.255:65535"},
		{"[2001:db8:64::1]:1024", "[2001:db8:c0::10]:443", "[2001:db8:64::ffff:fffe]:65535"},
	} {
		from, to, other := netip.MustParseAddrPort(ends[0]), netip.MustParseAddrPort(ends[1]), netip.MustParseAddrPort(ends[2])
		icmp := uint8(unix.IPPROTO_ICMP)
		if from.Addr().Is6() {
			icmp = unix.IPPROTO_ICMPV6
		}
		for _, s := range []segment{opening, talking, datagram, {flags: flagACK, payload: 3}, {protocol: icmp, payload: 40},
			{protocol: unix.IPPROTO_ESP, payload: 40}} {
			to := to
			if s.protocol == icmp {
				to = netip.AddrPortFrom(to.Addr(), 0) // its checksum stands there
			}
			template := newFrame(inward, from, to, s)
			orderer := newOrderer(template)
			got, want := orderer.entry(other, to), newFrame(inward, other, to, s)
			if check := wire(got.L4Check); check != uint16(want.bytes[want.l4+want.check])<<8|uint16(want.bytes[want.l4+want.check+1]) {
				t.Errorf("%v to %v, %+v: checksum %#x, in the frame %x", other, to, s, check,
					want.bytes[want.l4+want.check:want.l4+want.check+2])
			}
			if checksum(want.l4Sum()) != 0 {
				t.Errorf("%v to %v, %+v: the frame's checksum is wrong", other, to, s)
			}
			if !want.ipv6 && (checksum(sum(want.bytes[etherSize:want.l4])) != 0 ||
				wire(got.IpCheck) != uint16(want.bytes[24])<<8|uint16(want.bytes[25])) {
				t.Errorf("%v to %v: IP checksum %#x, in the frame %x", other, to, wire(got.IpCheck), want.bytes[24:26])
			}
		}
	}
}
