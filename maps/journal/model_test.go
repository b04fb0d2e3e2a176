package journal

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var compare = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}

// traffic makes events as a host with some services has them, and keeps what is open.
type traffic struct {
	*rand.Rand
	open     map[Tuple]Entry
	tuples   []Tuple // of open, in no order
	versions map[Tuple]map[uint32][]Entry
	now      time.Time
	next     uint32
	clients  uint32 // how many client addresses there are: few make tuples come again
}

func newTraffic(tb testing.TB, clients uint32) *traffic {
	seed := uint64(time.Now().UnixNano())
	tb.Logf("seed %d", seed)
	return &traffic{
		Rand: rand.New(rand.NewPCG(seed, 1)), open: make(map[Tuple]Entry), versions: make(map[Tuple]map[uint32][]Entry),
		now: time.Now().UTC().Truncate(time.Millisecond), clients: clients,
	}
}

func (t *traffic) entry() Entry {
	client := t.Uint32N(t.clients)
	service := t.IntN(4)
	var a, d [4]byte
	binary.BigEndian.PutUint32(a[:], 0x0a000000+client/8)
	binary.BigEndian.PutUint32(d[:], 0xc0000200+uint32(service))
	source, address := netip.AddrFrom4(a), netip.AddrFrom4(d)
	e := Entry{Service: fmt.Sprintf("service-%d", service)}
	e.Tuple.Protocol = 6
	if service == 3 {
		v6 := source.As4()
		source = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 12: v6[0], v6[1], v6[2], v6[3]})
		address = netip.MustParseAddr("2001:db8::1")
		e.Tuple.Protocol = 17
	}
	e.Tuple.Source = netip.AddrPortFrom(source, uint16(1024+client%8))
	e.Tuple.Destination = netip.AddrPortFrom(address, 443)
	b := t.IntN(40)
	e.Backend = Backend{
		Name: fmt.Sprintf("ws%d", b), Method: []string{"fullnat", "nat", "dsr"}[b%3],
		Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(service), byte(b)}), 8765),
	}
	if b%3 == 0 {
		e.SourceAddr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 2, 0, byte(t.IntN(3))}), uint16(t.Uint32()))
	}
	t.next++
	e.Generation = t.next
	e.Opened = t.now.Add(-time.Duration(t.IntN(100)) * time.Millisecond)
	t.change(&e)
	return e
}

// change makes up what an update tells.
func (t *traffic) change(e *Entry) {
	e.State = t.Uint32() >> t.UintN(32)
	e.Seen = t.now
	e.SequenceEnd, e.Acknowledgement, e.Timestamp, e.TimestampEcho = t.Uint32(), t.Uint32(), 0, 0
	if t.IntN(2) == 0 {
		e.Timestamp, e.TimestampEcho = t.Uint32(), t.Uint32()
	}
	e.Hop = Hop{}
	if n := t.IntN(3); n > 0 {
		e.Hop = Hop{Interface: fmt.Sprintf("eth%d", n), MAC: [6]byte{2, 0, 0, 0, 0, byte(n)}, SourceMAC: [6]byte{2, 1}, VLAN: [2]uint16{uint16(n), 0}}
	}
}

// events are the next n.
func (t *traffic) events(n int) (events []Event) {
	for len(events) < n {
		t.now = t.now.Add(time.Duration(t.IntN(3)) * time.Millisecond)
		var ev Event
		switch what := t.IntN(10); {
		case what < 5 || len(t.tuples) == 0:
			ev = Event{Opened, t.entry()}
			if old, ok := t.open[ev.Entry.Tuple]; ok && t.IntN(2) == 0 { // an earlier one is usually told to be closed
				events = append(events, Event{Closed, Entry{Tuple: old.Tuple, Generation: old.Generation}})
			}
		case what < 7:
			e := t.open[t.tuples[t.IntN(len(t.tuples))]]
			t.change(&e)
			ev = Event{Updated, e}
		default:
			e := t.open[t.tuples[t.IntN(len(t.tuples))]]
			ev = Event{Closed, Entry{Tuple: e.Tuple, Generation: e.Generation}}
		}
		t.take(&ev)
		events = append(events, ev)
	}
	return events
}

