package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const namespacePrefix = "flprobe-"

var namespaceNumber atomic.Int32

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
	n.sysctl("ipv6/conf/all/accept_dad", "0") // no waiting for duplicate address detection
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

// within runs f in the namespace.
func (n *namespace) within(f func() error) {
	n.tb.Helper()
	if err := onThread(func() error {
		if err := netns.Set(n.ns); err != nil {
			return err
		}
		return f()
	}); err != nil {
		n.tb.Fatal(err)
	}
}

func (n *namespace) must(err error) {
	n.tb.Helper()
	if err != nil {
		n.tb.Fatal(err)
	}
}

func (n *namespace) sysctl(name, value string) {
	n.tb.Helper()
	n.within(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
}

// run runs a command with this standard input.
func (n *namespace) run(input, name string, arguments ...string) {
	n.tb.Helper()
	n.within(func() error {
		cmd := exec.Command(name, arguments...)
		cmd.Stdin = strings.NewReader(input)
		if output, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %v: %w: %s", name, arguments, err, output)
		}
		return nil
	})
}

func (n *namespace) link(name string) netlink.Link {
	n.tb.Helper()
	l, err := n.LinkByName(name)
	if err != nil {
		n.tb.Fatalf("link %s: %v", name, err)
	}
	return l
}

func (n *namespace) up(name string)   { n.tb.Helper(); n.must(n.LinkSetUp(n.link(name))) }
func (n *namespace) down(name string) { n.tb.Helper(); n.must(n.LinkSetDown(n.link(name))) }

func (n *namespace) index(name string) uint32 {
	n.tb.Helper()
	return uint32(n.link(name).Attrs().Index)
}

// add gives a device addresses.
func (n *namespace) add(name string, cidrs ...string) {
	n.tb.Helper()
	for _, c := range cidrs {
		p := netip.MustParsePrefix(c)
		n.must(n.AddrAdd(n.link(name), &netlink.Addr{Flags: unix.IFA_F_NODAD,
			IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}))
	}
}

// cable joins two namespaces by a veth pair, both ends up.
func cable(a *namespace, aName string, b *namespace, bName string) {
	a.tb.Helper()
	a.must(a.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName,
		PeerNamespace: netlink.NsFd(b.ns)}))
	a.up(aName)
	b.up(bName)
}

const patienceInTests = 10 * time.Second

// eventually waits until f is true.
func eventually(tb testing.TB, what string, f func() bool) {
	tb.Helper()
	for end := time.Now().Add(patienceInTests); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("in vain: %s", what)
		}
	}
}

// socket opens a Socket in the namespace.
func (n *namespace) socket() (s *Socket) {
	n.tb.Helper()
	n.within(func() (err error) { s, err = OpenSocket(); return err })
	n.tb.Cleanup(func() { s.Close() })
	return s
}

// capture holds the TCP and UDP packets that come in by a device.
type capture struct {
	tb     testing.TB
	mu     sync.Mutex
	frames []captured
}

type captured struct {
	segment
	from, to [6]byte
}

func (n *namespace) capture(name string) *capture {
	n.tb.Helper()
	var file *os.File
	n.within(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		file = os.NewFile(uintptr(fd), "capture")
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL << 8, Ifindex: int(n.index(name))})
	})
	c := &capture{tb: n.tb}
	raw, err := file.SyscallConn()
	n.must(err)
	var reader sync.WaitGroup
	reader.Go(func() {
		b := make([]byte, 65536)
		for {
			var size int
			var from unix.Sockaddr
			var err error
			if raw.Read(func(fd uintptr) bool {
				size, from, err = unix.Recvfrom(int(fd), b, 0)
				return err != unix.EAGAIN
			}) != nil {
				return
			}
			if l, ok := from.(*unix.SockaddrLinklayer); err != nil || !ok || l.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if s, ok := read(b[:size]); ok {
				c.mu.Lock()
				c.frames = append(c.frames, captured{s, [6]byte(b[6:]), [6]byte(b)})
				c.mu.Unlock()
			}
		}
	})
	n.tb.Cleanup(func() { file.Close(); reader.Wait() })
	return c
}

