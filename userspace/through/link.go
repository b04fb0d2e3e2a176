package through

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// link is the netstack's one device: a raw socket outwards, the ring of answers inwards.
type link struct {
	s     *Stack
	flows map[uint16]*atomic.Pointer[flow] // by source port; a port's last one stays, for what its connection has yet to say
	room  sync.Pool                        // of *[]byte, for frames

	mu         sync.RWMutex
	socket     int // -1: closed
	dispatcher stack.NetworkDispatcher
}

func newLink(s *Stack) (*link, error) {
	l := &link{s: s, flows: make(map[uint16]*atomic.Pointer[flow], len(s.ports))}
	for _, port := range s.ports {
		l.flows[port] = new(atomic.Pointer[flow])
	}
	l.room.New = func() any { return new([]byte) }
	var err error
	// Of protocol 0: it receives nothing.
	l.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("checks through their method: open a raw socket: %w: they need CAP_NET_RAW", err)
	}
	return l, nil
}

func (l *link) end() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.socket < 0 {
		return nil
	}
	err := unix.Close(l.socket)
	l.socket = -1
	return err
}

// WritePackets sends what the stack has to say. Only TCP leaves, from ports of checks.
func (l *link) WritePackets(packets stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range packets.AsSlice() {
		if pkt.TransportProtocolNumber != header.TCPProtocolNumber {
			continue
		}
		place := l.flows[header.TCP(pkt.TransportHeader().Slice()).SourcePort()]
		if place == nil {
			continue
		}
		// None: an answer to what was left in the ring from before the start.
		if f := place.Load(); f != nil {
			l.send(f, pkt)
		}
	}
	return packets.Len(), nil
}

func (l *link) send(f *flow, pkt *stack.PacketBuffer) {
	packet := pkt.ToView()
	defer packet.Release()
	room := l.room.Get().(*[]byte)
	defer l.room.Put(room)
	*room = f.appendFrame((*room)[:0], packet.AsSlice())
	l.mu.RLock()
	err := error(unix.EBADF)
	if l.socket >= 0 {
		to := f.address // the call writes to it
		err = unix.Sendto(l.socket, *room, unix.MSG_DONTWAIT, &to)
	}
	l.mu.RUnlock()
	if err == nil {
		l.s.counts.sent.Add(1)
		return
	}
	l.s.counts.unsent.Add(1)
	// A queue that is full for the moment loses the packet, as a wire would: it is sent again.
	if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EAGAIN) {
		return
	}
	select {
	case f.failed <- fmt.Errorf("send by interface %d: %w", f.address.Ifindex, err):
	default:
	}
}

func (l *link) deliver(protocol tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	l.mu.RLock()
	d := l.dispatcher
	l.mu.RUnlock()
	if d != nil {
		d.DeliverNetworkPacket(protocol, pkt)
	}
}

// The rest of stack.LinkEndpoint.

func (l *link) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dispatcher = d
}

func (l *link) IsAttached() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.dispatcher != nil
}

func (*link) MTU() uint32                                  { return packetMax }
func (*link) SetMTU(uint32)                                {}
func (*link) MaxHeaderLength() uint16                      { return 0 }
func (*link) LinkAddress() tcpip.LinkAddress               { return "" }
func (*link) SetLinkAddress(tcpip.LinkAddress)             {}
func (*link) Capabilities() stack.LinkEndpointCapabilities { return 0 }
func (*link) Wait()                                        {}
func (*link) ARPHardwareType() header.ARPHardwareType      { return header.ARPHardwareNone }
func (*link) AddHeader(*stack.PacketBuffer)                {}
func (*link) ParseHeader(*stack.PacketBuffer) bool         { return true }
func (*link) Close()                                       {}
func (*link) SetOnCloseAction(func())                      {}
