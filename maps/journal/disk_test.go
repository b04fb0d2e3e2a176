package journal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("file systems of its own take root: run the tests as root")
	}
}

// mounted is a file system that no path leads to but that of its descriptor: it is gone with this process, however that
// ends.
type mounted struct{ fd int }

func mustMount(tb testing.TB, kind string, options ...string) *mounted {
	tb.Helper()
	m := &mounted{newMount(tb, kind, options)}
	tb.Cleanup(func() { unix.Close(m.fd) })
	return m
}

func newMount(tb testing.TB, kind string, options []string) int {
	tb.Helper()
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	must(tb, err)
	defer unix.Close(fs)
	for i := 0; i < len(options); i += 2 {
		must(tb, unix.FsconfigSetString(fs, options[i], options[i+1]))
	}
	must(tb, unix.FsconfigCreate(fs))
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	must(tb, err)
	return fd
}

var memory = sync.OnceValues(func() (string, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return "", err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return "", err
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	return fmt.Sprintf("/proc/self/fd/%d", fd), err
})

// scratch is a directory for tests that make hundreds: in memory where that can be had.
func scratch(tb testing.TB) string {
	tb.Helper()
	root, err := memory()
	if err != nil {
		return tb.TempDir()
	}
	dir, err := os.MkdirTemp(root, "")
	must(tb, err)
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (m *mounted) path() string { return fmt.Sprintf("/proc/self/fd/%d", m.fd) }

func (m *mounted) readOnly(tb testing.TB, yes bool) {
	tb.Helper()
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if yes {
		attr = unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	}
	must(tb, unix.MountSetattr(m.fd, "", unix.AT_EMPTY_PATH, &attr))
}

// mustExt4 is a block device with an ext4 of its own, in a file.
func mustExt4(tb testing.TB) (device string) {
	tb.Helper()
	image := filepath.Join(tb.TempDir(), "image")
	mustWrite(tb, image, nil)
	must(tb, os.Truncate(image, 16<<20))
	mustRun(tb, "mkfs.ext4", "-q", "-F", image)
	backing, err := os.OpenFile(image, os.O_RDWR, 0)
	must(tb, err)
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	must(tb, err)
	defer control.Close()
	for range 100 { // others take devices too
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		must(tb, err)
		device = fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(device, os.O_RDWR, 0)
		must(tb, err)
		config := unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &config); err == nil {
			tb.Cleanup(func() { loop.Close() })
			return device
		}
		loop.Close()
		if err != unix.EBUSY {
			tb.Fatal(err)
		}
	}
	tb.Fatal("no loop device is free")
	return ""
}

func mustRun(tb testing.TB, args ...string) {
	tb.Helper()
	output, err := execute(args...)
	if err != nil {
		tb.Fatalf("%v: %v: %s", args, err, output)
	}
}

// unhealthy waits until a journal says that something is wrong, and looks for words of it.
func unhealthy(tb testing.TB, j *Journal, parts ...string) {
	tb.Helper()
	until(tb, "unhealthy: "+strings.Join(parts, ", "), func() bool {
		text := j.Status().Text
		return text != "" && !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(text, part) })
	})
}

func healthy(tb testing.TB, j *Journal) {
	tb.Helper()
	until(tb, "healthy", func() bool { return j.Status().Healthy })
}

// fill takes all room but some.
func fill(tb testing.TB, name string, but int64) {
	tb.Helper()
	f, err := os.Create(name)
	must(tb, err)
	defer f.Close()
	b := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(b)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		tb.Fatal(err)
	}
	info, err := f.Stat()
	must(tb, err)
	must(tb, f.Truncate(max(info.Size()-but, 0)))
}

// keeper makes the snapshots that a journal wants, from a table that others change.
func keeper(tb testing.TB, j *Journal, mu *sync.Mutex, tr *traffic) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-j.Wanted():
				j.Snapshot(ctx, func(yield func(*Entry) error) error {
					mu.Lock()
					open := maps.Clone(tr.open)
					mu.Unlock()
					for _, e := range open {
						if err := yield(&e); err != nil {
							return err
						}
					}
					return nil
				})
			case <-ctx.Done():
				return
			}
		}
	}()
	tb.Cleanup(func() { cancel(); <-done })
}

