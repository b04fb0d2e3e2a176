package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/loader"
	flmaps "fairlead/maps"
	"fairlead/maps/journal"
	"fairlead/userspace/daemon"
)

// stateHost is a host with a configuration and a state directory of the test's own.
type stateHost struct {
	t           *testing.T
	file, state string
	dir         string // for what the test saves
}

func newStateHost(t *testing.T) *stateHost {
	t.Helper()
	dir := t.TempDir()
	h := &stateHost{t: t, file: filepath.Join(dir, "fairlead.yaml"), state: filepath.Join(dir, "state"), dir: dir}
	must(t, os.WriteFile(h.file, fmt.Appendf(nil, `
node: edge-1
dataplane: {interfaces: [flcli], pin_path: %s/check, connections: 4096}
state_dir: %s
control: {socket: %s, http: ""}
services:
- name: chat
  address: 192.0.2.10
  port: 443
  announce: off
  source_addresses: [10.0.0.1]
  source_ports: 20000-20999
  health: {type: none}
  backends:
  - {name: ws1, address: 10.0.0.11, port: 8765}
  - {name: ws2, address: 10.0.0.12, port: 8765}
- name: web
  address: "2001:db8::10"
  port: 80
  method: dsr
  announce: off
  health: {type: none}
  backends:
  - {name: ws1, address: "2001:db8::a"}
`, testPins, h.state, filepath.Join(dir, "control.sock")), 0o644))
	return h
}

func (h *stateHost) path(name string) string { return filepath.Join(h.dir, name) }

// ask runs a command of this host.
func (h *stateHost) ask(line string) (code int, stdout, stderr string) {
	h.t.Helper()
	return fairlead(h.t, append(strings.Fields(line), "-c", h.file)...)
}

// did runs a command that is to succeed, and answers what it said on stdout and on stderr.
func (h *stateHost) did(line string) (stdout, stderr string) {
	h.t.Helper()
	code, stdout, stderr := h.ask(line)
	if code != exitDone {
		h.t.Fatalf("%s: exit code %d\n%s%s", line, code, stdout, stderr)
	}
	return stdout, stderr
}

// refused runs a command that is to fail, and to say so.
func (h *stateHost) refused(line string, want int, parts ...string) {
	h.t.Helper()
	code, stdout, stderr := h.ask(line)
	if code != want {
		h.t.Errorf("%s: exit code %d, want %d\n%s%s", line, code, want, stdout, stderr)
	}
	for _, part := range parts {
		if !strings.Contains(stderr, part) {
			h.t.Errorf("%s: says %q, want %q", line, stderr, part)
		}
	}
}

// somewhere are connections of every kind that can be kept.
func somewhere(now time.Time) (list []journal.Entry) {
	for i := range 800 {
		n := uint32(i)
		e := journal.Entry{
			Generation: 1000 + n, SequenceEnd: 7 * n, Acknowledgement: 11*n + 1<<31,
			Opened: now.Add(-5*time.Hour - time.Duration(i)*time.Second), Seen: now.Add(-time.Duration(10*i) * time.Second),
			Hop: journal.Hop{Interface: "flcli", MAC: [6]byte{2, 0, 0, 0, byte(i >> 8), byte(i)}, SourceMAC: [6]byte{2, 0, 0, 0, 0, 2}},
		}
		if i%3 == 0 {
			e.Timestamp, e.TimestampEcho = n+1, n+2
		}
		if i < 500 {
			backend := 1 + i%2
			e.Service = "chat"
			e.Tuple = journal.Tuple{
				Source:      netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), uint16(40000+i)),
				Destination: netip.MustParseAddrPort("192.0.2.10:443"), Protocol: 6,
			}
			e.Backend = journal.Backend{
				Name: fmt.Sprint("ws", backend), Address: netip.MustParseAddrPort(fmt.Sprintf("10.0.0.1%d:8765", backend)), Method: "fullnat",
			}
			e.SourceAddr = netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(20000+i))
			if i%5 == 0 {
				e.State = uint32(flmaps.StateClientFIN)
			}
		} else {
			client := netip.MustParseAddr("2001:db8:1::").As16()
			binary.BigEndian.PutUint32(client[12:], n)
			e.Service = "web"
			e.Tuple = journal.Tuple{
				Source:      netip.AddrPortFrom(netip.AddrFrom16(client), uint16(40000+i)),
				Destination: netip.MustParseAddrPort("[2001:db8::10]:80"), Protocol: 6,
			}
			e.Backend = journal.Backend{Name: "ws1", Address: netip.MustParseAddrPort("[2001:db8::a]:80"), Method: "dsr"}
			e.State = uint32(flmaps.StateStateless)
		}
		list = append(list, e)
	}
	return list
}

