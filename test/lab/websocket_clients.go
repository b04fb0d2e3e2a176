package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// MaxClients is how many connections one Clients process holds; more take another process.
	MaxClients = 15_000
	// MaxMessage is the longest message to echo, in bytes: one that never fills a socket's buffer.
	MaxMessage = 8 << 10

	talkPeriod  = 5 * time.Millisecond
	watchPeriod = 100 * time.Millisecond
	closePeriod = 20 * time.Second
)

// Clients is a process in a node's namespace that holds many WebSocket connections to servers as Server is one.
type Clients struct{ *peer }

// OpenOptions describe connections to open.
type OpenOptions struct {
	Target  netip.AddrPort // of the service
	Path    string         // default /
	Sources []netip.Addr   // local addresses, one connection each in turn; default: as the kernel chooses
	Count   int            // connections

	// FirstPort makes local ports known beforehand: connection i comes from Sources[i % len(Sources)] and port
	// FirstPort + i / len(Sources). Zero: as the kernel chooses.
	FirstPort uint16

	Parallel int           // connections being opened at a time; default 64
	Timeout  time.Duration // from the SYN to the greeting; default 10 s
}

// ChatterOptions describe the messages to exchange.
type ChatterOptions struct {
	Rate    float64       // messages a second, over all connections; each has one under way at most
	Size    int           // bytes of a message; default 64
	Timeout time.Duration // a connection whose echo is not back by then is broken; default 10 s
}

// ClientStats are counts since the process was started, of connections or of flows.
type ClientStats struct {
	Live   int `json:"live"`   // connections open now
	Opened int `json:"opened"` // connections greeted by a server
	Failed int `json:"failed"` // connections that were not: refused, reset, silent

	Closed         int `json:"closed"`           // ended by our close handshake; of flows, by us
	Unclean        int `json:"unclean"`          // ended while our close handshake was under way, without its answer
	ClosedByServer int `json:"closed_by_server"` // ended by a server's close handshake
	Broken         int `json:"broken"`           // ended by anything else, or left without an echo

	Moved int `json:"moved"` // connections that another server, or another of its connections, answered
	Wrong int `json:"wrong"` // echoes that were not what had been sent
	Lost  int `json:"lost"`  // of flows: datagrams that had no answer for a second, and were sent again

	Sent     uint64        `json:"sent"`     // messages
	Echoed   uint64        `json:"echoed"`   // messages that came back as they were
	Awaiting int           `json:"awaiting"` // connections whose echo is not back yet
	Slowest  time.Duration `json:"slowest"`  // the longest time an echo took since Chatter was last called

	Servers  map[string]int `json:"servers"`  // live connections by the name of their server
	Failures []Failure      `json:"failures"` // the first ten of each kind
}

// Failure is one thing that went wrong.
type Failure struct {
	Kind   string         `json:"kind"` // failed, unclean, closed by server, broken, moved or wrong, as in ClientStats
	At     time.Time      `json:"at"`
	Local  netip.AddrPort `json:"local"`
	Server string         `json:"server,omitempty"`
	Reason string         `json:"reason"`
}

func (f Failure) String() string {
	return fmt.Sprintf("%s %s: %v to %q: %s", f.At.Format("15:04:05.000"), f.Kind, f.Local, f.Server, f.Reason)
}

// Connection is a live connection as both ends see it.
type Connection struct {
	Local  netip.AddrPort `json:"local"`  // the client's end, as the client sees it
	Target netip.AddrPort `json:"target"` // the service
	Server string         `json:"server"` // the name of the server that greeted it
	ID     uint64         `json:"id"`     // that server's number for it
	Seen   netip.AddrPort `json:"seen"`   // the client's end, as the server sees it
}

// StartClients starts a process for client connections in the node.
func (n *Node) StartClients() (*Clients, error) {
	p, err := n.startPeer("clients", n.name+"-clients")
	if err != nil {
		return nil, err
	}
	c := &Clients{peer: p}
	ctx, cancel := context.WithTimeout(context.Background(), startPeriod)
	defer cancel()
	if _, err := c.Stats(ctx); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	return c, nil
}

