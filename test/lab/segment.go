package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// DefaultMTU is that of Ethernet.
	DefaultMTU = 1500

	switchName      = "switch"
	maxInterfaceLen = unix.IFNAMSIZ - 1
)

// Segment is an Ethernet that nodes join: a bridge in the namespace PREFIX-switch.
type Segment struct {
	lab    *Lab
	name   string
	mtu    int
	bridge int // index in the switch's namespace
}

// Link describes a node's end of a cable.
type Link struct {
	Name      string         // of the interface in the node, such as eth0
	Addresses []netip.Prefix // both families
	MTU       int            // bytes; the segment's where there is one, else 1500
	Queues    int            // receive and transmit queues of both ends, so that several CPUs may work; default 1

	// Pass attaches a program to the node's end that passes everything, natively. The other end of a cable needs one
	// where this node's own programs answer by XDP_TX. Ports of segments always have it.
	Pass bool
}

// Segment returns the segment of a name (up to 15 bytes), made on first use with an MTU in bytes (0: 1500).
func (l *Lab) Segment(name string, mtu int) (*Segment, error) {
	if !validName.MatchString(name) || len(name) > maxInterfaceLen {
		return nil, fmt.Errorf("add segment %q: want a lower-case letter, then up to 14 letters, digits, dots and dashes", name)
	}
	if mtu == 0 {
		mtu = DefaultMTU
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if s, ok := l.segments[name]; ok {
		return s, nil
	}
	home, err := l.node(switchName)
	if err != nil {
		return nil, fmt.Errorf("add segment %s: %w", name, err)
	}
	s := &Segment{lab: l, name: name, mtu: mtu}
	err = home.Do(func() error {
		snooping := false
		attributes := netlink.NewLinkAttrs()
		attributes.Name, attributes.MTU = name, mtu
		bridge := &netlink.Bridge{LinkAttrs: attributes, MulticastSnooping: &snooping}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		s.bridge = bridge.Index
		return netlink.LinkSetUp(bridge)
	})
	if err != nil {
		return nil, fmt.Errorf("add segment %s: %w", name, err)
	}
	l.segments[name] = s
	return s, nil
}

// Name is the segment's name, and that of its bridge.
func (s *Segment) Name() string { return s.name }

// Join plugs a node into a segment. The port it is plugged into is an interface of the namespace PREFIX-switch that
// bears an XDP program, without which what the node sends by XDP_TX would be left lying.
func (n *Node) Join(s *Segment, link Link) error {
	link.MTU = s.mtu
	port := n.name + "-" + link.Name
	s.lab.mu.Lock()
	home, err := s.lab.node(switchName)
	s.lab.mu.Unlock()
	if err != nil {
		return fmt.Errorf("join node %s to segment %s: %w", n.name, s.name, err)
	}
	if len(port) > maxInterfaceLen {
		if port, err = home.freeName("port"); err != nil {
			return fmt.Errorf("join node %s to segment %s: %w", n.name, s.name, err)
		}
	}
	err = cable(home, Link{Name: port, MTU: s.mtu, Queues: link.Queues, Pass: true}, n, link)
	if err == nil {
		err = home.Do(func() error {
			l, err := netlink.LinkByName(port)
			if err != nil {
				return err
			}
			return netlink.LinkSetMasterByIndex(l, s.bridge)
		})
	}
	if err != nil {
		return fmt.Errorf("join node %s to segment %s: %w", n.name, s.name, err)
	}
	s.lab.mu.Lock()
	n.ports[link.Name] = switchPort{port, s}
	s.lab.mu.Unlock()
	return nil
}

// switchPort is where an interface is plugged into a segment.
type switchPort struct {
	name    string // of the switch's interface
	segment *Segment
}

// Unplug cuts an interface off its segment, in both directions and in silence, until Plug: each end still has its
// carrier, and nothing that the node's kernel may have to say reaches anyone. So does a machine look that died.
func (n *Node) Unplug(interfaceName string) error {
	err := n.atPort(interfaceName, func(link netlink.Link, _ *Segment) error { return netlink.LinkSetNoMaster(link) })
	return n.wrap("unplug "+interfaceName, err)
}

// Plug puts an interface that was unplugged back into its segment.
func (n *Node) Plug(interfaceName string) error {
	err := n.atPort(interfaceName, func(link netlink.Link, s *Segment) error {
		return netlink.LinkSetMasterByIndex(link, s.bridge)
	})
	return n.wrap("plug "+interfaceName, err)
}

// atPort calls fn in the switch's namespace with the other end of an interface's cable.
func (n *Node) atPort(interfaceName string, fn func(netlink.Link, *Segment) error) error {
	n.lab.mu.Lock()
	port, ok := n.ports[interfaceName]
	home, err := n.lab.node(switchName)
	n.lab.mu.Unlock()
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("it has joined no segment")
	}
	return home.Do(func() error {
		link, err := netlink.LinkByName(port.name)
		if err != nil {
			return err
		}
		return fn(link, port.segment)
	})
}

// Cable connects two nodes directly, at the lower of both links' MTUs.
func (l *Lab) Cable(a *Node, atA Link, b *Node, atB Link) error {
	for _, link := range []*Link{&atA, &atB} {
		if link.MTU == 0 {
			link.MTU = DefaultMTU
		}
	}
	atA.MTU = min(atA.MTU, atB.MTU)
	atA.Queues = max(atA.Queues, atB.Queues)
	if err := cable(a, atA, b, atB); err != nil {
		return fmt.Errorf("connect node %s to node %s: %w", a.name, b.name, err)
	}
	return nil
}