// keep writes a journal as a daemon does: a snapshot of some connections, and events of the others.
func keep(t *testing.T, dir string, snapshot, events []journal.Entry) {
	t.Helper()
	j, err := journal.Open(dir, journal.Options{})
	must(t, err)
	must(t, j.Snapshot(t.Context(), func(yield func(*journal.Entry) error) error {
		for _, e := range snapshot {
			if err := yield(&e); err != nil {
				return err
			}
		}
		return nil
	}))
	var opened []journal.Event
	for _, e := range events {
		opened = append(opened, journal.Event{Kind: journal.Opened, Entry: e})
	}
	j.Add(opened)
	must(t, j.Close(t.Context()))
}

// moment is a connection as printed, with the time of its opening and of its last packet instead of ages.
type moment struct {
	savedItem
	opened, seen time.Time
	vague        time.Duration // what it took to print them
}

// moments runs a command that prints lines of connections, and reads them.
func moments(t *testing.T, line ...string) map[netip.AddrPort]moment {
	t.Helper()
	began, all := time.Now(), make(map[netip.AddrPort]moment)
	code, stdout, stderr := fairlead(t, append(line, "-o", "jsonl")...)
	if code != exitDone {
		t.Fatalf("%v: exit code %d: %s", line, code, stderr)
	}
	now := time.Now()
	for line := range strings.Lines(stdout) {
		m := moment{savedItem: decoded[savedItem](t, line), vague: now.Sub(began)}
		m.opened = now.Add(-time.Duration(m.Age * float64(time.Second)))
		m.seen = now.Add(-time.Duration(m.Idle * float64(time.Second)))
		m.Age, m.Idle = 0, 0
		if _, twice := all[m.Client]; twice {
			t.Errorf("%v is listed twice", m.Client)
		}
		all[m.Client] = m
	}
	return all
}

func (h *stateHost) moments(line string) map[netip.AddrPort]moment {
	h.t.Helper()
	return moments(h.t, append(strings.Fields(line), "-c", h.file)...)
}

// momentsOf are what lines should say of entries.
func momentsOf(list []journal.Entry) map[netip.AddrPort]moment {
	all := make(map[netip.AddrPort]moment)
	for i := range list {
		m := moment{savedItem: savedItemOf(&list[i], time.Now()), opened: list[i].Opened, seen: list[i].Seen}
		m.Age, m.Idle = 0, 0
		all[m.Client] = m
	}
	return all
}

