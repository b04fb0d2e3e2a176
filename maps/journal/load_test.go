package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var corruptions = flag.Int("journal.corruptions", 250, "random corruptions of TestCorruptions")

// written makes a state directory: two snapshots, the segments between and behind them, in many small blocks. Of each
// segment that is still needed it tells what is open behind each block.
func written(tb testing.TB, tr *traffic) (dir string, states []map[Tuple]Entry) {
	tb.Helper()
	dir = scratch(tb)
	j := mustOpen(tb, dir, quiet)
	for part := range 3 {
		if part > 0 {
			must(tb, j.Snapshot(tb.Context(), tr.walk))
		}
		states = []map[Tuple]Entry{maps.Clone(tr.open)}
		for range 12 {
			j.Add(tr.events(8))
			mustFlush(tb, j)
			states = append(states, maps.Clone(tr.open))
		}
	}
	must(tb, closeWithin(j))
	return dir, states
}

// copied is a state directory like another.
func copied(tb testing.TB, dir string) string {
	tb.Helper()
	to := scratch(tb)
	must(tb, os.CopyFS(to, os.DirFS(dir)))
	return to
}

func mustScan(tb testing.TB, dir string, kind fileKind, number uint64) *scan {
	tb.Helper()
	b := mustRead(tb, path(dir, kind, number))
	s, err := scanFile(bytes.NewReader(b), int64(len(b)), kind, number)
	must(tb, err)
	return s
}

// TestCut: the journal cut at every byte of its last segment, header and all: what the blocks before the cut tell is there,
// to the last connection, and what is torn is said.
func TestCut(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, states := written(t, tr)
	whole := mustRead(t, path(dir, segment, 3))
	blocks := mustScan(t, dir, segment, 3).blocks
	if len(blocks) != 12 {
		t.Fatalf("%d blocks", len(blocks))
	}
	for cut := len(whole); cut >= 0; cut-- {
		must(t, os.Truncate(path(dir, segment, 3), int64(cut)))
		before := 0
		torn := cut != headerSize && cut != len(whole)
		for i, b := range blocks {
			if end := b.offset + blockHeader + int64(b.size); int64(cut) >= end {
				before = i + 1
				torn = torn && int64(cut) != end
			}
		}
		got, report := mustLoad(t, dir)
		if wantOpen(t, got, states[before]); t.Failed() {
			t.Fatalf("cut at %d of %d", cut, len(whole))
		}
		if report.Whole() == torn {
			t.Fatalf("cut at %d of %d: %s", cut, len(whole), report.String())
		}
		switch {
		case torn && cut < headerSize:
			wantNote(t, report, "has no header")
		case torn:
			wantNote(t, report, "are no whole block: torn by a power cut")
		}
	}
}

// TestCutAndGoneOn: behind a torn end a new process goes on, and both count.
func TestCutAndGoneOn(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, states := written(t, tr)
	last := mustScan(t, dir, segment, 3).blocks[11]
	must(t, os.Truncate(path(dir, segment, 3), last.offset+50))
	open := states[11]
	j := mustOpen(t, dir, quiet)
	events := tr.events(100)
	j.Add(events)
	mustFlush(t, j)
	open = after(open, events)
	got, report := mustLoad(t, dir)
	wantOpen(t, got, open)
	wantNote(t, report, "journal-0000000000000003: the last 50 bytes are no whole block")
}