// cable makes a veth pair; the MTU and queues of the first end are both's.
func cable(a *Node, atA Link, b *Node, atB Link) error {
	for _, name := range []string{atA.Name, atB.Name} {
		if name == "" || len(name) > maxInterfaceLen {
			return fmt.Errorf("interface name %q: want 1 to %d bytes", name, maxInterfaceLen)
		}
	}
	far, err := netns.GetFromName(b.namespace)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", b.namespace, err)
	}
	defer far.Close()
	queues := max(atA.Queues, 1)
	err = a.Do(func() error {
		attributes := netlink.NewLinkAttrs()
		attributes.Name, attributes.MTU = atA.Name, atA.MTU
		attributes.NumRxQueues, attributes.NumTxQueues = queues, queues
		veth := &netlink.Veth{LinkAttrs: attributes, PeerName: atB.Name, PeerNamespace: netlink.NsFd(far), PeerTxQLen: -1}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth %s to %s: %w", atA.Name, atB.Name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := errors.Join(a.wrap("plug", a.Do(atA.configure)), b.wrap("plug", b.Do(atB.configure))); err != nil {
		return err
	}
	return errors.Join(a.wrap("plug", a.Do(atA.awaitCarrier)), b.wrap("plug", b.Do(atB.awaitCarrier)))
}

// configure sets the interface up in the calling thread's namespace.
func (k Link) configure() error {
	link, err := netlink.LinkByName(k.Name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", k.Name, err)
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return fmt.Errorf("open ethtool: %w", err)
	}
	defer tool.Close()
	// A packet that leaves through XDP is not finished by the other end's stack, so it must be whole: checksums computed
	// and segments cut before the wire. (GSO stays on: it cuts before the device.) With GRO on a device takes
	// redirected frames even with no program of its own.
	features := map[string]bool{
		"tx-checksum-ip-generic":       false,
		"tx-checksum-sctp":             false,
		"tx-tcp-segmentation":          false,
		"tx-tcp6-segmentation":         false,
		"tx-tcp-ecn-segmentation":      false,
		"tx-tcp-accecn-segmentation":   false,
		"tx-tcp-mangleid-segmentation": false,
		"tx-udp-segmentation":          false,
		"rx-gro":                       true,
	}
	// The library hands the kernel addresses on a stack that may move meanwhile: what was set is read back, and a call whose
	// answer got lost is made again.
	for try := 1; ; try++ {
		err := setFeatures(tool, k.Name, features)
		if err == nil {
			break
		}
		if try == 10 {
			return fmt.Errorf("set offloads of %s: %w", k.Name, err)
		}
	}
	if k.Pass {
		if err := attachPass(link); err != nil {
			return err
		}
	}
	for _, address := range k.Addresses {
		if err := addAddress(link, address); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", k.Name, err)
	}
	return nil
}

// awaitCarrier waits until the interface is operational: a bridge forwards nothing to a port before.
func (k Link) awaitCarrier() error {
	for deadline := time.Now().Add(5 * time.Second); ; {
		link, err := netlink.LinkByName(k.Name)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", k.Name, err)
		}
		if state := link.Attrs().OperState; state == netlink.OperUp {
			return nil
		} else if time.Now().After(deadline) {
			return fmt.Errorf("wait for carrier of %s: still %v after 5 s", k.Name, state)
		}
		time.Sleep(time.Millisecond)
	}
}

// attachPass attaches an XDP program that passes every packet. It stays with the interface, not with this process.
func attachPass(link netlink.Link) error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "lab_pass",
		Type:         ebpf.XDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2 /* XDP_PASS */), asm.Return()},
		License:      "Apache-2.0",
		Flags:        unix.BPF_F_XDP_HAS_FRAGS, // for MTUs past a page
	})
	if err != nil {
		return fmt.Errorf("load the pass program: %w", err)
	}
	defer program.Close()
	if err := netlink.LinkSetXdpFdWithFlags(link, program.FD(), unix.XDP_FLAGS_DRV_MODE); err != nil {
		return fmt.Errorf("attach the pass program to %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// freeName returns the first interface name of a stem and a number that the node does not have.
func (n *Node) freeName(stem string) (name string, err error) {
	err = n.Do(func() error {
		for i := 1; ; i++ {
			name = fmt.Sprint(stem, i)
			_, err := netlink.LinkByName(name)
			if errors.As(err, &netlink.LinkNotFoundError{}) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
	return name, err
}

// setFeatures sets those of a device's features that this kernel knows, and checks that they are set. Every kernel knows
// generic checksums and GRO.
func setFeatures(tool *ethtool.Ethtool, device string, features map[string]bool) error {
	known, err := tool.FeatureNames(device)
	if err != nil {
		return fmt.Errorf("list features: %w", err)
	}
	wanted := make(map[string]bool)
	for name, on := range features {
		if _, ok := known[name]; ok { // segmentation kinds differ from kernel to kernel
			wanted[name] = on
		}
	}
	for _, name := range []string{"tx-checksum-ip-generic", "rx-gro"} {
		if _, ok := wanted[name]; !ok {
			return fmt.Errorf("feature %s is unknown", name)
		}
	}
	if err := tool.Change(device, wanted); err != nil {
		return err
	}
	now, err := tool.Features(device)
	if err != nil {
		return fmt.Errorf("read features: %w", err)
	}
	for name, on := range wanted {
		if got, ok := now[name]; !ok || got != on {
			return fmt.Errorf("feature %s is not %t", name, on)
		}
	}
	return nil
}
