package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/userspace/config"
	"fairlead/userspace/control"
	"fairlead/userspace/orders"
)

// patience is how long what must happen may take.
const patience = 20 * time.Second

// askedDaemon is the daemon's side of the socket: it notes what it was asked.
type askedDaemon struct {
	t    *testing.T
	file string // the configuration that names its socket
	sock string

	mu      sync.Mutex
	notes   []string
	changes []string
	err     error
	drains  func() []control.Drain
	close   func(control.CloseRequest) (string, error)
}

func (d *askedDaemon) note(format string, args ...any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.notes = append(d.notes, fmt.Sprintf(format, args...))
	return d.err
}

// noted is what was asked since it was last looked at.
func (d *askedDaemon) noted() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	notes := strings.Join(d.notes, "; ")
	d.notes = nil
	return notes
}

func (d *askedDaemon) Reload(context.Context) ([]string, error) { return d.changes, d.note("reload") }
func (d *askedDaemon) Drain(_ context.Context, r control.DrainRequest) error {
	return d.note("drain %s %d %v", r.Backend, r.Rate, r.Deadline)
}
func (d *askedDaemon) Resume(_ context.Context, backend string) error {
	return d.note("resume %s", backend)
}
func (d *askedDaemon) Weight(_ context.Context, backend string, weight *uint32) error {
	return d.note("weight %s %s", backend, orDash(weight))
}
func (d *askedDaemon) Drains(context.Context) ([]control.Drain, error) {
	err := d.note("drains")
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.drains == nil || err != nil {
		return nil, err
	}
	return d.drains(), nil
}
func (d *askedDaemon) Close(_ context.Context, r control.CloseRequest) (string, error) {
	if err := d.note("close %v %s", r.Client, r.Service); err != nil || d.close == nil {
		return "told to end: client and backend", err
	}
	return d.close(r)
}

// newAskedDaemon serves at a socket of its own until the test ends.
func newAskedDaemon(t *testing.T) *askedDaemon {
	t.Helper()
	dir := t.TempDir()
	d := &askedDaemon{t: t, file: filepath.Join(dir, "fairlead.yaml"), sock: filepath.Join(dir, "run", "control.sock")}
	good, err := os.ReadFile("testdata/good.yaml")
	must(t, err)
	must(t, os.WriteFile(d.file, append(good, "control: {socket: "+d.sock+"}\n"...), 0o644))
	d.serve()
	return d
}

// serve serves at the socket, and answers what ends it.
func (d *askedDaemon) serve() (stop func()) {
	d.t.Helper()
	l, err := control.Listen(d.sock)
	must(d.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- control.Serve(ctx, l, d, slog.New(slog.DiscardHandler)) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			d.t.Error(err)
		}
	})
	d.t.Cleanup(stop)
	return stop
}

// ask runs a command of the configuration that names the socket.
func (d *askedDaemon) ask(line string) (code int, stdout, stderr string) {
	d.t.Helper()
	return fairlead(d.t, append(strings.Fields(line), "-c", d.file)...)
}