// same compares all but what a run gives anew. Times may differ by what it takes to print them.
func same(t *testing.T, what string, want, got map[netip.AddrPort]moment, but ...func(*moment)) {
	t.Helper()
	plain := func(all map[netip.AddrPort]moment) map[netip.AddrPort]savedItem {
		items := make(map[netip.AddrPort]savedItem)
		for client, m := range all {
			for _, leave := range but {
				leave(&m)
			}
			m.age, m.idle = 0, 0
			items[client] = m.savedItem
		}
		return items
	}
	if diff := cmp.Diff(plain(want), plain(got), cmp.AllowUnexported(savedItem{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("%s (-want +got):\n%.4000s", what, diff)
	}
	for client, m := range want {
		g := got[client]
		near := m.vague + g.vague + 500*time.Millisecond // the coarse clock, and what saving and restoring round away
		if g.opened.Sub(m.opened).Abs() > near || g.seen.Sub(m.seen).Abs() > near {
			t.Errorf("%s: %v was opened at %v and seen at %v, is said to be at %v and %v", what, client, m.opened, m.seen, g.opened, g.seen)
			return
		}
	}
}

// What a run gives anew, and what lists of the maps do not say.
func generation(m *moment) { m.Generation = 0 }
func incoming(m *moment)   { m.Interface = "" }

// TestStateGoesRound takes connections through all: files, a run, its maps, files again, and another run.
func TestStateGoesRound(t *testing.T) {
	program := filepath.Join(t.TempDir(), "fairlead")
	if output, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, output)
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a namespace (this test needs root): %v", err)
	}
	sweepPins(t)
	t.Cleanup(func() { sweepPins(t) })
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "flcli"}, PeerName: "flclip"}))
	for _, name := range []string{"lo", "flcli", "flclip"} {
		link, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkSetUp(link))
		if name == "flcli" {
			for _, a := range []string{"10.0.0.1/24", "2001:db8::1/64"} {
				address, err := netlink.ParseAddr(a)
				must(t, err)
				address.Flags = unix.IFA_F_NODAD
				must(t, netlink.AddrAdd(link, address))
			}
		}
	}

	h := newStateHost(t)
	var running *os.Process
	t.Cleanup(func() { // where the test failed
		if running != nil {
			running.Kill()
			for deadline := time.Now().Add(patience); loader.Holder(testPins+"/check") != 0 && time.Now().Before(deadline); {
				runtime.Gosched()
			}
		}
	})
	// start runs a daemon until stop.
	start := func() (stop func()) {
		t.Helper()
		var log bytes.Buffer
		cmd := exec.Command(program, "run", "-c", h.file)
		cmd.Stderr = &log
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		must(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		running = cmd.Process
		stop = func() {
			must(t, cmd.Process.Signal(syscall.SIGTERM))
			select {
			case err := <-ended:
				running = nil
				if err != nil {
					t.Fatalf("the daemon ended: %v\n%s", err, log.String())
				}
			case <-time.After(patience):
				cmd.Process.Kill()
				<-ended
				t.Fatalf("the daemon did not end\n%s", log.String())
			}
		}
		for deadline := time.Now().Add(patience); ; {
			code, stdout, _ := h.ask("status")
			if code == exitDone && strings.Contains(stdout, fmt.Sprint("pid ", cmd.Process.Pid)) && strings.Contains(stdout, "flcli") {
				return stop
			}
			select {
			case err := <-ended:
				t.Fatalf("the daemon ended: %v\n%s", err, log.String())
			default:
			}
			if time.Now().After(deadline) {
				cmd.Process.Kill()
				<-ended
				t.Fatalf("nothing is attached\n%s", log.String())
			}
		}
	}

	list := somewhere(time.Now())
	want := momentsOf(list)
	keep(t, h.path("first"), list[:300], list[300:])
	stdout, _ := h.did("state restore " + h.path("first"))
	if !strings.HasPrefix(stdout, "the next run begins with 800 connections of "+h.path("first")+", last written") {
		t.Errorf("restore says %q", stdout)
	}
	same(t, "restored", want, h.moments("state show"))

	stop := start()
	same(t, "a run", want, h.moments("connections list"), generation, incoming)

	stdout, stderr := h.did("state save " + h.path("beside"))
	if !strings.HasPrefix(stdout, "saved 800 connections in "+h.path("beside")+" (") || stderr != "" {
		t.Errorf("save says %q, %q", stdout, stderr)
	}
	beside := h.moments("state show --dir " + h.path("beside"))
	same(t, "saved beside a daemon", want, beside, generation)
	if _, stderr := h.did("state show -o jsonl"); !strings.Contains(stderr, h.state+"/connections: 800 connections, last written") {
		t.Errorf("show beside a daemon says %q", stderr)
	}
	h.did("state verify")
	h.refused("state restore "+h.path("beside"), exitFailed, "a daemon runs (pid ", "stop it, then `fairlead unload`")
	h.refused("state restore "+h.state, exitFailed, "a daemon runs (pid ")
	stop()

	h.refused("state restore "+h.path("beside"), exitFailed, "the maps pinned under "+testPins+"/check: `fairlead unload` first")
	h.did("state save " + h.path("alone"))
	alone := h.moments("state show --dir " + h.path("alone"))
	same(t, "saved without a daemon", beside, alone)
	before := h.moments("state show")
	h.did("unload")
	h.refused("state save "+h.path("late"), exitNothing, "nothing is attached")
	if _, err := os.Stat(h.path("late")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a save of nothing leaves something: %v", err)
	}

	// What the state directory has goes, and comes back.
	stdout, _ = h.did("state restore --dry-run " + h.path("alone"))
	if want := "would be set aside: what " + h.state + " has, in " + h.state + "/connections.before-1\nthe next run would begin with 800"; !strings.HasPrefix(stdout, want) {
		t.Errorf("a dry run says %q", stdout)
	}
	h.wantState("connections")
	stdout, _ = h.did("state restore " + h.path("alone"))
	if want := "set aside: what " + h.state + " has, in " + h.state + "/connections.before-1\nthe next run begins with 800 connections"; !strings.HasPrefix(stdout, want) {
		t.Errorf("restore says %q", stdout)
	}
	h.wantState("connections", "connections.before-1")
	same(t, "restored again", alone, h.moments("state show"))
	same(t, "set aside", before, h.moments("state show --dir "+h.state+"/connections.before-1"))

	stop = start()
	same(t, "another run", want, h.moments("connections list"), generation, incoming)
	stop()
	h.did("unload")
	h.did("state restore " + h.state + "/connections.before-1")
	h.wantState("connections", "connections.before-1", "connections.before-2")
	same(t, "taken back", before, h.moments("state show"))
}

