package kernels

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// suites are those whose kernels are tried: the oldest that Fairlead supports, what servers run, and the newest.
var suites = []suite{
	{"bookworm", true}, // 6.1
	{"trixie", true},   // 6.12
	{"sid", false},
}

var (
	chosen  chosenSuites
	cache   = flag.String("kernels.cache", "/var/cache/fairlead-kernels", "folder that keeps kernels and consoles")
	full    = flag.Bool("kernels.full", false, "run all packet tests in each kernel, not some of each kind")
	timeout = flag.Duration("kernels.timeout", 6*time.Minute, "how long one machine may run")
	asInit  = flag.Bool("kernels.init", false, "be the first process of a virtual machine")
)

func init() {
	flag.Var(&chosen, "kernels", "boot other kernels in virtual machines: all, or those of these `suites` of Debian, "+
		"as in -kernels=bookworm,sid")
}

// chosenSuites is the value of a flag that may stand alone.
type chosenSuites []suite

func (c *chosenSuites) IsBoolFlag() bool { return true }

func (c *chosenSuites) String() string {
	var names []string
	for _, s := range *c {
		names = append(names, s.name)
	}
	return strings.Join(names, ",")
}

func (c *chosenSuites) Set(text string) error {
	switch text {
	case "true":
		*c = suites
		return nil
	case "false":
		*c = nil
		return nil
	}
	for _, name := range strings.Split(text, ",") {
		i := slices.IndexFunc(suites, func(s suite) bool { return s.name == name })
		switch {
		case i >= 0:
			*c = append(*c, suites[i])
		case name == "experimental":
			*c = append(*c, suite{name: name})
		default:
			known := chosenSuites(suites)
			return fmt.Errorf("there is no suite %q: there are %s,experimental", name, &known)
		}
	}
	return nil
}

func TestMain(m *testing.M) {
	flag.Parse()
	if *asInit && os.Getpid() == 1 {
		beInit()
	}
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "what is %q? suites are given as in -kernels=bookworm,sid\n", flag.Args())
		os.Exit(2)
	}
	os.Exit(m.Run())
}

// some are packet tests of each kind that are quick under emulation too: lives, the ring, headers, refusals, source
// ports, spoofing, looking after entries, and frames that leave by a device.
var some = []string{"TestLife.*", "TestRingAlone", "TestSlotGivenAway", "TestManyCPUs", "TestVariants", "TestFragments",
	"TestTruncated", "TestResetSYN", "TestBackendDown", "TestAdoption", "TestPortsExhausted", "TestPortStolen",
	"TestSpoofed", "TestTend", "TestRedirect"}

// TestKernels boots other kernels, each in a virtual machine of its own, and tests the data plane in them: whether the
// verifier takes it (TestLoad), and what it does with packets (test/packet).
func TestKernels(t *testing.T) {
	if len(chosen) == 0 {
		t.Log("not asked for: -kernels boots other kernels in virtual machines, see README.md")
		return
	}
	var err error
	*cache, err = filepath.Abs(*cache)
	must(t, err)
	must(t, os.MkdirAll(*cache, 0o755))
	unlock := mustLock(t, *cache)
	defer unlock()
	bin := t.TempDir()
	mustBuild(t, bin, "test/kernels")
	mustBuild(t, bin, "test/packet")
	mustBuild(t, bin, "loader")
	steps := []step{
		{"load", []string{initPath, "-test.v=test2json", "-test.run=^TestLoad(Decap|Hold)?$"}},
		{"packet", []string{"/packet.test", "-test.v=test2json"}},
		{"decap", []string{"/loader.test", "-test.v=test2json", "-test.run=^TestDecap"}},
		{"hold", []string{"/loader.test", "-test.v=test2json", "-test.run=^TestHold(Frames|Again|TakeOver)$"}},
	}
	if !*full {
		packet := &steps[1]
		packet.Args = append(packet.Args, "-test.run=^("+strings.Join(some, "|")+")$")
	}
	for _, s := range chosen {
		t.Run(s.name, func(t *testing.T) {
			files, err := s.fetch(t.Context(), *cache, modules)
			if err != nil {
				t.Fatalf("get the kernel of %s: %v", s.name, err)
			}
			archive := filepath.Join(t.TempDir(), "initramfs")
			must(t, pack(archive, bin, files, steps))
			ctx, cancel := context.WithTimeout(t.Context(), *timeout)
			defer cancel()
			m := machine{kernel: files.image, initramfs: archive, folder: filepath.Join(*cache, s.name)}
			bootErr := m.boot(ctx)
			report(t, m, bootErr, steps)
		})
	}
}

// pack makes the initramfs: this package's tests as init, those of the packets and of the loader, modules and steps.
func pack(archive, bin string, files kernelFiles, steps []step) error {
	var a initramfs
	if err := a.copyFile(initPath, filepath.Join(bin, "kernels.test")); err != nil {
		return err
	}
	for _, name := range []string{"packet.test", "loader.test"} {
		if err := a.copyFile("/"+name, filepath.Join(bin, name)); err != nil {
			return err
		}
	}
	text, err := json.Marshal(steps)
	if err != nil {
		return err
	}
	a.file(stepsPath, text)
	a.directory(modulesDir)
	for _, name := range modules {
		if err := a.copyFile(filepath.Join(modulesDir, name+".ko"), files.modules[name]); err != nil {
			return err
		}
	}
	return a.write(archive)
}

// report says what came of a machine's run, and fails the test for whatever did not succeed.
func report(t *testing.T, m machine, bootErr error, steps []step) {
	t.Helper()
	run, err := readRun(t.Context(), m.testsOutput())
	must(t, err)
	if run.booted != "" {
		t.Logf("booted Linux %s", run.booted)
	}
	if bootErr != nil {
		t.Errorf("run the machine: %v", bootErr)
	}
	for _, s := range steps {
		result, ok := run.results[s.Name]
		if !ok {
			t.Errorf("%s: not begun", s.Name)
			break
		}
		for _, line := range result.verified {
			t.Logf("%s: %s", s.Name, line)
		}
		if problem := result.problem(); problem != "" {
			t.Errorf("%s: %s; %d tests passed; what the others printed (all of it is in %s):\n%s",
				s.Name, problem, result.passed, m.testsPath(), result.output())
			break
		}
		t.Logf("%s: %d tests passed in %s", s.Name, result.passed, result.took)
	}
	if t.Failed() {
		t.Logf("the console's end (all of it is in %s):\n%s", m.consolePath(), m.consoleEnd())
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mustBuild builds the tests of a package for the machines, static.
func mustBuild(t *testing.T, bin, name string) {
	t.Helper()
	output := filepath.Join(bin, path.Base(name)+".test")
	_, err := run(t.Context(), "", "env", "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64",
		"go", "test", "-c", "-ldflags=-s -w", "-o", output, "fairlead/"+name)
	must(t, err)
}

// mustLock makes sure that only one run uses the cache: two would share CPUs that one needs.
func mustLock(t *testing.T, folder string) (unlock func()) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(folder, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	must(t, err)
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatalf("another run uses %s: wait for its end, or give another -kernels.cache: %v", folder, err)
	}
	return func() { file.Close() }
}