// find returns what is so, in order.
func (c *capture) find(so func(*captured) bool) (found []captured) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.frames {
		if so(&c.frames[i]) {
			found = append(found, c.frames[i])
		}
	}
	return found
}

func (c *capture) len() int { return len(c.find(func(*captured) bool { return true })) }

// A device that is gone, down, or none fails its own probes alone.
func TestSocket(t *testing.T) {
	host, peer := mustNamespace(t), mustNamespace(t)
	cable(host, "w0", peer, "p0")
	cable(host, "w1", peer, "p1")
	cable(host, "w2", peer, "p2")
	cable(host, "w3", peer, "p3")
	gone := host.index("w3")
	host.must(host.LinkDel(host.link("w3")))
	host.down("w2")
	seen := []*capture{peer.capture("p0"), peer.capture("p1"), peer.capture("p2")}
	socket := host.socket()
	const each = 50
	var probes []Probe
	indexes := []uint32{host.index("w0"), host.index("w1"), host.index("w2"), gone, 0}
	for i := range each * len(indexes) {
		c := randomly(i%2 == 0, i%3 == 0)
		probes = append(probes, Probe{Interface: indexes[i%len(indexes)], Frame: Frame(c), Err: errors.New("of another time")})
	}
	probes = append(probes, Probe{Interface: indexes[0], Frame: []byte("short")})
	if sent := socket.Send(t.Context(), probes); sent != 2*each {
		t.Errorf("%d sent", sent)
	}
	for i, p := range probes {
		want := []error{nil, nil, unix.ENETDOWN, unix.ENXIO, unix.ENXIO, unix.EINVAL}[i%len(indexes)]
		if i == len(probes)-1 {
			want = unix.EINVAL
		}
		if !errors.Is(p.Err, want) {
			t.Errorf("by interface %d: %v, not %v", p.Interface, p.Err, want)
		}
	}
	eventually(t, "all frames of the devices that are up", func() bool { return seen[0].len() == each && seen[1].len() == each })
	if seen[2].len() > 0 {
		t.Error("something came by a device that is down")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if sent := socket.Send(ctx, probes[:2]); sent != 0 || !errors.Is(probes[0].Err, context.Canceled) {
		t.Errorf("%d sent after the end, %v", sent, probes[0].Err)
	}
	socket.Close()
	if sent := socket.Send(t.Context(), probes[:2]); sent != 0 || probes[0].Err == nil || probes[1].Err == nil {
		t.Errorf("%d sent by a closed socket", sent)
	}
}

// A full queue is waited for, and given up where it stays full.
func TestSocketFull(t *testing.T) {
	host, peer := mustNamespace(t), mustNamespace(t)
	cable(host, "w0", peer, "p0")
	seen := peer.capture("p0")
	socket := host.socket()
	probes := func(n int) (list []Probe) {
		for range n {
			list = append(list, Probe{Interface: host.index("w0"), Frame: Frame(randomly(false, false))})
		}
		return list
	}
	// 4,600 frames a second, and room for forty of them.
	host.run("", "tc", "qdisc", "replace", "dev", "w0", "root", "tbf", "rate", "2mbit", "burst", "1600", "limit", "2200")
	const n = 500
	if sent := socket.Send(t.Context(), probes(n)); sent != n {
		t.Errorf("%d of %d sent through a slow queue", sent, n)
	}
	eventually(t, "all frames", func() bool { return seen.len() == n })
	host.run("", "tc", "qdisc", "replace", "dev", "w0", "root", "tbf", "rate", "8kbit", "burst", "1600", "limit", "2200")
	list := probes(200)
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	sent := socket.Send(ctx, list)
	if sent == 0 || sent > 100 || !errors.Is(list[sent].Err, unix.ENOBUFS) || time.Since(began) > 2*time.Second {
		t.Errorf("%d sent through a stuck queue in %v; the next: %v", sent, time.Since(began), list[sent].Err)
	}
}