// TestFull: a disk that is full during traffic. What does not fit into the queue is counted; when there is room again, all
// comes to rights by itself, and each change was said once.
func TestFull(t *testing.T) {
	needRoot(t)
	m := mustMount(t, "tmpfs", "size", "8m")
	tr := newTraffic(t, 3000)
	var mu sync.Mutex
	var log logged
	dir := filepath.Join(m.path(), "state")
	j := mustOpen(t, dir, Options{Interval: 5 * time.Millisecond, QueueBytes: 100_000, Logger: log.logger()})
	keeper(t, j, &mu, tr)
	add := func(n int) {
		mu.Lock()
		events := tr.events(n)
		mu.Unlock()
		j.Add(events)
	}
	add(1000)
	mustFlush(t, j)
	until(t, "the first snapshot", func() bool { return j.Status().Entries > 0 })
	ballast := filepath.Join(m.path(), "ballast")
	for round := range 2 {
		fill(t, ballast, 0)
		for range 20 {
			add(500)
		}
		unhealthy(t, j, "no space left on device", "make room")
		for j.Status().Lost == 0 {
			add(500)
		}
		lost := j.Status().Lost
		slowest := time.Duration(0)
		for range 200 {
			begun := time.Now()
			j.Add([]Event{{Closed, Entry{Tuple: tr.tuples[0], Generation: 1 << 31}}})
			slowest = max(slowest, time.Since(begun))
		}
		if slowest > time.Second {
			t.Errorf("Add took %v on a full disk", slowest)
		}
		if round == 0 { // what was there before is there still
			got, _ := mustLoad(t, dir)
			for _, e := range got {
				tr.known(t, &e)
			}
			if len(got) == 0 {
				t.Error("nothing is left on the full disk")
			}
		}
		must(t, os.Remove(ballast))
		healthy(t, j)
		if s := j.Status(); s.Lost < lost || s.Behind > time.Second {
			t.Errorf("%+v", s)
		}
		add(10)
		mustFlush(t, j)
		got, report := mustLoad(t, dir)
		wantOpen(t, got, tr.open)
		if round == 0 {
			t.Logf("%d events were lost, and a snapshot made them good: %s", lost, report.String())
		}
	}
	// The older snapshot's room, once given up, may last for a while, so that there are more changes than we made.
	until(t, "the log", func() bool { return log.lines("healthy again") >= 2 })
	if no, yes := log.lines("level=ERROR"), log.lines("healthy again"); no > 12 || yes > 6 {
		t.Errorf("%d lines of what is wrong, %d that all is well:\n%s", no, yes, log.b.String())
	}
}

// TestFullOfOurselves: where the room goes to our own files, the older snapshot is given up for the newer.
func TestFullOfOurselves(t *testing.T) {
	needRoot(t)
	m := mustMount(t, "tmpfs", "size", "6m")
	tr := newTraffic(t, 1<<20)
	dir := filepath.Join(m.path(), "state")
	j := mustOpen(t, dir, Options{Interval: time.Millisecond})
	// Two snapshots and a half are too much.
	for len(tr.open) < 12_000 {
		ev := Event{Opened, tr.entry()}
		tr.take(&ev)
		j.Add([]Event{ev})
	}
	must(t, j.Snapshot(t.Context(), tr.walk))
	must(t, j.Snapshot(t.Context(), tr.walk))
	size := j.Status().SnapshotBytes
	fill(t, filepath.Join(m.path(), "ballast"), size/2)
	if err := j.Snapshot(t.Context(), tr.walk); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	must(t, j.Snapshot(t.Context(), tr.walk)) // in the room of the oldest
	got, report := mustLoad(t, dir)
	wantOpen(t, got, tr.open)
	wantWhole(t, report)
}

// TestReadOnlyFromTheStart: a disk that can't be written when the journal is opened; nor is there a directory.
func TestReadOnlyFromTheStart(t *testing.T) {
	needRoot(t)
	m := mustMount(t, "tmpfs", "size", "8m")
	m.readOnly(t, true)
	tr := newTraffic(t, 100)
	dir := filepath.Join(m.path(), "state")
	j := mustOpen(t, dir, Options{Interval: 5 * time.Millisecond})
	j.Add(tr.events(100))
	unhealthy(t, j, "make ", "read-only file system", "mount its file system writable")
	if err := j.Snapshot(t.Context(), tr.walk); !errors.Is(err, syscall.EROFS) {
		t.Error(err)
	}
	if _, report := mustLoad(t, dir); !report.Missing {
		t.Error(report.String())
	}
	m.readOnly(t, false)
	healthy(t, j)
	mustFlush(t, j)
	got, _ := mustLoad(t, dir)
	wantOpen(t, got, tr.open)
	if s := j.Status(); s.Lost != 0 {
		t.Errorf("%+v", s)
	}
}

