package loader

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

const testPins = bpffsRoot + "/fairlead-test-loader-"

// TestMain sweeps what a killed run left. Its namespaces went with its threads.
func TestMain(m *testing.M) {
	if held := os.Getenv("FLLOAD_HOLD"); held != "" {
		holdLock(held)
	}
	if path := os.Getenv(cycleVar); path != "" {
		cycleHold(path)
	}
	if err := requireBPFFS(testPins); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	left, err := filepath.Glob(testPins + "*")
	for _, path := range left {
		if _, unloadErr := Unload(path); unloadErr != nil && !errors.Is(unloadErr, ErrNothing) {
			err = errors.Join(err, unloadErr)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

var small = Settings{IPv4: true, IPv6: true, FullNAT: true, DSR: true, AffinityClient: true, Connections: 4096,
	HalfOpen: 1024}

// bench is a namespace of a test's own with pairs of devices, and a pin path. The namespace is that of the test's
// thread, which ends with the test.
type bench struct {
	testing.TB
	path string
	log  bytes.Buffer
}

func newBench(t testing.TB, devices ...string) *bench {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a namespace (these tests need root): %v", err)
	}
	b := &bench{TB: t, path: testPins + strings.ToLower(strings.TrimPrefix(t.Name(), "Test"))}
	for _, name := range devices {
		b.addDevice(name)
	}
	t.Cleanup(func() {
		if _, err := Unload(b.path); err != nil && !errors.Is(err, ErrNothing) {
			t.Errorf("clean up: %v", err)
		}
	})
	return b
}

func (b *bench) addDevice(name string) {
	b.Helper()
	must(b, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}))
	for _, end := range []string{name, name + "p"} {
		must(b, netlink.LinkSetUp(b.device(end)))
	}
}

func (b *bench) device(name string) netlink.Link {
	b.Helper()
	device, err := netlink.LinkByName(name)
	must(b, err)
	return device
}

func (b *bench) options(interfaces ...string) Options {
	return Options{PinPath: b.path, Interfaces: interfaces, Settings: small,
		Logger: slog.New(slog.NewTextHandler(&b.log, nil))}
}

func (b *bench) open(opts Options) *Loader {
	b.Helper()
	l, err := Open(opts)
	must(b, err)
	b.Cleanup(func() { l.Close() })
	return l
}

func (b *bench) attach(opts Options) *Loader {
	b.Helper()
	l := b.open(opts)
	must(b, l.Attach())
	return l
}

// running is the program that the kernel runs on a device: 0, none.
func (b *bench) running(name string) ebpf.ProgramID {
	b.Helper()
	if xdp := b.device(name).Attrs().Xdp; xdp != nil && xdp.Attached {
		return ebpf.ProgramID(xdp.ProgId)
	}
	return 0
}

