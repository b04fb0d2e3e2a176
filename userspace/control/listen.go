package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketMode lets root and the socket's group in.
const socketMode = 0o660

// Listen opens the socket at path, and makes its directory (0755) if it is missing. A socket that nobody listens at is
// removed; one that somebody does is refused, and so is anything that is no socket. Closed, it is removed.
func Listen(path string) (net.Listener, error) {
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("listen at the control socket: %w", err)
	}
	return l, nil
}

func listen(path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := makeDirectory(dir); err != nil {
		return nil, err
	}
	// One at a time looks and binds: else two could each take the other's new socket for a stale one.
	lock, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// A unix socket's file has the mode that the socket has before it is bound: nobody finds it open for a moment.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), socketMode) }), err)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	// The umask may have taken some of it.
	if err := os.Chmod(path, socketMode); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func makeDirectory(dir string) error {
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o755) // whatever the umask is
}

// removeStale removes a socket that nobody listens at.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and no socket: move it away, or name another control.socket", path)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		defer conn.Close()
		who := "another process"
		if peer, err := peerOf(conn); err == nil && peer.Pid != 0 {
			who = fmt.Sprintf("another process (pid %d)", peer.Pid)
		}
		return fmt.Errorf("%s listens at %s: stop it first, or name another control.socket", who, path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("see whether somebody listens at %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a stale socket: %w", err)
	}
	return nil
}

// peerOf is who is at the other end of a unix socket.
func peerOf(conn net.Conn) (peer *unix.Ucred, err error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	if failed := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); failed != nil {
		return nil, failed
	}
	return peer, err
}
