package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/sys/unix"
)

// HealthPath is the path on which a server answers health checks: to a WebSocket as to any, but uncounted; to a plain
// GET with 200.
const HealthPath = "/healthz"

// readLimit is the longest message in bytes.
const readLimit = 1 << 20

// ServerOptions describe a server of WebSockets or of flows.
type ServerOptions struct {
	Name   string           // in greetings and echoes, without spaces; default: the node's
	Listen []netip.AddrPort // one at least; [::]:PORT takes both families, and addresses held on lo

	// ReusePort lets several servers of a node listen on the same address and port. The kernel spreads connections over
	// them: more than one process has descriptors for.
	ReusePort bool
}

// Server is a process in a node's namespace that echoes WebSocket messages. It greets each connection with
//
//	hello NAME ID PEER
//
// where ID counts its connections and PEER is the client's address and port as the server sees them, and answers every
// message with NAME ID MESSAGE, so that a client can tell a connection that was moved. It sends no TCP keep-alives:
// what is silent is silent.
type Server struct {
	*peer
	name string
}

// ServerStats are a server's counts since its start, health checks left out.
type ServerStats struct {
	Live     int64 `json:"live"`     // connections open now
	Accepted int64 `json:"accepted"` // connections greeted
	Echoed   int64 `json:"echoed"`   // messages
}

// StartServer starts a WebSocket server in the node, and returns once it listens.
func (n *Node) StartServer(options ServerOptions) (*Server, error) {
	if options.Name == "" {
		options.Name = n.name
	}
	if strings.ContainsAny(options.Name, " \n") || len(options.Listen) == 0 {
		return nil, fmt.Errorf("start server %q on %v: want a name without spaces, and an address at least",
			options.Name, options.Listen)
	}
	p, err := n.startPeer("server", n.name+"-server")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), startPeriod)
	defer cancel()
	if err := p.call(ctx, "listen", options, nil); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	return &Server{peer: p, name: options.Name}, nil
}

// Name is the name in the server's greetings.
func (s *Server) Name() string { return s.name }

// Stats asks for the server's counts.
func (s *Server) Stats(ctx context.Context) (stats ServerStats, err error) {
	return stats, s.call(ctx, "stats", nil, &stats)
}

// Close closes the listeners, then all connections by the WebSocket close handshake (1001, going away), and ends the
// process. Kill ends it as a crash does.
func (s *Server) Close(ctx context.Context) error {
	if err := s.call(ctx, "close", nil, nil); err != nil {
		return errors.Join(err, s.Kill())
	}
	return s.exit(ctx)
}

// serverRole is the server within its own process.
type serverRole struct {
	name                      string
	next, live, total, echoed atomic.Int64

	mu          sync.Mutex
	closing     bool
	listeners   []net.Listener
	connections map[*websocket.Conn]struct{}
}

func newServerRole() role {
	return &serverRole{connections: map[*websocket.Conn]struct{}{}}
}

func (s *serverRole) do(ctx context.Context, command string, body json.RawMessage) (any, error) {
	switch command {
	case "listen":
		options, err := decode[ServerOptions](body)
		if err != nil {
			return nil, err
		}
		return nil, s.listen(ctx, options)
	case "stats":
		return ServerStats{Live: s.live.Load(), Accepted: s.total.Load(), Echoed: s.echoed.Load()}, nil
	case "close":
		return nil, s.close()
	}
	return nil, fmt.Errorf("no such command")
}

func (s *serverRole) listen(ctx context.Context, options ServerOptions) error {
	s.name = options.Name
	server := &http.Server{Handler: s, ReadHeaderTimeout: 30 * time.Second}
	config := net.ListenConfig{
		KeepAliveConfig: net.KeepAliveConfig{Enable: false}, KeepAlive: -1,
		Control: func(_, _ string, raw syscall.RawConn) (err error) {
			if options.ReusePort {
				raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
			}
			return err
		},
	}
	for _, address := range options.Listen {
		listener, err := config.Listen(ctx, "tcp", address.String())
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.listeners = append(s.listeners, listener)
		s.mu.Unlock()
		go server.Serve(listener)
	}
	return nil
}

// ServeHTTP serves one connection until its end.
func (s *serverRole) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") == "" {
		fmt.Fprintf(w, "%s is well\n", s.name)
		return
	}
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return // Accept has answered
	}
	defer ws.CloseNow()
	ws.SetReadLimit(readLimit)
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		ws.Close(websocket.StatusGoingAway, "")
		return
	}
	s.connections[ws] = struct{}{}
	s.mu.Unlock()
	counted := r.URL.Path != HealthPath
	if counted {
		s.live.Add(1)
		s.total.Add(1)
	}
	defer func() {
		s.mu.Lock()
		delete(s.connections, ws)
		s.mu.Unlock()
		if counted {
			s.live.Add(-1)
		}
	}()

	prefix := s.name + " " + strconv.FormatInt(s.next.Add(1), 10) + " "
	ctx := context.Background()
	if ws.Write(ctx, websocket.MessageText, []byte("hello "+prefix+r.RemoteAddr)) != nil {
		return
	}
	for {
		kind, message, err := ws.Read(ctx)
		if err != nil || ws.Write(ctx, kind, append([]byte(prefix), message...)) != nil {
			return
		}
		if counted {
			s.echoed.Add(1)
		}
	}
}

func (s *serverRole) close() error {
	s.mu.Lock()
	s.closing = true
	for _, listener := range s.listeners {
		listener.Close()
	}
	var closing sync.WaitGroup
	for ws := range s.connections {
		closing.Go(func() { ws.Close(websocket.StatusGoingAway, "") })
	}
	s.mu.Unlock()
	closing.Wait()
	return nil
}
