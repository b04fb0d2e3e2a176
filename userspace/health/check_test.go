package health

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"fairlead/userspace/config"
)

// lines yields the fields of each line.
func lines(text []byte) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		for line := range bytes.Lines(text) {
			if !yield(strings.Fields(string(line))) {
				return
			}
		}
	}
}

var connecting = []config.HealthType{config.HealthTCP, config.HealthHTTP, config.HealthHTTPS, config.HealthWebSocket,
	config.HealthWSS}

// TestBadServers checks servers that are wrong in every way, by every kind of check.
func TestBadServers(t *testing.T) {
	const silence = "no answer within 150ms"
	full, refusing, idle := mustBeFull(t), mustRefuse(t), mustNotAccept(t)
	for _, c := range []struct {
		name    string
		address netip.AddrPort
		tcp     string // "": good
		plain   string // http, websocket
		tls     string // https, wss
	}{
		{"refusing", refusing, "connect: connection refused", "connect: connection refused", "connect: connection refused"},
		{"full backlog", full, "connect: " + silence, "connect: " + silence, "connect: " + silence},
		{"never accepting", idle, "", silence, "tls: " + silence},
		{"silent", serve(t, nil, silent), "", silence, "tls: " + silence},
		{"closing", serve(t, nil, closing), "", "closed without an answer", "tls: closed without an answer"},
		{"garbage", serve(t, nil, garbage), "", "the answer is not HTTP", "tls: the answer is not TLS"},
		{"dripping", serve(t, nil, dripping), "", silence, "tls: the answer is not TLS"},
	} {
		for _, kind := range connecting {
			t.Run(c.name+"/"+kind.String(), func(t *testing.T) {
				t.Parallel()
				check := checkOf(kind)
				want := map[config.HealthType]string{config.HealthTCP: c.tcp, config.HealthHTTP: c.plain,
					config.HealthWebSocket: c.plain, config.HealthHTTPS: c.tls, config.HealthWSS: c.tls}[kind]
				if strings.HasSuffix(want, silence) {
					check.Timeout = 150 * time.Millisecond
				}
				o := once(t, check, c.address)
				if want == "" {
					wantGood(t, o)
				} else {
					wantReason(t, o, want)
				}
				if strings.HasSuffix(want, silence) != o.timeout {
					t.Errorf("timeout is %t", o.timeout)
				}
			})
		}
	}
}

// TestUnreachable asks an address that the kernel refuses to connect to, without a packet.
func TestUnreachable(t *testing.T) {
	for _, kind := range connecting {
		wantReason(t, once(t, checkOf(kind), netip.MustParseAddrPort("255.255.255.255:80")), "connect: network is unreachable")
	}
}

// TestTCPUnseen wants a tcp check to end before the backend's program has heard of it: the first connection that accept
// returns is one that was made after all of them.
func TestTCPUnseen(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	address := l.Addr().(*net.TCPAddr).AddrPort()
	const checks = 50
	for range checks {
		wantGood(t, once(t, checkOf(config.HealthTCP), address))
	}
	c, err := net.Dial("tcp", address.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// A machine that is busy for 40 ms between connect and close lets one through.
	for seen := 0; ; seen++ {
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		if a.RemoteAddr().String() == c.LocalAddr().String() {
			break
		}
		if seen == checks/10 {
			t.Fatalf("more than %d of %d checks were accepted", seen, checks)
		}
	}
	if n := timeWaits(t, address); n != 0 {
		t.Errorf("%d connections in TIME_WAIT on our side", n)
	}
}

// TestNoTimeWait wants the other kinds to leave TIME_WAIT to the server, or to none.
func TestNoTimeWait(t *testing.T) {
	a := mustAuthority(t)
	for _, kind := range connecting[1:] {
		for _, stays := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/server stays %t", kind, stays), func(t *testing.T) {
				var secure *tls.Config
				if kind == config.HealthHTTPS || kind == config.HealthWSS {
					secure = a.mustServe(t, "127.0.0.1")
				}
				webSocket := kind == config.HealthWebSocket || kind == config.HealthWSS
				handle := answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") // never closes
				var address netip.AddrPort
				switch {
				case stays && webSocket:
					address = serve(t, secure, upgrading(nil, func(c *serverEnd) {
						c.pong()
						c.read() // the close frame
						c.send(0x88, 0x02, 0x03, 0xe8)
						io.Copy(io.Discard, c)
					}))
				case stays:
					address = serve(t, secure, handle)
				case webSocket:
					address = serveHTTP(t, secure, echoWebSocket(0, nil))
				default:
					address = serveHTTP(t, secure, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
						io.WriteString(w, strings.Repeat("x", 10_000))
					}))
				}
				check := checkOf(kind)
				check.Roots = a.roots
				for range 5 {
					wantGood(t, once(t, check, address))
				}
				if n := timeWaits(t, address); n != 0 {
					t.Errorf("%d of 5 connections in TIME_WAIT on our side", n)
				}
			})
		}
	}
}

