package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"fairlead/test/lab"
	"fairlead/userspace/config"
)

func TestDemoBars(t *testing.T) {
	group := []bar{{"ws1", 1000, ""}, {"ws10", 500, ""}, {"ws2", 1, "(late)"}, {"ws3", 0, ""}}
	for plain, want := range map[bool]string{
		true: `
           ws1   ########################################  1,000   66.6 %
           ws10  ####################                        500   33.3 %
           ws2   #                                             1    0.1 %  (late)
           ws3                                                 0    0.0 %
`,
		false: `
           ws1   ████████████████████████████████████████  1,000   66.6 %
           ws10  ████████████████████                        500   33.3 %
           ws2   ▏                                             1    0.1 %  (late)
           ws3                                                 0    0.0 %
`,
	} {
		var out bytes.Buffer
		(&teller{out: &out, plain: plain}).bars(group)
		if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), out.String()); diff != "" {
			t.Errorf("plain %v (-want +got):\n%s", plain, diff)
		}
	}
	if got := drawn(13, 40, 10, false); got != "███▎" { // 3.25 characters
		t.Errorf("13 of 40 in 10 characters is drawn %q", got)
	}
	var out bytes.Buffer
	(&teller{out: &out}).bars([]bar{{"ws1", 0, ""}})
	if want := "           ws1" + strings.Repeat(" ", 44) + "0    0.0 %\n"; out.String() != want {
		t.Errorf("bars of nothing: %q, want %q", out.String(), want)
	}
}

