package kernels

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

var virtioSuites chosenSuites

func init() {
	flag.Var(&virtioSuites, "kernels.virtio", "forward on virtio-net cards in virtual machines: all suites, or these `suites`")
}

// virtioModules are what a machine with cards takes beside veth, and the devices that lie above them. Which of them a
// kernel has built in differs.
var virtioModules = []string{"virtio_net", "virtio_pci", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_ring", "virtio",
	"net_failover", "failover", "dimlib", "dim", "bonding", "tls", "8021q", "garp", "mrp", "stp", "llc", "bridge", "macvlan",
	"sch_ingress", "cls_bpf"}

// neededModules are those that a machine with cards can't do without.
var neededModules = append([]string{"virtio_net", "bonding", "8021q", "sch_ingress", "cls_bpf"}, modules...)

// What a machine of this test looks like. Its cards are virtio-net with a tap behind each, front and back in namespaces of
// their own; aside belongs to a host that insists on joining packets. Between back and the backends is what does as a wire:
// checksums are complete where packets leave by it.
//
//	clients ─ tap0 ─ front │ machine │ back ─ tap1 ─ bridge ─ wire ─ backends
//
// One service's backend is on the clients' side: what goes there leaves by the card it came by.
const (
	frontMAC, backMAC, asideMAC = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03"
	frontQueues                 = 4

	servicePort, backendPort = 8080, 9000
	controlPort              = 80
)

var (
	frontNet      = netip.MustParsePrefix("10.1.0.1/24") // the machine's address, and its network
	backNet       = netip.MustParsePrefix("10.2.0.1/24")
	clientAddress = netip.MustParsePrefix("10.1.0.2/24")
	nearBackend   = netip.MustParsePrefix("10.1.0.11/24")
	farBackends   = []netip.Prefix{netip.MustParsePrefix("10.2.0.11/24"), netip.MustParsePrefix("10.2.0.12/24")}
	farService    = netip.MustParseAddr("192.0.2.10")
	nearService   = netip.MustParseAddr("192.0.2.11")
)

// TestVirtio boots other kernels with virtio-net cards of several queues: whether what the loader says of them is so, and
// whether the daemon, attached natively, forwards real connections from card to card and back out of one.
func TestVirtio(t *testing.T) {
	if len(virtioSuites) == 0 {
		t.Log("not asked for: -kernels.virtio forwards on virtio-net cards, see README.md")
		return
	}
	var err error
	*cache, err = filepath.Abs(*cache)
	must(t, err)
	must(t, os.MkdirAll(*cache, 0o755))
	unlock := mustLock(t, *cache)
	defer unlock()
	bin := t.TempDir()
	mustBuild(t, bin, "test/kernels")
	mustBuild(t, bin, "loader")
	steps := []step{
		{"devices", []string{"/loader.test", "-test.v=test2json",
			"-test.run=^(TestEthtool|TestPeer|TestTargets|TestTagsOfPeer|TestVethQueues|TestUpperDevices|TestBond|TestGenericGRO|TestHoldBond)$"}},
		{"virtio", []string{initPath, "-test.v=test2json", "-test.run=^TestVirtioGuest$", "-kernels.guest"}},
	}
	for _, s := range virtioSuites {
		t.Run(s.name, func(t *testing.T) {
			files, err := s.fetch(t.Context(), *cache, neededModules)
			if err != nil {
				t.Fatalf("get the kernel of %s: %v", s.name, err)
			}
			archive := filepath.Join(t.TempDir(), "initramfs")
			must(t, packVirtio(archive, bin, filepath.Join(*cache, s.name), steps))
			clients, between, backends := newNamespace(t), newNamespace(t), newNamespace(t)
			m := machine{kernel: files.image, initramfs: archive, folder: filepath.Join(*cache, s.name)}
			m.plug(t, clients, frontMAC, frontQueues, "")
			m.plug(t, between, backMAC, 1, "")
			m.plug(t, clients, asideMAC, 1, "ctrl_guest_offloads=off")
			clients.must(t, configure("tap0", clientAddress, nearBackend), route(farService), route(nearService))
			between.must(t, func() error { return joinTo("tap1", backends) })
			backends.must(t, configure("wire", farBackends...))

			ctx, cancel := context.WithTimeout(t.Context(), *timeout)
			defer cancel()
			began := time.Now()
			booted := make(chan error, 1)
			go func() { booted <- m.boot(ctx) }()
			driven := drive(ctx, t, clients, backends, booted)
			bootErr := <-booted
			for _, file := range m.files {
				file.Close()
			}
			if driven != nil {
				t.Error(driven)
			}
			report(t, m, bootErr, steps)
			checkKinds(t, m)
			t.Logf("%s in all", time.Since(began).Round(time.Second))
		})
	}
}

