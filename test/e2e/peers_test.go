package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/test/lab"
)

var bulk = flag.Int64("bulk", 64<<20, "bytes that go each way through the service in TestPeers")

const (
	httpPort  = 8080
	iperfPort = 5201
	dnsPort   = 53
)

// TestPeers is traffic between programs that nobody here wrote: Python's websockets behind the service, Node's ws in
// front of it; curl, wrk, iperf3 (TCP and UDP) and dig to dnsmasq through it. With one arm and with two, half of them
// behind a masquerading router, and some at addresses of the segment that nobody holds but XDP.
func TestPeers(t *testing.T) {
	t.Parallel()
	for i, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			build, options := arms(lab.OneArm), lab.Options{Masquerade: i%4 > 1, Services: lab.DefaultServices()}
			if i%2 == 1 {
				build = lab.TwoArm
			}
			if i%3 == 1 {
				options.Services = lab.SegmentServices(i%2 == 1)
			}
			topo, chat := mustTopology(t, build, f, 3, options)
			testPeers(t, f, topo, chat)
		})
	}
}

func testPeers(t *testing.T, f form, topo *lab.Topology, chat service) {
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	web := chat.at("tcp", httpPort)
	// Its control and data connections belong together: of one client all go to one backend.
	control, data := chat.at("tcp", iperfPort, "affinity: client"), chat.at("udp", iperfPort, "affinity: client")
	names := chat.at("udp", dnsPort)
	done := make(chan transfer, 1)
	for _, b := range topo.Backends() {
		mustStart(t, b.Node, "/usr/bin/python3", mustPath(t, "peers/server.py"), b.Name(), fmt.Sprint(websocketPort))
		mustServeIperf(t, b, f, chat)
		mustServeHTTP(t, b, done)
		mustServeNames(t, b)
	}
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 1s")
	e.write(chat, web, control, data, names)
	e.start()

	// Mixed families differ from plain ones by the tunnel's headers: what is many small packets need not be repeated.
	if f.clients == f.behind {
		t.Run("node ws to python websockets", func(t *testing.T) { nodeToPython(ctx, t, e, topo, chat) })
		t.Run("wrk", func(t *testing.T) { wrk(ctx, t, e, topo, web) })
		t.Run("iperf3", func(t *testing.T) { iperf(ctx, t, e, topo, control) })
	}
	t.Run("curl", func(t *testing.T) { curl(ctx, t, e, topo, web, done) })
	if f.tunnels() {
		t.Run("path", func(t *testing.T) { learnPath(t, f, e, topo, names) })
		// Whatever ran before: from here on the clients know what goes through the tunnel.
		uploadTo(ctx, t, e, topo, web, 1<<20, done)
	}
	t.Run("iperf3 udp", func(t *testing.T) { iperfUDP(ctx, t, e, topo, data) })
	t.Run("dig", func(t *testing.T) { dig(ctx, t, e, topo, names) })
	t.Run("long questions", func(t *testing.T) { longQuestions(t, e, topo, names) })
}

