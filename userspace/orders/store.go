package orders

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	fileName    = "orders.json"
	fileVersion = 1
)

// file is how orders lie on disk.
type file struct {
	Version int     `json:"version"`
	Orders  []entry `json:"orders"`
}

type entry struct {
	Service  string    `json:"service"`
	Backend  string    `json:"backend"`
	Drain    bool      `json:"drain,omitempty"`
	Rate     uint32    `json:"rate,omitempty"`
	Deadline time.Time `json:"deadline,omitzero"`
	Since    time.Time `json:"since,omitzero"`
	Weight   *uint32   `json:"weight,omitempty"`
}

// ErrVersion is matched by the error of Open about a file that a later version wrote.
var ErrVersion = errors.New("written by a later version")

// Store is the orders of one state directory. It may be used by several goroutines; one process alone may have it open.
type Store struct {
	dir string

	mu     sync.Mutex
	orders map[Name]Order
	behind bool // the file may not be what orders are: a write failed
}

// Open reads the orders of a state directory, and makes the directory if it is missing. A file that is damaged is set
// aside and said in the warnings; the Store is then empty. Errors: ErrVersion for a file of a later version, which is
// left as it is.
func Open(dir string) (*Store, []string, error) {
	s := &Store{dir: dir, orders: make(map[Name]Order)}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, nil, fmt.Errorf("make state directory: %w", err)
	}
	data, err := os.ReadFile(s.path())
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read orders: %w", err)
	}
	read, err := decode(data)
	if errors.Is(err, ErrVersion) {
		return nil, nil, fmt.Errorf("read orders: %s: %w: run that version, or move the file away: what was drained or "+
			"weighted by command is then as configured", s.path(), err)
	}
	if err != nil {
		aside, moved := s.setAside()
		if moved != nil {
			return nil, nil, fmt.Errorf("read orders: %s is damaged (%w), and can't be set aside: %w", s.path(), err, moved)
		}
		return s, []string{fmt.Sprintf("%s is damaged (%v): set aside as %s: what was drained or weighted by command is as "+
			"configured until it is set again", s.path(), err, aside)}, nil
	}
	s.orders = read
	return s, nil, nil
}

func (s *Store) path() string { return filepath.Join(s.dir, fileName) }

// decode reads a file's content. Errors: ErrVersion; all others mean damage.
func decode(data []byte) (map[Name]Order, error) {
	var about struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &about); err != nil {
		return nil, err
	}
	if about.Version > fileVersion {
		return nil, fmt.Errorf("it is of version %d, this fairlead knows version %d: %w", about.Version, fileVersion, ErrVersion)
	}
	if about.Version != fileVersion {
		return nil, fmt.Errorf("there is no version %d of it", about.Version)
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	var f file
	if err := decoder.Decode(&f); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, fmt.Errorf("something follows its end")
	}
	orders := make(map[Name]Order)
	for _, e := range f.Orders {
		name := Name{e.Service, e.Backend}
		o := Order{Drain: e.Drain, Rate: e.Rate, Deadline: e.Deadline, Since: e.Since, Weight: e.Weight}.own()
		if e.Service == "" || e.Backend == "" {
			return nil, fmt.Errorf("an order without a name")
		}
		if _, twice := orders[name]; twice {
			return nil, fmt.Errorf("%v stands in it twice", name)
		}
		if err := o.check(); err != nil {
			return nil, fmt.Errorf("%v: %w", name, err)
		}
		if !o.IsZero() {
			orders[name] = o
		}
	}
	return orders, nil
}

func encode(orders map[Name]Order) ([]byte, error) {
	f := file{Version: fileVersion, Orders: []entry{}}
	for _, name := range slices.SortedFunc(maps.Keys(orders), Name.Compare) {
		o := orders[name]
		f.Orders = append(f.Orders, entry{name.Service, name.Backend, o.Drain, o.Rate, o.Deadline, o.Since, o.Weight})
	}
	data, err := json.MarshalIndent(f, "", "  ")
	return append(data, '\n'), err
}

// setAside renames a damaged file to the first name that is free.
func (s *Store) setAside() (aside string, err error) {
	for n := 1; ; n++ {
		aside = fmt.Sprintf("%s.damaged-%d", s.path(), n)
		if _, err := os.Lstat(aside); err == nil {
			continue
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if err := os.Rename(s.path(), aside); err != nil {
			return "", err
		}
		return aside, syncFile(s.dir)
	}
}

// Get is a backend's order; zero where nothing is set.
func (s *Store) Get(service, backend string) Order {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.orders[Name{service, backend}].own()
}

// All is every order.
func (s *Store) All() map[Name]Order {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[Name]Order, len(s.orders))
	for name, o := range s.orders {
		all[name] = o.own()
	}
	return all
}

// Set gives a backend's order, in place of the one before; a zero Order takes it away. It is on disk when Set returns;
// where it can't be written, the order before holds.
func (s *Store) Set(service, backend string, o Order) error {
	name := Name{service, backend}
	if service == "" || backend == "" {
		return fmt.Errorf("set an order of %q: a name is missing", name)
	}
	if err := o.check(); err != nil {
		return fmt.Errorf("set an order of %v: %w", name, err)
	}
	o = o.own()
	s.mu.Lock()
	defer s.mu.Unlock()
	if before, there := s.orders[name]; !s.behind && there != o.IsZero() && (!there || before.Equal(o)) {
		return nil
	}
	next := maps.Clone(s.orders)
	if o.IsZero() {
		delete(next, name)
	} else {
		next[name] = o
	}
	data, err := encode(next)
	if err == nil {
		err = replace(s.path(), data)
	}
	if err != nil {
		s.behind = true
		return fmt.Errorf("write orders: %w", err)
	}
	s.orders, s.behind = next, false
	return nil
}

// replace writes a file aside, down to the disk, and puts it in the place of the one before in one step.
func replace(path string, data []byte) error {
	aside := path + ".new"
	f, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(aside, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(aside))
	}
	return syncFile(filepath.Dir(path))
}

// syncFile brings a file, or a directory's names, down to the disk.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
