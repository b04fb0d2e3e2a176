package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketBuffer holds a burst of all flows' datagrams, in bytes.
const socketBuffer = 16 << 20

// FlowServer is a process in a node's namespace that answers the datagrams of UDP flows. It numbers its flows: a client's
// address and port that it has not seen, or that begin another flow, have a new number. It answers from the address that
// was asked.
type FlowServer struct {
	*peer
	name string
}

// FlowServerStats are a server's counts since its start.
type FlowServerStats struct {
	Flows    uint64 `json:"flows"`    // numbered
	Answered uint64 `json:"answered"` // datagrams
	Wrong    uint64 `json:"wrong"`    // datagrams that were not what a client sends
	Reason   string `json:"reason"`   // of the first of these
}

// StartFlowServer starts a server of UDP flows in the node, and returns once it listens.
func (n *Node) StartFlowServer(options ServerOptions) (*FlowServer, error) {
	if options.Name == "" {
		options.Name = n.name
	}
	if len(options.Name) > minDatagram-datagramHead || len(options.Listen) == 0 {
		return nil, fmt.Errorf("start flow server %q on %v: want a name of %d bytes at most, and an address at least",
			options.Name, options.Listen, minDatagram-datagramHead)
	}
	p, err := n.startPeer("flow-server", n.name+"-flow-server")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), startPeriod)
	defer cancel()
	if err := p.call(ctx, "listen", options, nil); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	return &FlowServer{peer: p, name: options.Name}, nil
}

// Name is the name in the server's answers.
func (s *FlowServer) Name() string { return s.name }

// Stats asks for the server's counts.
func (s *FlowServer) Stats(ctx context.Context) (stats FlowServerStats, err error) {
	return stats, s.call(ctx, "stats", nil, &stats)
}

// Close ends the server. Nobody is told: there is no such thing in UDP.
func (s *FlowServer) Close(ctx context.Context) error { return s.exit(ctx) }

// flowServerRole is the server within its own process.
type flowServerRole struct {
	name string

	mu    sync.Mutex
	flows map[netip.AddrPort]numberedFlow
	stats FlowServerStats
}

type numberedFlow struct{ flow, number uint64 }

func newFlowServerRole() role { return &flowServerRole{flows: map[netip.AddrPort]numberedFlow{}} }

func (s *flowServerRole) do(ctx context.Context, command string, body json.RawMessage) (any, error) {
	switch command {
	case "listen":
		options, err := decode[ServerOptions](body)
		if err != nil {
			return nil, err
		}
		s.name = options.Name
		for _, address := range options.Listen {
			if err := s.listen(ctx, address); err != nil {
				return nil, err
			}
		}
		return nil, nil
	case "stats":
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.stats, nil
	}
	return nil, fmt.Errorf("no such command")
}

func (s *flowServerRole) listen(ctx context.Context, address netip.AddrPort) error {
	config := net.ListenConfig{Control: func(network, _ string, raw syscall.RawConn) (err error) {
		raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)
			if err == nil && strings.HasSuffix(network, "6") {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
			} else if err == nil {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
			}
		})
		return err
	}}
	conn, err := config.ListenPacket(ctx, "udp", address.String())
	if err != nil {
		return err
	}
	go s.serve(conn.(*net.UDPConn))
	return nil
}

func (s *flowServerRole) serve(conn *net.UDPConn) {
	question, control := make([]byte, 1<<16), make([]byte, 256)
	for {
		length, controlLength, _, from, err := conn.ReadMsgUDPAddrPort(question, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about an earlier answer
		}
		if answer := s.answer(question[:length], from); answer != nil {
			// Where it can't be sent, it is lost: the client will see it.
			conn.WriteMsgUDPAddrPort(answer, fromAskedAddress(control[:controlLength]), from)
		}
	}
}

// answer counts a datagram, and makes its answer.
func (s *flowServerRole) answer(question []byte, from netip.AddrPort) []byte {
	d, err := decodeDatagram(question)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && d.kind != kindQuestion {
		err = fmt.Errorf("a datagram of kind %d", d.kind)
	}
	if err != nil {
		if s.stats.Wrong++; s.stats.Wrong == 1 {
			s.stats.Reason = fmt.Sprintf("from %v: %v", from, err)
		}
		return nil
	}
	known, ok := s.flows[from]
	if !ok || known.flow != d.flow {
		s.stats.Flows++
		known = numberedFlow{d.flow, s.stats.Flows}
		s.flows[from] = known
	}
	s.stats.Answered++
	answer := datagram{kind: kindAnswer, flow: d.flow, sequence: d.sequence, server: s.name, number: known.number}
	return answer.encode(d.answer)
}

// fromAskedAddress turns what the kernel told of a datagram's way in into an order for the way out: the same address.
func fromAskedAddress(control []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			// Behind the interface's index stand the local address and the one in the packet.
			return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(m.Data[8:12])})
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])})
		}
	}
	return nil
}