func nodeToPython(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, chat service) {
	if _, err := os.Stat(mustPath(t, "peers") + "/node_modules/ws"); err != nil {
		t.Fatalf("the Node package ws is missing (npm ci in test/e2e/peers; make test does it): %v", err)
	}
	out := mustRun(ctx, t, e, topo.Clients, "node", mustPath(t, "peers/client.js"), "ws://"+chat.addrPort().String(), "100", "8")
	var got struct {
		Open, Closed, Echoes, Bytes int
		Servers                     map[string]int
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got.Open != 100 || got.Closed != 100 || got.Echoes != 800 || len(got.Servers) != 3 {
		t.Errorf("want 100 opened and closed, 800 echoes, 3 servers; got %s", out)
	}
	t.Log(strings.TrimSpace(out))
}

// curl sends and fetches a large body and compares every byte.
func curl(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, web service, done <-chan transfer) {
	got := download(ctx, t, e, topo, web, *bulk, done)
	t.Logf("%d MiB from %s in %v", *bulk>>20, got.backend, got.took.Round(time.Millisecond))
	got = uploadTo(ctx, t, e, topo, web, *bulk, done)
	t.Logf("%d MiB to %s in %v", *bulk>>20, got.backend, got.took.Round(time.Millisecond))
}

func download(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, web service, size int64, done <-chan transfer) transfer {
	t.Helper()
	began := time.Now()
	out := mustRun(ctx, t, e, topo.Clients, "sh", "-c", fmt.Sprintf(
		"curl --silent --show-error --fail --globoff --max-time 200 'http://%v/told/%d' | sha256sum", web.addrPort(), size))
	told := <-done
	told.took = time.Since(began)
	if got, _, _ := strings.Cut(out, " "); got != checksum(size) {
		t.Errorf("%d bytes came from %s with checksum %s, want %s", size, told.backend, got, checksum(size))
	}
	return told
}

func uploadTo(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, web service, size int64, done <-chan transfer) transfer {
	t.Helper()
	file, err := patternFile()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	mustRun(ctx, t, e, topo.Clients, "sh", "-c", fmt.Sprintf(
		"head --bytes=%d %s | curl --silent --show-error --fail --globoff --max-time 200 --upload-file - 'http://%v/upload'",
		size, file, web.addrPort()))
	told := <-done
	told.took = time.Since(began)
	if told.sum != checksum(size) {
		t.Errorf("%d bytes went to %s with checksum %s, want %s", size, told.backend, told.sum, checksum(size))
	}
	return told
}

func wrk(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, web service) {
	out := mustRun(ctx, t, e, topo.Clients, "wrk", "--threads", "2", "--connections", "60", "--duration", "1s",
		"http://"+web.addrPort().String()+"/bytes/100")
	if strings.Contains(out, "Socket errors") || strings.Contains(out, "Non-2xx") || !strings.Contains(out, "requests in") {
		t.Errorf("wrk met errors:\n%s", out)
	}
	t.Log(regexp.MustCompile(`Requests/sec.*`).FindString(out))
}

// mustServeIperf starts an iperf3 server that answers from the address that clients ask: where packets arrive whole,
// that is the service's.
func mustServeIperf(t *testing.T, b *lab.Backend, f form, s service) {
	t.Helper()
	address := s.address
	if f.method == "fullnat" || f.method == "nat" {
		address = b.Address(s.address)
	}
	mustStart(t, b.Node, "iperf3", "--server", "--bind", address.String(), "--port", fmt.Sprint(iperfPort))
}

// iperfSum is what iperf3 tells of a test as a whole.
type iperfSum struct {
	BitsPerSecond float64 `json:"bits_per_second"`
	Packets       int     `json:"packets"`
	Lost          int     `json:"lost_packets"`
}

// mustIperf runs an iperf3 client. Between two tests its server closes its socket and opens another: who comes in between is
// refused by the backend, and comes again. Nobody is refused by the edge.
func mustIperf(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, s service, args ...string) iperfSum {
	t.Helper()
	set := e.open()
	before := e.countAll(set, "reset_")
	args = append([]string{"iperf3", "--client", s.address.String(), "--port", fmt.Sprint(iperfPort), "--json"}, args...)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out := mustRun(ctx, t, e, topo.Clients, args...)
		var got struct {
			Error string `json:"error"` // it exits as if all were well
			End   struct {
				UDP iperfSum `json:"sum"`
				TCP iperfSum `json:"sum_received"`
			} `json:"end"`
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		refused := strings.Contains(got.Error, "Connection refused") || strings.Contains(got.Error, "busy")
		switch {
		case got.Error == "" && got.End.UDP.Packets > 0: // what the receiver had not read yet at the end counts, too
			return got.End.UDP
		case got.Error == "" && got.End.TCP.BitsPerSecond > 0:
			return got.End.TCP
		case !refused || time.Now().After(deadline) || e.countAll(set, "reset_") != before:
			t.Fatalf("%v brought nothing: %s\n%s", args, got.Error, e.story())
		}
	}
}

func iperf(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, s service) {
	for _, direction := range [][]string{nil, {"--reverse"}} {
		sum := mustIperf(ctx, t, e, topo, s, append([]string{"--time", "1", "--parallel", "4"}, direction...)...)
		t.Logf("iperf3 %v: %.1f Gbit/s", direction, sum.BitsPerSecond/1e9)
	}
}

// iperfUDP sends a steady stream of datagrams each way, those of the path's size and those that take three fragments. None
// is lost on the way; a receiver that gets no CPU for long may lose some in its own socket, and says so.
func iperfUDP(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, s service) {
	full := func() (dropped int) {
		t.Helper()
		dropped = mustDroppedBySockets(t, topo.Clients)
		for _, b := range topo.Backends() {
			dropped += mustDroppedBySockets(t, b.Node)
		}
		return dropped
	}
	for _, form := range [][]string{nil, {"--reverse"}, {"--length", "4000"}, {"--length", "4000", "--reverse"}} {
		before, fragments := full(), mustCaptureFragments(t, topo.Clients, lab.ClientsInterface)
		sum := mustIperf(ctx, t, e, topo, s, append([]string{"--udp", "--bitrate", "5M", "--bytes", "256K"}, form...)...)
		packets, lost, dropped := sum.Packets, sum.Lost, full()-before
		if lost > dropped {
			t.Errorf("iperf3 --udp %v: %d of %d datagrams are lost, %d of them in full sockets\n%s", form, lost, packets, dropped, e.story())
		}
		if n, large := fragments(), len(form) > 1; large && n < packets-lost {
			t.Errorf("iperf3 --udp %v: %d first fragments of %d datagrams passed the clients", form, n, packets)
		}
		t.Logf("iperf3 --udp %v: %d datagrams, %d lost, %d in full sockets", form, packets, lost, dropped)
	}
}

// mustDroppedBySockets counts the datagrams that a node's sockets had no room for.
func mustDroppedBySockets(t *testing.T, n *lab.Node) (dropped int) {
	t.Helper()
	if err := n.Do(func() error {
		// Over IPv4, a line of names stands before one of values; over IPv6, each name before its value.
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		text6, err := os.ReadFile("/proc/thread-self/net/snmp6")
		if err != nil {
			return err
		}
		found := 0
		var names []string
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if at := slices.Index(names, "RcvbufErrors"); at >= 0 && fields[0] == "Udp:" {
				if _, err := fmt.Sscan(fields[at], &dropped); err != nil {
					return err
				}
				found++
			}
			if names = nil; fields[0] == "Udp:" && found == 0 {
				names = fields
			}
		}
		for line := range strings.Lines(string(text6)) {
			if tail, is := strings.CutPrefix(line, "Udp6RcvbufErrors"); is {
				var dropped6 int
				if _, err := fmt.Sscan(tail, &dropped6); err != nil {
					return err
				}
				dropped += dropped6
				found++
			}
		}
		if found != 2 {
			return fmt.Errorf("%d of 2 counters are there", found)
		}
		return nil
	}); err != nil {
		t.Fatalf("count what the sockets of %s had no room for: %v", n.Name(), err)
	}
	return dropped
}

