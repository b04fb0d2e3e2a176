package neighbor

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// watching is a Watcher that runs, and a record of what it told.
type watching struct {
	*Watcher
	tb   testing.TB
	stop func()

	mu   sync.Mutex
	told map[netip.Addr][]NextHop
	log  bytes.Buffer
}

func (w *watching) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(b)
}

func mustWatch(tb testing.TB, ns *namespace, opts Options, destinations ...string) *watching {
	tb.Helper()
	w := &watching{tb: tb, told: map[netip.Addr][]NextHop{}}
	also := opts.OnChange
	opts.Namespace = ns.ns
	opts.Logger = slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
	opts.OnChange = func(hops []NextHop) {
		w.mu.Lock()
		for _, h := range hops {
			w.told[h.Destination] = append(w.told[h.Destination], h)
		}
		w.mu.Unlock()
		if also != nil {
			also(hops)
		}
	}
	var err error
	if w.Watcher, err = New(opts); err != nil {
		tb.Fatal(err)
	}
	w.SetDestinations(addresses(destinations...))
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- w.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-result; err != nil {
			tb.Errorf("Run: %v", err)
		}
		if tb.Failed() {
			tb.Logf("log:\n%s", w.log.String())
		}
	})
	tb.Cleanup(w.stop)
	select {
	case <-w.Ready():
	case <-time.After(5 * time.Second):
		tb.Fatal("not ready")
	}
	return w
}

