package probe

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/maps"
)

// way is what stands between client and service.
type way struct {
	name        string
	masquerade  bool
	dropInvalid bool // the router drops what conntrack calls invalid, as many do
}

var ways = []way{{name: "direct"}, {"masquerade", true, false}, {"masquerade, invalid dropped", true, true}}

// Linux clients answer a probe with an ACK of their exact numbers, and the RST made of that ends them: directly and
// behind routers that hide them, of both families, with timestamps and without, by numbers of their last packet and by
// older ones. By numbers ahead of the truth they don't, behind a router: it is no accident that probes have none.
func TestClientsAnswer(t *testing.T) {
	for _, way := range ways {
		for _, v6 := range []bool{false, true} {
			for _, timestamps := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s v6=%t timestamps=%t", way.name, v6, timestamps), func(t *testing.T) {
					testAnswer(t, way, v6, timestamps)
				})
			}
		}
	}
}

const masquerade = `table inet nat {
	chain leaving { type nat hook postrouting priority srcnat; oifname "r1" masquerade; }
}
`

const dropInvalid = `table inet filter {
	chain forward { type filter hook forward priority filter; ct state invalid drop; }
	chain input { type filter hook input priority filter; ct state invalid drop; }
}
`

// cut ends the service's own host: it hears no TCP any more, and says none.
const cut = `table inet cut {
	chain input { type filter hook input priority filter; meta l4proto tcp drop; }
	chain output { type filter hook output priority filter; meta l4proto tcp drop; }
}
`

// stage is a client and a service with a way between them.
func stage(t *testing.T, way way) (client, service *namespace) {
	t.Helper()
	client, service = mustNamespace(t), mustNamespace(t)
	if !way.masquerade {
		cable(client, "c0", service, "s0")
		client.add("c0", "10.0.2.2/24", "fd00:2::2/64")
	} else {
		router := mustNamespace(t)
		cable(client, "c0", router, "r0")
		cable(router, "r1", service, "s0")
		client.add("c0", "10.0.1.2/24", "fd00:1::2/64")
		router.add("r0", "10.0.1.1/24", "fd00:1::1/64")
		router.add("r1", "10.0.2.2/24", "fd00:2::2/64")
		router.sysctl("ipv4/ip_forward", "1")
		router.sysctl("ipv6/conf/all/forwarding", "1")
		client.run("", "ip", "route", "add", "default", "via", "10.0.1.1")
		client.run("", "ip", "route", "add", "default", "via", "fd00:1::1")
		rules := masquerade
		if way.dropInvalid {
			rules += dropInvalid
		}
		router.run(rules, "nft", "-f", "-")
	}
	service.add("s0", "10.0.2.1/24", "fd00:2::1/64")
	return client, service
}

// seen is a connection as the data plane has it after a packet of the client's.
func seen(p *captured, device uint32) *maps.Connection {
	end := p.sequence + uint32(p.payload)
	if p.flags&(syn|fin) != 0 {
		end++
	}
	return &maps.Connection{
		Tuple:       maps.Tuple{Source: p.source, Destination: p.destination, Protocol: unix.IPPROTO_TCP},
		SequenceEnd: end, Acknowledgement: p.ack, Timestamp: p.value, TimestampEcho: p.echo,
		Hop: maps.Hop{MAC: p.from, SourceMAC: p.to, Interface: device},
	}
}

