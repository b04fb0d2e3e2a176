package health

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"fairlead/userspace/config"
)

// mustStart runs a server of others' making, where Debian has it, until the test ends, and waits until it listens. It dies with this process.
func mustStart(tb testing.TB, listens netip.AddrPort, name string, arguments ...string) *exec.Cmd {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		const missing = "%v: apt install nginx-light haproxy python3-websockets"
		if os.Geteuid() != 0 {
			tb.Skipf(missing, err)
		}
		tb.Fatalf(missing, err)
	}
	cmd := exec.Command(path, arguments...)
	output := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, gone := make(chan error), make(chan struct{})
	go func() {
		// The kernel means this thread's death by the parent's.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		started <- cmd.Start()
		cmd.Wait()
		close(gone)
	}()
	if err := <-started; err != nil {
		<-gone
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		cmd.Process.Kill()
		<-gone
		if tb.Failed() {
			tb.Logf("%s said:\n%s", name, output)
		}
	})
	awaitCondition(tb, name+" listens", func() bool {
		select {
		case <-gone:
			tb.Fatalf("%s has ended:\n%s", name, output)
		default:
		}
		c, err := net.Dial("tcp", listens.String())
		if err == nil {
			abort(c)
		}
		return err == nil
	})
	return cmd
}

// freePorts returns ports of an address of the test's own, where nobody else looks for one.
func freePorts(tb testing.TB, n int) (all []netip.AddrPort) {
	tb.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.77.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		defer l.Close()
		all = append(all, l.Addr().(*net.TCPAddr).AddrPort())
	}
	return all
}

func mustWrite(tb testing.TB, path, text string) string {
	tb.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

// application is what stands behind nginx and HAProxy: a WebSocket at /ws, a page at /, and what it was asked.
func application(tb testing.TB) netip.AddrPort {
	mux := http.NewServeMux()
	mux.Handle("/ws", echoWebSocket(3, nil))
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Fairlead-State", "up 60%")
		fmt.Fprint(w, "all is well")
	})
	return serveHTTP(tb, nil, mux)
}

// wantPeer checks an edge of TLS and WebSockets in every way.
func wantPeer(t *testing.T, a *authority, plain, secure netip.AddrPort) {
	for _, kind := range connecting {
		for range 3 {
			check := checkOf(kind)
			check.Host, check.Roots, check.StateHeader = "chat.example", a.roots, "X-Fairlead-State"
			address := plain
			if kind == config.HealthHTTPS || kind == config.HealthWSS {
				address = secure
			}
			if kind == config.HealthWebSocket || kind == config.HealthWSS {
				check.Path = "/ws"
			}
			o := once(t, check, address)
			if o.verdict != good {
				t.Errorf("%s: %+v", kind, o)
			}
			if want := map[bool]uint32{true: 60, false: 100}[check.Path == "/" && kind != config.HealthTCP]; o.percent != want {
				t.Errorf("%s: %d%%, want %d%%", kind, o.percent, want)
			}
			if kind == config.HealthTCP {
				continue
			}
			check.Path = "/nonsense"
			if o := once(t, check, address); o.verdict != bad || !strings.HasPrefix(o.reason, "status 404, wanted ") {
				t.Errorf("%s of a wrong path: %+v", kind, o)
			}
			if address == secure {
				check.SNI = "other.example"
				wantReason(t, once(t, check, address), "tls: the certificate is not for other.example")
			}
			// The other protocol on the same port.
			other := map[config.HealthType]config.HealthType{config.HealthHTTP: config.HealthHTTPS, config.HealthHTTPS: config.HealthHTTP,
				config.HealthWebSocket: config.HealthWSS, config.HealthWSS: config.HealthWebSocket}[kind]
			check = checkOf(other)
			check.Verify = false
			if o := once(t, check, address); o.verdict != bad || o.timeout {
				t.Errorf("%s asked by %s: %+v", kind, other, o)
			} else {
				t.Logf("%s asked by %s: %s", kind, other, o.reason)
			}
		}
	}
	if n := timeWaits(t, plain) + timeWaits(t, secure); n != 0 {
		t.Errorf("%d connections in TIME_WAIT on our side", n)
	}
}

