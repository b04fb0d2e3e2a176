package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps/journal"
)

// This file puts connections that were saved, or copied, where the next run looks for them.

// RestoreOptions are what RestoreState touches.
type RestoreOptions struct {
	From     string // a directory as SaveState writes it, or a state directory, or a copy of one
	StateDir string // where the next run looks
	PinPath  string
	Damaged  bool // take what is whole of a journal that is not
	DryRun   bool // check all, change nothing
}

// RestoredState is what RestoreState found and did, or would do.
type RestoredState struct {
	Report journal.Report // of From
	Before string         // where what the state directory had is set aside; empty: it had nothing
}

// What RestoreState's errors match.
var (
	ErrDamaged = errors.New("its connections are damaged") // the report says where
	ErrInUse   = errors.New("the state is in use")         // a daemon runs, or maps are pinned
)

const (
	restoringDir = ConnectionsDir + ".restoring"
	beforePrefix = ConnectionsDir + ".before-"
)

// RestoreState makes the next run begin with the connections of a directory. What the state directory has is set aside,
// and can be restored in turn. The change is one step: whatever interrupts it, the next run finds the one or the other.
//
// Errors: ErrDamaged (From is not whole), ErrInUse (the next run would not look there, or a daemon writes there).
func RestoreState(o RestoreOptions) (RestoredState, error) {
	r := &stateRestorer{RestoreOptions: o, exchange: exchange}
	if err := r.restore(); err != nil {
		return r.done, fmt.Errorf("restore %s: %w", o.From, advisedOfDisk(err))
	}
	return r.done, nil
}

// stateRestorer is RestoreState at work.
type stateRestorer struct {
	RestoreOptions
	exchange func(a, b string) error
	done     RestoredState
}

// place is where the next run looks.
func (r *stateRestorer) place() string { return filepath.Join(r.StateDir, ConnectionsDir) }

func (r *stateRestorer) restore() error {
	if pid := loader.Holder(r.place()); pid != 0 {
		return runs(pid)
	}
	if err := r.unpinned(); err != nil {
		return err
	}
	if err := r.look(); err != nil {
		return err
	}
	_, err := os.Stat(r.place())
	had := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if had {
		if r.done.Before, err = r.freeName(); err != nil {
			return err
		}
	}
	if r.DryRun {
		return nil
	}
	return r.put(had)
}

func runs(pid int) error {
	return fmt.Errorf("%w: a daemon runs (pid %d): stop it, then `fairlead unload`, which ends forwarding", ErrInUse, pid)
}

// unpinned makes sure that the next run reads what is on disk.
func (r *stateRestorer) unpinned() error {
	if pid := loader.Holder(r.PinPath); pid != 0 {
		return runs(pid)
	}
	_, err := loader.Links(r.PinPath)
	if errors.Is(err, loader.ErrNothing) {
		return nil
	} else if err != nil {
		return err
	}
	return fmt.Errorf("%w: the next run goes on with the connections in the maps pinned under %s: `fairlead unload` first, which ends forwarding",
		ErrInUse, r.PinPath)
}

// look reads what is to be restored.
func (r *stateRestorer) look() (err error) {
	from := filepath.Join(r.From, ConnectionsDir)
	if there, err := os.Stat(from); err == nil {
		if own, err := os.Stat(r.place()); err == nil && os.SameFile(there, own) {
			return errors.New("that is what the next run begins with as it is: there is nothing to do")
		}
	}
	if pid := loader.Holder(from); pid != 0 {
		return fmt.Errorf("%w: a daemon writes there (pid %d): `fairlead state save` takes a copy", ErrInUse, pid)
	}
	if r.done.Report, err = journal.Verify(r.From); err != nil {
		return err
	}
	if r.done.Report.Missing {
		return fmt.Errorf("it has no connections: a directory %s is looked for in it", ConnectionsDir)
	}
	if !r.done.Report.Whole() && !r.Damaged {
		return ErrDamaged
	}
	return nil
}

