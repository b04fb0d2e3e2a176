package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"fairlead/bpf"
	"fairlead/loader"
	"fairlead/maps"
	"fairlead/test/lab"
	"fairlead/userspace/config"
)

const (
	demoService = "chat"
	// demoPoll is how often the pinned maps are asked whether something has come about.
	demoPoll = 50 * time.Millisecond
	// demoPatience is how long the daemon may take for anything.
	demoPatience = 20 * time.Second
)

// configuration is the file for the backends listed.
func (d *demo) configuration() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Written by fairlead demo.
node: edge
dataplane:
  mode: xdp
  interfaces: [%s, %s]
  xdp: native
  connections: 65536
  pin_path: %s
state_dir: %s
control:
  socket: %s
  http: ""
services:
- name: %s
  address: "%s"
  port: %d
  method: %s
  health: {type: none}
  backends:
`, d.lab.EdgeFront, d.lab.EdgeBack, d.pins(), filepath.Join(d.dir(), "state"), filepath.Join(d.dir(), "control.sock"),
		demoService, d.service.Addr(), d.service.Port(), d.method)
	for _, backend := range d.listed {
		fmt.Fprintln(&b, " ", d.listing(backend))
	}
	return b.String()
}

// listing is a backend's line in the file.
func (d *demo) listing(b *lab.Backend) string {
	return fmt.Sprintf(`- {name: %s, address: "%s", port: %d}`, b.Name(), b.Address(d.service.Addr()), d.backendPort())
}

// backendPort is where backends listen: under dsr, which changes no port, at the service's own.
func (d *demo) backendPort() uint16 {
	if d.method == config.MethodDSR {
		return d.service.Port()
	}
	return 8765
}

// configure writes the file whole, or not at all.
func (d *demo) configure() error {
	next := d.file() + ".next"
	if err := os.WriteFile(next, []byte(d.configuration()), 0o644); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	if err := os.Rename(next, d.file()); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	return nil
}

// startDaemon starts the daemon in the edge's namespace.
func (d *demo) startDaemon() (err error) {
	// Without the story's context: the daemon ends when it is told to, or stays with --keep.
	d.daemon, err = d.lab.Edge.Start(d.lab.Edge.Command(context.Background(), d.program, "run", "-c", d.file()))
	return err
}

// reload has the daemon read its configuration again and waits until the ring holds just the backends listed, and every
// slot is settled.
func (d *demo) reload() error {
	d.say("$ kill -HUP %d", d.daemon.PID())
	if err := d.daemon.Signal(sighup); err != nil {
		return fmt.Errorf("signal the daemon: %w", err)
	}
	began := time.Now()
	if err := d.await("the new ring", d.inForce); err != nil {
		return err
	}
	d.say("in force, and every slot of the ring settled, after %s", brief(time.Since(began)))
	return nil
}

// inForce tells whether the data plane has the configuration as it was last written.
func (d *demo) inForce() error {
	v, err := d.look()
	if err != nil {
		return err
	}
	for _, backend := range d.listed {
		if v.slots[backend.Name()] == 0 {
			return fmt.Errorf("backend %s has no slot in the ring", backend.Name())
		}
	}
	if len(v.slots) != len(d.listed) {
		return fmt.Errorf("the ring holds %d backends, not %d", len(v.slots), len(d.listed))
	}
	if v.unsettled > 0 {
		return fmt.Errorf("%d slots are unsettled", v.unsettled)
	}
	for _, backend := range v.backends {
		if !backend.NextHop.Known && !backend.Leaving {
			return fmt.Errorf("backend %s has no next hop: %s", backend.Name, backend.NextHop.Reason)
		}
	}
	return nil
}

// attached tells how the program is attached, by interface.
func (d *demo) attached() (links []loader.Attachment, err error) {
	err = d.lab.Edge.Do(func() (err error) { // for the interfaces' names
		links, err = loader.Links(d.pins())
		return err
	})
	return links, err
}

// await polls until a condition holds (no error), the daemon has ended, or patience has.
func (d *demo) await(what string, condition func() error) error {
	tick := time.NewTicker(demoPoll)
	defer tick.Stop()
	var ended <-chan struct{}
	if d.daemon != nil {
		ended = d.daemon.Done()
	}
	for deadline := time.Now().Add(demoPatience); ; {
		err := condition()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait %v for %s: %w", demoPatience, what, err)
		}
		select {
		case <-tick.C:
		case <-ended:
			return fmt.Errorf("wait for %s: the daemon has ended: %v", what, d.daemon.Wait())
		case <-d.ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, d.ctx.Err())
		}
	}
}

// show runs a command of this program in the edge's namespace, and tells its output.
func (d *demo) show(arguments ...string) error {
	d.say("$ fairlead %s", strings.Join(arguments, " "))
	cmd := d.lab.Edge.Command(d.ctx, append([]string{d.program}, append(arguments, "-c", d.file())...)...)
	output, err := cmd.CombinedOutput()
	for line := range strings.Lines(strings.TrimSpace(string(output))) {
		d.say("  %s", line)
	}
	if err != nil {
		return fmt.Errorf("run fairlead %s: %w", strings.Join(arguments, " "), err)
	}
	return nil
}

// lastWords tells the end of the daemon's log.
func (d *demo) lastWords() {
	if d.daemon == nil {
		return
	}
	text, err := os.ReadFile(d.daemon.Log())
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	d.say("the daemon's log ends:")
	for _, line := range lines[max(0, len(lines)-15):] {
		d.say("  %s", line)
	}
}

// demoView is what the pinned maps say at one moment.
type demoView struct {
	services    []maps.Service
	backends    []maps.Backend
	ring        []uint32       // numbers of backends, slot by slot
	slots       map[string]int // of the ring, by backend
	unsettled   int            // slots
	connections int64          // entries of the connection table
	totals      maps.Totals
}

// look reads the pinned maps, as any process may, with the daemon or without it.
func (d *demo) look() (v demoView, err error) {
	raw, closer, err := loader.OpenMaps(d.pins())
	if err != nil {
		return v, err
	}
	defer closer.Close()
	set, err := maps.NewSet(raw)
	if err != nil {
		return v, err
	}
	defer set.Close()
	inventory, err := set.Inventory()
	if err != nil {
		return v, err
	}
	v.services, v.backends = inventory.Services, inventory.Backends
	at := slices.IndexFunc(v.services, func(s maps.Service) bool { return s.Name == demoService })
	if at < 0 {
		return v, fmt.Errorf("no service %s in the maps", demoService)
	}
	ring, err := set.Ring(v.services[at].ID)
	if err != nil {
		return v, err
	}
	v.slots = make(map[string]int)
	for _, slot := range ring {
		backend, known := inventory.Backend(slot.Backend)
		if !known {
			return v, errors.New("a slot of the ring leads to no backend")
		}
		v.ring = append(v.ring, slot.Backend)
		v.slots[backend.Name]++
		if !slot.Settled {
			v.unsettled++
		}
	}
	v.connections = set.Control.Connections()
	v.totals, err = set.Counters.Totals()
	return v, err
}

// share is the part of new connections that the ring gives a backend.
func (v demoView) share(backend string) float64 {
	return float64(v.slots[backend]) / float64(len(v.ring))
}

// said lists, by name, what the data plane refused, dropped or could not note; nothing where all went well.
func (v demoView) said() (rows []row) {
	for i, name := range bpf.VerdictNames() {
		if n := v.totals.Verdicts[i]; n > 0 && (strings.HasPrefix(name, "drop_") || strings.HasPrefix(name, "reset_")) {
			rows = append(rows, row{"packets: " + name, grouped(n)})
		}
	}
	for i, name := range bpf.EventNames() {
		if n := v.totals.Events[i]; n > 0 && slices.Contains(troubles, name) {
			rows = append(rows, row{"events: " + name, grouped(n)})
		}
	}
	return rows
}

// troubles are the events that mean that something could not be had.
var troubles = []string{
	"adoption_limited", "young_limited", "table_full", "insert_failed", "port_stolen", "closing_unfit",
}

// counted sums the packets of verdicts whose names begin so.
func (v demoView) counted(prefixes ...string) (packets uint64) {
	for i, name := range bpf.VerdictNames() {
		if slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
			packets += v.totals.Verdicts[i]
		}
	}
	return packets
}

// serviceOf is the service's address in the lab.
func serviceOf(t *lab.Topology, ipv6 bool) netip.AddrPort {
	at := slices.IndexFunc(t.Services, func(a netip.Addr) bool { return a.Is6() == ipv6 })
	return netip.AddrPortFrom(t.Services[at], 443)
}
