package journal

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLocked is what Open fails with while another process has the journal.
var ErrLocked = errors.New("another process has it: is fairlead running already?")

// errRemoved: what is written would be found by nobody.
var errRemoved = errors.New("it was removed or replaced under way")

// file is one that is being written.
type file interface {
	io.Writer
	Sync() error // its data, and what it takes to find them
	Close() error
}

// files is everything that the journal does to a disk. Tests put their own functions in.
type files struct {
	makeDir func(dir string) error
	lock    func(dir string) (io.Closer, error)
	create  func(path string) (file, error) // fails if it is there
	same    func(path string, f file) error // errRemoved: path is not the file any more
	rename  func(from, to string) error
	remove  func(path string) error
	syncDir func(dir string) error
}

func diskFiles() files {
	return files{
		makeDir: func(dir string) error {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			return os.Chmod(dir, 0o700)
		},
		lock:    lockDir,
		create:  createFile,
		same:    sameFile,
		rename:  os.Rename,
		remove:  os.Remove,
		syncDir: syncDir,
	}
}

// lockDir takes the directory itself: that needs no file, and so no room and no disk that can be written.
func lockDir(dir string) (io.Closer, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		d.Close()
		if err == unix.EWOULDBLOCK {
			err = ErrLocked
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return d, nil
}

type diskFile struct{ *os.File }

func createFile(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

func (f diskFile) Sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

func sameFile(path string, f file) error {
	there, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return errRemoved
	} else if err != nil {
		return err
	}
	own, err := f.(diskFile).Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(there, own) {
		return errRemoved
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