func TestDemoTable(t *testing.T) {
	var out bytes.Buffer
	(&teller{out: &out, plain: true}).table([]row{{"opened", grouped(12345)}, {"broken", "0"}})
	want := `         ---------------
         opened   12,345
         broken        0
         ---------------
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
}

func TestDemoFigures(t *testing.T) {
	for n, want := range map[int]string{
		0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1: "-1", -1234: "-1,234",
	} {
		if got := grouped(n); got != want {
			t.Errorf("grouped(%d) is %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		250 * time.Microsecond: "250 µs", 2500 * time.Microsecond: "2.5 ms",
		25 * time.Millisecond: "25 ms", 2500 * time.Millisecond: "2.5 s",
	} {
		if got := brief(d); got != want {
			t.Errorf("brief(%d ns) is %q, want %q", d, got, want)
		}
	}
	if got := counted(1, "backend") + ", " + counted(2000, "backend"); got != "1 backend, 2,000 backends" {
		t.Error(got)
	}
}

func TestDemoOptions(t *testing.T) {
	good := demoOptions{clients: 3000, backends: 3, method: config.MethodFullNAT}
	if err := good.check(nil); err != nil {
		t.Fatal(err)
	}
	if err := good.check([]string{"now"}); err == nil {
		t.Error("an argument is taken")
	}
	for name, spoil := range map[string]func(*demoOptions){
		"few clients":   func(o *demoOptions) { o.clients = 99 },
		"many clients":  func(o *demoOptions) { o.clients = 11_001 },
		"no backends":   func(o *demoOptions) { o.backends = 0 },
		"many backends": func(o *demoOptions) { o.backends = 51 },
		"method":        func(o *demoOptions) { o.method = config.MethodNAT },
		"name":          func(o *demoOptions) { o.name = "../x" },
	} {
		o := good
		spoil(&o)
		if err := o.check(nil); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	most := demo{demoOptions: demoOptions{clients: mostDemoClients, backends: mostDemoBackends}}
	if total := most.clients + 3*most.more(); total > lab.MaxClients {
		t.Errorf("the largest demo opens %d connections, one process of the lab holds %d", total, lab.MaxClients)
	}
}

// TestDemoConfiguration has the demo's file read as the daemon reads it.
func TestDemoConfiguration(t *testing.T) {
	for _, method := range []config.Method{config.MethodFullNAT, config.MethodDSR} {
		for _, service := range []string{"192.0.2.10:443", "[2001:db8::10]:443"} {
			d := demo{
				demoOptions: demoOptions{method: method},
				lab:         &lab.Topology{EdgeFront: "front", EdgeBack: "back"},
				service:     netip.MustParseAddrPort(service),
				listed: []*lab.Backend{{
					Node: &lab.Node{}, IPv4: netip.MustParseAddr("10.0.0.11"), IPv6: netip.MustParseAddr("fd00:a::11"),
				}},
			}
			// A node made outside of a lab has no name, and a backend without one is refused.
			text := strings.Replace(d.configuration(), "{name: ,", "{name: ws1,", 1)
			c, err := config.Parse("demo.yaml", []byte(text))
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			if errs := c.Unsupported(); len(errs) > 0 {
				t.Errorf("%v", errors.Join(errs...))
			}
			got := c.Services[0]
			if got.Method != method || netip.AddrPortFrom(got.Address, got.Port) != d.service ||
				len(got.Backends) != 1 || got.Backends[0].Port != d.backendPort() || c.Dataplane.PinPath != demoPins {
				t.Errorf("%s says %+v", text, got)
			}
		}
	}
}

// TestDemo builds the program and has it tell its story: to the end, interrupted, with a backend that dies, and kept.
func TestDemo(t *testing.T) {
	program := filepath.Join(t.TempDir(), "fairlead")
	if output, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, output)
	}
	for i, test := range []struct {
		name string
		run  func(t *testing.T, program, name string)
	}{
		{"fullnat", func(t *testing.T, program, name string) { testDemoTold(t, program, name, "--method", "fullnat") }},
		{"dsr, IPv6", func(t *testing.T, program, name string) {
			testDemoTold(t, program, name, "--method", "dsr", "--ipv6", "--backends", "2")
		}},
		{"a backend dies", testDemoFails},
		{"interrupted", testDemoInterrupted},
		{"kept", testDemoKept},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			name := fmt.Sprintf("t%dx%d", os.Getpid(), i)
			t.Cleanup(func() {
				if output, err := exec.Command(program, "demo", "--clean", "--name", name).CombinedOutput(); err != nil {
					t.Errorf("clean: %v\n%s", err, output)
				}
				wantNoDemo(t, name)
			})
			test.run(t, program, name)
		})
	}
}

func wantNoDemo(t *testing.T, name string) {
	t.Helper()
	o := demoOptions{name: name}
	for _, pattern := range []string{
		"/run/netns/" + o.labName() + "-*", "/run/fairlead-lab/" + o.labName(), o.pins(), o.dir(),
	} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range commands {
		if text, _ := os.ReadFile(path); bytes.Contains(text, []byte(o.file())) {
			t.Errorf("left running: %s: %q", path, text)
		}
	}
}

// testDemoTold is the whole story, small.
func testDemoTold(t *testing.T, program, name string, flags ...string) {
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	arguments := append([]string{"demo", "--clients", "300", "--name", name}, flags...)
	output, err := exec.CommandContext(ctx, program, arguments...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	for _, want := range []string{
		`XDP runs natively, in the driver, on 2 of the edge's 2 interfaces`,
		`nobody moved: 3[0-9]{2} connections open`,
		`only new connections noticed`,
		`with no daemon`,
		`slot for slot`,
		`connections moved +0\n +connections broken +0\n`,
	} {
		if !regexp.MustCompile(want).Match(output) {
			t.Errorf("the story lacks %q", want)
		}
	}
	if bytes.Contains(output, []byte("FAILED")) || bytes.ContainsAny(output, "█✓✗") {
		t.Error("a check failed, or what is no terminal was drawn on")
	}
	if t.Failed() {
		t.Logf("%s", output)
	}
	wantNoDemo(t, name)
}

// testDemoFails has the story see that connections break.
func testDemoFails(t *testing.T, program, name string) {
	cmd := demoUntil(t, program, "they talk", "--name", name)
	records, _ := filepath.Glob("/run/fairlead-lab/" + demoOptions{name: name}.labName() + "/processes/*")
	killed := false
	for _, record := range records {
		pid, err := strconv.Atoi(filepath.Base(record))
		if text, _ := os.ReadFile(record); err == nil && bytes.Contains(text, []byte("ws2-server")) {
			killed = syscall.Kill(pid, syscall.SIGKILL) == nil
		}
	}
	if !killed {
		t.Fatalf("no server of ws2 among %v", records)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("%v, want exit code 1", err)
	}
	told := fmt.Sprint(cmd.Stdout)
	if !strings.Contains(told, "FAILED: ") || !regexp.MustCompile(`connections broken +[1-9]`).MatchString(told) {
		t.Errorf("a broken connection goes unsaid:\n%s", told)
	}
	wantNoDemo(t, name)
}