// wantState looks what of connections the state directory holds.
func (h *stateHost) wantState(want ...string) {
	h.t.Helper()
	paths, err := filepath.Glob(h.state + "/*connections*")
	must(h.t, err)
	var names []string
	for _, path := range paths {
		names = append(names, filepath.Base(path))
	}
	if diff := cmp.Diff(want, names); diff != "" {
		h.t.Errorf("the state directory (-want +got):\n%s", diff)
	}
}

func TestStateShow(t *testing.T) {
	sweepPins(t)
	h := newStateHost(t)
	h.refused("state show", exitFailed, "there is no "+h.state+"/connections: no connections were ever kept there")
	h.refused("state show --dir "+h.path("none"), exitFailed, h.path("none")+": no such file or directory")
	h.refused("state show --state half-open", exitUsage, "not kept on disk")
	h.refused("state show --client here", exitUsage, `--client "here"`)
	h.refused("state show extra", exitUsage, "one argument too many")

	list := somewhere(time.Now())
	keep(t, h.state, list[498:502], nil)
	stdout, stderr := h.did("state show")
	if diff := cmp.Diff(cells(`
CLIENT  SERVICE  BACKEND  STATE  AGE  IDLE
198.51.1.242:40498  chat  ws1  established  5h8m  1h23m
198.51.1.243:40499  chat  ws2  established  5h8m  1h23m
[2001:db8:1::1f4]:40500  web  ws1  established  5h8m  1h23m
[2001:db8:1::1f5]:40501  web  ws1  established  5h8m  1h23m
`), cells(sorted(stdout))); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
	if want := h.state + "/connections: 4 connections, last written 0s ago\n  snapshot-0000000000000001: read\n"; stderr != want {
		t.Errorf("stderr is %q, want %q", stderr, want)
	}
	// Wherever the directory is copied to, and by its own name.
	must(t, os.CopyFS(h.path("copy"), os.DirFS(h.state)))
	for _, dir := range []string{h.path("copy"), h.path("copy/connections"), h.path("copy") + "/connections/"} {
		if stdout, _ := h.did("state show -o jsonl -c testdata/absent.yaml --dir " + dir); strings.Count(stdout, "\n") != 4 {
			t.Errorf("%s: %s", dir, stdout)
		}
	}
	must(t, os.Rename(h.path("copy/connections"), h.path("files")))
	h.refused("state show --dir "+h.path("files"), exitFailed, "move them into a directory named connections, and name the one above")
	h.refused("state show --dir "+h.path("copy"), exitFailed, "no connections were ever kept there")

	list[501].State |= uint32(flmaps.StateYoung)
	keep(t, h.state, list[495:502], nil)
	for filter, want := range map[string][]string{
		"":                                    {"40495", "40496", "40497", "40498", "40499", "40500", "40501"},
		"--service web":                       {"40500", "40501"},
		"--service [2001:0db8::10]:80":        {"40500", "40501"},
		"--service web,chat --backend ws2":    {"40495", "40497", "40499"},
		"--backend chat/ws1":                  {"40496", "40498"},
		"--backend ws1":                       {"40496", "40498", "40500", "40501"},
		"--client 198.51.1.242":               {"40498"},
		"--client 2001:db8:1::/64":            {"40500", "40501"},
		"--state half-closed,young":           {"40495", "40501"},
		"--state young":                       {"40501"},
		"--idle 1h23m19s":                     {"40500", "40501"},
		"--client 203.0.113.1 --service chat": nil,
	} {
		var got []string
		for client := range h.moments("state show " + filter) {
			got = append(got, fmt.Sprint(client.Port()))
		}
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", filter, diff)
		}
	}
	h.refused("state show --service mail", exitFailed, "there is no connection kept of service mail: there are chat, web")
	h.refused("state show --backend chat/ws9", exitFailed, "no connection kept of backend chat/ws9: there are chat/ws1, chat/ws2, web/ws1")
	if stdout, _ := h.did("state show -o json --client 203.0.113.1"); stdout != "[]\n" {
		t.Errorf("an empty array is %q", stdout)
	}
	stdout, _ = h.did("state show -o json --client 198.51.1.242")
	item := decoded[[]map[string]any](t, stdout)[0]
	if age, idle := item["age_seconds"].(float64), item["idle_seconds"].(float64); age < 18498 || age > 18520 || idle < 4980 || idle > 5000 {
		t.Errorf("age %v, idle %v", age, idle)
	}
	delete(item, "age_seconds")
	delete(item, "idle_seconds")
	if diff := cmp.Diff(map[string]any{
		"client": "198.51.1.242:40498", "service": "chat", "service_address": "192.0.2.10:443", "protocol": "tcp", "backend": "ws1",
		"backend_address": "10.0.0.11:8765", "method": "fullnat", "state": "established", "source": "10.0.0.1:20498",
		"sequence_end": 3486.0, "acknowledgement": 2147489126.0, "timestamp": 499.0, "timestamp_echo": 500.0,
		"client_mac": "02:00:00:00:01:f2", "interface": "flcli", "generation": 1498.0,
	}, item); diff != "" {
		t.Errorf("json (-want +got):\n%s", diff)
	}
	if stdout, _ := h.did("state show -o wide --client 198.51.1.242"); !strings.Contains(cells(stdout),
		"|fullnat|10.0.0.11:8765|10.0.0.1:20498|3486|2147489126|02:00:00:00:01:f2|flcli\n") {
		t.Errorf("wide:\n%s", stdout)
	}
}