// mustCaptureFragments counts the first fragments that pass an interface until it is asked.
func mustCaptureFragments(t *testing.T, n *lab.Node, interfaceName string) func() int {
	t.Helper()
	const network, more4, fragment6 = 14, 0x2000, 44
	capture, err := n.Capture(interfaceName, func(frame []byte) bool {
		if len(frame) < network+48 {
			return false
		}
		packet := frame[network:]
		switch binary.BigEndian.Uint16(frame[network-2:]) {
		case unix.ETH_P_IP:
			return binary.BigEndian.Uint16(packet[6:]) == more4
		case unix.ETH_P_IPV6:
			return packet[6] == fragment6 && binary.BigEndian.Uint16(packet[42:]) == 1
		}
		return false
	})
	if err != nil {
		t.Fatal(err)
	}
	return func() int {
		if err := capture.Close(); err != nil {
			t.Error(err)
		}
		return len(capture.Frames())
	}
}

// longText is a TXT record of more bytes than a packet of Ethernet has, in strings as long as DNS takes them.
var longText = func() (list []string) {
	for i := range 12 {
		list = append(list, fmt.Sprintf("%02d-%s", i, strings.Repeat(string(rune('a'+i)), 250)))
	}
	return list
}()

// mustServeNames starts a DNS server that knows its own name and a long text. It gives answers of 4096 bytes where asked to.
func mustServeNames(t *testing.T, b *lab.Backend) {
	t.Helper()
	mustStart(t, b.Node, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--user=root", "--log-facility=-",
		fmt.Sprintf("--port=%d", dnsPort), "--no-resolv", "--no-hosts", "--edns-packet-max=4096",
		"--txt-record=name.test,"+b.Name(), "--txt-record=long.test,"+strings.Join(longText, ","))
}

