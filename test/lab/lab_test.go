package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// orphanVariable makes the test's program leave a lab behind, as one that was killed does.
const orphanVariable = "FAIRLEAD_LAB_ORPHAN"

func TestMain(m *testing.M) {
	PeerMain()
	if prefix := os.Getenv(orphanVariable); prefix != "" {
		leaveOrphans(prefix)
	}
	os.Exit(m.Run())
}

// prefixOf gives tests of different processes different labs.
func prefixOf(t testing.TB, name string) string {
	t.Helper()
	prefix := fmt.Sprintf("lab%s%d", name, os.Getpid())
	t.Cleanup(func() { wantNothingLeft(t, prefix) })
	return prefix
}

func mustNew(t testing.TB, prefix string) *Lab {
	t.Helper()
	l, err := New(prefix)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func mustNode(t testing.TB, l *Lab, name string) *Node {
	t.Helper()
	n, err := l.Node(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func wantNothingLeft(t testing.TB, prefix string) {
	t.Helper()
	for _, pattern := range []string{filepath.Join(namespaceRoot, prefix+"-*"), filepath.Join(recordsRoot, prefix)} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range commands {
		if text, _ := os.ReadFile(path); bytes.Contains(text, []byte(prefix+"-")) {
			t.Errorf("left running: %s: %q", path, text)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(prefix+"-")) {
		t.Errorf("a namespace of %s is still mounted", prefix)
	}
}

func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited 10 s for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestPrefix(t *testing.T) {
	for _, prefix := range []string{"", "a-b", "../a", "A", "1a", strings.Repeat("a", 33)} {
		if l, err := New(prefix); err == nil {
			t.Errorf("New(%q) is taken", prefix)
			l.Close()
		}
	}
	prefix := prefixOf(t, "taken")
	l := mustNew(t, prefix)
	if _, err := New(prefix); !errors.Is(err, ErrInUse) {
		t.Errorf("New of an open lab: %v, want ErrInUse", err)
	}
	if err := Sweep(prefix); !errors.Is(err, ErrInUse) {
		t.Errorf("Sweep of an open lab: %v, want ErrInUse", err)
	}
	neighbour := mustNew(t, prefix+"x")
	mustNode(t, neighbour, "alone")
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(namespaceRoot, prefix+"x-alone")); err != nil {
		t.Errorf("closing lab %s took a namespace of lab %[1]sx: %v", prefix, err)
	}
	if _, err := l.Node("late"); err == nil {
		t.Error("a closed lab takes a node")
	}
}

func TestDo(t *testing.T) {
	l := mustNew(t, prefixOf(t, "do"))
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	n := mustNode(t, l, "here")
	var listener net.Listener
	err = n.Do(func() (err error) {
		listener, err = net.Listen("tcp", "127.0.0.1:80")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if _, err := net.DialTimeout("tcp", "127.0.0.1:80", time.Second); err == nil {
		t.Error("the node's listener answers outside of it")
	}
	want := errors.New("mine")
	if err := n.Do(func() error { return want }); err != want {
		t.Errorf("Do returned %v, want the function's own error", err)
	}
	ended := make(chan bool)
	go func() {
		defer close(ended)
		n.Do(func() error { runtime.Goexit(); return nil })
		t.Error("Do returned after its function ended the goroutine")
	}()
	<-ended

	// Every thread that Go has for us afterwards is at home.
	var group sync.WaitGroup
	for range 200 {
		group.Go(func() {
			err := n.Do(func() error {
				conn, err := net.Dial("tcp", "127.0.0.1:80")
				if err == nil {
					conn.Close()
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(tasks) == 0 {
		t.Fatalf("no threads: %v", err)
	}
	for _, task := range tasks {
		var stat, at unix.Stat_t
		if unix.Fstat(int(home), &at) == nil && unix.Stat(task, &stat) == nil && stat.Ino != at.Ino {
			t.Errorf("thread %s was left in another namespace", task)
		}
	}
}

func TestCommandSeesFileSystems(t *testing.T) {
	l := mustNew(t, prefixOf(t, "cmd"))
	n := mustNode(t, l, "here")
	output, err := n.Command(context.Background(), "sh", "-c", "readlink /proc/self/ns/mnt; ip -o link").Output()
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	if len(lines) != 2 || lines[0] != mounts || !strings.Contains(lines[1], " lo: ") {
		t.Errorf("a command in the node sees %q, want mount namespace %s and lo alone", lines, mounts)
	}
}

// leaveOrphans builds a lab, starts processes in it, says so, and waits to be killed.
func leaveOrphans(prefix string) {
	l, err := New(prefix)
	if err == nil {
		var n *Node
		if n, err = l.Node("left"); err == nil {
			// The second leads a group whose leader ends, and leaves a child; the third won't hear of SIGTERM.
			for _, argv := range [][]string{
				{"sleep", "600"},
				{"sh", "-c", "sleep 601 & exit 0"},
				{"sh", "-c", "trap '' TERM; sleep 602; sleep 603"},
			} {
				var p *Process
				if p, err = n.Start(n.Command(context.Background(), argv...)); err != nil {
					break
				}
				if argv[0] == "sh" && strings.Contains(argv[2], "exit") {
					p.Wait()
				}
			}
		}
		if err == nil {
			_, err = n.StartServer(ServerOptions{Listen: []netip.AddrPort{netip.MustParseAddrPort("[::]:80")}})
		}
	}
	fmt.Println("ready", err)
	select {}
}

func TestSweepAfterKill(t *testing.T) {
	prefix := prefixOf(t, "orphan")
	orphan := exec.Command(os.Args[0])
	orphan.Env = append(os.Environ(), orphanVariable+"="+prefix)
	output, err := orphan.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 1000)
	length, _ := output.Read(line)
	if got := string(line[:length]); got != "ready <nil>\n" {
		t.Fatalf("the run to be killed says %q", got)
	}
	stranger := exec.Command("sleep", "604")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stranger.Process.Kill()
		stranger.Wait()
	}()
	// A record whose pid has passed to a stranger.
	stale := filepath.Join(recordsRoot, prefix, "processes", fmt.Sprint(stranger.Process.Pid))
	if err := os.WriteFile(stale, []byte("1 stranger\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := orphan.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	orphan.Wait()

	var sleeps []string
	for _, seconds := range []string{"600", "601", "602"} {
		sleeps = append(sleeps, sleeping(seconds)...)
	}
	if len(sleeps) != 3 {
		t.Fatalf("the killed run left %d of 3 sleepers", len(sleeps))
	}
	l := mustNew(t, prefix)
	for _, seconds := range []string{"600", "601", "602", "603"} {
		if left := sleeping(seconds); len(left) > 0 {
			t.Errorf("sleep %s survived the sweep: pids %v", seconds, left)
		}
	}
	if names, _ := namespacesOf(prefix); len(names) > 0 {
		t.Errorf("namespaces survived the sweep: %v", names)
	}
	if start, err := startTime(stranger.Process.Pid); err != nil || !alive(stranger.Process.Pid, start) {
		t.Error("the sweep ended a process that was not ours")
	}
	mustNode(t, l, "left")
}

// sleeping lists the living processes that sleep for so many seconds.
func sleeping(seconds string) (found []string) {
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range commands {
		if text, _ := os.ReadFile(path); string(text) == "sleep\x00"+seconds+"\x00" {
			found = append(found, filepath.Base(filepath.Dir(path)))
		}
	}
	return found
}

func TestProcess(t *testing.T) {
	l := mustNew(t, prefixOf(t, "proc"))
	n := mustNode(t, l, "here")
	p, err := n.Start(n.Command(context.Background(), "sh", "-c", "echo out; echo err >&2; exec sleep 605"))
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the log", func() bool {
		text, _ := os.ReadFile(p.Log())
		return cmp.Equal(string(text), "out\nerr\n")
	})
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if !errors.As(p.Wait(), &exit) || exit.Sys().(interface{ Signal() unix.Signal }).Signal() != unix.SIGTERM {
		t.Errorf("ended with %v, want SIGTERM", p.Wait())
	}
	if records, err := readRecords(l.path("processes")); err != nil || len(records) > 0 {
		t.Errorf("records after the end: %v, %v", records, err)
	}
	if _, err := n.Start(n.Command(context.Background(), "/no/such/program")); err != nil {
		t.Fatal(err) // nsenter starts, and says it in the log
	}
}

func TestXDPTransmitReachesSegment(t *testing.T) {
	l := mustNew(t, prefixOf(t, "xdp"))
	s, err := l.Segment("wire", 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b := mustNode(t, l, "a"), mustNode(t, l, "a-long-name-of-a-node")
	for i, n := range []*Node{a, b} {
		address := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i)}), 24)
		if err := n.Join(s, Link{Name: "eth0", Addresses: []netip.Prefix{address}}); err != nil {
			t.Fatal(err)
		}
	}
	var mac net.HardwareAddr
	err = b.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac = link.Attrs().HardwareAddr
		return attachReflect(link)
	})
	if err != nil {
		t.Fatal(err)
	}
	err = a.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		const experimental = 0x88b5 // local experimental EtherType, IEEE 802
		protocol := uint16(experimental>>8 | experimental&0xff<<8)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(protocol))
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		timeout := unix.Timeval{Sec: 2}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			return err
		}
		address := &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: link.Attrs().Index}
		if err := unix.Bind(fd, address); err != nil {
			return err
		}
		own := link.Attrs().HardwareAddr
		frame := append(append(append([]byte{}, mac...), own...), experimental>>8, experimental&0xff)
		frame = append(frame, bytes.Repeat([]byte("rope"), 20)...)
		want := append(append(append([]byte{}, own...), mac...), frame[12:]...)
		// Several, for one may come with other traffic's wake-up.
		for i := range 10 {
			if err := unix.Sendto(fd, frame, 0, address); err != nil {
				return err
			}
			answer := make([]byte, 2000)
			n, err := unix.Read(fd, answer)
			if err != nil {
				return fmt.Errorf("wait for frame %d that XDP sent back: %w", i, err)
			}
			if diff := cmp.Diff(want, answer[:n]); diff != "" {
				t.Errorf("the frame that came back (-want +got):\n%s", diff)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// attachReflect attaches a program that sends every frame back to its sender, natively.
func attachReflect(link netlink.Link) error {
	swap := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // data
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word), // data_end
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 14),
		asm.Mov.Imm(asm.R0, 1 /* XDP_DROP */),
		asm.JGT.Reg(asm.R4, asm.R3, "out"),
	}
	for offset := int16(0); offset < 6; offset += 2 {
		swap = append(swap,
			asm.LoadMem(asm.R4, asm.R2, offset, asm.Half),
			asm.LoadMem(asm.R5, asm.R2, offset+6, asm.Half),
			asm.StoreMem(asm.R2, offset, asm.R5, asm.Half),
			asm.StoreMem(asm.R2, offset+6, asm.R4, asm.Half))
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.XDP,
		Instructions: append(swap, asm.Mov.Imm(asm.R0, 3 /* XDP_TX */), asm.Return().WithSymbol("out")),
		License:      "Apache-2.0",
	})
	if err != nil {
		return err
	}
	defer program.Close()
	return netlink.LinkSetXdpFdWithFlags(link, program.FD(), unix.XDP_FLAGS_DRV_MODE)
}