// TestDiskDies: an ext4 that gives up in the middle and becomes read-only, with the journal open on it. It can be unmounted
// and mounted again under the living journal, which then goes on.
func TestDiskDies(t *testing.T) {
	needRoot(t)
	device := mustExt4(t)
	m := mustMount(t, "ext4", "source", device, "errors", "remount-ro")
	tr := newTraffic(t, 1000)
	var mu sync.Mutex
	dir := filepath.Join(m.path(), "state")
	j := mustOpen(t, dir, Options{Interval: 5 * time.Millisecond})
	keeper(t, j, &mu, tr)
	mu.Lock()
	j.Add(tr.events(2000))
	mu.Unlock()
	mustFlush(t, j)
	until(t, "the first snapshot", func() bool { return j.Status().Entries > 0 })
	// What ext4 does when it finds itself damaged.
	fs, err := unix.Fspick(m.fd, "", unix.FSPICK_CLOEXEC|unix.FSPICK_EMPTY_PATH)
	must(t, err)
	must(t, unix.FsconfigSetFlag(fs, "abort"))
	must(t, unix.FsconfigReconfigure(fs))
	must(t, unix.Close(fs))
	mu.Lock()
	j.Add(tr.events(500))
	mu.Unlock()
	unhealthy(t, j, "read-only file system")
	got, _ := mustLoad(t, dir)
	for _, e := range got {
		tr.known(t, &e)
	}
	if len(got) == 0 {
		t.Error("nothing can be read from the dead disk")
	}
	// Unmounted, which works only as nobody holds a file on it, and mounted again at the same place.
	empty := newMount(t, "tmpfs", []string{"size", "4k", "nr_inodes", "1"})
	must(t, unix.Dup3(empty, m.fd, unix.O_CLOEXEC))
	unix.Close(empty)
	until(t, "the dead disk is let go", func() bool {
		fd := newMount(t, "ext4", []string{"source", device})
		defer unix.Close(fd)
		name := fmt.Sprintf("/proc/self/fd/%d/writable", fd)
		if os.WriteFile(name, nil, 0o600) != nil {
			return false // the old one lives
		}
		must(t, os.Remove(name))
		return unix.Dup3(fd, m.fd, unix.O_CLOEXEC) == nil
	})
	healthy(t, j)
	mustFlush(t, j)
	got, _ = mustLoad(t, dir)
	wantOpen(t, got, tr.open)
	if s := j.Status(); s.Lost != 0 {
		t.Errorf("%+v", s)
	}
	must(t, closeWithin(j)) // before the disk goes
}

// TestRemovedUnderWay: somebody removes the directory, and no write fails for it.
func TestRemovedUnderWay(t *testing.T) {
	tr := newTraffic(t, 1000)
	var mu sync.Mutex
	dir := filepath.Join(t.TempDir(), "state")
	j := mustOpen(t, dir, Options{Interval: 2 * time.Millisecond})
	keeper(t, j, &mu, tr)
	add := func() {
		mu.Lock()
		j.Add(tr.events(100))
		mu.Unlock()
		j.Flush(t.Context())
	}
	add()
	until(t, "the first snapshot", func() bool { return j.Status().Entries > 0 })
	must(t, os.RemoveAll(dir))
	add()
	healthy(t, j)
	mustFlush(t, j)
	got, _ := mustLoad(t, dir)
	wantOpen(t, got, tr.open)
	// Another in its place is another.
	must(t, os.Rename(dir, dir+".old"))
	must(t, os.MkdirAll(directory(dir), 0o700))
	add()
	healthy(t, j)
	mustFlush(t, j)
	got, _ = mustLoad(t, dir)
	wantOpen(t, got, tr.open)
}