func TestNginx(t *testing.T) {
	a, dir, ports := mustAuthority(t), t.TempDir(), freePorts(t, 2)
	certificate := mustWrite(t, filepath.Join(dir, "edge.pem"), string(pemOf(t, a.mustSign(t,
		time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "chat.example"))))
	mustWrite(t, filepath.Join(dir, "nginx.conf"), fmt.Sprintf(`
daemon off; master_process off; pid %[1]s/pid; error_log stderr error;
events {}
http {
	access_log %[1]s/access.log;
	client_body_temp_path %[1]s/a; proxy_temp_path %[1]s/b; fastcgi_temp_path %[1]s/c; uwsgi_temp_path %[1]s/d; scgi_temp_path %[1]s/e;
	server {
		listen %[2]s; listen %[3]s ssl;
		ssl_certificate %[4]s; ssl_certificate_key %[4]s;
		location / {
			proxy_pass http://%[5]s; proxy_http_version 1.1;
			proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $http_connection;
		}
	}
}`, dir, ports[0], ports[1], certificate, application(t)))
	mustStart(t, ports[1], "/usr/sbin/nginx", "-e", "stderr", "-p", dir, "-c", "nginx.conf")
	// What nginx's log says of a tcp check: nothing. It would have a line for a client that says nothing, at level info.
	wantPeer(t, a, ports[0], ports[1])
	log, err := os.ReadFile(filepath.Join(dir, "access.log"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range lines(log) {
		// Status 400 and an empty request stand for a client that nginx did not understand: only TLS on the plain port.
		if len(line) > 8 && line[8] == "400" && line[5] == `""` {
			t.Errorf("nginx took a check for nonsense: %q", line)
		}
	}
}

func TestHAProxy(t *testing.T) {
	a, dir, ports := mustAuthority(t), t.TempDir(), freePorts(t, 2)
	certificate := mustWrite(t, filepath.Join(dir, "edge.pem"), string(pemOf(t, a.mustSign(t,
		time.Now().Add(-time.Hour), time.Now().Add(time.Hour), "chat.example"))))
	file := mustWrite(t, filepath.Join(dir, "haproxy.cfg"), fmt.Sprintf(`
global
	maxconn 200
defaults
	mode http
	timeout connect 5s
	timeout client 30s
	timeout server 30s
	timeout tunnel 30s
frontend edge
	bind %s
	bind %s ssl crt %s alpn h2,http/1.1
	default_backend application
backend application
	server one %s
`, ports[0], ports[1], certificate, application(t)))
	mustStart(t, ports[1], "/usr/sbin/haproxy", "-db", "-q", "-f", file)
	wantPeer(t, a, ports[0], ports[1])
}

// TestPythonWebSockets asks Debian's python3-websockets, stopped and going again: a process that is stopped has a kernel
// that answers for it.
func TestPythonWebSockets(t *testing.T) {
	port := freePorts(t, 1)[0]
	script := mustWrite(t, filepath.Join(t.TempDir(), "server.py"), `
import asyncio, sys, websockets
async def serve(socket, path=None):
    await socket.send("hello")
    async for message in socket:
        await socket.send(message)
async def main():
    async with websockets.serve(serve, sys.argv[1], int(sys.argv[2])):
        await asyncio.Future()
asyncio.run(main())
`)
	server := mustStart(t, port, "/usr/bin/python3", script, port.Addr().String(), fmt.Sprint(port.Port()))
	check := checkOf(config.HealthWebSocket)
	for range 5 {
		wantGood(t, once(t, check, port))
	}
	check.Timeout = 300 * time.Millisecond
	signal := func(s syscall.Signal) {
		t.Helper()
		if err := server.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	resume := sync.OnceFunc(func() { signal(syscall.SIGCONT) })
	defer resume()
	awaitCondition(t, "the server is stopped", func() bool {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", server.Process.Pid))
		return strings.Contains(string(stat), ") T ")
	})
	wantReason(t, once(t, check, port), "no answer within 300ms")
	check.Type = config.HealthTCP
	wantGood(t, once(t, check, port))
	resume()
	check.Type, check.Timeout = config.HealthWebSocket, 5*time.Second
	wantGood(t, once(t, check, port))
}
