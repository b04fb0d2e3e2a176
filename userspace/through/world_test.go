package through

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"fairlead/loader"
	"fairlead/maps"
)

var (
	service4 = netip.MustParseAddr("192.0.2.10")
	service6 = netip.MustParseAddr("2001:db8::10")
)

// form is a method with its families: the service's, and the one that carries frames to the backend.
type form struct {
	method  maps.Method
	service netip.AddrPort
	carrier int // 4 or 6
}

func (f form) String() string {
	inner := 6
	if f.service.Addr().Is4() {
		inner = 4
	}
	if f.method == maps.MethodDSR {
		return fmt.Sprintf("dsr-%d", inner)
	}
	return fmt.Sprintf("%v-%din%d", f.method, inner, f.carrier)
}

// forms are all of them, each with a service port of its own.
func forms() (all []form) {
	for _, method := range []maps.Method{maps.MethodDSR, maps.MethodIPIP, maps.MethodGUE} {
		for _, service := range []netip.Addr{service4, service6} {
			for _, carrier := range []int{4, 6} {
				if method == maps.MethodDSR && service.Is4() != (carrier == 4) {
					continue
				}
				all = append(all, form{method, netip.AddrPortFrom(service, uint16(8000+len(all))), carrier})
			}
		}
	}
	return all
}

// Ports of further services by dsr, which every backend that has the service's address answers in its own way.
const (
	portClosed = 9000 + iota // nobody listens
	portReset                // ended by RST as soon as something was said
	portDeaf                 // accepted, and never closed
	portFirst                // closed by the server, as soon as it is open
)

// world is an edge with the real data plane, and backends on cables of their own. All backends route by the edge.
type world struct {
	testing.TB
	edge     *namespace
	backends []*backend
	programs *loader.Loader
	manager  *maps.Manager
}

type backend struct {
	*namespace
	device     string // of the edge
	v4, v6     netip.Addr
	edge4      netip.Addr
	edge6      netip.Addr
	hop        maps.NextHop
	serverName string
}

var all = loader.Settings{
	IPv4: true, IPv6: true, TCP: true, UDP: true, DSR: true, Tunnel: true, Checks: true, Connections: 4096, HalfOpen: 4096,
}

// newWorld makes an edge with so many backends. Services' rings hold the first backend alone.
func newWorld(tb testing.TB, mode loader.XDPMode, count int) *world {
	tb.Helper()
	w := &world{TB: tb, edge: mustNamespace(tb)}
	var devices []string
	for i := range count {
		w.backends = append(w.backends, w.addBackend(i))
		devices = append(devices, w.backends[i].device)
	}
	pins := pinPrefix + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(int(namespaceNumber.Add(1)))
	tb.Cleanup(func() { w.edge.within(func() error { return removePins(pins) }) })
	w.edge.within(func() (err error) {
		w.programs, err = loader.Open(loader.Options{
			PinPath: pins, Interfaces: devices, Targets: devices, Mode: mode, Settings: all, Logger: slog.New(slog.DiscardHandler),
		})
		return err
	})
	tb.Cleanup(func() { w.programs.Close() })
	programs := w.programs.Programs()
	var err error
	w.manager, err = maps.NewManager(w.programs.Maps(), maps.ManagerOptions{
		Tend: programs.Tend, Fill: programs.Fill, Epoch: time.Second, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { w.manager.Close() })
	w.must(w.apply(w.wanted(), func(netip.Addr) maps.NextHop { return w.backends[0].hop }))
	w.edge.within(w.programs.Attach)
	return w
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) apply(wanted maps.Wanted, hop func(netip.Addr) maps.NextHop) error {
	_, err := w.manager.Apply(wanted, hop)
	return err
}

func (w *world) addBackend(number int) *backend {
	w.Helper()
	b := &backend{namespace: mustNamespace(w), device: fmt.Sprint("b", number), serverName: fmt.Sprint("backend", number)}
	net4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(number), 1}), 24)
	net6 := netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: byte(number), 15: 1}), 64)
	b.edge4, b.edge6, b.v4, b.v6 = net4.Addr(), net6.Addr(), net4.Addr().Next(), net6.Addr().Next()
	cable(w.edge, b.device, b.namespace, "e0")
	w.edge.add(b.device, net4, net6)
	b.add("e0", netip.PrefixFrom(b.v4, 24), netip.PrefixFrom(b.v6, 64))
	b.routeBy(b.edge4, b.edge6)
	if number == 0 {
		w.edge.routeBy(b.v4, b.v6) // the host could answer a service, if it were let
	}
	b.hop = maps.NextHop{
		Known: true, Interface: uint32(w.edge.link(b.device).Attrs().Index), MAC: b.mac("e0"), SourceMAC: w.edge.mac(b.device), MTU: 1500,
	}
	return b
}

// wanted is a service for each form, and those by dsr whose servers behave badly.
func (w *world) wanted() (wanted maps.Wanted) {
	list := forms()
	for port := uint16(portClosed); port <= portFirst; port++ {
		list = append(list, form{maps.MethodDSR, netip.AddrPortFrom(service4, port), 4})
	}
	for _, f := range list {
		d := w.destination(f, w.backends[0])
		wanted.Services = append(wanted.Services, maps.WantedService{
			Name: fmt.Sprint(f, "-", f.service.Port()), Keys: []netip.AddrPort{f.service}, Protocol: 6, RingSize: 251, IdleTimeout: time.Hour,
			Backends: []maps.WantedBackend{{
				Name: "first", Address: d.Backend, Port: f.service.Port(), Method: f.method, Weight: 1, Tunnel: d.TunnelSource,
			}},
		})
	}
	return wanted
}

