package packet

import (
	"flag"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"fairlead/bpf"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernel is the one thread that runs programs. It has a network namespace of its own, which ends with it: there the
// packets' devices are. It stays on one CPU unless told otherwise, so that what is kept by CPU is exact.
type kernel struct {
	calls       chan func()
	front, back device // towards the clients, and towards the backends
	cpu         int
}

// device is an end of a veth pair; peer is the wire's other end.
type device struct {
	index int
	peer  int
}

var theKernel *kernel

func startKernel() (*kernel, error) {
	k := &kernel{calls: make(chan func())}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine, the namespace with the thread
		started <- k.prepare()
		for call := range k.calls {
			call()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("make a network namespace with two veth pairs (root is needed): %w", err)
	}
	return k, nil
}

func (k *kernel) prepare() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	var err error
	if k.front, err = newDevice("front"); err != nil {
		return err
	}
	if k.back, err = newDevice("back"); err != nil {
		return err
	}
	return setCPU(0)
}

func newDevice(name string) (device, error) {
	attributes := netlink.NewLinkAttrs()
	attributes.Name = name
	pair := &netlink.Veth{LinkAttrs: attributes, PeerName: name + "-wire"}
	if err := netlink.LinkAdd(pair); err != nil {
		return device{}, fmt.Errorf("add veth %s: %w", name, err)
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return device{}, err
	}
	defer tool.Close()
	var ends [2]int
	for i, end := range []string{name, name + "-wire"} {
		link, err := netlink.LinkByName(end)
		if err != nil {
			return device{}, err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return device{}, fmt.Errorf("set %s up: %w", end, err)
		}
		// With GRO on, veth takes frames that XDP sends it.
		if err := tool.Change(end, map[string]bool{"rx-gro": true}); err != nil {
			return device{}, fmt.Errorf("set GRO of %s on: %w", end, err)
		}
		ends[i] = link.Attrs().Index
	}
	return device{index: ends[0], peer: ends[1]}, nil
}

func setCPU(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind the kernel's thread to CPU %d: %w", cpu, err)
	}
	return nil
}

// do runs call on the kernel's thread, on the given CPU.
func (k *kernel) do(cpu int, call func() error) error {
	done := make(chan error)
	k.calls <- func() {
		if k.cpu != cpu {
			if err := setCPU(cpu); err != nil {
				done <- err
				return
			}
			k.cpu = cpu
		}
		done <- call()
	}
	return <-done
}

// provoked notes every verdict and event that some test met as expected.
var provoked = struct {
	sync.Mutex
	verdicts [bpf.FairleadVerdictVERDICT_COUNT]bool
	events   [bpf.FairleadEventEVENT_COUNT]bool
}{}

// verdictNames and eventNames are the C's own, from the object's type information.
var verdictNames, eventNames = bpf.VerdictNames(), bpf.EventNames()

// notProvoked names the verdicts and events of the C's enums that no test met.
func notProvoked() (missing []string) {
	provoked.Lock()
	defer provoked.Unlock()
	for i, name := range verdictNames {
		if !provoked.verdicts[i] {
			missing = append(missing, "verdict "+name)
		}
	}
	for i, name := range eventNames {
		if !provoked.events[i] {
			missing = append(missing, "event "+name)
		}
	}
	return missing
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if theKernel, err = startKernel(); err != nil {
		fmt.Fprintln(os.Stderr, "packet tests:", err)
		return 1
	}
	defer close(theKernel.calls)
	code := m.Run()
	for _, name := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
		if flag.Lookup(name).Value.String() != "" {
			return code // not all tests ran: nothing is known of the rest
		}
	}
	if missing := notProvoked(); len(missing) > 0 {
		fmt.Fprintln(os.Stderr, "FAIL: no test provoked", strings.Join(missing, ", "))
		return 1
	}
	return code
}

var (
	routerMAC = mac("02:00:00:00:00:fe")
	edgeMAC   = mac("02:00:00:00:00:01") // the edge's device towards the clients
	backMAC   = mac("02:00:00:00:00:02") // and towards the backends
)

func mac(text string) [6]byte {
	address, err := net.ParseMAC(text)
	if err != nil {
		panic(err)
	}
	return [6]byte(address)
}
