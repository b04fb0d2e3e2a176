package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/test/lab"
)

// TestDisk: the disk that connections are kept on is full, then can't be written, while they come and talk. Forwarding is
// unhurt, the log says what is wrong, and once there is room again everything is there: a reboot shows it.
func TestDisk(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	topo, s := mustTopology(t, lab.TwoArm, form{"nat", 4, 4}, 3, lab.Options{})
	s = websockets.of(s)
	for _, b := range topo.Backends() {
		mustServe(t, b)
	}
	clearDisks(t)
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	e := newEdge(t, topo, interfacesOf(topo), "xdp: native", "epoch: 500ms")
	e.stateDir = disk
	e.write(s)
	e.start()
	clients, err := websockets.start(topo.Clients)
	if err != nil {
		t.Fatal(err)
	}
	k := &talk{edge: e, talkers: clients, kind: websockets, topo: topo, service: s, ctx: ctx}
	k.openMore(100)
	if err := clients.Chatter(ctx, lab.ChatterOptions{Rate: 300}); err != nil {
		t.Fatal(err)
	}
	k.echoes("at first")
	said := func(what string) func() bool {
		n := strings.Count(e.log(), what)
		return func() bool { return strings.Count(e.log(), what) > n }
	}

	ballast := filepath.Join(disk, "ballast")
	mustFill(t, ballast)
	wrong := said("level=ERROR msg=\"the journal of connections")
	k.openMore(100)
	e.until("a full disk is said", wrong)
	k.echoes("with a full disk")
	// Its files are let go of while it fails, so that it can be mended: here it can't even be written.
	e.until("the disk is remounted read-only", func() bool {
		return unix.Mount("", disk, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") == nil
	})
	k.openMore(100)
	k.echoes("with a disk that can't be written")
	right := said("level=INFO msg=\"the journal of connections is healthy again")
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	e.until("the disk has room again, and that is said", right)
	time.Sleep(time.Second) // so much may be lost

	e.kill()
	e.unload()
	e.start()
	if !strings.Contains(e.log(), fmt.Sprintf("connections restored\" connections=%d", k.opened)) {
		t.Errorf("not all %d connections were restored:\n%s", k.opened, e.log())
	}
	k.echoes("after a reboot")
	if _, err := clients.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// clearDisks unmounts what a killed run has left.
func clearDisks(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(os.TempDir(), t.Name()+"*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, disk := range left {
		for unix.Unmount(disk, unix.MNT_DETACH) == nil {
		}
		if err := os.RemoveAll(filepath.Dir(disk)); err != nil {
			t.Error(err)
		}
	}
}

// mustFill writes a file until there is no room.
func mustFill(t *testing.T, path string) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, size := range []int{64 << 10, 4 << 10, 1} {
		for block := make([]byte, size); ; {
			if _, err := file.Write(block); errors.Is(err, unix.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}