// checkKinds makes sure that the loader's tests had the devices there that many kernels lack.
func checkKinds(t *testing.T, m machine) {
	t.Helper()
	if output := m.testsOutput(); strings.Contains(output, "this kernel has no") {
		t.Error("the machine's kernel lacks devices that the loader's tests were to try: see " + m.testsPath())
	}
}

// drive is what clients and backends do with the machine, until it has been told to end.
func drive(ctx context.Context, t *testing.T, clients, backends *namespace, booted chan error) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	gone := make(chan struct{})
	defer close(gone)
	go func() { // there is nobody to wait for once the machine has ended
		select {
		case err := <-booted:
			booted <- err
			cancel()
		case <-gone:
		}
	}()
	seen := make(chan netip.AddrPort, 1000)
	must(t, backends.serve(t, seen, addresses(farBackends)...))
	must(t, clients.serve(t, seen, nearBackend.Addr()))
	guest := control{&http.Client{Transport: &http.Transport{DialContext: clients.dial, DisableKeepAlives: true}}}
	defer func() { err = errors.Join(err, guest.call(ctx, "/end", nil)) }()

	var before, after guestState
	if err := guest.call(ctx, "/attach?xdp=native", &before); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	t.Logf("attached: %v", before.Attached)
	for _, s := range []struct {
		address  netip.Addr
		backends []netip.Prefix
		machine  netip.Addr // as the backends see it
	}{{farService, farBackends, backNet.Addr()}, {nearService, []netip.Prefix{nearBackend}, frontNet.Addr()}} {
		began := time.Now()
		if err := clients.exchange(ctx, netip.AddrPortFrom(s.address, servicePort), seen, s.backends, s.machine); err != nil {
			return fmt.Errorf("connections to %s: %w", s.address, err)
		}
		t.Logf("%d connections to %s, %d MiB each way: %s", connections, s.address, connections*transfer>>20,
			time.Since(began).Round(time.Millisecond))
	}
	if err := guest.call(ctx, "/state", &after); err != nil {
		return err
	}
	for _, card := range []string{"front", "back"} {
		t.Logf("%s: %v, drops %v", card, moved(before, after, card), after.Drops[card])
	}
	if err := check(before, after); err != nil {
		return err
	}

	// Generic XDP is warned of there: a host computes no checksums of packets that begin with itself.
	if err := guest.call(ctx, "/attach?xdp=generic", nil); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	for _, complete := range []bool{false, true} {
		if err := clients.do(func() error { return turn("tap0", "tx-checksum-ip-generic", !complete) }); err != nil {
			return err
		}
		conn, err := clients.dial(ctx, "tcp", netip.AddrPortFrom(farService, servicePort).String())
		if (err == nil) != complete {
			return fmt.Errorf("connect through generic XDP with checksums complete %t: %v", complete, err)
		}
		if err == nil {
			conn.Close()
		}
	}
	return nil
}

// check says whether the cards have forwarded natively.
func check(before, after guestState) error {
	var errs []error
	want := func(card, what string) {
		for name, n := range moved(before, after, card) {
			if strings.Contains(name, what) && n > 0 {
				return
			}
		}
		errs = append(errs, fmt.Errorf("%s counted no %s", card, what))
	}
	want("front", "xdp_redirect")
	want("front", "xdp_tx")
	want("back", "xdp_redirect")
	for card, mode := range after.Attached {
		if mode != "native" {
			errs = append(errs, fmt.Errorf("%s is attached in mode %s", card, mode))
		}
	}
	return errors.Join(errs...)
}

// moved are a card's counters of XDP that have grown.
func moved(before, after guestState, card string) map[string]uint64 {
	grown := make(map[string]uint64)
	for name, n := range after.Statistics[card] {
		if was := before.Statistics[card][name]; strings.Contains(name, "xdp") && n > was {
			grown[name] = n - was
		}
	}
	return grown
}

// How much goes through a service.
const (
	connections = 24
	transfer    = 256 << 10 // bytes each way, a connection
)