func (b *bench) pins() []string {
	b.Helper()
	pins, err := filepath.Glob(filepath.Join(b.path, "*", "*"))
	must(b, err)
	return pins
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal(t testing.TB, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func mapIDs(t testing.TB, maps *bpf.FairleadMaps) map[string]ebpf.MapID {
	t.Helper()
	ids := make(map[string]ebpf.MapID)
	for v, i := reflect.ValueOf(*maps), 0; i < v.NumField(); i++ {
		info, err := v.Field(i).Interface().(*ebpf.Map).Info()
		must(t, err)
		ids[v.Type().Field(i).Name], _ = info.ID()
	}
	return ids
}

func TestAttachFresh(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b.7")
	l := b.open(b.options("flload-a", "flload-b.7"))
	equal(t, "pins before anything is attached", b.pins(), []string(nil))
	equal(t, "program before Attach", b.running("flload-a"), ebpf.ProgramID(0))
	must(t, l.Attach())

	program := programID(l.Programs().Fairlead)
	attachments := l.Attachments()
	for i := range attachments {
		attachments[i].Link = 0
	}
	equal(t, "attachments", attachments, []Attachment{
		{"flload-a", b.device("flload-a").Attrs().Index, ModeNative, program, 0, b.path + "/" + versionDir(bpf.FairleadSchemaSCHEMA_VERSION) + "/link_flload-a"},
		{"flload-b.7", b.device("flload-b.7").Attrs().Index, ModeNative, program, 0, b.path + "/" + versionDir(bpf.FairleadSchemaSCHEMA_VERSION) + "/link_flload-b%2e7"},
	})
	equal(t, "program on the device", b.running("flload-a"), program)
	// Every map, the program and two links, and nothing of the building left.
	equal(t, "number of pins", len(b.pins()), reflect.TypeFor[bpf.FairleadMaps]().NumField()+3)
	dirs, err := schemaDirs(b.path)
	must(t, err)
	equal(t, "schema directories", dirs, []string{b.path + "/" + versionDir(bpf.FairleadSchemaSCHEMA_VERSION)})

	// Once more changes nothing.
	must(t, l.Attach())
	equal(t, "program after a second Attach", b.running("flload-a"), program)

	must(t, l.Close())
	must(t, l.Close())
	equal(t, "program after Close", b.running("flload-a"), program)
}

func TestAdopt(t *testing.T) {
	b := newBench(t, "flload-a")
	l := b.attach(b.options("flload-a"))
	maps, before := mapIDs(t, l.Maps()), l.Attachments()[0]
	must(t, l.Maps().Control.Put(uint32(0), bpf.FairleadControlBlock{Epoch: 42}))
	must(t, l.Close())

	l = b.attach(b.options("flload-a"))
	equal(t, "map ids", mapIDs(t, l.Maps()), maps)
	var control bpf.FairleadControlBlock
	must(t, l.Maps().Control.Lookup(uint32(0), &control))
	equal(t, "what was in a map", control.Epoch, uint32(42))
	after := l.Attachments()[0]
	equal(t, "link", after.Link, before.Link)
	if after.Program == before.Program {
		t.Errorf("program %d is still the one before", after.Program)
	}
	equal(t, "program on the device", b.running("flload-a"), after.Program)
	pinned, err := ebpf.LoadPinnedProgram(filepath.Join(l.dir(), programPin), nil)
	must(t, err)
	defer pinned.Close()
	equal(t, "pinned program", programID(pinned), after.Program)
	must(t, l.Close())

	// An interface taken out of the configuration is let go of once the others stand; one that came is taken.
	b.addDevice("flload-b")
	l = b.attach(b.options("flload-b"))
	equal(t, "program on the interface taken out", b.running("flload-a"), ebpf.ProgramID(0))
	equal(t, "program on the new one", b.running("flload-b"), programID(l.Programs().Fairlead))
	equal(t, "attachments", len(l.Attachments()), 1)
}

func TestInterfaceComesAgain(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	l := b.attach(b.options("flload-a", "flload-b"))
	must(t, netlink.LinkDel(b.device("flload-a")))
	gone, err := Links(b.path)
	must(t, err)
	equal(t, "a link without its interface", gone[0], Attachment{Interface: "flload-a", Program: gone[0].Program,
		Link: gone[0].Link, Pin: b.path + "/" + versionDir(bpf.FairleadSchemaSCHEMA_VERSION) + "/link_flload-a"})
	if err := l.Attach(); err == nil || !strings.Contains(err.Error(), "attach to flload-a:") {
		t.Errorf("attaching to a missing interface: %v", err)
	}
	b.addDevice("flload-a")
	must(t, l.Attach())
	equal(t, "program", b.running("flload-a"), programID(l.Programs().Fairlead))
	equal(t, "pin", l.Attachments()[0].Pin, b.path+"/"+versionDir(bpf.FairleadSchemaSCHEMA_VERSION)+"/link_flload-a")

	// A renamed interface keeps its link, and leaves its name to another.
	id := l.Attachments()[0].Link
	for from, to := range map[string]string{"flload-a": "flload-c", "flload-ap": "flload-cp"} {
		must(t, netlink.LinkSetDown(b.device(from)))
		must(t, netlink.LinkSetName(b.device(from), to))
	}
	b.addDevice("flload-a")
	must(t, l.Replace(small, []string{"flload-a", "flload-c", "flload-b"}))
	byName := make(map[string]Attachment)
	for _, at := range l.Attachments() {
		byName[at.Interface] = at
	}
	equal(t, "attachments", len(byName), 3)
	equal(t, "link of the renamed interface", byName["flload-c"].Link, id)
	equal(t, "its pin", byName["flload-c"].Pin, b.path+"/"+versionDir(bpf.FairleadSchemaSCHEMA_VERSION)+"/link_flload-a")
	equal(t, "pin of the newcomer", byName["flload-a"].Pin,
		fmt.Sprintf("%s/%s/link_flload-a_%d", b.path, versionDir(bpf.FairleadSchemaSCHEMA_VERSION), byName["flload-a"].Index))
}

func mustPass(t testing.TB) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "somebody_s", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
	must(t, err)
	t.Cleanup(func() { program.Close() })
	return program
}

func TestForeignProgramStays(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	theirs := mustPass(t)
	l := b.open(b.options("flload-a", "flload-b"))
	for _, c := range []struct {
		name   string
		put    func() func()
		mode   XDPMode
		linked bool
	}{
		{"by netlink", func() func() {
			must(t, netlink.LinkSetXdpFdWithFlags(b.device("flload-b"), theirs.FD(), int(link.XDPDriverMode)))
			return func() {
				must(t, netlink.LinkSetXdpFdWithFlags(b.device("flload-b"), -1, int(link.XDPDriverMode)))
			}
		}, ModeNative, false},
		{"generic", func() func() {
			must(t, netlink.LinkSetXdpFdWithFlags(b.device("flload-b"), theirs.FD(), int(link.XDPGenericMode)))
			return func() {
				must(t, netlink.LinkSetXdpFdWithFlags(b.device("flload-b"), -1, int(link.XDPGenericMode)))
			}
		}, ModeGeneric, false},
		{"by a link", func() func() {
			held, err := link.AttachXDP(link.XDPOptions{Program: theirs, Interface: b.device("flload-b").Attrs().Index})
			must(t, err)
			return func() { must(t, errors.Join(held.Detach(), held.Close())) }
		}, ModeNative, true},
	} {
		takeOff := c.put()
		err := l.Attach()
		var foreign *ForeignError
		if !errors.As(err, &foreign) || !errors.Is(err, ErrForeign) {
			t.Fatalf("%s: %v", c.name, err)
		}
		equal(t, c.name+": name, type and mode", []any{foreign.Interface, foreign.Name, foreign.Type, foreign.Mode,
			foreign.Link != 0}, []any{"flload-b", "somebody_s", "XDP", c.mode, c.linked})
		for _, part := range []string{"flload-b", `"somebody_s"`, foreign.Tag, "takes it off"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %q is not in %q", c.name, part, err)
			}
		}
		if findings := fmt.Sprint(Check(b.options("flload-b"))); !strings.Contains(findings, "somebody_s") {
			t.Errorf("%s: not found by Check: %s", c.name, findings)
		}
		equal(t, c.name+": program on flload-b", b.running("flload-b"), programID(theirs))
		equal(t, c.name+": program on flload-a", b.running("flload-a"), ebpf.ProgramID(0))
		equal(t, c.name+": pins", b.pins(), []string(nil))
		takeOff()
	}
	must(t, l.Attach())
}

