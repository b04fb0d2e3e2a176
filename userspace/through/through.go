// Package through has health checks go through a service's method (`via: service`): dsr, ipip or gue. A backend gets
// the frames that a client's connection would bring it, addressed to the service, and so counts as up only if it holds
// the service's address and, with a tunnel, opens the outer packets.
//
// The host's own stack can't do that: the answers come from the service's address to a port that it knows nothing of,
// and it would answer them with RST. So there is a TCP of our own in userspace, gVisor's netstack. What it sends is put
// into frames as the data plane would; what the backends answer, the data plane takes off the wire and leaves in a ring
// (bpf/check.h). As all backends answer from the service's address, the source port tells them apart: each belongs to
// one connection at a time.
package through

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"fairlead/maps"
)

// Destination is a backend, and the way to it through its service's method.
type Destination struct {
	Service netip.AddrPort
	Method  maps.Method // dsr, ipip or gue
	Backend netip.Addr
	Hop     maps.NextHop
	// Source is the host's own address towards the backend. Where it can't be the source of a packet to the service (none,
	// or of the other family), another one of the host's is taken.
	Source netip.Addr
	// TunnelSource is what ipip and gue take outer source addresses from, by the connection's hash.
	TunnelSource netip.Prefix
}

// Options are what a Stack needs.
type Options struct {
	Frames *maps.CheckFrames // closed with the Stack
	Ports  []uint16          // that connections come from; see ChoosePorts
	// Avoid tells addresses that no connection may come from, though the host holds them: services' own.
	Avoid func(netip.Addr) bool
	// Source is told of each address before the first connection comes from it: the data plane is to take what services
	// answer to these, and leave alone what they answer to clients that have the same port.
	Source func(netip.Addr) error
	Logger *slog.Logger // default: slog.Default()
}

const (
	nic = 1
	// packetMax is the longest packet to be sent or asked for, in bytes: IPv6's least (RFC 8200, section 5), with which a
	// frame stays below maps.CheckFrameMax whatever its headers.
	packetMax = header.IPv6MinimumMTU
	// hops is the time to live of what is sent: one hop behind the backend may hold the service's address in its stead (a
	// container on it). A backend that routes without holding the address sends the packet back to an edge: there it has
	// one hop left and is dropped, else some other backend would answer for this one.
	hops = 2
	// bufferSize is how much a connection holds unread, or unsent, in bytes. Half of it is the window (netstack's rule): some
	// packets, so that many large answers at once leave room in the ring for each other.
	bufferSize = 16 << 10
	// timeWait is short: whoever comes late is answered RST.
	timeWait = time.Millisecond
	// lingerTime is how long a closed connection waits for its backend to close, too. Then it ends by RST.
	lingerTime = time.Second
)

// Stack is a TCP of its own for checks. Memory and goroutines are bounded: there are no more connections than ports, and
// a goroutine for each CPU.
type Stack struct {
	log    *slog.Logger
	frames *maps.CheckFrames
	avoid  func(netip.Addr) bool
	stack  *stack.Stack
	link   *link
	routes *netlink.Handle // of the network namespace that New was called in
	ports  []uint16
	tell   func(netip.Addr) error // of a source address
	free   chan uint16            // ports that no connection has, the longest unused first

	closing sync.Once
	closed  chan struct{}
	counts  counts
}

// Counts are what became of packets since the start.
type Counts struct {
	Sent     uint64 // frames
	Unsent   uint64 // that the kernel refused
	Received uint64 // frames that the data plane took for answers to checks
	Strange  uint64 // of them: no whole TCP packet
}

type counts struct{ sent, unsent, received, strange atomic.Uint64 }