// TestRequest looks at what a server is asked.
func TestRequest(t *testing.T) {
	var mu sync.Mutex
	var requests []*http.Request
	handler := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		requests = append(requests, r)
	})
	address := serveHTTP(t, nil, handler)
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	for _, c := range []struct{ path, host, wantURI, wantHost string }{
		{"/", "", "/", address.String()},
		{"/healthz?deep=1&x=%20", "chat.example", "/healthz?deep=1&x=%20", "chat.example"},
		{"/a b/ü", "chat.example:8443", "/a%20b/%C3%BC", "chat.example:8443"},
	} {
		check := checkOf(config.HealthHTTP)
		check.Path, check.Host = c.path, c.host
		for range 2 {
			wantGood(t, once(t, check, address))
		}
		var connections []string
		for _, r := range requests {
			connections = append(connections, r.RemoteAddr)
			if r.Method != "GET" || r.RequestURI != c.wantURI || r.Host != c.wantHost || r.Proto != "HTTP/1.1" ||
				!r.Close || r.UserAgent() != "fairlead-health" {
				t.Errorf("asked %s %s of host %s by %s: %v", r.Method, r.RequestURI, r.Host, r.Proto, r.Header)
			}
		}
		if len(connections) != 2 || connections[0] == connections[1] {
			t.Errorf("two checks came from %v", connections)
		}
		requests = nil
	}
	for _, c := range []struct{ path, host, want string }{
		{"/", "a b", `not checked: host "a b" is not fit for a Host header`},
		{"/\r\nX: y", "", `not checked: path "/\r\nX: y": net/url: invalid control character in URL`},
	} {
		check := checkOf(config.HealthHTTP)
		check.Path, check.Host = c.path, c.host
		if o := once(t, check, address); o.verdict != moot || o.reason != c.want {
			t.Errorf("outcome %+v, want moot, %q", o, c.want)
		}
	}
}

