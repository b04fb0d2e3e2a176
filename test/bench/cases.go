package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
	"fairlead/maps"
)

const (
	shown     = 16   // frames of each case whose bytes are looked at
	bystander = 1000 // clients of packets that are not ours
)

// kind is one kind of packet: frames, and what should become of them.
type kind struct {
	name     string
	template frame
	paths    []path
	verdicts counts // of one frame each
	action   uint32
	// expect is frame number i as it should leave, made of itself as it comes.
	expect func(i int, in frame) (frame, error)
	// renew, if there is one, makes other paths of them before each run: nobody is to be seen twice.
	renew func()
}

func (p *plane) measureAll(ctx context.Context, o *Options, visit func(Result) error) error {
	measure := func(k kind) error {
		r, err := p.measure(ctx, o, k)
		if err != nil {
			return fmt.Errorf("%s, %d connections: %w", k.name, len(p.established), err)
		}
		return visit(r)
	}
	for _, connections := range o.Connections {
		o.Tell(fmt.Sprintf("%v, %s: establish %d connections", p.method, p.family(), connections))
		if err := p.establish(connections); err != nil {
			return err
		}
		clients := shuffled(p.random, p.established)
		if err := measure(p.talk(Settled, clients)); err != nil {
			return err
		}
		if p.method == maps.MethodFullNAT {
			k, err := p.talkBack()
			if err != nil {
				return err
			}
			if err := measure(k); err != nil {
				return err
			}
		}
		if err := p.unsettle(true); err != nil {
			return err
		}
		if err := errors.Join(measure(p.talk(Unsettled, clients)), p.unsettle(false)); err != nil {
			return err
		}
		if connections < backends {
			continue // no third of so few
		}
		if err := p.apply(resting); err != nil {
			return err
		}
		if err := measure(p.talk(Exceptions, clients)); err != nil {
			return err
		}
		if err := errors.Join(p.apply(0), p.manager.Turn()); err != nil {
			return err
		}
	}
	o.Tell(fmt.Sprintf("%v, %s: not ours, new connections", p.method, p.family()))
	rest := []kind{p.notOurs(OtherPort, netip.AddrPortFrom(p.service.Addr(), servicePort+1), talking),
		p.notOurs(OtherAddress, netip.AddrPortFrom(p.service.Addr().Next(), servicePort), talking),
		p.notOurs(UDP, p.service, datagram)}
	if p.method == maps.MethodFullNAT {
		rest = append(rest, p.refuse())
	}
	for _, k := range append(rest, p.open()) {
		if err := measure(k); err != nil {
			return err
		}
	}
	return nil
}

func (p *plane) family() Family {
	if p.ipv6 {
		return IPv6
	}
	return IPv4
}

// talk is segments of established connections.
func (p *plane) talk(name string, clients []netip.AddrPort) kind {
	k := kind{name: name, paths: p.inwards(clients), verdicts: p.decided(name == Unsettled), action: xdpTX}
	k.template = p.template(talking, k.paths)
	k.expect = func(i int, in frame) (frame, error) { return p.forwarded(in, clients[i]) }
	return k
}

// talkBack is backends' segments of established connections.
func (p *plane) talkBack() (kind, error) {
	paths, clients, err := p.replies()
	if err != nil {
		return kind{}, err
	}
	turns := make([]int, len(paths))
	for i := range turns {
		turns[i] = i
	}
	turns = shuffled(p.random, turns)
	k := kind{name: Replies, verdicts: all(bpf.FairleadVerdictREPLY_TABLE, len(paths)), action: xdpTX}
	for _, turn := range turns {
		k.paths = append(k.paths, paths[turn])
	}
	k.template = newFrame(backward, k.paths[0].from, k.paths[0].to, talkingBack)
	k.expect = func(i int, in frame) (frame, error) {
		out := in.clone()
		out.setHop(outward)
		out.decrementTTL()
		out.setEnds(p.service, clients[turns[i]])
		return out, nil
	}
	return k, nil
}

// open is SYNs of newcomers.
func (p *plane) open() kind {
	clients := p.strangers
	k := kind{
		name: New, paths: p.inwards(clients), verdicts: all(bpf.FairleadVerdictFORWARD_NEW, len(clients)), action: xdpTX,
	}
	k.template = p.template(opening, k.paths)
	k.expect = func(i int, in frame) (frame, error) { return p.forwarded(in, k.paths[i].from) }
	k.renew = func() {
		for i := range k.paths {
			from := &k.paths[i].from
			*from = netip.AddrPortFrom(from.Addr(), max(from.Port()+1, lowestPort))
		}
	}
	return k
}

// refuse is segments of connections that nobody knows, by a method that must know them: RST answers
// (RFC 9293, section 3.10.7.1).
func (p *plane) refuse() kind {
	clients := p.strangers[:min(bystander, len(p.strangers))]
	k := kind{
		name: Refused, paths: p.inwards(clients), verdicts: all(bpf.FairleadVerdictRESET_UNKNOWN, len(clients)),
		action: xdpTX,
	}
	k.template = p.template(talking, k.paths)
	k.expect = func(i int, in frame) (frame, error) {
		out := newFrame(outward, p.service, clients[i], segment{flags: flagRST, sequence: talking.ack})
		out.bytes = out.bytes[:out.l4+tcpSize] // bare headers
		return out.asReset(), nil
	}
	return k
}

