// Package bench measures what a packet costs on this kernel: nanoseconds of the real program under the real map manager,
// by forwarding method, family and number of connections. It runs the programs by BPF_PROG_TEST_RUN, attaches and pins
// nothing, and sends no packet anywhere.
package bench

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"fairlead/maps"
)

// What packets are measured.
const (
	Settled   = "settled"   // of established connections, one after the other in random order
	Unsettled = "unsettled" // the same while all slots of the ring are unsettled
	Restarted = "restarted" // the same after a rolling restart of all backends: a third of the connections are exceptions
	Replies   = "replies"   // of backends to established connections, where they pass through Fairlead
	New       = "new"       // the first of connections, each of another client
	Refused   = "refused"   // of connections nobody knows, answered RST

	// Not ours.
	OtherPort     = "other_port"     // to another port of the service's address
	OtherAddress  = "other_address"  // to the service's port at another address
	SourcePort    = "source_port"    // fullnat: to one of our source ports at another address
	BackendPort   = "backend_port"   // nat: from the backends' port at another address
	UDP           = "udp"            // UDP to the service's address and port, where it is TCP's
	OtherProtocol = "other_protocol" // ESP to the service's address
	ICMP          = "icmp"           // a ping to another address
	ICMPError     = "icmp_error"     // about a packet of another address
)

// Family is of packets.
type Family string

// The families.
const (
	IPv4 Family = "ipv4"
	IPv6 Family = "ipv6"
)

// Methods are the forwarding methods, all of which can be measured.
func Methods() []maps.Method {
	return []maps.Method{maps.MethodDSR, maps.MethodIPIP, maps.MethodGUE, maps.MethodFullNAT, maps.MethodNAT}
}

// Families are all families.
func Families() []Family { return []Family{IPv4, IPv6} }

// Options say what to measure. What is zero has a default.
type Options struct {
	Methods     []maps.Method
	Families    []Family
	Connections []int // at most MaxConnections each; default: 1, 1000, 100,000 and 1,000,000
	Runs        int   // of which the median is taken; default 11
	// Quick measures 1000 connections in one short run, unless told otherwise, with a small half-open table, and leaves out
	// what differs little from the rest: for a look, and so that this can be tested.
	Quick bool
	Seed  uint64             // of the connections' order and ports
	Tell  func(about string) // what is being done, as it takes a while
}

// udpConnections is how many connections of UDP are measured at most: what opens them takes its time.
const udpConnections = 1000

// Repeats of a run, at least.
const (
	repeats      = 200_000
	quickRepeats = 20_000
)

// smallHalfOpen is a size of the half-open table.
const smallHalfOpen = 4096

func (o Options) filled() (Options, error) {
	if o.Quick {
		o.Connections = orElse(o.Connections, 1000)
		o.Runs = cmp.Or(o.Runs, 1)
	}
	o.Connections = orElse(o.Connections, 1, 1000, 100_000, 1_000_000)
	o.Runs = cmp.Or(o.Runs, 11)
	o.Methods = orElse(o.Methods, Methods()...)
	o.Families = orElse(o.Families, Families()...)
	if o.Tell == nil {
		o.Tell = func(string) {}
	}
	o.Connections = slices.Clone(o.Connections)
	slices.Sort(o.Connections)
	o.Connections = slices.Compact(o.Connections)
	if o.Connections[0] < 1 || o.Connections[len(o.Connections)-1] > MaxConnections {
		return o, fmt.Errorf("measure with %d connections: 1 to %d are possible", o.Connections, MaxConnections)
	}
	if o.Runs < 1 {
		return o, fmt.Errorf("measure in %d runs: at least one is needed", o.Runs)
	}
	for _, m := range o.Methods {
		if !slices.Contains(Methods(), m) {
			return o, fmt.Errorf("measure method %v: only %v can be", m, Methods())
		}
	}
	for _, f := range o.Families {
		if !slices.Contains(Families(), f) {
			return o, fmt.Errorf("measure family %s: one of %v", f, Families())
		}
	}
	return o, nil
}

func orElse[T any](list []T, otherwise ...T) []T {
	if len(list) == 0 {
		return otherwise
	}
	return list
}

func (o Options) repeats() int {
	if o.Quick {
		return quickRepeats
	}
	return repeats
}

// settings are what is measured. Tunnels lead from both families to both.
func (o Options) settings() (all []setting) {
	for _, method := range o.Methods {
		for _, family := range o.Families {
			for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
				s := setting{method: method, protocol: protocol, ipv6: family == IPv6, outer6: family == IPv6}
				all = append(all, s)
				if s.tunnels() && !s.udp() {
					s.outer6 = !s.outer6
					all = append(all, s)
				}
			}
		}
	}
	if o.Quick {
		all = slices.DeleteFunc(all, setting.dispensable)
	}
	return all
}