func (t *traffic) take(ev *Event) {
	tuple := ev.Entry.Tuple
	if ev.Kind == Closed {
		delete(t.open, tuple)
		for i, other := range t.tuples {
			if other == tuple {
				t.tuples[i] = t.tuples[len(t.tuples)-1]
				t.tuples = t.tuples[:len(t.tuples)-1]
				break
			}
		}
		return
	}
	if _, ok := t.open[tuple]; !ok {
		t.tuples = append(t.tuples, tuple)
	}
	t.open[tuple] = ev.Entry
	if t.versions[tuple] == nil {
		t.versions[tuple] = make(map[uint32][]Entry)
	}
	t.versions[tuple][ev.Entry.Generation] = append(t.versions[tuple][ev.Entry.Generation], ev.Entry)
}

// walk yields what is open now.
func (t *traffic) walk(yield func(*Entry) error) error {
	for _, tuple := range t.tuples {
		e := t.open[tuple]
		if err := yield(&e); err != nil {
			return err
		}
	}
	return nil
}

// known fails unless an entry is one that was put in, with its own backend.
func (t *traffic) known(tb testing.TB, e *Entry) {
	tb.Helper()
	for _, version := range t.versions[e.Tuple][e.Generation] {
		if version == *e {
			return
		}
	}
	tb.Fatalf("%+v was never put in; with its generation there was %+v", *e, t.versions[e.Tuple][e.Generation])
}

// after is what is open when events have happened to what was.
func after(open map[Tuple]Entry, events []Event) map[Tuple]Entry {
	for i := range events {
		ev := &events[i]
		old, ok := open[ev.Entry.Tuple]
		same := ok && old.Generation == ev.Entry.Generation
		switch {
		case ev.Kind == Opened, ev.Kind == Updated && same:
			open[ev.Entry.Tuple] = ev.Entry
		case ev.Kind == Closed && same:
			delete(open, ev.Entry.Tuple)
		}
	}
	return open
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// later is a reader's clock that is ahead of all times that traffic makes up.
var later = LoadOptions{now: time.Now().Add(24 * time.Hour), uptime: 1, boot: &[16]byte{1}}

func mustLoadAs(tb testing.TB, dir string, options LoadOptions) (map[Tuple]Entry, Report) {
	tb.Helper()
	open := make(map[Tuple]Entry)
	report, err := Load(dir, options, func(e *Entry) error {
		if _, twice := open[e.Tuple]; twice {
			tb.Errorf("%v comes twice", e.Tuple)
		}
		open[e.Tuple] = *e
		return nil
	})
	must(tb, err)
	if report.Entries != uint64(len(open)) {
		tb.Errorf("%d entries in the report, %d given", report.Entries, len(open))
	}
	return open, report
}

func mustLoad(tb testing.TB, dir string) (map[Tuple]Entry, Report) {
	tb.Helper()
	return mustLoadAs(tb, dir, later)
}

func wantOpen(tb testing.TB, got, want map[Tuple]Entry) {
	tb.Helper()
	if maps.Equal(want, got) {
		return
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		if len(diff) > 3000 {
			diff = diff[:3000] + "..."
		}
		tb.Errorf("%d connections, want %d (-want +got):\n%s", len(got), len(want), diff)
	}
}

func wantWhole(tb testing.TB, r Report) {
	tb.Helper()
	if !r.Whole() {
		tb.Errorf("not whole: %s", r.String())
	}
}

func wantNote(tb testing.TB, r Report, parts ...string) {
	tb.Helper()
	text := r.String()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			tb.Errorf("the report says %q, and nothing of %q", text, part)
		}
	}
}

// quiet are the options of a journal that does only what it is told to.
var quiet = Options{Interval: time.Hour}

func mustOpen(tb testing.TB, dir string, options Options) *Journal {
	tb.Helper()
	j, err := Open(dir, options)
	must(tb, err)
	tb.Cleanup(func() { closeWithin(j) })
	return j
}

func closeWithin(j *Journal) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return j.Close(ctx)
}

func mustFlush(tb testing.TB, j *Journal) {
	tb.Helper()
	must(tb, j.Flush(tb.Context()))
}

// path is a file of a state directory.
func path(dir string, kind fileKind, number uint64) string {
	return filepath.Join(directory(dir), kind.name(number))
}

func mustRead(tb testing.TB, path string) []byte {
	tb.Helper()
	b, err := os.ReadFile(path)
	must(tb, err)
	return b
}

func mustWrite(tb testing.TB, path string, b []byte) {
	tb.Helper()
	must(tb, os.WriteFile(path, b, 0o600))
}

// names are the files of a state directory.
func names(tb testing.TB, dir string) (names []string) {
	tb.Helper()
	entries, err := os.ReadDir(directory(dir))
	must(tb, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func until(tb testing.TB, what string, condition func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("%s: not within 20 s", what)
		}
	}
}

// logged is a log that tests read.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *logged) lines(part string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}
