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

	"golang.org/x/sys/unix"

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
	// like is the kind whose figure with the fewest connections this one is compared with, if any.
	like string
}

// everything is packets of established connections, as most are for long, and everything else.
func (p *plane) everything(o *Options, visit func(kind) error) error {
	for _, connections := range o.connections(p.setting) {
		o.Tell(fmt.Sprintf("%v: establish %d connections", p.setting, connections))
		if err := p.establish(connections, false); err != nil {
			return err
		}
		clients := shuffled(p.random, p.established)
		if err := visit(p.talk(Settled, clients)); err != nil {
			return err
		}
		if !p.method.Stateless() {
			k, err := p.talkBack()
			if err != nil {
				return err
			}
			if err := visit(k); err != nil {
				return err
			}
		}
		if p.udp() {
			continue
		}
		if err := p.unsettle(true); err != nil {
			return err
		}
		if err := errors.Join(visit(p.talk(Unsettled, clients)), p.unsettle(false)); err != nil {
			return err
		}
	}
	if p.udp() || p.tunnels() && (o.Quick || p.ipv6 != p.outer6) {
		return nil
	}
	o.Tell(fmt.Sprintf("%v: new connections, not ours", p.setting))
	rest := p.strange()
	if !p.method.Stateless() {
		rest = append(rest, p.refuse())
	}
	for _, k := range append(rest, p.arrive()) {
		if err := visit(k); err != nil {
			return err
		}
	}
	return nil
}

// afterRestart is packets of connections that were opened during a rolling restart: one third of the backends after the
// other was away, so that a third of the connections is on another backend than their slot's.
func (p *plane) afterRestart(o *Options, visit func(kind) error) error {
	for _, connections := range o.connections(p.setting) {
		if connections < backends {
			continue // no third of so few
		}
		o.Tell(fmt.Sprintf("%v: establish %d connections in a rolling restart", p.setting, connections))
		if err := p.establish(connections, true); err != nil {
			return err
		}
		if err := visit(p.talk(Restarted, shuffled(p.random, p.established))); err != nil {
			return err
		}
	}
	return nil
}

// talk is packets of established connections.
func (p *plane) talk(name string, clients []netip.AddrPort) kind {
	k := kind{
		name: name, paths: p.inwards(clients), verdicts: p.decided(name == Unsettled), action: xdpTX, like: Settled,
	}
	k.template = p.template(p.words(talking), k.paths)
	k.expect = func(i int, in frame) (frame, error) { return p.forwarded(in, clients[i]) }
	return k
}

// words are a segment, or what UDP has for one.
func (p *plane) words(s segment) segment {
	if p.udp() {
		return datagram
	}
	return s
}

// talkBack is backends' packets of established connections.
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
	k := kind{name: Replies, verdicts: all(bpf.FairleadVerdictREPLY_TABLE, len(paths)), action: xdpTX, like: Replies}
	for _, turn := range turns {
		k.paths = append(k.paths, paths[turn])
	}
	k.template = newFrame(backward, k.paths[0].from, k.paths[0].to, p.words(talkingBack))
	k.expect = func(i int, in frame) (frame, error) {
		out := in.clone()
		out.setHop(outward)
		out.decrementTTL()
		out.setEnds(p.service, clients[turns[i]])
		return out, nil
	}
	return k, nil
}