// dig asks DNS questions over UDP alone: small ones, and such as have answers of several fragments.
func dig(ctx context.Context, t *testing.T, e *edge, topo *lab.Topology, s service) {
	ask := func(question string, times int) []string {
		t.Helper()
		file := filepath.Join(t.TempDir(), "questions")
		mustWrite(t, file, strings.NewReader(strings.Repeat(question+"\n", times)))
		// Each question comes from a port of its own.
		out := mustRun(ctx, t, e, topo.Clients, "dig", "@"+s.address.String(), "-p", fmt.Sprint(dnsPort), "+notcp", "+ignore",
			"+bufsize=4096", "+tries=1", "+timeout=3", "+short", "-f", file)
		return strings.Split(strings.TrimSpace(out), "\n")
	}
	// So many that chance leaves no server out.
	const small = 60
	seen := map[string]int{}
	for _, name := range ask("name.test TXT", small) {
		seen[strings.Trim(name, "\"")]++
	}
	if total := seen["ws1"] + seen["ws2"] + seen["ws3"]; total != small || len(seen) != 3 {
		t.Errorf("%d questions were answered by %v, want each of 3 servers some", small, seen)
	}
	const each = 24
	fragments := mustCaptureFragments(t, topo.Clients, lab.ClientsInterface)
	answers, want := ask("long.test TXT", each), `"`+strings.Join(longText, `" "`)+`"`
	for i, answer := range answers {
		if answer != want {
			t.Fatalf("answer %d of %d is %.200q (%d bytes), want %.200q (%d bytes)", i+1, len(answers), answer, len(answer), want,
				len(want))
		}
	}
	if n := fragments(); len(answers) != each || n < each {
		t.Errorf("%d of %d long answers came, in fragments %d", len(answers), each, n)
	}
}

// question asks for the long text, and is longer itself than a packet of Ethernet by padding (RFC 7830). dig would send the
// like of it over TCP.
func question(id uint16) []byte {
	const (
		padding    = 2000
		typeTXT    = 16
		typeOPT    = 41
		optPadding = 12
	)
	q := binary.BigEndian.AppendUint16(nil, id)
	q = append(q, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1) // one question, one additional record
	q = append(q, "\x04long\x04test\x00"...)
	q = append(q, 0, typeTXT, 0, 1)
	q = append(q, 0, 0, typeOPT)
	q = binary.BigEndian.AppendUint16(q, 4096) // so long may the answer be
	q = append(q, 0, 0, 0, 0)
	q = binary.BigEndian.AppendUint16(q, padding+4)
	q = append(q, 0, optPadding)
	q = binary.BigEndian.AppendUint16(q, padding)
	return append(q, make([]byte, padding)...)
}

// longQuestions asks questions that begin with a fragment. Each is the first packet of a flow.
func longQuestions(t *testing.T, e *edge, topo *lab.Topology, s service) {
	const each = 24
	fragments := mustCaptureFragments(t, topo.Clients, lab.ClientsInterface)
	for id := range uint16(each) {
		var answer []byte
		err := topo.Clients.Do(func() error {
			conn, err := net.Dial("udp", s.addrPort().String())
			if err != nil {
				return err
			}
			defer conn.Close()
			if _, err := conn.Write(question(id)); err != nil {
				return err
			}
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			answer = make([]byte, 4096)
			n, err := conn.Read(answer)
			answer = answer[:n]
			return err
		})
		if err != nil {
			t.Fatalf("question %d: %v\n%s", id, err, e.story())
		}
		// A string of a TXT record stands behind its length.
		var want []byte
		for _, text := range longText {
			want = append(append(want, byte(len(text))), text...)
		}
		if len(answer) < 2 || binary.BigEndian.Uint16(answer) != id || !bytes.Contains(answer, want) {
			t.Fatalf("the answer to question %d is %.200q (%d bytes)", id, answer, len(answer))
		}
	}
	if n := fragments(); n < 2*each {
		t.Errorf("%d questions and answers in fragments had %d first ones", each, n)
	}
}

