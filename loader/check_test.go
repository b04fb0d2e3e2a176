package loader

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestKernelFinding(t *testing.T) {
	for release, want := range map[string]Level{"6.1.0-13-amd64": LevelOK, "6.18.44": LevelOK, "7.2": LevelOK,
		"6.0.9": LevelFail, "5.15.0-91-generic": LevelFail, "4.19": LevelFail, "strange": LevelWarn} {
		equal(t, release, kernelFinding(release).Level, want)
	}
}

func TestCheck(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	must(t, netlink.LinkSetDown(b.device("flload-b")))
	levels := func(interfaces ...string) map[string]Level {
		worst := make(map[string]Level)
		order := []Level{"", LevelOK, LevelWarn, LevelFail}
		for _, f := range Check(b.options(interfaces...)) {
			t.Logf("%v: %+v", interfaces, f)
			if slices.Index(order, f.Level) > slices.Index(order, worst[f.Subject]) {
				worst[f.Subject] = f.Level
			}
			if f.Level != LevelOK && f.Advice == "" && f.Subject != "pin path" {
				t.Errorf("no advice: %+v", f)
			}
		}
		return worst
	}
	// A peer that does what a wire does is all that a veth wants.
	b.attachXDP("flload-ap", b.verdict(actPass))
	must(t, ethtoolSwitch("flload-ap", map[string]bool{"tx-checksum-ip-generic": false}))
	equal(t, "findings", levels("flload-a", "flload-b", "flload-c", "lo"), map[string]Level{"kernel": LevelOK,
		"privileges": LevelOK, "bpf": LevelOK, "pin path": LevelOK, "flload-a": LevelOK, "flload-b": LevelWarn,
		"flload-c": LevelFail, "lo": LevelFail})

	// Our own program is no obstacle.
	b.attach(b.options("flload-a"))
	equal(t, "findings when attached", levels("flload-a")["flload-a"], LevelOK)
	equal(t, "pin path elsewhere", checkPinPath("/var/lib/fairlead").Level, LevelFail)
	equal(t, "pin path with a dot", checkPinPath(bpffsRoot+"/a.b").Level, LevelFail)
}

// keep leaves the thread, which is the test's own, these capabilities alone, and gives back those it had.
func keep(t *testing.T, numbers ...int) (giveBack func()) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var had, kept [2]unix.CapUserData
	must(t, unix.Capget(&header, &had[0]))
	kept[0].Permitted, kept[1].Permitted = had[0].Permitted, had[1].Permitted
	for _, n := range numbers {
		kept[n/32].Effective |= 1 << (n % 32)
	}
	must(t, unix.Capset(&header, &kept[0]))
	return func() { must(t, unix.Capset(&header, &had[0])) }
}

// What Fairlead needs is exactly what `needed` says: with it everything works, and without any one of it, not.
func TestPrivileges(t *testing.T) {
	b := newBench(t, "flload-a", "flload-b")
	var all []int
	for _, c := range needed {
		all = append(all, c.number)
	}
	attach := func() error {
		l, err := Open(b.options("flload-a"))
		if err != nil {
			return err
		}
		defer l.Close()
		return l.Attach()
	}
	for i, c := range needed {
		giveBack := keep(t, slices.Delete(slices.Clone(all), i, i+1)...)
		err, finding := attach(), checkPrivileges()[0]
		giveBack()
		if err == nil || !strings.Contains(err.Error(), privilegeAdvice) {
			t.Errorf("without %s: %.300v", c.name, err)
		}
		if finding.Level != LevelFail || !strings.Contains(finding.What, c.name) {
			t.Errorf("without %s: %+v", c.name, finding)
		}
	}

	giveBack := keep(t, all...)
	defer giveBack()
	must(t, attach())
	must(t, attach())
	l := b.open(b.options("flload-a"))
	must(t, l.Replace(small, []string{"flload-a", "flload-b"}))
	equal(t, "attachments", len(l.Attachments()), 2)
	before := l.Attachments()
	// Putting back the old program takes no more, either.
	inTheWay := filepath.Join(l.dir(), programPin+stagingSuffix, "full")
	must(t, os.MkdirAll(inTheWay, 0o700))
	if err := l.Replace(small, []string{"flload-b"}); err == nil || strings.Contains(err.Error(), "taken back") {
		t.Errorf("replaced with a pin in the way: %v", err)
	}
	equal(t, "attachments after a failure", l.Attachments(), before)
	must(t, os.Remove(inTheWay))
	must(t, os.Remove(filepath.Dir(inTheWay)))
	must(t, l.Close())
	maps, closer, err := OpenMaps(b.path)
	must(t, err)
	if maps.Control == nil {
		t.Error("no map")
	}
	must(t, closer.Close())
	_, err = Unload(b.path)
	must(t, err)
}

func TestMountsBPFFS(t *testing.T) {
	newBench(t)
	must(t, unix.Unshare(unix.CLONE_NEWNS))
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	for onBPFFS(bpffsRoot) {
		must(t, unix.Unmount(bpffsRoot, unix.MNT_DETACH))
	}
	equal(t, "finding", checkPinPath(bpffsRoot+"/fairlead").Level, LevelWarn)
	if err := requireBPFFS("/var/lib/fairlead"); err == nil || !strings.Contains(err.Error(), "choose one under") {
		t.Errorf("pin path elsewhere: %v", err)
	}
	giveBack := keep(t)
	err := requireBPFFS(bpffsRoot + "/fairlead")
	giveBack()
	if err == nil || !strings.Contains(err.Error(), "mount -t bpf bpf") {
		t.Errorf("mounting without privilege: %v", err)
	}
	must(t, requireBPFFS(bpffsRoot+"/fairlead"))
	equal(t, "mounted", onBPFFS(bpffsRoot), true)
}

// A pinned link of another network namespace has the number of an interface here, and is not mistaken for its.
func TestOtherNamespacesLink(t *testing.T) {
	b := newBench(t, "flload-a")
	l := b.attach(b.options("flload-a"))
	home, err := os.Open("/proc/thread-self/ns/net")
	must(t, err)
	defer home.Close()
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	b.addDevice("flload-a")
	equal(t, "number", b.device("flload-a").Attrs().Index, l.Attachments()[0].Index)
	equal(t, "mode", l.Attachments()[0].Mode, XDPMode(""))
	if err := l.Attach(); err == nil || !strings.Contains(err.Error(), "another network namespace") {
		t.Errorf("attach: %v", err)
	}
	equal(t, "program here", b.running("flload-a"), ebpf.ProgramID(0))
	must(t, unix.Setns(int(home.Fd()), unix.CLONE_NEWNET))
	equal(t, "program there", b.running("flload-a"), programID(l.Programs().Fairlead))
}
