package loader

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrLocked is matched by the errors that say that a daemon holds the pin path.
var ErrLocked = errors.New("another fairlead runs")

// LockedError names the daemon that holds a pin path. It matches ErrLocked.
type LockedError struct {
	Path string
	PID  int // 0: not to be known, as from another process namespace
}

func (e *LockedError) Is(target error) bool { return target == ErrLocked }

func (e *LockedError) Error() string {
	who := "another fairlead"
	if e.PID != 0 {
		who = fmt.Sprintf("another fairlead (pid %d)", e.PID)
	}
	return fmt.Sprintf("%s holds %s: stop it first, or use a pin_path of your own", who, e.Path)
}

// lockOrCreate locks the pin path, making the directory if it is missing.
func lockOrCreate(path string) (*os.File, error) {
	for {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, fmt.Errorf("make pin path: %w", advised(err))
		}
		lock, err := lockDirectory(path)
		// An unload at this moment takes the directory away with it.
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		return lock, err
	}
}

// lockDirectory takes the exclusive lock of the pin path: a lock of the directory itself, gone with the process that
// holds it, however that ends. The error is os.ErrNotExist where there is no such directory (any more).
func lockDirectory(path string) (*os.File, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("lock pin path: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer dir.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, &LockedError{Path: path, PID: Holder(path)}
		}
		return nil, fmt.Errorf("lock pin path %s: %w", path, err)
	}
	held, err := dir.Stat()
	if err == nil {
		var now os.FileInfo
		if now, err = os.Stat(path); err == nil && !os.SameFile(held, now) {
			// Removed and made anew between the opening and the lock: what we hold locks nothing.
			err = os.ErrNotExist
		}
	}
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock pin path %s: %w", path, err)
	}
	return dir, nil
}

// Holder is the process that holds the lock of a pin path, as proc_locks(5) shows it; 0: none to be seen from here. It takes
// no lock itself: a daemon that starts at this moment must not find it taken.
func Holder(path string) int {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return 0
	}
	inode := fmt.Sprintf("%02x:%02x:%d", unix.Major(stat.Dev), unix.Minor(stat.Dev), stat.Ino)
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer locks.Close()
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 28877 00:27:216068 0 EOF
		if f := strings.Fields(lines.Text()); len(f) >= 6 && f[1] == "FLOCK" && f[5] == inode {
			if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 {
				return pid
			}
		}
	}
	return 0
}