// exchange opens connections to a service, some at a time, and sends each something that the backend sends back. All
// backends get some, and see the machine as their client.
func (n *namespace) exchange(ctx context.Context, service netip.AddrPort, seen <-chan netip.AddrPort, backends []netip.Prefix,
	machine netip.Addr) error {
	var group errgroup.Group
	group.SetLimit(8)
	answered := make(chan netip.Addr, connections)
	for i := range connections {
		group.Go(func() error {
			conn, err := n.dial(ctx, "tcp", service.String())
			if err != nil {
				return err
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
				return err
			}
			backend, err := echoed(conn, uint64(i))
			answered <- backend
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	close(answered)
	count := make(map[netip.Addr]int)
	for backend := range answered {
		count[backend]++
		if client := <-seen; client.Addr() != machine {
			return fmt.Errorf("a backend saw %s as its client, not %s", client, machine)
		}
	}
	for _, backend := range backends {
		if count[backend.Addr()] == 0 {
			return fmt.Errorf("no connection went to %s: %v", backend.Addr(), count)
		}
	}
	return nil
}

// echoed sends a connection's worth of random bytes and reads them back. The backend says first who it is.
func echoed(conn net.Conn, seed uint64) (netip.Addr, error) {
	var name [4]byte
	if _, err := io.ReadFull(conn, name[:]); err != nil {
		return netip.Addr{}, fmt.Errorf("read who answers: %w", err)
	}
	var key [32]byte
	key[0] = byte(seed)
	sent := make([]byte, transfer)
	rand.NewChaCha8(key).Read(sent)
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		failed <- err
	}()
	got := make([]byte, transfer)
	_, err := io.ReadFull(conn, got)
	if err := errors.Join(err, <-failed); err != nil {
		return netip.Addr{}, fmt.Errorf("exchange %d bytes: %w", transfer, err)
	}
	if sha256.Sum256(got) != sha256.Sum256(sent) {
		return netip.Addr{}, fmt.Errorf("other bytes came back than were sent")
	}
	return netip.AddrFrom4(name), nil
}

// serve has backends at these addresses: they say who they are and send back what they get. Whom they see goes to seen.
func (n *namespace) serve(t *testing.T, seen chan<- netip.AddrPort, at ...netip.Addr) error {
	for _, address := range at {
		var listener net.Listener
		if err := n.do(func() (err error) {
			listener, err = net.Listen("tcp", netip.AddrPortFrom(address, backendPort).String())
			return err
		}); err != nil {
			return err
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				seen <- conn.RemoteAddr().(*net.TCPAddr).AddrPort()
				go func() {
					defer conn.Close()
					if _, err := conn.Write(address.AsSlice()); err == nil {
						io.Copy(conn, conn)
					}
				}()
			}
		}()
	}
	return nil
}

func addresses(prefixes []netip.Prefix) (all []netip.Addr) {
	for _, p := range prefixes {
		all = append(all, p.Addr())
	}
	return all
}

// control asks the machine.
type control struct{ *http.Client }

// call waits until the machine answers, and reads its answer. An answer that is an error ends the waiting.
func (c control) call(ctx context.Context, path string, answer any) error {
	for {
		err := c.try(ctx, path, answer)
		var refused refusal
		if err == nil || errors.As(err, &refused) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("ask the machine for %s: %w: %w", path, context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// refusal is an error that the machine answered with.
type refusal string

func (r refusal) Error() string { return "the machine says: " + string(r) }

func (c control) try(ctx context.Context, path string, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	url := "http://" + netip.AddrPortFrom(frontNet.Addr(), controlPort).String() + path
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := c.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return refusal(body)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(body, answer)
}

// namespace is a network namespace of a thread of its own, which it ends with: nothing is left of a run that is killed.
type namespace struct{ work chan func() }

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for do := range n.work {
			do()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("make a network namespace (it takes root): %v", err)
	}
	t.Cleanup(func() { close(n.work) })
	return n
}

// do runs a function in the namespace.
func (n *namespace) do(what func() error) error {
	done := make(chan error)
	n.work <- func() { done <- what() }
	return <-done
}

func (n *namespace) must(t *testing.T, steps ...func() error) {
	t.Helper()
	for _, step := range steps {
		must(t, n.do(step))
	}
}

// dial connects from the namespace. Connections are made one after the other: the namespace has one thread.
func (n *namespace) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.do(func() error {
		dialer := net.Dialer{Timeout: 2 * time.Second}
		conn, err = dialer.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// plug gives the machine a virtio-net card with a tap in a namespace behind it: tap0, tap1 and so on.
func (m *machine) plug(t *testing.T, behind *namespace, mac string, queues int, more string) {
	t.Helper()
	number := len(m.devices) / 4
	tap := &netlink.Tuntap{Mode: netlink.TUNTAP_MODE_TAP, Queues: queues, NonPersist: true,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR}
	tap.Name = fmt.Sprint("tap", number)
	if queues > 1 {
		tap.Flags |= netlink.TUNTAP_MULTI_QUEUE
	}
	behind.must(t, func() error { return netlink.LinkAdd(tap) })
	var descriptors []string
	for _, file := range tap.Fds {
		descriptors = append(descriptors, fmt.Sprint(3+len(m.files)))
		m.files = append(m.files, file)
	}
	// Two interrupts a queue pair, and two more.
	card := fmt.Sprintf("virtio-net-pci,netdev=net%d,mac=%s,mq=on,vectors=%d,romfile=", number, mac, 2*queues+2)
	if more != "" {
		card += "," + more
	}
	m.devices = append(m.devices, "-netdev", fmt.Sprintf("tap,id=net%d,fds=%s", number, strings.Join(descriptors, ":")),
		"-device", card)
}

// configure gives an interface its addresses and sets it up.
func configure(name string, addresses ...netip.Prefix) func() error {
	return func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addresses {
			address, err := netlink.ParseAddr(a.String())
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(link, address); err != nil {
				return fmt.Errorf("add %s to %s: %w", a, name, err)
			}
		}
		return netlink.LinkSetUp(link)
	}
}

// joinTo bridges a tap to an interface "wire" of another namespace. What leaves the bridge for there has its checksums.
func joinTo(tap string, there *namespace) error {
	var far int
	if err := there.do(func() (err error) {
		far, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	}); err != nil {
		return err
	}
	defer unix.Close(far)
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "bridge"}}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port"}, PeerName: "wire", PeerNamespace: netlink.NsFd(far), PeerTxQLen: -1}
	if err := errors.Join(netlink.LinkAdd(bridge), netlink.LinkAdd(veth)); err != nil {
		return err
	}
	for _, name := range []string{tap, "port"} {
		port, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetMaster(port, bridge), netlink.LinkSetUp(port)); err != nil {
			return err
		}
	}
	return errors.Join(turn("port", "tx-checksum-ip-generic", false), netlink.LinkSetUp(bridge))
}

// turn sets an offload of a device.
func turn(device, offload string, on bool) error {
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer tool.Close()
	// The library loses answers now and then.
	for range 10 {
		if err = tool.Change(device, map[string]bool{offload: on}); err != nil {
			continue
		}
		var now map[string]bool
		if now, err = tool.Features(device); err == nil && now[offload] == on {
			return nil
		}
	}
	return fmt.Errorf("set %s of %s to %t: %w", offload, device, on, cmp.Or(err, errors.New("it stays as it was")))
}

// route sends what is for an address to the machine.
func route(address netip.Addr) func() error {
	return func() error {
		return netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(32, 32)},
			Gw: frontNet.Addr().AsSlice()})
	}
}