// dispensable are settings of which each part is in another one.
func (s setting) dispensable() bool {
	if s.udp() {
		return s.method != maps.MethodFullNAT // where replies aren't seen, connections take seconds to open
	}
	return s.tunnels() && (s.method == maps.MethodGUE) != (s.ipv6 != s.outer6)
}

// connections are the numbers of connections that are measured of a setting.
func (o Options) connections(of setting) []int {
	if of.udp() {
		return []int{min(o.Connections[len(o.Connections)-1], udpConnections)}
	}
	return o.Connections
}

// Result is one row: what a packet of one kind costs.
type Result struct {
	Method      string `json:"method"`
	Family      Family `json:"family"`          // of clients' packets
	Outer       Family `json:"outer,omitempty"` // of the packets around them, in tunnels
	Protocol    string `json:"protocol"`        // of the service
	Case        string `json:"case"`
	Connections int    `json:"connections"` // in the connection table
	Exceptions  int    `json:"exceptions"`  // of them, on another backend than their slot's
	// Nanoseconds a packet, net of the harness: the median of all runs. A run's is the median of its pieces.
	Nanoseconds float64 `json:"nanoseconds"`
	Lowest      float64 `json:"lowest"`
	Highest     float64 `json:"highest"`
	// Floor is what the least program costs that forwards, with the same frames in the same runs: it looks as far as the
	// ports, exchanges the MAC addresses and sends the frame back.
	Floor float64 `json:"floor"`
	Ratio float64 `json:"ratio"` // to the floor
	// Growth is the ratio to the fewest connections that were measured: settled ones, or their replies.
	Growth   float64           `json:"growth,omitempty"`
	Harness  float64           `json:"harness"`
	Runs     int               `json:"runs"`
	Repeats  int               `json:"repeats"`  // a run
	Verdicts map[string]uint64 `json:"verdicts"` // of one run
	Kernel   string            `json:"kernel"`
	CPU      string            `json:"cpu"`
}

// Run measures everything that the options ask for and hands over each result as it comes. Bytes out, action and
// counters are checked first, and the counters in every run: a result is of packets that went where they should.
//
// It takes the privileges to load the data plane, and up to 2 KB of memory a connection.
func Run(ctx context.Context, options Options, visit func(Result) error) error {
	o, err := options.filled()
	if err != nil {
		return err
	}
	kernel, err := kernelRelease()
	if err != nil {
		return err
	}
	cpu := cpuModel()
	for _, s := range o.settings() {
		fewest := make(map[string]float64)
		for _, kinds := range o.planes(s) {
			if err := measurePlane(&o, s, kinds, func(p *plane, k kind) error {
				r, err := p.measure(ctx, &o, k)
				if err != nil {
					return fmt.Errorf("%s, %d connections: %w", k.name, len(p.established), err)
				}
				if k.like != "" {
					fewest[k.like] = cmp.Or(fewest[k.like], r.Nanoseconds)
					r.Growth = hundredths(r.Nanoseconds / fewest[k.like])
				}
				r.Kernel, r.CPU = kernel, cpu
				return visit(r)
			}); err != nil {
				return fmt.Errorf("bench %v: %w", s, err)
			}
		}
	}
	return nil
}

// kinds visits every kind of packet that one plane is loaded for.
type kinds func(p *plane, o *Options, visit func(kind) error) error

// planes are the planes that a setting takes, by what is measured with each.
func (o Options) planes(s setting) []kinds {
	if s.udp() || o.Quick && s.method != maps.MethodDSR || o.Connections[len(o.Connections)-1] < backends {
		return []kinds{(*plane).everything}
	}
	return []kinds{(*plane).everything, (*plane).afterRestart}
}

func measurePlane(o *Options, s setting, of kinds, visit func(*plane, kind) error) error {
	o.Tell(fmt.Sprintf("%v: load the data plane", s))
	halfOpen := 0
	if o.Quick || s.udp() {
		halfOpen = smallHalfOpen
	}
	connections := o.connections(s)
	p, err := newPlane(s, connections[len(connections)-1], halfOpen, o.repeats(), o.Seed)
	if err != nil {
		return err
	}
	defer p.close()
	return of(p, o, func(k kind) error { return visit(p, k) })
}

func kernelRelease() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", fmt.Errorf("ask for the kernel's release: %w", err)
	}
	return unix.ByteSliceToString(name.Release[:]), nil
}

// field is the text behind the first line of a /proc file that begins with a name.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
