package through

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Dialer answers a function that opens TCP connections to a service's address and port through its method, to the one
// backend that lookup tells each time. What the network says is told as package net does: a refused connection matches
// syscall.ECONNREFUSED, one that nobody answers is a timeout when ctx ends; where all ports are taken until then, the
// error matches syscall.EADDRNOTAVAIL. Other errors say what is missing.
func (s *Stack) Dialer(lookup func() (Destination, error)) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		d, err := lookup()
		if err != nil {
			return nil, err
		}
		if !strings.HasPrefix(network, "tcp") {
			return nil, net.UnknownNetworkError(network)
		}
		d.Service = netip.AddrPortFrom(d.Service.Addr().WithZone(""), d.Service.Port())
		to, err := netip.ParseAddrPort(address)
		if err != nil || netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port()) != d.Service {
			return nil, fmt.Errorf("%s: a check through %v goes to %v alone", address, d.Method, d.Service)
		}
		return s.dial(ctx, &d)
	}
}

// errTimeout is what package net calls it when a context's deadline ends a dial.
type errTimeout struct{}

func (errTimeout) Error() string   { return "i/o timeout" }
func (errTimeout) Timeout() bool   { return true }
func (errTimeout) Temporary() bool { return true }
func (errTimeout) Is(target error) bool {
	return target == context.DeadlineExceeded || target == os.ErrDeadlineExceeded
}

func ended(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return errTimeout{}
	}
	return ctx.Err()
}

// connection is an endpoint of the stack's, and the port that it has.
type connection struct {
	s        *Stack
	endpoint tcpip.Endpoint
	queue    waiter.Queue
	flow     *flow
	port     uint16
	over     atomic.Bool // the port was given back

	mu    sync.Mutex
	guard *time.Timer // ends a connection that its user has closed
}

// dial opens a connection. It waits where all ports have one.
func (s *Stack) dial(ctx context.Context, d *Destination) (net.Conn, error) {
	select {
	case <-s.closed:
		return nil, net.ErrClosed
	default:
	}
	if ctx.Err() != nil {
		return nil, ended(ctx)
	}
	source, err := s.source(d)
	if err != nil {
		return nil, err
	}
	if err := s.tell(source); err != nil {
		return nil, err
	}
	var port uint16
	select {
	case <-s.closed:
		return nil, net.ErrClosed
	case port = <-s.free:
	case <-ctx.Done():
		if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("all %d ports of checks are taken: %w", len(s.ports), syscall.EADDRNOTAVAIL)
	}
	from := netip.AddrPortFrom(source, port)
	f, err := newFlow(d, from)
	if err != nil {
		s.free <- port
		return nil, err
	}
	s.link.flows[port].Store(f)
	k := &connection{s: s, flow: f, port: port}
	if err := k.open(ctx, from, d); err != nil {
		return nil, &net.OpError{
			Op: "dial", Net: "tcp", Source: net.TCPAddrFromAddrPort(from), Addr: net.TCPAddrFromAddrPort(d.Service), Err: err,
		}
	}
	return &conn{gonet.NewTCPConn(&k.queue, k.endpoint), k}, nil
}

