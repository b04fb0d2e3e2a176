package health

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"fairlead/userspace/config"
)

// mustScript writes a shell script and returns a check that runs it.
func mustScript(tb testing.TB, script string, arguments ...string) config.Health {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "check")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		tb.Fatal(err)
	}
	check := checkOf(config.HealthExec)
	check.Command = append([]string{path}, arguments...)
	return check
}

func TestExec(t *testing.T) {
	address := netip.MustParseAddrPort("[2001:db8::1]:8080")
	t.Setenv("SECRET_OF_THE_DAEMON", "x")
	for _, c := range []struct {
		name, script string
		want         outcome
	}{
		{"good", "exit 0", outcome{verdict: good, percent: 100}},
		{"good, and says so", "echo fine; echo all well", outcome{verdict: good, percent: 100}},
		{"bad", "exit 3", outcome{reason: "exit status 3"}},
		{"last line", "echo one; echo two >&2; echo; echo '  '; exit 1", outcome{reason: "two"}},
		{"last line without end", "printf 'one\r\ntwo\tthree\\033[0m'; exit 1", outcome{reason: "two three [0m"}},
		{"much", "i=0; while [ $i -lt 3000 ]; do echo a line of some thirty characters $i; i=$((i+1)); done; exit 1",
			outcome{reason: "a line of some thirty characters 2999"}},
		{"a long line", "head -c 100000 /dev/zero | tr '\\0' x; exit 1", outcome{reason: strings.Repeat("x", 124) + "…"}},
		{"by signal", "kill -TERM $$", outcome{reason: "signal: terminated"}},
		{"environment", `env | grep -v -e '^PWD=' -e '^_=' -e '^SHLVL=' -e '^OLDPWD=' | sort | tr '\n' ' '; pwd; exit 1`,
			outcome{reason: oneLine("FAIRLEAD_ADDRESS=2001:db8::1 FAIRLEAD_BACKEND=ws1 FAIRLEAD_PORT=8080 FAIRLEAD_SERVICE=chat " +
				commandPath + " /")}},
		{"arguments", `echo "$#: $1, $2"; exit 1`, outcome{reason: "2: --deep, a b"}},
		{"no input", "read x && exit 0; echo end of input; exit 1", outcome{reason: "end of input"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := once(t, mustScript(t, c.script, "--deep", "a b"), address)
			o.latency = 0
			if o.verdict != c.want.verdict || o.reason != c.want.reason || o.percent != c.want.percent {
				t.Errorf("outcome %+v, want %+v", o, c.want)
			}
		})
	}
}

// TestExecCannotRun wants what is missing here not to be held against the backend.
func TestExecCannotRun(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/nonexistent/check": "not checked: run /nonexistent/check: no such file or directory",
		text:                 "not checked: run " + text + ": permission denied",
	} {
		check := checkOf(config.HealthExec)
		check.Command = []string{path}
		if o := once(t, check, netip.AddrPort{}); o.verdict != moot || o.reason != oneLine(want) {
			t.Errorf("outcome %+v, want %q", o, want)
		}
	}
}

// TestExecTimeout wants a command and all it started dead at the timeout, however little they care for signals.
func TestExecTimeout(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	check := mustScript(t, fmt.Sprintf(`trap '' TERM INT HUP
(trap '' TERM; echo child $$; exec sleep 1000) &
echo $! >>%[1]s; echo $$ >>%[1]s
sleep 1000`, pids))
	check.Timeout = 500 * time.Millisecond
	o := once(t, check, netip.AddrPort{})
	wantReason(t, o, "no answer within 500ms")
	if !o.timeout {
		t.Error("not told as a timeout")
	}
	wantGone(t, pids, 2)
}

// TestExecLeftOver wants nothing left of a command that ended and left a child with its output behind.
func TestExecLeftOver(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	begun := time.Now()
	wantGood(t, once(t, mustScript(t, fmt.Sprintf("sleep 1000 & echo $! >>%s", pids)), netip.AddrPort{}))
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("took %s", took)
	}
	wantGone(t, pids, 1)
}

// TestExecEscaped has a child leave the group with the output in its hands: it is not waited for.
func TestExecEscaped(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	check := mustScript(t, fmt.Sprintf("setsid sh -c 'echo $$ >>%[1]s; exec sleep 1000' & while ! [ -s %[1]s ]; do :; done; echo gone; exit 1", pids))
	wantReason(t, once(t, check, netip.AddrPort{}), "gone")
	for _, pid := range mustPIDs(t, pids, 1) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Errorf("the child that escaped: %v", err)
		}
	}
}

// TestExecBrokenOff ends a check from outside.
func TestExecBrokenOff(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	check := mustScript(t, fmt.Sprintf("echo $$ >>%s; exec sleep 1000", pids))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan outcome)
	go func() { done <- newProbe(Target{Check: check})(ctx) }()
	awaitCondition(t, "the command runs", func() bool {
		text, _ := os.ReadFile(pids)
		return len(text) > 0
	})
	cancel()
	if o := <-done; o.verdict != moot {
		t.Errorf("outcome %+v", o)
	}
	wantGone(t, pids, 1)
}

func mustPIDs(tb testing.TB, path string, n int) (pids []int) {
	tb.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	for _, f := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			tb.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if len(pids) != n {
		tb.Fatalf("%d processes told their number, want %d", len(pids), n)
	}
	return pids
}

// wantGone wants processes ended: gone, or zombies that somebody else is to reap.
func wantGone(tb testing.TB, path string, n int) {
	tb.Helper()
	for _, pid := range mustPIDs(tb, path, n) {
		awaitCondition(tb, fmt.Sprintf("process %d is gone", pid), func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				return true
			}
			_, after, _ := strings.Cut(string(stat), ") ")
			return strings.HasPrefix(after, "Z")
		})
	}
}