// Open opens connections and returns once each is greeted or has failed; where any failed it returns an error that
// tells how many and one reason, and the others stay. Others may chatter meanwhile, and the new ones join in.
func (c *Clients) Open(ctx context.Context, options OpenOptions) error {
	return c.call(ctx, "open", options, nil)
}

// Chatter has all connections, those to come too, exchange messages at a steady rate until Quiet; called again, it
// changes the rate.
func (c *Clients) Chatter(ctx context.Context, options ChatterOptions) error {
	return c.call(ctx, "chatter", options, nil)
}

// Quiet stops sending, waits until every echo is back or its connection broken, and returns the counts.
func (c *Clients) Quiet(ctx context.Context) (stats ClientStats, err error) {
	return stats, c.call(ctx, "quiet", nil, &stats)
}

// Stats asks for the counts so far.
func (c *Clients) Stats(ctx context.Context) (stats ClientStats, err error) {
	return stats, c.call(ctx, "stats", nil, &stats)
}

// Connections lists the live connections, in no order.
func (c *Clients) Connections(ctx context.Context) (connections []Connection, err error) {
	return connections, c.call(ctx, "connections", nil, &connections)
}

// Hangup closes count of the connections by the WebSocket close handshake, and returns the counts. Messages under way
// on them stay sent and not echoed: where that matters, call Quiet before.
func (c *Clients) Hangup(ctx context.Context, count int) (stats ClientStats, err error) {
	return stats, c.call(ctx, "hangup", count, &stats)
}

// Close stops the chatter, closes every connection by the WebSocket close handshake, ends the process, and returns the
// final counts. Kill ends it as a crash does.
func (c *Clients) Close(ctx context.Context) (ClientStats, error) {
	stats, err := c.Quiet(ctx)
	if err == nil {
		stats, err = c.Hangup(ctx, MaxClients)
	}
	if err != nil {
		return stats, errors.Join(err, c.Kill())
	}
	return stats, c.exit(ctx)
}

// clientsRole is the clients within their own process.
type clientsRole struct {
	mu      sync.Mutex
	stats   ClientStats
	live    []*client
	opening int
	cursor  int // of the next one to send, in live
	chatter ChatterOptions
}

// client is one connection; its fields that change are the role's mutex's to guard.
type client struct {
	Connection
	ws     *websocket.Conn
	prefix string // what the server puts before an echo

	place    int  // in live; -1 once ended
	closing  bool // by hangup, which says why it ended
	moved    bool
	messages uint64
	sent     time.Time // of the message under way; zero without one
	message  string    // under way

	readErr error         // why read ended; to be read after done
	done    chan struct{} // closed when read has ended
}

func newClientsRole() role {
	r := &clientsRole{stats: ClientStats{Servers: map[string]int{}}}
	r.setChatter(ChatterOptions{}) // the defaults, at rate 0
	go r.talk()
	go r.watch()
	return r
}

func (r *clientsRole) do(ctx context.Context, command string, body json.RawMessage) (any, error) {
	switch command {
	case "open":
		options, err := decode[OpenOptions](body)
		if err != nil {
			return nil, err
		}
		return nil, r.open(ctx, options)
	case "chatter":
		options, err := decode[ChatterOptions](body)
		if err != nil {
			return nil, err
		}
		return nil, r.setChatter(options)
	case "quiet":
		return r.quiet(ctx)
	case "stats":
		return r.counts(), nil
	case "connections":
		r.mu.Lock()
		defer r.mu.Unlock()
		connections := make([]Connection, len(r.live))
		for i, c := range r.live {
			connections[i] = c.Connection
		}
		return connections, nil
	case "hangup":
		count, err := decode[int](body)
		if err != nil {
			return nil, err
		}
		r.hangup(count)
		return r.counts(), nil
	}
	return nil, fmt.Errorf("no such command")
}

func (r *clientsRole) counts() ClientStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	stats := r.stats
	stats.Live = len(r.live)
	stats.Servers = maps.Clone(r.stats.Servers)
	stats.Failures = slices.Clone(r.stats.Failures)
	for _, c := range r.live {
		if !c.sent.IsZero() {
			stats.Awaiting++
		}
	}
	return stats
}

