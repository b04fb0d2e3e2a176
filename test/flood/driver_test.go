package flood

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// driver makes floods inside the kernel, on one CPU.
type driver struct {
	floodObjects
	number int // of the CPU
	cpu    *cpu
	// Of the last flood: packets whose time is known, and that time in nanoseconds.
	timed, took uint64
}

// drivers are one for each CPU.
type drivers []*driver

func newDrivers(t testing.TB) (all drivers) {
	t.Helper()
	numbers, err := cpus()
	if err != nil {
		t.Fatal(err)
	}
	for _, number := range numbers {
		d := &driver{number: number}
		loadDriver(t, &d.floodObjects, nil)
		d.cpu = newCPU(d.Flood)
		all = append(all, d)
	}
	return all
}

// loadDriver loads the driver's programs as tail calls to the data plane ask for: of the same kind.
func loadDriver(t testing.TB, objects *floodObjects, edit func(*ebpf.CollectionSpec)) {
	t.Helper()
	spec, err := loadFlood()
	if err != nil {
		t.Fatal(err)
	}
	plane, err := bpf.LoadFairlead()
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range spec.Programs {
		program.Flags, program.AttachType = plane.Programs["fairlead"].Flags, plane.Programs["fairlead"].AttachType
	}
	if edit != nil {
		edit(spec)
	}
	if err := spec.LoadAndAssign(objects, nil); err != nil {
		t.Fatalf("load the driver of floods (root is needed): %+v", err)
	}
	t.Cleanup(func() { objects.Close() })
}

// attack is a flood.
type attack struct {
	name        string
	sites       []site // flooded in turn
	connections uint64 // as many, from random sources
	first       floodStep
	steps       uint32 // packets of each connection
}

func (a *attack) packets() uint64 { return a.connections * uint64(a.steps) }

// to is how many of the connections go to sites of a kind.
func (a *attack) to(is func(site) bool) (n uint64) {
	for i, s := range a.sites {
		if is(s) {
			n += (a.connections + uint64(len(a.sites)-1-i)) / uint64(len(a.sites))
		}
	}
	return n
}

// template is the frame of a packet to a site, without what the driver writes.
func template(s site) (words [10]uint64) {
	source := netip.AddrFrom4([4]byte{})
	if s.v6 {
		source = netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8})
	}
	packet := segment{source: netip.AddrPortFrom(source, 0), destination: s.service()}
	var frame [80]byte
	packet.put(frame[:], clientMAC)
	for i := range words {
		words[i] = binary.NativeEndian.Uint64(frame[i*8:])
	}
	return words
}

// flood floods a program from all CPUs at once, each with its part, and says how long a packet took, by the kernel's clock.
func (all drivers) flood(t testing.TB, program *ebpf.Program, a attack, seed uint64) time.Duration {
	t.Helper()
	var running sync.WaitGroup
	for i, d := range all {
		// Shares of whole rounds, so that together all sites get what they would from one.
		rounds, n := a.connections/uint64(len(a.sites)), uint64(len(all))
		part := a
		part.connections = (rounds*uint64(i+1)/n - rounds*uint64(i)/n) * uint64(len(a.sites))
		if i == len(all)-1 {
			part.connections += a.connections % uint64(len(a.sites))
		}
		running.Go(func() {
			if err := d.run(program, part, seed+uint64(i)<<40); err != nil {
				t.Errorf("%s, on CPU %d: %v", a.name, d.number, err)
			}
		})
	}
	running.Wait()
	var took, packets uint64
	for _, d := range all {
		took, packets = took+d.took, packets+d.timed
	}
	return time.Duration(took / max(packets, 1))
}

// burst is how many packets a run makes at most. Beginning and ending one takes the kernel milliseconds.
const burst = 1 << 18

// run is a driver's part. It binds the calling goroutine to the CPU for good.
func (d *driver) run(program *ebpf.Program, a attack, seed uint64) error {
	if err := onCPU(d.number); err != nil {
		return fmt.Errorf("bind to the CPU: %w", err)
	}
	if err := d.Flooded.Put(uint32(0), program); err != nil {
		return fmt.Errorf("hand over %s: %w", program, err)
	}
	plan := floodAttack{TargetCount: uint32(len(a.sites)), First: uint32(a.first), Steps: a.steps, Seed: seed}
	if len(a.sites) == 0 || len(a.sites) > len(plan.Targets) {
		return fmt.Errorf("%d services to flood: the driver takes 1 to %d", len(a.sites), len(plan.Targets))
	}
	for i, s := range a.sites {
		plan.Targets[i].Template = template(s)
		if s.v6 {
			plan.Targets[i].Ipv6 = 1
		}
	}
	if err := d.Plan.Set(plan); err != nil {
		return err
	}
	var progress floodAdvance
	d.timed, d.took = 0, 0
	for progress.Made < a.packets() {
		// The head of the frame is where this run finds it first.
		progress.Head = 0
		if err := d.Progress.Set(progress); err != nil {
			return err
		}
		made := progress.Made
		d.cpu.attr.repeat = uint32(min(a.packets()-made, burst))
		// A signal ends a run early: what was made by then is made.
		err := d.cpu.call(len(plan.Targets[0].Template) * 8)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if err := d.Progress.Get(&progress); err != nil {
			return err
		}
		if err == nil {
			n := progress.Made - made
			d.timed, d.took = d.timed+n, d.took+n*uint64(d.cpu.attr.duration)
		}
	}
	if progress.Lost > 0 || progress.Made != a.packets() {
		return fmt.Errorf("%d packets made of %d, %d of them lost", progress.Made, a.packets(), progress.Lost)
	}
	return nil
}
