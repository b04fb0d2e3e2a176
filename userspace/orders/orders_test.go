package orders

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func mustOpen(tb testing.TB, dir string) *Store {
	tb.Helper()
	s, warnings, err := Open(dir)
	if err != nil || len(warnings) > 0 {
		tb.Fatal(err, warnings)
	}
	return s
}

func mustSet(tb testing.TB, s *Store, service, backend string, o Order) {
	tb.Helper()
	if err := s.Set(service, backend, o); err != nil {
		tb.Fatal(err)
	}
}

func mustRead(tb testing.TB, path string) string {
	tb.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return string(data)
}

func mustWrite(tb testing.TB, path, text string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
}

func weight(n uint32) *uint32 { return &n }

// TestFind: a word names one backend, or the error says what there is.
func TestFind(t *testing.T) {
	known := []Name{{"web", "ws1"}, {"chat", "ws1"}, {"chat", "ws2"}, {"chat", "ws2"}} // ws2 has a namesake that is leaving
	for word, want := range map[string]any{
		"ws2":      Name{"chat", "ws2"},
		"chat/ws1": Name{"chat", "ws1"},
		"web/ws1":  Name{"web", "ws1"},
		"ws1":      "backend ws1: there are several: say which: chat/ws1, web/ws1",
		"ws3":      "there is no backend ws3: there are chat/ws1, chat/ws2, web/ws1",
		"web/ws2":  "there is no backend web/ws2: there are chat/ws1, chat/ws2, web/ws1",
		"/ws2":     "there is no backend /ws2: there are chat/ws1, chat/ws2, web/ws1",
		"":         "there is no backend : there are chat/ws1, chat/ws2, web/ws1",
	} {
		got, err := Find(word, known)
		if text, refused := want.(string); refused {
			if err == nil || err.Error() != text {
				t.Errorf("%q: %v, %v; want %s", word, got, err, text)
			}
		} else if err != nil || got != want {
			t.Errorf("%q: %v, %v; want %v", word, got, err, want)
		}
	}
	if _, err := Find("ws1", nil); err == nil || err.Error() != "there is no backend ws1: there is none at all" {
		t.Errorf("of none: %v", err)
	}
	var many []Name
	for i := range 25 {
		many = append(many, Name{"chat", fmt.Sprintf("ws%02d", i)})
	}
	if _, err := Find("ws99", many); err == nil || !strings.HasSuffix(err.Error(), "chat/ws19 and 5 more") {
		t.Errorf("of many: %v", err)
	}
}

// TestSurvives: what was set is there for the next run, to the nanosecond, and nothing else is.
func TestSurvives(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "fairlead") // made when missing
	s := mustOpen(t, dir)
	if got := s.Get("chat", "ws1"); !got.IsZero() || len(s.All()) != 0 {
		t.Fatalf("an empty store has %+v, %v", got, s.All())
	}
	now := time.Now() // with a monotonic clock, and a zone
	drain := Order{Drain: true, Rate: 500, Deadline: now.Add(5 * time.Minute), Since: now}
	mustSet(t, s, "chat", "ws1", drain)
	mustSet(t, s, "chat", "ws2", Order{Weight: weight(0), Since: now})
	mustSet(t, s, "web", "ws1", Order{Drain: true, Weight: weight(MaxWeight)})
	mustSet(t, s, "web", "ws9", Order{Weight: weight(7)})
	mustSet(t, s, "web", "ws9", Order{}) // taken back
	mustSet(t, s, "web", "ws8", Order{}) // never was

	want := map[Name]Order{
		{"chat", "ws1"}: {Drain: true, Rate: 500, Deadline: now.Add(5 * time.Minute).UTC().Round(0), Since: now.UTC().Round(0)},
		{"chat", "ws2"}: {Weight: weight(0), Since: now.UTC().Round(0)},
		{"web", "ws1"}:  {Drain: true, Weight: weight(MaxWeight)},
	}
	for run := range 2 {
		if diff := cmp.Diff(want, s.All()); diff != "" {
			t.Errorf("run %d (-want +got):\n%s", run, diff)
		}
		for name, o := range want {
			if got := s.Get(name.Service, name.Backend); !got.Equal(o) {
				t.Errorf("run %d: %v is %+v, want %+v", run, name, got, o)
			}
		}
		s = mustOpen(t, dir)
	}
	// What a caller does with an answer is the caller's own affair.
	*s.Get("web", "ws1").Weight = 1
	*s.All()[Name{"web", "ws1"}].Weight = 1
	given := Order{Weight: weight(3)}
	mustSet(t, s, "chat", "ws3", given)
	*given.Weight = 4
	if a, b := *s.Get("web", "ws1").Weight, *s.Get("chat", "ws3").Weight; a != MaxWeight || b != 3 {
		t.Errorf("weights %d and %d were changed from outside", a, b)
	}
}

