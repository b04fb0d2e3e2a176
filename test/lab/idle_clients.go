package lab

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// IdleClients is a process in a node's namespace that holds many WebSocket connections to servers as Server is one, and
// is silent on them: once a connection is greeted and has echoed one message, nothing is sent on it that the test does
// not ask for, no ping and no TCP keep-alive. It notes when each one's end was heard of, and what was heard.
type IdleClients struct{ *peer }

// IdleConnection is what became of a connection.
type IdleConnection struct {
	Connection
	Greeted time.Time `json:"greeted"`         // by a server
	Ended   time.Time `json:"ended"`           // when its end was heard of; zero while it lives
	End     string    `json:"end,omitempty"`   // EndReset, EndClosed, EndTimedOut, or what else was heard
	Sent    uint64    `json:"sent"`            // messages
	Echoed  uint64    `json:"echoed"`          // of them
	Wrong   string    `json:"wrong,omitempty"` // the first echo that was not its own: another server's or connection's
}

// What may be heard of a connection's end.
const (
	EndReset    = "reset"     // a RST: ECONNRESET
	EndClosed   = "closed"    // a FIN
	EndTimedOut = "timed out" // this kernel gave up sending: ETIMEDOUT
)

// IdleTalk has connections send a message each at a steady pace, whether the ones before were echoed or not.
type IdleTalk struct {
	Every  time.Duration // zero: no more
	Server string        // those that this server greeted alone; default: all
}

// StartIdleClients starts a process for idle connections in the node.
func (n *Node) StartIdleClients() (*IdleClients, error) {
	p, err := n.startPeer("idle-clients", n.name+"-idle-clients")
	if err != nil {
		return nil, err
	}
	c := &IdleClients{peer: p}
	ctx, cancel := context.WithTimeout(context.Background(), startPeriod)
	defer cancel()
	if _, err := c.Connections(ctx); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	return c, nil
}

// Open opens connections and returns once each has echoed its first message or failed; where any failed it returns an
// error that tells how many and one reason, and the others stay.
func (c *IdleClients) Open(ctx context.Context, options OpenOptions) error {
	return c.call(ctx, "open", options, nil)
}

// Echo has every living connection send a message, and returns once each is echoed or its connection has ended. Those
// that are still waiting when ctx ends are an error.
func (c *IdleClients) Echo(ctx context.Context) error { return c.call(ctx, "echo", nil, nil) }

// Talk begins, changes or stops what is sent unasked.
func (c *IdleClients) Talk(ctx context.Context, talk IdleTalk) error {
	return c.call(ctx, "talk", talk, nil)
}

// Connections lists all connections that were ever greeted, living and ended ones, oldest first.
func (c *IdleClients) Connections(ctx context.Context) (connections []IdleConnection, err error) {
	return connections, c.call(ctx, "connections", nil, &connections)
}

// Close ends the process, and with it all connections, without a word of their own.
func (c *IdleClients) Close(ctx context.Context) error { return c.exit(ctx) }

// idleRole is the clients within their own process.
type idleRole struct {
	mu      sync.Mutex
	all     []*idleClient
	opening int
	hush    context.CancelFunc // ends the talk
}

// idleClient is one connection. The mutex is held over a write, so that who reads its end knows what the write met.
type idleClient struct {
	tcp    net.Conn
	reader *bufio.Reader
	prefix string // what the server puts before an echo

	mu    sync.Mutex
	state IdleConnection
}

func newIdleRole() role { return &idleRole{hush: func() {}} }

func (r *idleRole) do(ctx context.Context, command string, body json.RawMessage) (any, error) {
	switch command {
	case "open":
		options, err := decode[OpenOptions](body)
		if err != nil {
			return nil, err
		}
		return nil, r.open(ctx, options)
	case "echo":
		return nil, r.echo(ctx)
	case "talk":
		talk, err := decode[IdleTalk](body)
		if err != nil {
			return nil, err
		}
		r.talk(talk)
		return nil, nil
	case "connections":
		connections := []IdleConnection{}
		for _, c := range r.clients() {
			connections = append(connections, c.now())
		}
		return connections, nil
	}
	return nil, fmt.Errorf("no such command")
}

func (r *idleRole) clients() []*idleClient {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all[:len(r.all):len(r.all)]
}