// TestDamagedBlock: a block in the middle that is damaged loses what it told, and nothing else.
func TestDamagedBlock(t *testing.T) {
	tr := newTraffic(t, 1000)
	dir := scratch(t)
	j := mustOpen(t, dir, quiet)
	var batches [][]Event
	for range 9 {
		batches = append(batches, tr.events(100))
		j.Add(batches[len(batches)-1])
		mustFlush(t, j)
	}
	b := mustRead(t, path(dir, segment, 1))
	blocks := mustScan(t, dir, segment, 1).blocks
	for i, block := range blocks {
		for _, at := range []int64{0, 3, 5, 6, 9, 17, 26, 33, 41, 45, blockHeader, blockHeader + int64(block.size)/2, blockHeader + int64(block.size) - 1} {
			spoiled := bytes.Clone(b)
			spoiled[block.offset+at] ^= 0x40
			mustWrite(t, path(dir, segment, 1), spoiled)
			open := make(map[Tuple]Entry)
			for k, batch := range batches {
				if k != i {
					open = after(open, batch)
				}
			}
			got, report := mustLoad(t, dir)
			wantOpen(t, got, open)
			if i < len(blocks)-1 {
				wantNote(t, report, fmt.Sprintf("%d bytes from byte %d on are damaged", blockHeader+int64(block.size), block.offset),
					"1 blocks are missing from its middle")
			} else {
				wantNote(t, report, "are no whole block")
			}
			if t.Failed() {
				t.Fatalf("block %d, byte %d", i, at)
			}
		}
	}
}

// TestDamagedHeader: what says which file it is gone, the blocks still speak.
func TestDamagedHeader(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, states := written(t, tr)
	for at := range headerSize {
		d := copied(t, dir)
		b := mustRead(t, path(d, segment, 3))
		b[at] ^= 1
		mustWrite(t, path(d, segment, 3), b)
		got, report := mustLoad(t, d)
		wantOpen(t, got, states[12])
		wantNote(t, report, "journal-0000000000000003: its header is damaged")
	}
}

// TestDamagedSnapshot: a snapshot that is not whole is made good by the one before and all events since.
func TestDamagedSnapshot(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, states := written(t, tr)
	whole := mustRead(t, path(dir, snapshot, 3))
	want := states[12]
	spoils := map[string]func([]byte) []byte{
		"nothing":            func(b []byte) []byte { return b[:0] },
		"no end":             func(b []byte) []byte { return b[:len(b)-1] },
		"only a header":      func(b []byte) []byte { return b[:headerSize] },
		"zeroes":             func(b []byte) []byte { return make([]byte, len(b)) },
		"a bit in the end":   func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"a bit in an entry":  func(b []byte) []byte { b[headerSize+blockHeader+99] ^= 1; return b },
		"a bit in a header":  func(b []byte) []byte { b[20] ^= 1; return b },
		"something behind":   func(b []byte) []byte { return append(b, 0) },
		"a stranger's bytes": func(b []byte) []byte { return []byte(strings.Repeat("not a snapshot\n", 100)) },
	}
	for name, spoil := range spoils {
		d := copied(t, dir)
		mustWrite(t, path(d, snapshot, 3), spoil(bytes.Clone(whole)))
		got, report := mustLoad(t, d)
		wantOpen(t, got, want)
		if report.Whole() {
			t.Errorf("%s: the report says nothing", name)
		}
		// The other is gone as well: what is readable of this one counts, and all that happened since.
		must(t, os.Remove(path(d, snapshot, 2)))
		got, _ = mustLoad(t, d)
		for _, e := range got {
			tr.known(t, &e)
		}
		if name == "no end" || name == "something behind" || name == "a bit in the end" {
			wantOpen(t, got, want)
		}
	}
	must(t, os.Remove(path(dir, snapshot, 3)))
	got, report := mustLoad(t, dir)
	wantOpen(t, got, want)
	wantWhole(t, report)
	must(t, os.Remove(path(dir, snapshot, 2)))
	_, report = mustLoad(t, dir)
	wantNote(t, report, "there is no snapshot: what was before journal-0000000000000002 is missing")
}

// TestMissingSegment: one that was taken away is missed, by the numbers of the blocks behind it.
func TestMissingSegment(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, _ := written(t, tr)
	must(t, os.Remove(path(dir, snapshot, 3)))
	must(t, os.Remove(path(dir, segment, 2)))
	got, report := mustLoad(t, dir)
	for _, e := range got {
		tr.known(t, &e)
	}
	wantNote(t, report, "journal-0000000000000003: 12 blocks before it are missing")
}

