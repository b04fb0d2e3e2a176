package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// BulkClients is a process in a node's namespace that holds WebSocket connections to servers as Server is one, each of
// them always with data under way in both directions: a message goes out as soon as the one before has begun to come
// back, and every byte of an echo is compared. It notes when each one's end was heard of, and what was heard, as
// IdleClients does.
type BulkClients struct{ *peer }

// BulkOptions describe what bulk connections send.
type BulkOptions struct {
	Size int // bytes of a message, 128 to 1 MiB less 64; default 64 KiB
	// Rate is the most that a connection sends, in bytes a second, each beginning at a moment of its own; default: as fast as
	// echoes come back.
	Rate float64
}

// StartBulkClients starts a process for bulk connections in the node.
func (n *Node) StartBulkClients() (*BulkClients, error) {
	p, err := n.startPeer("bulk-clients", n.name+"-bulk-clients")
	if err != nil {
		return nil, err
	}
	c := &BulkClients{peer: p}
	ctx, cancel := context.WithTimeout(context.Background(), startPeriod)
	defer cancel()
	if _, err := c.Connections(ctx); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	return c, nil
}

// Open opens connections and returns once each has echoed its first message, a short one, or failed; where any failed it
// returns an error that tells how many and one reason, and the others stay.
func (c *BulkClients) Open(ctx context.Context, options OpenOptions) error {
	return c.call(ctx, "open", options, nil)
}

// Send has every connection that is open now send without an end.
func (c *BulkClients) Send(ctx context.Context, options BulkOptions) error {
	return c.call(ctx, "send", options, nil)
}

// Connections lists all connections that were ever greeted, living and ended ones, oldest first. Sent and Echoed count
// messages.
func (c *BulkClients) Connections(ctx context.Context) (connections []IdleConnection, err error) {
	return connections, c.call(ctx, "connections", nil, &connections)
}

// Close ends the process, and with it all connections, without a word of their own.
func (c *BulkClients) Close(ctx context.Context) error { return c.exit(ctx) }

const (
	defaultBulk = 64 << 10
	minBulk     = 128            // the shortest that has a long frame
	maxBulk     = readLimit - 64 // an echo has a name and a number before it
)

// bulkRole is the clients within their own process.
type bulkRole struct {
	mu      sync.Mutex
	all     []*idleClient
	sending bool
}

func (r *bulkRole) do(ctx context.Context, command string, body json.RawMessage) (any, error) {
	switch command {
	case "open":
		options, err := decode[OpenOptions](body)
		if err != nil {
			return nil, err
		}
		return nil, r.open(ctx, options)
	case "send":
		options, err := decode[BulkOptions](body)
		if err != nil {
			return nil, err
		}
		return nil, r.send(options)
	case "connections":
		r.mu.Lock()
		defer r.mu.Unlock()
		connections := []IdleConnection{}
		for _, c := range r.all {
			connections = append(connections, c.now())
		}
		return connections, nil
	}
	return nil, fmt.Errorf("no such command")
}

func (r *bulkRole) open(ctx context.Context, options OpenOptions) error {
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
	return options.each(func(local netip.AddrPort) error {
		c, err := (*idleClient)(nil), ctx.Err()
		if err == nil {
			c, err = openIdle(ctx, options, local)
		}
		if err == nil {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.all = append(r.all, c)
		}
		return err
	})
}

func (r *bulkRole) send(options BulkOptions) error {
	if options.Size == 0 {
		options.Size = defaultBulk
	}
	if options.Size < minBulk || options.Size > maxBulk || options.Rate < 0 {
		return fmt.Errorf("messages of %d bytes, %g bytes a second: want %d to %d bytes, and a rate above zero", options.Size,
			options.Rate, minBulk, maxBulk)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sending {
		return errors.New("they send already")
	}
	r.sending = true
	for _, c := range r.all {
		var seed [32]byte
		binary.NativeEndian.PutUint64(seed[:], rand.Uint64())
		message := make([]byte, options.Size)
		rand.NewChaCha8(seed).Read(message)
		echoes := make(chan struct{}, 1)
		go c.sendBulk(message, options.Rate, echoes)
		go c.readBulk(message, echoes)
	}
	return nil
}

// sendBulk sends the message again and again, each time that the one before comes back.
func (c *idleClient) sendBulk(message []byte, rate float64, echoes <-chan struct{}) {
	// Masked with zeros, a message is on the wire as it is.
	const wholeBinary, masked, long = 0x82, 0x80, 127
	frame := binary.BigEndian.AppendUint64([]byte{wholeBinary, masked | long}, uint64(len(message)))
	frame = append(append(frame, 0, 0, 0, 0), message...)
	began, sent := time.Now(), 0
	turn := func() {
		if rate > 0 {
			time.Sleep(time.Until(began.Add(time.Duration(float64(sent) / rate * float64(time.Second)))))
		}
	}
	sent = rand.IntN(len(message)) // where in its pace it begins
	turn()
	for {
		c.mu.Lock()
		c.state.Sent++
		c.mu.Unlock()
		// The mutex is not held while a write waits for room: who asks for the state is not to wait as well.
		if _, err := c.tcp.Write(frame); err != nil {
			c.bulkEnded(err)
			return
		}
		if _, more := <-echoes; !more {
			return
		}
		sent += len(message)
		turn()
	}
}

// readBulk compares echoes until the connection's end.
func (c *idleClient) readBulk(message []byte, echoes chan<- struct{}) {
	defer close(echoes)
	want := append([]byte(c.prefix), message...)
	got := make([]byte, len(want))
	for {
		length, err := c.bulkHead()
		if err == nil && length != len(want) {
			err = fmt.Errorf("an echo of %d bytes, want %d", length, len(want))
		}
		if err == nil {
			echoes <- struct{}{}
			_, err = io.ReadFull(c.reader, got)
		}
		if err != nil {
			c.bulkEnded(err)
			return
		}
		c.mu.Lock()
		if bytes.Equal(got, want) {
			c.state.Echoed++
		} else if c.state.Wrong == "" {
			c.state.Wrong = fmt.Sprintf("the echo begins %.40q, want %.40q", got, want)
		}
		c.mu.Unlock()
	}
}

// bulkEnded notes the end as the reader or the writer met it. The kernel tells a RST to one of them alone: the other finds
// no more than an end.
func (c *idleClient) bulkEnded(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case errors.Is(err, unix.EPIPE): // the reader knows
	case errors.Is(err, unix.ECONNRESET) && c.state.End == EndClosed:
		c.state.End = EndReset
	default:
		c.end(err, time.Now())
	}
}

// bulkHead reads the head of a binary frame, as servers send them: whole, unmasked and long.
func (c *idleClient) bulkHead() (length int, err error) {
	const wholeBinary, medium, long = 0x82, 126, 127
	var head [2]byte
	if _, err := io.ReadFull(c.reader, head[:]); err != nil {
		return 0, err
	}
	size := make([]byte, map[byte]int{medium: 2, long: 8}[head[1]])
	if head[0] != wholeBinary || len(size) == 0 {
		return 0, fmt.Errorf("a frame that begins %#x", head)
	}
	if _, err := io.ReadFull(c.reader, size); err != nil {
		return 0, err
	}
	for _, b := range size {
		length = length<<8 | int(b)
	}
	return length, nil
}
