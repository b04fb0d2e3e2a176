package lab

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func mustIdle(t testing.TB, n *Node) *IdleClients {
	t.Helper()
	c, err := n.StartIdleClients()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustIdleConnections(t testing.TB, c *IdleClients) []IdleConnection {
	t.Helper()
	connections, err := c.Connections(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return connections
}

// ends counts how connections of a server ended: "" are those that live.
func ends(connections []IdleConnection, server string) map[string]int {
	count := map[string]int{}
	for _, c := range connections {
		if c.Server == server {
			count[c.End]++
		}
	}
	return count
}

// Idle connections say nothing, and tell each kind of end from the others: of four servers one is reset on the way, one ends,
// one falls silent, and one has nothing happen to it.
func TestIdleClients(t *testing.T) {
	const each = 30
	ctx := t.Context()
	topology := mustOpen(t, OneArm, "idle", Options{Backends: 4, ClientAddresses: 4, Masquerade: true, Unhidden: 1})
	clients := mustIdle(t, topology.Clients)
	passed, err := topology.Clients.Capture(ClientsInterface, func(frame []byte) bool {
		return frame[12] == 8 && frame[13] == 0 && frame[23] == unix.IPPROTO_TCP || frame[12] == 0x86 && frame[20] == unix.IPPROTO_TCP
	})
	if err != nil {
		t.Fatal(err)
	}
	var servers []*Server
	opened := time.Now()
	for i, backend := range topology.Backends() {
		servers = append(servers, mustServer(t, backend.Node))
		family := families[i%2]
		err := clients.Open(ctx, OpenOptions{
			Target: netip.AddrPortFrom(backend.Address(family), port), Sources: topology.ClientAddresses(family), Count: each,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	all := mustIdleConnections(t, clients)
	for _, c := range all {
		hidden := !slices.Contains(topology.ClientAddresses(c.Local.Addr())[3:], c.Local.Addr())
		if router := topology.RouterAddress(c.Local.Addr()); (c.Seen.Addr() == router) != hidden || !hidden && c.Seen != c.Local {
			t.Errorf("%v is seen as %v; hidden %v", c.Local, c.Seen, hidden)
		}
		if c.Sent != 1 || c.Echoed != 1 || c.End != "" || c.Greeted.Before(opened) {
			t.Errorf("a connection just opened: %+v", c)
		}
	}
	if len(all) != 4*each {
		t.Fatalf("%d connections, want %d", len(all), 4*each)
	}

	// The kernel acknowledges the first echo when it likes to, a fifth of a second later at most.
	await(t, "silence", func() bool {
		frames := passed.Frames()
		return time.Since(frames[len(frames)-1].At) > 300*time.Millisecond
	})
	before := len(passed.Frames())

	// What connections of a server are answered on the way.
	mustNft(t, topology.Router, fmt.Sprintf(`table inet fault { chain c { type filter hook forward priority 0
		ip daddr %v meta l4proto tcp reject with tcp reset
	}
	}`, topology.Backends()[0].IPv4))
	if err := topology.Clients.Sysctl("net.ipv4.tcp_retries2", "1"); err != nil { // 0.2 s and 0.4 s
		t.Fatal(err)
	}
	if err := topology.Backends()[2].Unplug(BackendInterface); err != nil {
		t.Fatal(err)
	}
	// Those who send nothing hear nothing of all this; a server's end is heard.
	if err := servers[1].Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, "the killed server's connections to end", func() bool {
		return ends(mustIdleConnections(t, clients), "ws2")[EndClosed] == each
	})
	all = mustIdleConnections(t, clients)
	if got := ends(all, "ws1")[""] + ends(all, "ws3")[""] + ends(all, "ws4")[""]; got != 3*each {
		t.Errorf("%d live, want %d: %+v", got, 3*each, all)
	}
	if err := passed.Close(); err != nil {
		t.Fatal(err)
	}
	for _, frame := range passed.Frames()[before:] {
		if server := topology.Backends()[1].IPv6.As16(); !slices.Contains([]string{string(frame.Data[22:38]), string(frame.Data[38:54])},
			string(server[:])) {
			t.Errorf("an idle connection was not: %x", frame.Data)
		}
	}

	if err := clients.Echo(ctx); err != nil {
		t.Fatal(err)
	}
	all = mustIdleConnections(t, clients)
	for server, want := range map[string]string{"ws1": EndReset, "ws2": EndClosed, "ws3": EndTimedOut, "ws4": ""} {
		if got := ends(all, server); got[want] != each {
			t.Errorf("%s: %v, want all %q", server, got, want)
		}
	}
	for _, c := range all {
		if c.Server == "ws4" && (c.Sent != 2 || c.Echoed != 2) || c.Wrong != "" || (c.End == "") != c.Ended.IsZero() {
			t.Errorf("at last: %+v", c)
		}
	}

	// A machine that is plugged in again goes on as if nothing had been.
	if err := topology.Backends()[3].Unplug(BackendInterface); err != nil {
		t.Fatal(err)
	}
	if err := topology.Clients.Sysctl("net.ipv4.tcp_retries2", "15"); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := clients.Echo(short); err == nil {
		t.Error("echoes came from a machine that is unplugged")
	}
	if err := topology.Backends()[3].Plug(BackendInterface); err != nil {
		t.Fatal(err)
	}
	if err := clients.Talk(ctx, IdleTalk{Every: 20 * time.Millisecond, Server: "ws4"}); err != nil {
		t.Fatal(err)
	}
	await(t, "messages of all connections to be echoed", func() bool {
		return !slices.ContainsFunc(mustIdleConnections(t, clients), func(c IdleConnection) bool { return c.Server == "ws4" && c.Echoed < 10 })
	})
	if err := clients.Talk(ctx, IdleTalk{}); err != nil {
		t.Fatal(err)
	}
	if err := clients.Echo(ctx); err != nil {
		t.Fatal(err)
	}
	if all = mustIdleConnections(t, clients); ends(all, "ws4")[""] != each {
		t.Errorf("plugged in again: %v", ends(all, "ws4"))
	}
	if err := servers[3].Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := clients.Close(ctx); err != nil {
		t.Error(err)
	}
	if _, err := OneArm("unhidden", Options{ClientAddresses: 2, Masquerade: true, Unhidden: 3}); err == nil {
		t.Error("more addresses than there are were left unhidden")
	}
	if err := topology.Router.Unplug("eth9"); err == nil {
		t.Error("an interface that is not there was unplugged")
	}
}

// A router that masquerades may drop what fits no connection: such as a segment without any flag.
func TestDropInvalid(t *testing.T) {
	for _, drop := range []bool{false, true} {
		t.Run(fmt.Sprint(drop), func(t *testing.T) {
			topology := mustOpen(t, OneArm, "invalid", Options{Backends: 1, ClientAddresses: 1, Masquerade: true, DropInvalid: drop})
			backend := topology.Backends()[0]
			serveNames(t, backend.Node, port)
			seen, err := backend.Capture(BackendInterface, func(frame []byte) bool {
				return frame[12] == 8 && frame[13] == 0 && frame[23] == unix.IPPROTO_TCP && frame[47] == 0
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := topology.Clients.Do(func() error {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				segment := make([]byte, 20)
				segment[0], segment[2], segment[3], segment[12] = 0x50, port>>8, port&0xff, 5<<4
				return unix.Sendto(fd, segment, 0, &unix.SockaddrInet4{Addr: backend.IPv4.As4()})
			}); err != nil {
				t.Fatal(err)
			}
			// What comes after it has passed the router after it.
			wantAnswer(t, topology.Clients, topology.ClientAddresses(backend.IPv4)[0], netip.AddrPortFrom(backend.IPv4, port),
				"ws1 "+topology.RouterAddress(backend.IPv4).String())
			if err := seen.Close(); err != nil {
				t.Fatal(err)
			}
			if got := len(seen.Frames()) > 0; got == drop {
				t.Errorf("the segment came through: %v", got)
			}
		})
	}
}
