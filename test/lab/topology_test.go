package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func mustOpen(t testing.TB, open func(string, Options) (*Topology, error), name string, options Options) *Topology {
	t.Helper()
	topology, err := open(prefixOf(t, name), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := topology.Close(); err != nil {
			t.Error(err)
		}
	})
	return topology
}

var families = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}

// serveNames has a node answer each TCP connection with its own name and the address it sees.
func serveNames(t testing.TB, n *Node, port int) {
	t.Helper()
	err := n.Do(func() error {
		listener, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
				fmt.Fprintf(conn, "%s %s", n.Name(), peer)
				conn.Close()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ask returns what serveNames answers to a client address.
func ask(n *Node, from netip.Addr, to netip.AddrPort) (answer string, err error) {
	var conn net.Conn
	err = n.Do(func() (err error) {
		dialer := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
		conn, err = dialer.Dial("tcp", to.String())
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(3 * time.Second))
	text, err := io.ReadAll(conn)
	return string(text), err
}

func wantAnswer(t *testing.T, n *Node, from netip.Addr, to netip.AddrPort, want string) {
	t.Helper()
	if got, err := ask(n, from, to); err != nil || got != want {
		t.Errorf("%v to %v: %q, %v, want %q", from, to, got, err, want)
	}
}

var arms = map[string]func(string, Options) (*Topology, error){"one": OneArm, "two": TwoArm}

// An edge whose kernel routes a service's address to a backend stands for one that forwards by dsr.
func TestDSRPaths(t *testing.T) {
	for name, arm := range arms {
		for _, masquerade := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s arm, masquerade %v", name, masquerade), func(t *testing.T) {
				topology := mustOpen(t, arm, "dsr", Options{
					Backends: 1, ClientAddresses: 2, Masquerade: masquerade, DSRServices: DefaultServices(), EdgeForwards: true,
				})
				added, err := topology.AddBackend()
				if err != nil {
					t.Fatal(err)
				}
				for _, backend := range topology.Backends() {
					serveNames(t, backend.Node, 443)
				}
				for _, service := range topology.Services {
					if err := topology.Edge.AddRoute(netip.PrefixFrom(service, service.BitLen()), added.Address(service)); err != nil {
						t.Fatal(err)
					}
					for _, client := range topology.ClientAddresses(service) {
						seen := client
						if masquerade {
							// What the router put on the way to the edge.
							seen = topology.RouterAddress(service)
							if name == "two" {
								seen = sameFamily(frontNet.addresses(routerHost), service)[0]
							}
						}
						wantAnswer(t, topology.Clients, client, netip.AddrPortFrom(service, 443), "ws2 "+seen.String())
					}
				}
			})
		}
	}
}

// Who asks the segment itself for an address that backends hold gets no answer.
func TestHoldIsSilent(t *testing.T) {
	l := mustNew(t, prefixOf(t, "hold"))
	s, err := l.Segment("wire", 0)
	if err != nil {
		t.Fatal(err)
	}
	asker, holder := mustNode(t, l, "asker"), mustNode(t, l, "holder")
	for i, n := range []*Node{asker, holder} {
		if err := n.Join(s, Link{Name: "eth0", Addresses: backNet.host(1 + i)}); err != nil {
			t.Fatal(err)
		}
	}
	serveNames(t, holder, 80)
	for _, held := range []netip.Prefix{netip.MustParsePrefix("192.0.2.10/32"), netip.MustParsePrefix("2001:db8::10/128")} {
		if err := holder.Hold(held.Addr()); err != nil {
			t.Fatal(err)
		}
		own := sameFamily(backNet.addresses(1), held.Addr())[0]
		family, target := "ipv4", netip.AddrPortFrom(held.Addr(), 80)
		if own.Is6() {
			family = "ipv6"
		}
		for _, setting := range [][2]string{{"mcast_solicit", "2"}, {"retrans_time_ms", "100"}} {
			if err := asker.Sysctl("net."+family+".neigh.eth0."+setting[0], setting[1]); err != nil {
				t.Fatal(err)
			}
		}
		route := asker.Command(t.Context(), "ip", "route", "add", held.String(), "dev", "eth0")
		if output, err := route.CombinedOutput(); err != nil {
			t.Fatalf("ip route: %v: %s", err, output)
		}
		if answer, err := ask(asker, own, target); !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("asked for %v on the segment: %q, %v, want no route to host", held, answer, err)
		}
		// By way of the holder's own address it answers.
		if err := asker.AddRoute(held, sameFamily(backNet.addresses(2), held.Addr())[0]); err != nil {
			t.Fatal(err)
		}
		wantAnswer(t, asker, own, target, "holder "+own.String())
	}
}

// An edge that translates both addresses stands for one that forwards by fullnat.
func TestFullNATPaths(t *testing.T) {
	for name, arm := range arms {
		t.Run(name+" arm", func(t *testing.T) {
			topology := mustOpen(t, arm, "nat", Options{
				Backends: 2, ClientAddresses: 1, EdgeForwards: true, MTU: 9000, Queues: 2,
			})
			for _, backend := range topology.Backends() {
				serveNames(t, backend.Node, 8765)
			}
			backend := topology.Backends()[1]
			cmd := topology.Edge.Command(context.Background(), "nft", "-f", "-")
			cmd.Stdin = strings.NewReader(fmt.Sprintf(`table inet edge {
				chain in {
					type nat hook prerouting priority dstnat
					tcp dport 443 dnat ip to %s:8765
					tcp dport 443 dnat ip6 to [%s]:8765
				}
				chain out { type nat hook postrouting priority srcnat; masquerade; }
			}`, backend.IPv4, backend.IPv6))
			if output, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("nft: %v: %s", err, output)
			}
			for _, service := range topology.Services {
				client := topology.ClientAddresses(service)[0]
				want := "ws2 " + topology.EdgeAddress(service).String()
				wantAnswer(t, topology.Clients, client, netip.AddrPortFrom(service, 443), want)
			}
		})
	}
}

func TestSourceAddresses(t *testing.T) {
	topology := mustOpen(t, OneArm, "src", Options{Backends: 1, ClientAddresses: 1})
	used := map[netip.Addr]bool{}
	for _, family := range families {
		addresses, err := topology.SourceAddresses(family, 15)
		if err != nil {
			t.Fatal(err)
		}
		for _, address := range addresses {
			if used[address] || address.Is4() != family.Is4() || !backNet.contains(address) {
				t.Errorf("%v is set aside for %v", address, family)
			}
			used[address] = true
		}
	}
	if _, err := topology.SourceAddresses(families[0], 1); err == nil {
		t.Error("more source addresses than there are")
	}
	if _, err := OneArm(topology.Prefix(), Options{}); err == nil {
		t.Error("a second topology of the same prefix")
	}
}
