package neighbor

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const namespacePrefix = "flneigh-"

var namespaceNumber atomic.Int32

func TestMain(m *testing.M) {
	// What a run that was killed has left.
	left, _ := filepath.Glob("/run/netns/" + namespacePrefix + "*")
	for _, path := range left {
		if err := netns.DeleteNamed(filepath.Base(path)); err != nil {
			fmt.Fprintln(os.Stderr, "remove namespace:", err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

// namespace is a network namespace of the test's own, and a handle to change it with.
type namespace struct {
	tb testing.TB
	ns netns.NsHandle
	*netlink.Handle
}

func mustNamespace(tb testing.TB) *namespace {
	tb.Helper()
	name := fmt.Sprintf("%s%d-%d", namespacePrefix, os.Getpid(), namespaceNumber.Add(1))
	var ns netns.NsHandle
	if err := onThread(func() (err error) { ns, err = netns.NewNamed(name); return err }); err != nil {
		tb.Fatalf("create network namespace (this test needs root): %v", err)
	}
	tb.Cleanup(func() {
		if err := errors.Join(ns.Close(), netns.DeleteNamed(name)); err != nil {
			tb.Errorf("remove namespace: %v", err)
		}
	})
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(h.Close)
	n := &namespace{tb, ns, h}
	// No waiting for duplicate address detection.
	n.sysctl("ipv6/conf/all/accept_dad", "0")
	n.sysctl("ipv6/conf/default/accept_dad", "0")
	n.up("lo")
	return n
}

// onThread runs f on a thread that is thrown away afterwards, so f may change its namespace.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

func (n *namespace) sysctl(name, value string) {
	n.tb.Helper()
	if err := onThread(func() error {
		if err := netns.Set(n.ns); err != nil {
			return err
		}
		return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
	}); err != nil {
		n.tb.Fatal(err)
	}
}

func (n *namespace) link(name string) netlink.Link {
	n.tb.Helper()
	l, err := n.LinkByName(name)
	if err != nil {
		n.tb.Fatalf("link %s: %v", name, err)
	}
	return l
}

func (n *namespace) must(err error) {
	n.tb.Helper()
	if err != nil {
		n.tb.Fatal(err)
	}
}

func (n *namespace) up(name string)   { n.tb.Helper(); n.must(n.LinkSetUp(n.link(name))) }
func (n *namespace) down(name string) { n.tb.Helper(); n.must(n.LinkSetDown(n.link(name))) }

func address(cidr string) *netlink.Addr {
	p := netip.MustParsePrefix(cidr)
	return &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func (n *namespace) add(name string, cidrs ...string) {
	n.tb.Helper()
	for _, c := range cidrs {
		n.must(n.AddrAdd(n.link(name), address(c)))
	}
}

func (n *namespace) remove(name, cidr string) {
	n.tb.Helper()
	n.must(n.AddrDel(n.link(name), address(cidr)))
}

// route replaces the route to cidr: "via ADDRESS", "dev NAME", or a type ("blackhole", …).
func (n *namespace) route(cidr string, words ...string) {
	n.tb.Helper()
	r := &netlink.Route{Dst: ipNet(netip.MustParsePrefix(cidr))}
	for i := 0; i < len(words); i++ {
		switch words[i] {
		case "via":
			i++
			gw := netip.MustParseAddr(words[i])
			if gw.Is6() && r.Dst.IP.To4() != nil {
				r.Via = &netlink.Via{AddrFamily: unix.AF_INET6, Addr: gw.AsSlice()}
			} else {
				r.Gw = gw.AsSlice()
			}
		case "dev":
			i++
			r.LinkIndex = n.link(words[i]).Attrs().Index
		case "mtu":
			i++
			fmt.Sscan(words[i], &r.MTU)
		default:
			r.Type = map[string]int{"blackhole": unix.RTN_BLACKHOLE, "unreachable": unix.RTN_UNREACHABLE,
				"prohibit": unix.RTN_PROHIBIT}[words[i]]
		}
	}
	if err := n.RouteReplace(r); err != nil {
		n.tb.Fatalf("route %s %s: %v", cidr, strings.Join(words, " "), err)
	}
}

// cable joins two namespaces by a veth pair, both ends up.
func cable(a *namespace, aName string, b *namespace, bName string) {
	a.tb.Helper()
	a.must(a.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName,
		PeerNamespace: netlink.NsFd(b.ns)}))
	// Kernel timers, so that what takes a minute by default takes seconds.
	for name, value := range map[string]string{"retrans_time_ms": "100", "base_reachable_time_ms": "600",
		"delay_first_probe_time": "1", "locktime": "0"} {
		a.sysctl("ipv4/neigh/"+aName+"/"+name, value)
		a.sysctl("ipv6/neigh/"+aName+"/"+name, value)
	}
	a.up(aName)
	b.up(bName)
}

// pair is the host that watches and the peer that holds backends, joined by w0 and p0.
func pair(tb testing.TB) (host, peer *namespace) {
	tb.Helper()
	host, peer = mustNamespace(tb), mustNamespace(tb)
	cable(host, "w0", peer, "p0")
	host.add("w0", "10.0.0.1/24", "fd00::1/64")
	peer.add("p0", "10.0.0.2/24", "fd00::2/64")
	return host, peer
}

func (n *namespace) mac(name string) net.HardwareAddr {
	n.tb.Helper()
	return n.link(name).Attrs().HardwareAddr
}

// entry is what the kernel has for ip on name.
func (n *namespace) entry(name, ip string) (netlink.Neigh, bool) {
	n.tb.Helper()
	list, err := n.NeighList(n.link(name).Attrs().Index, netlink.FAMILY_ALL)
	n.must(err)
	for _, e := range list {
		if e.IP.Equal(net.ParseIP(ip)) {
			return e, true
		}
	}
	return netlink.Neigh{}, false
}