// destination is the way to a backend in a form. The daemon's neighbours know the edge's address towards the backend.
func (w *world) destination(f form, b *backend) Destination {
	d := Destination{Service: f.service, Method: f.method, Backend: b.v4, Source: b.edge4, Hop: b.hop}
	tunnel := netip.MustParsePrefix("10.255.0.0/24")
	if f.carrier == 6 {
		d.Backend, d.Source, tunnel = b.v6, b.edge6, netip.MustParsePrefix("fd00:ff::/64")
	}
	if f.method != maps.MethodDSR {
		d.TunnelSource = tunnel
	}
	return d
}

// hold gives the backend the services' addresses.
func (b *backend) hold() {
	b.Helper()
	b.add("lo", netip.PrefixFrom(service4, 32), netip.PrefixFrom(service6, 128))
}

// route makes the backend a router.
func (b *backend) route() {
	b.Helper()
	b.sysctl("ipv4/ip_forward", "1")
	b.sysctl("ipv6/conf/all/forwarding", "1")
}

// open has the backend open tunnels.
func (b *backend) open() {
	b.Helper()
	pins := pinPrefix + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(int(namespaceNumber.Add(1)))
	b.Cleanup(func() { b.within(func() error { return removePins(pins) }) })
	b.within(func() error {
		d, err := loader.AttachDecap(loader.DecapOptions{
			Interface: "e0", PinPath: pins, Addresses: []netip.Addr{b.v4, b.v6}, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			return err
		}
		return d.Close()
	})
}

// serve has the backend serve all forms over HTTP, and be rude at the other ports. /SIZE is answered by so many bytes.
func (b *backend) serve() {
	b.Helper()
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.Atoi(r.URL.Path[1:])
		w.Header().Set("X-Server", b.serverName)
		w.Header().Set("X-Client", r.RemoteAddr)
		_, _ = w.Write(make([]byte, size))
	})}
	var serving sync.WaitGroup
	for _, f := range forms() {
		l := b.listen(f.service.Port())
		serving.Go(func() { _ = server.Serve(l) })
	}

	var mu sync.Mutex
	var kept []net.Conn
	var listeners []net.Listener
	for port, treat := range map[uint16]func(net.Conn){
		portReset: func(c net.Conn) {
			_, _ = c.Read(make([]byte, 1))
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		},
		portDeaf:  func(c net.Conn) { mu.Lock(); kept = append(kept, c); mu.Unlock() },
		portFirst: func(c net.Conn) { c.Close() },
	} {
		l := b.listen(port)
		listeners = append(listeners, l)
		serving.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				serving.Go(func() { treat(c) })
			}
		})
	}
	b.Cleanup(func() {
		server.Close()
		for _, l := range listeners {
			l.Close()
		}
		serving.Wait()
		for _, c := range kept {
			c.Close()
		}
	})
}

func (b *backend) listen(port uint16) (l net.Listener) {
	b.Helper()
	b.within(func() (err error) { l, err = net.Listen("tcp", fmt.Sprint(":", port)); return err })
	return l
}

// stack makes a running Stack on the edge, of which the data plane knows.
func (w *world) stack(ports ...uint16) *Stack {
	w.Helper()
	if len(ports) == 0 {
		ports = ChoosePorts(32768, 60999, nil)
	}
	frames, err := w.manager.Set().CheckFrames()
	w.must(err)
	var s *Stack
	w.edge.within(func() (err error) {
		s, err = New(Options{Frames: frames, Ports: ports, Source: w.manager.AddCheckSource, Logger: slog.New(slog.DiscardHandler)})
		return err
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	w.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, s.Close()); err != nil {
			w.Error(err)
		}
	})
	w.must(w.manager.SetCheckPorts(s.Ports()))
	return s
}

// wantIdle waits until no port has a connection.
func (s *Stack) wantIdle(tb testing.TB) {
	tb.Helper()
	eventually(tb, "all ports are free again", func() bool { return len(s.free) == len(s.ports) })
}

// ask opens a connection to a destination and asks for so many bytes over HTTP. It answers who served it, and whom.
func (s *Stack) ask(d Destination, size int, patience time.Duration) (server, client string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	transport := &http.Transport{
		DialContext: s.Dialer(func() (Destination, error) { return d, nil }), DisableKeepAlives: true,
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%v/%d", d.Service, size), nil)
	if err != nil {
		return "", "", err
	}
	answer, err := transport.RoundTrip(request)
	if err != nil {
		return "", "", err
	}
	defer answer.Body.Close()
	n, err := io.Copy(io.Discard, answer.Body)
	if err == nil && n != int64(size) {
		err = fmt.Errorf("%d bytes of %d came", n, size)
	}
	return answer.Header.Get("X-Server"), answer.Header.Get("X-Client"), err
}

func (s *Stack) dialOnce(d Destination, patience time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return s.Dialer(func() (Destination, error) { return d, nil })(ctx, "tcp", d.Service.String())
}

// verdict is how often a verdict was given, by its name.
func (w *world) verdict(name string) uint64 {
	w.Helper()
	totals, err := w.manager.Set().Counters.Totals()
	w.must(err)
	for i, n := range totals.Verdicts {
		if maps.Verdict(i).String() == name {
			return n
		}
	}
	w.Fatalf("no verdict is called %s", name)
	return 0
}
