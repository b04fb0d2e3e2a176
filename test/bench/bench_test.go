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
		got[fmt.Sprintf("%s %s %s", r.Method, r.Family, r.Case)] = strings.Join(verdicts, " ")
		t.Logf("%s %s %s: %v ns (%v to %v), %v times the floor of %v; harness %v", r.Method, r.Family, r.Case,
			r.Nanoseconds, r.Lowest, r.Highest, r.Ratio, r.Floor, r.Harness)
		if r.Connections != 1000 || r.Runs != 3 || r.Repeats < 8192 {
			t.Errorf("%d connections, %d runs of %d repeats", r.Connections, r.Runs, r.Repeats)
		}
		if exceptions := r.Exceptions > 250 && r.Exceptions < 420; exceptions != (r.Case == Exceptions) {
			t.Errorf("%s: %d of 1000 connections are exceptions", r.Case, r.Exceptions)
		}
		if r.Lowest > r.Nanoseconds || r.Highest < r.Nanoseconds || r.Harness <= 0 || r.Kernel == "" || r.CPU == "" {
			t.Errorf("not a result: %+v", r)
		}
		// Where the CPU has anything to do, it takes time.
		if r.Case != UDP && r.Nanoseconds <= 0 {
			t.Errorf("%s: %v ns", r.Case, r.Nanoseconds)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := make(map[string]string)
	for _, family := range Families() {
		for name, verdicts := range map[string]string{
			"dsr " + Settled: "forward_ring", "dsr " + Unsettled: "forward_table",
			"dsr " + Exceptions: "forward_ring forward_table", "dsr " + New: "forward_new",
			"dsr " + OtherPort: "pass_not_ours", "dsr " + OtherAddress: "pass_not_ours", "dsr " + UDP: "pass_not_ours",
			"fullnat " + Settled: "forward_table", "fullnat " + Unsettled: "forward_table",
			"fullnat " + Exceptions: "forward_table", "fullnat " + New: "forward_new", "fullnat " + Replies: "reply_table",
			"fullnat " + OtherPort: "pass_not_ours", "fullnat " + OtherAddress: "pass_not_ours",
			"fullnat " + UDP: "pass_not_ours", "fullnat " + Refused: "reset_unknown",
		} {
			method, packets, _ := strings.Cut(name, " ")
			want[fmt.Sprintf("%s %s %s", method, family, packets)] = verdicts
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts by row (-want +got):\n%s", diff)
	}
}

func mustPlane(t *testing.T, method maps.Method) *plane {
	t.Helper()
	p, err := newPlane(method, false, 10, quickHalfOpen, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	if err := p.establish(10); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestWrong: no figure of packets that don't go where they should.
func TestWrong(t *testing.T) {
	p := mustPlane(t, maps.MethodDSR)
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
}

// TestUnmove: a frame made longer or shorter is as it was for the next repeat.
func TestUnmove(t *testing.T) {
	p := mustPlane(t, maps.MethodDSR)
	h := p.harness
	if err := h.Takers.Put(harnessTakerTAKER_PLANE, h.TakeDisturbance); err != nil {
		t.Fatal(err)
	}
	paths := p.inwards(p.established)
	template := p.template(talking, paths)
	if err := h.load(template, paths); err != nil {
		t.Fatal(err)
	}
	for _, by := range []int{-30, 0, 20, 40} {
		if err := h.Disturbance.Set(int32(by)); err != nil {
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

func TestOptions(t *testing.T) {
	for want, o := range map[string]Options{
		"are possible":       {Connections: []int{1, MaxConnections + 1}},
		"1 to":               {Connections: []int{0}},
		"at least one":       {Runs: -1},
		"only [dsr fullnat]": {Methods: []maps.Method{maps.MethodGUE}},
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
		for _, s := range []segment{opening, talking, datagram, {flags: flagACK, payload: 3}} {
			template := newFrame(inward, from, to, s)
			orderer := newOrderer(template)
			got, want := orderer.entry(other, to), newFrame(inward, other, to, s)
			if check := wire(got.L4Check); check != uint16(want.bytes[want.l4+l4Check])<<8|uint16(want.bytes[want.l4+l4Check+1]) {
				t.Errorf("%v to %v, %+v: checksum %#x, in the frame %x", other, to, s, check,
					want.bytes[want.l4+l4Check:want.l4+l4Check+2])
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
