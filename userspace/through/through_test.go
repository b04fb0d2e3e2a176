package through

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
)

const (
	soon = 5 * time.Second        // for what comes
	late = 400 * time.Millisecond // for what does not
)

// TestForms goes through every method in every pair of families: to a backend with the service's address and open
// tunnels, to one that opens none, and to one without the address, which routes.
func TestForms(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 3)
	good, shut, stray := w.backends[0], w.backends[1], w.backends[2]
	good.hold()
	good.open()
	shut.hold()
	stray.open()
	stray.route()
	for _, b := range w.backends {
		b.serve()
	}
	s := w.stack()
	var captures []*capture
	for _, b := range w.backends {
		captures = append(captures, w.edge.capture(b.device))
	}
	for _, f := range forms() {
		t.Run(f.String(), func(t *testing.T) {
			w := *w
			w.TB = t
			for size := range 2 {
				w.wantAnswer(s, f, good, size*64<<10)
			}
			if f.method == maps.MethodDSR {
				w.wantAnswer(s, f, shut, 1)
			} else {
				w.wantTimeout(s, f, shut)
			}
			// It sends the packet back by its default route, to the edge, whose data plane would pass it on to the good one.
			before := w.verdict("drop_ttl")
			w.wantTimeout(s, f, stray)
			if n := w.verdict("drop_ttl"); n != before+1 {
				t.Errorf("%d packets came back from a backend that routes, of which there was one", n-before)
			}
		})
	}
	s.wantIdle(t)
	if c := s.Counts(); c.Strange != 0 || c.Unsent != 0 || c.Sent == 0 || c.Received == 0 {
		t.Errorf("counts: %+v", c)
	}
	for _, c := range captures {
		for _, frame := range c.find(fromHost) {
			t.Errorf("the host's own stack took part: % x", frame)
		}
	}
}

func (w *world) wantAnswer(s *Stack, f form, b *backend, size int) {
	w.Helper()
	d := w.destination(f, b)
	server, client, err := s.ask(d, size, soon)
	if err != nil {
		w.Fatalf("%v, %d bytes: %v", b.serverName, size, err)
	}
	if server != b.serverName {
		w.Errorf("%s answered in place of %s", server, b.serverName)
	}
	from := b.edge4
	if f.service.Addr().Is6() {
		from = b.edge6
	}
	if at, err := netip.ParseAddrPort(client); err != nil || at.Addr().Unmap() != from {
		w.Errorf("%s saw a client %s: want one at %v", b.serverName, client, from)
	}
}

func (w *world) wantTimeout(s *Stack, f form, b *backend) {
	w.Helper()
	_, err := s.dialOnce(w.destination(f, b), late)
	var timeout net.Error
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		w.Errorf("%s: %v: want a timeout", b.serverName, err)
	}
}

// fromHost says whether a frame carries TCP that the host's own stack has sent: ours is known by its time to live.
func fromHost(frame []byte) bool {
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		return frame[23] == unix.IPPROTO_TCP && frame[22] != hops
	case unix.ETH_P_IPV6:
		return frame[20] == unix.IPPROTO_TCP && frame[21] != hops
	}
	return false
}

// resets says whether a frame by dsr over IPv4 is a RST.
func resets(frame []byte) bool {
	return binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IP && frame[23] == unix.IPPROTO_TCP && frame[47]&4 != 0
}

// TestHostAnswers shows that the test would see it: where the data plane does not know the ports, the host answers RST.
func TestHostAnswers(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	s := w.stack()
	w.must(w.manager.SetCheckPorts(nil))
	c := w.edge.capture(b.device)
	w.wantTimeout(s, forms()[0], b)
	eventually(t, "a RST of the host's", func() bool {
		return len(c.find(func(f []byte) bool { return fromHost(f) && resets(f) })) > 0
	})
	w.must(w.manager.SetCheckPorts(s.Ports()))
	w.wantAnswer(s, forms()[0], b, 1)
}

func dsr(port uint16) form { return form{maps.MethodDSR, netip.AddrPortFrom(service4, port), 4} }