// TestForeign: what is not ours is left alone, and named.
func TestForeign(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, states := written(t, tr)
	foreign := map[string]string{
		"README":                        "hands off",
		"journal-3":                     "x",
		"journal-000000000000000G":      "x",
		"snapshot-0000000000000003.bak": "x",
		"journal-0000000000000000":      "a diary of mine",
		"snapshot-0000000000000009":     strings.Repeat("photographs ", 1000),
	}
	for name, text := range foreign {
		mustWrite(t, filepath.Join(directory(dir), name), []byte(text))
	}
	// A copy by hand under another name is none of ours either: it would be read in the wrong place.
	renamed := string(mustRead(t, path(dir, segment, 2)))
	foreign["journal-0000000000000008"] = renamed
	mustWrite(t, path(dir, segment, 8), []byte(renamed))
	must(t, os.Mkdir(filepath.Join(directory(dir), "journal-0000000000000007"), 0o700))
	got, report := mustLoad(t, dir)
	wantOpen(t, got, states[12])
	want := append(slices.Collect(maps.Keys(foreign)), "journal-0000000000000007")
	slices.Sort(want)
	slices.Sort(report.Others)
	if diff := cmp.Diff(want, report.Others); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	wantNote(t, report, "journal-0000000000000008: it was journal-0000000000000002, and got its name by hand", "left alone")
	var log logged
	options := quiet
	options.Logger = log.logger()
	j := mustOpen(t, dir, options)
	for range 4 {
		must(t, j.Snapshot(t.Context(), tr.walk))
	}
	must(t, closeWithin(j))
	for name, text := range foreign {
		if got := string(mustRead(t, filepath.Join(directory(dir), name))); got != text {
			t.Errorf("%s was changed", name)
		}
		if log.lines("file="+filepath.Join(directory(dir), name)) != 1 {
			t.Errorf("%s is not named in the log", name)
		}
	}
	got, _ = mustLoad(t, dir)
	wantOpen(t, got, tr.open)
}

// TestLaterVersion: what a later version wrote is its own: nothing is touched, nothing is given.
func TestLaterVersion(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, _ := written(t, tr)
	b := mustRead(t, path(dir, snapshot, 3))
	b[8] = 2
	binary.LittleEndian.PutUint32(b[76:], crc32.Checksum(b[:76], castagnoli))
	mustWrite(t, path(dir, snapshot, 4), b)
	before := names(t, dir)
	_, err := Load(dir, LoadOptions{}, func(*Entry) error { return errors.New("given") })
	if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), path(dir, snapshot, 4)+": it has version 2, this fairlead knows version 1: ") {
		t.Error(err)
	}
	if _, err := Verify(dir); !errors.Is(err, ErrVersion) {
		t.Error(err)
	}
	if _, err := Open(dir, quiet); !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "use that version") {
		t.Error(err)
	}
	if diff := cmp.Diff(before, names(t, dir)); diff != "" || !bytes.Equal(b, mustRead(t, path(dir, snapshot, 4))) {
		t.Errorf("touched (-before +after):\n%s", diff)
	}
	must(t, os.Remove(path(dir, snapshot, 4)))
	mustOpen(t, dir, quiet) // the lock is free
}

// TestMissing: a directory that is not there is an empty journal; one that is something else is an error.
func TestMissing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	got, report := mustLoad(t, dir)
	if len(got) != 0 || !report.Missing || !strings.HasPrefix(report.String(), "there is no journal in ") {
		t.Errorf("%s", report.String())
	}
	must(t, os.MkdirAll(directory(dir), 0o700))
	if _, report = mustLoad(t, dir); report.Missing || report.String() != "0 connections in 0 files; all whole" {
		t.Errorf("%s", report.String())
	}
	must(t, os.Remove(directory(dir)))
	mustWrite(t, directory(dir), nil)
	if _, err := Load(dir, LoadOptions{}, func(*Entry) error { return nil }); err == nil || !strings.HasPrefix(err.Error(), "read the journal: ") {
		t.Error(err)
	}
}

// TestVisitFails: an error of visit's ends the reading and comes back as it is.
func TestVisitFails(t *testing.T) {
	dir, _ := written(t, newTraffic(t, 100))
	failure := errors.New("no room")
	n := 0
	_, err := Load(dir, LoadOptions{}, func(*Entry) error { n++; return failure })
	if err != failure || n != 1 {
		t.Errorf("%v after %d", err, n)
	}
}