// TestFile holds the form: files of this version must stay readable.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	at := time.Date(2030, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))
	mustSet(t, s, "chat", "ws2", Order{Weight: weight(0), Since: at})
	mustSet(t, s, "chat", "ws1", Order{Drain: true, Rate: 500, Deadline: at.Add(time.Minute), Since: at})
	want := `{
  "version": 1,
  "orders": [
    {
      "service": "chat",
      "backend": "ws1",
      "drain": true,
      "rate": 500,
      "deadline": "2030-01-02T02:05:05.000000006Z",
      "since": "2030-01-02T02:04:05.000000006Z"
    },
    {
      "service": "chat",
      "backend": "ws2",
      "since": "2030-01-02T02:04:05.000000006Z",
      "weight": 0
    }
  ]
}
`
	path := filepath.Join(dir, "orders.json")
	if diff := cmp.Diff(want, mustRead(t, path)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	mustWrite(t, path, want)
	if diff := cmp.Diff(s.All(), mustOpen(t, dir).All()); diff != "" {
		t.Errorf("read again (-want +got):\n%s", diff)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	for part, o := range map[string]Order{
		"without a drain": {Rate: 1},
		"a deadline":      {Weight: weight(1), Deadline: time.Now()},
		"1000001":         {Drain: true, Rate: MaxRate + 1},
		"year 10000":      {Drain: true, Deadline: time.Date(9999, 12, 31, 23, 0, 0, 0, time.FixedZone("", -7200))},
		"1001":            {Weight: weight(MaxWeight + 1)},
	} {
		if err := s.Set("chat", "ws1", o); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if err := s.Set("", "ws1", Order{Drain: true}); err == nil {
		t.Error("an order of no service")
	}
	if err := s.Set("chat", "", Order{Drain: true}); err == nil {
		t.Error("an order of no backend")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
}

// TestDamaged: a damaged file is kept beside, under a name of its own each time, and the daemon is not held up.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "orders.json")
	whole := `{"version": 1, "orders": [{"service": "chat", "backend": "ws1", "drain": true}]}`
	n := 0
	for _, text := range []string{
		"", "\x00\x00\x00\x00", whole[:len(whole)/2], whole + whole, "[]", `{"orders": []}`, `{"version": 0, "orders": []}`,
		`{"version": -1}`, `{"version": "1"}`, `{"version": 1, "drains": []}`,
		strings.Replace(whole, "ws1", "", 1), strings.Replace(whole, "true", "1", 1),
		strings.Replace(whole, `"drain": true`, `"rate": 5`, 1), strings.Replace(whole, `"drain": true`, `"weight": 1001`, 1),
		strings.Replace(whole, `"drain": true`, `"drain": true, "rate": 1000001`, 1),
		strings.Replace(whole, `"drain"`, `"drained"`, 1),
		strings.Replace(whole, `"drain"`, `"since": "9999-12-31T23:00:00-02:00", "drain"`, 1),
		`{"version": 1, "orders": [{"service": "a", "backend": "b", "drain": true}, {"service": "a", "backend": "b"}]}`,
	} {
		mustWrite(t, path, text)
		s, warnings, err := Open(dir)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		n++
		aside := fmt.Sprintf("%s.damaged-%d", path, n)
		if len(warnings) != 1 || !strings.Contains(warnings[0], aside) || len(s.All()) != 0 {
			t.Errorf("%q: warnings %q, orders %v", text, warnings, s.All())
		}
		if got := mustRead(t, aside); got != text {
			t.Errorf("%s holds %q, want %q", aside, got, text)
		}
		mustSet(t, s, "chat", "ws1", Order{Drain: true})
		if got := mustOpen(t, dir).Get("chat", "ws1"); !got.Drain {
			t.Errorf("%q: orders don't survive afterwards: %+v", text, got)
		}
	}
	mustWrite(t, path, whole)
	if got := mustOpen(t, dir).Get("chat", "ws1"); !got.Drain {
		t.Errorf("the whole file gives %+v", got)
	}
}

// TestLaterVersion: what a later version wrote is its own.
func TestLaterVersion(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "orders.json")
	const text = `{"version": 2, "backends": {"chat/ws1": "drained"}}`
	mustWrite(t, path, text)
	_, warnings, err := Open(dir)
	if !errors.Is(err, ErrVersion) || len(warnings) != 0 || !strings.Contains(err.Error(), "version 2, this fairlead knows version 1") ||
		!strings.Contains(err.Error(), path) {
		t.Errorf("%v, %q", err, warnings)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 || mustRead(t, path) != text {
		t.Errorf("touched: %v", entries)
	}
}

// TestUnreadable: what is not there to be judged is not damaged.
func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "orders.json"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(dir); err == nil || !strings.HasPrefix(err.Error(), "read orders: ") {
		t.Errorf("a directory in its place: %v", err)
	}
	file := filepath.Join(dir, "file")
	mustWrite(t, file, "")
	if _, _, err := Open(file); err == nil || !strings.HasPrefix(err.Error(), "make state directory: ") {
		t.Errorf("a file in the directory's place: %v", err)
	}
}

// TestWriteFails: the order before holds, here and on disk, and the next write makes both agree.
func TestWriteFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := mustOpen(t, dir)
	mustSet(t, s, "chat", "ws1", Order{Weight: weight(5)})
	// A directory where the file is written aside: opening it for writing fails, for root as well.
	block := filepath.Join(dir, "orders.json.new")
	if err := os.MkdirAll(filepath.Join(block, "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Set("chat", "ws1", Order{Weight: weight(9)}); err == nil || !strings.HasPrefix(err.Error(), "write orders: ") {
		t.Errorf("a blocked write: %v", err)
	}
	if got := s.Get("chat", "ws1"); *got.Weight != 5 || *mustOpen(t, dir).Get("chat", "ws1").Weight != 5 {
		t.Errorf("after a write that failed: %d", *got.Weight)
	}
	if err := os.RemoveAll(block); err != nil {
		t.Fatal(err)
	}
	// The same as before is written all the same: the file was not to be trusted.
	if err := os.Remove(filepath.Join(dir, "orders.json")); err != nil {
		t.Fatal(err)
	}
	mustSet(t, s, "chat", "ws1", Order{Weight: weight(5)})
	if got := mustOpen(t, dir).Get("chat", "ws1"); got.Weight == nil || *got.Weight != 5 {
		t.Errorf("after the next write: %+v", got)
	}
}

// TestLeftover: what a run that was killed while writing left aside is in nobody's way.
func TestLeftover(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustSet(t, s, "chat", "ws1", Order{Drain: true})
	mustWrite(t, filepath.Join(dir, "orders.json.new"), `{"version": 1, "orders": [{"serv`+strings.Repeat(" ", 9999))
	s = mustOpen(t, dir)
	if !s.Get("chat", "ws1").Drain {
		t.Error("the order is lost")
	}
	mustSet(t, s, "chat", "ws2", Order{Drain: true})
	if got := len(mustOpen(t, dir).All()); got != 2 {
		t.Errorf("%d orders, want 2", got)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left over: %v, %v", entries, err)
	}
}

// TestNeverHalf: whoever reads the file meanwhile finds it whole, whatever the writers do.
func TestNeverHalf(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	mustSet(t, s, "chat", "first", Order{Drain: true})
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := range 40 {
				o := Order{Weight: weight(uint32(i))}
				if i%3 == 2 {
					o = Order{}
				}
				if err := s.Set("chat", fmt.Sprintf("ws%d", w), o); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	for reads := 0; ; reads++ {
		got, err := decode([]byte(mustRead(t, filepath.Join(dir, "orders.json"))))
		if err != nil || !got[Name{"chat", "first"}].Drain {
			t.Fatalf("read %d: %v, %v", reads, got, err)
		}
		select {
		case <-done:
			if diff := cmp.Diff(s.All(), mustOpen(t, dir).All()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			return
		default:
		}
	}
}

// FuzzDecode: any bytes are read or refused, and what is read comes back the same.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":1,"orders":[{"service":"a","backend":"b","drain":true,"rate":5,"deadline":"2030-01-02T03:04:05Z"}]}`))
	f.Add([]byte(`{"version":1,"orders":[{"service":"a","backend":"b","weight":0,"since":"2030-01-02T03:04:05.1+01:00"}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		first, err := decode(data)
		if err != nil {
			return
		}
		written, err := encode(first)
		if err != nil {
			t.Fatalf("encode %v: %v", first, err)
		}
		second, err := decode(written)
		if err != nil {
			t.Fatalf("%s: %v", written, err)
		}
		if diff := cmp.Diff(first, second); diff != "" {
			t.Errorf("(-first +second):\n%s", diff)
		}
	})
}
