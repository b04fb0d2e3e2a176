package health

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/userspace/config"
)

var crowdTime = flag.Duration("health.crowd", 7*time.Second, "how long 2,000 backends are checked")

// roleVariable makes a test binary a helper process.
const (
	roleVariable = "FAIRLEAD_HEALTH_TEST_ROLE"
	roleCrowd    = "crowd"
)

func playRole(role string) int {
	if role != roleCrowd {
		fmt.Fprintf(os.Stderr, "no role %q\n", role)
		return 2
	}
	if err := serveCrowd(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// crowdPorts are what the crowd's servers tell of themselves: one listener each for all addresses of 127.0.0.0/8.
type crowdPorts struct {
	Web    uint16 // HTTP and WebSockets
	Silent uint16 // accepts, says nothing
}

// serveCrowd serves until its input ends; then it writes how often each backend was asked.
func serveCrowd(in io.Reader, out io.Writer) error {
	web, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		return err
	}
	silence, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		return err
	}
	var mu sync.Mutex
	asked := map[string]int{}
	mux := http.NewServeMux()
	mux.HandleFunc("/http", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") })
	mux.Handle("/websocket", echoWebSocket(0, nil))
	server := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			local := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr).AddrPort()
			to := netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
			mu.Lock()
			asked[to.String()]++
			mu.Unlock()
			mux.ServeHTTP(w, r)
		})}
	go server.Serve(web)
	go func() {
		for {
			c, err := silence.Accept()
			if err != nil {
				return
			}
			go func() {
				silent(c)
				c.Close()
			}()
		}
	}()
	encoder := json.NewEncoder(out)
	if err := encoder.Encode(crowdPorts{uint16(web.Addr().(*net.TCPAddr).Port), uint16(silence.Addr().(*net.TCPAddr).Port)}); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	return encoder.Encode(asked)
}