func TestFailureTakesEverythingBack(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b", "flload-c")
	l := b.attach(b.options("flload-a"))
	before, pins := l.Attachments(), b.pins()
	must(t, l.Close())

	held, err := link.AttachXDP(link.XDPOptions{Program: mustPass(t), Interface: b.device("flload-c").Attrs().Index})
	must(t, err)
	defer held.Close()
	l = b.open(b.options("flload-a", "flload-b", "flload-c"))
	if err := l.Attach(); !errors.Is(err, ErrForeign) {
		t.Fatalf("attach: %v", err)
	}
	equal(t, "attachments", l.Attachments(), before)
	equal(t, "program on flload-b", b.running("flload-b"), ebpf.ProgramID(0))
	must(t, held.Detach())

	// The pins fail after every link has its new program.
	inTheWay := filepath.Join(l.dir(), "link_flload-c")
	must(t, os.Mkdir(filepath.Join(l.dir(), programPin+stagingSuffix), 0o700))
	must(t, os.Mkdir(filepath.Join(l.dir(), programPin+stagingSuffix, "full"), 0o700))
	if err := l.Attach(); err == nil || !strings.Contains(err.Error(), "pin program") {
		t.Fatalf("attach with a pin in the way: %v", err)
	}
	must(t, os.Remove(filepath.Join(l.dir(), programPin+stagingSuffix, "full")))
	must(t, os.Remove(filepath.Join(l.dir(), programPin+stagingSuffix)))
	equal(t, "attachments", l.Attachments(), before)
	equal(t, "program on flload-a", b.running("flload-a"), before[0].Program)
	equal(t, "program on flload-c", b.running("flload-c"), ebpf.ProgramID(0))
	equal(t, "pins", b.pins(), pins)
	if _, err := os.Stat(inTheWay); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a new link's pin was left: %v", err)
	}
	must(t, l.Attach())
	equal(t, "attachments in the end", len(l.Attachments()), 3)
}