// TestSlow: a disk that takes its time. Nobody waits for it; what is too much is counted, said, and made good.
func TestSlow(t *testing.T) {
	tr := newTraffic(t, 1000)
	dir := t.TempDir()
	hung := make(chan struct{})
	var slow sync.Mutex // held: the disk hangs
	f := diskFiles()
	create := f.create
	f.create = func(path string) (file, error) {
		real, err := create(path)
		return slowFile{real, func() {
			if !slow.TryLock() {
				hung <- struct{}{}
				slow.Lock()
			}
			slow.Unlock()
		}}, err
	}
	f.same = func(path string, f file) error { return sameFile(path, f.(slowFile).file) }
	var log logged
	j := mustOpen(t, dir, Options{
		Interval: time.Millisecond, Late: 50 * time.Millisecond, QueueBytes: 200_000, files: &f, Logger: log.logger(),
	})
	<-j.Wanted()
	must(t, j.Snapshot(t.Context(), tr.walk))
	j.Add(tr.events(100))
	mustFlush(t, j)
	slow.Lock()
	j.Add(tr.events(10))
	<-hung
	unhealthy(t, j, "is slow: events wait for longer than 50ms")
	if s := j.Status(); s.Behind < 50*time.Millisecond || s.Lost != 0 {
		t.Errorf("%+v", s)
	}
	for j.Status().Lost == 0 {
		j.Add(tr.events(200))
	}
	if s := j.Status(); s.Queued < 200_000 || s.Queued > 200_000+blockRoom {
		t.Errorf("%+v", s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := j.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	select {
	case <-j.Wanted():
		t.Error("a snapshot is asked for while the disk hangs")
	default:
	}
	slow.Unlock()
	<-j.Wanted()
	unhealthy(t, j, "events were lost: until the next snapshot")
	_, report := mustLoad(t, dir)
	wantNote(t, report, fmt.Sprintf("%d events could not be written at their time", j.Status().Lost))
	must(t, j.Snapshot(t.Context(), tr.walk))
	healthy(t, j)
	j.Add(tr.events(10))
	mustFlush(t, j)
	got, report := mustLoad(t, dir)
	wantOpen(t, got, tr.open)
	wantWhole(t, report)
	until(t, "the log", func() bool { return log.lines("healthy again") == 1 && log.lines("is slow") == 1 })

	// A disk that hangs for good holds nobody up at the end.
	slow.Lock()
	j.Add(tr.events(10))
	<-hung
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := j.Close(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "given up") {
		t.Error(err)
	}
	slow.Unlock()
}

type slowFile struct {
	file
	wait func()
}

func (f slowFile) Sync() error { f.wait(); return f.file.Sync() }

// simulation is a disk that works on a real directory, remembers what was made safe, and fails or loses its power where it
// is told to.
type simulation struct {
	*rand.Rand
	ops     int // so far
	fail    func(op int) error
	dead    bool // the power is gone
	now     map[string]*content
	safe    map[string]*content
	changes []change // of now, since safe
}

type content struct {
	bytes []byte
	safe  int // so many of them
}

type change struct {
	name    string
	content *content // nil: removed
}

var errPower = errors.New("the power is gone")

func (s *simulation) step() error {
	if s.dead {
		return errPower
	}
	s.ops++
	err := s.fail(s.ops)
	s.dead = err == errPower
	return err
}

func (s *simulation) change(name string, c *content) {
	if s.changes = append(s.changes, change{name, c}); c == nil {
		delete(s.now, name)
	} else {
		s.now[name] = c
	}
}

type simulatedFile struct {
	file
	s *simulation
	c *content
}

func (f simulatedFile) Write(b []byte) (int, error) {
	if err := f.s.step(); err != nil {
		n := f.s.IntN(len(b) + 1) // some of it
		f.file.Write(b[:n])
		f.c.bytes = append(f.c.bytes, b[:n]...)
		return n, err
	}
	f.c.bytes = append(f.c.bytes, b...)
	return f.file.Write(b)
}

func (f simulatedFile) Sync() error {
	if err := f.s.step(); err != nil {
		return err
	}
	f.c.safe = len(f.c.bytes)
	return nil // the real directory needs no safety
}

func simulate(fail func(op int) error) (*simulation, *files) {
	s := &simulation{
		Rand: rand.New(rand.NewPCG(1, 2)), fail: fail, now: make(map[string]*content), safe: make(map[string]*content),
	}
	real := diskFiles()
	f := real
	var mu sync.Mutex // the journal's writer and its snapshots take turns in these tests, but the detector can't know
	locked := func(do func() error) error {
		mu.Lock()
		defer mu.Unlock()
		if err := s.step(); err != nil {
			return err
		}
		return do()
	}
	f.makeDir = func(dir string) error { return locked(func() error { return real.makeDir(dir) }) }
	f.lock = func(dir string) (lock io.Closer, err error) {
		err = locked(func() error { lock, err = real.lock(dir); return err })
		return lock, err
	}
	f.create = func(path string) (out file, err error) {
		err = locked(func() error {
			base, err := real.create(path)
			if err == nil {
				c := &content{}
				s.change(filepath.Base(path), c)
				out = lockedFile{simulatedFile{base, s, c}, &mu}
			}
			return err
		})
		return out, err
	}
	f.same = func(path string, f file) error {
		return locked(func() error { return sameFile(path, f.(lockedFile).simulatedFile.file) })
	}
	f.rename = func(from, to string) error {
		return locked(func() error {
			c := s.now[filepath.Base(from)]
			s.change(filepath.Base(to), c)
			s.change(filepath.Base(from), nil)
			return real.rename(from, to)
		})
	}
	f.remove = func(path string) error {
		return locked(func() error { s.change(filepath.Base(path), nil); return real.remove(path) })
	}
	f.syncDir = func(dir string) error {
		return locked(func() error {
			s.safe, s.changes = maps.Clone(s.now), nil
			return nil
		})
	}
	return s, &f
}

type lockedFile struct {
	simulatedFile
	mu *sync.Mutex
}

func (f lockedFile) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.simulatedFile.Write(b)
}

func (f lockedFile) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.simulatedFile.Sync()
}