// TestEnds ends connections in every way there is: no port is kept, nothing is left at the backend.
func TestEnds(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	const ports = 4
	s := w.stack(ChoosePorts(32768, 60999, nil)[:ports]...)
	c := w.edge.capture(b.device)
	open := func(t *testing.T, port uint16) net.Conn {
		t.Helper()
		c, err := s.dialOnce(w.destination(dsr(port), b), soon)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	// More often than there are ports: one that is kept would be missed.
	for name, end := range map[string]func(t *testing.T){
		"refused": func(t *testing.T) {
			_, err := s.dialOnce(w.destination(dsr(portClosed), b), soon)
			if !errors.Is(err, syscall.ECONNREFUSED) || !strings.HasSuffix(err.Error(), "->192.0.2.10:9000: connect: connection refused") {
				t.Errorf("%v: want it refused", err)
			}
		},
		"given up": func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			silent := w.destination(forms()[2], b) // it opens no tunnels
			failed := make(chan error)
			go func() {
				_, err := s.Dialer(func() (Destination, error) { return silent, nil })(ctx, "tcp", silent.Service.String())
				failed <- err
			}()
			eventually(t, "a port is in use", func() bool { return len(s.free) < len(s.ports) })
			cancel()
			if err := <-failed; !errors.Is(err, context.Canceled) {
				t.Errorf("%v: want it given up", err)
			}
		},
		"closed here": func(t *testing.T) {
			if err := open(t, 8000).Close(); err != nil {
				t.Error(err)
			}
		},
		"aborted here": func(t *testing.T) {
			c := open(t, portDeaf)
			before := len(s.free)
			if err := errors.Join(c.(interface{ SetLinger(int) error }).SetLinger(0), c.Close()); err != nil {
				t.Error(err)
			}
			if now := len(s.free); now != before+1 {
				t.Errorf("%d ports are free after %d: want one more, at once", now, before)
			}
		},
		"closed there": func(t *testing.T) {
			c := open(t, portFirst)
			if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("read: %d, %v: want the end", n, err)
			}
			c.Close()
			c.Close()
		},
		"reset there": func(t *testing.T) {
			c := open(t, portReset)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read: %v: want a reset", err)
			}
			c.Close()
		},
		"late": func(t *testing.T) {
			c := open(t, portDeaf)
			if err := c.SetDeadline(time.Now().Add(time.Millisecond)); err != nil {
				t.Error(err)
			}
			_, err := c.Read(make([]byte, 1))
			var timeout net.Error
			if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Errorf("read: %v: want a timeout", err)
			}
			c.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range 3 * ports {
				end(t)
			}
			s.wantIdle(t)
		})
	}
	// The deaf backend was told by RST, each time.
	told := make(map[string]bool)
	eventually(t, "a RST for each connection to the deaf backend", func() bool {
		for _, frame := range c.find(resets) {
			if port := binary.BigEndian.Uint16(frame[36:]); port == portDeaf {
				told[string(frame[34:36])+string(frame[38:42])] = true
			}
		}
		return len(told) == 2*3*ports // late, and aborted here
	})
	if hosts := c.find(fromHost); len(hosts) != 0 {
		t.Errorf("the host's own stack took part: % x", hosts[0])
	}
}

// TestPorts: a port has one connection at a time, the longest unused comes first, and who finds none waits.
func TestPorts(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	ports := ChoosePorts(32768, 60999, nil)[:3]
	s := w.stack(ports...)
	d := w.destination(dsr(8000), b)
	local := func(c net.Conn) uint16 { return uint16(c.LocalAddr().(*net.TCPAddr).Port) }
	for i := range 9 {
		c, err := s.dialOnce(d, soon)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := local(c), ports[i%3]; got != want {
			t.Errorf("connection %d came from port %d: want %d", i, got, want)
		}
		c.Close()
		s.wantIdle(t)
	}
	var open []net.Conn
	for range ports {
		c, err := s.dialOnce(d, soon)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	if c, err := s.dialOnce(d, late); !errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a fourth of three ports: %v, %v", c, err)
	}
	type result struct {
		c   net.Conn
		err error
	}
	waiting := make(chan result)
	go func() {
		c, err := s.dialOnce(d, soon)
		waiting <- result{c, err}
	}()
	port := local(open[1])
	open[1].Close()
	r := <-waiting
	if r.err != nil || local(r.c) != port {
		t.Fatalf("after port %d was given back: %v, %v", port, r.c, r.err)
	}
	for _, c := range append(open, r.c) {
		c.Close()
	}
	s.wantIdle(t)
}

