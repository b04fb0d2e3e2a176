package journal

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestComesBack: what is open comes back as it was put in, over several runs, with snapshots and without.
func TestComesBack(t *testing.T) {
	tr := newTraffic(t, 400)
	dir := filepath.Join(t.TempDir(), "state", "fairlead") // made when missing
	for run := range 3 {
		j := mustOpen(t, dir, quiet)
		for round := range 4 {
			for range 20 {
				j.Add(tr.events(50))
			}
			if round%2 == run%2 {
				must(t, j.Snapshot(t.Context(), tr.walk))
			}
			mustFlush(t, j)
			for _, most := range []int{0, 7, 100} {
				options := later
				options.Most = most
				got, report := mustLoadAs(t, dir, options)
				wantOpen(t, got, tr.open)
				wantWhole(t, report)
				if run > 0 && report.Astray > 0 {
					t.Errorf("%d updates of nothing", report.Astray)
				}
			}
		}
		j.Add(tr.events(50))
		must(t, closeWithin(j)) // makes safe what waits
		got, report := mustLoad(t, dir)
		wantOpen(t, got, tr.open)
		wantWhole(t, report)
	}
	report, err := Verify(dir)
	must(t, err)
	wantWhole(t, report)
	info, err := os.Stat(path(dir, segment, 1+uint64(len(names(t, dir)))))
	if err == nil && info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

// TestModes: nobody else reads who is connected.
func TestModes(t *testing.T) {
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	must(t, j.Snapshot(t.Context(), newTraffic(t, 9).walk))
	for name, want := range map[string]os.FileMode{
		directory(dir): 0o700, path(dir, segment, 1): 0o600, path(dir, snapshot, 1): 0o600,
	} {
		info, err := os.Stat(name)
		must(t, err)
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", name, info.Mode(), want)
		}
	}
}

// TestDiskForm: what is on disk of one entry, byte for byte. Files of this version must stay readable.
func TestDiskForm(t *testing.T) {
	at := time.UnixMilli(1_900_000_000_000).UTC()
	e := Entry{
		Tuple:   Tuple{netip.MustParseAddrPort("203.0.113.9:40000"), netip.MustParseAddrPort("192.0.2.10:443"), 6},
		Service: "chat", Backend: Backend{"ws1", netip.MustParseAddrPort("10.0.0.11:8765"), "fullnat"},
		Generation: 0x01020304, State: 5, SourceAddr: netip.MustParseAddrPort("10.0.0.1:1024"), Opened: at.Add(-time.Second), Seen: at,
		SequenceEnd: 1, Acknowledgement: 2, Timestamp: 3, TimestampEcho: 4,
		Hop: Hop{"eth0", [6]byte{2, 0, 0, 0, 0, 1}, [6]byte{2, 0, 0, 0, 0, 2}, [2]uint16{7, 0}},
	}
	dir := t.TempDir()
	must(t, os.Mkdir(directory(dir), 0o700))
	h := header{kind: segment, number: 1, id: 11, run: 12, sequence: 13, boot: [16]byte{14}, wall: at.UnixMilli()}
	var enc encoder
	enc.begin(at.UnixMilli())
	b := enc.opened(make([]byte, blockHeader), &e)
	head := blockHead{id: 11, sequence: 13, wall: at.UnixMilli(), uptime: 15, opened: 1}
	head.seal(b)
	want := "fairlead\x01\x00\x00\x00\x01\x00\x00\x00" + "\x01\x00\x00\x00\x00\x00\x00\x00" + "\x0b\x00\x00\x00\x00\x00\x00\x00" +
		"\x0c\x00\x00\x00\x00\x00\x00\x00" + "\x0d\x00\x00\x00\x00\x00\x00\x00" + "\x0e" + strings.Repeat("\x00", 15) +
		"\x00\x38\xd3\x60\xba\x01\x00\x00" + "\x00\x00\x00\x00" + "CRC1" +
		"FLB\x01\x65\x00\x00\x00" + "\x0b\x00\x00\x00\x00\x00\x00\x00" + "\x0d\x00\x00\x00\x00\x00\x00\x00" +
		"\x00\x38\xd3\x60\xba\x01\x00\x00" + "\x0f\x00\x00\x00\x00\x00\x00\x00" + "\x01\x00\x00\x00" + "CRC2" +
		"\x01\x04\xc0\x00\x02\x0a\xbb\x01\x06" + "\x02\x04chat" + "\x03\x03ws1\x04\x0a\x00\x00\x0b\x3d\x22\x07fullnat" +
		"\x04\x04eth0\x02\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x02\x07\x00\x00\x00" + "\x05\x04\x0a\x00\x00\x01" +
		"\xe8\xcb\x00\x71\x09\x40\x9c\x00\x04\x03\x02\x01" + "\x00\x00\x00\x00\x04" + "\xd0\x0f\x00\x01\x05" +
		"\x01\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00\x04\x00\x00\x00"
	got := string(h.encode()) + string(b)
	got = got[:76] + "CRC1" + got[80:80+44] + "CRC2" + got[80+48:]
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	mustWrite(t, path(dir, segment, 1), append(h.encode(), b...))
	open, report := mustLoadAs(t, dir, LoadOptions{now: at.Add(time.Hour)})
	wantWhole(t, report)
	wantOpen(t, open, map[Tuple]Entry{e.Tuple: e})
}

