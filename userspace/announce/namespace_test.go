package announce

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const namespacePrefix = "flannounce-"

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

func (n *namespace) sysctl(name, value string) {
	n.tb.Helper()
	n.within(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
}

func (n *namespace) run(name string, arguments ...string) {
	n.tb.Helper()
	n.within(func() error {
		if output, err := exec.Command(name, arguments...).CombinedOutput(); err != nil {
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

func (n *namespace) must(err error) {
	n.tb.Helper()
	if err != nil {
		n.tb.Fatal(err)
	}
}

func (n *namespace) up(name string)   { n.tb.Helper(); n.must(n.LinkSetUp(n.link(name))) }
func (n *namespace) down(name string) { n.tb.Helper(); n.must(n.LinkSetDown(n.link(name))) }
func (n *namespace) mac(name string) mac {
	n.tb.Helper()
	return mac(n.link(name).Attrs().HardwareAddr)
}

// add gives the namespace's stack addresses, without asking whether they are free.
func (n *namespace) add(name string, cidrs ...string) {
	n.tb.Helper()
	for _, c := range cidrs {
		n.must(n.AddrAdd(n.link(name), ipAddress(c)))
	}
}

func (n *namespace) remove(name string, cidrs ...string) {
	n.tb.Helper()
	for _, c := range cidrs {
		n.must(n.AddrDel(n.link(name), ipAddress(c)))
	}
}

func ipAddress(cidr string) *netlink.Addr {
	p := netip.MustParsePrefix(cidr)
	return &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Flags: unix.IFA_F_NODAD}
}

// cable joins two namespaces by a veth pair, both ends up.
func cable(a *namespace, aName string, b *namespace, bName string) {
	a.tb.Helper()
	plug(a, aName, b, bName)
	a.up(aName)
	b.up(bName)
}

// plug is a cable whose ends are down.
func plug(a *namespace, aName string, b *namespace, bName string) {
	a.tb.Helper()
	a.must(a.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName,
		PeerNamespace: netlink.NsFd(b.ns)}))
}

// pair is the host that announces and a peer, joined by w0 and p0.
func pair(tb testing.TB) (host, peer *namespace) {
	tb.Helper()
	host, peer = mustNamespace(tb), mustNamespace(tb)
	cable(host, "w0", peer, "p0")
	host.add("w0", "10.0.0.1/24", "fd00::1/64")
	peer.add("p0", "10.0.0.2/24", "fd00::2/64")
	return host, peer
}

// say has the stack of the namespace ask for whoever has target, as what has the address from: so does a host that
// uses that address.
func (n *namespace) say(from, target string) {
	n.tb.Helper()
	n.within(func() error {
		c, err := (&net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}).
			Dial("udp", netip.AddrPortFrom(netip.MustParseAddr(target), 9).String())
		if err != nil {
			return err
		}
		_, err = c.Write([]byte("who has it?"))
		return errors.Join(err, c.Close())
	})
}

// group is a line of the kernel's on a group that a device lets through.
type group struct {
	users  int
	global bool // joined from outside of the network stack, as we do
}

func (n *namespace) group(name string, m mac) (g group, ok bool) {
	n.tb.Helper()
	n.within(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/dev_mcast")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			var index, global int
			var device, address string
			var users int
			if _, err := fmt.Sscan(line, &index, &device, &users, &global, &address); err != nil {
				return fmt.Errorf("%q: %w", line, err)
			}
			if device == name && address == strings.ReplaceAll(m.String(), ":", "") {
				g, ok = group{users, global != 0}, true
			}
		}
		return nil
	})
	return g, ok
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

// capture holds what comes in by an interface.
type capture struct {
	tb     testing.TB
	mu     sync.Mutex
	frames []frame
}

type frame struct {
	at time.Time
	gopacket.Packet
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
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL),
			Ifindex: n.link(name).Attrs().Index})
	})
	c := &capture{tb: n.tb}
	raw, err := file.SyscallConn()
	n.must(err)
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			b := make([]byte, 2048)
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
			c.mu.Lock()
			c.frames = append(c.frames,
				frame{time.Now(), gopacket.NewPacket(b[:size], layers.LayerTypeEthernet, gopacket.Default)})
			c.mu.Unlock()
		}
	})
	n.tb.Cleanup(func() { file.Close(); reader.Wait() })
	return c
}

// find returns the frames that are said to be so, in order.
func (c *capture) find(so func(gopacket.Packet) bool) (found []frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.frames {
		if so(f.Packet) {
			found = append(found, f)
		}
	}
	return found
}

