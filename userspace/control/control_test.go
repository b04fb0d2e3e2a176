package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// askVar makes this binary a client that asks at the socket it names, and prints what went wrong.
const askVar = "FAIRLEAD_TEST_ASK"

func TestMain(m *testing.M) {
	if path := os.Getenv(askVar); path != "" {
		_, err := Dial(path).Drains(context.Background())
		fmt.Println(err)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const patience = 10 * time.Second

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func mustListen(tb testing.TB, path string) net.Listener {
	tb.Helper()
	l, err := Listen(path)
	must(tb, err)
	tb.Cleanup(func() { l.Close() })
	return l
}

// wait waits for what is to happen.
func wait[T any](tb testing.TB, what string, c <-chan T) (v T) {
	tb.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		tb.Fatalf("%s: not within %v", what, patience)
	}
	return v
}

// told is a Handler that notes what it was asked, and answers as it was told to.
type told struct {
	mu    sync.Mutex
	asked []any
	err   error
	until func(context.Context) // called by every method, if it is there

	changes []string
	drains  []Drain
	done    string
}

func (h *told) note(ctx context.Context, asked ...any) error {
	h.mu.Lock()
	h.asked = append(h.asked, asked)
	until := h.until
	h.mu.Unlock()
	if until != nil {
		until(ctx)
	}
	return h.err
}

func (h *told) Reload(ctx context.Context) ([]string, error) {
	return h.changes, h.note(ctx, "reload")
}
func (h *told) Drain(ctx context.Context, r DrainRequest) error { return h.note(ctx, "drain", r) }
func (h *told) Resume(ctx context.Context, backend string) error {
	return h.note(ctx, "resume", backend)
}
func (h *told) Weight(ctx context.Context, backend string, weight *uint32) error {
	return h.note(ctx, "weight", backend, weight)
}
func (h *told) Drains(ctx context.Context) ([]Drain, error) { return h.drains, h.note(ctx, "drains") }
func (h *told) Close(ctx context.Context, r CloseRequest) (string, error) {
	return h.done, h.note(ctx, "close", r)
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// server is a running one.
type server struct {
	path string
	stop func() error // ends it and answers what Serve does
}

func start(t *testing.T, h Handler, log *slog.Logger, most times) *server {
	t.Helper()
	s := &server{path: filepath.Join(t.TempDir(), "control.sock")}
	l := mustListen(t, s.path)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, l, h, log, most) }()
	s.stop = sync.OnceValue(func() error {
		cancel()
		return wait(t, "the server's end", served)
	})
	t.Cleanup(func() { s.stop() })
	return s
}

var usual = times{request: patience, stop: patience}

func number(n uint32) *uint32 { return &n }

// ask calls every method of a Handler and gives what each answered, an error by its text.
func ask(ctx context.Context, h Handler) (answers []any) {
	noted := func(answer any, err error) { answers = append(answers, answer, fmt.Sprint(err)) }
	changes, err := h.Reload(ctx)
	noted(changes, err)
	noted(nil, h.Drain(ctx, DrainRequest{Backend: "chat/ws1", Rate: 500, Deadline: 5*time.Minute + 1}))
	noted(nil, h.Drain(ctx, DrainRequest{Backend: "ws2"}))
	noted(nil, h.Resume(ctx, "ws1"))
	noted(nil, h.Weight(ctx, "ws1", number(0)))
	noted(nil, h.Weight(ctx, "ws1", number(MaxWeight)))
	noted(nil, h.Weight(ctx, "ws1", nil))
	drains, err := h.Drains(ctx)
	noted(drains, err)
	done, err := h.Close(ctx, CloseRequest{Client: netip.MustParseAddrPort("198.51.100.7:40000"), Service: "chat"})
	noted(done, err)
	done, err = h.Close(ctx, CloseRequest{Client: netip.MustParseAddrPort("[2001:db8::7]:1")})
	noted(done, err)
	return answers
}

var compare = cmp.Options{cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.EquateEmpty()}

