package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"fairlead/loader"
	"fairlead/test/lab"
)

// form is a way to forward: a method, the clients' family, and that of the packets to the backends.
type form struct {
	method          string
	clients, behind int // 4 or 6
}

// forms are all of them.
var forms = []form{
	{"fullnat", 4, 4}, {"fullnat", 6, 6}, {"nat", 4, 4}, {"nat", 6, 6}, {"dsr", 4, 4}, {"dsr", 6, 6},
	{"ipip", 4, 4}, {"ipip", 6, 6}, {"ipip", 4, 6}, {"ipip", 6, 4},
	{"gue", 4, 4}, {"gue", 6, 6}, {"gue", 4, 6}, {"gue", 6, 4},
}

func (f form) tunnels() bool { return f.method == "ipip" || f.method == "gue" }

// String is fullnat/IPv4 or ipip/4in6.
func (f form) String() string {
	if f.tunnels() {
		return fmt.Sprintf("%s/%din%d", f.method, f.clients, f.behind)
	}
	return fmt.Sprintf("%s/IPv%d", f.method, f.clients)
}

// overhead is what a tunnel puts before a client's packet, in bytes.
func (f form) overhead() int {
	const ipv4, ipv6, udp = 20, 40, 8
	size := map[int]int{4: ipv4, 6: ipv6}[f.behind]
	switch f.method {
	case "ipip":
		return size
	case "gue":
		return size + udp
	}
	return 0
}

func unspecified(family int) netip.Addr {
	if family == 4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// tunnelSources is where tunnels begin: the routers of every lab with tunnels send what concerns them to the edge.
var tunnelSources = []netip.Prefix{netip.MustParsePrefix("10.255.0.0/24"), netip.MustParsePrefix("fd00:255::/120")}

// arms is lab.OneArm or lab.TwoArm.
type arms func(prefix string, options lab.Options) (*lab.Topology, error)

// mustTopology builds a lab as a form needs it, and the service that its backends are to serve. Options.Services are the
// addresses that clients come to, whatever the form makes of them: lab.DefaultServices, or lab.SegmentServices.
func mustTopology(t *testing.T, build arms, f form, backends int, options lab.Options) (*lab.Topology, service) {
	t.Helper()
	options.Backends, options.ClientAddresses = backends, 8
	if options.Services == nil {
		options.Services = lab.DefaultServices()
	}
	switch f.method {
	case "nat":
		options.ByEdge = true
	case "ipip", "gue":
		options.TunnelSources = tunnelSources
		fallthrough
	case "dsr":
		options.DSRServices, options.Services = options.Services, nil
	}
	topo, err := build(prefixOf(t), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := topo.Close(); err != nil {
			t.Error(err)
		}
	})
	s := service{method: f.method, port: websocketPort}
	for _, a := range topo.Services {
		if a.Is4() == (f.clients == 4) {
			s.address = a
		}
	}
	for _, b := range topo.Backends() {
		s.backends = append(s.backends, backend{b.Name(), b.Address(unspecified(f.behind)), 1})
		if f.tunnels() {
			mustDecap(t, b)
		}
	}
	if f.tunnels() {
		s.extra = []string{fmt.Sprintf("tunnel_source: %q", tunnelSources[map[int]int{4: 0, 6: 1}[f.behind]])}
	}
	return topo, s
}

// prefixOf names a test's lab after the test.
func prefixOf(t *testing.T) string {
	t.Helper()
	prefix := "e2e" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(strings.TrimPrefix(t.Name(), "Test")))
	if len(prefix) > 32 {
		t.Fatalf("%s is too long a name for a test with a lab", t.Name())
	}
	return prefix
}

// interfacesOf is the configuration's line that names the edge's interfaces.
func interfacesOf(topo *lab.Topology) string {
	if topo.EdgeFront == topo.EdgeBack {
		return fmt.Sprintf("interfaces: [%s]", topo.EdgeFront)
	}
	return fmt.Sprintf("interfaces: [%s, %s]", topo.EdgeFront, topo.EdgeBack)
}

// scratch is a folder for what tests share; TestMain removes it.
var scratch = sync.OnceValues(func() (dir string, err error) {
	scratchMade, err = os.MkdirTemp("", "fairlead-e2e-")
	return scratchMade, err
})

var scratchMade string

// fairlead builds the command line's program, once.
var fairlead = sync.OnceValues(func() (string, error) {
	dir, err := scratch()
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "fairlead")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "fairlead/cmd/fairlead")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build fairlead: %w: %s", err, out)
	}
	return program, nil
})

func mustFairlead(t *testing.T) string {
	t.Helper()
	program, err := fairlead()
	if err != nil {
		t.Fatal(err)
	}
	return program
}

// mustDecap has a backend open tunnels, by `fairlead decap` as an operator would start it.
func mustDecap(t *testing.T, b *lab.Backend) {
	t.Helper()
	pins := "/sys/fs/bpf/fairlead-test-" + b.Namespace()
	remove := func() {
		err := b.Do(func() error { _, err := loader.RemoveDecap(pins); return err })
		if err != nil && !errors.Is(err, loader.ErrNothing) {
			t.Errorf("remove what decap has pinned: %v", err)
		}
		if err := os.Remove(pins); err != nil && !os.IsNotExist(err) {
			t.Errorf("remove decap's pin path: %v", err)
		}
	}
	remove()
	process, err := b.Start(b.Command(context.Background(), mustFairlead(t), "decap", "--interface", lab.BackendInterface,
		"--pin-path", pins))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		process.Stop()
		remove()
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		attached := false
		if err := b.Do(func() error {
			link, err := netlink.LinkByName(lab.BackendInterface)
			if err == nil {
				attached = link.Attrs().Xdp != nil && link.Attrs().Xdp.Attached
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if attached {
			return
		}
		log, _ := os.ReadFile(process.Log())
		select {
		case <-process.Done():
			t.Fatalf("fairlead decap has ended: %s", log)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("fairlead decap has not attached within 10 s: %s", log)
		}
	}
}

func mustServe(t *testing.T, b *lab.Backend) {
	t.Helper()
	listen := []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), websocketPort)}
	if _, err := b.StartServer(lab.ServerOptions{Listen: listen}); err != nil {
		t.Fatal(err)
	}
}

func mustServeFlows(t *testing.T, b *lab.Backend) *lab.FlowServer {
	t.Helper()
	listen := []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), flowPort)}
	server, err := b.StartFlowServer(lab.ServerOptions{Listen: listen})
	if err != nil {
		t.Fatal(err)
	}
	return server
}