// wait waits until at least n frames are so, and returns them.
func (c *capture) wait(what string, n int, so func(gopacket.Packet) bool) (found []frame) {
	c.tb.Helper()
	eventually(c.tb, fmt.Sprintf("%d of %s", n, what), func() bool { found = c.find(so); return len(found) >= n })
	return found
}

func (c *capture) clear() {
	c.mu.Lock()
	c.frames = nil
	c.mu.Unlock()
}

// probeOf and announcementOf say of a frame, read by gopacket, every field that makes it one.
func probeOf(address string, from mac) func(gopacket.Packet) bool {
	ip := netip.MustParseAddr(address)
	return func(p gopacket.Packet) bool {
		if ip.Is4() {
			a, ok := arpOf(p)
			return ok && a.Operation == layers.ARPRequest && net.IP(a.SourceProtAddress).IsUnspecified() &&
				mac(a.SourceHwAddress) == from && mac(a.DstHwAddress) == mac{} && net.IP(a.DstProtAddress).Equal(ip.AsSlice()) &&
				ethernetOf(p, from, mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		}
		s, ok := p.Layer(layers.LayerTypeICMPv6NeighborSolicitation).(*layers.ICMPv6NeighborSolicitation)
		b := ip.As16()
		group := net.ParseIP(fmt.Sprintf("ff02::1:ff%02x:%02x%02x", b[13], b[14], b[15]))
		return ok && s.TargetAddress.Equal(ip.AsSlice()) && len(s.Options) == 0 && ipv6Of(p, net.IPv6unspecified, group) &&
			ethernetOf(p, from, mac{0x33, 0x33, 0xff, b[13], b[14], b[15]})
	}
}

func announcementOf(address string, from mac) func(gopacket.Packet) bool {
	ip := netip.MustParseAddr(address)
	return func(p gopacket.Packet) bool {
		if ip.Is4() {
			a, ok := arpOf(p)
			return ok && a.Operation == layers.ARPRequest && net.IP(a.SourceProtAddress).Equal(ip.AsSlice()) &&
				mac(a.SourceHwAddress) == from && mac(a.DstHwAddress) == mac{} && net.IP(a.DstProtAddress).Equal(ip.AsSlice()) &&
				ethernetOf(p, from, mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		}
		a, ok := p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
		return ok && a.TargetAddress.Equal(ip.AsSlice()) && a.Override() && !a.Solicited() && !a.Router() &&
			len(a.Options) == 1 && a.Options[0].Type == layers.ICMPv6OptTargetAddress &&
			slices.Equal(a.Options[0].Data, from[:]) &&
			ipv6Of(p, ip.AsSlice(), net.ParseIP("ff02::1")) && ethernetOf(p, from, mac{0x33, 0x33, 0, 0, 0, 1})
	}
}

// about says of a frame whether it has to do with an address at all.
func about(address string) func(gopacket.Packet) bool {
	ip := net.ParseIP(address)
	return func(p gopacket.Packet) bool {
		if a, ok := arpOf(p); ok {
			return ip.Equal(a.SourceProtAddress) || ip.Equal(a.DstProtAddress)
		}
		if s, ok := p.Layer(layers.LayerTypeICMPv6NeighborSolicitation).(*layers.ICMPv6NeighborSolicitation); ok {
			return s.TargetAddress.Equal(ip)
		}
		a, ok := p.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
		return ok && a.TargetAddress.Equal(ip)
	}
}

func arpOf(p gopacket.Packet) (*layers.ARP, bool) {
	a, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP)
	return a, ok && a.AddrType == layers.LinkTypeEthernet && a.Protocol == layers.EthernetTypeIPv4 &&
		a.HwAddressSize == 6 && a.ProtAddressSize == 4
}

func ethernetOf(p gopacket.Packet, from, to mac) bool {
	e, ok := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	return ok && mac(e.SrcMAC) == from && mac(e.DstMAC) == to
}

// ipv6Of looks at the checksum, too.
func ipv6Of(p gopacket.Packet, from, to net.IP) bool {
	ip, ok := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
	icmp, also := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
	if !ok || !also || ip.HopLimit != 255 || !ip.SrcIP.Equal(from) || !ip.DstIP.Equal(to) {
		return false
	}
	icmp.SetNetworkLayerForChecksum(ip)
	err, mismatches := p.VerifyChecksums()
	return err == nil && len(mismatches) == 0
}