// TestAsk: what the daemon is asked, and what is printed.
func TestAsk(t *testing.T) {
	d := newAskedDaemon(t)
	d.changes = []string{"backend chat/ws3 added: 10.0.0.13:8765 by fullnat", "service web: leaving"}
	for _, test := range []struct{ line, asked, stdout string }{
		{"reload", "reload", "backend chat/ws3 added: 10.0.0.13:8765 by fullnat\nservice web: leaving\n"},
		{"reload -o json", "reload", "[\n\"backend chat/ws3 added: 10.0.0.13:8765 by fullnat\",\n\"service web: leaving\"\n]\n"},
		{"backends drain ws1", "drain ws1 0 0s",
			"backend ws1 drains: no new connections; its connections stay until they end by themselves\n"},
		{"backends drain chat/ws1 --rate 500/s", "drain chat/ws1 500 0s",
			"backend chat/ws1 drains: no new connections; its connections are ended, 500 a second\n"},
		{"backends drain --rate 500 ws1 --deadline 5m", "drain ws1 500 5m0s",
			"backend ws1 drains: no new connections; its connections are ended, 500 a second, and what is left in 5m0s\n"},
		{"backends --deadline=90s drain ws1", "drain ws1 0 1m30s",
			"backend ws1 drains: no new connections; its connections stay, and what is left in 1m30s is ended\n"},
		{"backends drain ws1 --rate 1000000/s", "drain ws1 1000000 0s",
			"backend ws1 drains: no new connections; its connections are ended, 1000000 a second\n"},
		{"backends resume ws1", "resume ws1", "backend ws1: its drain is taken back\n"},
		{"backends weight ws1 5", "weight ws1 5", "backend ws1: weight 5\n"},
		{"backends weight chat/ws1 0", "weight chat/ws1 0", "backend chat/ws1: weight 0\n"},
		{"backends weight ws1 default", "weight ws1 -", "backend ws1: weight as configured\n"},
		{"connections close 198.51.100.7:40000", "close 198.51.100.7:40000 ", "told to end: client and backend\n"},
		{"connections close 198.51.100.7:40000 chat", "close 198.51.100.7:40000 chat", "told to end: client and backend\n"},
		{"flows close [2001:db8::7]:1->[2001:db8::10]:80", "close [2001:db8::7]:1 [2001:db8::10]:80", "told to end: client and backend\n"},
		{"flows close ::ffff:198.51.100.7:1", "", ""}, // wrong: no brackets
	} {
		code, stdout, stderr := d.ask(test.line)
		if test.asked == "" {
			if code != exitUsage || d.noted() != "" {
				t.Errorf("%s: exit code %d, %s", test.line, code, stderr)
			}
			continue
		}
		if asked := d.noted(); code != exitDone || stderr != "" || stdout != test.stdout || asked != test.asked {
			t.Errorf("%s: exit code %d, asked %q, want %q; stdout %q, want %q; %s", test.line, code, asked, test.asked, stdout,
				test.stdout, stderr)
		}
	}
	d.changes = nil
	for line, want := range map[string]string{"reload": "nothing has changed\n", "reload -o json": "[]\n", "reload -o jsonl": ""} {
		if code, stdout, stderr := d.ask(line); code != exitDone || stdout != want {
			t.Errorf("%s, where nothing has: exit code %d, %q, %s", line, code, stdout, stderr)
		}
	}
	d.noted()

	// Without the configuration.
	if code, stdout, stderr := fairlead(t, "reload", "--socket", d.sock, "-c", "testdata/absent.yaml"); code != exitDone || stdout == "" {
		t.Errorf("--socket: exit code %d, %s", code, stderr)
	}
	d.noted()

	// Errors come whole, over all their lines.
	d.err = errors.New("edge.yaml:4:3: services[0].adress: unknown field\n    adress: 192.0.2.10\nedge.yaml:7: services[0].port: 70000 is not a port")
	for _, line := range []string{
		"reload", "backends drain ws1", "backends drain ws1 --wait", "backends resume ws1", "backends weight ws1 5",
		"connections close 198.51.100.7:40000",
	} {
		code, stdout, stderr := d.ask(line)
		if code != exitFailed || stdout != "" || stderr != "fairlead: "+d.err.Error()+"\n" {
			t.Errorf("%s: exit code %d, %q, %s", line, code, stdout, stderr)
		}
	}
}