// TestBothEnds: asked over the socket, a Handler is asked the same and answers the same as asked itself.
func TestBothEnds(t *testing.T) {
	at := time.Date(2030, 1, 2, 3, 4, 5, 678, time.UTC)
	for name, h := range map[string]*told{
		"answers": {
			changes: []string{"service chat: backend ws3 is new", "<b>&amp;\u2028 \"as it is\""}, done: "told to end: both ends",
			drains: []Drain{
				{Service: "chat", Backend: "ws1", Rate: 500, Deadline: at.Add(time.Hour), Since: at, Living: 12, Closing: 3, Closed: 4, Left: 90 * time.Second},
				{Service: "web", Backend: "ws1", Since: at, Living: 1 << 40, Left: -1},
			},
		},
		"nothing": {},
		"errors":  {err: errors.New("edge.yaml:4:3: services[0].adress: there is no such field\n    adress: 192.0.2.10\n\n  write address\nedge.yaml:9: …")},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, h, quiet(), usual)
			got := ask(t.Context(), Dial(s.path))
			asked := h.asked
			h.asked = nil
			want := ask(t.Context(), h)
			if diff := cmp.Diff(want, got, compare); diff != "" {
				t.Errorf("answers (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(h.asked, asked, compare); diff != "" || len(asked) != 10 {
				t.Errorf("asked %d times (-want +got):\n%s", len(asked), diff)
			}
			must(t, s.stop())
		})
	}
}

// TestRefusedRequests: what a Handler must not see does not reach it, whoever sends it.
func TestRefusedRequests(t *testing.T) {
	h := new(told)
	s := start(t, h, quiet(), usual)
	client := Dial(s.path)
	for part, err := range map[string]error{
		"1000001 connections a second: the most is 1000000": client.Drain(t.Context(), DrainRequest{Backend: "ws1", Rate: MaxRate + 1}),
		"a deadline of -1s is over already":                 client.Drain(t.Context(), DrainRequest{Backend: "ws1", Deadline: -time.Second}),
		"drain: which backend?":                             client.Drain(t.Context(), DrainRequest{Rate: 1}),
		"resume: which backend?":                            client.Resume(t.Context(), ""),
		"set a weight: which backend?":                      client.Weight(t.Context(), "", number(1)),
		"set the weight of ws1 to 1001: the most is 1000":   client.Weight(t.Context(), "ws1", number(MaxWeight+1)),
		"the client's address and port are missing":         func() error { _, err := client.Close(t.Context(), CloseRequest{}); return err }(),
	} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v; want %s", err, part)
		}
	}
	raw := &http.Client{Transport: client.http.Transport}
	for _, c := range []struct {
		method, path, body string
		status             int
		part               string
	}{
		{"POST", pathDrain, `{"backend":"ws1","rate":1000001}`, 400, "the most is 1000000"},
		{"POST", pathDrain, `{"backend":"ws1","rate":-1}`, 400, "rate"},
		{"POST", pathDrain, `{"backend":"ws1","deadline_ns":-1}`, 400, "is over already"},
		{"POST", pathDrain, `{"backend":"ws1","after":"ws2"}`, 400, `unknown field "after"`},
		{"POST", pathDrain, `{"backend":"ws1"}{}`, 400, "something follows its end"},
		{"POST", pathDrain, `{"backend":"ws1"`, 400, "read the request: unexpected EOF"},
		{"POST", pathDrain, `["ws1"]`, 400, "read the request"},
		{"POST", pathDrain, "", 400, "which backend?"},
		{"POST", pathWeight, `{"backend":"ws1","weight":1001}`, 400, "the most is 1000"},
		{"POST", pathClose, `{"client":"198.51.100.7"}`, 400, "read the request"},
		{"POST", pathClose, `{"client":"198.51.100.7:0"}`, 400, "are missing"},
		{"POST", pathResume, `{"backend":"` + strings.Repeat("x", maxBody) + `"}`, 413, "longer than 65536 bytes"},
		{"GET", pathReload, "", 404, "knows no GET /v1/reload"},
		{"POST", pathDrains, "", 404, "knows no POST /v1/drains"},
		{"POST", "/v2/reload", "", 404, "of another version than the command?"},
		{"GET", "/", "", 404, "knows no GET /"},
	} {
		r, err := http.NewRequestWithContext(t.Context(), c.method, "http://fairlead"+c.path, strings.NewReader(c.body))
		must(t, err)
		answer, err := raw.Do(r)
		must(t, err)
		text, err := io.ReadAll(answer.Body)
		must(t, errors.Join(err, answer.Body.Close()))
		if answer.StatusCode != c.status || !strings.Contains(string(text), c.part) {
			t.Errorf("%s %s %.60s: %s, %s; want %d, %s", c.method, c.path, c.body, answer.Status, text, c.status, c.part)
		}
	}
	if len(h.asked) != 0 {
		t.Errorf("the handler was asked %v", h.asked)
	}
}