// TestHTTPAnswers checks servers by what they answer.
func TestHTTPAnswers(t *testing.T) {
	body := func(text string) func(*config.Health) {
		return func(h *config.Health) { h.Body = regexp.MustCompile(text) }
	}
	state := func(h *config.Health) {
		h.StateHeader, h.DrainStatus = "X-Fairlead-State", []config.StatusRange{{First: 404, Last: 404}}
	}
	for _, c := range []struct {
		name   string
		change func(*config.Health)
		answer string
		want   outcome
	}{
		{"ok", nil, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", outcome{verdict: good, percent: 100}},
		{"by HTTP/1.0", nil, "HTTP/1.0 204 No Content\r\n\r\n", outcome{verdict: good, percent: 100}},
		{"a redirect is an answer", nil, "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
			outcome{verdict: good, percent: 100}},
		{"after information", nil, "HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
			outcome{verdict: good, percent: 100}},
		{"nothing but information", nil, strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 10),
			outcome{reason: "more than 5 informational answers"}},
		{"503", nil, "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
			outcome{reason: "status 503, wanted 200-399"}},
		{"other ranges", func(h *config.Health) {
			h.Status = []config.StatusRange{{First: 204, Last: 204}, {First: 300, Last: 302}}
		}, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", outcome{reason: "status 200, wanted 204, 300-302"}},
		{"switched", nil, "HTTP/1.1 101 Switching Protocols\r\n\r\n", outcome{reason: "status 101, wanted 200-399"}},
		{"drain status", state, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
			outcome{verdict: good, draining: true, percent: 100}},
		{"says drain and a weight", state, "HTTP/1.1 200 OK\r\nx-fairlead-state: Drain\r\nX-Fairlead-State: up, 40%\r\n\r\n",
			outcome{verdict: good, draining: true, percent: 40}},
		{"says maint by 503", state, "HTTP/1.1 503 Gone\r\nX-Fairlead-State: maint lunch\r\n\r\n",
			outcome{verdict: maint, reason: "X-Fairlead-State says maint", words: []string{"lunch"}}},
		{"says down", state, "HTTP/1.1 200 OK\r\nX-Fairlead-State: DOWN\r\n\r\n", outcome{reason: "X-Fairlead-State says down"}},
		{"says ready by 503", state, "HTTP/1.1 503 Gone\r\nX-Fairlead-State: ready\r\n\r\n",
			outcome{reason: "status 503, wanted 200-399"}},
		{"nobody looks at it", nil, "HTTP/1.1 200 OK\r\nX-Fairlead-State: maint\r\n\r\n", outcome{verdict: good, percent: 100}},
		{"body", body("^o.$"), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", outcome{verdict: good, percent: 100}},
		{"body in chunks", body("^ok$"), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
			outcome{verdict: good, percent: 100}},
		{"other body", body("^ok$"), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nko", outcome{reason: "the body does not match ^ok$"}},
		{"a body of a drain status is another", func(h *config.Health) { state(h); body("^ok$")(h) },
			"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", outcome{verdict: good, draining: true, percent: 100}},
		{"no body", body("."), "HTTP/1.1 204 No Content\r\n\r\n", outcome{reason: "the body does not match ."}},
		{"within 64 KiB", body("x$"), "HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + strings.Repeat(" ", 65535) + "x" + strings.Repeat(" ", 4464),
			outcome{verdict: good, percent: 100}},
		{"behind 64 KiB", body("x"), "HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + strings.Repeat(" ", 65536) + "x" + strings.Repeat(" ", 4463),
			outcome{reason: "the body does not match x"}},
		{"broken chunks", body("ok"), "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
			outcome{reason: "body: invalid byte in chunk length"}},
		{"half a body", body("ok"), "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok",
			outcome{reason: "body: no answer within 300ms", timeout: true}},
		{"a body nobody asked for", nil, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", outcome{verdict: good, percent: 100}},
		{"no status", nil, "HTTP/1.1\r\n\r\n", outcome{reason: "the answer's header is not HTTP"}},
		{"no colon", nil, "HTTP/1.1 200 OK\r\nnonsense\r\n\r\n", outcome{reason: "the answer's header is not HTTP"}},
		{"long header", nil, "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 70_000) + "\r\n\r\n",
			outcome{reason: "the answer's header is longer than 64 KiB"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			check := checkOf(config.HealthHTTP)
			if c.change != nil {
				c.change(&check)
			}
			if c.want.timeout {
				check.Timeout = 300 * time.Millisecond
			}
			o := once(t, check, serve(t, nil, answering(c.answer)))
			o.latency = 0
			if diff := cmp.Diff(c.want, o, cmp.AllowUnexported(outcome{})); diff != "" {
				t.Errorf("outcome (-want +got):\n%s", diff)
			}
		})
	}
	for _, c := range []struct{ answer, want string }{
		{"HTTP/1.1 200 OK\r\nContent-Len", "closed in the middle of the answer's header"},
		{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", "body: cut short"},
	} {
		check := checkOf(config.HealthHTTP)
		body("ok")(&check)
		wantReason(t, once(t, check, serve(t, nil, func(conn net.Conn) {
			conn.Read(make([]byte, 4096))
			io.WriteString(conn, c.answer)
		})), c.want)
	}
}

// TestSlow wants an answer that comes late, but in time, to be good, and its latency to be told.
func TestSlow(t *testing.T) {
	const late = 100 * time.Millisecond
	address := serve(t, nil, func(c net.Conn) {
		<-time.After(late)
		answering("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")(c)
	})
	o := once(t, checkOf(config.HealthHTTP), address)
	wantGood(t, o)
	if o.latency < late || o.latency > late+2*time.Second {
		t.Errorf("latency %s", o.latency)
	}
}

// TestTLS checks certificates, by https and wss.
func TestTLS(t *testing.T) {
	a, stranger := mustAuthority(t), mustAuthority(t)
	now := time.Now().Truncate(time.Second)
	expired, early := now.Add(-time.Hour), now.Add(time.Hour)
	handler := http.NewServeMux()
	handler.Handle("/", echoWebSocket(0, nil))
	handler.HandleFunc("/plain", func(http.ResponseWriter, *http.Request) {})
	for _, c := range []struct {
		name   string
		server *tls.Config
		change func(*config.Health)
		want   string
	}{
		{"by address", a.mustServe(t, "127.0.0.1"), nil, ""},
		{"by host", a.mustServe(t, "chat.example"), func(h *config.Health) { h.Host = "chat.example:443" }, ""},
		{"by sni", a.mustServe(t, "other.example"), func(h *config.Health) { h.Host, h.SNI = "chat.example", "other.example" }, ""},
		{"a host that is an address", a.mustServe(t, "127.0.0.1"), func(h *config.Health) { h.Host = "[::1]:80" }, ""},
		{"wrong name", a.mustServe(t, "other.example"), func(h *config.Health) { h.SNI = "chat.example" },
			"tls: the certificate is not for chat.example"},
		{"no address", a.mustServe(t, "chat.example"), nil, "tls: the certificate is not for 127.0.0.1"},
		{"expired", &tls.Config{Certificates: []tls.Certificate{a.mustSign(t, now.Add(-2*time.Hour), expired, "127.0.0.1")}}, nil,
			"tls: the certificate has expired on " + expired.UTC().Format(time.RFC3339)},
		{"not yet", &tls.Config{Certificates: []tls.Certificate{a.mustSign(t, early, early.Add(time.Hour), "127.0.0.1")}}, nil,
			"tls: the certificate is valid only from " + early.UTC().Format(time.RFC3339)},
		{"of a stranger", stranger.mustServe(t, "127.0.0.1"), nil, "tls: the certificate is signed by an unknown authority"},
		{"the system's roots", a.mustServe(t, "127.0.0.1"), func(h *config.Health) { h.Roots = nil },
			"tls: the certificate is signed by an unknown authority"},
		{"not verified", stranger.mustServe(t, "other.example"), func(h *config.Health) { h.Verify, h.Roots = false, nil }, ""},
		{"old version", &tls.Config{Certificates: a.mustServe(t, "127.0.0.1").Certificates, MaxVersion: tls.VersionTLS10, MinVersion: tls.VersionTLS10},
			nil, "tls: protocol version not supported"},
		{"wants a certificate of ours", &tls.Config{Certificates: a.mustServe(t, "127.0.0.1").Certificates,
			ClientAuth: tls.RequireAnyClientCert}, nil, "certificate required"},
	} {
		for kind, path := range map[config.HealthType]string{config.HealthHTTPS: "/plain", config.HealthWSS: "/"} {
			t.Run(c.name+"/"+kind.String(), func(t *testing.T) {
				check := checkOf(kind)
				check.Path, check.Roots = path, a.roots
				if c.change != nil {
					c.change(&check)
				}
				o := once(t, check, serveHTTP(t, c.server, handler))
				if c.want == "" {
					wantGood(t, o)
				} else {
					wantReason(t, o, c.want)
				}
			})
		}
	}
}

// TestServerName wants the name to be sent where it is one, and no ticket to be used.
func TestServerName(t *testing.T) {
	a := mustAuthority(t)
	server := a.mustServe(t, "chat.example", "127.0.0.1")
	var names []string
	var mu sync.Mutex
	server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		mu.Lock()
		defer mu.Unlock()
		names = append(names, h.ServerName)
		return nil, nil
	}
	resumed := 0
	address := serveHTTP(t, server, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.TLS.DidResume {
			resumed++
		}
	}))
	check := checkOf(config.HealthHTTPS)
	check.Roots = a.roots
	wantGood(t, once(t, check, address))
	check.SNI = "chat.example"
	probe := newProbe(Target{Key: Key{Address: address}, Check: check})
	for range 2 {
		wantGood(t, probe(t.Context()))
	}
	if diff := cmp.Diff([]string{"", "chat.example", "chat.example"}, names); diff != "" || resumed != 0 {
		t.Errorf("%d resumed; names (-want +got):\n%s", resumed, diff)
	}
}

// TestDial wants a target's own Dial to be used, for the service's address where that is asked.
func TestDial(t *testing.T) {
	var hosts []string
	var mu sync.Mutex
	address := serveHTTP(t, nil, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		hosts = append(hosts, r.Host)
	}))
	via := netip.MustParseAddrPort("192.0.2.10:443")
	for _, kind := range []config.HealthType{config.HealthTCP, config.HealthHTTP} {
		var asked []string
		o := onceOf(t, Target{Key: Key{Address: netip.MustParseAddrPort("10.0.0.1:443")}, Via: via, Check: checkOf(kind),
			Dial: func(ctx context.Context, network, a string) (net.Conn, error) {
				asked = append(asked, network, a)
				return (&net.Dialer{}).DialContext(ctx, network, address.String())
			}})
		wantGood(t, o)
		if diff := cmp.Diff([]string{"tcp", via.String()}, asked); diff != "" {
			t.Errorf("%s: dialled (-want +got):\n%s", kind, diff)
		}
	}
	if diff := cmp.Diff([]string{via.String()}, hosts); diff != "" {
		t.Errorf("hosts (-want +got):\n%s", diff)
	}
}