// journalFiles are the files of a state directory, by name.
func journalFiles(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	paths, err := filepath.Glob(filepath.Join(dir, "connections", "*"))
	must(t, err)
	for _, path := range paths {
		files[filepath.Base(path)], err = os.ReadFile(path)
		must(t, err)
	}
	return files
}

func TestStateDamaged(t *testing.T) {
	sweepPins(t)
	h := newStateHost(t)
	h.refused("state verify", exitFailed, "no connections were ever kept there")
	h.refused("state restore "+h.dir, exitFailed, "it has no connections: a directory connections is looked for in it")

	list := somewhere(time.Now())
	keep(t, h.path("good"), list[:100], list[100:200])
	good := journalFiles(t, h.path("good"))
	names := slices.Sorted(maps.Keys(good))
	if len(names) != 2 {
		t.Fatalf("files %v", names)
	}
	segment, snapshot := names[0], names[1]
	stdout, stderr := h.did("state verify --dir " + h.path("good"))
	if !strings.Contains(cells(stdout), "FILE|NEEDED|SIZE|BLOCKS|OPENED|BEGUN|WHOLE\n"+snapshot+"|yes|") ||
		!strings.HasSuffix(stdout, "\n200 connections; all is whole\n") || stderr != "" {
		t.Errorf("verify says\n%s%s", stdout, stderr)
	}
	stdout, _ = h.did("state verify -o json --dir " + h.path("good"))
	if v := decoded[verified](t, stdout); !v.Whole || v.Connections != 200 || len(v.Files) != 2 || len(v.Files[0].Wrong) != 0 || v.Written == nil {
		t.Errorf("%+v", v)
	}

	damaged := func(file string, spoil func([]byte) []byte) string {
		dir, err := os.MkdirTemp(h.dir, "damaged-")
		must(t, err)
		must(t, os.CopyFS(dir, os.DirFS(h.path("good"))))
		must(t, os.WriteFile(filepath.Join(dir, "connections", file), spoil(slices.Clone(good[file])), 0o600))
		return dir
	}
	for _, test := range []struct {
		name, file, says string
		connections      string
		spoil            func([]byte) []byte
	}{
		{"torn", segment, "no whole block: torn by a power cut", "100 connections", func(b []byte) []byte { return b[:len(b)-1] }},
		{"rotten", snapshot, "the snapshot is not whole", "100 connections", func(b []byte) []byte { b[500] ^= 1; return b }},
		{"foreign", "notes.txt", "notes.txt: not fairlead's, left alone", "200 connections", func([]byte) []byte { return []byte("hello") }},
	} {
		dir := damaged(test.file, test.spoil)
		code, stdout, stderr := h.ask("state verify --dir " + dir)
		if code != exitFailed || !strings.Contains(stdout, test.says) || !strings.Contains(stdout, "\n"+test.connections+"\n") ||
			!regexp.MustCompile(`: damaged in \d places?: what is whole, `+test.connections+`, a run takes all the same\n$`).MatchString(stderr) {
			t.Errorf("%s: verify: exit code %d\n%s%s", test.name, code, stdout, stderr)
		}
		code, stdout, _ = h.ask("state verify -o json --dir " + dir)
		if v := decoded[verified](t, stdout); code != exitFailed || v.Whole || v.wrongs() == 0 {
			t.Errorf("%s: verify: exit code %d, %+v", test.name, code, v)
		}
		stdout, stderr = h.did("state show -o jsonl --dir " + dir)
		if fmt.Sprint(strings.Count(stdout, "\n"), " connections") != test.connections || !strings.Contains(stderr, test.says) {
			t.Errorf("%s: show: %d lines, %s", test.name, strings.Count(stdout, "\n"), stderr)
		}
		h.refused("state restore "+dir, exitFailed, test.says, "its connections are damaged: nothing is changed; with --damaged, what is whole is taken")
		h.refused("state restore --dry-run "+dir, exitFailed, "damaged")
		if _, err := os.Stat(h.state); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s: a refused restore leaves a state directory", test.name)
		}
		stdout, stderr = h.did("state restore --damaged " + dir)
		if !strings.HasPrefix(stdout, "the next run begins with "+test.connections) || !strings.Contains(stderr, test.says) {
			t.Errorf("%s: restore: %q, %q", test.name, stdout, stderr)
		}
		stdout, _ = h.did("state show -o jsonl")
		if fmt.Sprint(strings.Count(stdout, "\n"), " connections") != test.connections {
			t.Errorf("%s: restored %d lines", test.name, strings.Count(stdout, "\n"))
		}
		h.wantState("connections")
		must(t, os.RemoveAll(h.state))
	}
	later := damaged(snapshot, func(b []byte) []byte {
		binary.LittleEndian.PutUint32(b[8:], 99)
		binary.LittleEndian.PutUint32(b[76:], crc32.Checksum(b[:76], crc32.MakeTable(crc32.Castagnoli)))
		return b
	})
	for _, line := range []string{"state show --dir ", "state verify --dir ", "state restore --damaged "} {
		h.refused(line+later, exitFailed, "it has version 99", "written by a later version of fairlead")
	}
}