// fail counts by the pointer, and keeps a sample; the caller holds the mutex.
func (s *ClientStats) fail(count *int, kind string, local netip.AddrPort, server, reason string) {
	*count++
	kept := 0
	for _, f := range s.Failures {
		if f.Kind == kind {
			kept++
		}
	}
	if kept < samplesKept {
		s.Failures = append(s.Failures, Failure{Kind: kind, At: time.Now(), Local: local, Server: server, Reason: reason})
	}
}

func (r *clientsRole) open(ctx context.Context, options OpenOptions) error {
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
	if total := len(r.live) + r.opening + options.Count; total > MaxClients {
		r.mu.Unlock()
		return fmt.Errorf("%d connections in one process: it holds %d at most; start another", total, MaxClients)
	}
	r.opening += options.Count
	r.mu.Unlock()
	return options.each(func(local netip.AddrPort) error {
		err := ctx.Err()
		if err == nil {
			err = r.openOne(ctx, options, local)
		}
		r.mu.Lock()
		r.opening--
		r.mu.Unlock()
		return err
	})
}

func (o OpenOptions) enoughPorts() error {
	each := max(len(o.Sources), 1)
	if last := int(o.FirstPort) + (o.Count-1)/each; o.FirstPort != 0 && last > 65535 {
		return fmt.Errorf("%d connections from port %d on %d addresses end at port %d: take more addresses",
			o.Count, o.FirstPort, each, last)
	}
	return nil
}

// each opens one by one from every local address and port that the options name, many at a time, and tells how many
// failed, and one reason.
func (o OpenOptions) each(open func(local netip.AddrPort) error) error {
	var (
		mu     sync.Mutex
		failed int
		first  error
		group  errgroup.Group
	)
	group.SetLimit(o.Parallel)
	each := max(len(o.Sources), 1)
	for i := range o.Count {
		local := netip.AddrPortFrom(netip.Addr{}, 0)
		if len(o.Sources) > 0 {
			local = netip.AddrPortFrom(o.Sources[i%each], 0)
		}
		if o.FirstPort != 0 {
			local = netip.AddrPortFrom(local.Addr(), o.FirstPort+uint16(i/each))
		}
		group.Go(func() error {
			if err := open(local); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if failed++; first == nil {
					first = err
				}
			}
			return nil
		})
	}
	group.Wait()
	if failed > 0 {
		return fmt.Errorf("%d of %d connections to %v failed: %w", failed, o.Count, o.Target, first)
	}
	return nil
}

func (r *clientsRole) openOne(ctx context.Context, options OpenOptions, local netip.AddrPort) (err error) {
	ctx, cancel := context.WithTimeout(ctx, options.Timeout)
	defer cancel()
	c := &client{Connection: Connection{Local: local, Target: options.Target}, done: make(chan struct{})}
	defer func() {
		if err != nil {
			r.mu.Lock()
			r.stats.fail(&r.stats.Failed, "failed", c.Local, c.Server, reason(err))
			r.mu.Unlock()
			if c.ws != nil {
				c.ws.CloseNow()
			}
		}
	}()
	tcp, err := dial(ctx, local, options.Target)
	if err != nil {
		return err
	}
	c.Local = tcp.LocalAddr().(*net.TCPAddr).AddrPort()
	c.Local = netip.AddrPortFrom(c.Local.Addr().Unmap(), c.Local.Port())
	// A transport of its own: a shared one may hand a connection to another request than it was dialled for.
	once := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return tcp, nil }}
	c.ws, _, err = websocket.Dial(ctx, "ws://"+options.Target.String()+options.Path,
		&websocket.DialOptions{HTTPClient: &http.Client{Transport: once}})
	if err != nil {
		tcp.Close()
		return err
	}
	c.ws.SetReadLimit(readLimit)
	_, greeting, err := c.ws.Read(ctx)
	if err != nil {
		return fmt.Errorf("wait for the greeting: %w", err)
	}
	var seen string
	if _, err := fmt.Sscanf(string(greeting), "hello %s %d %s", &c.Server, &c.ID, &seen); err != nil {
		return fmt.Errorf("read greeting %q: %w", greeting, err)
	}
	if c.Seen, err = netip.ParseAddrPort(seen); err != nil {
		return fmt.Errorf("read greeting %q: %w", greeting, err)
	}
	c.prefix = c.Server + " " + strconv.FormatUint(c.ID, 10) + " "

	r.mu.Lock()
	c.place = len(r.live)
	r.live = append(r.live, c)
	r.stats.Opened++
	r.stats.Servers[c.Server]++
	r.mu.Unlock()
	go r.read(c)
	return nil
}