// arrive is first packets of newcomers.
func (p *plane) arrive() kind {
	clients := p.strangers
	k := kind{
		name: New, paths: p.inwards(clients), verdicts: all(bpf.FairleadVerdictFORWARD_NEW, len(clients)), action: xdpTX,
	}
	k.template = p.template(p.words(opening), k.paths)
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
	clients := p.bystanders()
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

// strange is packets that no service is for.
func (p *plane) strange() []kind {
	elsewhere, service := p.elsewhere(), p.service.Addr()
	// Type and code of ICMP stand where others have the source port.
	icmp, echo, unreachable := uint8(unix.IPPROTO_ICMP), uint16(8<<8), uint16(3<<8|1)
	if p.ipv6 {
		icmp, echo, unreachable = unix.IPPROTO_ICMPV6, 128<<8, 1<<8|3
	}
	kinds := []kind{
		p.notOurs(OtherPort, 0, netip.AddrPortFrom(service, servicePort+1), talking),
		p.notOurs(OtherAddress, 0, netip.AddrPortFrom(elsewhere, servicePort), talking),
		p.notOurs(UDP, 0, p.service, datagram),
		p.notOurs(OtherProtocol, 1, netip.AddrPortFrom(service, 2), segment{protocol: unix.IPPROTO_ESP, payload: 32}),
		p.notOurs(ICMP, echo, netip.AddrPortFrom(elsewhere, 0), segment{protocol: icmp, payload: 32}),
		p.notOurs(ICMPError, unreachable, netip.AddrPortFrom(elsewhere, 0), segment{protocol: icmp, data: p.quoted()}),
	}
	if p.method == maps.MethodFullNAT {
		kinds = append(kinds, p.notOurs(SourcePort, 0, netip.AddrPortFrom(elsewhere, lastPort), talking))
	}
	if p.method == maps.MethodNAT {
		kinds = append(kinds, p.notOurs(BackendPort, rewritten, netip.AddrPortFrom(elsewhere, servicePort+1), talking))
	}
	return kinds
}

// quoted is the packet that an ICMP error is about: someone else sent it.
func (p *plane) quoted() []byte {
	from, to := netip.AddrPortFrom(p.elsewhere(), servicePort), p.strangers[0]
	return newFrame(outward, from, to, talking).bytes[etherSize:]
}

func (p *plane) bystanders() []netip.AddrPort { return p.strangers[:min(bystander, len(p.strangers))] }

// notOurs is packets that no service is for, from ports of many clients or all from one.
func (p *plane) notOurs(name string, port uint16, to netip.AddrPort, s segment) kind {
	k := kind{name: name, action: xdpPass}
	for _, client := range p.bystanders() {
		if port != 0 {
			client = netip.AddrPortFrom(client.Addr(), port)
		}
		k.paths = append(k.paths, path{client, to})
	}
	k.template = p.template(s, k.paths)
	verdict := bpf.FairleadVerdictPASS_NOT_OURS
	if s.protocol == unix.IPPROTO_ICMP || s.protocol == unix.IPPROTO_ICMPV6 {
		verdict = bpf.FairleadVerdictPASS_ICMP
	}
	k.verdicts = all(verdict, len(k.paths))
	k.expect = func(_ int, in frame) (frame, error) { return in, nil }
	return k
}

// check compares frames as they leave, action and bytes, with what should become of them, and returns by how many bytes
// they have grown.
func (p *plane) check(k kind) (grown int, err error) {
	for range shown {
		i := p.random.IntN(len(k.paths))
		if grown, err = p.checkOne(k, i, 1); err != nil {
			return 0, err
		}
		if p.repeated[grown] {
			continue
		}
		// Is each repeat's frame its own, whatever became of the one before? Once is enough: the kernel takes its time
		// to begin a run of several repeats.
		if _, err := p.checkOne(k, i, 3); err != nil {
			return 0, err
		}
		p.repeated[grown] = true
	}
	return grown, nil
}

// checkOne looks at frame number i, given behind others that make a row with it.
func (p *plane) checkOne(k kind, i, row int) (grown int, err error) {
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
	return len(out) - len(in.bytes), nil
}

// measure checks one kind of packet, then times it.
func (p *plane) measure(ctx context.Context, o *Options, k kind) (r Result, err error) {
	h, length := p.harness, len(k.template.bytes)
	passes := (o.repeats() + len(k.paths) - 1) / len(k.paths)
	if k.renew != nil {
		passes = 1
	}
	r = Result{
		Method: p.method.String(), Family: p.family(), Protocol: protocolName(p.protocol), Case: k.name,
		Connections: len(p.established), Exceptions: p.exceptions, Runs: o.Runs, Repeats: passes * len(k.paths), Verdicts: map[string]uint64{},
	}
	if p.tunnels() {
		r.Outer = familyOf(p.outer6)
	}
	expected := k.verdicts.times(uint64(passes))
	for verdict, n := range expected {
		if n > 0 {
			r.Verdicts[bpf.VerdictNames()[verdict]] = n
		}
	}
	if err := h.load(k.template, k.paths); err != nil {
		return r, err
	}
	// Each frame once: then fresh bits, and whatever else is found out at a first look, are as they stay.
	if k.like != "" {
		if err := h.give(1); err != nil {
			return r, err
		}
	}
	grown, err := p.check(k)
	if err != nil {
		return r, err
	}
	var planes, floors, harnesses []float64
	for range o.Runs {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		if k.renew != nil {
			k.renew()
			if err := h.load(k.template, k.paths); err != nil {
				return r, err
			}
		}
		if err := h.move(grown); err != nil {
			return r, err
		}
		var t timing
		if err := p.counted(expected, length, func() (err error) {
			t, err = h.time(passes)
			return err
		}); err != nil {
			return r, err
		}
		planes, floors, harnesses = append(planes, t.plane), append(floors, t.floor), append(harnesses, t.harness)
	}
	r.Nanoseconds, r.Lowest, r.Highest = tenths(median(planes)), tenths(slices.Min(planes)), tenths(slices.Max(planes))
	r.Floor, r.Harness = tenths(median(floors)), tenths(median(harnesses))
	r.Ratio = tenths(r.Nanoseconds / max(r.Floor, 1))
	return r, nil
}

func tenths(of float64) float64 { return math.Round(10*of) / 10 }

func hundredths(of float64) float64 { return math.Round(100*of) / 100 }

func protocolName(protocol uint8) string {
	if protocol == unix.IPPROTO_UDP {
		return "udp"
	}
	return "tcp"
}

// cpuModel is the CPU's name, or at least its kind.
func cpuModel() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if model := field(string(text), "model name"); err == nil && model != "" {
		return model
	}
	return runtime.GOARCH
}