func testAnswer(t *testing.T, way way, v6, timestamps bool) {
	client, service := stage(t, way)
	if !timestamps {
		client.sysctl("ipv4/tcp_timestamps", "0")
	}
	address := netip.MustParseAddrPort("10.0.2.1:443")
	if v6 {
		address = netip.MustParseAddrPort("[fd00:2::1]:443")
	}
	packets := service.capture("s0")
	device := service.index("s0")
	socket := service.socket()

	var listener net.Listener
	service.within(func() (err error) { listener, err = net.Listen("tcp", address.String()); return err })
	defer listener.Close()
	var conn net.Conn
	client.within(func() (err error) {
		conn, err = (&net.Dialer{Timeout: patienceInTests, KeepAlive: -1}).Dial("tcp", address.String())
		return err
	})
	defer conn.Close()
	end, err := listener.Accept()
	client.must(err)
	defer end.Close()
	client.must(conn.SetDeadline(time.Now().Add(2 * patienceInTests)))
	client.must(end.SetDeadline(time.Now().Add(2 * patienceInTests)))
	total := 0 // bytes each way
	talk := func(n int) {
		t.Helper()
		for _, pair := range [][2]net.Conn{{conn, end}, {end, conn}} {
			written := make(chan error, 1)
			go func() {
				_, err := pair[0].Write(make([]byte, n))
				written <- err
			}()
			_, err := io.ReadFull(pair[1], make([]byte, n))
			client.must(errors.Join(err, <-written))
		}
		total += n
	}
	// The first packets are old by two megabytes at the end, and by some ticks of both clocks.
	for _, n := range []int{700, 700, 1 << 20, 700, 1 << 20, 700, 700} {
		talk(n)
	}
	// The client's last word acknowledges all that there is.
	own := func(p *captured) bool { return p.destination == address && p.flags&(syn|rst) == 0 }
	all := func() []captured { return packets.find(own) }
	eventually(t, "the client's last acknowledgement", func() bool {
		list := all()
		return len(list) > 1 && list[len(list)-1].ack-list[0].ack == uint32(total) &&
			list[len(list)-1].sequence-list[0].sequence+uint32(list[len(list)-1].payload) == uint32(total)
	})
	list := all()
	last := list[len(list)-1]
	if (last.value != 0) != timestamps {
		t.Fatalf("timestamps %t: %+v", timestamps, last)
	}
	if hidden := last.source.Addr() == netip.MustParseAddr("10.0.2.2") || last.source.Addr() == netip.MustParseAddr("fd00:2::2"); !hidden {
		t.Fatalf("the client is %v", last.source)
	}
	service.run(cut, "nft", "-f", "-")

	// ask probes until there is an answer: Linux gives two a second.
	answers := func() []captured {
		return packets.find(func(p *captured) bool { return p.destination == address })[len(list)+1:]
	}
	ask := func(what string, c *maps.Connection) captured {
		t.Helper()
		before := len(answers())
		asked := time.Now().Add(-time.Hour)
		eventually(t, "an answer to "+what, func() bool {
			if time.Since(asked) > 100*time.Millisecond {
				probes := []Probe{{Interface: c.Hop.Interface, Frame: Frame(c)}}
				if socket.Send(t.Context(), probes) != 1 {
					t.Fatal(probes[0].Err)
				}
				asked = time.Now()
			}
			return len(answers()) > before
		})
		return answers()[before]
	}
	now := seen(&last, device)
	check := func(what string, c *maps.Connection) captured {
		t.Helper()
		a := ask(what, c)
		if a.flags != ack || a.payload != 0 || a.sequence != now.SequenceEnd || a.ack != now.Acknowledgement ||
			a.source != now.Tuple.Source || (a.value != 0) != timestamps {
			t.Fatalf("%s: the answer is %+v, the client stands at %d and %d", what, a, now.SequenceEnd, now.Acknowledgement)
		}
		return a
	}
	answer := check("the last packet's numbers", now)
	for _, old := range []int{len(list) - 4, len(list) / 2, 1, 0} {
		c := seen(&list[old], device)
		if old < len(list)-1 && c.SequenceEnd == now.SequenceEnd && c.Acknowledgement == now.Acknowledgement {
			t.Fatalf("packet %d of %d is no older than the last", old, len(list))
		}
		answer = check(fmt.Sprintf("numbers %d packets old", len(list)-1-old), c)
	}
	// A frame that says nothing true is not answered behind a router, or by the router's own RST.
	if way.masquerade {
		ahead := *now
		ahead.SequenceEnd += 1 << 20
		probes := []Probe{{Interface: device, Frame: Frame(&ahead)}}
		before := len(answers())
		if socket.Send(t.Context(), probes) != 1 {
			t.Fatal(probes[0].Err)
		}
		if !way.dropInvalid {
			eventually(t, "the router's RST to numbers ahead of the truth", func() bool { return len(answers()) > before })
			if a := answers()[before]; a.flags&rst == 0 || a.sequence != ahead.SequenceEnd {
				t.Errorf("numbers ahead of the truth are answered %+v", a)
			}
		}
		answer = check("true numbers again", now)
	}

	// The answer becomes a RST, as the data plane makes it, and the idle client knows.
	if err := conn.SetReadDeadline(time.Now().Add(patienceInTests)); err != nil {
		t.Fatal(err)
	}
	reset := segment{source: address, destination: answer.source, protocol: unix.IPPROTO_TCP, flags: rst, sequence: answer.ack}
	told := time.Now()
	if probes := []Probe{{Interface: device, Frame: reset.frame(now.Hop.SourceMAC, now.Hop.MAC)}}; socket.Send(t.Context(), probes) != 1 {
		t.Fatal(probes[0].Err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client reads %v", err)
	}
	if took := time.Since(told); took > time.Second {
		t.Errorf("it knew after %v", took)
	}
	// Its socket is gone: whoever asks again is answered RST, by numbers that fit.
	gone := ask("a probe of a client that is gone", now)
	if gone.flags&rst == 0 || gone.sequence != now.SequenceEnd {
		t.Errorf("a client that is gone answers %+v", gone)
	}
}
