package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespaceRoot is where ip-netns(8) and everything that follows it look for named namespaces.
const namespaceRoot = "/run/netns"

// createNamespace makes a named network namespace that `ip netns` sees too.
func createNamespace(name string) error {
	if err := shareNamespaceRoot(); err != nil {
		return fmt.Errorf("create namespace %s: %w", name, err)
	}
	path := filepath.Join(namespaceRoot, name)
	if _, err := os.Stat(path); err == nil {
		return fmt.Errorf("create namespace %s: %s is there already", name, path)
	}
	err := onThread(func() error {
		handle, err := netns.NewNamed(name)
		if err != nil {
			return err
		}
		return handle.Close()
	})
	if err != nil {
		return errors.Join(fmt.Errorf("create namespace %s: %w (this takes root)", name, err), deleteNamespace(name))
	}
	return nil
}

// deleteNamespace removes a name. The namespace itself ends with its last process and socket.
func deleteNamespace(name string) error {
	path := filepath.Join(namespaceRoot, name)
	// EINVAL: a file that nothing is mounted on, left by a run that was killed between the two.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount namespace %s: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace %s: %w", name, err)
	}
	return nil
}

// namespacesOf lists the names that belong to a prefix.
func namespacesOf(prefix string) ([]string, error) {
	entries, err := os.ReadDir(namespaceRoot)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), prefix+"-") {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// shareNamespaceRoot makes the folder of names a shared mount of its own, as ip-netns(8) does. Without it the first
// `ip netns add` of someone else would mount the folder over ours, and our names could no longer be removed (EBUSY).
func shareNamespaceRoot() error {
	if err := os.MkdirAll(namespaceRoot, 0o755); err != nil {
		return err
	}
	root, err := os.Open(namespaceRoot)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.Flock(int(root.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", namespaceRoot, err)
	}
	err = unix.Mount("", namespaceRoot, "none", unix.MS_SHARED|unix.MS_REC, "")
	if err == unix.EINVAL { // not a mount point yet
		if err := unix.Mount(namespaceRoot, namespaceRoot, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s on itself: %w", namespaceRoot, err)
		}
		err = unix.Mount("", namespaceRoot, "none", unix.MS_SHARED|unix.MS_REC, "")
	}
	if err != nil {
		return fmt.Errorf("share the mount %s: %w", namespaceRoot, err)
	}
	return nil
}

// enter runs fn on a thread that is in the named namespace.
func enter(name string, fn func() error) error {
	return onThread(func() error {
		target, err := netns.GetFromName(name)
		if err != nil {
			return fmt.Errorf("open namespace %s: %w", name, err)
		}
		defer target.Close()
		if err := netns.Set(target); err != nil {
			return fmt.Errorf("enter namespace %s: %w", name, err)
		}
		return fn()
	})
}

// onThread runs fn, which may change the thread's network namespace, on a goroutine and a thread of its own, and brings
// the thread home. A thread that can't be brought home stays locked to the goroutine, and ends with it.
func onThread(fn func() error) (err error) {
	done, returned := make(chan struct{}), false
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, homeErr := netns.Get()
		if homeErr != nil {
			err, returned = fmt.Errorf("open the thread's own namespace: %w", homeErr), true
			return
		}
		defer func() {
			if netns.Set(home) == nil {
				runtime.UnlockOSThread()
			}
			home.Close()
		}()
		err = fn()
		returned = true
	}()
	<-done
	if !returned {
		// fn ended its goroutine, as a test's Fatal does: ours ends with it.
		runtime.Goexit()
	}
	return err
}