// TestGenerations: only its own generation closes or updates a connection, and a later one of the same tuple replaces it.
func TestGenerations(t *testing.T) {
	tr := newTraffic(t, 1)
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	a := tr.entry()
	b := tr.entry()
	b.Tuple, b.Generation = a.Tuple, a.Generation+1
	stale := a
	stale.State++
	j.Add([]Event{{Opened, a}, {Closed, Entry{Tuple: a.Tuple, Generation: 77}}, {Opened, b}, {Updated, stale}, {Closed, a}})
	mustFlush(t, j)
	got, report := mustLoad(t, dir)
	wantOpen(t, got, map[Tuple]Entry{b.Tuple: b})
	if report.Astray != 1 || report.Opened != 2 || report.Closed != 2 || report.Updated != 1 {
		t.Errorf("%+v", report)
	}
	j.Add([]Event{{Closed, b}, {Updated, b}})
	mustFlush(t, j)
	got, _ = mustLoad(t, dir)
	wantOpen(t, got, map[Tuple]Entry{})
}

// TestRefused: what can't be written is counted and said once, and is in nobody's way.
func TestRefused(t *testing.T) {
	tr := newTraffic(t, 100)
	dir := t.TempDir()
	var log logged
	options := quiet
	options.Logger = log.logger()
	j := mustOpen(t, dir, options)
	good := tr.entry()
	var events []Event
	var bad []Entry
	for _, spoil := range []func(*Entry){
		func(e *Entry) { e.Service = "" },
		func(e *Entry) { e.Service = strings.Repeat("x", maxName+1) },
		func(e *Entry) { e.Backend.Name = "" },
		func(e *Entry) { e.Backend.Method = strings.Repeat("x", maxName+1) },
		func(e *Entry) { e.Hop.Interface = strings.Repeat("x", maxName+1) },
		func(e *Entry) { e.Backend.Address = netip.AddrPort{} },
		func(e *Entry) { e.SourceAddr = netip.MustParseAddrPort("[fe80::1%eth0]:1") },
		func(e *Entry) { e.Tuple.Source = netip.AddrPort{} },
		func(e *Entry) { e.Tuple.Destination = netip.MustParseAddrPort("[fe80::1%eth0]:1") },
	} {
		e := good
		spoil(&e)
		bad = append(bad, e)
		events = append(events, Event{Opened, e})
	}
	events = append(events, Event{Closed, Entry{}}, Event{Updated, Entry{}}, Event{0, good}, Event{9, good})
	j.Add(events)
	j.Add([]Event{{Opened, good}})
	mustFlush(t, j)
	got, report := mustLoad(t, dir)
	wantOpen(t, got, map[Tuple]Entry{good.Tuple: good})
	wantWhole(t, report)
	until(t, "the log", func() bool { return log.lines("leaves out") == 1 })
	must(t, j.Snapshot(t.Context(), func(yield func(*Entry) error) error {
		for i := range bad {
			if err := yield(&bad[i]); err != nil {
				return err
			}
		}
		return yield(&good)
	}))
	if s := j.Status(); s.Refused != uint64(len(events)+len(bad)) || s.Events != 1 || s.Entries != 1 || !s.Healthy {
		t.Errorf("%+v", s)
	}
	got, _ = mustLoad(t, dir)
	wantOpen(t, got, map[Tuple]Entry{good.Tuple: good})
	if log.lines("leaves out") != 1 {
		t.Error("said more than once")
	}
}