// TestAskWrongly: what can't be meant is told before anybody is asked.
func TestAskWrongly(t *testing.T) {
	d := newAskedDaemon(t)
	for line, part := range map[string]string{
		"backends":                                "backends what? one of list, drain, resume, weight",
		"backends dran ws1":                       `there is no command backends dran: did you mean "drain"?`,
		"backends drain":                          "usage: fairlead backends drain NAME [flags]",
		"backends drain ws1 ws2":                  `backends drain: one argument too many: "ws2"`,
		"backends drain ws1 --rate 0":             `--rate "0": connections a second, 1 to 1000000, as in 500/s`,
		"backends drain ws1 --rate 1000001":       `--rate "1000001"`,
		"backends drain ws1 --rate=-1":            `--rate "-1"`,
		"backends drain ws1 --rate 5/m":           `--rate "5/m"`,
		"backends drain ws1 --rate 1.5":           `--rate "1.5"`,
		"backends drain ws1 --rate /s":            `--rate "/s"`,
		"backends drain ws1 --rate":               "flag needs an argument",
		"backends drain ws1 --deadline 0s":        "--deadline 0s: a time from now",
		"backends drain ws1 --deadline=-5m":       "--deadline -5m0s: a time from now",
		"backends drain ws1 --deadline soon":      "soon",
		"backends resume":                         "too few arguments",
		"backends weight ws1":                     "usage: fairlead backends weight NAME N|default [flags]",
		"backends weight ws1 1001":                `weight "1001": 0 to 1000, or default`,
		"backends weight ws1 heavy":               `weight "heavy"`,
		"backends weight ws1 -- -1":               `weight "-1"`,
		"backends list extra":                     "one argument too many",
		"connections close":                       "usage: fairlead connections close CLIENT:PORT [SERVICE] [flags]",
		"connections close 198.51.100.7":          "is not ADDRESS:PORT",
		"connections close 198.51.100.7:0 chat":   "no connection comes from port 0",
		"connections close 198.51.100.7:1 chat x": "one argument too many",
		"reload now":                              "reload: one argument too many",
		"reload -o xml":                           `-o "xml"`,
	} {
		code, _, stderr := fairlead(t, append([]string{"-c", d.file}, strings.Fields(line)...)...)
		if code != exitUsage || !strings.Contains(stderr, part) || !strings.Contains(stderr, "\nusage: fairlead ") {
			t.Errorf("%s: exit code %d, %s; want %s", line, code, stderr, part)
		}
	}
	if asked := d.noted(); asked != "" {
		t.Errorf("the daemon was asked: %s", asked)
	}
}

// TestLimitsAgree: who checks a weight or a rate, checks it alike.
func TestLimitsAgree(t *testing.T) {
	if control.MaxRate != orders.MaxRate || control.MaxWeight != orders.MaxWeight {
		t.Errorf("rates up to %d and %d, weights up to %d and %d", control.MaxRate, orders.MaxRate, control.MaxWeight, orders.MaxWeight)
	}
	good, err := os.ReadFile("testdata/good.yaml")
	must(t, err)
	for weight, right := range map[int]bool{control.MaxWeight: true, control.MaxWeight + 1: false} {
		text := strings.Replace(string(good), "port: 8765}", fmt.Sprintf("port: 8765, weight: %d}", weight), 1)
		if _, err := config.Parse("good.yaml", []byte(text)); (err == nil) != right {
			t.Errorf("a configured weight of %d: %v", weight, err)
		}
	}
}

// TestNotRunning: without a daemon to ask, the exit code says so, and the message what to do.
func TestNotRunning(t *testing.T) {
	d := newAskedDaemon(t)
	absent := filepath.Join(t.TempDir(), "absent.sock")
	for _, line := range []string{
		"reload", "backends drain ws1", "backends drain ws1 --wait", "backends resume ws1", "backends weight ws1 5",
		"connections close 198.51.100.7:40000",
	} {
		code, stdout, stderr := d.ask(line + " --socket " + absent)
		if code != exitNothing || stdout != "" || !strings.Contains(stderr, "the daemon is not running: there is no socket at "+absent) ||
			!strings.Contains(stderr, "`fairlead run`") {
			t.Errorf("%s: exit code %d, %q, %s", line, code, stdout, stderr)
		}
	}
	if code, _, stderr := fairlead(t, "reload", "-c", "testdata/absent.yaml"); code != exitFailed ||
		!strings.Contains(stderr, "with --socket SOCKET this command does without the configuration") {
		t.Errorf("no configuration: exit code %d, %s", code, stderr)
	}
	if code, _, stderr := fairlead(t, "reload", "-c", "testdata/wrong.yaml"); code != exitFailed ||
		!strings.Contains(stderr, "services[0].adress: unknown field") || !strings.Contains(stderr, "70000") {
		t.Errorf("a wrong configuration: exit code %d, %s", code, stderr)
	}
}