// New makes a Stack. It sends by raw sockets of the network namespace it is called in, and needs CAP_NET_RAW.
func New(opts Options) (_ *Stack, err error) {
	if len(opts.Ports) == 0 {
		return nil, errors.New("checks through their method: no port is left for them: narrow net.ipv4.ip_local_port_range")
	}
	s := &Stack{
		log: cmp.Or(opts.Logger, slog.Default()), frames: opts.Frames, avoid: opts.Avoid, ports: opts.Ports,
		free: make(chan uint16, len(opts.Ports)), closed: make(chan struct{}),
	}
	if s.avoid == nil {
		s.avoid = func(netip.Addr) bool { return false }
	}
	s.tell = once(opts.Source)
	for _, port := range opts.Ports {
		s.free <- port
	}
	if s.routes, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("checks through their method: open netlink: %w", err)
	}
	defer func() {
		if err != nil {
			s.routes.Close()
		}
	}()
	if s.link, err = newLink(s); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.link.end()
		}
	}()
	s.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol, ipv6.NewProtocolWithOptions(ipv6.Options{}), // no router discovery, no MLD, no DAD
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	defer func() {
		if err != nil {
			s.stack.Destroy()
		}
	}()
	return s, s.configure()
}

func (s *Stack) configure() error {
	ttl := tcpip.DefaultTTLOption(hops)
	// The stack's own patience ends in silence: ours is shorter.
	wait, linger := tcpip.TCPTimeWaitTimeoutOption(timeWait), tcpip.TCPLingerTimeoutOption(2*lingerTime)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferSize, Default: bufferSize, Max: bufferSize}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: bufferSize, Default: bufferSize, Max: bufferSize}
	moderate := tcpip.TCPModerateReceiveBufferOption(false)
	for _, err := range []tcpip.Error{
		s.stack.CreateNIC(nic, s.link),
		// Connections come from addresses of the host, of which the stack knows nothing.
		s.stack.SetSpoofing(nic, true), s.stack.SetPromiscuousMode(nic, true),
		s.stack.SetNetworkProtocolOption(ipv4.ProtocolNumber, &ttl),
		s.stack.SetNetworkProtocolOption(ipv6.ProtocolNumber, &ttl),
		s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &wait),
		s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &linger),
		s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &receive),
		s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &send),
		s.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &moderate),
	} {
		if err != nil {
			return fmt.Errorf("checks through their method: set up the stack: %s", err)
		}
	}
	s.stack.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nic}, {Destination: header.IPv6EmptySubnet, NIC: nic},
	})
	return nil
}

// Ports are those that connections come from: the data plane is to know them (Manager.SetCheckPorts).
func (s *Stack) Ports() []uint16 { return s.ports }

// Counts are what became of packets so far.
func (s *Stack) Counts() Counts {
	return Counts{
		Sent: s.counts.sent.Load(), Unsent: s.counts.unsent.Load(), Received: s.counts.received.Load(),
		Strange: s.counts.strange.Load(),
	}
}

// Run hands the backends' answers to the stack until ctx ends or the Stack is closed. Without it no connection opens.
func (s *Stack) Run(ctx context.Context) error {
	for {
		frame, err := s.frames.Read(ctx)
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("checks through their method: %w", err)
		}
		s.receive(frame)
	}
}

func (s *Stack) receive(frame maps.CheckFrame) {
	s.counts.received.Add(1)
	packet, ok := decode(frame.Data)
	if !ok {
		s.counts.strange.Add(1)
		s.log.Debug("no whole TCP packet, taken for an answer to a check", "ifindex", frame.Interface, "length", frame.Length)
		return
	}
	protocol := ipv4.ProtocolNumber
	if packet[0]>>4 == 6 {
		protocol = ipv6.ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	s.link.deliver(protocol, pkt)
	pkt.DecRef()
}

// Close ends all connections by RST, and what they need. A Dialer's answer is an error from then on.
func (s *Stack) Close() (err error) {
	s.closing.Do(func() {
		close(s.closed)
		s.stack.Destroy()
		s.stack.RemoveNIC(nic)
		err = errors.Join(s.link.end(), s.frames.Close())
		s.routes.Close()
	})
	return err
}
