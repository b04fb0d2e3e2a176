package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// resendPeriod is how long a datagram may be without an answer until the next one is sent.
const resendPeriod = time.Second

// Flows is a process in a node's namespace that holds many UDP flows to servers as FlowServer is one: long-lived, with
// datagrams of all sizes in both directions, the first of each flow 1200 bytes and more, as QUIC's are. Options, counts
// and failures are those of Clients, so far as there is the like in UDP: a flow is opened when a server has answered it, broken
// when nothing is answered for ChatterOptions.Timeout or an ICMP error says that nobody listens, and moved when another
// server answers, or the same one under another number. A datagram without an answer for a second is lost, and another
// takes its place.
type Flows struct{ *peer }

// StartFlows starts a process for UDP flows in the node.
func (n *Node) StartFlows() (*Flows, error) {
	p, err := n.startPeer("flows", n.name+"-flows")
	if err != nil {
		return nil, err
	}
	f := &Flows{peer: p}
	ctx, cancel := context.WithTimeout(context.Background(), startPeriod)
	defer cancel()
	if _, err := f.Stats(ctx); err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	return f, nil
}

// Open is Clients.Open; OpenOptions.Path has no meaning here.
func (f *Flows) Open(ctx context.Context, options OpenOptions) error {
	return f.call(ctx, "open", options, nil)
}

// Chatter is Clients.Chatter. With ChatterOptions.Size, datagrams and answers have that many bytes; else their sizes vary
// up to MaxWhole.
func (f *Flows) Chatter(ctx context.Context, options ChatterOptions) error {
	return f.call(ctx, "chatter", options, nil)
}

// Quiet stops sending, waits until every answer is back or its flow broken, and returns the counts.
func (f *Flows) Quiet(ctx context.Context) (stats ClientStats, err error) {
	return stats, f.call(ctx, "quiet", nil, &stats)
}

// Stats asks for the counts so far.
func (f *Flows) Stats(ctx context.Context) (stats ClientStats, err error) {
	return stats, f.call(ctx, "stats", nil, &stats)
}

// Connections lists the live flows, in no order. What servers see of a client is not told.
func (f *Flows) Connections(ctx context.Context) (connections []Connection, err error) {
	return connections, f.call(ctx, "connections", nil, &connections)
}

// Hangup forgets count of the flows, and returns the counts.
func (f *Flows) Hangup(ctx context.Context, count int) (stats ClientStats, err error) {
	return stats, f.call(ctx, "hangup", count, &stats)
}

// Close stops the chatter, forgets every flow, ends the process, and returns the final counts.
func (f *Flows) Close(ctx context.Context) (ClientStats, error) {
	stats, err := f.Quiet(ctx)
	if err == nil {
		stats, err = f.Hangup(ctx, MaxClients)
	}
	if err != nil {
		return stats, errors.Join(err, f.Kill())
	}
	return stats, f.exit(ctx)
}

// flowsRole is the flows within their own process.
type flowsRole struct {
	mu      sync.Mutex
	stats   ClientStats
	live    []*flow
	opening int
	cursor  int // of the next one to send, in live
	chatter ChatterOptions
}

// flow is one flow; its fields that change are the role's mutex's to guard.
type flow struct {
	Connection
	conn *net.UDPConn
	name uint64 // chosen at random

	place    int // in live; -1 once ended
	moved    bool
	sequence uint64    // of the last question
	answered uint64    // the latest question that was answered
	size     int       // of the answer to the last question
	sent     time.Time // the last question, while no answer is there; else zero
	asked    time.Time // the first question since the last answer
}

func newFlowsRole() role {
	r := &flowsRole{stats: ClientStats{Servers: map[string]int{}}}
	r.setChatter(ChatterOptions{}) // the defaults, at rate 0
	go pace(func() float64 {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.chatter.Rate
	}, r.sendNext)
	go r.watch()
	return r
}

func (r *flowsRole) do(ctx context.Context, command string, body json.RawMessage) (any, error) {
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
		for i, f := range r.live {
			connections[i] = f.Connection
		}
		return connections, nil
	case "hangup":
		count, err := decode[int](body)
		if err != nil {
			return nil, err
		}
		r.mu.Lock()
		chosen := slices.Clone(r.live[:min(count, len(r.live))])
		r.mu.Unlock()
		for _, f := range chosen {
			r.ended(f, nil)
		}
		return r.counts(), nil
	}
	return nil, fmt.Errorf("no such command")
}