// dial opens a TCP connection that sends no keep-alives.
func dial(ctx context.Context, local, target netip.AddrPort) (net.Conn, error) {
	dialer := net.Dialer{KeepAlive: -1, Control: func(_, _ string, raw syscall.RawConn) (err error) {
		raw.Control(func(fd uintptr) {
			if local.Port() != 0 {
				// A port in TIME_WAIT since the last run may be taken again.
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			} else {
				// The port is chosen when the target is known, so that one port serves many targets.
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
			}
		})
		return err
	}}
	if local.Addr().IsValid() || local.Port() != 0 {
		dialer.LocalAddr = &net.TCPAddr{IP: local.Addr().AsSlice(), Port: int(local.Port())}
	}
	return dialer.DialContext(ctx, "tcp", target.String())
}

// read takes a connection's echoes until it ends.
func (r *clientsRole) read(c *client) {
	defer close(c.done)
	for {
		_, message, err := c.ws.Read(context.Background())
		if err != nil {
			c.readErr = err
			r.endedUnasked(c, err)
			return
		}
		r.echoed(c, string(message))
	}
}

func (r *clientsRole) echoed(c *client, message string) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	body, same := strings.CutPrefix(message, c.prefix)
	switch {
	case !same:
		if !c.moved {
			c.moved = true
			r.stats.fail(&r.stats.Moved, "moved", c.Local, c.Server, fmt.Sprintf("an echo begins %.40q, not %q", message, c.prefix))
		}
	case c.sent.IsZero() || body != c.message:
		r.stats.fail(&r.stats.Wrong, "wrong", c.Local, c.Server, fmt.Sprintf("the echo is %.40q, not %.40q", body, c.message))
	default:
		r.stats.Echoed++
		r.stats.Slowest = max(r.stats.Slowest, now.Sub(c.sent))
	}
	c.sent = time.Time{}
}

// endedUnasked is ended for a connection that hangup isn't closing.
func (r *clientsRole) endedUnasked(c *client, err error) {
	r.mu.Lock()
	closing := c.closing
	r.mu.Unlock()
	if !closing {
		r.ended(c, err)
	}
}

// ended takes a connection out, once, and counts why it ended.
func (r *clientsRole) ended(c *client, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.place < 0 {
		return
	}
	last := r.live[len(r.live)-1]
	r.live[c.place], last.place = last, c.place
	r.live = r.live[:len(r.live)-1]
	c.place = -1
	r.stats.Servers[c.Server]--
	status := websocket.CloseStatus(err)
	switch {
	case c.closing && (err == nil || status == websocket.StatusNormalClosure):
		r.stats.Closed++
	case c.closing:
		r.stats.fail(&r.stats.Unclean, "unclean", c.Local, c.Server, reason(err))
	case status != -1:
		r.stats.fail(&r.stats.ClosedByServer, "closed by server", c.Local, c.Server, reason(err))
	case errors.Is(err, io.EOF):
		r.stats.fail(&r.stats.Broken, "broken", c.Local, c.Server, "FIN without a close handshake: "+reason(err))
	default:
		r.stats.fail(&r.stats.Broken, "broken", c.Local, c.Server, reason(err))
	}
	go c.ws.CloseNow()
}

