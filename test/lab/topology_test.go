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

// An edge that translates the destination alone stands for one that forwards by nat: clients only hear of the address
// that they asked if the answers come by the edge.
func TestNATPaths(t *testing.T) {
	for name, arm := range arms {
		for _, options := range []Options{{}, {Masquerade: true}, {BackMTU: 1400}, {BackMTU: 1400, Masquerade: true}} {
			t.Run(fmt.Sprintf("%s arm, masquerade %v, stretch %d", name, options.Masquerade, options.BackMTU), func(t *testing.T) {
				options.Backends, options.ClientAddresses, options.EdgeForwards, options.ByEdge = 1, 1, true, true
				topology := mustOpen(t, arm, "natby", options)
				backend := topology.Backends()[0]
				serveNames(t, backend.Node, 8765)
				mustNft(t, topology.Edge, fmt.Sprintf(`table inet edge {
					chain in {
						type nat hook prerouting priority dstnat
						tcp dport 443 dnat ip to %s:8765
						tcp dport 443 dnat ip6 to [%s]:8765
					}
				}`, backend.IPv4, backend.IPv6))
				for _, service := range topology.Services {
					client := topology.ClientAddresses(service)[0]
					seen := client
					if options.Masquerade {
						seen = topology.RouterAddress(service)
						if name == "two" {
							seen = sameFamily(frontNet.addresses(routerHost), service)[0]
						}
					}
					wantAnswer(t, topology.Clients, client, netip.AddrPortFrom(service, 443), "ws1 "+seen.String())
				}
			})
		}
	}
}

func mustNft(t *testing.T, n *Node, rules string) {
	t.Helper()
	cmd := n.Command(t.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, output)
	}
}

// A stretch is found out by who sends more than it takes, by what its routers tell, in both directions and families; and
// forgotten.
func TestStretches(t *testing.T) {
	for name, arm := range arms {
		t.Run(name+" arm", func(t *testing.T) {
			topology := mustOpen(t, arm, "stretch", Options{Backends: 1, ClientAddresses: 1, FrontMTU: 1500, BackMTU: 1500})
			backend := topology.Backends()[0]
			const size = 1 << 20
			serveSink(t, backend.Node, 9000, size)
			for _, family := range families {
				client, server := topology.ClientAddresses(family)[0], backend.Address(family)
				for _, mtus := range [][2]int{{1500, 1500}, {1400, 1500}, {1500, 1400}, {1400, 1300}} {
					if err := errors.Join(topology.SetFrontMTU(mtus[0]), topology.SetBackMTU(mtus[1])); err != nil {
						t.Fatal(err)
					}
					for _, n := range []*Node{topology.Clients, backend.Node} {
						if err := n.ForgetPaths(); err != nil {
							t.Fatal(err)
						}
						if mtu, err := n.PathMTU(netip.AddrFrom4([4]byte{10, 0, 1, 254})); err != nil || mtu != 1500 {
							t.Errorf("a path nobody has used has MTU %d, %v", mtu, err)
						}
					}
					if got, err := exchange(topology.Clients, client, netip.AddrPortFrom(server, 9000), size); err != nil || got != size {
						t.Fatalf("%v with MTUs %v: %d bytes came back, %v", family, mtus, got, err)
					}
					least := min(mtus[0], mtus[1])
					for n, to := range map[*Node]netip.Addr{topology.Clients: server, backend.Node: client} {
						if mtu, err := n.PathMTU(to); err != nil || mtu != least {
							t.Errorf("with MTUs %v, %s takes the path to %v to have %d, %v", mtus, n.Name(), to, mtu, err)
						}
					}
				}
			}
		})
	}
	topology := mustOpen(t, OneArm, "plain", Options{Backends: 1})
	if topology.SetFrontMTU(1400) == nil || topology.SetBackMTU(1400) == nil {
		t.Error("the MTU of a stretch that is not there was set")
	}
}

