package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/test/lab"
)

// takeOver is how long an edge may take to have an address that another one has had: it asks again every half minute, give
// or take a fifth, and asking takes a second.
const takeOver = 40 * time.Second

// TestTwoEdges: an address that no host holds is answered for by the edge that has it, to ARP, NDP and ping. A second edge
// that wants it says who has it, and is silent. When the first is gone, the second takes over, and connections go on: by dsr
// both know where to.
func TestTwoEdges(t *testing.T) {
	t.Parallel()
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) {
			t.Parallel()
			testTwoEdges(t, family)
		})
	}
}

func testTwoEdges(t *testing.T, family int) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.OneArm, form{"dsr", family, family}, 3, lab.Options{Services: lab.SegmentServices(false)})
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	other, err := topo.AddEdge()
	if err != nil {
		t.Fatal(err)
	}
	// At the router every answer to its questions passes, and every announcement.
	claims, err := topo.Router.Capture("back", func(frame []byte) bool { return claims(frame, s.address) })
	if err != nil {
		t.Fatal(err)
	}
	by := func(n *lab.Node) (count int) {
		t.Helper()
		mac := mustMAC(t, n, topo.EdgeBack)
		for _, frame := range claims.Frames() {
			if bytes.Equal(frame.Data[6:12], mac) {
				count++
			}
		}
		return count
	}

	first := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	first.write(s)
	first.start()
	clients, err := topo.Clients.StartClients()
	if err != nil {
		t.Fatal(err)
	}
	k := &talk{edge: first, talkers: clients, kind: websockets, topo: topo, service: s, ctx: ctx}
	k.openMore(60)
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	k.echoes("at first")
	mustPing(t, topo.Clients, s.address)
	if n := by(topo.Edge); n == 0 {
		t.Errorf("the router got no answer from the edge about %v", s.address)
	}

	second := newEdgeOn(t, other, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	second.write(s)
	second.start()
	second.until("the second edge says that another has the address", func() bool {
		for line := range strings.Lines(second.log()) {
			if strings.Contains(line, "level=WARN") && strings.Contains(line, s.address.String()) {
				return true
			}
		}
		return false
	})
	for range 5 {
		before := by(topo.Edge)
		mustForget(t, topo.Router, s.address)
		k.echoes("with a second edge")
		first.until("the router has asked again", func() bool { return by(topo.Edge) > before })
	}
	mustPing(t, topo.Clients, s.address)
	if n := by(other); n != 0 {
		t.Errorf("the second edge claimed %v %d times beside the first", s.address, n)
	}

	// The first goes, with all it has attached. Nobody talks meanwhile.
	if _, err := clients.Quiet(ctx); err != nil {
		t.Fatal(err)
	}
	if err := first.process.Stop(); err != nil {
		t.Fatal(err)
	}
	first.unload()
	gone := time.Now()
	second.within(takeOver, "the second edge announces the address", func() bool { return by(other) > 0 })
	t.Logf("taken over in %v", time.Since(gone).Round(time.Millisecond))
	k.edge = second
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: 500}); err != nil {
		t.Fatal(err)
	}
	k.echoes("after the second edge took over")
	k.openMore(60)
	k.echoes("by the second edge alone")
	mustPing(t, topo.Clients, s.address)
	if _, err := clients.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// claims tells whether a frame says that an address is its sender's: ARP from it, answers and announcements alike, or a
// neighbour advertisement for it.
func claims(frame []byte, address netip.Addr) bool {
	const network, advertisement = 14, 136
	if len(frame) < network+28 {
		return false
	}
	packet := frame[network:]
	switch {
	case address.Is4() && frame[12] == 0x08 && frame[13] == 0x06:
		return bytes.Equal(packet[14:18], address.AsSlice())
	case address.Is6() && frame[12] == 0x86 && frame[13] == 0xdd && len(packet) >= 64 && packet[6] == unix.IPPROTO_ICMPV6:
		return packet[40] == advertisement && bytes.Equal(packet[48:64], address.AsSlice())
	}
	return false
}

func mustMAC(t *testing.T, n *lab.Node, interfaceName string) (mac net.HardwareAddr) {
	t.Helper()
	if err := n.Do(func() error {
		link, err := netlink.LinkByName(interfaceName)
		if err == nil {
			mac = link.Attrs().HardwareAddr
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return mac
}

// mustForget makes a node forget whose an address is, so that it asks.
func mustForget(t *testing.T, n *lab.Node, address netip.Addr) {
	t.Helper()
	if err := n.Do(func() error {
		family := netlink.FAMILY_V4
		if address.Is6() {
			family = netlink.FAMILY_V6
		}
		list, err := netlink.NeighList(0, family)
		if err != nil {
			return err
		}
		for _, entry := range list {
			if entry.IP.Equal(address.AsSlice()) {
				if err := netlink.NeighDel(&entry); err != nil {
					return err
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatalf("forget the neighbour %v: %v", address, err)
	}
}

// mustPing sends an echo request from a node and waits for its answer.
func mustPing(t *testing.T, n *lab.Node, to netip.Addr) {
	t.Helper()
	if err := n.Do(func() error {
		domain, protocol, request, answer := unix.AF_INET, unix.IPPROTO_ICMP, byte(8), byte(0)
		var address unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(to.AsSlice()[:4])}
		if to.Is6() {
			domain, protocol, request, answer = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, 129
			address = &unix.SockaddrInet6{Addr: to.As16()}
		}
		if err := n.Sysctl("net.ipv4.ping_group_range", "0 0"); err != nil {
			return err
		}
		fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 3}); err != nil {
			return err
		}
		if err := unix.Connect(fd, address); err != nil {
			return err
		}
		body := []byte("a fairlead guides a rope")
		// The kernel fills in checksum and identifier.
		if _, err := unix.Write(fd, append([]byte{request, 0, 0, 0, 0, 0, 0, 1}, body...)); err != nil {
			return err
		}
		got := make([]byte, 100)
		length, err := unix.Read(fd, got)
		if err != nil {
			return fmt.Errorf("wait for the answer: %w", err)
		}
		if got = got[:length]; got[0] != answer || !bytes.HasSuffix(got, body) {
			return fmt.Errorf("the answer is %x", got)
		}
		return nil
	}); err != nil {
		t.Errorf("ping %v from %s: %v", to, n.Name(), err)
	}
}
