package health

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"fairlead/userspace/config"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		os.Exit(playRole(role))
	}
	goleak.VerifyTestMain(m)
}

// serve has handle speak on each connection to a listener of its own. At the end of the test the connections are closed,
// and their handlers waited for.
func serve(tb testing.TB, secure *tls.Config, handle func(net.Conn)) netip.AddrPort {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	address := l.Addr().(*net.TCPAddr).AddrPort()
	if secure != nil {
		l = tls.NewListener(l, secure)
	}
	var mu sync.Mutex
	open := map[net.Conn]struct{}{}
	var handlers sync.WaitGroup
	handlers.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = struct{}{}
			mu.Unlock()
			handlers.Go(func() {
				handle(c)
				c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	tb.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		handlers.Wait()
	})
	return address
}

// serveHTTP runs Go's own server.
func serveHTTP(tb testing.TB, secure *tls.Config, handler http.Handler) netip.AddrPort {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	address := l.Addr().(*net.TCPAddr).AddrPort()
	if secure != nil {
		l = tls.NewListener(l, secure)
	}
	server := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
	var done sync.WaitGroup
	done.Go(func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			tb.Errorf("serve: %v", err)
		}
	})
	tb.Cleanup(func() {
		server.Close()
		done.Wait()
	})
	return address
}

// answering reads a request and writes the text; then it waits for the other end to close.
func answering(text string) func(net.Conn) {
	return func(c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
			return
		}
		io.WriteString(c, text)
		io.Copy(io.Discard, c)
	}
}

// silent accepts, and never says anything.
func silent(c net.Conn) { io.Copy(io.Discard, c) }

// closing accepts, reads what comes first, and closes.
func closing(c net.Conn) { c.Read(make([]byte, 4096)) }

// garbage says something else, and waits.
func garbage(c net.Conn) {
	io.WriteString(c, "220 mail.example ESMTP\r\n\x00\x01\x02\xff\r\n")
	io.Copy(io.Discard, c)
}

// dripping begins a right answer and never comes to its end, though it says something all the time.
func dripping(c net.Conn) {
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n"); err != nil {
		return
	}
	for tick := time.NewTicker(5 * time.Millisecond); ; <-tick.C {
		if _, err := io.WriteString(c, "X-More: 1\r\n"); err != nil {
			return
		}
	}
}

// mustRefuse returns an address where nobody listens. It is held, so that nobody can come to listen there.
func mustRefuse(tb testing.TB) netip.AddrPort {
	tb.Helper()
	return bound(tb, -1)
}

// mustNotAccept returns an address where somebody listens and never accepts, with room for connections.
func mustNotAccept(tb testing.TB) netip.AddrPort {
	tb.Helper()
	return bound(tb, 128)
}

// mustBeFull returns an address where somebody listens and never accepts, and whose backlog is full.
func mustBeFull(tb testing.TB) netip.AddrPort {
	tb.Helper()
	address := bound(tb, 0)
	for range 16 {
		c, err := net.DialTimeout("tcp", address.String(), 100*time.Millisecond)
		if err != nil {
			return address
		}
		tb.Cleanup(func() { c.Close() })
	}
	tb.Fatal("a backlog of 0 took 16 connections")
	return address
}

// bound binds a socket to a port of its own, and listens with a backlog if that is not negative.
func bound(tb testing.TB, backlog int) netip.AddrPort {
	tb.Helper()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(s) })
	if err := unix.Bind(s, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		tb.Fatal(err)
	}
	if backlog >= 0 {
		if err := unix.Listen(s, backlog); err != nil {
			tb.Fatal(err)
		}
	}
	name, err := unix.Getsockname(s)
	if err != nil {
		tb.Fatal(err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*unix.SockaddrInet4).Port))
}