// TestClocks: ages, whatever the reader's clock has done.
func TestClocks(t *testing.T) {
	tr := newTraffic(t, 100)
	dir := t.TempDir()
	wall := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	j := mustOpen(t, dir, Options{Interval: time.Hour, now: func() time.Time { return wall }})
	e := tr.entry()
	e.Opened, e.Seen = wall.Add(-time.Hour), wall.Add(-time.Minute)
	j.Add([]Event{{Opened, e}})
	up := uptime()
	mustFlush(t, j)
	other := &[16]byte{1}
	for _, c := range []struct {
		name         string
		now          time.Time
		uptime       time.Duration
		boot         *[16]byte
		opened, seen time.Duration // ages wanted
		rebooted     bool
	}{
		{"at once", wall, up, nil, time.Hour, time.Minute, false},
		{"a day later", wall.Add(24 * time.Hour), time.Minute, other, 25 * time.Hour, 24*time.Hour + time.Minute, true},
		{"clock lost over a reboot", time.Unix(100, 0), time.Minute, other, time.Hour, time.Minute, true},
		{"clock set back a little", wall.Add(-30 * time.Second), time.Minute, other, time.Hour, time.Minute, true},
		{"clock set back while up", wall.Add(-24 * time.Hour), up + 10*time.Minute, nil, 70 * time.Minute, 11 * time.Minute, false},
		{"clock set forward while up", wall.Add(9999 * time.Hour), up + 10*time.Minute, nil, 70 * time.Minute, 11 * time.Minute, false},
		{"not known which boot", wall.Add(10 * time.Minute), up, &[16]byte{}, 70 * time.Minute, 11 * time.Minute, true},
	} {
		got, report := mustLoadAs(t, dir, LoadOptions{now: c.now, uptime: c.uptime, boot: c.boot})
		back := got[e.Tuple]
		for what, ages := range map[string][2]time.Duration{
			"opened": {c.now.Sub(back.Opened), c.opened}, "seen": {c.now.Sub(back.Seen), c.seen},
		} {
			if d := ages[0] - ages[1]; d < 0 || d > time.Second {
				t.Errorf("%s: %s %v ago, want %v", c.name, what, ages[0], ages[1])
			}
		}
		if report.Rebooted != c.rebooted || !report.Written.Equal(wall) {
			t.Errorf("%s: %+v", c.name, report)
		}
	}
	// A time ahead of the writer's own clock is no negative age.
	e.Seen = wall.Add(time.Hour)
	j.Add([]Event{{Updated, e}})
	mustFlush(t, j)
	got, _ := mustLoadAs(t, dir, LoadOptions{now: wall, uptime: up})
	if age := wall.Sub(got[e.Tuple].Seen); age != 0 {
		t.Errorf("an age of %v", age)
	}
}

