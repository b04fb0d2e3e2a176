// Package lab builds networks out of network namespaces on one machine, and the peers that live in them: WebSockets, and
// UDP flows shaped as QUIC's.
//
// A Lab owns every namespace called PREFIX-NAME and every process started in one through it. Nodes are namespaces;
// segments are bridges in the namespace PREFIX-switch; a node joins a segment by a veth pair that behaves, for XDP, as
// a real wire does. OneArm and TwoArm build the topologies a forwarder is usually put into.
//
// A program that starts peers calls PeerMain first in its main or TestMain.
package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"golang.org/x/sys/unix"
)

// recordsRoot holds a directory for each living or abandoned lab: who owns it, what runs in it, and the logs.
const recordsRoot = "/run/fairlead-lab"

// ErrInUse is returned by New and Sweep while another Lab of the same prefix is open, in this process or another.
var ErrInUse = errors.New("in use by a running process")

var (
	// A dash ends the prefix in a namespace's name, so that sweeping "a" never takes what belongs to "a-b".
	validPrefix = regexp.MustCompile(`^[a-z][a-z0-9]{0,31}$`)
	validName   = regexp.MustCompile(`^[a-z][a-z0-9.-]{0,31}$`)
)

// Lab is a set of namespaces and processes that live and end together. Its methods may be called concurrently.
type Lab struct {
	prefix string
	lock   *os.File // the records' directory, flocked: the prefix is taken as long as this is open

	mu        sync.Mutex
	closed    bool
	nodes     map[string]*Node
	segments  map[string]*Segment
	processes []*Process
	peers     []*peer
	captures  []*Capture
}

// New opens the lab of a prefix (lower-case letters and digits), after clearing away what an earlier one that was
// killed, or kept, has left. It returns ErrInUse while another one is open.
func New(prefix string) (*Lab, error) {
	if os.Getenv(peerVariable) != "" {
		return nil, fmt.Errorf("open lab %s: this process is a lab's peer: call lab.PeerMain first in main or TestMain", prefix)
	}
	lock, err := claim(prefix)
	if err != nil {
		return nil, fmt.Errorf("open lab %s: %w", prefix, err)
	}
	if err := sweep(prefix); err != nil {
		lock.Close()
		return nil, fmt.Errorf("open lab %s: clear what an earlier run left: %w", prefix, err)
	}
	l := &Lab{prefix: prefix, lock: lock, nodes: map[string]*Node{}, segments: map[string]*Segment{}}
	for _, dir := range []string{l.path("processes"), l.path("logs")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, errors.Join(fmt.Errorf("open lab %s: %w", prefix, err), l.Close())
		}
	}
	return l, nil
}

// Sweep ends the processes and deletes the namespaces and records of a lab that nobody has open any more: its process
// was killed, or kept it. It returns ErrInUse while one is open.
func Sweep(prefix string) error {
	lock, err := claim(prefix)
	if err != nil {
		return fmt.Errorf("sweep lab %s: %w", prefix, err)
	}
	defer lock.Close()
	if err := errors.Join(sweep(prefix), os.RemoveAll(lock.Name())); err != nil {
		return fmt.Errorf("sweep lab %s: %w", prefix, err)
	}
	return nil
}

// Prefix is what the names of the lab's namespaces begin with.
func (l *Lab) Prefix() string { return l.prefix }

// Close ends the lab's processes (SIGTERM, then SIGKILL), deletes its namespaces and its records. It goes on past
// failures and returns all of them; a second call does nothing.
func (l *Lab) Close() error {
	if !l.end() {
		return nil
	}
	defer l.lock.Close()
	// The records go only once everything else has gone: what could not be ended is left to the next sweep.
	for _, c := range l.captures {
		c.Close() // an open socket would keep its namespace
	}
	err := sweep(l.prefix)
	if err == nil {
		for _, p := range l.processes {
			<-p.done // reaped: sweep leaves our own children as zombies
		}
		err = os.RemoveAll(l.path())
	}
	if err != nil {
		return fmt.Errorf("close lab %s: %w", l.prefix, err)
	}
	return nil
}

// Keep gives the lab up as it stands: namespaces and processes live on after this process, peers go on with what they
// were told to do, and the next New or Sweep of the prefix clears them away.
func (l *Lab) Keep() error {
	l.mu.Lock()
	peers := l.peers
	l.mu.Unlock()
	var errs []error
	for _, p := range peers {
		if err := p.detach(); err != nil {
			errs = append(errs, err)
		}
	}
	if l.end() {
		errs = append(errs, l.lock.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("keep lab %s: %w", l.prefix, err)
	}
	return nil
}

// end marks the lab closed, so that nothing new begins in it, and tells whether this call did so.
func (l *Lab) end() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.closed = true
	return true
}

func (l *Lab) path(elements ...string) string {
	return filepath.Join(append([]string{recordsRoot, l.prefix}, elements...)...)
}

func (l *Lab) namespace(node string) string { return l.prefix + "-" + node }

// claim makes the records' directory of a prefix and locks it for as long as the returned file is open.
func claim(prefix string) (*os.File, error) {
	if !validPrefix.MatchString(prefix) {
		return nil, fmt.Errorf("prefix %q: want a letter, then up to 31 letters and digits, all lower case", prefix)
	}
	dir := filepath.Join(recordsRoot, prefix)
	for {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		lock, err := os.Open(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			lock.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%w (it holds a lock on %s); end it or take another prefix", ErrInUse, dir)
			}
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		// Whoever held the lock before may have removed the directory: what we hold must be what the path names.
		held, err := lock.Stat()
		if err == nil {
			if named, err := os.Stat(dir); err == nil && os.SameFile(held, named) {
				return lock, nil
			}
		}
		lock.Close()
	}
}

// sweep ends what is recorded and deletes every namespace of the prefix. The caller holds the prefix's lock.
func sweep(prefix string) error {
	names, err := namespacesOf(prefix)
	if err != nil {
		return err
	}
	errs := []error{endRecorded(filepath.Join(recordsRoot, prefix, "processes"), names)}
	for _, name := range names {
		errs = append(errs, deleteNamespace(name))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(recordsRoot, prefix))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(recordsRoot, prefix, entry.Name())))
	}
	return errors.Join(errs...)
}