// TestOutOfDescriptors takes all descriptors away: that is no backend's fault.
func TestOutOfDescriptors(t *testing.T) {
	address := serveHTTP(t, nil, http.NotFoundHandler())
	for _, kind := range append(slices.Clone(connecting), config.HealthExec) {
		t.Run(kind.String(), func(t *testing.T) {
			check := checkOf(kind)
			check.Command = []string{"/bin/true"}
			probe := newProbe(Target{Key: Key{Address: address}, Check: check})
			var was, none unix.Rlimit
			if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
				t.Fatal(err)
			}
			none = unix.Rlimit{Cur: 0, Max: was.Max}
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), check.Timeout)
			defer cancel()
			o := probe(ctx)
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
				t.Fatal(err)
			}
			if o.verdict != moot || !strings.Contains(o.reason, "too many open files") || !strings.HasPrefix(o.reason, "not checked: ") {
				t.Errorf("outcome %+v", o)
			}
		})
	}
}

// TestRealRun runs a Checker over real servers: one that lives, one that dies and comes back, one that is not there.
func TestRealRun(t *testing.T) {
	var broken atomic.Bool
	living := serveHTTP(t, nil, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	dying := serveHTTP(t, nil, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if broken.Load() {
			w.WriteHeader(500)
		}
	}))
	check := checkOf(config.HealthHTTP)
	check.Interval, check.FastInterval, check.Timeout = 100*time.Millisecond, 50*time.Millisecond, 5*time.Second
	check.HoldDown = 0
	var mu sync.Mutex
	last := map[string]Report{}
	c := New(Options{OnChange: func(all []Report) {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range all {
			last[r.Backend] = r
		}
	}})
	var all []Target
	for name, address := range map[string]netip.AddrPort{"living": living, "dying": dying, "absent": mustRefuse(t)} {
		all = append(all, Target{Key: Key{Service: "s", Backend: name, Address: address}, Check: check})
	}
	c.Set(all)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- c.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-result; err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	want := func(statuses map[string]Status) {
		t.Helper()
		awaitCondition(t, fmt.Sprint("the statuses told are ", statuses), func() bool {
			mu.Lock()
			defer mu.Unlock()
			for name, s := range statuses {
				if last[name].Status != s {
					return false
				}
			}
			return true
		})
	}
	want(map[string]Status{"living": Up, "dying": Up, "absent": Down})
	broken.Store(true)
	want(map[string]Status{"living": Up, "dying": Down, "absent": Down})
	broken.Store(false)
	want(map[string]Status{"living": Up, "dying": Up, "absent": Down})
	for _, r := range c.Reports() {
		switch {
		case r.Backend == "absent" && r.Failure != "connect: connection refused",
			r.Backend == "dying" && r.Failure != "status 500, wanted 200-399",
			r.Backend == "living" && (r.Failure != "" || r.Latency <= 0 || r.Checks == 0):
			t.Errorf("report %+v", r)
		}
	}
}