func addresses(list ...string) (all []netip.Addr) {
	for _, s := range list {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

func (w *watching) get(destination string) NextHop {
	w.tb.Helper()
	h, ok := w.Lookup(netip.MustParseAddr(destination))
	if !ok {
		w.tb.Fatalf("%s isn't known", destination)
	}
	return h
}

// await waits until the next hop is as wanted, and returns it.
func (w *watching) await(destination, what string, wanted func(NextHop) bool) NextHop {
	w.tb.Helper()
	eventually(w.tb, func() (bool, string) {
		h := w.get(destination)
		return wanted(h), fmt.Sprintf("%s: wait for %s; have %+v", destination, what, h)
	})
	return w.get(destination)
}

func (w *watching) awaitState(destination string, s State) NextHop {
	w.tb.Helper()
	return w.await(destination, s.String(), func(h NextHop) bool { return h.State == s })
}

func (w *watching) awaitMAC(destination string, mac net.HardwareAddr) NextHop {
	w.tb.Helper()
	return w.await(destination, mac.String(), func(h NextHop) bool {
		return h.State == Resolved && bytes.Equal(h.MAC, mac)
	})
}

func eventually(tb testing.TB, done func() (bool, string)) {
	tb.Helper()
	deadline := time.After(12 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, what := done()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatal(what)
		}
	}
}

var compare = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestNextHops(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	var router string
	addrs, err := peer.AddrList(peer.link("p0"), netlink.FAMILY_V6)
	peer.must(err)
	for _, a := range addrs {
		if a.IP.IsLinkLocalUnicast() {
			router = a.IP.String()
		}
	}
	host.route("10.9.0.0/24", "via", "10.0.0.2", "mtu", "1400")
	host.route("10.8.0.0/24", "via", router, "dev", "w0")
	host.route("fd09::/64", "via", router, "dev", "w0")
	host.route("10.66.0.0/24", "blackhole")
	host.route("10.67.0.0/24", "prohibit")
	host.route("10.68.0.0/24", "unreachable")
	host.route("fd66::/64", "blackhole")
	host.must(host.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	host.up("br0")
	host.route("10.7.0.0/24", "dev", "br0")

	index := host.link("w0").Attrs().Index
	base := NextHop{Interface: "w0", RouteInterface: "w0", Index: index, SourceMAC: host.mac("w0"), MAC: peer.mac("p0"),
		MTU: 1500, State: Resolved}
	v4, v6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	hop := func(destination string, change func(*NextHop)) NextHop {
		h := base
		h.Destination = netip.MustParseAddr(destination)
		if h.Source = v4; h.Destination.Is6() {
			h.Source = v6
		}
		change(&h)
		return h
	}
	none := func(destination string, s State, reason string) NextHop {
		return NextHop{Destination: netip.MustParseAddr(destination), State: s, Reason: reason}
	}
	want := map[string]NextHop{
		"10.0.0.2": hop("10.0.0.2", func(h *NextHop) { h.OnLink = true }),
		"fd00::2":  hop("fd00::2", func(h *NextHop) { h.OnLink = true }),
		"10.9.0.7": hop("10.9.0.7", func(h *NextHop) {
			h.Gateway, h.MTU = netip.MustParseAddr("10.0.0.2"), 1400
		}),
		"10.8.0.7":  hop("10.8.0.7", func(h *NextHop) { h.Gateway = netip.MustParseAddr(router) }),
		"fd09::7":   hop("fd09::7", func(h *NextHop) { h.Gateway = netip.MustParseAddr(router) }),
		"10.0.0.1":  none("10.0.0.1", Unsuitable, "10.0.0.1 is an address of this host"),
		"fd00::1":   none("fd00::1", Unsuitable, "fd00::1 is an address of this host"),
		"127.0.0.1": none("127.0.0.1", Unsuitable, "127.0.0.1 is an address of this host"),
		"10.0.0.255": none("10.0.0.255", Unsuitable,
			"10.0.0.255 is not the address of one host (a broadcast address?)"),
		"224.0.0.1":  none("224.0.0.1", Unsuitable, "224.0.0.1 is not the address of one host"),
		"192.0.2.1":  none("192.0.2.1", Unreachable, "no route to 192.0.2.1"),
		"2001:db8::": none("2001:db8::", Unreachable, "no route to 2001:db8::"),
		"10.66.0.1":  none("10.66.0.1", Unreachable, "the route to 10.66.0.1 is of type blackhole"),
		"10.67.0.1":  none("10.67.0.1", Unreachable, "the route to 10.67.0.1 is of type prohibit"),
		"10.68.0.1":  none("10.68.0.1", Unreachable, "no route to 10.68.0.1"),
		"fd66::1":    none("fd66::1", Unreachable, "the route to fd66::1 is of type blackhole"),
		"fe80::1": none("fe80::1", Unsuitable,
			"link-local address fe80::1 needs an interface (fe80::1%eth0)"),
		"fe80::1%no": none("fe80::1%no", Unreachable, "no interface named no"),
	}
	var destinations []string
	for d := range want {
		destinations = append(destinations, d)
	}
	w := mustWatch(t, host, Options{}, append(destinations, router+"%w0", "10.7.0.1", "::ffff:10.0.0.2")...)
	for d, h := range want {
		if diff := cmp.Diff(h, w.get(d), compare); diff != "" {
			t.Errorf("%s (-want +got):\n%s", d, diff)
		}
	}
	if h := w.get(router + "%w0"); h.State != Resolved || !h.OnLink || !bytes.Equal(h.MAC, peer.mac("p0")) {
		t.Errorf("link-local destination: %+v", h)
	}
	if h := w.get("10.7.0.1"); h.State != Unsuitable || !strings.Contains(h.Reason, "XDP can't send through a bridge") {
		t.Errorf("over a bridge: %+v", h)
	}
	if got := len(w.Snapshot()); got != len(want)+2 {
		t.Errorf("snapshot has %d next hops, want %d", got, len(want)+2)
	}

	w.SetDestinations(addresses("10.0.0.2"))
	if _, ok := w.Lookup(netip.MustParseAddr("fd00::2")); ok {
		t.Error("a destination no longer wanted is still known")
	}
}

func TestNewInCurrentNamespace(t *testing.T) {
	t.Parallel()
	host, _ := pair(t)
	var w *Watcher
	host.must(onThread(func() (err error) {
		if err = netns.Set(host.ns); err == nil {
			w, err = New(Options{})
		}
		return err
	}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Run(ctx) }() // on a thread of another namespace
	w.SetDestinations(addresses("10.0.0.2"))
	eventually(t, func() (bool, string) {
		h, ok := w.Lookup(netip.MustParseAddr("10.0.0.2"))
		return ok && h.State == Resolved, fmt.Sprintf("%+v", h)
	})
	cancel()
	host.must(<-done)
	if err := w.Run(context.Background()); err == nil {
		t.Error("a second Run succeeded")
	}
}

func TestLateAnswer(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	w := mustWatch(t, host, Options{}, "10.0.0.50", "fd00::50")
	if h := w.awaitState("10.0.0.50", Failed); h.MAC != nil || h.Reason != "no answer to ARP on w0 for 10.0.0.50" {
		t.Errorf("nobody there: %+v", h)
	}
	if h := w.awaitState("fd00::50", Failed); h.MAC != nil || h.Reason != "no answer to NDP on w0 for fd00::50" {
		t.Errorf("nobody there: %+v", h)
	}
	peer.add("p0", "10.0.0.50/24", "fd00::50/64")
	w.awaitMAC("10.0.0.50", peer.mac("p0"))
	w.awaitMAC("fd00::50", peer.mac("p0"))
}

func TestMACChanges(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	host.route("10.9.0.0/24", "via", "10.0.0.2")
	w := mustWatch(t, host, Options{}, "10.0.0.2", "fd00::2", "10.9.0.1")
	change := func(last byte) net.HardwareAddr {
		mac := net.HardwareAddr{2, 0, 0, 0, 0, last}
		peer.must(peer.LinkSetHardwareAddr(peer.link("p0"), mac))
		return mac
	}
	all := func(mac net.HardwareAddr) {
		t.Helper()
		for _, d := range []string{"10.0.0.2", "10.9.0.1", "fd00::2"} {
			w.awaitMAC(d, mac)
		}
	}
	// Announced: gratuitous ARP, unsolicited advertisement.
	peer.sysctl("ipv4/conf/p0/arp_notify", "1")
	peer.sysctl("ipv6/conf/p0/ndisc_notify", "1")
	all(change(1))
	// In silence, but suspected.
	peer.sysctl("ipv4/conf/p0/arp_notify", "0")
	peer.sysctl("ipv6/conf/p0/ndisc_notify", "0")
	mac := change(2)
	w.Suspect(netip.MustParseAddr("10.9.0.1"))
	w.Suspect(netip.MustParseAddr("fd00::2"))
	all(mac)
	// In silence: when the kernel's confidence has run out.
	all(change(3))
	w.stop()
	for d, told := range w.told {
		for _, h := range told {
			if h.State == Failed {
				t.Errorf("%s was told failed while its Ethernet address changed", d)
			}
		}
	}
}

func TestFailsAfterResolved(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	w := mustWatch(t, host, Options{}, "10.0.0.2", "fd00::2")
	mac := peer.mac("p0")
	peer.remove("p0", "10.0.0.2/24")
	peer.remove("p0", "fd00::2/64")
	for _, d := range []string{"10.0.0.2", "fd00::2"} {
		if h := w.awaitState(d, Failed); !bytes.Equal(h.MAC, mac) {
			t.Errorf("%s failed: MAC %s, want the last one known, %s", d, h.MAC, mac)
		}
	}
	peer.add("p0", "10.0.0.2/24", "fd00::2/64")
	w.awaitMAC("10.0.0.2", mac)
	w.awaitMAC("fd00::2", mac)
	w.mu.Lock()
	defer w.mu.Unlock()
	for d, told := range w.told {
		var states []State
		for _, h := range told {
			states = append(states, h.State)
		}
		// While asking goes on the verdict stands: no flapping between failed and resolving.
		if diff := cmp.Diff([]State{Resolved, Failed, Resolved}, states[len(states)-3:]); diff != "" {
			t.Errorf("%s: told %v (-want +got):\n%s", d, states, diff)
		}
	}
}

func TestLostEntryIsAskedAgain(t *testing.T) {
	t.Parallel()
	host, _ := pair(t)
	w := mustWatch(t, host, Options{}, "10.0.0.2")
	before, _ := host.entry("w0", "10.0.0.2")
	host.must(host.NeighDel(&before))
	eventually(t, func() (bool, string) {
		e, ok := host.entry("w0", "10.0.0.2")
		return ok && e.HardwareAddr != nil && e.FlagsExt&netlink.NTF_EXT_MANAGED != 0, fmt.Sprintf("entry: %+v", e)
	})
	w.stop()
	if last := w.told[netip.MustParseAddr("10.0.0.2")]; last[len(last)-1].State != Resolved || len(last) > 2 {
		t.Errorf("told %+v, want no news of a lost entry that comes back", last)
	}
}

func TestRouteMovesToAnotherInterface(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	cable(host, "w1", peer, "p1")
	host.add("w1", "10.1.0.1/24", "fd01::1/64")
	peer.add("p1", "10.1.0.2/24", "fd01::2/64")
	host.route("10.9.0.0/24", "via", "10.0.0.2")
	host.route("fd09::/64", "via", "fd00::2")
	w := mustWatch(t, host, Options{}, "10.9.0.7", "fd09::7")
	host.route("10.9.0.0/24", "via", "10.1.0.2")
	host.route("fd09::/64", "via", "fd01::2")
	for d, source := range map[string]string{"10.9.0.7": "10.1.0.1", "fd09::7": "fd01::1"} {
		h := w.awaitMAC(d, peer.mac("p1"))
		if h.Interface != "w1" || h.Source.String() != source || !bytes.Equal(h.SourceMAC, host.mac("w1")) {
			t.Errorf("after the change: %+v", h)
		}
	}
	eventually(t, func() (bool, string) {
		e, _ := host.entry("w0", "10.0.0.2")
		return e.FlagsExt&netlink.NTF_EXT_MANAGED == 0, "the old gateway is still managed"
	})
	// A more specific route, then none.
	host.route("10.9.0.7/32", "via", "10.0.0.2")
	w.awaitMAC("10.9.0.7", peer.mac("p0"))
	host.route("10.9.0.7/32", "unreachable")
	w.awaitState("10.9.0.7", Unreachable)
}

func TestInterfaceGoesDownAndUp(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	w := mustWatch(t, host, Options{}, "10.0.0.2", "fd00::2")
	host.down("w0")
	w.awaitState("10.0.0.2", Unreachable)
	w.awaitState("fd00::2", Unreachable)
	host.up("w0")
	host.add("w0", "fd00::1/64") // the kernel drops IPv6 addresses with the device
	w.awaitMAC("10.0.0.2", peer.mac("p0"))
	w.awaitMAC("fd00::2", peer.mac("p0"))

	peer.down("p0")
	h := w.awaitState("10.0.0.2", Unreachable)
	if h.Interface != "w0" || !strings.Contains(h.Reason, "no carrier") {
		t.Errorf("without carrier: %+v", h)
	}
	peer.up("p0")
	w.awaitMAC("10.0.0.2", peer.mac("p0"))

	// MTU, name and address of our own device.
	host.must(host.LinkSetMTU(host.link("w0"), 1300))
	host.must(host.LinkSetHardwareAddr(host.link("w0"), net.HardwareAddr{2, 0, 0, 0, 1, 1}))
	w.await("10.0.0.2", "MTU and MAC", func(h NextHop) bool {
		return h.MTU == 1300 && h.SourceMAC.String() == "02:00:00:00:01:01"
	})
	host.must(host.LinkDel(host.link("w0")))
	w.awaitState("10.0.0.2", Unreachable)
}

func TestPolicyRuleMovesRoute(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	cable(host, "w1", peer, "p1")
	host.add("w1", "10.1.0.1/24")
	peer.add("p1", "10.1.0.2/24")
	host.route("10.9.0.0/24", "via", "10.0.0.2")
	host.must(host.RouteAdd(&netlink.Route{Table: 100, Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0")),
		Gw: net.IPv4(10, 1, 0, 2)}))
	w := mustWatch(t, host, Options{}, "10.9.0.7")
	w.awaitMAC("10.9.0.7", peer.mac("p0"))
	rule := netlink.NewRule()
	rule.Table, rule.Priority, rule.Dst = 100, 10, ipNet(netip.MustParsePrefix("10.9.0.0/24"))
	host.must(host.RuleAdd(rule))
	w.awaitMAC("10.9.0.7", peer.mac("p1"))
}

func TestOwnAddressComesAndGoes(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	w := mustWatch(t, host, Options{}, "10.0.0.2")
	host.add("w0", "10.0.0.2/32")
	w.awaitState("10.0.0.2", Unsuitable)
	host.remove("w0", "10.0.0.2/32")
	w.awaitMAC("10.0.0.2", peer.mac("p0"))
}

func TestLostNews(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	cable(host, "w1", peer, "p1")
	host.add("w1", "10.1.0.1/24")
	peer.add("p1", "10.1.0.2/24")
	host.route("10.9.0.0/24", "via", "10.0.0.2")
	told, proceed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w := mustWatch(t, host, Options{ReceiveBuffer: 1, OnChange: func(hops []NextHop) {
		if hops[0].MTU == 1400 {
			once.Do(func() { close(told); <-proceed })
		}
	}}, "10.9.0.7")
	host.route("10.9.0.0/24", "via", "10.0.0.2", "mtu", "1400")
	<-told
	// Run is held up; what comes now doesn't fit.
	for i := range 300 {
		host.route(fmt.Sprintf("10.200.%d.0/24", i%256), "via", "10.0.0.2")
	}
	host.route("10.9.0.0/24", "via", "10.1.0.2")
	close(proceed)
	w.awaitMAC("10.9.0.7", peer.mac("p1"))
	eventually(t, func() (bool, string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return strings.Contains(w.log.String(), "netlink news were lost"), "no news were lost: the test shows nothing"
	})
}

func TestManagedEntriesAreTakenBack(t *testing.T) {
	t.Parallel()
	host, _ := pair(t)
	managed := func(name, ip string) bool {
		e, _ := host.entry(name, ip)
		return e.FlagsExt&netlink.NTF_EXT_MANAGED != 0
	}
	awaitManaged := func(ip string, want bool) {
		t.Helper()
		eventually(t, func() (bool, string) {
			return managed("w0", ip) == want, fmt.Sprintf("%s: wait for managed %v", ip, want)
		})
	}
	w0 := host.link("w0").Attrs().Index
	// Somebody else's: they stay as they are.
	permanent := netlink.Neigh{LinkIndex: w0, State: netlink.NUD_PERMANENT, IP: net.IPv4(10, 0, 0, 60),
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 60}}
	host.must(host.NeighAdd(&permanent))
	host.must(host.NeighAdd(&netlink.Neigh{LinkIndex: w0, Flags: netlink.NTF_USE, FlagsExt: netlink.NTF_EXT_MANAGED,
		IP: net.ParseIP("fd00::2")}))
	// Left by one that was killed.
	r, err := openRequests(host.ns)
	host.must(err)
	defer r.close()
	host.must(r.ask(entryKey{w0, netip.MustParseAddr("10.0.0.70")}, entry{}))
	awaitManaged("10.0.0.70", true)

	w := mustWatch(t, host, Options{}, "10.0.0.2", "10.0.0.60", "fd00::2", "10.0.0.50")
	awaitManaged("10.0.0.2", true)
	awaitManaged("10.0.0.70", false)
	if h := w.get("10.0.0.60"); h.State != Resolved || h.MAC.String() != "02:00:00:00:00:3c" {
		t.Errorf("permanent entry: %+v", h)
	}
	w.SetDestinations(addresses("10.0.0.2", "10.0.0.60", "fd00::2"))
	awaitManaged("10.0.0.50", false)
	w.Suspect(permanentIP)
	w.Suspect(netip.MustParseAddr("10.0.0.2"))
	awaitManaged("10.0.0.2", true)
	w.stop()
	if managed("w0", "10.0.0.2") {
		t.Error("10.0.0.2 is managed after Run's end")
	}
	if !managed("w0", "fd00::2") {
		t.Error("an entry that another had made managed isn't any more")
	}
	if e, _ := host.entry("w0", "10.0.0.60"); e.State != netlink.NUD_PERMANENT {
		t.Errorf("permanent entry is now %#x", e.State)
	}
}

var permanentIP = netip.MustParseAddr("10.0.0.60")

func TestManyDestinations(t *testing.T) {
	t.Parallel()
	host, peer := pair(t)
	host.add("w0", "10.4.0.1/16")
	var destinations []string
	for i := range 500 {
		ip := fmt.Sprintf("10.4.%d.%d", 1+i/250, 1+i%250)
		destinations = append(destinations, ip)
		peer.add("p0", ip+"/32")
	}
	peer.route("10.4.0.0/16", "dev", "p0")
	start := time.Now()
	w := mustWatch(t, host, Options{ReadyAfter: 5 * time.Second}, destinations...)
	took := time.Since(start)
	for _, h := range w.Snapshot() {
		if h.State != Resolved || !bytes.Equal(h.MAC, peer.mac("p0")) {
			t.Fatalf("after %v: %+v", took, h)
		}
	}
	t.Logf("500 destinations resolved in %v", took)
	if took > 2*time.Second {
		t.Errorf("500 destinations took %v", took)
	}
}