func (r *flowsRole) counts() ClientStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	stats := r.stats
	stats.Live = len(r.live)
	stats.Servers = maps.Clone(r.stats.Servers)
	stats.Failures = slices.Clone(r.stats.Failures)
	for _, f := range r.live {
		if !f.sent.IsZero() {
			stats.Awaiting++
		}
	}
	return stats
}

func (r *flowsRole) open(ctx context.Context, options OpenOptions) error {
	if options.Parallel <= 0 {
		options.Parallel = 64
	}
	if options.Timeout <= 0 {
		options.Timeout = 10 * time.Second
	}
	if err := options.enoughPorts(); err != nil {
		return err
	}
	r.mu.Lock()
	if total := len(r.live) + r.opening + options.Count; total > MaxClients {
		r.mu.Unlock()
		return fmt.Errorf("%d flows in one process: it holds %d at most; start another", total, MaxClients)
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

// openOne sends a flow's first datagrams until one is answered.
func (r *flowsRole) openOne(ctx context.Context, options OpenOptions, local netip.AddrPort) (err error) {
	f := &flow{Connection: Connection{Local: local, Target: options.Target}, name: rand.Uint64()}
	defer func() {
		if err != nil {
			r.mu.Lock()
			r.stats.fail(&r.stats.Failed, "failed", f.Local, f.Server, err.Error())
			r.mu.Unlock()
			if f.conn != nil {
				f.conn.Close()
			}
		}
	}()
	from := net.UDPAddrFromAddrPort(local)
	if !local.Addr().IsValid() {
		from.IP = nil
	}
	if f.conn, err = net.DialUDP("udp", from, net.UDPAddrFromAddrPort(options.Target)); err != nil {
		return err
	}
	f.Local = f.conn.LocalAddr().(*net.UDPAddr).AddrPort()
	f.Local = netip.AddrPortFrom(f.Local.Addr().Unmap(), f.Local.Port())
	deadline := time.Now().Add(options.Timeout)
	buffer := make([]byte, MaxMessage+1)
	for tries := 0; ; tries++ {
		if tries > 0 {
			r.mu.Lock()
			r.stats.Lost++
			r.mu.Unlock()
		}
		if _, err := f.conn.Write(f.question(0)); err != nil {
			return err
		}
		f.conn.SetReadDeadline(minTime(deadline, time.Now().Add(resendPeriod)))
		length, err := f.conn.Read(buffer)
		switch {
		case err == nil:
			if err := f.greeted(buffer[:length]); err != nil {
				return fmt.Errorf("read the first answer: %w", err)
			}
		case errors.Is(err, unix.ECONNREFUSED):
			return err
		case time.Now().Before(deadline) && ctx.Err() == nil:
			continue
		default:
			return fmt.Errorf("wait for the first answer: %w", err)
		}
		break
	}
	f.conn.SetReadDeadline(time.Time{})
	f.answered = f.sequence

	r.mu.Lock()
	f.place = len(r.live)
	r.live = append(r.live, f)
	r.stats.Opened++
	r.stats.Servers[f.Server]++
	r.mu.Unlock()
	go r.read(f)
	return nil
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// question makes the flow's next datagram, of a size or of one that is left to chance, and notes what is to be answered.
// The first and its answer are large.
func (f *flow) question(size int) []byte {
	f.sequence++
	least, most := minDatagram, MaxWhole
	if f.answered == 0 {
		least, most = initialDatagram, MaxWhole
	}
	vary := func() int {
		if size != 0 {
			return max(size, minDatagram)
		}
		// Half of them full, half of any size.
		if rand.IntN(2) == 0 {
			return most
		}
		return least + rand.IntN(most-least)
	}
	f.size = vary()
	return datagram{kind: kindQuestion, flow: f.name, sequence: f.sequence, answer: f.size}.encode(vary())
}

// greeted takes the first answer.
func (f *flow) greeted(answer []byte) error {
	d, err := decodeDatagram(answer)
	if err != nil {
		return err
	}
	if err := f.belongs(d, len(answer)); err != nil {
		return err
	}
	f.Server, f.ID = d.server, d.number
	return nil
}

// belongs compares an answer with what the flow has asked.
func (f *flow) belongs(d datagram, size int) error {
	switch {
	case d.kind != kindAnswer || d.flow != f.name:
		return fmt.Errorf("a datagram of kind %d of flow %x, not %x's", d.kind, d.flow, f.name)
	case d.sequence == 0 || d.sequence > f.sequence:
		return fmt.Errorf("an answer to question %d, which was not asked yet", d.sequence)
	case d.sequence == f.sequence && size != f.size:
		return fmt.Errorf("the answer to question %d has %d bytes, not %d", d.sequence, size, f.size)
	}
	return nil
}

// read takes a flow's answers until it ends.
func (r *flowsRole) read(f *flow) {
	buffer := make([]byte, MaxMessage+1)
	for {
		length, err := f.conn.Read(buffer)
		if err != nil {
			r.ended(f, err)
			return
		}
		r.answered(f, buffer[:length])
	}
}

func (r *flowsRole) answered(f *flow, answer []byte) {
	now := time.Now()
	d, err := decodeDatagram(answer)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		err = f.belongs(d, len(answer))
	}
	switch {
	case err != nil:
		r.stats.fail(&r.stats.Wrong, "wrong", f.Local, f.Server, err.Error())
	case d.server != f.Server || d.number != f.ID:
		if !f.moved {
			f.moved = true
			r.stats.fail(&r.stats.Moved, "moved", f.Local, f.Server,
				fmt.Sprintf("answered by %s as its flow %d, not by %s as %d", d.server, d.number, f.Server, f.ID))
		}
	case d.sequence > f.answered: // a later one may be late, or come twice
		f.answered = d.sequence
		r.stats.Echoed++
		r.stats.Slowest = max(r.stats.Slowest, now.Sub(f.asked))
	}
	if d.sequence == f.sequence {
		f.sent = time.Time{}
	}
}

// ended takes a flow out, once, and counts why it ended: nil is by us.
func (r *flowsRole) ended(f *flow, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f.place < 0 {
		return
	}
	last := r.live[len(r.live)-1]
	r.live[f.place], last.place = last, f.place
	r.live = r.live[:len(r.live)-1]
	f.place = -1
	r.stats.Servers[f.Server]--
	if err == nil {
		r.stats.Closed++
	} else {
		r.stats.fail(&r.stats.Broken, "broken", f.Local, f.Server, err.Error())
	}
	f.conn.Close()
}

func (r *flowsRole) setChatter(options ChatterOptions) error {
	if options.Rate < 0 || options.Size < 0 || options.Size > MaxMessage {
		return fmt.Errorf("chatter of %g datagrams/s of %d bytes: want a rate above zero, and %d bytes at most",
			options.Rate, options.Size, MaxMessage)
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

// quiet stops the chatter and waits for the answers under way; watch sees to it that none is for ever.
func (r *flowsRole) quiet(ctx context.Context) (ClientStats, error) {
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

// sendNext sends a datagram on the next flow that waits for no answer, if there is one.
func (r *flowsRole) sendNext() bool {
	r.mu.Lock()
	var f *flow
	for range r.live {
		r.cursor = (r.cursor + 1) % len(r.live)
		if next := r.live[r.cursor]; next.sent.IsZero() {
			f = next
			break
		}
	}
	if f == nil || r.chatter.Rate == 0 {
		r.mu.Unlock()
		return false
	}
	f.asked = time.Now()
	r.stats.Sent++
	err := r.send(f, f.asked)
	r.mu.Unlock()
	if err != nil {
		r.ended(f, err)
	}
	return true
}

// send sends the next question; the caller holds the mutex.
func (r *flowsRole) send(f *flow, now time.Time) error {
	question := f.question(r.chatter.Size)
	f.sent = now
	_, err := f.conn.Write(question)
	return err
}

// watch sends again where an answer takes too long, and breaks flows that have had none for much longer.
func (r *flowsRole) watch() {
	for now := range time.Tick(watchPeriod) {
		r.mu.Lock()
		late := map[*flow]error{}
		for _, f := range r.live {
			switch {
			case f.sent.IsZero() || now.Sub(f.sent) < resendPeriod:
			case now.Sub(f.asked) > r.chatter.Timeout:
				late[f] = fmt.Errorf("no answer within %v", r.chatter.Timeout)
			default:
				r.stats.Lost++
				if err := r.send(f, now); err != nil {
					late[f] = err
				}
			}
		}
		r.mu.Unlock()
		for f, err := range late {
			r.ended(f, err)
		}
	}
}
