package announce

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// quick is what tests use: the same steps, closer together. Nobody in them is slower.
var quick = Timing{ProbeWait: 20 * time.Millisecond, ProbeMin: 30 * time.Millisecond, ProbeMax: 50 * time.Millisecond,
	AnnounceWait: 60 * time.Millisecond, AnnounceInterval: 100 * time.Millisecond, DefendInterval: 400 * time.Millisecond,
	Retry: 500 * time.Millisecond}

// announcing is an Announcer that runs, and a record of what it told.
type announcing struct {
	*Announcer
	tb   testing.TB
	stop func()

	mu   sync.Mutex
	told [][]netip.Addr
	log  bytes.Buffer
}

func (a *announcing) Write(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.Write(b)
}

func mustRun(tb testing.TB, ns *namespace, opts Options, w Wanted) *announcing {
	tb.Helper()
	a := &announcing{tb: tb}
	also := opts.OnChange
	opts.Namespace = ns.ns
	opts.Logger = slog.New(slog.NewTextHandler(a, &slog.HandlerOptions{Level: slog.LevelDebug}))
	opts.OnChange = func(owned []netip.Addr) {
		a.mu.Lock()
		a.told = append(a.told, owned)
		a.mu.Unlock()
		if also != nil {
			also(owned)
		}
	}
	var err error
	if a.Announcer, err = New(opts); err != nil {
		tb.Fatal(err)
	}
	a.Set(w)
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- a.Run(ctx) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-result; err != nil {
			tb.Errorf("Run: %v", err)
		}
		if tb.Failed() {
			tb.Logf("log:\n%s", a.log.String())
		}
	})
	tb.Cleanup(a.stop)
	return a
}

func (a *announcing) ready() {
	a.tb.Helper()
	select {
	case <-a.Ready():
	case <-time.After(patience):
		a.tb.Fatalf("not ready: %+v", a.States())
	}
}

func (a *announcing) history() [][]netip.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.told)
}

func (a *announcing) owned() []netip.Addr {
	if told := a.history(); len(told) > 0 {
		return told[len(told)-1]
	}
	return nil
}

func (a *announcing) owns(list ...string) bool { return slices.Equal(a.owned(), addresses(list...)) }

func (a *announcing) logged(texts ...string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for line := range strings.Lines(a.log.String()) {
		if !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(line, text) }) {
			return true
		}
	}
	return false
}

func (a *announcing) state(address, name string) State {
	for _, s := range a.States() {
		if s.Address == netip.MustParseAddr(address) && s.Interface == name {
			return s
		}
	}
	return State{Reason: "there is no such state"}
}

// becomes waits until it stands so with an address on an interface.
func (a *announcing) becomes(address, name string, status Status, other mac) {
	a.tb.Helper()
	var s State
	defer func() {
		if a.tb.Failed() {
			a.tb.Logf("last: %+v", s)
		}
	}()
	eventually(a.tb, fmt.Sprintf("%s on %s %s %s", address, name, status, other), func() bool {
		s = a.state(address, name)
		return s.Address.IsValid() && s.Status == status &&
			(other == mac{} && s.Other == nil || slices.Equal(s.Other, other[:]))
	})
}

