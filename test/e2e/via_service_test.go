package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/maps"
	"fairlead/test/lab"
)

// TestViaService checks backends through their service's method, by every method and pair of families at once. Up is who
// would serve a client: ws1. Down is who lacks the service's address (ws2), and who opens no tunnels (ws3, where the
// method is one). What is mended comes up; what breaks goes down.
func TestViaService(t *testing.T) {
	t.Parallel()
	topo, err := lab.OneArm(prefixOf(t), lab.Options{
		Backends: 3, ClientAddresses: 1, DSRServices: lab.DefaultServices(), TunnelSources: tunnelSources,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := topo.Close(); err != nil {
			t.Error(err)
		}
	})
	whole, bare, shut := topo.Backends()[0], topo.Backends()[1], topo.Backends()[2]
	mustDecap(t, whole)
	mustDecap(t, bare)
	mustHold(t, bare, false, topo.Services...)
	forms := []form{{"dsr", 4, 4}, {"dsr", 6, 6}}
	for _, method := range []string{"ipip", "gue"} {
		forms = append(forms, form{method, 4, 4}, form{method, 6, 6}, form{method, 4, 6}, form{method, 6, 4})
	}
	var services []service
	var listen []netip.AddrPort
	for i, f := range forms {
		s := service{
			address: topo.Services[map[int]int{4: 0, 6: 1}[f.clients]], port: uint16(8001 + i), method: f.method,
			extra: []string{"health: {type: websocket, path: /, via: service, interval: 500ms, fast_interval: 100ms, timeout: 300ms}"},
		}
		if f.tunnels() {
			s.extra = append(s.extra, fmt.Sprintf("tunnel_source: %q", tunnelSources[map[int]int{4: 0, 6: 1}[f.behind]]))
		}
		for _, b := range topo.Backends() {
			s.backends = append(s.backends, backend{b.Name(), b.Address(unspecified(f.behind)), 1})
		}
		services = append(services, s)
		listen = append(listen, netip.AddrPortFrom(netip.IPv6Unspecified(), s.port))
	}
	for _, b := range topo.Backends() {
		if _, err := b.StartServer(lab.ServerOptions{Listen: listen}); err != nil {
			t.Fatal(err)
		}
	}
	// What comes to the backends by dsr is seen as it is. The host's own RSTs have its own time to live.
	resets, err := shut.Capture(lab.BackendInterface, func(frame []byte) bool {
		const fromChecks = 2 // time to live
		return binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IP && frame[23] == unix.IPPROTO_TCP && frame[47]&4 != 0 &&
			frame[22] != fromChecks
	})
	if err != nil {
		t.Fatal(err)
	}

	e := newEdge(t, topo, interfacesOf(topo))
	e.write(services...)
	e.start()
	set := e.open()
	// healths are what checks say of a backend, and why it failed last, by its service.
	healths := func(name string) (all []maps.Shown) {
		inv, err := set.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		for i := range services {
			for _, s := range inv.Services {
				for _, b := range inv.Backends {
					if s.Name == fmt.Sprint("service", i) && b.Service == s.ID && b.Name == name {
						all = append(all, b.Shown)
					}
				}
			}
		}
		return all
	}
	want := func(name string, up func(form) bool) {
		t.Helper()
		e.until(name+" is what it should be in all forms", func() bool {
			all := healths(name)
			for i, f := range forms {
				health := maps.HealthDown
				if up(f) {
					health = maps.HealthUp
				}
				if len(all) != len(forms) || all[i].Health != health {
					return false
				}
			}
			return true
		})
	}
	every := func(form) bool { return true }
	none := func(form) bool { return false }
	untunnelled := func(f form) bool { return !f.tunnels() }
	silent := func(name string, of func(form) bool) {
		t.Helper()
		for i, shown := range healths(name) {
			if of(forms[i]) && !strings.HasPrefix(shown.Failure, "connect: no answer within ") {
				t.Errorf("%v: %s failed for %q: want no answer", forms[i], name, shown.Failure)
			}
		}
	}
	want("ws1", every)
	want("ws2", none)
	want("ws3", untunnelled)
	silent("ws2", every)
	silent("ws3", form.tunnels)

	mustHold(t, bare, true, topo.Services...)
	mustDecap(t, shut)
	want("ws2", every)
	want("ws3", every)

	mustHold(t, whole, false, topo.Services...)
	want("ws1", none)
	silent("ws1", every)
	want("ws2", every)
	want("ws3", every)

	// A new daemon takes it from there.
	e.kill()
	mustHold(t, whole, true, topo.Services...)
	e.start()
	want("ws1", every)
	for _, name := range []string{"ws2", "ws3"} {
		want(name, every)
	}
	if n := e.count(set, "pass_check"); n == 0 {
		t.Error("no answer came by the data plane")
	}
	if frames := resets.Frames(); len(frames) != 0 {
		t.Errorf("the edge's own stack reset %d connections: % x", len(frames), frames[0].Data)
	}
}

// mustHold gives a backend addresses silently, or takes them away.
func mustHold(t *testing.T, b *lab.Backend, hold bool, addresses ...netip.Addr) {
	t.Helper()
	if hold {
		if err := b.Hold(addresses...); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := b.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, a := range addresses {
			ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
			if err := netlink.AddrDel(lo, &netlink.Addr{IPNet: ip}); err != nil {
				return fmt.Errorf("take %v from lo: %w", a, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