func (k *connection) open(ctx context.Context, from netip.AddrPort, d *Destination) error {
	protocol, ip := ipv6.ProtocolNumber, header.IPv6MinimumSize
	if from.Addr().Is4() {
		protocol, ip = ipv4.ProtocolNumber, header.IPv4MinimumSize
	}
	endpoint, failure := k.s.stack.NewEndpoint(tcp.ProtocolNumber, protocol, &k.queue)
	if failure != nil {
		k.end()
		return errnoOf(failure)
	}
	k.endpoint = endpoint
	news := waiter.NewFunctionEntry(waiter.EventHUp, func(waiter.EventMask) { k.look() })
	k.queue.EventRegister(&news)
	ready, notified := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	k.queue.EventRegister(&ready)
	defer k.queue.EventUnregister(&ready)
	if mtu := int(d.Hop.MTU); mtu != 0 {
		segment := min(packetMax, mtu-k.flow.overhead()) - ip - header.TCPMinimumSize
		failure = endpoint.SetSockOptInt(tcpip.MaxSegOption, max(segment, header.TCPMinimumMSS))
	}
	if failure == nil {
		failure = endpoint.Bind(tcpip.FullAddress{NIC: nic, Addr: address(from.Addr()), Port: from.Port()})
	}
	if failure == nil {
		failure = endpoint.Connect(tcpip.FullAddress{NIC: nic, Addr: address(d.Service.Addr()), Port: d.Service.Port()})
	}
	if _, started := failure.(*tcpip.ErrConnectStarted); !started && failure != nil {
		k.close()
		return errnoOf(failure)
	}
	for {
		select {
		case <-notified:
			if failure := endpoint.LastError(); failure != nil {
				k.close()
				return errnoOf(failure)
			}
			switch tcp.EndpointState(endpoint.State()) {
			case tcp.StateConnecting, tcp.StateSynSent, tcp.StateSynRecv:
				continue
			case tcp.StateError, tcp.StateClose:
				k.close()
				return os.NewSyscallError("connect", syscall.ECONNABORTED)
			}
			return nil
		case err := <-k.flow.failed:
			k.close()
			return err
		case <-k.s.closed:
			k.close()
			return net.ErrClosed
		case <-ctx.Done():
			k.close()
			return ended(ctx)
		}
	}
}

// look gives the port back once the endpoint has ended.
func (k *connection) look() {
	switch tcp.EndpointState(k.endpoint.State()) {
	case tcp.StateError, tcp.StateClose:
		k.end()
	}
}

func (k *connection) end() {
	if k.over.Swap(true) {
		return
	}
	k.mu.Lock()
	if k.guard != nil {
		k.guard.Stop()
	}
	k.mu.Unlock()
	k.s.free <- k.port
}

// close ends the connection: by FIN, and by RST where its backend does not follow.
func (k *connection) close() {
	k.endpoint.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over.Load() || k.guard != nil {
		return
	}
	k.guard = time.AfterFunc(lingerTime, func() {
		k.endpoint.(interface{ Abort() }).Abort()
		k.end()
	})
}

// conn is a connection as package net has them.
type conn struct {
	*gonet.TCPConn
	k *connection
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	return n, c.mend(err)
}

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	return n, c.mend(err)
}

// SetLinger is as that of net.TCPConn, for 0 and below: with 0, Close ends the connection by RST, and nothing is left.
func (c *conn) SetLinger(seconds int) error {
	c.k.endpoint.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: seconds == 0})
	return nil
}

func (c *conn) Close() error {
	c.k.close()
	return nil
}

// mend gives an error of the adapter's the cause that package net would.
func (c *conn) mend(err error) error {
	var op *net.OpError
	if err == nil || err == io.EOF || !errors.As(err, &op) {
		return err
	}
	if op.Timeout() {
		op.Err = os.ErrDeadlineExceeded
		select {
		case op.Err = <-c.k.flow.failed:
		default:
		}
		return op
	}
	if errno, known := errnos[op.Err.Error()]; known {
		op.Err = os.NewSyscallError(op.Op, errno)
	}
	return op
}

// errnos are the kernel's errors for those of the stack's, by their texts: the adapter passes on no more.
var errnos = map[string]syscall.Errno{
	(&tcpip.ErrConnectionRefused{}).String():  syscall.ECONNREFUSED,
	(&tcpip.ErrConnectionReset{}).String():    syscall.ECONNRESET,
	(&tcpip.ErrConnectionAborted{}).String():  syscall.ECONNABORTED,
	(&tcpip.ErrAborted{}).String():            syscall.ECONNABORTED,
	(&tcpip.ErrTimeout{}).String():            syscall.ETIMEDOUT,
	(&tcpip.ErrClosedForSend{}).String():      syscall.EPIPE,
	(&tcpip.ErrHostUnreachable{}).String():    syscall.EHOSTUNREACH,
	(&tcpip.ErrNetworkUnreachable{}).String(): syscall.ENETUNREACH,
	(&tcpip.ErrBadLocalAddress{}).String():    syscall.EADDRNOTAVAIL,
	(&tcpip.ErrPortInUse{}).String():          syscall.EADDRINUSE,
}

func errnoOf(failure tcpip.Error) error {
	if errno, known := errnos[failure.String()]; known {
		return os.NewSyscallError("connect", errno)
	}
	return errors.New(failure.String())
}

func address(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }
