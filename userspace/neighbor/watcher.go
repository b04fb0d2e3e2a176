// Package neighbor keeps the next hops of a set of destinations current: by which device, to which Ethernet address,
// through which gateway. It listens to the kernel's routes, links, addresses and neighbour entries over netlink, and
// makes the kernel ask (ARP, RFC 826; NDP, RFC 4861) for entries that XDP's traffic alone would let go stale.
package neighbor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
)

// Options are what New takes; the zero value will do.
type Options struct {
	// Logger; default: none.
	Logger *slog.Logger
	// Namespace is the network namespace to watch; default (zero or netns.None()): the calling thread's. It is needed
	// only during New.
	Namespace netns.NsHandle
	// OnChange is called with the next hops that changed, in order of Destination, from Run's goroutine and without
	// locks held. Destinations no longer wanted are not told.
	OnChange func([]NextHop)
	// ReadyAfter bounds how long Ready waits for answers; default: 1 s.
	ReadyAfter time.Duration
	// ReceiveBuffer is the size of the buffer for the kernel's news, in bytes; default: 1 MiB. When it overflows
	// everything is read anew.
	ReceiveBuffer int
}

// Watcher keeps next hops current while Run runs. Its methods may be called from any goroutine. In one namespace there
// should be one Watcher at a time: a starting one takes what an earlier one left managed in the kernel for left-overs.
type Watcher struct {
	log        *slog.Logger
	onChange   func([]NextHop)
	readyAfter time.Duration
	requests   *requests
	events     *nl.NetlinkSocket
	running    atomic.Bool
	wake       chan struct{} // what is wanted has changed; holds one
	ready      chan struct{}

	mu        sync.RWMutex
	wanted    map[netip.Addr]struct{}
	suspected []netip.Addr
	published map[netip.Addr]NextHop // of the wanted ones, no others
}

// New opens a Watcher's sockets in the namespace. Reading needs no privilege; to ask neighbours, CAP_NET_ADMIN is
// needed in the namespace's owner (without it: only what the kernel resolves for its own traffic).
func New(opts Options) (*Watcher, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.ReadyAfter == 0 {
		opts.ReadyAfter = time.Second
	}
	if opts.ReceiveBuffer == 0 {
		opts.ReceiveBuffer = 1 << 20
	}
	ns := opts.Namespace
	if ns == 0 {
		ns = netns.None()
	}
	r, err := openRequests(ns)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for next hops: %w", err)
	}
	s, err := subscribe(ns, opts.ReceiveBuffer)
	if err != nil {
		r.close()
		return nil, fmt.Errorf("subscribe to routes, links and neighbours: %w", err)
	}
	return &Watcher{
		log: opts.Logger, onChange: opts.OnChange, readyAfter: opts.ReadyAfter, requests: r, events: s,
		wake: make(chan struct{}, 1), ready: make(chan struct{}),
		wanted: map[netip.Addr]struct{}{}, published: map[netip.Addr]NextHop{},
	}, nil
}

// SetDestinations says which destinations are wanted, instead of those before. Addresses mapped from IPv4 count as
// IPv4; a link-local IPv6 address carries its interface as zone (fe80::1%eth0). Invalid addresses are left out. Before
// Run it only notes them, afterwards their resolution starts at once.
func (w *Watcher) SetDestinations(destinations []netip.Addr) {
	wanted := make(map[netip.Addr]struct{}, len(destinations))
	for _, d := range destinations {
		if d.IsValid() {
			wanted[d.Unmap()] = struct{}{}
		}
	}
	w.mu.Lock()
	w.wanted = wanted
	for d := range w.published {
		if _, ok := wanted[d]; !ok {
			delete(w.published, d)
		}
	}
	for d := range wanted {
		if _, ok := w.published[d]; !ok {
			w.published[d] = NextHop{Destination: d, State: Resolving, Reason: "not looked up yet"}
		}
	}
	w.mu.Unlock()
	w.poke()
}

// Suspect has the neighbour of a wanted destination asked now whether it is still there, for who has reason to doubt
// it (a failed health check). Otherwise a neighbour that changes its Ethernet address without a word is noticed only
// when the kernel's own confidence has run out, some 30 to 60 s later by default.
func (w *Watcher) Suspect(destination netip.Addr) {
	w.mu.Lock()
	w.suspected = append(w.suspected, destination.Unmap())
	w.mu.Unlock()
	w.poke()
}

func (w *Watcher) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Lookup returns the next hop of a wanted destination; false for others.
func (w *Watcher) Lookup(destination netip.Addr) (NextHop, bool) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	h, ok := w.published[destination.Unmap()]
	return h, ok
}

