package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	os.Exit(m.Run())
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

// service is the configuration of the one service that most tests have.
type service struct {
	address  netip.Addr
	port     uint16
	method   string
	extra    []string // further lines
	backends []backend
}

func (s service) addrPort() netip.AddrPort { return netip.AddrPortFrom(s.address, s.port) }

// edge is a Fairlead on the edge of a topology: its configuration, its process, its maps.
type edge struct {
	t        *testing.T
	node     *lab.Node
	config   string
	pinPath  string
	global   []string // lines of the dataplane's section
	process  *lab.Process
	services []service
	reloads  int
}

func newEdge(t *testing.T, topo *lab.Topology, global ...string) *edge {
	t.Helper()
	e := &edge{
		t: t, node: topo.Edge, config: filepath.Join(t.TempDir(), "fairlead.yaml"),
		pinPath: "/sys/fs/bpf/fairlead-test-" + topo.Prefix(), global: global,
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
		filepath.Dir(e.config), filepath.Dir(e.config))
	for i, s := range services {
		fmt.Fprintf(&b, "- name: service%d\n  address: %q\n  port: %d\n  method: %s\n", i, s.address, s.port, s.method)
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

// until waits for a condition; when it does not come true, the daemon's log is shown.
func (e *edge) until(what string, ok func() bool) {
	e.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
		select {
		case <-e.process.Done():
			e.t.Fatalf("wait until %s: the daemon has ended:\n%s", what, e.log())
		default:
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("wait until %s: not within 30 s; the daemon's log:\n%s", what, e.log())
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
