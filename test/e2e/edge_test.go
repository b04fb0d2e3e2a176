package e2e

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/loader"
	"fairlead/maps"
	"fairlead/test/lab"
	"fairlead/userspace/daemon"
)

const daemonVariable = "FAIRLEAD_E2E_DAEMON"

func TestMain(m *testing.M) {
	lab.PeerMain()
	if path := os.Getenv(daemonVariable); path != "" {
		os.Exit(runDaemon(path))
	}
	flag.Parse()
	// Forms wait more than they work: for epochs, timeouts, each other. Where nobody says otherwise, more run than CPUs are there.
	chosen := false
	flag.Visit(func(f *flag.Flag) { chosen = chosen || f.Name == "test.parallel" })
	if !chosen {
		flag.Set("test.parallel", fmt.Sprint(2*runtime.NumCPU()))
	}
	code := m.Run()
	if scratchMade != "" {
		os.RemoveAll(scratchMade)
	}
	os.Exit(code)
}

// runDaemon is the real daemon, in a process of its own so that it can be killed.
func runDaemon(config string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	err := daemon.Run(ctx, daemon.Options{
		Config: config, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Reload: reload,
		Ready: func() { fmt.Fprintln(os.Stderr, "READY") },
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAILED:", err)
		return 1
	}
	return 0
}

// backend is a line of the configuration.
type backend struct {
	name    string
	address netip.Addr
	weight  int
}

// service is the configuration of a service.
type service struct {
	address  netip.Addr
	port     uint16
	protocol string // default tcp
	method   string
	extra    []string // further lines
	backends []backend
}

func (s service) addrPort() netip.AddrPort { return netip.AddrPortFrom(s.address, s.port) }

// at is the same service elsewhere.
func (s service) at(protocol string, port uint16, extra ...string) service {
	s.protocol, s.port, s.extra = protocol, port, slices.Concat(s.extra, extra)
	return s
}

// edge is a Fairlead on the edge of a topology: its configuration, its process, its maps.
type edge struct {
	t        *testing.T
	node     *lab.Node
	config   string
	pinPath  string
	global   []string // lines of the dataplane's section
	stateDir string   // default: beside the configuration
	process  *lab.Process
	services []service
	reloads  int
}

func newEdge(t *testing.T, topo *lab.Topology, global ...string) *edge {
	t.Helper()
	return newEdgeOn(t, topo.Edge, global...)
}

func newEdgeOn(t *testing.T, node *lab.Node, global ...string) *edge {
	t.Helper()
	e := &edge{
		t: t, node: node, config: filepath.Join(t.TempDir(), "fairlead.yaml"),
		pinPath: "/sys/fs/bpf/fairlead-test-" + node.Namespace(), global: global,
	}
	e.unload()
	t.Cleanup(func() {
		if e.process != nil {
			e.process.Stop()
		}
		e.unload()
	})
	return e
}

func (e *edge) unload() {
	e.t.Helper()
	// The links' devices are in the edge's namespace.
	if err := e.node.Do(func() error { _, err := loader.Unload(e.pinPath); return err }); err != nil &&
		!strings.Contains(err.Error(), loader.ErrNothing.Error()) {
		e.t.Errorf("unload: %v", err)
	}
	if err := os.Remove(e.pinPath); err != nil && !os.IsNotExist(err) {
		e.t.Errorf("remove the pin path: %v", err)
	}
}

func (e *edge) write(services ...service) {
	e.t.Helper()
	e.services = services
	var b strings.Builder
	fmt.Fprintf(&b, "node: lab\ndataplane:\n  pin_path: %s\n", e.pinPath)
	for _, line := range e.global {
		fmt.Fprintf(&b, "  %s\n", line)
	}
	fmt.Fprintf(&b, "control: {socket: %s/control.sock, http: \"\"}\nstate_dir: %s\nservices:\n",
		filepath.Dir(e.config), cmp.Or(e.stateDir, filepath.Dir(e.config)))
	for i, s := range services {
		fmt.Fprintf(&b, "- name: service%d\n  address: %q\n  port: %d\n  protocol: %s\n  method: %s\n", i, s.address, s.port,
			cmp.Or(s.protocol, "tcp"), s.method)
		for _, line := range s.extra {
			fmt.Fprintf(&b, "  %s\n", line)
		}
		fmt.Fprintf(&b, "  backends:\n")
		for _, be := range s.backends {
			fmt.Fprintf(&b, "  - {name: %s, address: %q, weight: %d}\n", be.name, be.address, be.weight)
		}
	}
	if err := os.WriteFile(e.config, []byte(b.String()), 0o644); err != nil {
		e.t.Fatal(err)
	}
}

// start starts the daemon and waits until it is ready.
func (e *edge) start() {
	e.t.Helper()
	cmd := e.node.Command(context.Background(), os.Args[0])
	cmd.Env = append(os.Environ(), daemonVariable+"="+e.config)
	process, err := e.node.Start(cmd)
	if err != nil {
		e.t.Fatal(err)
	}
	e.process, e.reloads = process, 0
	e.until("the daemon is ready", func() bool { return strings.Contains(e.log(), "READY") })
}

func (e *edge) log() string {
	b, err := os.ReadFile(e.process.Log())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// story is what failures tell: the daemon's log, and what the data plane has counted.
func (e *edge) story() string {
	story := "the daemon's log:\n" + e.log()
	raw, closer, err := loader.OpenMaps(e.pinPath)
	if err != nil {
		return story
	}
	defer closer.Close()
	set, err := maps.NewSet(raw)
	if err != nil {
		return story
	}
	defer set.Close()
	totals, err := set.Counters.Totals()
	if err != nil {
		return story
	}
	story += "the counts:"
	for _, list := range []struct {
		names  []string
		counts []uint64
	}{{bpf.VerdictNames(), totals.Verdicts}, {bpf.EventNames(), totals.Events}} {
		for i, n := range list.counts {
			if n > 0 {
				story += fmt.Sprintf(" %s %d", list.names[i], n)
			}
		}
	}
	return story
}

// until waits for a condition; when it does not come true, the daemon's log is shown.
func (e *edge) until(what string, ok func() bool) {
	e.t.Helper()
	e.within(30*time.Second, what, ok)
}

func (e *edge) within(patience time.Duration, what string, ok func() bool) {
	e.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
		select {
		case <-e.process.Done():
			e.t.Fatalf("wait until %s: the daemon has ended: %s", what, e.story())
		default:
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("wait until %s: not within %v; %s", what, patience, e.story())
		}
	}
}

// reload makes the daemon read a new configuration and waits until it is in force.
func (e *edge) reload(services ...service) {
	e.t.Helper()
	e.write(services...)
	if err := e.process.Signal(unix.SIGHUP); err != nil {
		e.t.Fatal(err)
	}
	e.reloads++
	e.until("the reload is done", func() bool { return strings.Count(e.log(), "msg=reloaded") >= e.reloads })
}

// kill ends the daemon as a crash would.
func (e *edge) kill() {
	e.t.Helper()
	e.process.Kill()
	e.process.Wait()
}

// open opens the pinned maps, as any command would.
func (e *edge) open() *maps.Set {
	e.t.Helper()
	raw, closer, err := loader.OpenMaps(e.pinPath)
	if err != nil {
		e.t.Fatal(err)
	}
	set, err := maps.NewSet(raw)
	if err != nil {
		closer.Close()
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		set.Close()
		closer.Close()
	})
	return set
}

// count is how often a verdict was given or an event happened since the maps were made, by its name.
func (e *edge) count(set *maps.Set, name string) uint64 {
	e.t.Helper()
	totals, err := set.Counters.Totals()
	if err != nil {
		e.t.Fatal(err)
	}
	if i := slices.Index(bpf.VerdictNames(), name); i >= 0 {
		return totals.Verdicts[i]
	}
	if i := slices.Index(bpf.EventNames(), name); i >= 0 {
		return totals.Events[i]
	}
	e.t.Fatalf("no verdict and no event is called %s", name)
	return 0
}

// countAll is the sum of all verdicts whose names begin so.
func (e *edge) countAll(set *maps.Set, prefix string) (sum uint64) {
	e.t.Helper()
	totals, err := set.Counters.Totals()
	if err != nil {
		e.t.Fatal(err)
	}
	for i, name := range bpf.VerdictNames() {
		if strings.HasPrefix(name, prefix) {
			sum += totals.Verdicts[i]
		}
	}
	return sum
}