// Snapshot returns the next hops of all wanted destinations, in order of Destination.
func (w *Watcher) Snapshot() []NextHop {
	w.mu.RLock()
	all := make([]NextHop, 0, len(w.published))
	for _, h := range w.published {
		all = append(all, h)
	}
	w.mu.RUnlock()
	sortNextHops(all)
	return all
}

// Ready is closed when no wanted destination is Resolving any more, or Options.ReadyAfter after Run's start.
func (w *Watcher) Ready() <-chan struct{} { return w.ready }

func sortNextHops(hops []NextHop) {
	slices.SortFunc(hops, func(a, b NextHop) int { return a.Destination.Compare(b.Destination) })
}

const (
	// Routes change in bursts, and a replaced one may be gone for a moment: look when the burst is over.
	settleTime = 30 * time.Millisecond
	// Where looking up all takes long, it may not take more than a tenth of the time.
	passShare = 10
	// Everything is looked up again this often: learnt path MTUs and redirects expire without news.
	refreshEvery = 30 * time.Second
	// Neighbours that are due are asked in batches.
	batchEvery = 50 * time.Millisecond
	batchSize  = 512
)

// Run watches until ctx ends, then takes back what it had the kernel keep resolved, closes the sockets and returns nil.
// It survives lost news (ENOBUFS) by reading everything anew. An error means that the kernel can't be listened to. It
// can be called once.
func (w *Watcher) Run(ctx context.Context) error {
	if !w.running.CompareAndSwap(false, true) {
		return errors.New("watch next hops: already run")
	}
	defer w.requests.close()

	incoming, done := make(chan news, 64), make(chan struct{})
	var receiver sync.WaitGroup
	receiver.Go(func() { receive(w.events, incoming, done) })
	defer func() {
		close(done)
		w.events.Close()
		receiver.Wait()
	}()

	t := newTable(w.requests, w.log)
	defer t.releaseAll()
	start := time.Now()
	if err := t.readLinks(); err != nil {
		return fmt.Errorf("read links: %w", err)
	}
	w.takeWanted(t)

	timer := time.NewTimer(0)
	defer timer.Stop()
	swept := false
	for {
		now := time.Now()
		t.work(now)
		w.publish(t.collect())
		if !swept && (now.Sub(start) >= w.readyAfter || !w.resolving()) {
			// Left-overs only now: the wanted ones among them are ours again.
			swept = true
			t.sweep()
			close(w.ready)
		}
		next := t.next(now)
		if !swept {
			next = earlier(next, start.Add(w.readyAfter))
		}
		timer.Reset(time.Until(next))

		select {
		case <-ctx.Done():
			return nil
		case <-w.wake:
			w.takeWanted(t)
		case <-timer.C:
		case n := <-incoming:
			for more := true; more; {
				if err := w.hear(t, n); err != nil {
					return err
				}
				select {
				case n = <-incoming:
				default:
					more = false
				}
			}
		}
	}
}

func (w *Watcher) hear(t *table, n news) error {
	switch {
	case n.err != nil:
		return fmt.Errorf("receive netlink news: %w", n.err)
	case n.lost:
		w.log.Warn("netlink news were lost, reading routes and neighbours anew", "what to do",
			"if it happens often, raise net.core.rmem_max")
		if err := t.readLinks(); err != nil {
			// The next refresh reads them again.
			w.log.Warn("read links", "error", err)
		}
		t.markAll(time.Now())
		t.checkAll()
	}
	for _, m := range n.messages {
		t.hear(m, time.Now())
	}
	return nil
}

func (w *Watcher) takeWanted(t *table) {
	w.mu.Lock()
	wanted, suspected := w.wanted, w.suspected
	w.suspected = nil
	w.mu.Unlock()
	t.setDestinations(wanted)
	for _, d := range suspected {
		t.suspect(d)
	}
}

// publish makes next hops visible and tells of those that differ from before.
func (w *Watcher) publish(hops []NextHop) {
	if len(hops) == 0 {
		return
	}
	var changed []NextHop
	w.mu.Lock()
	for _, h := range hops {
		was, ok := w.published[h.Destination]
		if !ok || was.equal(h) {
			continue // no longer wanted, or nothing new
		}
		w.published[h.Destination] = h
		changed = append(changed, h)
		w.log.Debug("next hop changed", "destination", h.Destination, "state", h.State, "interface", h.Interface,
			"mac", h.MAC, "gateway", h.Gateway, "source", h.Source, "reason", h.Reason, "before", was.State)
	}
	w.mu.Unlock()
	if len(changed) > 0 && w.onChange != nil {
		sortNextHops(changed)
		w.onChange(changed)
	}
}

func (w *Watcher) resolving() bool {
	w.mu.RLock()
	defer w.mu.RUnlock()
	for _, h := range w.published {
		if h.State == Resolving {
			return true
		}
	}
	return false
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
