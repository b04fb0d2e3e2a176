package daemon

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"fairlead/maps/journal"
)

// keepOne makes a journal of one connection, whose backend has this name.
func keepOne(t *testing.T, dir, backend string) {
	t.Helper()
	j, err := journal.Open(dir, journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	j.Add([]journal.Event{{Kind: journal.Opened, Entry: journal.Entry{
		Tuple: journal.Tuple{
			Source: netip.MustParseAddrPort("198.51.100.7:40000"), Destination: netip.MustParseAddrPort("192.0.2.10:443"), Protocol: 6,
		},
		Service: "chat", Backend: journal.Backend{Name: backend, Address: netip.MustParseAddrPort("10.0.0.11:443"), Method: "dsr"},
		Opened: time.Now(), Seen: time.Now(),
	}}})
	if err := j.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// kept is what a state directory has: each journal in it, and the backend of its connection.
func kept(t *testing.T, state string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(state, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		report, err := journal.Load(filepath.Dir(filepath.Dir(path)), journal.LoadOptions{}, func(e *journal.Entry) error {
			list = append(list, fmt.Sprint(strings.TrimPrefix(filepath.Dir(path), state+"/"), " ", e.Backend.Name))
			return nil
		})
		if err == nil && !report.Whole() {
			t.Errorf("%s: %s", path, report.String())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestRestoreStateExchange: file systems that can't exchange names do it in steps; one that fails changes nothing.
func TestRestoreStateExchange(t *testing.T) {
	before, after := []string{"connections old"}, []string{"connections new", "connections.before-1/connections old"}
	for name, test := range map[string]struct {
		exchange func(a, b string) error
		want     []string
		fails    bool
	}{
		"in one step": {exchange, after, false},
		"in steps":    {func(string, string) error { return unix.EINVAL }, after, false},
		"failing":     {func(string, string) error { return unix.EIO }, before, true},
		"failing half-way": {func(a, _ string) error {
			if err := os.RemoveAll(a); err != nil { // the second step finds nothing
				return err
			}
			return unix.EINVAL
		}, before, true},
	} {
		dir := t.TempDir()
		state, from := filepath.Join(dir, "state"), filepath.Join(dir, "from")
		keepOne(t, state, "old")
		keepOne(t, from, "new")
		r := &stateRestorer{RestoreOptions: RestoreOptions{From: from, StateDir: state, PinPath: "/sys/fs/bpf/fairlead-test-none"},
			exchange: test.exchange}
		if err := r.restore(); (err != nil) != test.fails {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(test.want, kept(t, state)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		// Whatever became of it, the next one works.
		r.exchange = exchange
		if err := r.restore(); err != nil {
			t.Errorf("%s: again: %v", name, err)
		}
		if got := kept(t, state); got[0] != "connections new" {
			t.Errorf("%s: again: %v", name, got)
		}
	}
}

// TestRestoreStateChanging: what is written while it is copied is not restored.
func TestRestoreStateChanging(t *testing.T) {
	dir := t.TempDir()
	state, from := filepath.Join(dir, "state"), filepath.Join(dir, "from")
	keepOne(t, state, "old")
	keepOne(t, from, "new")
	r := &stateRestorer{RestoreOptions: RestoreOptions{From: from, StateDir: state}, exchange: exchange}
	if err := r.look(); err != nil {
		t.Fatal(err)
	}
	for _, f := range r.done.Report.Files {
		if err := os.Truncate(filepath.Join(r.done.Report.Directory, f.Name), f.Size-1); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.put(true); err == nil || !strings.Contains(err.Error(), "it had 1 connections, and its copy has 0") {
		t.Errorf("restored: %v", err)
	}
	if diff := cmp.Diff([]string{"connections old"}, kept(t, state)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestNamesContradict(t *testing.T) {
	was := names{backends: map[uint32]journal.Backend{1: {Name: "ws1"}, 2: {Name: "ws2"}}, sources: map[uint32]netip.Addr{}}
	for name, test := range map[string]struct {
		now  map[uint32]journal.Backend
		want bool
	}{
		"the same":      {map[uint32]journal.Backend{1: {Name: "ws1"}, 2: {Name: "ws2"}}, false},
		"one gone":      {map[uint32]journal.Backend{1: {Name: "ws1"}}, false},
		"one more":      {map[uint32]journal.Backend{1: {Name: "ws1"}, 2: {Name: "ws2"}, 3: {Name: "ws3"}}, false},
		"another's now": {map[uint32]journal.Backend{1: {Name: "ws1"}, 2: {Name: "ws3"}}, true},
		"it moved":      {map[uint32]journal.Backend{1: {Name: "ws1", Method: "dsr"}}, true},
	} {
		if got := was.contradicts(names{backends: test.now}); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