// TestCrowd checks 2,000 backends every 2 s: by tcp, http and websocket, and one in fifty never answers. Their servers
// are another process, so that what is measured is the checks.
func TestCrowd(t *testing.T) {
	const n, parallel = 2000, 256
	servers := exec.Command(os.Args[0])
	servers.Env = append(os.Environ(), roleVariable+"="+roleCrowd)
	servers.Stderr = os.Stderr
	in, err := servers.StdinPipe() // its end, also by our death, ends the process
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := servers.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := servers.Start(); err != nil {
		t.Fatal(err)
	}
	defer servers.Wait()
	defer in.Close()
	answers := json.NewDecoder(bufio.NewReader(stdout))
	var ports crowdPorts
	if err := answers.Decode(&ports); err != nil {
		t.Fatal(err)
	}

	var targets []Target
	kinds := []config.HealthType{config.HealthTCP, config.HealthHTTP, config.HealthWebSocket}
	for i := range n {
		check := checkOf(kinds[i%len(kinds)])
		check.Path, check.Timeout, check.Jitter = "/"+check.Type.String(), check.Interval, 10
		address := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), ports.Web)
		if i%50 == 1 { // of an http check
			check.Type = config.HealthHTTP
			address = netip.AddrPortFrom(address.Addr(), ports.Silent)
		}
		targets = append(targets, Target{Key: Key{Service: "chat", Backend: fmt.Sprintf("ws%d", i), Address: address}, Check: check})
	}

	c := New(Options{Parallel: parallel})
	var mu sync.Mutex
	starts := map[Key][]time.Time{}
	disturbed := time.Duration(0) // the longest that this machine kept anybody waiting: here, or at a server
	c.newProbe = func(target Target) probe {
		real := newProbe(target)
		return func(ctx context.Context) outcome {
			now := time.Now()
			mu.Lock()
			starts[target.Key] = append(starts[target.Key], now)
			mu.Unlock()
			o := real(ctx)
			mu.Lock()
			disturbed = max(disturbed, o.latency)
			mu.Unlock()
			return o
		}
	}
	c.Set(targets)
	goroutines, sockets := runtime.NumGoroutine(), openSockets(t)
	ctx, cancel := context.WithTimeout(t.Context(), *crowdTime)
	defer cancel()
	usedBefore, begun := cpuUsed(t), time.Now()
	result := make(chan error, 1)
	go func() { result <- c.Run(ctx) }()
	mostGoroutines, mostSockets := 0, 0
	for watch := time.NewTicker(50 * time.Millisecond); ctx.Err() == nil; {
		select {
		case due := <-watch.C:
			mu.Lock()
			disturbed = max(disturbed, time.Since(due))
			mu.Unlock()
			mostGoroutines = max(mostGoroutines, runtime.NumGoroutine()-goroutines)
			mostSockets = max(mostSockets, openSockets(t)-sockets)
		case <-ctx.Done():
			watch.Stop()
		}
	}
	if err := <-result; err != nil {
		t.Errorf("Run: %v", err)
	}
	took, used := time.Since(begun), cpuUsed(t)-usedBefore
	reports := c.Reports()
	if left := openSockets(t) - sockets; left > 0 {
		t.Errorf("%d sockets are left open", left)
	}
	in.Close()
	asked := map[string]int{}
	if err := answers.Decode(&asked); err != nil {
		t.Fatal(err)
	}

	checks, checked, slow, worst := 0, 0, 0, time.Duration(0)
	perSlot := map[time.Duration]int{} // of 100 ms
	const low, high = 1800 * time.Millisecond, 2200 * time.Millisecond
	late := 100*time.Millisecond + 2*disturbed
	for i, target := range targets {
		all := starts[target.Key]
		silent := i%50 == 1
		for j, s := range all {
			if j > 1 && !silent { // between the first two is a cut interval
				gap := s.Sub(all[j-1])
				checked++
				if gap < low-late {
					t.Errorf("%s was checked %s after the check before", target.Backend, gap)
				}
				if gap > high+late {
					slow++
				}
				worst = max(worst, gap)
			}
			perSlot[s.Sub(begun)/(100*time.Millisecond)]++
		}
		checks += len(all)
		want := int((took-late).Seconds()/2.2) - 1 // none starves
		if len(all) < want || len(all) == 0 || took-all[len(all)-1].Sub(begun) > 3*time.Second+late {
			t.Errorf("%s was checked %d times in %s, last %s before the end", target.Backend, len(all), took, took-all[len(all)-1].Sub(begun))
		}
		if heard := asked[target.Address.String()]; target.Check.Type != config.HealthTCP && !silent && (heard < len(all)-1 || heard > len(all)) {
			t.Errorf("%s was checked %d times and asked %d times", target.Backend, len(all), heard)
		}
	}
	for i, target := range targets {
		at := slices.IndexFunc(reports, func(r Report) bool { return r.Key == target.Key })
		want := Up
		if i%50 == 1 {
			want = Down
		}
		if reports[at].Status != want || want == Up && reports[at].Failures != 0 {
			t.Errorf("report %+v, want %s", reports[at], want)
		}
	}
	// The ordinary rate is 100 in 100 ms; the first second and a half has the first checks of all as well.
	fullest := 0
	for slot, count := range perSlot {
		if slot > 15 {
			fullest = max(fullest, count)
		}
	}
	if most := 250 + int(late/time.Millisecond); fullest > most {
		t.Errorf("%d checks began within 100 ms, want at most %d", fullest, most)
	}
	if slow > checked/100 || worst > 4*time.Second+late {
		t.Errorf("%d of %d checks came more than %s after the one before, the worst %s", slow, checked, (high + late).Round(time.Millisecond), worst)
	}
	// A connection being opened takes a goroutine beside its worker's.
	if mostGoroutines > 2*parallel+16 || mostSockets > parallel {
		t.Errorf("%d goroutines and %d sockets at once", mostGoroutines, mostSockets)
	}
	t.Logf("%d checks of %d backends in %s: %.1f%% of a CPU, %s a check; at most %d goroutines, %d sockets; "+
		"at most %d checks began within 100 ms; longest interval %s, %d of %d over %s; the machine kept others waiting for up to %s",
		checks, n, took.Round(time.Millisecond), 100*used.Seconds()/took.Seconds(), (used / time.Duration(checks)).Round(time.Microsecond),
		mostGoroutines, mostSockets, fullest, worst.Round(time.Millisecond), slow, checked, (high + late).Round(time.Millisecond),
		disturbed.Round(time.Millisecond))
}

// openSockets counts this process's.
func openSockets(tb testing.TB) (n int) {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			tb.Fatal(err)
		}
		if strings.HasPrefix(target, "socket:") {
			n++
		}
	}
	return n
}

func cpuUsed(tb testing.TB) time.Duration {
	tb.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