// TestClientGoesAway: the handler hears of it.
func TestClientGoesAway(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan error, 1)
	h := &told{until: func(ctx context.Context) {
		close(begun)
		<-ctx.Done()
		ended <- ctx.Err()
	}}
	s := start(t, h, quiet(), usual)
	ctx, cancel := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	go func() { _, err := Dial(s.path).Reload(ctx); answered <- err }()
	wait(t, "the request", begun)
	cancel()
	if err := wait(t, "the client", answered); !errors.Is(err, context.Canceled) {
		t.Errorf("the client: %v", err)
	}
	if err := wait(t, "the handler", ended); !errors.Is(err, context.Canceled) {
		t.Errorf("the handler: %v", err)
	}
}

// TestLongRequest: a reload may take longer than sending it may.
func TestLongRequest(t *testing.T) {
	most := times{request: 50 * time.Millisecond, stop: patience}
	cut := make(chan error, 1)
	h := &told{changes: []string{"one"}, until: func(ctx context.Context) {
		select {
		case <-ctx.Done():
			cut <- ctx.Err()
		case <-time.After(10 * most.request):
			cut <- nil
		}
	}}
	s := start(t, h, quiet(), most)
	changes, err := Dial(s.path).Reload(t.Context())
	if late := wait(t, "the handler", cut); late != nil || err != nil || !slices.Equal(changes, h.changes) {
		t.Errorf("%q, %v; the handler: %v", changes, err, late)
	}
}

// TestSlowRequest: who does not finish a request is not waited for.
func TestSlowRequest(t *testing.T) {
	s := start(t, new(told), quiet(), times{request: 50 * time.Millisecond, stop: patience})
	for _, text := range []string{"", "POST /v1/drain HTTP/1.1\r\n", "POST /v1/drain HTTP/1.1\r\nHost: fairlead\r\nContent-Length: 99\r\n\r\n{"} {
		conn, err := net.Dial("unix", s.path)
		must(t, err)
		_, err = io.WriteString(conn, text)
		must(t, err)
		must(t, conn.SetDeadline(time.Now().Add(patience)))
		if _, err := io.ReadAll(conn); err != nil {
			t.Errorf("%q: the server did not hang up: %v", text, err)
		}
		must(t, conn.Close())
	}
}

// TestStop: the handler hears of it, the socket is gone, and a command is told that nothing runs.
func TestStop(t *testing.T) {
	begun := make(chan struct{})
	h := &told{err: errors.New("reload: the daemon stops"), until: func(ctx context.Context) {
		close(begun)
		<-ctx.Done()
	}}
	s := start(t, h, quiet(), usual)
	client, answered := Dial(s.path), make(chan error, 1)
	go func() { _, err := client.Reload(context.Background()); answered <- err }()
	wait(t, "the request", begun)
	if err := s.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	if err := wait(t, "the answer", answered); err == nil || err.Error() != "reload: the daemon stops" {
		t.Errorf("a request under way: %v", err)
	}
	if _, err := os.Lstat(s.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
	if err := client.Resume(t.Context(), "ws1"); !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), s.path) {
		t.Errorf("a command: %v", err)
	}
}

// TestStopCutsOff: a handler that does not mind its context holds up no stop.
func TestStopCutsOff(t *testing.T) {
	begun, release, left := make(chan struct{}), make(chan struct{}), make(chan struct{})
	h := &told{until: func(context.Context) {
		close(begun)
		<-release
		close(left)
	}}
	s := start(t, h, quiet(), times{request: patience, stop: 50 * time.Millisecond})
	answered := make(chan error, 1)
	go func() { _, err := Dial(s.path).Reload(context.Background()); answered <- err }()
	wait(t, "the request", begun)
	if err := s.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	if err := wait(t, "the client", answered); err == nil || errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "went away") {
		t.Errorf("the client: %v", err)
	}
	close(release)
	wait(t, "the handler", left)
}