// left is what a power cut leaves: what was made safe, and of the rest some: of a directory's changes any, of a file's new
// end a part, with pages that never came.
func (s *simulation) left(tb testing.TB) (dir string) {
	tb.Helper()
	dir = scratch(tb)
	must(tb, os.Mkdir(directory(dir), 0o700))
	names := maps.Clone(s.safe)
	some := s.IntN(3)
	for _, c := range s.changes {
		if some == 0 || some == 1 && s.IntN(2) == 0 {
			continue
		}
		if names[c.name] = c.content; c.content == nil {
			delete(names, c.name)
		}
	}
	for name, c := range names {
		b := slices.Clone(c.bytes[:c.safe+s.IntN(len(c.bytes)-c.safe+1)])
		for at := c.safe; at < len(b); at += 64 {
			if s.IntN(8) == 0 {
				clear(b[at:min(at+64, len(b))])
			}
		}
		mustWrite(tb, filepath.Join(directory(dir), name), b)
	}
	return dir
}

// scenario is a journal's life: events, snapshots, a restart. It tells what was open after each batch, and behind which of
// them all is safe by the journal's word. It goes on through failures, until the power is gone or all is written.
func scenario(tb testing.TB, tr *traffic, dir string, f *files, dead func() bool) (states []map[Tuple]Entry, safe int) {
	tb.Helper()
	options := Options{Interval: time.Hour, files: f, Logger: nil}
	states = append(states, maps.Clone(tr.open))
	var j *Journal
	insist := func(do func() error) {
		err := do()
		for tries := 0; err != nil && !dead(); tries++ {
			if tries > 50 {
				tb.Fatalf("it never works again: %v", err)
			}
			err = do()
		}
	}
	flush := func() {
		insist(func() error {
			upTo := len(states) - 1
			err := j.Flush(tb.Context())
			if err == nil {
				safe = upTo
			}
			return err
		})
	}
	add := func() {
		j.Add(tr.events(6))
		states = append(states, maps.Clone(tr.open))
	}
	for range 2 {
		var err error
		if j, err = Open(dir, options); err != nil {
			tb.Fatal(err)
		}
		add()
		flush()
		for range 3 {
			add()
			insist(func() error { return j.Snapshot(tb.Context(), tr.walk) })
			if !dead() {
				safe = len(states) - 1
			}
			add()
			add()
			flush()
		}
		add()
		err = closeWithin(j)
		if err == nil {
			safe = len(states) - 1
		}
		if dead() {
			break
		}
		if err != nil { // what it could not write at the end is gone: it said so
			insist(func() error {
				if j, err = Open(dir, options); err != nil {
					tb.Fatal(err)
				}
				err := j.Snapshot(tb.Context(), tr.walk)
				closeErr := closeWithin(j)
				return errors.Join(err, closeErr)
			})
			safe = len(states) - 1
		}
	}
	return states, safe
}