// learnPath sends fragments as long as the clients' own wire takes: too long for a tunnel. Over IPv6 their sender is told. Over
// IPv4 fragments may be fragmented again, which the edge does not: they are dropped by name.
func learnPath(t *testing.T, f form, e *edge, topo *lab.Topology, s service) {
	set, verdict := e.open(), "answer_too_big"
	if f.clients == 4 {
		verdict = "drop_too_big"
	}
	if err := topo.Clients.ForgetPaths(); err != nil {
		t.Fatal(err)
	}
	before := e.count(set, verdict)
	err := topo.Clients.Do(func() error {
		conn, err := net.Dial("udp", s.addrPort().String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write(question(0))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	e.until("a packet has the verdict "+verdict, func() bool { return e.count(set, verdict) > before })
	want := wholeMTU
	if f.clients == 6 {
		want -= f.overhead()
	}
	e.until(fmt.Sprintf("the clients take the path to have %d bytes", want), func() bool {
		mtu, err := topo.Clients.PathMTU(s.address)
		return err == nil && mtu == want
	})
}

func mustPath(t *testing.T, path string) string {
	t.Helper()
	abs, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return abs
}

func mustStart(t *testing.T, node *lab.Node, argv ...string) {
	t.Helper()
	if _, err := node.Start(node.Command(context.Background(), argv...)); err != nil {
		t.Fatal(err)
	}
}

// mustRun runs a program to its end; servers may have only just been started, so it is tried for some seconds.
func mustRun(ctx context.Context, t *testing.T, e *edge, node *lab.Node, argv ...string) string {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		cmd := node.Command(ctx, argv...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err == nil {
			return string(out)
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			t.Fatalf("%.500q: %v: %s%.500s\n%s", argv, err, stderr.String(), out, e.story())
		}
	}
}

// pattern is the same bytes each time.
func pattern() io.Reader { return rand.NewChaCha8([32]byte{}) }

// patternFile holds the pattern's beginning, as much as any test sends.
var patternFile = sync.OnceValues(func() (string, error) {
	dir, err := scratch()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "pattern")
	return path, writeFile(path, io.LimitReader(pattern(), max(*bulk, *pathBulk)))
})

// checksum is that of so many bytes of the pattern.
func checksum(size int64) string {
	known, _ := checksums.LoadOrStore(size, sync.OnceValue(func() string {
		h := sha256.New()
		io.CopyN(h, pattern(), size)
		return hex.EncodeToString(h.Sum(nil))
	}))
	return known.(func() string)()
}

var checksums sync.Map

func mustWrite(t *testing.T, path string, r io.Reader) {
	t.Helper()
	if err := writeFile(path, r); err != nil {
		t.Fatal(err)
	}
}

func writeFile(path string, r io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// transfer is what a backend's HTTP server tells of a body.
type transfer struct {
	backend string
	sum     string       // SHA-256 of what came, or an error
	info    unix.TCPInfo // of its end of the connection, when all was sent or had come
	took    time.Duration
}

type connKey struct{}

// mustServeHTTP serves /bytes/N, N bytes of the pattern, /told/N, the same, and /upload; of the latter two it tells.
func mustServeHTTP(t *testing.T, b *lab.Backend, done chan<- transfer) {
	t.Helper()
	var listener net.Listener
	if err := b.Do(func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(netip.IPv6Unspecified(), httpPort).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	tell := func(r *http.Request, sum string) {
		told := transfer{backend: b.Name(), sum: sum}
		raw, err := r.Context().Value(connKey{}).(*net.TCPConn).SyscallConn()
		if err == nil {
			raw.Control(func(fd uintptr) {
				var info *unix.TCPInfo
				if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
					told.info = *info
				}
			})
		}
		if err != nil {
			told.sum = err.Error()
		}
		done <- told
	}
	send := func(w http.ResponseWriter, r *http.Request) {
		var n int64
		if _, err := fmt.Sscan(r.PathValue("n"), &n); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(n))
		io.CopyN(w, pattern(), n)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /bytes/{n}", send)
	mux.HandleFunc("GET /told/{n}", func(w http.ResponseWriter, r *http.Request) {
		send(w, r)
		tell(r, "")
	})
	mux.HandleFunc("PUT /upload", func(_ http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		_, err := io.Copy(h, r.Body)
		sum := hex.EncodeToString(h.Sum(nil))
		if err != nil {
			sum = err.Error()
		}
		tell(r, sum)
	})
	server := &http.Server{Handler: mux, ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, conn)
	}}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
}