func TestFirstStartThatFailsLeavesNothing(t *testing.T) {
	b := newBench(t, "flload-a")
	l := b.open(b.options("flload-a"))
	// The directory of the unfinished start is taken away by the next, and was not in sight.
	must(t, os.Mkdir(l.stagingDir(), 0o700))
	must(t, os.Mkdir(filepath.Join(l.stagingDir(), "control"), 0o700))
	if err := l.Attach(); err == nil {
		t.Fatal("attached in spite of a directory in the way")
	}
	equal(t, "program", b.running("flload-a"), ebpf.ProgramID(0))
	must(t, l.Close())
	if _, err := Links(b.path); err != nil {
		t.Errorf("links: %v", err) // an unfinished start is there
	}
	l = b.open(b.options("flload-a"))
	must(t, l.Attach())
	must(t, l.Close())
	_, err := Unload(b.path)
	must(t, err)

	l = b.open(b.options("flload-missing"))
	if err := l.Attach(); err == nil {
		t.Fatal("attached to an interface that is not there")
	}
	must(t, l.Close())
	if _, err := os.Stat(b.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pin path of a start that failed is still there: %v", err)
	}
}

func TestReplace(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b", "flload-c")
	l := b.attach(b.options("flload-a", "flload-b"))
	maps, before, old := mapIDs(t, l.Maps()), l.Attachments(), l.Programs()
	settings := small
	settings.IPv6, settings.FullNAT = false, false
	must(t, l.Replace(settings, []string{"flload-b", "flload-c"}))
	after := l.Attachments()
	equal(t, "interfaces", []string{after[0].Interface, after[1].Interface}, []string{"flload-b", "flload-c"})
	equal(t, "link of flload-b", after[0].Link, before[1].Link)
	equal(t, "program on flload-a", b.running("flload-a"), ebpf.ProgramID(0))
	equal(t, "settings", l.Settings(), settings)
	equal(t, "maps", mapIDs(t, l.Maps()), maps)
	for _, name := range []string{"flload-b", "flload-c"} {
		equal(t, "program on "+name, b.running(name), programID(l.Programs().Fairlead))
	}
	if programID(l.Programs().Fairlead) == programID(old.Fairlead) {
		t.Error("the program is the old one")
	}
	if _, err := old.Tend.Info(); err != nil {
		t.Errorf("the programs before are closed already: %v", err)
	}

	// One that fails changes nothing.
	program := programID(l.Programs().Fairlead)
	if err := l.Replace(small, []string{"flload-b", "flload-missing"}); err == nil {
		t.Fatal("replaced with an interface that is not there")
	}
	equal(t, "attachments", l.Attachments(), after)
	equal(t, "program", programID(l.Programs().Fairlead), program)
	equal(t, "settings", l.Settings(), settings)
}