// TestPowerCut: the power goes before each thing that the journal does to the disk, and in the middle of each write. What
// it called safe is there, in full and in order, and the next run goes on from it.
func TestPowerCut(t *testing.T) {
	all, f := simulate(func(int) error { return nil })
	tr := newTraffic(t, 60)
	scenario(t, tr, scratch(t), f, func() bool { return false })
	if all.ops < 60 {
		t.Fatalf("only %d operations", all.ops)
	}
	for at := 1; at <= all.ops; at++ {
		s, f := simulate(func(op int) error {
			if op == at {
				return errPower
			}
			return nil
		})
		tr := newTraffic(t, 60)
		states, safe := scenario(t, tr, scratch(t), f, func() bool { return s.dead })
		for range 3 { // what is left differs
			dir := s.left(t)
			got, report := mustLoad(t, dir)
			found := -1
			for i := len(states) - 1; i >= 0 && found < 0; i-- {
				if maps.Equal(states[i], got) {
					found = i
				}
			}
			if found < safe {
				wantOpen(t, got, states[safe])
				t.Fatalf("power cut before operation %d of %d: what came back is state %d of %d, and %d was safe: %s: %v",
					at, all.ops, found, len(states), safe, report.String(), names(t, dir))
			}
			j := mustOpen(t, dir, quiet)
			next := &traffic{Rand: tr.Rand, open: got, versions: tr.versions, now: tr.now, next: tr.next, clients: 60}
			for tuple := range got {
				next.tuples = append(next.tuples, tuple)
			}
			j.Add(next.events(10))
			mustFlush(t, j)
			again, _ := mustLoad(t, dir)
			wantOpen(t, again, next.open)
			must(t, j.Snapshot(t.Context(), next.walk))
			must(t, closeWithin(j))
			again, _ = mustLoad(t, dir)
			wantOpen(t, again, next.open)
			if t.Failed() {
				t.Fatalf("after a power cut before operation %d", at)
			}
		}
	}
}

// TestFailures: each thing that the journal does to the disk fails, once or some times, and then works again: nothing is
// lost.
func TestFailures(t *testing.T) {
	all, f := simulate(func(int) error { return nil })
	scenario(t, newTraffic(t, 60), scratch(t), f, func() bool { return false })
	for at := 1; at <= all.ops; at++ {
		for _, times := range []int{1, 3} {
			err := []error{syscall.EIO, syscall.ENOSPC, syscall.EROFS}[(at+times)%3]
			_, f := simulate(func(op int) error {
				if op >= at && op < at+times {
					return &os.PathError{Op: "test", Path: fmt.Sprint(op), Err: err}
				}
				return nil
			})
			dir := scratch(t)
			tr := newTraffic(t, 60)
			scenario(t, tr, dir, f, func() bool { return false })
			got, _ := mustLoad(t, dir)
			if wantOpen(t, got, tr.open); t.Failed() {
				t.Fatalf("operation %d of %d failed %d times with %v: %v", at, all.ops, times, err, names(t, dir))
			}
		}
	}
}

func execute(args ...string) ([]byte, error) {
	return exec.Command(args[0], args[1:]...).CombinedOutput()
}

// TestSilentFromTheStart: a disk that does not answer holds nobody up, and is used when it does.
func TestSilentFromTheStart(t *testing.T) {
	tr := newTraffic(t, 100)
	dir := t.TempDir()
	answer := make(chan struct{})
	f := diskFiles()
	f.makeDir = func(dir string) error { <-answer; return diskFiles().makeDir(dir) }
	j := mustOpen(t, dir, Options{Interval: time.Millisecond, files: &f, patience: time.Millisecond})
	j.Add(tr.events(100))
	unhealthy(t, j, "the disk does not answer")
	close(answer)
	healthy(t, j)
	mustFlush(t, j)
	got, _ := mustLoad(t, dir)
	wantOpen(t, got, tr.open)

	// Somebody else has it: that comes out late, and is no end.
	answer = make(chan struct{})
	second := mustOpen(t, dir, Options{Interval: time.Millisecond, files: &f, patience: time.Millisecond})
	close(answer)
	unhealthy(t, second, "another process has it", "end the other process")
	must(t, closeWithin(j))
	healthy(t, second)
}
