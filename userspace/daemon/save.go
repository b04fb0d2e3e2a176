package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"fairlead/maps"
	"fairlead/maps/journal"
)

// This file writes the connection table down on request, beside a daemon or without one.

// ConnectionsDir is the directory below a state directory that has the journal.
const ConnectionsDir = "connections"

// Saved is what SaveState wrote.
type Saved struct {
	Connections uint64
	Bytes       int64
	// LeftOut are connections that could not be written, mostly of backends that came or went meanwhile.
	LeftOut uint64
}

// saveAttempts is how often a table is written before it is said that it does not hold still.
const saveAttempts = 3

// SaveState writes the connections that the maps hold into dir, as a daemon keeps them below its state directory. The
// maps are only read. Dir must be empty, or not there; its parent must be. When SaveState returns all is safe on disk;
// when it fails dir is as it was.
//
// inv is what the maps held when they were opened. Should numbers get another meaning while the table is read, it is read
// anew.
func SaveState(ctx context.Context, dir string, set *maps.Set, inv *maps.Inventory) (saved Saved, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("save into %s: %w", dir, err)
		}
	}()
	made, err := emptyDir(dir)
	if err != nil {
		return Saved{}, err
	}
	defer func() {
		if err != nil && made {
			_ = os.Remove(dir)
		}
	}()
	meant := inventoryNames(inv)
	for attempt := 1; ; attempt++ {
		var staging string
		if staging, err = os.MkdirTemp(dir, ".saving-"); err != nil {
			return Saved{}, advisedOfDisk(err)
		}
		saved, err = writeTable(ctx, staging, set, meant)
		var again names
		if err == nil {
			if inv, err = set.Inventory(); err == nil {
				again = inventoryNames(inv)
			}
		}
		moved := meant.contradicts(again)
		if err == nil && !moved && (saved.LeftOut == 0 || attempt == saveAttempts) {
			err = publish(staging, dir, made)
			if err == nil {
				return saved, nil
			}
		}
		_ = os.RemoveAll(staging)
		if err != nil {
			return Saved{}, err
		}
		if attempt == saveAttempts {
			return Saved{}, errors.New("the configuration changes all the time: save when it does not")
		}
		meant = again
	}
}

// emptyDir sees to it that there is a directory with nothing in it.
func emptyDir(dir string) (made bool, err error) {
	err = os.Mkdir(dir, 0o700)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, os.ErrNotExist):
		return false, fmt.Errorf("there is no directory %s: make it first", filepath.Dir(dir))
	case !errors.Is(err, os.ErrExist):
		return false, advisedOfDisk(err)
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, unix.ENOTDIR) {
		return false, errors.New("it is not a directory: name one that is empty, or a new one")
	} else if err != nil {
		return false, err
	}
	if len(entries) > 0 {
		return false, fmt.Errorf("it is not empty (%s): name one that is, or a new one", entries[0].Name())
	}
	return false, nil
}

// writeTable writes a journal that is one snapshot.
func writeTable(ctx context.Context, dir string, set *maps.Set, meant names) (saved Saved, err error) {
	j, err := journal.Open(dir, journal.Options{})
	if err != nil {
		return Saved{}, err
	}
	nameless := 0
	err = j.Snapshot(ctx, func(yield func(*journal.Entry) error) (err error) {
		nameless, err = meant.walk(set, yield)
		return err
	})
	status := j.Status()
	closing, cancel := context.WithTimeout(context.Background(), closeJournal)
	defer cancel()
	if err := errors.Join(err, j.Close(closing)); err != nil {
		return Saved{}, advisedOfDisk(err)
	}
	return Saved{Connections: status.Entries, Bytes: status.SnapshotBytes, LeftOut: uint64(nameless) + status.Refused}, nil
}

// publish gives what is safe below staging its place in dir, in one step.
func publish(staging, dir string, made bool) error {
	if err := os.Rename(filepath.Join(staging, ConnectionsDir), filepath.Join(dir, ConnectionsDir)); err != nil {
		return err
	}
	err := errors.Join(os.Remove(staging), syncDir(dir))
	if made {
		err = errors.Join(err, syncDir(filepath.Dir(dir)))
	}
	if err != nil {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, ConnectionsDir)))
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// advisedOfDisk adds to what a disk refused what a person can do.
func advisedOfDisk(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: make room on its file system, or name another", err)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: name a directory on a file system that can be written", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: run this as a user who may write there", err)
	}
	return err
}