// lines collects what a command prints while it runs.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
		time.Sleep(time.Millisecond)
	}
}

func drainOf(living int) control.Drain {
	return control.Drain{Service: "chat", Backend: "ws1", Rate: 500, Living: living, Closing: min(living, 20), Closed: 1500 - living,
		Left: time.Duration(living) * 2 * time.Millisecond}
}

// TestWait: the command ends when the drain does.
func TestWait(t *testing.T) {
	d := newAskedDaemon(t)
	left := 1000
	d.drains = func() []control.Drain {
		now := drainOf(left)
		left = max(left-600, 0)
		return []control.Drain{{Service: "web", Backend: "ws1", Living: 7}, now}
	}
	code, stdout, stderr := d.ask("backends drain chat/ws1 --rate 500/s --wait")
	want := `backend chat/ws1 drains: no new connections; its connections are ended, 500 a second
chat/ws1: 1000 connections left, 20 of them told to end, 500 closed, 500/s ordered, about 2s to go
chat/ws1: no connection is left, 1500 closed
`
	if code != exitDone || stdout != want || stderr != "" {
		t.Errorf("exit code %d, %s (-want +got):\n%s", code, stderr, cmp.Diff(want, stdout))
	}
	if asked := d.noted(); asked != "drain chat/ws1 500 0s; drains; drains; drains" {
		t.Errorf("asked %s", asked)
	}
	// A name that the daemon took may be found in one drain alone, or none.
	for _, drains := range [][]control.Drain{nil, {{Service: "web", Backend: "ws2", Living: 7}}} {
		d.drains = func() []control.Drain { return drains }
		code, _, stderr = d.ask("backends drain chat/ws1 --wait")
		if code != exitFailed || !strings.Contains(stderr, "chat/ws1: it does not drain any more: it was resumed") {
			t.Errorf("resumed meanwhile: exit code %d, %s", code, stderr)
		}
	}
}

// TestWaitInterrupted: the drain goes on, and the command says so; on a terminal and elsewhere.
func TestWaitInterrupted(t *testing.T) {
	d := newAskedDaemon(t)
	d.drains = func() []control.Drain { return []control.Drain{drainOf(1200)} }
	ended := make(chan int, 1)
	var stdout, stderr lines
	go func() {
		ended <- run(context.Background(), []string{"backends", "drain", "ws1", "--rate", "500", "--wait", "-c", d.file}, &stdout,
			&stderr, func(string) string { return "" })
	}()
	eventually(t, "progress", func() bool { return strings.Contains(stdout.String(), "1200 connections left") })
	must(t, unix.Kill(os.Getpid(), unix.SIGINT)) // the command has taken the signal over
	select {
	case code := <-ended:
		if code != exitFailed || !strings.Contains(stderr.String(),
			"interrupted: the drain of chat/ws1 goes on: `fairlead backends resume chat/ws1` takes it back") {
			t.Errorf("exit code %d, %s", code, stderr.String())
		}
	case <-time.After(patience):
		t.Fatalf("the command goes on after SIGINT:\n%s", stdout.String())
	}
}

// TestWaitDaemonGone: the drain is an order: it stays where the daemon doesn't.
func TestWaitDaemonGone(t *testing.T) {
	d := newAskedDaemon(t)
	d.sock = filepath.Join(t.TempDir(), "another.sock")
	stop := d.serve()
	d.drains = func() []control.Drain {
		go stop()
		return []control.Drain{drainOf(1200)}
	}
	code, _, stderr := d.ask("backends drain ws1 --wait --socket " + d.sock)
	if code != exitNothing || !strings.Contains(stderr, "watch the drain, which stays ordered: the daemon is not running") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}