// notOurs is packets that no service is for.
func (p *plane) notOurs(name string, to netip.AddrPort, s segment) kind {
	k := kind{name: name, action: xdpPass}
	for _, client := range p.strangers[:min(bystander, len(p.strangers))] {
		k.paths = append(k.paths, path{client, to})
	}
	k.template = p.template(s, k.paths)
	k.verdicts = all(bpf.FairleadVerdictPASS_NOT_OURS, len(k.paths))
	k.expect = func(_ int, in frame) (frame, error) { return in, nil }
	return k
}

// check compares frames as they leave, action and bytes, with what should become of them, and returns by how many bytes
// they have grown.
func (p *plane) check(k kind) (grown int, err error) {
	for n := range shown {
		i, row := p.random.IntN(len(k.paths)), 1
		if n == 0 {
			// Is each repeat's frame its own, whatever became of the one before? Once is enough: the kernel takes its
			// time to begin a run of several repeats.
			row = 3
		}
		action, out, err := p.harness.show(i, row)
		if err != nil {
			return 0, err
		}
		in := k.template.clone()
		in.setEnds(k.paths[i].from, k.paths[i].to)
		want, err := k.expect(i, in)
		if err != nil {
			return 0, err
		}
		if action != k.action {
			return 0, fmt.Errorf("a frame from %v to %v: action %d, expected %d", k.paths[i].from, k.paths[i].to, action,
				k.action)
		}
		if !bytes.Equal(out, want.bytes) {
			return 0, fmt.Errorf("a frame from %v to %v left as\n%x, expected\n%x", k.paths[i].from, k.paths[i].to, out,
				want.bytes)
		}
		grown = len(out) - len(in.bytes)
	}
	return grown, nil
}

// measure checks one kind of packet, then times it.
func (p *plane) measure(ctx context.Context, o *Options, k kind) (r Result, err error) {
	h := p.harness
	passes := (o.repeats() + len(k.paths) - 1) / len(k.paths)
	if k.renew != nil {
		passes = 1
	}
	r = Result{
		Case: k.name, Connections: len(p.established), Runs: o.Runs, Repeats: passes * len(k.paths),
		Verdicts: map[string]uint64{},
	}
	expected := k.verdicts.times(uint64(passes))
	for verdict, n := range expected {
		if n > 0 {
			r.Verdicts[bpf.VerdictNames()[verdict]] = n
		}
	}
	if r.Exceptions, err = p.exceptions(); err != nil {
		return r, err
	}
	if err := h.load(k.template, k.paths); err != nil {
		return r, err
	}
	// Each frame once: then fresh bits, and whatever else is found out at a first look, are as they stay.
	if _, err := h.time(h.GivePlane, 1); err != nil {
		return r, err
	}
	grown, err := p.check(k)
	if err != nil {
		return r, err
	}
	if err := h.Disturbance.Set(int32(grown)); err != nil {
		return r, err
	}
	var nets, harnesses []float64
	for range o.Runs {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		harness, err := p.floor(passes)
		if err != nil {
			return r, err
		}
		harnesses = append(harnesses, harness)
		if grown != 0 {
			// There and back are one call each of the same helper: the way back is the harness's.
			moved, err := p.time(h.GiveDisturbance, passes, counts{})
			if err != nil {
				return r, err
			}
			harness += (moved - harness) / 2
		}
		if k.renew != nil {
			k.renew()
			if err := h.load(k.template, k.paths); err != nil {
				return r, err
			}
		}
		gross, err := p.time(h.GivePlane, passes, expected)
		if err != nil {
			return r, err
		}
		nets = append(nets, gross-harness)
	}
	r.Nanoseconds, r.Lowest, r.Highest = median(nets), slices.Min(nets), slices.Max(nets)
	r.Floor, r.Harness = math.Round(100*middle(p.floors))/100, median(harnesses)
	r.Ratio = math.Round(10*r.Nanoseconds/max(r.Floor, 1)) / 10
	return r, nil
}

// floor times harness and floor, and returns the harness's nanoseconds a repeat.
func (p *plane) floor(passes int) (harness float64, err error) {
	if harness, err = p.time(p.harness.GiveNothing, passes, counts{}); err != nil {
		return 0, err
	}
	floor, err := p.time(p.harness.GiveFloor, passes, counts{})
	p.floors = append(p.floors, floor-harness)
	return harness, err
}

// middle is the mean of the middle half: the kernel tells whole nanoseconds, and the floor is few of them.
func middle(of []float64) float64 {
	of = slices.Sorted(slices.Values(of))
	of = of[len(of)/4 : len(of)-len(of)/4]
	sum := 0.0
	for _, n := range of {
		sum += n
	}
	return sum / float64(len(of))
}

// time is the nanoseconds a repeat with whom one of the harness's programs gives frames, and who gives these verdicts.
func (p *plane) time(give *ebpf.Program, passes int, expected counts) (ns float64, err error) {
	return ns, p.counted(expected, func() (err error) {
		ns, err = p.harness.time(give, passes)
		return err
	})
}

func median(of []float64) float64 {
	of = slices.Sorted(slices.Values(of))
	middle := len(of) / 2
	if len(of)%2 == 0 {
		return (of[middle-1] + of[middle]) / 2
	}
	return of[middle]
}

// cpuModel is the CPU's name, or at least its kind.
func cpuModel() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if model := field(string(text), "model name"); err == nil && model != "" {
		return model
	}
	return runtime.GOARCH
}