func TestModes(t *testing.T) {
	b := newBench(t, "flload-a")
	for _, c := range []struct {
		mtu        int
		mode, want XDPMode
	}{{1500, ModeAuto, ModeNative}, {1500, ModeNative, ModeNative}, {1500, ModeGeneric, ModeGeneric},
		{9000, ModeAuto, ModeGeneric}, {9000, ModeNative, ""}} {
		if c.mtu == 9000 && mustFrags(t) {
			c.want = ModeNative
		}
		for _, end := range []string{"flload-a", "flload-ap"} {
			must(t, netlink.LinkSetMTU(b.device(end), c.mtu))
		}
		opts := b.options("flload-a")
		opts.Mode = c.mode
		b.log.Reset()
		l := b.open(opts)
		err := l.Attach()
		switch {
		case c.want == "":
			if err == nil || !strings.Contains(err.Error(), "mtu 9000") {
				t.Errorf("%s with mtu %d: %v", c.mode, c.mtu, err)
			}
		case err != nil:
			t.Errorf("%s with mtu %d: %v", c.mode, c.mtu, err)
		default:
			equal(t, fmt.Sprintf("mode of %s with mtu %d", c.mode, c.mtu), l.Attachments()[0].Mode, c.want)
			said := strings.Contains(b.log.String(), "no native xdp on this interface")
			equal(t, "falling back is said", said, c.mode == ModeAuto && c.want == ModeGeneric)
		}
		must(t, l.Close())
		if _, err := Unload(b.path); err != nil && !errors.Is(err, ErrNothing) {
			t.Fatal(err)
		}
	}
	if _, err := Open(Options{PinPath: b.path, Mode: "fast"}); err == nil {
		t.Error("xdp mode fast was taken")
	}
}

func mustFrags(t testing.TB) bool {
	t.Helper()
	spec, err := bpf.LoadFairlead()
	must(t, err)
	return spec.Programs[bpf.FairleadProgFairlead].Flags&unix.BPF_F_XDP_HAS_FRAGS != 0
}

// holdLock holds a pin path's lock in another process, until its input ends.
func holdLock(path string) {
	lock, err := lockOrCreate(path)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	_, _ = io.Copy(io.Discard, os.Stdin)
	lock.Close()
	os.Exit(0)
}

func TestUnload(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	if _, err := Unload(b.path); !errors.Is(err, ErrNothing) {
		t.Errorf("unload of nothing: %v", err)
	}
	if _, err := Links(b.path); !errors.Is(err, ErrNothing) {
		t.Errorf("links of nothing: %v", err)
	}
	l := b.attach(b.options("flload-a", "flload-b"))
	program := b.running("flload-a")
	must(t, l.Close())

	daemon := exec.Command("/proc/self/exe")
	daemon.Env = append(os.Environ(), "FLLOAD_HOLD="+b.path)
	in, err := daemon.StdinPipe()
	must(t, err)
	out, err := daemon.StdoutPipe()
	must(t, err)
	must(t, daemon.Start())
	if _, err := io.ReadFull(out, make([]byte, len("held\n"))); err != nil {
		t.Fatalf("the other process did not take the lock: %v", err)
	}
	named := fmt.Sprintf("another fairlead (pid %d)", daemon.Process.Pid)
	_, openErr := Open(b.options("flload-a"))
	_, unloadErr := Unload(b.path)
	for what, err := range map[string]error{"open": openErr, "unload": unloadErr} {
		if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), named) {
			t.Errorf("%s while another runs: %v", what, err)
		}
	}
	equal(t, "program after the refusals", b.running("flload-a"), program)
	must(t, in.Close())
	must(t, daemon.Wait())

	// Other versions' directories go too.
	must(t, os.Mkdir(filepath.Join(b.path, "v7"), 0o700))
	pins := b.pins()
	removed, err := Unload(b.path)
	must(t, err)
	equal(t, "number removed", len(removed), len(pins))
	for _, name := range []string{"flload-a", "flload-b"} {
		equal(t, "program on "+name, b.running(name), ebpf.ProgramID(0))
	}
	if _, err := os.Stat(b.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pin path is still there: %v", err)
	}
}

func TestOpenMaps(t *testing.T) {
	b := newBench(t, "flload-a")
	if _, _, err := OpenMaps(b.path); !errors.Is(err, ErrNothing) {
		t.Errorf("maps of nothing: %v", err)
	}
	l := b.attach(b.options("flload-a"))
	want := mapIDs(t, l.Maps())
	for _, daemon := range []string{"runs", "is gone"} {
		maps, closer, err := OpenMaps(b.path)
		must(t, err)
		equal(t, "maps while the daemon "+daemon, mapIDs(t, maps), want)
		if err := maps.Backends.Put(uint32(0), bpf.FairleadBackend{}); !errors.Is(err, unix.EPERM) {
			t.Errorf("writing to a map opened for reading: %v", err)
		}
		must(t, closer.Close())
		links, err := Links(b.path)
		must(t, err)
		equal(t, "links", len(links), 1)
		must(t, l.Close())
	}
}