// TestPanic: a command that breaks something ends itself alone.
func TestPanic(t *testing.T) {
	var log lockedBuilder
	h := &told{until: func(context.Context) { panic("a broken handler") }}
	s := start(t, h, slog.New(slog.NewTextHandler(&log, nil)), usual)
	if _, err := Dial(s.path).Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "its log says why") {
		t.Errorf("%v", err)
	}
	h.mu.Lock()
	h.until = nil
	h.mu.Unlock()
	if _, err := Dial(s.path).Reload(t.Context()); err != nil {
		t.Errorf("the next request: %v", err)
	}
	must(t, s.stop())
	if !strings.Contains(log.String(), "a broken handler") {
		t.Errorf("the log: %s", log.String())
	}
}

type lockedBuilder struct {
	mu sync.Mutex
	strings.Builder
}

func (b *lockedBuilder) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Builder.Write(p)
}

// TestLog: who changed what is in the log; who only asks is not.
func TestLog(t *testing.T) {
	var log lockedBuilder
	s := start(t, new(told), slog.New(slog.NewTextHandler(&log, nil)), usual)
	ask(t.Context(), Dial(s.path))
	must(t, s.stop())
	text := log.String()
	for _, part := range []string{
		"command=drain", `{\"backend\":\"chat/ws1\",\"rate\":500,`, "command=weight", `\"weight\":0}`, `\"weight\":null}`, "command=close",
		fmt.Sprintf("uid=%d pid=%d", os.Getuid(), os.Getpid()),
	} {
		if !strings.Contains(text, part) {
			t.Errorf("the log lacks %s:\n%s", part, text)
		}
	}
	if n := strings.Count(text, "\n"); n != 9 || strings.Contains(text, "drains") {
		t.Errorf("%d lines:\n%s", n, text)
	}
}

// stale leaves a socket as a process does that was killed.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, l.Close())
}

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	must(t, err)
	return info.Mode()
}

// TestListen: modes are as said whatever the umask is; a stale socket goes, all else stays.
func TestListen(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o077, 0o777} {
		dir := filepath.Join(t.TempDir(), "run", "fairlead")
		must(t, os.MkdirAll(filepath.Dir(dir), 0o755))
		path := filepath.Join(dir, "control.sock")
		before := unix.Umask(umask)
		l, err := Listen(path)
		unix.Umask(before)
		must(t, err)
		if got := mode(t, path); got != fs.ModeSocket|0o660 {
			t.Errorf("umask %#o: the socket has mode %v", umask, got)
		}
		if got := mode(t, dir); got != fs.ModeDir|0o755 {
			t.Errorf("umask %#o: its directory has mode %v", umask, got)
		}
		must(t, l.Close())
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("closed, it is there: %v", err)
		}
	}

	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o711))
	path := filepath.Join(dir, "control.sock")
	stale(t, path)
	l := mustListen(t, path)
	if got := mode(t, dir); got != fs.ModeDir|0o711 {
		t.Errorf("a directory that was there has mode %v", got)
	}
	_, err := Listen(path)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("another process (pid %d) listens at %s", os.Getpid(), path)) {
		t.Errorf("a second: %v", err)
	}
	conn, err := net.Dial("unix", path) // the first is not disturbed
	must(t, err)
	must(t, errors.Join(conn.Close(), l.Close()))

	for what, make := range map[string]func(path string) error{
		"file":      func(path string) error { return os.WriteFile(path, []byte("mine"), 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"link":      func(path string) error { return os.Symlink("elsewhere", path) },
	} {
		path := filepath.Join(dir, what)
		must(t, make(path))
		before := mode(t, path)
		if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), path+" is there and no socket") {
			t.Errorf("a %s: %v", what, err)
		}
		if got := mode(t, path); got != before {
			t.Errorf("a %s became %v", what, got)
		}
	}
	if _, err := Listen(filepath.Join(dir, "file", "control.sock")); err == nil {
		t.Error("below a file")
	}
}