// freeName is where to set aside what there is.
func (r *stateRestorer) freeName() (string, error) {
	for n := 1; ; n++ {
		path := filepath.Join(r.StateDir, fmt.Sprint(beforePrefix, n))
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return path, nil
		} else if err != nil {
			return "", err
		}
	}
}

// put copies the files beside their place, and then makes the two change places.
func (r *stateRestorer) put(had bool) (err error) {
	if err := os.MkdirAll(r.StateDir, 0o755); err != nil {
		return err
	}
	staging := filepath.Join(r.StateDir, restoringDir)
	if err := os.Mkdir(staging, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	lock, err := lockDirectory(staging)
	if err != nil {
		return err
	}
	defer lock.Close()
	defer func() {
		if err != nil {
			_ = os.RemoveAll(staging)
		}
	}()
	copied := filepath.Join(staging, ConnectionsDir)
	if err := r.copyTo(copied); err != nil {
		return err
	}

	// A daemon that starts from here on finds these taken, until the change is made.
	if had {
		held, err := lockDirectory(r.place())
		if err != nil {
			return err
		}
		defer held.Close()
	}
	held, err := lockDirectory(copied)
	if err != nil {
		return err
	}
	defer held.Close()
	if err := r.unpinned(); err != nil {
		return err
	}
	if !had {
		if err := rename(copied, r.place()); err != nil {
			return err
		}
		return errors.Join(os.Remove(staging), syncDir(r.StateDir), syncDir(filepath.Dir(r.StateDir)))
	}
	// It is the copy that first goes where the other is set aside: at no time is there less than both.
	if err := rename(staging, r.done.Before); err != nil {
		return err
	}
	if err := r.swap(filepath.Join(r.done.Before, ConnectionsDir), r.place()); err != nil {
		return errors.Join(err, os.RemoveAll(r.done.Before))
	}
	return errors.Join(syncDir(r.done.Before), syncDir(r.StateDir))
}

// rename gives a directory a name that nothing has.
func rename(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) { // its file system knows no flags; a directory replaces none but an empty one
		err = os.Rename(from, to)
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", from, to, err)
	}
	return nil
}

func exchange(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
}

// swap makes two directories change places: in one step, or in three on a file system that has none for it.
func (r *stateRestorer) swap(a, b string) error {
	err := r.exchange(a, b)
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("exchange %s and %s: %w", a, b, err)
	}
	third := a + ".old"
	if err := os.Rename(b, third); err != nil {
		return err
	}
	if err := os.Rename(a, b); err != nil {
		return errors.Join(err, os.Rename(third, b))
	}
	return os.Rename(third, a)
}

// lockDirectory takes a journal as the daemon does. The lock goes with the process.
func lockDirectory(dir string) (io.Closer, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: another process has %s: a daemon, or another restore: let it end first", ErrInUse, dir)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return d, nil
}

// copyTo makes a directory of the files, safe on disk, and reads it to see that they are the same.
func (r *stateRestorer) copyTo(dir string) error {
	if err := os.RemoveAll(dir); err != nil { // what an interrupted restore left
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for _, f := range r.done.Report.Files {
		if err := copyFile(filepath.Join(r.done.Report.Directory, f.Name), filepath.Join(dir, f.Name)); err != nil {
			return err
		}
	}
	if err := errors.Join(syncDir(dir), syncDir(filepath.Dir(dir))); err != nil {
		return err
	}
	copied, err := journal.Verify(filepath.Dir(dir))
	if err != nil {
		return err
	}
	if was := &r.done.Report; copied.Entries != was.Entries || was.Whole() && !copied.Whole() {
		return fmt.Errorf("it had %d connections, and its copy has %d (%s): it is being written, or a disk fails", was.Entries,
			copied.Entries, copied.String())
	}
	return nil
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Sync()
}