// TestMany: 2,000 connections one after another, which is more than there are ports, ended by either side; then 256 at
// once, each with an answer that takes many packets.
func TestMany(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 2)
	for _, b := range w.backends {
		b.hold()
		b.serve()
	}
	s := w.stack()
	start := time.Now()
	for i := range 2000 {
		port := uint16(8000)
		if i%2 == 0 {
			port = portFirst
		}
		c, err := s.dialOnce(w.destination(dsr(port), w.backends[i/2%2]), soon)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.Close()
	}
	t.Logf("2,000 connections one after another in %v", time.Since(start).Round(time.Millisecond))
	s.wantIdle(t)

	start = time.Now()
	var many sync.WaitGroup
	errs := make(chan error, 256)
	for i := range cap(errs) {
		many.Go(func() {
			b := w.backends[i%2]
			server, _, err := s.ask(w.destination(dsr(8000), b), 64<<10, 6*soon)
			if err == nil && server != b.serverName {
				err = fmt.Errorf("%s answered in place of %s", server, b.serverName)
			}
			errs <- err
		})
	}
	many.Wait()
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	t.Logf("256 connections at once, 64 KiB each, in %v: %+v", time.Since(start).Round(time.Millisecond), s.Counts())
	s.wantIdle(t)
}

// TestCrowd: as many connections as there are ports, open and silent, take a bounded room and no goroutine each.
func TestCrowd(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	s := w.stack()
	d := w.destination(dsr(portDeaf), b)
	memory := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	// The first connection makes what all share.
	first, err := s.dialOnce(d, soon)
	if err != nil {
		t.Fatal(err)
	}
	goroutines, before := runtime.NumGoroutine(), memory()
	open := []net.Conn{first}
	for range len(s.ports) - 1 {
		c, err := s.dialOnce(d, soon)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	eventually(t, "the backend has taken them all", func() bool { return runtime.NumGoroutine() <= goroutines+1 })
	room := (memory() - before) / uint64(len(open)-1)
	t.Logf("%d connections open: %d bytes each, both ends", len(open), room)
	// Ours holds bufferSize for what is unread only where there is something; the test's own server has its share.
	if room > bufferSize {
		t.Errorf("a silent connection takes %d bytes", room)
	}
	for _, c := range open {
		if err := c.(*conn).SetLinger(0); err != nil {
			t.Error(err)
		}
		c.Close()
	}
	s.wantIdle(t)
}

// TestRestart: a stack that has just been started knows nothing of the connections that its backends have seen end. They
// come again from the same port.
func TestRestart(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	d := w.destination(dsr(portFirst), b)
	for i := range 12 {
		s := w.stack(ChoosePorts(32768, 60999, nil)[0])
		c, err := s.dialOnce(d, soon)
		if err != nil {
			t.Fatalf("start %d: %v", i, err)
		}
		// The backend ends it first: TIME_WAIT is there.
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Error(err)
		}
		c.Close()
		s.wantIdle(t)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRefused: what can't be done is said, and takes no port.
func TestRefused(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	s := w.stack()
	ok := w.destination(dsr(8000), b)
	tunnel := w.destination(forms()[2], b)
	for _, test := range []struct {
		name, network, address, want string
		d                            Destination
		change                       func(*Destination) error
	}{
		{"lookup", "tcp", "", "who is that", ok, func(*Destination) error { return errors.New("who is that") }},
		{"network", "udp", "", "unknown network udp", ok, nil},
		{"elsewhere", "tcp", "192.0.2.10:8001", "192.0.2.10:8001: a check through dsr goes to 192.0.2.10:8000 alone", ok, nil},
		{"name", "tcp", "chat.example:8000", "goes to 192.0.2.10:8000 alone", ok, nil},
		{"no next hop", "tcp", "", "no next hop to 10.0.0.2: nobody answers", ok, func(d *Destination) error {
			d.Hop = maps.NextHop{Reason: "nobody answers"}
			return nil
		}},
		{"router", "tcp", "", "10.0.0.2 is behind a router: dsr takes a backend that is on-link", ok, func(d *Destination) error {
			d.Hop.Gateway = true
			return nil
		}},
		{"method", "tcp", "", "method fullnat: checks go through dsr, ipip and gue alone", ok, func(d *Destination) error {
			d.Method = maps.MethodFullNAT
			return nil
		}},
		{"no outer source", "tcp", "", "no outer source address for 10.0.0.2", tunnel, func(d *Destination) error {
			d.TunnelSource = netip.Prefix{}
			return nil
		}},
		{"outer source of the other family", "tcp", "", "no outer source address for 10.0.0.2", tunnel, func(d *Destination) error {
			d.TunnelSource = netip.MustParsePrefix("fd00::/64")
			return nil
		}},
		{"interface gone", "tcp", "", "send by interface 4711: no such device or address", ok, func(d *Destination) error {
			d.Hop.Interface = 4711
			return nil
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := test.d
			address := test.address
			if address == "" {
				address = d.Service.String()
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := s.Dialer(func() (Destination, error) {
				var err error
				if test.change != nil {
					err = test.change(&d)
				}
				return d, err
			})(ctx, test.network, address)
			if err == nil || !strings.HasSuffix(err.Error(), test.want) {
				t.Errorf("%v: want …%s", err, test.want)
			}
			s.wantIdle(t)
		})
	}
	w.edge.within(func() error {
		if _, err := New(Options{}); err == nil {
			t.Error("a stack without ports")
		}
		return nil
	})
}

// TestDown: where the device is down, the reason is told, and at once.
func TestDown(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 2)
	b := w.backends[0]
	b.hold()
	b.serve()
	s := w.stack()
	d := w.destination(dsr(portDeaf), b)
	c, err := s.dialOnce(d, soon)
	if err != nil {
		t.Fatal(err)
	}
	w.must(w.edge.LinkSetDown(w.edge.link(b.device)))
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	_ = c.SetDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("read: %v: want it to say that the device is down", err)
	}
	c.Close()
	if _, err := s.dialOnce(d, patience); !errors.Is(err, syscall.ENETDOWN) {
		t.Errorf("dial: %v: want it to say that the device is down", err)
	}
	s.wantIdle(t)
}

// TestUnfinishedChecksums: a backend in a namespace of the same host may leave checksums to a card that is not there.
func TestUnfinishedChecksums(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	s := w.stack()
	b.offload("e0", true)
	w.wantAnswer(s, forms()[0], b, 1)
	w.wantAnswer(s, forms()[1], b, 1)
}

// TestGeneric: the same where the kernel runs the data plane for the driver.
func TestGeneric(t *testing.T) {
	w := newWorld(t, loader.ModeGeneric, 1)
	b := w.backends[0]
	b.hold()
	b.open()
	b.serve()
	s := w.stack()
	for _, f := range forms() {
		w.wantAnswer(s, f, b, 64<<10)
	}
}

// TestClose: what is open ends, what is being opened fails, and nothing opens any more.
func TestClose(t *testing.T) {
	w := newWorld(t, loader.ModeNative, 1)
	b := w.backends[0]
	b.hold()
	b.serve()
	s := w.stack()
	d := w.destination(dsr(portDeaf), b)
	open, err := s.dialOnce(d, soon)
	if err != nil {
		t.Fatal(err)
	}
	silent := w.destination(form{maps.MethodIPIP, forms()[2].service, 4}, b)
	failed := make(chan error)
	go func() {
		_, err := s.dialOnce(silent, patience)
		failed <- err
	}()
	eventually(t, "two ports are in use", func() bool { return len(s.free) == len(s.ports)-2 })
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-failed; err == nil {
		t.Error("a connection opened to a backend that opens no tunnels")
	}
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("read: no error after the stack was closed")
	}
	open.Close()
	if _, err := s.dialOnce(d, soon); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial: %v: want it closed", err)
	}
}