// TestListenAtOnce: of many that start over a stale socket one has it, and keeps it.
func TestListenAtOnce(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "control.sock")
		stale(t, path)
		var starting sync.WaitGroup
		listeners := make(chan net.Listener, 8)
		for range cap(listeners) {
			starting.Go(func() {
				if l, err := Listen(path); err == nil {
					listeners <- l
				} else if !strings.Contains(err.Error(), "another process") {
					t.Error(err)
				}
			})
		}
		starting.Wait()
		if n := len(listeners); n != 1 {
			t.Errorf("%d listen", n)
		}
		conn, err := net.Dial("unix", path)
		must(t, err)
		must(t, conn.Close())
		for range len(listeners) {
			must(t, (<-listeners).Close())
		}
	}
}

// TestNotRunning: no socket, nobody at it; and what is neither.
func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "control.sock")
	if err := Dial(path).Resume(t.Context(), "ws1"); !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "no socket at "+path) {
		t.Errorf("no socket: %v", err)
	}
	stale(t, path)
	if err := Dial(path).Resume(t.Context(), "ws1"); !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "nobody listens at "+path) {
		t.Errorf("a stale one: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	if err := Dial(filepath.Join(dir, "file", "sock")).Resume(t.Context(), "ws1"); err == nil || errors.Is(err, ErrNotRunning) {
		t.Errorf("below a file: %v", err)
	}
}

// TestNotAllowed: who may not open the socket is told who may.
func TestNotAllowed(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test becomes another user: it needs root")
	}
	dir := t.TempDir()
	for d := dir; d != os.TempDir(); d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	binary, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	client := filepath.Join(dir, "client")
	must(t, os.WriteFile(client, binary, 0o755))
	const user = 65534
	askAs := func(path string, groups ...uint32) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), client)
		cmd.Env = []string{askVar + "=" + path}
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, Groups: groups}}
		out, err := cmd.CombinedOutput()
		must(t, err)
		return strings.TrimSpace(string(out))
	}
	path := filepath.Join(dir, "open", "control.sock")
	l := mustListen(t, path)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, new(told), quiet()) }()
	defer func() { cancel(); must(t, wait(t, "the server's end", served)) }()

	want := "open " + path + ": permission denied: user root and members of group root may open it"
	if got := askAs(path); got != want {
		t.Errorf("%s; want %s", got, want)
	}
	must(t, os.Chown(path, user+1, 0))
	must(t, os.Chmod(path, 0o600))
	if got := askAs(path); !strings.HasSuffix(got, "user 65535 may open it, and root") {
		t.Errorf("another's alone: %s", got)
	}
	must(t, os.Chown(path, 0, 4242))
	must(t, os.Chmod(path, 0o660))
	if got := askAs(path, 4242); got != "<nil>" {
		t.Errorf("of the socket's group: %s", got)
	}
	must(t, os.Chmod(filepath.Dir(path), 0o700))
	if got := askAs(path, 4242); !strings.HasSuffix(got, "only who may look into "+filepath.Dir(path)+" may open it: try as root") {
		t.Errorf("a directory that is shut: %s", got)
	}
}

// FuzzDecode: any bytes are a request that is right, or refused.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"backend":"chat/ws1","rate":500,"deadline_ns":300000000000}`))
	f.Add([]byte(`{"client":"[2001:db8::7]:1","service":"chat"}`))
	f.Add([]byte(`{"backend":"ws1","weight":null}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if r, err := decode[DrainRequest](body); err == nil && (r.Backend == "" || r.Rate > MaxRate || r.Deadline < 0) {
			t.Errorf("%+v", r)
		}
		if r, err := decode[weightRequest](body); err == nil && (r.Backend == "" || r.Weight != nil && *r.Weight > MaxWeight) {
			t.Errorf("%+v", r)
		}
		if r, err := decode[CloseRequest](body); err == nil && (!r.Client.IsValid() || r.Client.Port() == 0) {
			t.Errorf("%+v", r)
		}
	})
}