// echoWebSocket serves WebSockets by a library that shares nothing with the checks. It tells how each connection ended.
func echoWebSocket(greetings int, ended chan<- error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		for i := range greetings {
			// Of all three forms of length.
			if err := c.Write(r.Context(), websocket.MessageBinary, make([]byte, []int{5, 500, 100_000}[i%3])); err != nil {
				return
			}
		}
		_, _, err = c.Read(r.Context())
		if ended != nil {
			ended <- err
		}
	}
}

// authorities are a certificate authority and what it signed.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	roots       *x509.CertPool
}

func mustAuthority(tb testing.TB) *authority {
	tb.Helper()
	a := &authority{key: mustKey(tb), roots: x509.NewCertPool()}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "tests"}, IsCA: true,
		NotBefore: time.Now().Add(-100 * time.Hour), NotAfter: time.Now().Add(100 * time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		tb.Fatal(err)
	}
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		tb.Fatal(err)
	}
	a.roots.AddCert(a.certificate)
	return a
}

func mustKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// mustSign returns a server's certificate for names and addresses, and its key.
func (a *authority) mustSign(tb testing.TB, from, to time.Time, names ...string) tls.Certificate {
	tb.Helper()
	key := mustKey(tb)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: to,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// mustServe returns the configuration of a server with such a certificate, valid now.
func (a *authority) mustServe(tb testing.TB, names ...string) *tls.Config {
	tb.Helper()
	return &tls.Config{Certificates: []tls.Certificate{
		a.mustSign(tb, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), names...)}}
}

// pemOf returns a certificate and its key as nginx and HAProxy read them.
func pemOf(tb testing.TB, c tls.Certificate) []byte {
	tb.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		tb.Fatal(err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
}

// checkOf is a check of a type, with what the configuration fills in.
func checkOf(kind config.HealthType) config.Health {
	h := judged()
	h.Type, h.Path, h.Verify, h.Status = kind, "/", true, []config.StatusRange{{First: 200, Last: 399}}
	h.Timeout = 5 * time.Second
	return h
}

// once makes one check, as a worker does.
func once(tb testing.TB, check config.Health, address netip.AddrPort) outcome {
	tb.Helper()
	return onceOf(tb, Target{Key: Key{Service: "chat", Backend: "ws1", Address: address}, Check: check})
}

func onceOf(tb testing.TB, target Target) outcome {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), target.Check.Timeout)
	defer cancel()
	begun := time.Now()
	o := newProbe(target)(ctx)
	if took := time.Since(begun); took > target.Check.Timeout+time.Second {
		tb.Errorf("the check took %s with a timeout of %s", took, target.Check.Timeout)
	}
	if o.reason != oneLine(o.reason) {
		tb.Errorf("reason %q is not fit for one", o.reason)
	}
	if o.verdict == good && (o.latency <= 0 || o.reason != "") || o.verdict != good && o.reason == "" {
		tb.Errorf("outcome %+v", o)
	}
	return o
}

// wantReason wants a failed check for a reason.
func wantReason(tb testing.TB, o outcome, reason string) {
	tb.Helper()
	if o.verdict != bad || o.reason != reason {
		tb.Errorf("verdict %d, reason %q, want %d, %q", o.verdict, o.reason, bad, reason)
	}
}

func wantGood(tb testing.TB, o outcome) {
	tb.Helper()
	if o.verdict != good {
		tb.Errorf("verdict %d, reason %q, want %d", o.verdict, o.reason, good)
	}
}

// awaitCondition waits for what must become true.
func awaitCondition(tb testing.TB, what string, condition func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("in 10 s it has not come to be that %s", what)
		}
	}
}

// timeWaits counts the connections to an address that this end keeps in TIME_WAIT.
func timeWaits(tb testing.TB, to netip.AddrPort) (n int) {
	tb.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		tb.Fatal(err)
	}
	ip := to.Addr().As4()
	remote := fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], to.Port())
	for line := range lines(table) {
		if fields := line; len(fields) > 3 && fields[2] == remote && fields[3] == "06" {
			n++
		}
	}
	return n
}
