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
	Settled      = "settled"       // of established connections, one after the other in random order
	Unsettled    = "unsettled"     // the same while all slots of the ring are unsettled
	Exceptions   = "exceptions"    // the same after a third of the backends went to rest: their connections stay with them
	Replies      = "replies"       // of backends to established connections, where they pass through Fairlead
	New          = "new"           // SYNs, each of another client
	Refused      = "refused"       // of connections nobody knows, answered RST
	OtherPort    = "other_port"    // not ours: to another port of the service's address
	OtherAddress = "other_address" // not ours: to another address
	UDP          = "udp"           // not ours: UDP to the service's address and port
)

// Family is of packets.
type Family string

// The families.
const (
	IPv4 Family = "ipv4"
	IPv6 Family = "ipv6"
)

// Methods are the forwarding methods that can be measured.
func Methods() []maps.Method { return []maps.Method{maps.MethodDSR, maps.MethodFullNAT} }

// Families are all families.
func Families() []Family { return []Family{IPv4, IPv6} }

// Options say what to measure. What is zero has a default.
type Options struct {
	Methods     []maps.Method
	Families    []Family
	Connections []int // at most MaxConnections each; default: 1, 1000, 100,000 and 1,000,000
	Runs        int   // of which the median is taken; default 11
	// Quick measures 1000 connections in 3 short runs, unless told otherwise, with a small half-open table: for a look,
	// and so that this can be tested.
	Quick bool
	Seed  uint64             // of the connections' order and ports
	Tell  func(about string) // what is being done, as it takes a while
}

// Repeats of a run, at least.
const (
	repeats      = 200_000
	quickRepeats = 20_000
)

const quickHalfOpen = 4096

func (o Options) filled() (Options, error) {
	if o.Quick {
		o.Connections = orElse(o.Connections, 1000)
		o.Runs = cmp.Or(o.Runs, 3)
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

// Result is one row: what a packet of one kind costs.
type Result struct {
	Method      string  `json:"method"`
	Family      Family  `json:"family"`
	Case        string  `json:"case"`
	Connections int     `json:"connections"` // in the connection table
	Exceptions  int     `json:"exceptions"`  // of them, on another backend than their slot's
	Nanoseconds float64 `json:"nanoseconds"` // a packet, net of the harness: the median of all runs
	Lowest      float64 `json:"lowest"`
	Highest     float64 `json:"highest"`
	// Floor is what the least program costs that forwards: it looks as far as the ports, exchanges the MAC addresses and
	// sends the frame back. It and the harness are measured in every run, beside the program; it is the mean of the middle
	// half of all runs of this method and family so far.
	Floor    float64           `json:"floor"`
	Ratio    float64           `json:"ratio"` // to the floor
	Harness  float64           `json:"harness"`
	Runs     int               `json:"runs"`
	Repeats  int               `json:"repeats"`  // a run
	Verdicts map[string]uint64 `json:"verdicts"` // of one run
	Kernel   string            `json:"kernel"`
	CPU      string            `json:"cpu"`
}

// Run measures everything that the options ask for and hands over each result as it comes. Bytes out, action and
// verdicts are checked first, and the verdicts in every run: a result is of packets that went where they should.
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
	for _, method := range o.Methods {
		for _, family := range o.Families {
			if err := measureAll(ctx, &o, method, family, func(r Result) error {
				r.Kernel, r.CPU = kernel, cpu
				return visit(r)
			}); err != nil {
				return fmt.Errorf("bench %v, %s: %w", method, family, err)
			}
		}
	}
	return nil
}

func measureAll(ctx context.Context, o *Options, method maps.Method, family Family, visit func(Result) error) error {
	o.Tell(fmt.Sprintf("%v, %s: load the data plane", method, family))
	halfOpen := 0
	if o.Quick {
		halfOpen = quickHalfOpen
	}
	p, err := newPlane(method, family == IPv6, o.Connections[len(o.Connections)-1], halfOpen, o.Seed)
	if err != nil {
		return err
	}
	defer p.close()
	return p.measureAll(ctx, o, func(r Result) error {
		r.Method, r.Family = method.String(), family
		return visit(r)
	})
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