// TestGroups: nobody has to ask for events to become safe within the interval.
func TestGroups(t *testing.T) {
	tr := newTraffic(t, 1000)
	dir := t.TempDir()
	var mu sync.Mutex
	var groups []group
	j := mustOpen(t, dir, Options{Interval: 30 * time.Millisecond, synced: func(g group) {
		mu.Lock()
		groups = append(groups, g)
		mu.Unlock()
	}})
	events := 0
	for range 5 {
		events += 10
		j.Add(tr.events(10)[:10])
		until(t, "safe", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(groups) > 0 && groups[len(groups)-1].upTo == uint64(events)
		})
		if s := j.Status(); s.Behind != 0 || s.Queued != 0 || s.Events != uint64(events) || s.Lag < 30*time.Millisecond {
			t.Errorf("%+v", s)
		}
	}
	if len(groups) != 5 {
		t.Errorf("%d groups of 5 batches", len(groups))
	}
}

// TestWanted: a snapshot is asked for at the start, by size, by age, and again after one has failed; not without need.
func TestWanted(t *testing.T) {
	tr := newTraffic(t, 1<<20)
	wants := func(t *testing.T, j *Journal) {
		t.Helper()
		select {
		case <-j.Wanted():
		case <-time.After(20 * time.Second):
			t.Fatal("no snapshot is asked for")
		}
	}
	wantsNone := func(t *testing.T, j *Journal) {
		t.Helper()
		mustFlush(t, j)
		if _, work := j.due(time.Now()); work {
			t.Error("there is work left")
		}
		select {
		case <-j.Wanted():
			t.Fatal("a snapshot is asked for")
		default:
		}
	}
	t.Run("size", func(t *testing.T) {
		dir := t.TempDir()
		j := mustOpen(t, dir, Options{Interval: time.Millisecond, SegmentBytes: 100_000})
		wants(t, j)
		wantsNone(t, j) // it was asked for already
		must(t, j.Snapshot(t.Context(), tr.walk))
		j.Add(tr.events(500))
		wantsNone(t, j)
		for range 10 {
			j.Add(tr.events(500))
		}
		wants(t, j)
		for range 20 {
			j.Add(tr.events(500))
		}
		failure := errors.New("the walk fails")
		err := j.Snapshot(t.Context(), func(func(*Entry) error) error { return failure })
		if !errors.Is(err, failure) {
			t.Error(err)
		}
		wantsNone(t, j) // not at once
		wants(t, j)
		must(t, j.Snapshot(t.Context(), tr.walk))
		s := j.Status()
		if s.SnapshotBytes < 100_000 || s.Entries != uint64(len(tr.open)) || s.SegmentBytes > headerSize {
			t.Fatalf("%+v", s)
		}
		// Now it takes twice the snapshot.
		for j.Status().SegmentBytes < 2*s.SnapshotBytes-100_000 {
			j.Add(tr.events(500))
			wantsNone(t, j)
		}
		for j.Status().SegmentBytes < 2*s.SnapshotBytes {
			j.Add(tr.events(500))
			mustFlush(t, j)
		}
		wants(t, j)
	})
	t.Run("age", func(t *testing.T) {
		j := mustOpen(t, t.TempDir(), Options{Interval: time.Millisecond, SnapshotAge: 50 * time.Millisecond})
		wants(t, j)
		must(t, j.Snapshot(t.Context(), tr.walk))
		for aged := time.Now().Add(150 * time.Millisecond); time.Now().Before(aged); {
			wantsNone(t, j) // nothing has happened
		}
		j.Add(tr.events(1))
		wants(t, j)
	})
}