func TestCable(t *testing.T) {
	l := mustNew(t, prefixOf(t, "cable"))
	a, b := mustNode(t, l, "a"), mustNode(t, l, "b")
	link := func(host string) Link {
		return Link{Name: "eth0", MTU: 9000, Queues: 2, Pass: true, Addresses: []netip.Prefix{
			netip.MustParsePrefix("10.0.0." + host + "/24"), netip.MustParsePrefix("fd00::" + host + "/64"),
		}}
	}
	if err := l.Cable(a, link("1"), b, link("2")); err != nil {
		t.Fatal(err)
	}
	// A datagram that would need fragments on a smaller wire, sent with fragments forbidden.
	for _, address := range []string{"10.0.0.2", "fd00::2"} {
		var listener net.PacketConn
		err := b.Do(func() (err error) {
			listener, err = net.ListenPacket("udp", net.JoinHostPort(address, "9"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		err = a.Do(func() error {
			sender, err := net.Dial("udp", net.JoinHostPort(address, "9"))
			if err != nil {
				return err
			}
			defer sender.Close()
			raw, err := sender.(*net.UDPConn).SyscallConn()
			if err != nil {
				return err
			}
			var forbidden error
			raw.Control(func(fd uintptr) {
				if netip.MustParseAddr(address).Is4() {
					forbidden = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
				} else {
					forbidden = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
				}
			})
			if forbidden != nil {
				return forbidden
			}
			_, err = sender.Write(make([]byte, 8900))
			return err
		})
		if err != nil {
			t.Fatalf("send 8900 bytes to %s: %v", address, err)
		}
		listener.SetReadDeadline(time.Now().Add(2 * time.Second))
		if n, _, err := listener.ReadFrom(make([]byte, 9000)); err != nil || n != 8900 {
			t.Errorf("%s got %d bytes of 8900: %v", address, n, err)
		}
	}
	got, err := b.Addresses("eth0")
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	if err := l.Cable(a, link("1"), b, link("2")); err == nil {
		t.Error("an interface name is taken twice")
	}
}