func (r *idleRole) open(ctx context.Context, options OpenOptions) error {
	if options.Parallel <= 0 {
		options.Parallel = 64
	}
	if options.Timeout <= 0 {
		options.Timeout = 10 * time.Second
	}
	if !strings.HasPrefix(options.Path, "/") {
		options.Path = "/" + options.Path
	}
	if err := options.enoughPorts(); err != nil {
		return err
	}
	r.mu.Lock()
	if total := len(r.all) + r.opening + options.Count; total > MaxClients {
		r.mu.Unlock()
		return fmt.Errorf("%d connections in one process: it holds %d at most; start another", total, MaxClients)
	}
	r.opening += options.Count
	r.mu.Unlock()
	return options.each(func(local netip.AddrPort) error {
		c, err := (*idleClient)(nil), ctx.Err()
		if err == nil {
			c, err = openIdle(ctx, options, local)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.opening--
		if err == nil {
			r.all = append(r.all, c)
			go c.read()
		}
		return err
	})
}

// The key of the handshake and its answer are the example of RFC 6455, section 1.3.
const (
	handshakeKey    = "dGhlIHNhbXBsZSBub25jZQ=="
	handshakeAnswer = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
)

func openIdle(ctx context.Context, options OpenOptions, local netip.AddrPort) (c *idleClient, err error) {
	ctx, cancel := context.WithTimeout(ctx, options.Timeout)
	defer cancel()
	tcp, err := dial(ctx, local, options.Target)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			tcp.Close()
		}
	}()
	deadline, _ := ctx.Deadline()
	tcp.SetDeadline(deadline)
	c = &idleClient{tcp: tcp, reader: bufio.NewReaderSize(tcp, 512)}
	from := tcp.LocalAddr().(*net.TCPAddr).AddrPort()
	c.state.Local = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	c.state.Target = options.Target
	if _, err := fmt.Fprintf(tcp, "GET %s HTTP/1.1\r\nHost: %v\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", options.Path, options.Target, handshakeKey); err != nil {
		return nil, fmt.Errorf("send the handshake: %w", err)
	}
	answer, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		return nil, fmt.Errorf("wait for the handshake's answer: %w", err)
	}
	if answer.StatusCode != http.StatusSwitchingProtocols || answer.Header.Get("Sec-WebSocket-Accept") != handshakeAnswer {
		return nil, fmt.Errorf("the handshake is answered %s, %v", answer.Status, answer.Header)
	}
	greeting, err := c.message()
	if err != nil {
		return nil, fmt.Errorf("wait for the greeting: %w", err)
	}
	var seen string
	if _, err := fmt.Sscanf(greeting, "hello %s %d %s", &c.state.Server, &c.state.ID, &seen); err != nil {
		return nil, fmt.Errorf("read greeting %q: %w", greeting, err)
	}
	if c.state.Seen, err = netip.ParseAddrPort(seen); err != nil {
		return nil, fmt.Errorf("read greeting %q: %w", greeting, err)
	}
	c.state.Greeted = time.Now()
	c.prefix = c.state.Server + " " + strconv.FormatUint(c.state.ID, 10) + " "
	c.send()
	if echo, err := c.message(); err != nil {
		return nil, fmt.Errorf("wait for the first echo: %w", err)
	} else if c.echoed(echo); c.state.Wrong != "" {
		return nil, fmt.Errorf("the first echo is %s", c.state.Wrong)
	}
	tcp.SetDeadline(time.Time{})
	return c, nil
}

// read takes echoes until the connection's end.
func (c *idleClient) read() {
	for {
		message, err := c.message()
		if err != nil {
			c.ended(err, time.Now())
			return
		}
		c.echoed(message)
	}
}

// message reads a frame, as servers send them: whole, unmasked and not long.
func (c *idleClient) message() (string, error) {
	const wholeText, longer = 0x81, 126
	var head [2]byte
	if _, err := io.ReadFull(c.reader, head[:]); err != nil {
		return "", err
	}
	if head[0] != wholeText || head[1] >= longer {
		return "", fmt.Errorf("a frame that begins %#x", head)
	}
	body := make([]byte, head[1])
	_, err := io.ReadFull(c.reader, body)
	return string(body), err
}

// send sends the next message, its number, in a masked frame.
func (c *idleClient) send() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.state.Ended.IsZero() {
		return
	}
	c.state.Sent++
	body := strconv.FormatUint(c.state.Sent, 10)
	frame := binary.BigEndian.AppendUint32([]byte{0x81, 0x80 | byte(len(body))}, rand.Uint32())
	mask := frame[2:6]
	for i := range len(body) {
		frame = append(frame, body[i]^mask[i%4])
	}
	// The kernel tells an error once: where it is told here, who reads will see no more than an end; where who reads was told,
	// the pipe is broken here.
	if _, err := c.tcp.Write(frame); err != nil && !errors.Is(err, unix.EPIPE) {
		c.end(err, time.Now())
	}
}

func (c *idleClient) echoed(message string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if want := c.prefix + strconv.FormatUint(c.state.Echoed+1, 10); message == want {
		c.state.Echoed++
	} else if c.state.Wrong == "" {
		c.state.Wrong = fmt.Sprintf("%q, want %q", message, want)
	}
}

func (c *idleClient) ended(err error, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.end(err, at)
}

// end notes the end, once; the caller holds the mutex.
func (c *idleClient) end(err error, at time.Time) {
	if !c.state.Ended.IsZero() {
		return
	}
	c.state.Ended = at
	switch {
	case errors.Is(err, unix.ECONNRESET):
		c.state.End = EndReset
	case errors.Is(err, unix.ETIMEDOUT):
		c.state.End = EndTimedOut
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		c.state.End = EndClosed
	default:
		c.state.End = err.Error()
	}
	c.tcp.Close()
}

func (c *idleClient) now() IdleConnection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// echo waits for the echo of a message of each connection.
func (r *idleRole) echo(ctx context.Context) error {
	var group errgroup.Group
	all := r.clients()
	for _, c := range all {
		c.send()
	}
	group.SetLimit(64)
	for _, c := range all {
		group.Go(func() error {
			for state := c.now(); state.Ended.IsZero() && state.Wrong == "" && state.Echoed < state.Sent; state = c.now() {
				select {
				case <-time.After(talkPeriod):
				case <-ctx.Done():
					return fmt.Errorf("%v waits for an echo of %s: %w", state.Local, state.Server, ctx.Err())
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// talk starts a talk in place of the one before.
func (r *idleRole) talk(talk IdleTalk) {
	ctx, cancel := context.WithCancel(context.Background())
	r.mu.Lock()
	r.hush()
	r.hush = cancel
	r.mu.Unlock()
	if talk.Every <= 0 {
		cancel()
		return
	}
	go func() {
		ticker := time.NewTicker(talk.Every)
		defer ticker.Stop()
		for {
			for _, c := range r.clients() {
				if ctx.Err() == nil && (talk.Server == "" || talk.Server == c.now().Server) {
					c.send()
				}
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
		}
	}()
}