// TestOldFilesGo: one older snapshot is kept with what follows it, and nothing else.
func TestOldFilesGo(t *testing.T) {
	tr := newTraffic(t, 100)
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	want := [][]string{
		{"journal-0000000000000001", "journal-0000000000000002", "snapshot-0000000000000002"},
		{"journal-0000000000000002", "journal-0000000000000003", "snapshot-0000000000000002", "snapshot-0000000000000003"},
		{"journal-0000000000000003", "journal-0000000000000004", "snapshot-0000000000000003", "snapshot-0000000000000004"},
		// Nothing has happened since: the segment is empty, and yet each snapshot has its own.
		{"journal-0000000000000004", "journal-0000000000000005", "snapshot-0000000000000004", "snapshot-0000000000000005"},
	}
	for i, want := range want {
		if i < 3 {
			j.Add(tr.events(10))
		}
		must(t, j.Snapshot(t.Context(), tr.walk))
		if diff := cmp.Diff(want, names(t, dir)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	must(t, closeWithin(j))
	j = mustOpen(t, dir, quiet) // knows which are old
	j.Add(tr.events(10))
	must(t, j.Snapshot(t.Context(), tr.walk))
	want[0] = []string{ // the empty one went when it was closed
		"journal-0000000000000006", "journal-0000000000000007",
		"snapshot-0000000000000005", "snapshot-0000000000000007",
	}
	if diff := cmp.Diff(want[0], names(t, dir)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestSnapshotFails: a walk that fails, a context that ends and a journal that is closed leave all as it was.
func TestSnapshotFails(t *testing.T) {
	tr := newTraffic(t, 1<<20)
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	j.Add(tr.events(9000))
	ctx, cancel := context.WithCancel(t.Context())
	err := j.Snapshot(ctx, func(yield func(*Entry) error) error {
		cancel()
		return tr.walk(yield)
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := j.Snapshot(ctx, tr.walk); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// Close ends a snapshot under way.
	inside, closed := make(chan struct{}), make(chan error)
	go func() {
		<-inside
		closed <- closeWithin(j)
	}()
	err = j.Snapshot(t.Context(), func(yield func(*Entry) error) error {
		close(inside)
		<-j.stop
		return tr.walk(yield)
	})
	if !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	must(t, <-closed)
	if err := j.Snapshot(t.Context(), tr.walk); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	j.Add(tr.events(1))
	if s := j.Status(); s.Lost == 0 {
		t.Error("an event after the end is not counted as lost")
	}
	if all := strings.Join(names(t, dir), " "); strings.Contains(all, "snapshot") {
		t.Errorf("left: %s", all)
	}
}

// TestAlone: one process at a time writes; any may read.
func TestAlone(t *testing.T) {
	tr := newTraffic(t, 100)
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	j.Add(tr.events(10))
	mustFlush(t, j)
	if _, err := Open(dir, quiet); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "is fairlead running already?") {
		t.Errorf("opened twice: %v", err)
	}
	got, report := mustLoad(t, dir)
	wantOpen(t, got, tr.open)
	wantWhole(t, report)
	must(t, closeWithin(j))
	before := names(t, dir)
	mustLoad(t, dir)
	if diff := cmp.Diff(before, names(t, dir)); diff != "" {
		t.Errorf("reading changed the directory (-before +after):\n%s", diff)
	}
	must(t, closeWithin(mustOpen(t, dir, quiet)))
}

// TestWhileWritten: many add, one makes snapshots, and a reader always finds a directory that makes sense.
func TestWhileWritten(t *testing.T) {
	dir := t.TempDir()
	j := mustOpen(t, dir, Options{Interval: time.Millisecond})
	const writers = 4
	var group, adding sync.WaitGroup
	trs := make([]*traffic, writers)
	for w := range writers {
		tr := newTraffic(t, 50)
		trs[w] = tr
		adding.Add(1)
		group.Go(func() {
			defer adding.Done()
			for range 60 {
				events := tr.events(20)
				for i := range events { // each writer has ports of its own
					a := &events[i].Entry.Tuple.Source
					*a = netip.AddrPortFrom(a.Addr(), uint16(w*1000)+a.Port()%8)
				}
				j.Add(events)
				j.Status()
			}
		})
	}
	done := make(chan struct{})
	go func() { adding.Wait(); close(done) }()
	snapshots := newTraffic(t, 50)
	snapshots.events(100)
	group.Go(func() {
		for {
			if err := j.Snapshot(t.Context(), snapshots.walk); err != nil {
				t.Error(err)
				return
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	group.Go(func() {
		for {
			report, err := Verify(dir)
			if err != nil {
				t.Error(err)
				return
			}
			for _, f := range report.Files {
				for _, note := range f.Notes {
					if !strings.Contains(note, "being written") && !strings.Contains(note, "no header") {
						t.Errorf("%s: %s", f.Name, note)
					}
				}
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	group.Wait()
	must(t, closeWithin(j))
	_, report := mustLoad(t, dir)
	wantWhole(t, report)
}

// TestSnapshotUnderTraffic: events during a walk, and a walk that sees what they did or did not do, come out as the truth.
func TestSnapshotUnderTraffic(t *testing.T) {
	tr := newTraffic(t, 60) // tuples come again and again
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	j.Add(tr.events(300))
	for range 20 {
		var pending []Event // what the kernel has told, and nobody has added yet
		must(t, j.Snapshot(t.Context(), func(yield func(*Entry) error) error {
			seen := make(map[Tuple]bool)
			for len(seen) < 40 {
				pending = append(pending, tr.events(5)...)
				if tr.IntN(2) == 0 {
					j.Add(pending)
					pending = nil
				}
				for _, tuple := range tr.tuples {
					if !seen[tuple] {
						e := tr.open[tuple]
						if err := yield(&e); err != nil {
							return err
						}
						seen[tuple] = true
						break
					}
				}
			}
			// The rest of the table: what is there to the end is walked over.
			for _, tuple := range tr.tuples {
				e := tr.open[tuple]
				if err := yield(&e); err != nil {
					return err
				}
			}
			return nil
		}))
		j.Add(pending)
		mustFlush(t, j)
		got, report := mustLoad(t, dir)
		wantOpen(t, got, tr.open)
		wantWhole(t, report)
	}
}

// TestSnapshotWaits: a snapshot does not count before all events are safe that made what it saw. Else those before them,
// which are, would bring back what is over.
func TestSnapshotWaits(t *testing.T) {
	tr := newTraffic(t, 1)
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	var entries [3]Entry
	for i := range entries {
		entries[i] = tr.entry()
		entries[i].Tuple = entries[0].Tuple
	}
	j.Add([]Event{{Opened, entries[0]}})
	must(t, j.Snapshot(t.Context(), func(yield func(*Entry) error) error {
		j.Add([]Event{{Closed, entries[0]}, {Opened, entries[1]}})
		mustFlush(t, j)
		j.Add([]Event{{Closed, entries[1]}, {Opened, entries[2]}})
		return yield(&entries[2])
	}))
	got, report := mustLoad(t, dir) // and nothing is flushed
	wantOpen(t, got, map[Tuple]Entry{entries[2].Tuple: entries[2]})
	wantWhole(t, report)
}