// demoUntil starts a demo and returns once it has told a line that contains what is awaited.
func demoUntil(t *testing.T, program, awaited string, arguments ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(program, append([]string{"demo", "--clients", "100"}, arguments...)...)
	told := &watchedOutput{awaited: awaited, seen: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = told, told
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() }) // no harm where it has ended
	select {
	case <-told.seen:
	case <-time.After(30 * time.Second):
		t.Fatalf("no %q within 30 s:\n%s", awaited, told)
	}
	return cmd
}

// watchedOutput tells when an output contains what is awaited.
type watchedOutput struct {
	mu      sync.Mutex
	text    bytes.Buffer
	awaited string
	seen    chan struct{}
	found   bool
}

func (w *watchedOutput) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(b)
	if !w.found && strings.Contains(w.text.String(), w.awaited) {
		w.found = true
		close(w.seen)
	}
	return len(b), nil
}

func (w *watchedOutput) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

// testDemoInterrupted has Ctrl-C and a closed pipe clear away, and a run after SIGKILL clear away what that left.
func testDemoInterrupted(t *testing.T, program, name string) {
	cmd := demoUntil(t, program, "they talk", "--name", name)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("interrupted: %v, want exit code 1\n%s", err, cmd.Stdout)
	}
	wantNoDemo(t, name)

	cmd = demoUntil(t, program, "they talk", "--name", name)
	if output, err := exec.Command(program, "demo", "--clean", "--name", name).CombinedOutput(); err == nil {
		t.Errorf("--clean beside a demo being told: %s", output)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if left, _ := filepath.Glob(demoOptions{name: name}.pins()); len(left) != 1 {
		t.Error("a killed demo left no pins: nothing is tested here")
	}
	cmd = demoUntil(t, program, "they talk", "--name", name)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	wantNoDemo(t, name)

	// Nobody listens any more.
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(program, "demo", "--clients", "100", "--name", name)
	cmd.Stdout = writer
	if err := errors.Join(cmd.Start(), writer.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	reader.Close()
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("with nobody to read it: %v, want exit code 1", err)
	}
	wantNoDemo(t, name)
}

// testDemoKept leaves a demo up, looks around in it as it says one may, starts the daemon again by hand, and ends it.
func testDemoKept(t *testing.T, program, name string) {
	cmd := demoUntil(t, program, "demo --clean", "--keep", "--name", name)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, cmd.Stdout)
	}
	told := fmt.Sprint(cmd.Stdout)
	_, told, _ = strings.Cut(told, "Kept: ")
	pattern := regexp.MustCompile(`(?m)^ +(nsenter|export|kill|/run/fairlead-demo\S*)( [^|\n]*)`)
	commands := pattern.FindAllStringSubmatch(told, -1)
	if len(commands) != 9 {
		t.Fatalf("it names %d commands:\n%s", len(commands), told)
	}
	environment := os.Environ()
	var status string
	for _, command := range commands {
		line := command[1] + command[2]
		if variable, ok := strings.CutPrefix(line, "export "); ok {
			environment = append(environment, variable)
			continue
		}
		if strings.HasSuffix(line, " status") {
			status = line
		}
		words := strings.Fields(line)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		run := exec.CommandContext(ctx, words[0], words[1:]...)
		run.Env = environment
		if strings.HasSuffix(line, " run") { // the daemon
			if err := run.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { run.Wait() })
			words = strings.Fields(status)
			for pid := fmt.Sprint("pid ", run.Process.Pid); ctx.Err() == nil; {
				look := exec.CommandContext(ctx, words[0], words[1:]...)
				look.Env = environment
				if output, _ := look.Output(); bytes.Contains(output, []byte(pid)) {
					break
				}
			}
			if ctx.Err() != nil {
				t.Errorf("%s: the status never showed it", line)
			}
			continue
		}
		if output, err := run.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", line, err, output)
		}
		if strings.HasPrefix(line, "kill -KILL") { // which takes its time on a busy machine
			words = strings.Fields(status)
			for gone := false; !gone && ctx.Err() == nil; {
				look := exec.CommandContext(ctx, words[0], words[1:]...)
				look.Env = environment
				output, _ := look.Output()
				gone = bytes.Contains(output, []byte("not running"))
			}
		}
	}
	wantNoDemo(t, name)
}
