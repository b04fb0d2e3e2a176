package through

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"fairlead/loader"
)

const (
	namespacePrefix = "flthrough-"
	pinPrefix       = "/sys/fs/bpf/fairlead-test-through-"
)

var namespaceNumber atomic.Int32

func TestMain(m *testing.M) {
	if err := sweep(); err != nil {
		fmt.Fprintln(os.Stderr, "clear what a killed run has left:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// sweep clears away what a run that was killed has left.
func sweep() error {
	pins, _ := filepath.Glob(pinPrefix + "*")
	for _, path := range pins {
		if err := removePins(path); err != nil {
			return err
		}
	}
	left, _ := filepath.Glob("/run/netns/" + namespacePrefix + "*")
	for _, path := range left {
		if err := netns.DeleteNamed(filepath.Base(path)); err != nil {
			return err
		}
	}
	return nil
}

// removePins takes away what the data plane, or a decap, has pinned under a path.
func removePins(path string) error {
	_, err := loader.Unload(path)
	_, also := loader.RemoveDecap(path)
	for _, err := range []error{err, also} {
		if err != nil && !errors.Is(err, loader.ErrNothing) {
			return err
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// namespace is a network namespace of the test's own, and a handle to change it with.
type namespace struct {
	testing.TB
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
	n.must(n.LinkSetUp(n.link("lo")))
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

// within runs f in the namespace. Sockets that it makes stay there.
func (n *namespace) within(f func() error) {
	n.Helper()
	n.must(onThread(func() error {
		if err := netns.Set(n.ns); err != nil {
			return err
		}
		return f()
	}))
}

func (n *namespace) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

func (n *namespace) sysctl(name, value string) {
	n.Helper()
	n.within(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
}

func (n *namespace) link(name string) netlink.Link {
	n.Helper()
	l, err := n.LinkByName(name)
	if err != nil {
		n.Fatalf("link %s: %v", name, err)
	}
	return l
}

func (n *namespace) mac(name string) (mac [6]byte) {
	n.Helper()
	copy(mac[:], n.link(name).Attrs().HardwareAddr)
	return mac
}

func (n *namespace) add(name string, prefixes ...netip.Prefix) {
	n.Helper()
	for _, p := range prefixes {
		n.must(n.AddrAdd(n.link(name), ipAddress(p)))
	}
}

func ipAddress(p netip.Prefix) *netlink.Addr {
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Flags: unix.IFA_F_NODAD,
	}
}

// routeBy sends what has no other route to the gateways.
func (n *namespace) routeBy(gateways ...netip.Addr) {
	n.Helper()
	for _, gateway := range gateways {
		everywhere := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if gateway.Is6() {
			everywhere = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		n.must(n.RouteReplace(&netlink.Route{Dst: ipAddress(everywhere).IPNet, Gw: gateway.AsSlice()}))
	}
}

// cable joins two namespaces by a veth pair that is fit for XDP: packets are whole on it.
func cable(a *namespace, aName string, b *namespace, bName string) {
	a.Helper()
	a.must(a.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName, PeerNamespace: netlink.NsFd(b.ns),
	}))
	for _, end := range []struct {
		*namespace
		name string
	}{{a, aName}, {b, bName}} {
		end.offload(end.name, false)
		end.must(end.LinkSetUp(end.link(end.name)))
	}
}

// offload says whether the device leaves checksums and segmentation to a card that is not there.
func (n *namespace) offload(name string, on bool) {
	n.Helper()
	n.within(func() error {
		tool, err := ethtool.NewEthtool()
		if err != nil {
			return err
		}
		defer tool.Close()
		features := map[string]bool{
			"tx-checksum-ip-generic": on, "tx-tcp-segmentation": false, "tx-tcp6-segmentation": false,
			"tx-tcp-ecn-segmentation": false, "tx-tcp-mangleid-segmentation": false, "rx-gro": true,
		}
		// The library hands the kernel addresses on a stack that may move meanwhile: what was set is read back.
		for end := time.Now().Add(patience); ; {
			err := tool.Change(name, features)
			now, also := tool.Features(name)
			set := err == nil && also == nil
			for feature, on := range features {
				set = set && now[feature] == on
			}
			if set {
				return nil
			}
			if time.Now().After(end) {
				return fmt.Errorf("set offloads of %s: %w", name, errors.Join(err, also, errors.New("they do not stay")))
			}
		}
	})
}

const patience = 10 * time.Second

// eventually waits until f is true.
func eventually(tb testing.TB, what string, f func() bool) {
	tb.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("in vain: %s", what)
		}
	}
}

// capture holds the frames that leave by an interface.
type capture struct {
	mu     sync.Mutex
	frames [][]byte
}

func (n *namespace) capture(name string) *capture {
	n.Helper()
	var file *os.File
	const everything = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // in network byte order
	n.within(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		file = os.NewFile(uintptr(fd), "capture")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: n.link(name).Attrs().Index})
	})
	c := new(capture)
	raw, err := file.SyscallConn()
	n.must(err)
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			b := make([]byte, 4096)
			var size int
			var from unix.Sockaddr
			var err error
			if raw.Read(func(fd uintptr) bool {
				size, from, err = unix.Recvfrom(int(fd), b, 0)
				return err != unix.EAGAIN
			}) != nil {
				return
			}
			if l, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || l.Pkttype != unix.PACKET_OUTGOING {
				continue
			}
			c.mu.Lock()
			c.frames = append(c.frames, b[:size])
			c.mu.Unlock()
		}
	})
	n.Cleanup(func() { file.Close(); reader.Wait() })
	return c
}

// find returns the frames that are said to be so, in order.
func (c *capture) find(so func(frame []byte) bool) (found [][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.frames {
		if so(f) {
			found = append(found, f)
		}
	}
	return found
}