func addresses(list ...string) []netip.Addr {
	all := []netip.Addr{}
	for _, s := range list {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

const (
	vip4 = "10.0.0.10"
	vip6 = "fd00::10"
)

func both(names ...string) Wanted { return Wanted{Addresses: addresses(vip4, vip6), Interfaces: names} }

// TestFree: what nobody has is asked for, owned, answered for, and only then announced, in about a second.
func TestFree(t *testing.T) {
	host, peer := pair(t)
	seen := peer.capture("p0")
	// A frame of a type of its own tells where among the others the change was told.
	const marker = 0x88b5
	var marks *packetSocket
	host.within(func() (err error) { marks, err = openPacketSocket(marker); return err })
	defer marks.close()
	index, from := host.link("w0").Attrs().Index, host.mac("w0")
	var marked error
	// What the peer believed before.
	for _, address := range []string{vip4, vip6} {
		peer.must(peer.NeighAdd(&netlink.Neigh{LinkIndex: peer.link("p0").Attrs().Index, State: netlink.NUD_STALE,
			IP: netip.MustParseAddr(address).AsSlice(), HardwareAddr: mac{2, 9, 9, 9, 9, 9}.hardware()}))
	}

	start := time.Now()
	a := mustRun(t, host, Options{OnChange: func(owned []netip.Addr) {
		if len(owned) > 0 && marked == nil {
			marked = marks.send(index, ethernet(broadcastMAC, from, marker, 0))
		}
	}}, both("w0"))
	a.ready()
	took := time.Since(start)
	t.Logf("ready after %v", took)
	if limit := (Timing{}).orDefault(); took < 2*limit.ProbeMin+limit.AnnounceWait || took > 3*time.Second {
		t.Errorf("ready after %v", took)
	}
	if !a.owns(vip4, vip6) {
		t.Errorf("owned: %v", a.owned())
	}
	if marked != nil {
		t.Fatal(marked)
	}
	for _, address := range []string{vip4, vip6} {
		told := seen.wait("announcements of "+address, announcements, announcementOf(address, from))
		asked := seen.find(probeOf(address, from))
		if len(asked) != probes {
			t.Errorf("%s: %d probes", address, len(asked))
		}
		if all := seen.find(about(address)); len(all) != probes+announcements {
			t.Errorf("%s: %d frames about it: %v", address, len(all), all)
		}
		marks := seen.find(func(p gopacket.Packet) bool { return protocolOf(p.Data()) == marker })
		if len(marks) == 0 || told[0].at.Before(marks[0].at) {
			t.Errorf("%s: announced before the change was told", address)
		}
		if gap := told[1].at.Sub(told[0].at); gap < time.Second {
			t.Errorf("%s: second announcement after %v", address, gap)
		}
		for i := range asked[1:] {
			if gap := asked[i+1].at.Sub(asked[i].at); gap < 100*time.Millisecond {
				t.Errorf("%s: probes %v apart", address, gap)
			}
		}
		eventually(t, "the peer to know where "+address+" is", func() bool {
			list, err := peer.NeighList(peer.link("p0").Attrs().Index, netlink.FAMILY_ALL)
			return err == nil && slices.ContainsFunc(list, func(n netlink.Neigh) bool {
				return n.IP.Equal(netip.MustParseAddr(address).AsSlice()) && slices.Equal(n.HardwareAddr, from[:])
			})
		})
		s := a.state(address, "w0")
		if s.Status != Owned || s.Other != nil || s.Reason != "" || s.Since.Before(start) {
			t.Errorf("%+v", s)
		}
	}
}

// TestConflict: what a kernel has is not owned on any interface; it is when that kernel lets it go.
func TestConflict(t *testing.T) {
	for _, address := range []string{vip4, vip6} {
		t.Run(address, func(t *testing.T) {
			host, peer := pair(t)
			other := mustNamespace(t)
			cable(host, "w1", other, "o0")
			cidr := netip.PrefixFrom(netip.MustParseAddr(address), 24).String()
			other.add("o0", cidr)
			nearby, there := peer.capture("p0"), other.capture("o0")
			a := mustRun(t, host, Options{Timing: quick},
				Wanted{Addresses: addresses(address), Interfaces: []string{"w0", "w1"}})
			a.ready()
			a.becomes(address, "w1", Conflict, other.mac("o0"))
			a.becomes(address, "w0", Waiting, mac{})
			since := a.state(address, "w1").Since
			if !a.logged("level=WARN", "in use", address, "w1", other.mac("o0").String(), "what to do") {
				t.Error("not said")
			}
			// Asked again, and again in vain.
			there.wait("probes", 3, probeOf(address, host.mac("w1")))
			if s := a.state(address, "w1"); s.Status != Conflict || !s.Since.Equal(since) {
				t.Errorf("asked again: %+v", s)
			}
			if told := a.history(); len(told) != 1 || len(told[0]) != 0 {
				t.Errorf("told: %v", told)
			}
			if found := nearby.find(announcementOf(address, host.mac("w0"))); len(found) > 0 {
				t.Errorf("announced: %v", found)
			}
			other.remove("o0", cidr)
			a.becomes(address, "w1", Owned, mac{})
			a.becomes(address, "w0", Owned, mac{})
			if !a.owns(address) {
				t.Errorf("owned: %v", a.owned())
			}
			nearby.wait("announcements", announcements, announcementOf(address, host.mac("w0")))
		})
	}
}

// TestReload: who has put a conflict right and reloads need not wait.
func TestReload(t *testing.T) {
	host, peer := pair(t)
	peer.add("p0", vip4+"/24")
	timing := quick
	timing.Retry = time.Hour
	a := mustRun(t, host, Options{Timing: timing}, both("w0"))
	a.ready()
	a.becomes(vip4, "w0", Conflict, peer.mac("p0"))
	a.becomes(vip6, "w0", Owned, mac{})
	peer.remove("p0", vip4+"/24")
	a.Set(both("w0"))
	a.becomes(vip4, "w0", Owned, mac{})
	if want := [][]netip.Addr{{}, addresses(vip6), addresses(vip4, vip6)}; !cmp.Equal(a.history(), want, cmp.Comparer(
		func(a, b netip.Addr) bool { return a == b })) {
		t.Errorf("told: %v", a.history())
	}
}

// TestKernelAsks: a kernel that does duplicate address detection at the same time as we; at most one has it in the
// end.
func TestKernelAsks(t *testing.T) {
	host, peer := pair(t)
	a := mustRun(t, host, Options{Timing: quick}, Wanted{Addresses: addresses(vip6), Interfaces: []string{"w0"}})
	peer.sysctl("ipv6/conf/p0/accept_dad", "1")
	detected := ipAddress(vip6 + "/64")
	detected.Flags = 0
	peer.must(peer.AddrAdd(peer.link("p0"), detected))
	a.ready()
	var entry netlink.Addr
	eventually(t, "the kernel to be done", func() bool {
		list, err := peer.AddrList(peer.link("p0"), netlink.FAMILY_V6)
		if i := slices.IndexFunc(list, func(a netlink.Addr) bool { return a.IP.Equal(detected.IP) }); i >= 0 {
			entry = list[i]
		}
		return err == nil && entry.IPNet != nil &&
			(entry.Flags&unix.IFA_F_DADFAILED != 0 || entry.Flags&unix.IFA_F_TENTATIVE == 0)
	})
	if entry.Flags&unix.IFA_F_DADFAILED == 0 {
		a.becomes(vip6, "w0", Conflict, peer.mac("p0"))
	} else {
		a.becomes(vip6, "w0", Owned, mac{})
	}
	t.Logf("kernel's flags %#x, ours: %+v", entry.Flags, a.state(vip6, "w0"))
}

// TestTwo: of two that ask in the same instant exactly one has the address soon, and at no time both.
func TestTwo(t *testing.T) {
	left, right := pair(t)
	collided := false
	for round := range 4 {
		for _, address := range []string{vip4, vip6} {
			t.Run(fmt.Sprint(address, " ", round), func(t *testing.T) {
				var mu sync.Mutex
				holding := map[string]bool{}
				var both, told sync.WaitGroup
				both.Add(2)
				told.Add(2)
				timing := quick
				timing.ProbeWait = time.Millisecond
				timing.Retry = time.Hour // nobody waits for that
				run := func(ns *namespace, device string) *announcing {
					first := true
					return mustRun(t, ns, Options{Timing: timing, OnChange: func(owned []netip.Addr) {
						mu.Lock()
						if holding[device] = len(owned) > 0; holding["w0"] && holding["p0"] {
							t.Error("both have it")
						}
						mu.Unlock()
						if first { // the first probe waits until both may send theirs
							first = false
							both.Done()
							both.Wait()
							for end := time.Now().Add(2 * timing.ProbeWait); time.Now().Before(end); {
							}
						}
					}}, Wanted{Addresses: addresses(address), Interfaces: []string{device}})
				}
				start := time.Now()
				l, r := run(left, "w0"), run(right, "p0")
				l.ready()
				r.ready()
				t.Logf("decided after %v", time.Since(start))
				if l.logged("stepping back") && r.logged("stepping back") {
					collided = true
				}
				winner, winnerDevice, loser, loserDevice, winnerMAC := l, "w0", r, "p0", left.mac("w0")
				if r.owns(address) {
					winner, winnerDevice, loser, loserDevice, winnerMAC = r, "p0", l, "w0", right.mac("p0")
				}
				winner.becomes(address, winnerDevice, Owned, mac{})
				loser.becomes(address, loserDevice, Conflict, winnerMAC)
				// And when the loser asks again.
				heard := map[string]*namespace{"w0": left, "p0": right}[loserDevice].capture(loserDevice)
				loser.Set(Wanted{Addresses: addresses(address), Interfaces: []string{loserDevice}})
				heard.wait("answer", 1, about(address))
				loser.becomes(address, loserDevice, Conflict, winnerMAC)
				if !winner.owns(address) || len(winner.history()) != 2 || len(loser.history()) != 1 {
					t.Errorf("winner told %v, loser %v", winner.history(), loser.history())
				}
				l.stop()
				r.stop()
			})
		}
	}
	if !collided {
		t.Error("they never asked in the same instant: this tests nothing")
	}
}

// TestTakeover: when the one that has the address is gone, the one that waits for it has it.
func TestTakeover(t *testing.T) {
	left, right := pair(t)
	l := mustRun(t, left, Options{Timing: quick}, both("w0"))
	l.ready()
	r := mustRun(t, right, Options{Timing: quick}, both("p0"))
	r.ready()
	for _, address := range []string{vip4, vip6} {
		r.becomes(address, "p0", Conflict, left.mac("w0"))
	}
	l.stop()
	for _, address := range []string{vip4, vip6} {
		r.becomes(address, "p0", Owned, mac{})
	}
}

// TestCollision: who asks at the same time as we is stepped back for, not for long; who goes on asking, for longer.
// Once the address is ours, who asks is answered.
func TestCollision(t *testing.T) {
	for _, address := range []string{vip4, vip6} {
		t.Run(address, func(t *testing.T) {
			host, peer := pair(t)
			seen := peer.capture("p0")
			protocol := uint16(unix.ETH_P_ARP)
			if address == vip6 {
				protocol = unix.ETH_P_IPV6
			}
			var other *packetSocket
			peer.within(func() (err error) { other, err = openPacketSocket(protocol); return err })
			defer other.close()
			ip, index := netip.MustParseAddr(address), peer.link("p0").Attrs().Index
			ask := func() {
				t.Helper()
				peer.must(other.send(index, probeFrame(otherMAC, ip)))
			}
			timing := quick
			timing.Retry = time.Hour
			timing.ProbeMin, timing.ProbeMax = 100*time.Millisecond, 120*time.Millisecond
			a := mustRun(t, host, Options{Timing: timing}, Wanted{Addresses: addresses(address), Interfaces: []string{"w0"}})
			for n := range maxCollisions {
				seen.wait("probe", 1, probeOf(address, host.mac("w0")))
				ask()
				if n < maxCollisions-1 {
					a.becomes(address, "w0", Probing, otherMAC)
					seen.clear()
					select {
					case <-a.Ready():
						t.Fatal("ready, although nothing is known")
					default:
					}
				}
			}
			a.becomes(address, "w0", Conflict, otherMAC)
			if !a.logged("level=WARN", "keeps asking", address, otherMAC.String(), "what to do") {
				t.Error("not said")
			}
			a.ready()
			a.Set(Wanted{Addresses: addresses(address), Interfaces: []string{"w0"}})
			a.becomes(address, "w0", Owned, mac{})
			if told := a.history(); len(told) != 2 || !a.owns(address) {
				t.Errorf("told: %v", told)
			}
			seen.wait("announcements", announcements, announcementOf(address, host.mac("w0")))
			seen.clear()
			ask()
			answer := announcementOf(address, host.mac("w0"))
			if ip.Is4() {
				answer = func(p gopacket.Packet) bool {
					reply, ok := arpOf(p)
					return ok && reply.Operation == layers.ARPReply && mac(reply.SourceHwAddress) == host.mac("w0") &&
						netip.AddrFrom4([4]byte(reply.SourceProtAddress)) == ip && mac(reply.DstHwAddress) == otherMAC &&
						[4]byte(reply.DstProtAddress) == [4]byte{} && ethernetOf(p, host.mac("w0"), otherMAC)
				}
			}
			seen.wait("answer", 1, answer)
			if s := a.state(address, "w0"); s.Status != Owned || s.Other != nil {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestAdopt: what was owned before the start is owned at once, without asking; groups of what is not wanted any more
// are left.
func TestAdopt(t *testing.T) {
	host, peer := pair(t)
	seen := peer.capture("p0")
	const gone = "fd00::77"
	host.within(func() error { return Join("w0", netip.MustParseAddr(gone)) })
	goneMAC := groupMAC(solicitedNode(netip.MustParseAddr(gone)))
	if _, ok := host.group("w0", goneMAC); !ok {
		t.Fatal("the group was not joined")
	}
	w := both("w0")
	w.Adopt = addresses(vip6, vip4, gone)
	a := mustRun(t, host, Options{Timing: quick}, w)
	a.ready()
	if told := a.history(); len(told) != 1 || !a.owns(vip4, vip6) {
		t.Errorf("told: %v", told)
	}
	for _, address := range w.Addresses {
		seen.wait("announcements", announcements, announcementOf(address.String(), host.mac("w0")))
		if asked := seen.find(probeOf(address.String(), host.mac("w0"))); len(asked) > 0 {
			t.Errorf("asked: %v", asked)
		}
	}
	eventually(t, "the group to be left", func() bool { _, ok := host.group("w0", goneMAC); return !ok })
	// What the host has taken itself meanwhile is not adopted.
	a.stop()
	host.add("w0", vip4+"/24")
	a = mustRun(t, host, Options{Timing: quick}, w)
	a.ready()
	if told := a.history(); len(told) != 1 || !a.owns(vip6) {
		t.Errorf("told: %v", told)
	}
}

// TestDefend: another host that begins to use an address of ours is answered by one announcement, and no more in an
// interval, but for one at its end; the address stays ours.
func TestDefend(t *testing.T) {
	for _, test := range []struct{ address, cidr, nobody string }{
		{vip4, vip4 + "/24", "10.0.0.7"}, {vip6, vip6 + "/64", "fd00::7"},
	} {
		t.Run(test.address, func(t *testing.T) {
			host, peer := pair(t)
			seen := peer.capture("p0")
			timing := quick
			timing.Retry = 3 * timing.DefendInterval
			a := mustRun(t, host, Options{Timing: timing},
				Wanted{Addresses: addresses(test.address), Interfaces: []string{"w0"}})
			a.ready()
			is := announcementOf(test.address, host.mac("w0"))
			seen.wait("announcements", announcements, is)
			seen.clear()
			peer.add("p0", test.cidr)
			peer.say(test.address, test.nobody+"1")
			first := seen.wait("defence", 1, is)[0].at
			a.becomes(test.address, "w0", Owned, peer.mac("p0"))
			if !a.logged("level=WARN", test.address, "w0", peer.mac("p0").String(), "what to do") {
				t.Error("not said")
			}
			// It goes on.
			peer.say(test.address, test.nobody+"2")
			peer.say(test.address, test.nobody+"3")
			second := seen.wait("defence", 2, is)[1].at
			if gap := second.Sub(first); gap < timing.DefendInterval*3/4 {
				t.Errorf("defended again after %v", gap)
			}
			peer.remove("p0", test.cidr)
			a.becomes(test.address, "w0", Owned, mac{})
			if told := a.history(); len(told) != 2 || !a.owns(test.address) {
				t.Errorf("told: %v", told)
			}
		})
	}
}

// TestLastWord: what another host says while defending is not due yet is answered when it is, if that host says
// nothing more: the segment must not be left believing it.
func TestLastWord(t *testing.T) {
	host, peer := pair(t)
	seen := peer.capture("p0")
	timing := quick
	timing.Retry = 5 * timing.DefendInterval
	a := mustRun(t, host, Options{Timing: timing}, both("w0"))
	a.ready()
	for protocol, address := range map[uint16]string{unix.ETH_P_ARP: vip4, unix.ETH_P_IPV6: vip6} {
		is := announcementOf(address, host.mac("w0"))
		seen.wait("announcements", announcements, is)
		var other *packetSocket
		peer.within(func() (err error) { other, err = openPacketSocket(protocol); return err })
		defer other.close()
		for n := range 2 {
			peer.must(other.send(peer.link("p0").Attrs().Index, announcementFrame(otherMAC, netip.MustParseAddr(address))))
			seen.wait("defence", announcements+n+1, is)
		}
		a.becomes(address, "w0", Owned, otherMAC)
		a.becomes(address, "w0", Owned, mac{}) // long after
		if n := len(seen.find(is)); n != announcements+2 {
			t.Errorf("%s: announced %d times", address, n)
		}
	}
}

// TestHost: what the host's own stack has is not XDP's, as long as it has it.
func TestHost(t *testing.T) {
	for _, cidr := range []string{vip4 + "/32", vip6 + "/128"} {
		t.Run(cidr, func(t *testing.T) {
			host, peer := pair(t)
			address, _, _ := strings.Cut(cidr, "/")
			seen := peer.capture("p0")
			host.add("lo", cidr)
			a := mustRun(t, host, Options{Timing: quick}, Wanted{Addresses: addresses(address), Interfaces: []string{"w0"}})
			a.ready()
			a.becomes(address, "lo", Host, mac{})
			if !a.logged("level=WARN", address, "lo", "what to do") {
				t.Error("not said")
			}
			host.within(func() error {
				held, err := HostAddresses()
				if held[netip.MustParseAddr(address)] != "lo" || held[netip.MustParseAddr("10.0.0.1")] != "w0" {
					t.Errorf("held: %v", held)
				}
				return err
			})
			if found := seen.find(about(address)); len(found) > 0 {
				t.Errorf("said about it: %v", found)
			}
			host.remove("lo", cidr)
			a.becomes(address, "w0", Owned, mac{})
			host.add("w0", cidr)
			a.becomes(address, "w0", Host, mac{})
			if told := a.history(); !cmp.Equal(told, [][]netip.Addr{{}, addresses(address), {}}, cmp.Comparer(
				func(a, b netip.Addr) bool { return a == b })) {
				t.Errorf("told: %v", told)
			}
			if ip := netip.MustParseAddr(address); ip.Is6() {
				eventually(t, "the group to be the kernel's alone", func() bool {
					g, ok := host.group("w0", groupMAC(solicitedNode(ip)))
					return ok && g == group{users: 1}
				})
			}
		})
	}
}

// TestGroups: a solicited-node group is joined for as long as an address of it is wanted, and over the process's end.
func TestGroups(t *testing.T) {
	host, _ := pair(t)
	const also = "fd00:1::10" // ends alike
	vip, m := netip.MustParseAddr(vip6), groupMAC(solicitedNode(netip.MustParseAddr(vip6)))
	ours := group{users: 1, global: true}
	wanted := Wanted{Addresses: addresses(vip4, vip6, also), Interfaces: []string{"w0"}}
	for range 2 { // the second finds what the first has left
		a := mustRun(t, host, Options{Timing: quick}, wanted)
		a.ready()
		a.stop()
		if g, ok := host.group("w0", m); !ok || g != ours {
			t.Fatalf("after the end: %+v, %v", g, ok)
		}
	}
	a := mustRun(t, host, Options{Timing: quick}, wanted)
	a.ready()
	a.Set(both("w0"))
	a.becomes(vip6, "w0", Owned, mac{})
	eventually(t, "the change", func() bool { return a.owns(vip4, vip6) })
	if g, ok := host.group("w0", m); !ok || g != ours {
		t.Fatalf("shared group: %+v, %v", g, ok)
	}
	a.Set(Wanted{Addresses: addresses(vip4), Interfaces: []string{"w0"}})
	eventually(t, "the group to be left", func() bool { _, ok := host.group("w0", m); return !ok })
	if !a.owns(vip4) {
		t.Errorf("owned: %v", a.owned())
	}

	// The kernel's own membership is not ours to end.
	host.add("w0", vip6+"/128")
	eventually(t, "the kernel to join", func() bool { g, ok := host.group("w0", m); return ok && g == group{1, false} })
	for _, step := range []struct {
		do   func(string, netip.Addr) error
		want group
	}{{Join, group{2, true}}, {Join, group{2, true}}, {Leave, group{1, false}}, {Leave, group{1, false}}} {
		host.within(func() error { return step.do("w0", vip) })
		if g, ok := host.group("w0", m); !ok || g != step.want {
			t.Errorf("group is %+v, %v; want %+v", g, ok, step.want)
		}
	}
	host.within(func() error {
		const want = "join solicited-node group of fd00::10 on nowhere: no such device"
		if err := Join("nowhere", vip); err == nil || err.Error() != want {
			t.Errorf("join nowhere: %v", err)
		}
		return Join("nowhere", netip.MustParseAddr(vip4))
	})
}

// TestLink: a carrier that comes back, another Ethernet address, and another device of the name are told to the
// segment.
func TestLink(t *testing.T) {
	host, peer := pair(t)
	seen := peer.capture("p0")
	a := mustRun(t, host, Options{Timing: quick}, both("w0"))
	a.ready()
	told := func(what string, from mac) {
		t.Helper()
		for _, address := range []string{vip4, vip6} {
			seen.wait("announcements after "+what, announcements, announcementOf(address, from))
			a.becomes(address, "w0", Owned, mac{})
		}
	}
	told("the start", host.mac("w0"))

	peer.down("p0")
	eventually(t, "the loss to be seen", func() bool { return strings.Contains(a.state(vip4, "w0").Reason, "no carrier") })
	seen.clear()
	peer.up("p0")
	told("carrier", host.mac("w0"))

	// Quicker than links are read.
	seen.clear()
	host.down("w0")
	host.up("w0")
	told("a bounce", host.mac("w0"))

	seen.clear()
	changed := mac{2, 0, 0, 0, 0, 0x77}
	host.must(host.LinkSetHardwareAddr(host.link("w0"), changed.hardware()))
	told("another Ethernet address", changed)

	host.must(host.LinkDel(host.link("w0")))
	eventually(t, "the loss to be seen", func() bool {
		return strings.Contains(a.state(vip4, "w0").Reason, "no interface w0")
	})
	plug(host, "w0", peer, "p0")
	seen = peer.capture("p0")
	peer.up("p0")
	host.up("w0")
	told("a new device", host.mac("w0"))
	if g, ok := host.group("w0", groupMAC(solicitedNode(netip.MustParseAddr(vip6)))); !ok || !g.global {
		t.Errorf("group on the new device: %+v, %v", g, ok)
	}
	if history := a.history(); !a.owns(vip4, vip6) || len(history) > 3 {
		t.Errorf("told: %v", history)
	}
}

// TestLate: an interface that comes up when the address is owned already is asked first; what is owned stays.
func TestLate(t *testing.T) {
	for _, listed := range []bool{true, false} {
		t.Run(fmt.Sprint("listed ", listed), func(t *testing.T) {
			host, _ := pair(t)
			other := mustNamespace(t)
			plug(other, "o0", host, "w1")
			other.up("o0")
			other.add("o0", vip4+"/24")
			seen := other.capture("o0")
			first := both("w0")
			if listed {
				first = both("w0", "w1")
			}
			a := mustRun(t, host, Options{Timing: quick}, first)
			a.ready()
			if !a.owns(vip4, vip6) {
				t.Errorf("owned: %v", a.owned())
			}
			if listed {
				a.becomes(vip4, "w1", Waiting, mac{})
			} else {
				a.Set(both("w0", "w1"))
			}
			host.up("w1")
			a.becomes(vip4, "w1", Conflict, other.mac("o0"))
			a.becomes(vip6, "w1", Owned, mac{})
			seen.wait("announcements", announcements, announcementOf(vip6, host.mac("w1")))
			if asked := seen.find(probeOf(vip6, host.mac("w1"))); len(asked) != probes {
				t.Errorf("%d probes", len(asked))
			}
			if found := seen.find(announcementOf(vip4, host.mac("w1"))); len(found) > 0 {
				t.Errorf("announced: %v", found)
			}
			other.remove("o0", vip4+"/24")
			a.becomes(vip4, "w1", Owned, mac{})
			seen.wait("announcements", announcements, announcementOf(vip4, host.mac("w1")))
			if told := a.history(); !a.owns(vip4, vip6) || len(told) > 3 {
				t.Errorf("told: %v", told)
			}
		})
	}
}

// TestNobodyToAsk: where no interface is up it is said, and nobody waits; where there is no ARP there is nobody to
// ask.
func TestNobodyToAsk(t *testing.T) {
	host, _ := pair(t)
	host.down("w0")
	a := mustRun(t, host, Options{Timing: quick}, both("w0", "nowhere"))
	a.ready()
	for name, reason := range map[string]string{"w0": "w0 is down", "nowhere": "there is no interface nowhere"} {
		if s := a.state(vip4, name); s.Status != Waiting || s.Reason != reason {
			t.Errorf("%+v", s)
		}
	}
	if !a.owns() {
		t.Errorf("owned: %v", a.owned())
	}
	host.run("ip", "tuntap", "add", "tun0", "mode", "tun")
	host.up("tun0")
	a.Set(both("tun0", "lo"))
	for _, name := range []string{"tun0", "lo"} {
		a.becomes(vip4, name, Owned, mac{})
		a.becomes(vip6, name, Owned, mac{})
	}
	a.Set(Wanted{Addresses: addresses("0.0.0.0", "ff02::1", vip4)})
	a.becomes(vip4, "", Owned, mac{}) // what is owned is not given up for that
	if n := len(a.States()); n != 1 {
		t.Errorf("%d states: %+v", n, a.States())
	}
	a.Set(Wanted{})
	eventually(t, "nothing to be owned", func() bool { return a.owns() && len(a.States()) == 0 })
}

// TestLinkLocal: an address with a zone is wanted on that interface alone.
func TestLinkLocal(t *testing.T) {
	host, peer := pair(t)
	cable(host, "w1", peer, "p1")
	seen := peer.capture("p1")
	const address = "fe80::10%w0"
	peer.add("p0", "fe80::10/64")
	peer.add("p0", "fe80::11/64")
	a := mustRun(t, host, Options{Timing: quick},
		Wanted{Addresses: addresses(address, "fe80::11%w1"), Interfaces: []string{"w0", "w1"}})
	a.ready()
	a.becomes(address, "w0", Conflict, peer.mac("p0"))
	a.becomes("fe80::11%w1", "w1", Owned, mac{})
	if n := len(a.States()); n != 2 {
		t.Errorf("%d states: %+v", n, a.States())
	}
	seen.wait("announcements", announcements, announcementOf("fe80::11", host.mac("w1")))
	if found := seen.find(about("fe80::10")); len(found) > 0 {
		t.Errorf("said on the other interface: %v", found)
	}
	host.add("w0", "fe80::11/64") // another one, for all that it looks alike
	host.add("w1", "fe80::11/64")
	a.becomes("fe80::11%w1", "w1", Host, mac{})
}

// TestBridge: a conflict behind a port of a bridge is heard, although its frames are the bridge's by then.
func TestBridge(t *testing.T) {
	host, peer := pair(t)
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	host.must(host.LinkAdd(bridge))
	host.must(host.LinkSetMaster(host.link("w0"), host.link("br0")))
	host.up("br0")
	peer.add("p0", vip4+"/24", vip6+"/64")
	a := mustRun(t, host, Options{Timing: quick}, both("w0"))
	a.ready()
	a.becomes(vip4, "w0", Conflict, peer.mac("p0"))
	a.becomes(vip6, "w0", Conflict, peer.mac("p0"))
	if len(a.history()) != 1 {
		t.Errorf("told: %v", a.history())
	}
}

// TestSameSegment: two interfaces of ours on one segment hear each other, which is no conflict.
func TestSameSegment(t *testing.T) {
	host, between := mustNamespace(t), mustNamespace(t)
	between.must(between.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	between.up("br0")
	for _, ends := range [][2]string{{"w0", "s0"}, {"w1", "s1"}} {
		cable(host, ends[0], between, ends[1])
		between.must(between.LinkSetMaster(between.link(ends[1]), between.link("br0")))
	}
	seen := host.capture("w1")
	a := mustRun(t, host, Options{Timing: quick}, both("w0", "w1"))
	a.ready()
	if !a.owns(vip4, vip6) {
		t.Errorf("owned: %v, %+v", a.owned(), a.States())
	}
	for _, address := range []string{vip4, vip6} {
		seen.wait("probe", 1, probeOf(address, host.mac("w0")))
		seen.wait("announcements", announcements, announcementOf(address, host.mac("w0")))
		a.becomes(address, "w1", Owned, mac{})
	}
}

// TestSnooping: a switch that looks into MLD goes on handing our solicitations over, by whichever version its querier
// speaks, for longer than it remembers who wants a group.
func TestSnooping(t *testing.T) {
	for version := 1; version <= 2; version++ {
		t.Run(fmt.Sprint("MLDv", version), func(t *testing.T) {
			host, peer, between := mustNamespace(t), mustNamespace(t), mustNamespace(t)
			cable(between, "s0", host, "w0")
			cable(between, "s1", peer, "p0")
			between.must(between.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
			// In hundredths of seconds. The querier floods all for a response interval to begin with.
			between.run("ip", "link", "set", "br0", "type", "bridge", "mcast_mld_version", fmt.Sprint(version),
				"mcast_startup_query_interval", "100", "mcast_query_interval", "100", "mcast_query_response_interval", "10",
				"mcast_membership_interval", "250")
			between.run("ip", "link", "set", "br0", "type", "bridge", "mcast_snooping", "1", "mcast_querier", "1")
			for _, name := range []string{"s0", "s1"} {
				between.must(between.LinkSetMaster(between.link(name), between.link("br0")))
			}
			between.up("br0")
			seen := host.capture("w0")
			var sender, marks *packetSocket
			const marker = 0x88b5
			peer.within(func() (err error) {
				if sender, err = openPacketSocket(unix.ETH_P_IPV6); err == nil {
					marks, err = openPacketSocket(marker)
				}
				return err
			})
			defer sender.close()
			defer marks.close()
			index, from := peer.link("p0").Attrs().Index, peer.mac("p0")
			source := netip.MustParseAddr("fd00::2")
			// passes says whether a solicitation gets through. What is broadcast behind it does in any case.
			n := byte(0)
			passes := func(address netip.Addr) bool {
				t.Helper()
				seen.clear()
				peer.must(sender.send(index, buildNDP(from, source, solicitedNode(address), icmpSolicitation, 0, address,
					optionSourceMAC)))
				n++
				peer.must(marks.send(index, append(ethernet(broadcastMAC, from, marker, 1), n)))
				seen.wait("marker", 1, func(p gopacket.Packet) bool { return protocolOf(p.Data()) == marker && p.Data()[14] == n })
				return len(seen.find(about(address.String()))) > 0
			}
			nobodys := netip.MustParseAddr("fd00::99")
			eventually(t, "the switch to snoop", func() bool { return !passes(nobodys) })

			a := mustRun(t, host, Options{Timing: quick}, Wanted{Addresses: addresses(vip6), Interfaces: []string{"w0"}})
			a.ready()
			eventually(t, "solicitations to pass", func() bool { return passes(netip.MustParseAddr(vip6)) })
			seen.clear()
			seen.wait("queries", 4, func(p gopacket.Packet) bool {
				icmp, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
				return ok && icmp.TypeCode.Type() == layers.ICMPv6TypeMLDv1MulticastListenerQueryMessage
			})
			if !passes(netip.MustParseAddr(vip6)) {
				t.Error("the switch has forgotten us")
			}
			if passes(nobodys) {
				t.Error("the switch doesn't snoop")
			}
		})
	}
}

// TestFilter: of all that comes in, only what may say something of addresses is copied, and only from interfaces that
// count.
func TestFilter(t *testing.T) {
	host, peer := pair(t)
	cable(host, "w1", peer, "p1")
	indexOf := func(n *namespace, name string) int { return n.link(name).Attrs().Index }
	var many []int
	for i := range 300 {
		many = append(many, 1_000_000+i)
	}
	many[150] = indexOf(host, "w0")
	var in, out *packetSocket
	host.within(func() (err error) { in, err = openPacketSocket(unix.ETH_P_IPV6); return err })
	peer.within(func() (err error) { out, err = openPacketSocket(unix.ETH_P_IPV6); return err })
	defer out.close()
	if err := in.listen(many); err != nil {
		t.Fatal(err)
	}
	heard := make(chan []byte, 64)
	var receiver sync.WaitGroup
	receiver.Go(func() {
		if err := in.receive(func(index int, frame []byte) {
			if index != indexOf(host, "w0") {
				t.Errorf("heard interface %d", index)
			}
			heard <- slices.Clone(frame)
		}); err != nil {
			t.Errorf("receive: %v", err)
		}
	})
	defer receiver.Wait()
	defer in.close()

	from, source := peer.mac("p0"), netip.MustParseAddr("fe80::9")
	vip := netip.MustParseAddr(vip6)
	query := buildMLD(from, source, allNodes, append([]byte{icmpMLDQuery, 0, 0, 0, 0, 10, 0, 0}, make([]byte, 16)...))
	udp := appendIPv6(ethernet(host.mac("w0"), from, unix.ETH_P_IPV6, 64), source, vip, unix.IPPROTO_UDP, 64, 8)
	udp = append(udp, 0, 9, 0, 9, 0, 8, 0, 0)
	routed := buildMLD(from, source, allNodes, append([]byte{icmpMLDReport, 0, 0, 0, 0, 10, 0, 0}, make([]byte, 16)...))
	echo := buildNDP(from, source, allNodes, 128, 0, vip, 0)
	elsewhere := slices.Clone(announcementFrame(from, vip))
	copy(elsewhere, []byte{2, 3, 3, 3, 3, 3}) // another host's, in a shared segment
	pass := [][]byte{probeFrame(from, vip), announcementFrame(from, vip), query}
	for _, f := range [][]byte{udp, routed, echo, elsewhere} {
		peer.must(out.send(indexOf(peer, "p0"), f))
		peer.must(out.send(indexOf(peer, "p1"), probeFrame(from, vip)))
	}
	for _, f := range pass {
		peer.must(out.send(indexOf(peer, "p0"), f))
	}
	// The kernels speak, too.
	ours := func(f []byte) bool {
		return !slices.ContainsFunc([][]byte{udp, routed, echo, elsewhere}, func(g []byte) bool { return bytes.Equal(f, g) })
	}
	for got := 0; got < len(pass); {
		select {
		case f := <-heard:
			if !ours(f) {
				t.Errorf("heard % x", f)
			}
			if bytes.Equal(f, pass[got]) {
				got++
			}
		case <-time.After(patience):
			t.Fatalf("heard %d of %d", got, len(pass))
		}
	}
}

// TestPrivileges: which ones it takes, and that their lack is said.
func TestPrivileges(t *testing.T) {
	host, _ := pair(t)
	with := func(capabilities ...int) (announcer *Announcer, err, join error) {
		t.Helper()
		host.within(func() error {
			header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			for _, c := range capabilities {
				data[c/32].Effective |= 1 << (c % 32)
				data[c/32].Permitted |= 1 << (c % 32)
			}
			if err := unix.Capset(&header, &data[0]); err != nil { // of this thread, which ends here
				return err
			}
			announcer, err = New(Options{Timing: quick})
			join = Join("w0", netip.MustParseAddr(vip6))
			return nil
		})
		return announcer, err, join
	}
	_, err, join := with(unix.CAP_NET_ADMIN)
	if err == nil || !strings.Contains(err.Error(), "CAP_NET_RAW") || join != nil {
		t.Errorf("without CAP_NET_RAW: %v, join %v", err, join)
	}
	a, err, join := with(unix.CAP_NET_RAW)
	if err != nil || join == nil || !strings.Contains(join.Error(), "CAP_NET_ADMIN") {
		t.Fatalf("without CAP_NET_ADMIN: %v, join %v", err, join)
	}
	a.Set(both("w0"))
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- a.Run(ctx) }()
	select {
	case <-a.Ready():
	case <-time.After(patience):
		t.Error("not ready")
	}
	cancel()
	if err := <-result; err != nil {
		t.Error(err)
	}
	for _, s := range a.States() {
		if s.Status != Owned {
			t.Errorf("%+v", s)
		}
	}
}

// TestOnlyOnce: an Announcer runs once; where nothing is wanted that is told, too.
func TestOnlyOnce(t *testing.T) {
	host, _ := pair(t)
	a := mustRun(t, host, Options{}, Wanted{})
	a.ready()
	if err := a.Run(t.Context()); err == nil {
		t.Error("ran twice")
	}
	if told := a.history(); len(told) != 1 || len(told[0]) != 0 {
		t.Errorf("told: %v", told)
	}
}