func TestOtherVersionsAreRefused(t *testing.T) {
	b := newBench(t, "flload-a")
	must(t, os.MkdirAll(filepath.Join(b.path, "v7"), 0o700))
	_, openErr := Open(b.options("flload-a"))
	_, _, mapsErr := OpenMaps(b.path)
	for _, err := range []error{openErr, mapsErr} {
		if !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), fmt.Sprintf("schema version 7, this fairlead knows %d", bpf.FairleadSchemaSCHEMA_VERSION)) {
			t.Errorf("schema 7: %v", err)
		}
	}
	must(t, os.Remove(filepath.Join(b.path, "v7")))

	// A map of the same name and another layout.
	dir := filepath.Join(b.path, versionDir(bpf.FairleadSchemaSCHEMA_VERSION))
	must(t, os.MkdirAll(dir, 0o700))
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 5, ValueSize: 9, MaxEntries: 3})
	must(t, err)
	defer m.Close()
	must(t, m.Pin(filepath.Join(dir, bpf.FairleadMapConnections4)))
	_, openErr = Open(b.options("flload-a"))
	_, _, mapsErr = OpenMaps(b.path)
	for _, err := range []error{openErr, mapsErr} {
		if !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), "KeySize") {
			t.Errorf("another layout: %v", err)
		}
	}
}

func TestSizesAreKept(t *testing.T) {
	b := newBench(t, "flload-a")
	must(t, b.attach(b.options("flload-a")).Close())
	opts := b.options("flload-a")
	opts.Settings.Connections, opts.Settings.HalfOpen = 9000, 0
	l := b.attach(opts)
	equal(t, "settings", l.Settings(), small)
	equal(t, "size of the table", l.Maps().Connections4.MaxEntries(), small.Connections)
	for _, part := range []string{"unload and start again", "wanted=9000", "size=4096", "connections4"} {
		if !strings.Contains(b.log.String(), part) {
			t.Errorf("%q is not in the log: %s", part, b.log.String())
		}
	}
	if strings.Contains(b.log.String(), "half_open4") {
		t.Errorf("nobody asked for another half-open table: %s", b.log.String())
	}
}

func TestSettingsCompileOut(t *testing.T) {
	var all, withoutFullNAT, least uint32
	for _, c := range []struct {
		cut func(*Settings)
		to  *uint32
	}{
		{func(*Settings) {}, &all},
		{func(s *Settings) { s.FullNAT = false }, &withoutFullNAT},
		{func(s *Settings) { s.DSR = false }, nil},
		{func(s *Settings) { s.IPv6 = false }, nil},
		{func(s *Settings) { s.IPv4 = false }, nil},
		{func(s *Settings) { s.AffinityClient = false }, nil},
		{func(s *Settings) { *s = Settings{IPv4: true, DSR: true, Connections: 1024, HalfOpen: 1024} }, &least},
	} {
		s := small
		c.cut(&s)
		collection, _, err := load(s, nil, slog.New(slog.DiscardHandler))
		must(t, err)
		info, err := collection.Programs[bpf.FairleadProgFairlead].Info()
		must(t, err)
		instructions, err := info.TranslatedSize()
		must(t, err)
		jited, err := info.JitedSize()
		must(t, err)
		collection.Close()
		t.Logf("%+v: %d bytes of instructions, %d of machine code", s, instructions, jited)
		if c.to != nil {
			*c.to = jited
		}
		if s != small && jited >= all {
			t.Errorf("%+v: %d bytes of machine code, with everything %d", s, jited, all)
		}
	}
	if least >= withoutFullNAT {
		t.Errorf("dsr and IPv4 alone: %d bytes of machine code, without fullnat %d", least, withoutFullNAT)
	}
}

func TestVerifierIsQuotedWhole(t *testing.T) {
	lines := []string{"0: R1=ctx() R10=fp0", "1: (79) r0 = *(u64 *)(r1 +999)", "invalid bpf_context access", "processed 2"}
	text := (&loadError{cause: fmt.Errorf("program fairlead: %w",
		&ebpf.VerifierError{Cause: unix.EACCES, Log: lines})}).Error()
	for _, line := range lines {
		if strings.Count(text, line) != 1 {
			t.Errorf("%q is not there once: %s", line, text)
		}
	}
}
