package neighbor

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// device is an Ethernet device that is up.
func device(index int, name, kind string, lower int) link {
	return link{index: index, name: name, kind: kind, lower: lower, hardware: unix.ARPHRD_ETHER, hasMAC: true,
		mac: [6]byte{2, 0, 0, 0, 0, byte(index)}, mtu: 1500, flags: unix.IFF_UP | unix.IFF_LOWER_UP}
}

func vlan(index int, name string, lower int, id, protocol uint16) link {
	l := device(index, name, "vlan", lower)
	l.vlanID, l.vlanType = id, protocol
	return l
}

func with(l link, change func(*link)) link { change(&l); return l }

func TestResolveEgress(t *testing.T) {
	links := map[int]link{}
	for _, l := range []link{
		device(1, "eth0", "", 0),
		vlan(2, "eth0.10", 1, 10, 0x8100),
		vlan(3, "eth0.20", 1, 20, 0x88a8),
		vlan(4, "eth0.20.30", 3, 30, 0x8100),
		vlan(5, "eth0.20.30.40", 4, 40, 0x8100),
		with(device(6, "bond0", "bond", 0), func(l *link) { l.bondMode = 1 }),
		vlan(7, "bond0.10", 6, 10, 0x8100),
		with(device(8, "bond1", "bond", 0), func(l *link) { l.bondMode = 6 }),
		with(device(9, "wg0", "wireguard", 0), func(l *link) { l.hardware, l.hasMAC = unix.ARPHRD_NONE, false }),
		with(device(10, "lo", "", 0), func(l *link) { l.hardware, l.flags = unix.ARPHRD_LOOPBACK, unix.IFF_LOOPBACK }),
		device(11, "vxlan0", "vxlan", 0),
		with(device(12, "eth1", "", 0), func(l *link) { l.flags = unix.IFF_UP }),
		vlan(13, "eth1.10", 12, 10, 0x8100),
		with(vlan(14, "far", 1, 10, 0x8100), func(l *link) { l.foreign = true }),
		with(device(15, "gre0", "gre", 0), func(l *link) { l.hardware, l.hasMAC = unix.ARPHRD_IPGRE, false }),
		vlan(16, "orphan", 99, 10, 0x8100),
		vlan(17, "loop", 17, 10, 0x8100),
	} {
		links[l.index] = l
	}
	for _, test := range []struct {
		from   int
		device string
		vlan   []uint16
		types  []uint16
		err    string
		down   bool
	}{
		{from: 1, device: "eth0"},
		{from: 2, device: "eth0", vlan: []uint16{10}, types: []uint16{0x8100}},
		{from: 4, device: "eth0", vlan: []uint16{20, 30}, types: []uint16{0x88a8, 0x8100}},
		{from: 5, err: "more than 2 VLAN tags"},
		{from: 6, device: "bond0"},
		{from: 7, device: "bond0", vlan: []uint16{10}, types: []uint16{0x8100}},
		{from: 8, err: "a bond in mode balance-alb"},
		{from: 9, err: "route is over wg0, a wireguard device without Ethernet"},
		{from: 10, err: "route is over loopback device lo"},
		{from: 11, err: "XDP can't send through a vxlan device"},
		{from: 12, err: "eth1 has no carrier", down: true},
		{from: 13, err: "eth1 has no carrier", down: true},
		{from: 14, err: "another network namespace"},
		{from: 15, err: "route is over gre0, a gre device without Ethernet"},
		{from: 16, err: "the device below VLAN device orphan has gone", down: true},
		{from: 17, err: "more than 2 VLAN tags"},
		{from: 98, err: "has just gone", down: true},
	} {
		e, err := resolveEgress(links, test.from)
		if test.err != "" {
			if _, down := err.(errDown); err == nil || !strings.Contains(err.Error(), test.err) || down != test.down {
				t.Errorf("%s: error %v, want %q", links[test.from].name, err, test.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", links[test.from].name, err)
		}
		if e.device.name != test.device || e.route.index != test.from {
			t.Errorf("%s: over %s", links[test.from].name, e.device.name)
		}
		if diff := cmp.Diff(test.vlan, e.vlan); diff != "" {
			t.Errorf("%s: tags (-want +got):\n%s", links[test.from].name, diff)
		}
		if diff := cmp.Diff(test.types, e.vlanTypes); diff != "" {
			t.Errorf("%s: protocols (-want +got):\n%s", links[test.from].name, diff)
		}
	}
}

// fakeKernel answers from fields: for what a test machine's kernel may not have.
type fakeKernel struct {
	has      map[int]link
	way      route
	have     map[entryKey]entry
	askErr   error
	asked    int
	released []entryKey
}

func (k *fakeKernel) links() (map[int]link, error)          { return k.has, nil }
func (k *fakeKernel) route(netip.Addr, int) (route, error)  { return k.way, nil }
func (k *fakeKernel) entry(key entryKey) (entry, error)     { return k.have[key], nil }
func (k *fakeKernel) entries(f func(entryKey, entry)) error { return nil }
func (k *fakeKernel) ask(entryKey, entry) error             { k.asked++; return k.askErr }
func (k *fakeKernel) verify(entryKey, entry) error          { return nil }
func (k *fakeKernel) release(key entryKey) error            { k.released = append(k.released, key); return nil }
func (k *fakeKernel) table(tb testing.TB, ip netip.Addr) *table {
	tb.Helper()
	t := newTable(k, slog.New(slog.DiscardHandler))
	if err := t.readLinks(); err != nil {
		tb.Fatal(err)
	}
	t.setDestinations(map[netip.Addr]struct{}{ip: {}})
	return t
}

func TestNextHopOverVLAN(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.11")
	key := entryKey{2, netip.MustParseAddr("10.0.0.2")}
	tagged := vlan(2, "eth0.10", 1, 10, 0x8100)
	tagged.mtu = 1496
	k := &fakeKernel{has: map[int]link{1: device(1, "eth0", "", 0), 2: tagged},
		way:  route{kind: unix.RTN_UNICAST, index: 2, gateway: key.ip, source: netip.MustParseAddr("10.0.0.1")},
		have: map[entryKey]entry{key: {state: netlink.NUD_REACHABLE, hasMAC: true, mac: [6]byte{2, 9}}}}
	tab := k.table(t, ip)
	tab.work(time.Now())
	want := []NextHop{{Destination: ip, Interface: "eth0", Index: 1, RouteInterface: "eth0.10", VLAN: []uint16{10},
		VLANProtocols: []uint16{0x8100}, MAC: []byte{2, 9, 0, 0, 0, 0}, SourceMAC: []byte{2, 0, 0, 0, 0, 2},
		Source: k.way.source, Gateway: key.ip, MTU: 1496, State: Resolved}}
	if diff := cmp.Diff(want, tab.collect(), compare); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	k.way.encap = true
	tab.markAll(time.Now())
	tab.work(time.Now().Add(time.Second))
	if got := tab.collect(); len(got) != 1 || got[0].State != Unsuitable {
		t.Errorf("encapsulating route: %+v", got)
	}
	if diff := cmp.Diff([]entryKey{key}, k.released, cmp.AllowUnexported(entryKey{}), compare); diff != "" {
		t.Errorf("released (-want +got):\n%s", diff)
	}
}

func TestAskingGoesOnPaced(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.11")
	k := &fakeKernel{has: map[int]link{1: device(1, "eth0", "", 0)}, way: route{kind: unix.RTN_UNICAST, index: 1},
		have: map[entryKey]entry{}}
	tab := k.table(t, ip)
	start := time.Now()
	now := start
	run := func(until time.Duration) int {
		before := k.asked
		for ; now.Before(start.Add(until)); now = now.Add(10 * time.Millisecond) {
			tab.work(now)
		}
		return k.asked - before
	}
	if got := run(10 * time.Second); got < 4 || got > 6 {
		t.Errorf("asked %d times in the first 10 s", got)
	}
	if got := run(70 * time.Second); got < 12 || got > 16 {
		t.Errorf("asked %d times in the following 60 s", got)
	}
	// A kernel without managed entries: asked whenever the entry is found stale.
	k.have[entryKey{1, ip}] = entry{state: netlink.NUD_STALE, hasMAC: true}
	run(80 * time.Second)
	if got := run(180 * time.Second); got < 20 || got > 26 {
		t.Errorf("stale entry asked %d times in 100 s", got)
	}
	k.have[entryKey{1, ip}] = entry{state: netlink.NUD_STALE, hasMAC: true, managed: true}
	run(190 * time.Second)
	if got := run(300 * time.Second); got != 0 {
		t.Errorf("managed entry asked %d times", got)
	}
}

func TestReasonsWhenAskingFails(t *testing.T) {
	for _, test := range []struct {
		ip   string
		err  error
		want string
	}{
		{"10.0.0.11", unix.ENOBUFS,
			"can't ask by ARP on eth0 for 10.0.0.11: the kernel's neighbour table is full, " +
				"raise net.ipv4.neigh.default.gc_thresh3"},
		{"fd00::11", unix.ENOBUFS,
			"can't ask by NDP on eth0 for fd00::11: the kernel's neighbour table is full, " +
				"raise net.ipv6.neigh.default.gc_thresh3"},
		{"10.0.0.11", unix.EPERM, "can't ask by ARP on eth0 for 10.0.0.11: CAP_NET_ADMIN is missing"},
	} {
		k := &fakeKernel{has: map[int]link{1: device(1, "eth0", "", 0)}, way: route{kind: unix.RTN_UNICAST, index: 1},
			askErr: test.err}
		tab := k.table(t, netip.MustParseAddr(test.ip))
		tab.work(time.Now())
		got := tab.collect()
		if len(got) != 1 || got[0].State != Resolving || got[0].Reason != test.want {
			t.Errorf("got %+v, want %s", got, test.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 1, 8, 0, 1, 0, 10, 0, 0, 1})
	f.Add([]byte{0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 4, 0, 220, 5, 0, 0})
	f.Fuzz(func(t *testing.T, m []byte) {
		if _, _, ok := decodeEntry(m); ok && len(m) < unix.SizeofNdMsg {
			t.Error("an entry from too little")
		}
		decodeLink(m)
		decodeRoute(m)
		decodeRoutePrefix(m)
	})
}