// TestStateRestoreTaken: nothing is changed under a daemon's hands, wherever it writes.
func TestStateRestoreTaken(t *testing.T) {
	sweepPins(t)
	h := newStateHost(t)
	list := somewhere(time.Now())
	keep(t, h.path("good"), list[:10], nil)
	keep(t, h.state, list[:20], nil)
	was := journalFiles(t, h.state)

	own, err := journal.Open(h.state, journal.Options{}) // as a daemon with other pins
	must(t, err)
	h.refused("state restore "+h.path("good"), exitFailed, fmt.Sprintf("a daemon runs (pid %d): stop it", os.Getpid()))
	must(t, own.Close(t.Context()))
	other, err := journal.Open(h.path("good"), journal.Options{})
	must(t, err)
	h.refused("state restore "+h.path("good"), exitFailed, "a daemon writes there", "`fairlead state save` takes a copy")
	must(t, other.Close(t.Context()))

	h.refused("state restore "+h.state, exitFailed, "that is what the next run begins with as it is")
	h.refused("state restore "+h.state+"/connections", exitFailed, "that is what the next run begins with as it is")
	h.refused("state restore "+h.path("none"), exitFailed, "no such file or directory")
	h.refused("state restore", exitUsage, "too few arguments")
	h.refused("state restore "+h.path("good")+" -o json", exitUsage, "there is no flag -o")
	h.did("state restore --dry-run " + h.path("good"))
	if diff := cmp.Diff(was, journalFiles(t, h.state)); diff != "" {
		t.Errorf("refused, and yet changed (-want +got):\n%s", diff)
	}
	h.wantState("connections")

	// What an interrupted restore left is no obstacle.
	must(t, os.MkdirAll(h.state+"/connections.restoring/connections", 0o700))
	must(t, os.WriteFile(h.state+"/connections.restoring/connections/journal-0000000000000001", []byte("half"), 0o600))
	must(t, os.Mkdir(h.state+"/connections.before-1", 0o700))
	h.did("state restore " + h.path("good"))
	h.wantState("connections", "connections.before-1", "connections.before-2")
	if diff := cmp.Diff(was, journalFiles(t, h.state+"/connections.before-2")); diff != "" {
		t.Errorf("set aside (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(journalFiles(t, h.path("good")), journalFiles(t, h.state)); diff != "" {
		t.Errorf("restored (-want +got):\n%s", diff)
	}
}

func TestStateSave(t *testing.T) {
	e := newEdge(t)
	named, _ := e.chosen(clientA)
	e.connect(clientA, named, 0, 20500)
	e.connect(clientB, "ws1", bpf.FairleadConnectionStateSTATE_CLIENT_RESET, 20501) // closing
	e.halfConnect(clientD, "ws2", 30*time.Second)
	dir := filepath.Join(t.TempDir(), "saved")

	e.refused("state save", exitUsage, "too few arguments")
	e.refused("state save "+dir+"/deeper", exitFailed, "there is no directory "+dir+": make it first")
	e.refused("state save testdata/good.yaml", exitFailed, "it is not a directory")
	e.refused("state save testdata", exitFailed, "testdata: it is not empty (good.yaml): name one that is, or a new one")

	if got, want := e.want("state save "+dir), "saved 1 connection in "+dir+" ("; !strings.HasPrefix(got, want) {
		t.Errorf("save says %q, want %q", got, want)
	}
	files := journalFiles(t, dir)
	if names := slices.Collect(maps.Keys(files)); len(names) != 1 || !strings.HasPrefix(names[0], "snapshot-") {
		t.Errorf("files %v", names)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
	e.refused("state save "+dir, exitFailed, "it is not empty (connections)")
	if diff := cmp.Diff(files, journalFiles(t, dir)); diff != "" {
		t.Errorf("a refused save changes (-want +got):\n%s", diff)
	}
	same(t, "saved", moments(t, "connections", "list", "--state", "established"), moments(t, "state", "show", "--dir", dir), incoming)

	// Numbers that got another meaning since the maps were opened: the table is read again.
	stale := *e.inv
	stale.Backends = slices.Clone(stale.Backends)
	for i := range stale.Backends {
		stale.Backends[i].Name += "-before"
	}
	again := filepath.Join(t.TempDir(), "again")
	if saved, err := daemon.SaveState(t.Context(), again, e.manager.Set(), &stale); err != nil || saved.Connections != 1 {
		t.Errorf("saved %+v, %v", saved, err)
	}
	same(t, "read again", moments(t, "connections", "list", "--client", clientA, "--state", "established"), moments(t, "state", "show", "--dir", again), incoming)

	// A connection of a backend that there is none of.
	key := e.tuple4(clientC)
	must(t, e.loader.Maps().Connections4.Put(&key, &bpf.FairleadConnection{Backend: 900, Opened: flmaps.Now(), Seen: flmaps.Now()}))
	empty := t.TempDir()
	code, stdout, stderr := fairlead(t, "state", "save", empty)
	if code != exitDone || !strings.HasPrefix(stdout, "saved 1 connection in ") || !strings.HasPrefix(stderr, "left out: 1 connection whose backend") {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}

	// Interrupted: nothing is left.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, want := range map[string]bool{filepath.Join(t.TempDir(), "new"): false, t.TempDir(): true} {
		if _, err := daemon.SaveState(ctx, name, e.manager.Set(), e.inv); !errors.Is(err, context.Canceled) {
			t.Errorf("an interrupted save: %v", err)
		}
		entries, err := os.ReadDir(name)
		if there := err == nil; there != want || len(entries) > 0 {
			t.Errorf("an interrupted save leaves %v, %v", entries, err)
		}
	}

	must(t, e.stop())
	must(t, e.loader.Close())
	if _, err := loader.Unload(testPins + "/check"); err != nil {
		t.Error(err)
	}
	e.refused("state save "+filepath.Join(t.TempDir(), "nothing"), exitNothing, "nothing is attached")
}