// TestCorruptions: whatever happens to the files, what comes out is what was put in: every entry with its own backend.
func TestCorruptions(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, _ := written(t, tr)
	type whole struct {
		name string
		b    []byte
		s    *scan
	}
	var files []whole
	for _, name := range names(t, dir) {
		kind, number, _ := parseName(name)
		files = append(files, whole{name, mustRead(t, filepath.Join(directory(dir), name)), mustScan(t, dir, kind, number)})
	}
	d := scratch(t)
	must(t, os.Mkdir(directory(d), 0o700))
	kinds := []func(r *rand.Rand, b []byte, f, other *whole) []byte{
		func(r *rand.Rand, b []byte, _, _ *whole) []byte { // bits
			for range 1 + r.IntN(20) {
				b[r.IntN(len(b))] ^= 1 << r.IntN(8)
			}
			return b
		},
		func(r *rand.Rand, b []byte, _, _ *whole) []byte { // cut off
			return b[:r.IntN(len(b))]
		},
		func(r *rand.Rand, b []byte, _, _ *whole) []byte { // a page of zeroes, or of dirt
			at := r.IntN(len(b)) &^ 511
			dirt := r.IntN(2) == 0
			for i := at; i < min(at+512, len(b)); i++ {
				if b[i] = 0; dirt {
					b[i] = byte(r.Uint32())
				}
			}
			return b
		},
		func(r *rand.Rand, b []byte, f, other *whole) []byte { // blocks in other places
			parts := split(f.b, f.s)
			i, k := r.IntN(len(parts)), r.IntN(len(parts))
			parts[i], parts[k] = parts[k], parts[i]
			return slices.Concat(parts...)
		},
		func(r *rand.Rand, b []byte, f, other *whole) []byte { // a block twice, or one of another file's
			parts, from := split(f.b, f.s), split(f.b, f.s)
			if r.IntN(2) == 0 {
				from = split(other.b, other.s)
			}
			parts = slices.Insert(parts, r.IntN(len(parts)+1), from[r.IntN(len(from))])
			return slices.Concat(parts...)
		},
		func(r *rand.Rand, b []byte, f, other *whole) []byte { // a page of another file
			at := r.IntN(len(b)) &^ 511
			from := r.IntN(len(other.b)) &^ 511
			copy(b[at:min(at+512, len(b))], other.b[from:])
			return b
		},
		func(r *rand.Rand, b []byte, f, other *whole) []byte { // something taken out, something put in
			at := r.IntN(len(b))
			if r.IntN(2) == 0 {
				return slices.Delete(b, at, min(at+r.IntN(600), len(b)))
			}
			return slices.Insert(b, at, other.b[:r.IntN(len(other.b))]...)
		},
	}
	silent, kept, of := 0, 0, 0
	for range *corruptions {
		for _, f := range files {
			mustWrite(t, filepath.Join(directory(d), f.name), f.b)
		}
		changed := false
		var what []string
		for range 1 + tr.IntN(3) {
			f, other := &files[tr.IntN(len(files))], &files[tr.IntN(len(files))]
			kind := tr.IntN(len(kinds))
			b := kinds[kind](tr.Rand, bytes.Clone(f.b), f, other)
			what = append(what, fmt.Sprintf("%d of %s with %s: %d to %d", kind, f.name, other.name, len(f.b), len(b)))
			mustWrite(t, filepath.Join(directory(d), f.name), b)
		}
		for _, f := range files { // the second may have undone the first
			changed = changed || !bytes.Equal(mustRead(t, filepath.Join(directory(d), f.name)), f.b)
		}
		got, report := mustLoad(t, d)
		for _, e := range got {
			tr.known(t, &e)
		}
		kept, of = kept+len(got), of+len(tr.open)
		verified, err := Verify(d)
		must(t, err)
		if changed && verified.Whole() {
			silent++
			// Truncation between two blocks leaves a file that was once right. Nothing else may pass unseen.
			cut := false
			for _, f := range files {
				info, err := os.Stat(filepath.Join(directory(d), f.name))
				must(t, err)
				cut = cut || info.Size() < int64(len(f.b))
			}
			if !cut {
				t.Errorf("damage is not said: %s %v", report.String(), what)
			}
		}
	}
	t.Logf("%d corruptions: %.1f %% of the connections came back; %d were cuts between two blocks, which can't be told", *corruptions,
		100*float64(kept)/float64(of), silent)
}

// split is a file's header and blocks.
func split(b []byte, s *scan) (parts [][]byte) {
	parts = append(parts, b[:headerSize])
	for _, block := range s.blocks {
		parts = append(parts, b[block.offset:block.offset+blockHeader+int64(block.size)])
	}
	return parts
}

// TestStrangersBlock: a whole block of another file's is none of this one's.
func TestStrangersBlock(t *testing.T) {
	tr := newTraffic(t, 100)
	dir, states := written(t, tr)
	j := mustOpen(t, dir, quiet)
	events := tr.events(50)
	j.Add(events)
	must(t, closeWithin(j))
	third, fourth := mustRead(t, path(dir, segment, 3)), mustRead(t, path(dir, segment, 4))
	must(t, os.Remove(path(dir, segment, 4)))
	mustWrite(t, path(dir, segment, 3), append(third, fourth[headerSize:]...))
	got, report := mustLoad(t, dir)
	wantOpen(t, got, states[12])
	wantNote(t, report, fmt.Sprintf("the last %d bytes are no whole block", len(fourth)-headerSize))
}