// packVirtio makes the initramfs: this package's tests as init, the loader's, steps, and modules in the order in which they
// need each other.
func packVirtio(archive, bin, folder string, steps []step) error {
	var a initramfs
	if err := errors.Join(a.copyFile(initPath, filepath.Join(bin, "kernels.test")),
		a.copyFile("/loader.test", filepath.Join(bin, "loader.test"))); err != nil {
		return err
	}
	text, err := json.Marshal(steps)
	if err != nil {
		return err
	}
	a.file(stepsPath, text)
	a.directory(modulesDir)
	order, err := moduleOrder(folder, append(slices.Clone(neededModules), virtioModules...))
	if err != nil {
		return err
	}
	for i, name := range order {
		if err := a.copyFile(fmt.Sprintf("%s/%02d-%s.ko", modulesDir, i, name), filepath.Join(folder, name+".ko")); err != nil {
			return err
		}
	}
	return a.write(archive)
}

// moduleOrder sorts those modules that are in folder so that each comes after those it depends on. Of these none may be
// missing; of the wanted ones those are that the kernel has built in.
func moduleOrder(folder string, wanted []string) (order []string, err error) {
	var add func(name, of string) error
	add = func(name, of string) error {
		if slices.Contains(order, name) {
			return nil
		}
		depends, err := dependsOn(filepath.Join(folder, name+".ko"))
		if errors.Is(err, os.ErrNotExist) && of == "" {
			return nil
		} else if err != nil {
			return fmt.Errorf("module %s, which %s depends on: %w", name, cmp.Or(of, "the test"), err)
		}
		for _, other := range depends {
			if err := add(other, name); err != nil {
				return err
			}
		}
		order = append(order, name)
		return nil
	}
	for _, name := range wanted {
		if err := add(name, ""); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// dependsOn reads which modules a module says it depends on.
func dependsOn(path string) ([]string, error) {
	file, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	section := file.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s has no .modinfo", path)
	}
	content, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range bytes.SplitSeq(content, []byte{0}) {
		if list, ok := strings.CutPrefix(string(entry), "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