// terminal is a pseudo terminal: what is written to tty is read from the other end.
func terminal(t *testing.T) (tty *os.File, screen *lines) {
	t.Helper()
	other, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	must(t, err)
	must(t, unix.IoctlSetPointerInt(int(other.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(other.Fd()), unix.TIOCGPTN)
	must(t, err)
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	screen = new(lines)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 4096)
		for {
			n, err := other.Read(buffer)
			screen.Write(buffer[:n])
			if err != nil {
				return // EIO when the last writer has gone
			}
		}
	}()
	t.Cleanup(func() {
		tty.Close()
		<-done
		other.Close()
	})
	return tty, screen
}

// TestWaitOnTerminal: one line, rewritten.
func TestWaitOnTerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	d := newAskedDaemon(t)
	left := 600
	d.drains = func() []control.Drain {
		now := drainOf(left)
		left = max(left-600, 0)
		return []control.Drain{now}
	}
	tty, screen := terminal(t)
	var stderr lines
	code := run(t.Context(), []string{"backends", "drain", "ws1", "--rate", "500", "--wait", "-c", d.file}, tty, &stderr,
		func(string) string { return "" })
	if code != exitDone || stderr.String() != "" {
		t.Errorf("exit code %d, %s", code, stderr.String())
	}
	want := "backend ws1 drains: no new connections; its connections are ended, 500 a second\r\n" +
		"\rchat/ws1: 600 connections left, 20 of them told to end, 900 closed, 500/s ordered, about 1s to go\x1b[K" +
		"\rchat/ws1: no connection is left, 1500 closed\x1b[K\r\n"
	eventually(t, "the last line", func() bool { return len(screen.String()) >= len(want) })
	if diff := cmp.Diff(want, screen.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestProgress: a line now and then where there is no terminal, and always a last one; the rate is that which was seen.
func TestProgress(t *testing.T) {
	var out bytes.Buffer
	w := drainWatch{name: "chat/ws1", out: &out, say: 5 * time.Second}
	began := time.Now()
	at := func(second int, d control.Drain) { w.show(d, began.Add(time.Duration(second)*time.Second)) }
	for second := range 9 {
		at(second, drainOf(1500-100*second))
	}
	slow := control.Drain{Service: "chat", Backend: "ws1", Living: 700, Closed: 0, Left: -1, Deadline: began.Add(5*time.Minute + 10*time.Second)}
	at(10, slow)
	slow.Living = 1
	at(11, slow)
	slow.Living = 0
	at(12, slow)
	if diff := cmp.Diff(`chat/ws1: 1500 connections left, 20 of them told to end, 0 closed, 500/s ordered, about 3s to go
chat/ws1: 1000 connections left, 20 of them told to end, 500 closed, 100/s seen, 500/s ordered, about 2s to go
chat/ws1: 700 connections left, 0 closed, 80/s seen, time to go not known, deadline in 5m
chat/ws1: no connection is left, 0 closed
`, out.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestClose finds connections in maps, as the daemon does, and explains one that is condemned.
func TestClose(t *testing.T) {
	e := newEdge(t)
	d := newAskedDaemon(t)
	set := e.manager.Set()
	d.close = func(r control.CloseRequest) (string, error) {
		conn, err := r.Find(set, e.inv)
		if err != nil {
			return "", err
		}
		b, _ := e.inv.Backend(conn.Backend)
		return fmt.Sprintf("%v on %s", conn.Tuple, b.Name), nil
	}
	e.connect(clientA, "ws1", 0, 20500)
	e.connect(clientB, "ws2", 0, 20501)
	e.halfConnect(clientD, "ws2", 30*time.Second)
	tuple := func(client, service string) string {
		return fmt.Sprint(maps.Tuple{Source: netip.MustParseAddrPort(client), Destination: netip.MustParseAddrPort(service), Protocol: 6})
	}
	for line, want := range map[string]string{
		clientA:                            tuple(clientA, "192.0.2.10:443") + " on ws1\n",
		clientA + " chat":                  tuple(clientA, "192.0.2.10:443") + " on ws1\n",
		clientB + "->192.0.2.10:443":       tuple(clientB, "192.0.2.10:443") + " on ws2\n",
		"[::ffff:198.51.100.7]:40000 chat": tuple(clientA, "192.0.2.10:443") + " on ws1\n",
	} {
		if code, stdout, stderr := d.ask("connections close " + line); code != exitDone || stdout != want {
			t.Errorf("close %s: exit code %d, %q, want %q; %s", line, code, stdout, want, stderr)
		}
	}
	for line, want := range map[string]string{
		clientC:                    "no connection from " + clientC,
		clientC + " chat":          "no connection from " + clientC + " to chat",
		clientA + " web":           "no connection from " + clientA + " to web",
		clientA + " mail":          "there is no service mail: there are chat, web",
		clientA + " 192.0.2.10:80": "there is no service 192.0.2.10:80: there are chat, web",
		clientD:                    "the connection from " + clientD + " is half-open",
	} {
		if code, _, stderr := d.ask("connections close " + line); code != exitFailed || stderr[:len(stderr)-1] != "fairlead: "+want &&
			!strings.HasPrefix(stderr, "fairlead: "+want+":") {
			t.Errorf("close %s: exit code %d, %q, want %q", line, code, stderr, want)
		}
	}
	// The same client, to another service as well: which is meant has to be said.
	services := edgeServices()
	services = append(services, services[0])
	services[2].Name, services[2].Keys = "mail", []netip.AddrPort{netip.MustParseAddrPort("192.0.2.11:25")}
	services[2].Backends = []maps.WantedBackend{{Name: "mx1", Address: netip.MustParseAddr("10.0.0.21"), Port: 25, Method: maps.MethodDSR, Weight: 1}}
	e.apply(services)
	mx, key := e.backend("mail", "mx1"), e.tuple4(clientA)
	key.Daddr, key.Dport = words4("192.0.2.11"), wire(25)
	condemned := connectionOf(mx)
	must(t, e.loader.Maps().Connections4.Put(&key, &condemned))
	if code, _, stderr := d.ask("connections close " + clientA); code != exitFailed ||
		!strings.Contains(stderr, clientA+" has several connections: say to which service address: 192.0.2.10:443, 192.0.2.11:25") {
		t.Errorf("of two: exit code %d, %s", code, stderr)
	}
	if code, stdout, stderr := d.ask("connections close " + clientA + " mail"); code != exitDone || !strings.HasSuffix(stdout, " on mx1\n") {
		t.Errorf("of two, said which: exit code %d, %q, %s", code, stdout, stderr)
	}

	text := e.want("connections get " + clientA + " mail")
	if !strings.Contains(text, "state       condemned (told: backend)\n") || !strings.Contains(text, "timestamp   77\necho        88\n") {
		t.Errorf("a condemned connection:\n%s", text)
	}
	if text = e.want("connections list --state condemned"); strings.Count(text, "\n") != 2 || !strings.Contains(text, "mail") {
		t.Errorf("the condemned ones:\n%s", text)
	}
	item := decoded[[]map[string]any](t, e.want("connections list --state condemned -o json"))[0]
	if fmt.Sprint(item["told"], item["timestamp"], item["timestamp_echo"]) != "[backend] 77 88" {
		t.Errorf("json: %v", item)
	}
	if text = e.want("explain " + clientA + " mail"); !strings.Contains(text, "by rule: policy.") ||
		!strings.Contains(text, "whoever sends on it is answered RST") {
		t.Errorf("explain a condemned connection:\n%s", text)
	}
	// A daemon that holds the pins, and listens elsewhere.
	absent := filepath.Join(t.TempDir(), "absent.sock")
	file := strings.Replace(d.file, "fairlead.yaml", "other.yaml", 1)
	good, err := os.ReadFile("testdata/good.yaml")
	must(t, err)
	must(t, os.WriteFile(file, append(good, "control: {socket: "+absent+"}\n"...), 0o644))
	if code, _, stderr := fairlead(t, "reload", "-c", file); code != exitNothing || loader.Holder(testPins+"/check") == 0 ||
		!strings.Contains(stderr, fmt.Sprintf("yet a daemon runs (pid %d): control.socket has changed since its start", os.Getpid())) {
		t.Errorf("a daemon without a socket there: exit code %d, %s", code, stderr)
	}
}
