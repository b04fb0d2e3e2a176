package model

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// A game is one data plane, one model, and packets: each is run, counted and judged.
type game struct {
	plane   *plane
	world   *world
	model   *model
	devices devices
	before  counters
	after   counters
	result  result
	spy     func(*game, *result) // sees each outcome before it is judged
	frame   []byte               // the packet in hand, and
	ingress uint32               // where it came from
}

// setup is what a game starts from. The same one gives the same world.
type setup struct {
	seed   uint64
	limits limits
}

// step is what happens: a packet comes by a device, or the configuration changes.
type step struct {
	frame  []byte
	device int    // number, in the order of their making
	change uint64 // where there is no frame: the seed of the change
}

func newGame(d devices, s setup) (_ *game, err error) {
	g := &game{devices: d}
	if g.plane, err = newPlane(s.limits); err != nil {
		return nil, err
	}
	if g.world, err = newWorld(g.plane, d, rand.New(rand.NewPCG(s.seed, 1))); err != nil {
		g.plane.close()
		return nil, err
	}
	g.model = newModel(g.world, s.limits)
	if err := g.plane.count(&g.before); err != nil {
		g.plane.close()
		return nil, err
	}
	return g, nil
}

func (g *game) close() { g.plane.close() }

// play carries a step out. A change is not judged.
func (g *game) play(s step) (*judged, error) {
	if s.frame == nil {
		what, err := g.world.change(rand.New(rand.NewPCG(s.change, 2)))
		if err != nil {
			return nil, err
		}
		g.model.forget()
		if what == "turn" {
			g.model.turned()
		}
		return nil, g.plane.count(&g.before)
	}
	g.frame, g.ingress = s.frame, g.devices[s.device].index
	action, out, err := g.plane.run(s.frame, g.ingress)
	if err != nil {
		return nil, err
	}
	if err := g.plane.count(&g.after); err != nil {
		return nil, err
	}
	g.result = result{action: action, out: out, traffic: g.result.traffic[:0]}
	g.result.difference(&g.before, &g.after)
	g.before = g.after
	if g.spy != nil {
		g.spy(g, &g.result)
	}
	return g.model.judge(s.frame, g.ingress, &g.result, true), nil
}

func (d devices) number(index uint32) int {
	return max(0, slices.IndexFunc(d, func(one device) bool { return one.index == index }))
}

// trace is a game as it was played, to be played again.
type trace struct {
	setup setup
	steps []step
}

func (t *trace) write(w io.Writer) error {
	b := bufio.NewWriter(w)
	l := t.setup.limits
	fmt.Fprintf(b, "game %d %d %d %d %d %d\n", t.setup.seed, l.answers, l.adoptions, l.connections, l.young, l.epoch)
	for _, s := range t.steps {
		if s.frame == nil {
			fmt.Fprintf(b, "change %d\n", s.change)
			continue
		}
		fmt.Fprintf(b, "packet %d %x\n", s.device, s.frame)
	}
	return b.Flush()
}

func readTrace(r io.Reader) (*trace, error) {
	t := new(trace)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<16)
	for n := 1; lines.Scan(); n++ {
		kind, rest, _ := strings.Cut(lines.Text(), " ")
		var err error
		var s step
		switch kind {
		case "game":
			l := &t.setup.limits
			_, err = fmt.Sscan(rest, &t.setup.seed, &l.answers, &l.adoptions, &l.connections, &l.young, (*int64)(&l.epoch))
		case "change":
			if _, err = fmt.Sscan(rest, &s.change); err == nil {
				t.steps = append(t.steps, s)
			}
		case "packet":
			device, text, _ := strings.Cut(rest, " ")
			if _, err = fmt.Sscan(device, &s.device); err == nil {
				s.frame, err = hex.DecodeString(text)
				t.steps = append(t.steps, s)
			}
		default:
			err = fmt.Errorf("%q is neither game, change nor packet", kind)
		}
		if err != nil {
			return nil, fmt.Errorf("read trace: line %d: %w", n, err)
		}
	}
	return t, lines.Err()
}

// breaks plays a trace and tells whether its last step breaks the rule, with the same verdict.
func (t *trace) breaks(d devices, rule string, v verdict) (bool, error) {
	g, err := newGame(d, t.setup)
	if err != nil {
		return false, err
	}
	defer g.close()
	for i, s := range t.steps {
		j, err := g.play(s)
		if err != nil {
			return false, err
		}
		if i == len(t.steps)-1 && j != nil {
			return j.v == v && slices.ContainsFunc(j.breaches, func(b breach) bool { return b.rule == rule }), nil
		}
	}
	return false, nil
}

// shrink leaves out of a trace what its last step does not need to break the rule, until the time is over. It begins with
// what shares an address, or an address and a port, with the last packet as it came and as it left.
func (t *trace) shrink(d devices, rule string, v verdict, out []byte, deadline time.Time) *trace {
	steps := t.steps
	try := func(fewer []step) bool {
		if len(fewer) == len(steps) || time.Now().After(deadline) {
			return false
		}
		breaks, err := (&trace{t.setup, fewer}).breaks(d, rule, v)
		if err != nil || !breaks {
			return false
		}
		steps = fewer
		return true
	}
	if len(steps) > 1 {
		last := steps[len(steps)-1]
		for _, ports := range []bool{true, false} {
			for _, changes := range []bool{false, true} {
				if try(related(steps, slices.Concat(ends(last.frame, ports), ends(out, ports)), changes)) {
					break
				}
			}
		}
	}
	for part := len(steps) / 2; part > 0; part /= 2 {
		for at := 0; at < len(steps)-1 && time.Now().Before(deadline); {
			if !try(slices.Concat(steps[:at], steps[min(at+part, len(steps)-1):])) {
				at += part
			}
		}
	}
	return &trace{t.setup, steps}
}

// ends are a frame's addresses, with their ports or without; of an error, those of the packet that it is about.
func ends(frame []byte, ports bool) (all []netip.AddrPort) {
	p := parse(frame)
	list := []netip.AddrPort{p.from4(), p.to4()}
	if p.malformed == "" && (p.protocol == protoICMP || p.protocol == protoICMPv6) && !p.later() {
		if q := quotedBy(p); q != nil {
			list = []netip.AddrPort{q.source, q.destination}
		}
	}
	for _, at := range list {
		if !at.Addr().IsValid() {
			continue
		}
		if !ports {
			at = netip.AddrPortFrom(at.Addr(), 0)
		}
		all = append(all, at)
	}
	return all
}

// related are the steps whose frames have one of these ends somewhere in them, and the last; with changes or without.
func related(steps []step, to []netip.AddrPort, changes bool) (kept []step) {
	for i, s := range steps {
		keep := i == len(steps)-1 || s.frame == nil && changes
		for _, at := range to {
			keep = keep || bytes.Contains(s.frame, at.Addr().AsSlice()) &&
				(at.Port() == 0 || bytes.Contains(s.frame, binary.BigEndian.AppendUint16(nil, at.Port())))
		}
		if keep {
			kept = append(kept, s)
		}
	}
	return kept
}
