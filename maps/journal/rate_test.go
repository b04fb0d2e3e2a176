package journal

import (
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	rateFor = flag.Duration("journal.rate", time.Second, "how long TestRate goes on; 1m with -journal.many is what README.md tells of")
	many    = flag.Bool("journal.many", false, "TestRate opens 100,000 connections a second, TestMillion has 1,000,000")
)

// crowd is entry number i of as many as one likes: clients from everywhere, 50 backends of one service.
func crowd(i int, now time.Time) Entry {
	var client [4]byte
	binary.BigEndian.PutUint32(client[:], uint32(i)*2654435761)
	b := i * 13 % 50
	return Entry{
		Tuple: Tuple{
			netip.AddrPortFrom(netip.AddrFrom4(client), uint16(i*31+1024)), netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 10}), 443), 6,
		},
		Service: "chat", Backend: Backend{backendNames[b], netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, 0, byte(b)}), 8765), "fullnat"},
		Generation: uint32(i), State: 3, SourceAddr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 1}), uint16(i)),
		Opened: now.Add(-time.Second), Seen: now, SequenceEnd: uint32(i) * 40503, Acknowledgement: uint32(i) * 69069,
		Timestamp: uint32(i) + 1, TimestampEcho: uint32(i) * 3,
		Hop: Hop{Interface: "eth0", MAC: [6]byte{2, 0, 0, 0, 0, 1}, SourceMAC: [6]byte{2, 0, 0, 0, 0, 2}},
	}
}

var backendNames = func() (names []string) {
	for i := range 50 {
		names = append(names, fmt.Sprintf("ws%02d", i))
	}
	return names
}()

// TestSize: what a connection takes on disk.
func TestSize(t *testing.T) {
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	const n = 20_000
	now := time.Now()
	size := func(what string, most float64, event func(*Entry) Event) {
		before := j.Status().Written
		for i := range n {
			e := crowd(i, now)
			j.Add([]Event{event(&e)})
		}
		mustFlush(t, j)
		each := float64(j.Status().Written-before) / n
		t.Logf("%s: %.1f bytes", what, each)
		if each > most {
			t.Errorf("%s: %.1f bytes, more than %.0f", what, each, most)
		}
	}
	size("opened, IPv4, with timestamps and a source", 60, func(e *Entry) Event { return Event{Opened, *e} })
	size("updated, IPv4", 40, func(e *Entry) Event { return Event{Updated, *e} })
	size("closed, IPv4", 15, func(e *Entry) Event { return Event{Closed, *e} })
	six := func(e *Entry) {
		a := e.Tuple.Source.Addr().As4()
		e.Tuple.Source = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0x20, 1, 12: a[0], a[1], a[2], a[3]}), e.Tuple.Source.Port())
		e.Tuple.Destination = netip.MustParseAddrPort("[2001:db8::1]:443")
		e.SourceAddr = netip.AddrPort{}
	}
	size("opened, IPv6, no source", 65, func(e *Entry) Event { six(e); return Event{Opened, *e} })
	size("closed, IPv6", 28, func(e *Entry) Event { six(e); return Event{Closed, *e} })
}

// TestMillion: as many connections written and read back, and what that takes.
func TestMillion(t *testing.T) {
	n := 50_000
	if *many {
		n = 1_000_000
	}
	dir := t.TempDir()
	j := mustOpen(t, dir, quiet)
	now := time.Now().Truncate(time.Millisecond).UTC()
	begun := time.Now()
	must(t, j.Snapshot(t.Context(), func(yield func(*Entry) error) error {
		for i := range n {
			e := crowd(i, now)
			if err := yield(&e); err != nil {
				return err
			}
		}
		return nil
	}))
	wrote := time.Since(begun)
	// A tenth of them closed since, and as many new.
	var events []Event
	for i := range n / 10 {
		events = append(events, Event{Closed, crowd(i*10, now)}, Event{Opened, crowd(n+i, now)})
	}
	j.Add(events)
	mustFlush(t, j)
	size := j.Status().SnapshotBytes
	must(t, closeWithin(j))
	events = nil
	for _, most := range []int{0, n / 4} {
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		seen, wrong := make([]byte, n+n/10), 0
		begun = time.Now()
		_, err := Load(dir, LoadOptions{Most: most}, func(e *Entry) error {
			if seen[e.Generation] == 0 && after.HeapAlloc == 0 {
				runtime.ReadMemStats(&after) // all of the first part are held now
			}
			seen[e.Generation]++
			if int(e.Generation)%997 == 0 && *e != crowd(int(e.Generation), now) {
				wrong++
			}
			return nil
		})
		must(t, err)
		took := time.Since(begun)
		for i := range seen {
			want := byte(1)
			if i < n && i%10 == 0 {
				want = 0
			}
			if seen[i] != want {
				wrong++
			}
		}
		if wrong > 0 {
			t.Errorf("%d connections are wrong", wrong)
		}
		held := float64(after.HeapAlloc - before.HeapAlloc)
		t.Logf("%d connections: snapshot of %.1f bytes each in %v; loaded in %v with %.0f MB in use at the end of the first part, %.0f MB from the system",
			n, float64(size)/float64(n), wrote.Round(time.Millisecond), took.Round(time.Millisecond), held/1e6, float64(after.Sys)/1e6)
		if most := 200*float64(n) + 64e6; held > most {
			t.Errorf("%.0f bytes are held, more than %.0f", held, most)
		}
	}
}