// serveSink takes size bytes of each connection and then gives as many.
func serveSink(t testing.TB, n *Node, port int, size int64) {
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
				go func() {
					defer conn.Close()
					if _, err := io.CopyN(io.Discard, conn, size); err == nil {
						conn.Write(make([]byte, size))
					}
				}()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// exchange gives a serveSink size bytes and counts what comes back.
func exchange(n *Node, from netip.Addr, to netip.AddrPort, size int) (got int64, err error) {
	var conn net.Conn
	err = n.Do(func() (err error) {
		dialer := net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
		conn, err = dialer.Dial("tcp", to.String())
		return err
	})
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(make([]byte, size)); err != nil {
		return 0, err
	}
	return io.Copy(io.Discard, conn)
}

// What concerns tunnels finds the edge, from the router and from behind a stretch.
func TestTunnelSources(t *testing.T) {
	sources := []netip.Prefix{netip.MustParsePrefix("10.255.0.0/24"), netip.MustParsePrefix("fd00:255::/120")}
	topology := mustOpen(t, TwoArm, "tunnel", Options{Backends: 1, TunnelSources: sources, BackMTU: 1400})
	serveNames(t, topology.Edge, 80)
	for _, source := range sources {
		for range 7 {
			source = netip.PrefixFrom(source.Addr().Next(), source.Bits())
		}
		if err := topology.Edge.AddAddress("lo", netip.PrefixFrom(source.Addr(), source.Addr().BitLen())); err != nil {
			t.Fatal(err)
		}
		to := netip.AddrPortFrom(source.Addr(), 80)
		router := topology.RouterAddress(source.Addr())
		wantAnswer(t, topology.Router, router, to, "edge "+router.String())
		backend := topology.Backends()[0].Address(source.Addr())
		wantAnswer(t, topology.Backends()[0].Node, backend, to, "edge "+backend.String())
	}
}

// Edges ask the same segment for an address that nobody holds: who captures sees the questions, and that no answer comes.
func TestEdgesShareASegment(t *testing.T) {
	for name, arm := range arms {
		t.Run(name+" arm", func(t *testing.T) {
			services, toEdge, edges := SegmentServices(name == "two"), backSegment, backNet
			if name == "two" {
				toEdge, edges = frontSegment, frontNet
			}
			topology := mustOpen(t, arm, "edges", Options{Backends: 1, Services: services})
			second, err := topology.AddEdge()
			if err != nil {
				t.Fatal(err)
			}
			const askARP, askNDP = 1, 135
			questions, err := second.Capture(topology.EdgeFront, func(frame []byte) bool {
				return frame[12] == 8 && frame[13] == 6 && frame[21] == askARP ||
					frame[12] == 0x86 && frame[13] == 0xdd && frame[20] == unix.IPPROTO_ICMPV6 && frame[54] == askNDP
			})
			if err != nil {
				t.Fatal(err)
			}
			about := func(address netip.Addr) (count int) {
				for _, frame := range questions.Frames() {
					if strings.Contains(string(frame.Data), string(address.AsSlice())) {
						count++
					}
				}
				return count
			}
			for _, service := range services {
				family := "ipv4"
				if service.Is6() {
					family = "ipv6"
				}
				for _, setting := range [][2]string{{"mcast_solicit", "2"}, {"retrans_time_ms", "100"}} {
					if err := topology.Router.Sysctl("net."+family+".neigh."+toEdge+"."+setting[0], setting[1]); err != nil {
						t.Fatal(err)
					}
				}
				client := topology.ClientAddresses(service)[0]
				answer, err := ask(topology.Clients, client, netip.AddrPortFrom(service, 80))
				if err == nil {
					t.Errorf("%v, which nobody holds, answers %q", service, answer)
				}
				await(t, fmt.Sprintf("the question for %v", service), func() bool { return about(service) > 0 })
			}
			if err := questions.Close(); err != nil {
				t.Fatal(err)
			}
			before := len(questions.Frames())
			if _, err := ask(topology.Clients, topology.ClientAddresses(services[0])[0], netip.AddrPortFrom(services[0], 80)); err == nil {
				t.Errorf("%v answers", services[0])
			}
			if now := len(questions.Frames()); now != before {
				t.Errorf("a closed capture went on from %d to %d frames", before, now)
			}
			// The second is a router's neighbour as the first is.
			serveNames(t, second, 80)
			for _, address := range edges.addresses(2) {
				client := topology.ClientAddresses(address)[0]
				wantAnswer(t, topology.Clients, client, netip.AddrPortFrom(address, 80), "edge2 "+client.String())
			}
		})
	}
}