func (r *clientsRole) setChatter(options ChatterOptions) error {
	if options.Rate < 0 || options.Size < 0 || options.Size > MaxMessage {
		return fmt.Errorf("chatter of %g messages/s of %d bytes: want a rate above zero, and %d bytes at most",
			options.Rate, options.Size, MaxMessage)
	}
	if options.Size == 0 {
		options.Size = 64
	}
	if options.Timeout <= 0 {
		options.Timeout = 10 * time.Second
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.chatter = options
	r.stats.Slowest = 0
	return nil
}

// quiet stops the chatter and waits for the echoes under way; watch sees to it that none is for ever.
func (r *clientsRole) quiet(ctx context.Context) (ClientStats, error) {
	r.mu.Lock()
	r.chatter.Rate = 0
	r.mu.Unlock()
	tick := time.NewTicker(talkPeriod)
	defer tick.Stop()
	for {
		if stats := r.counts(); stats.Awaiting == 0 {
			return stats, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ClientStats{}, ctx.Err()
		}
	}
}

// talk sends what the chatter's rate owes, connection by connection in turn.
func (r *clientsRole) talk() {
	pace(func() float64 {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.chatter.Rate
	}, r.sendNext)
}

// pace sends at a rate a second that may change, as long as send finds something to send.
func pace(current func() float64, send func() bool) {
	owed, before := 0.0, time.Now()
	for now := range time.Tick(talkPeriod) {
		rate := current()
		// What could not be sent in 100 ms is not made up for: a pause is not followed by a burst.
		owed = min(owed+rate*now.Sub(before).Seconds(), rate/10+1)
		before = now
		for ; rate > 0 && owed >= 1; owed-- {
			if !send() {
				break
			}
		}
	}
}

// sendNext sends a message on the next connection that has none under way, if there is one.
func (r *clientsRole) sendNext() bool {
	r.mu.Lock()
	var c *client
	for range r.live {
		r.cursor = (r.cursor + 1) % len(r.live)
		if next := r.live[r.cursor]; next.sent.IsZero() && !next.closing {
			c = next
			break
		}
	}
	if c == nil || r.chatter.Rate == 0 {
		r.mu.Unlock()
		return false
	}
	c.messages++
	c.message = strconv.FormatUint(c.messages, 10) + " "
	c.message += strings.Repeat("~", max(0, r.chatter.Size-len(c.message)))
	c.sent = time.Now()
	message := []byte(c.message)
	r.stats.Sent++
	r.mu.Unlock()
	if err := c.ws.Write(context.Background(), websocket.MessageText, message); err != nil {
		r.endedUnasked(c, err)
	}
	return true
}

// watch breaks connections whose echo takes too long.
func (r *clientsRole) watch() {
	for now := range time.Tick(watchPeriod) {
		r.mu.Lock()
		timeout := r.chatter.Timeout
		var late []*client
		for _, c := range r.live {
			if !c.sent.IsZero() && now.Sub(c.sent) > timeout {
				late = append(late, c)
			}
		}
		r.mu.Unlock()
		for _, c := range late {
			r.ended(c, fmt.Errorf("no echo within %v", timeout))
		}
	}
}

// hangup closes connections by the close handshake, many at a time; those that nobody answers are given up together.
func (r *clientsRole) hangup(count int) {
	r.mu.Lock()
	var chosen []*client
	for _, c := range r.live {
		if len(chosen) < count && !c.closing {
			c.closing = true
			chosen = append(chosen, c)
		}
	}
	r.mu.Unlock()
	giveUp := time.AfterFunc(closePeriod, func() {
		for _, c := range chosen {
			r.ended(c, fmt.Errorf("no answer to the close handshake within %v", closePeriod))
		}
	})
	defer giveUp.Stop()
	var group errgroup.Group
	group.SetLimit(1024)
	for _, c := range chosen {
		group.Go(func() error {
			closeErr := c.ws.Close(websocket.StatusNormalClosure, "")
			<-c.done
			// As a rule read holds the connection and sees how it ended, and Close knows only that it has.
			if err := c.readErr; !errors.Is(err, net.ErrClosed) {
				closeErr = err
			}
			r.ended(c, closeErr)
			return nil
		})
	}
	group.Wait()
}