// TestRate: connections opened and closed at a rate, with the snapshots that this asks for: what that takes, and how far
// behind the disk is.
func TestRate(t *testing.T) {
	rate, standing := 20_000, 10_000
	if *many {
		rate, standing = 100_000, 200_000
	}
	dir := t.TempDir()
	type mark struct {
		upTo uint64
		at   time.Time
	}
	var mu sync.Mutex
	var marks []mark
	var lags []time.Duration
	j := mustOpen(t, dir, Options{synced: func(g group) {
		now := time.Now()
		mu.Lock()
		for len(marks) > 0 && marks[0].upTo <= g.upTo {
			lags = append(lags, now.Sub(marks[0].at))
			marks = marks[1:]
		}
		mu.Unlock()
	}})
	var table sync.Mutex
	first, next := 0, 0 // what is open
	stop, stopped := make(chan struct{}), make(chan struct{})
	snapshots, yielded := 0, 0
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-j.Wanted():
			}
			table.Lock()
			from, to := first, next
			table.Unlock()
			if err := j.Snapshot(t.Context(), func(yield func(*Entry) error) error {
				now := time.Now()
				for i := from; i < to; i++ {
					e := crowd(i, now)
					yielded++
					if err := yield(&e); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Error(err)
				return
			}
			snapshots++
		}
	}()
	var before, after unix.Rusage
	events := make([]Event, 0, rate/100)
	run := func(add func([]Event)) (cpu time.Duration) {
		unix.Getrusage(unix.RUSAGE_SELF, &before)
		begun := time.Now()
		for tick := 0; time.Since(begun) < *rateFor; tick++ {
			if early := time.Until(begun.Add(time.Duration(tick) * 2 * time.Millisecond)); early > 0 {
				time.Sleep(early) // the rate is what is tested
			}
			events = events[:0]
			now := time.Now()
			table.Lock()
			for range rate / 500 {
				events = append(events, Event{Opened, crowd(next, now)})
				next++
				if next-first > standing {
					events = append(events, Event{Closed, crowd(first, now)})
					first++
				}
			}
			table.Unlock()
			add(events)
		}
		unix.Getrusage(unix.RUSAGE_SELF, &after)
		return time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	}
	written := j.Status().Written
	upTo := uint64(0)
	total := run(func(events []Event) {
		mu.Lock()
		upTo += uint64(len(events))
		marks = append(marks, mark{upTo, time.Now()})
		mu.Unlock()
		j.Add(events)
	})
	opened := next
	close(stop)
	<-stopped
	mustFlush(t, j)
	s := j.Status()
	got, report := 0, Report{}
	report, err := Load(dir, LoadOptions{}, func(e *Entry) error {
		got++
		if int(e.Generation) < first || int(e.Generation) >= next {
			return fmt.Errorf("%d was closed", e.Generation)
		}
		return nil
	})
	must(t, err)
	wantWhole(t, report)
	if got != next-first || s.Lost != 0 || s.Refused != 0 {
		t.Errorf("%d came back of %d; %+v", got, next-first, s)
	}
	end := next
	feeder := run(func([]Event) {}) * time.Duration(opened) / time.Duration(next-end) // the same without a journal
	mu.Lock()
	defer mu.Unlock()
	slices.Sort(lags)
	each := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / float64(opened) }
	t.Logf("%d opened and closed in %v, %d snapshots of %d in all: %.0f ns of CPU each, %.0f of them the test's own; %.1f bytes each; lag p50 %v, p99 %v, worst %v; load %s",
		opened, *rateFor, snapshots, yielded, each(total), each(feeder), float64(s.Written-written)/float64(opened),
		lags[len(lags)/2].Round(time.Millisecond), lags[len(lags)*99/100].Round(time.Millisecond), lags[len(lags)-1].Round(time.Millisecond),
		loadAverage())
}

// loadAverage is how busy the machine is.
func loadAverage() string {
	b, _ := os.ReadFile("/proc/loadavg")
	text, _, _ := strings.Cut(string(b), " ")
	return text
}

// BenchmarkAdd is one connection opened and closed, as far as its caller has to do with it.
func BenchmarkAdd(b *testing.B) {
	j := mustOpen(b, b.TempDir(), Options{QueueBytes: 1 << 30})
	events := make([]Event, 0, 2000)
	now := time.Now()
	for i := range 1000 {
		e := crowd(i, now)
		events = append(events, Event{Opened, e}, Event{Closed, e})
	}
	b.ReportAllocs()
	for b.Loop() {
		j.Add(events)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/connection")
	if s := j.Status(); s.Lost > 0 {
		b.Fatalf("%+v", s)
	}
}
