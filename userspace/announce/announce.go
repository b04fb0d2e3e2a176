// Package announce decides when an address of XDP's own may be answered for, and says so to the segment. Before an
// address is owned, everyone on every interface is asked whether it is theirs (IPv4: RFC 5227; IPv6: duplicate address
// detection, RFC 4862, 5.4); then it is announced, and from then on defended. It speaks by packet sockets and knows
// nothing of XDP, which answers ARP and NDP for what is owned: such requests end there. What comes up here is all the
// rest, other hosts' use of our addresses above all.
package announce

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

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Options are what New takes; the zero value will do.
type Options struct {
	// Logger; default: none.
	Logger *slog.Logger
	// OnChange is called with all addresses that may be answered for now, in order: once when the first Set has been
	// taken in, then on each change. It is called from Run's goroutine, without locks held. Announcements follow when it
	// has returned, so it returns when XDP answers.
	OnChange func(owned []netip.Addr)
	// Timing; default, for each that is zero: see there.
	Timing Timing
	// Namespace is the network namespace to work in; default (zero or netns.None()): the calling thread's. It is needed
	// only during New.
	Namespace netns.NsHandle
}

// Timing holds the times of RFC 5227, 1.1, by its names. With the RFC's own a start would take four to seven seconds:
// they are for any link there is, among them slow ones. Its section 2.2 has shorter ones in mind for faster links, and
// those that carry XDP are such: an answer takes less than a millisecond there. Ours take 0.7 to 1 s in all, and IPv6
// is asked in the same way: three times in that second instead of once, against loss.
type Timing struct {
	ProbeWait        time.Duration // at most so long until the first probe; default: 100 ms
	ProbeMin         time.Duration // at least so long between probes; default: 200 ms
	ProbeMax         time.Duration // and at most; default: 300 ms
	AnnounceWait     time.Duration // for answers to the last probe; default: 300 ms
	AnnounceInterval time.Duration // between announcements; default: 2 s, the RFC's
	DefendInterval   time.Duration // at least so long between defences; default: 10 s, the RFC's
	// Retry is when to ask again for an address that another host has, give or take a fifth; default: 30 s.
	Retry time.Duration
}

func (t Timing) orDefault() Timing {
	for _, d := range []struct {
		value *time.Duration
		or    time.Duration
	}{
		{&t.ProbeWait, 100 * time.Millisecond}, {&t.ProbeMin, 200 * time.Millisecond},
		{&t.ProbeMax, max(300*time.Millisecond, t.ProbeMin)}, {&t.AnnounceWait, 300 * time.Millisecond},
		{&t.AnnounceInterval, 2 * time.Second}, {&t.DefendInterval, 10 * time.Second}, {&t.Retry, 30 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.or
		}
	}
	return t
}

// Wanted is what is to be owned.
type Wanted struct {
	// Addresses to own; a link-local IPv6 address carries its interface as zone. Invalid, unspecified and multicast ones
	// are left out.
	Addresses []netip.Addr
	// Interfaces to own them on: those that XDP is attached to, and VLAN devices above them whose frames it answers.
	Interfaces []string
	// Adopt are addresses that were answered for before this process started. Those that are wanted are owned at once,
	// and announced without asking; of the others, the solicited-node groups are left.
	Adopt []netip.Addr
}

// Announcer owns addresses while Run runs. Its methods may be called from any goroutine.
type Announcer struct {
	log      *slog.Logger
	onChange func([]netip.Addr)
	timing   Timing
	arp, ndp *packetSocket
	handle   *netlink.Handle
	events   *nl.NetlinkSocket
	running  atomic.Bool
	wake     chan struct{} // what is wanted has changed; holds one
	ready    chan struct{}
	// interesting are the addresses that Run needs to be woken for.
	interesting atomic.Pointer[map[netip.Addr]struct{}]

	mu     sync.Mutex
	wanted *Wanted // not taken in yet
	states []State
}

// New opens an Announcer's sockets in the namespace. It takes CAP_NET_RAW, and to join solicited-node groups
// CAP_NET_ADMIN, in the namespace's owner.
func New(opts Options) (*Announcer, error) {
	a := &Announcer{log: opts.Logger, onChange: opts.OnChange, timing: opts.Timing.orDefault(),
		wake: make(chan struct{}, 1), ready: make(chan struct{})}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.onChange == nil {
		a.onChange = func([]netip.Addr) {}
	}
	a.interesting.Store(&map[netip.Addr]struct{}{})
	ns := opts.Namespace
	if ns == 0 {
		ns = netns.None()
	}
	if err := a.open(ns); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

func (a *Announcer) open(ns netns.NsHandle) error {
	err := inNamespace(ns, func() (err error) {
		if a.arp, err = openPacketSocket(unix.ETH_P_ARP); err == nil {
			a.ndp, err = openPacketSocket(unix.ETH_P_IPV6)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("open packet socket to announce addresses: %w", err)
	}
	if a.handle, err = netlink.NewHandleAt(ns, unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink socket to announce addresses: %w", err)
	}
	// The kernel answers at once; this only keeps Run from hanging.
	if err := a.handle.SetSocketTimeout(2 * time.Second); err != nil {
		return fmt.Errorf("set netlink timeout: %w", err)
	}
	if a.events, err = nl.SubscribeAt(ns, netns.None(), unix.NETLINK_ROUTE, newsGroups...); err != nil {
		return fmt.Errorf("subscribe to links and addresses: %w", err)
	}
	return nil
}

func (a *Announcer) close() {
	if a.arp != nil {
		a.arp.close()
	}
	if a.ndp != nil {
		a.ndp.close()
	}
	if a.handle != nil {
		a.handle.Close()
	}
	if a.events != nil {
		a.events.Close()
	}
}

// Set says what is wanted, instead of what was before. Addresses that others have are asked for again at once. Before
// Run it only notes it.
func (a *Announcer) Set(w Wanted) {
	var addresses []netip.Addr
	for _, address := range w.Addresses {
		if address = address.Unmap(); address.IsValid() && !address.IsUnspecified() && !address.IsMulticast() {
			addresses = append(addresses, address)
		}
	}
	var adopt []netip.Addr
	for _, address := range w.Adopt {
		if address.IsValid() {
			adopt = append(adopt, address.Unmap())
		}
	}
	interfaces := slices.Clone(w.Interfaces)
	slices.Sort(interfaces)
	taken := Wanted{Addresses: addresses, Interfaces: slices.Compact(interfaces), Adopt: adopt}
	a.mu.Lock()
	if a.wanted != nil {
		taken.Adopt = append(taken.Adopt, a.wanted.Adopt...) // of a Set that nobody has seen
	}
	a.wanted = &taken
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Ready is closed when of everything wanted at the first Set it is known whether it can be owned: it is, or another
// host or the host itself has it, or no interface is up to ask on. It takes about a second.
func (a *Announcer) Ready() <-chan struct{} { return a.ready }

// States returns how it stands with every wanted address on every interface, in order of both.
func (a *Announcer) States() []State {
	a.mu.Lock()
	defer a.mu.Unlock()
	states := slices.Clone(a.states)
	for i := range states {
		states[i].Other = slices.Clone(states[i].Other)
	}
	return states
}

// send, member and listen are what the table does to the world.
func (a *Announcer) send(index int, frame []byte) error {
	for _, s := range []*packetSocket{a.arp, a.ndp} {
		if protocolOf(frame) == s.protocol {
			return s.send(index, frame)
		}
	}
	return unix.EPROTONOSUPPORT
}

func (a *Announcer) member(name string, group mac, add bool) error {
	return a.ndp.control(func(fd int) error { return membership(fd, name, group, add) })
}

func (a *Announcer) listen(indexes4, indexes6 []int) error {
	return errors.Join(a.arp.listen(indexes4), a.ndp.listen(indexes6))
}

// heard is a message and where it came in.
type heard struct {
	index int
	message
}

// Run owns what is wanted until ctx ends, then returns nil. What is owned then stays so: nobody is told otherwise, and
// the solicited-node groups stay joined, for XDP goes on answering. An error means that there is no listening. It can
// be called once.
func (a *Announcer) Run(ctx context.Context) error {
	if !a.running.CompareAndSwap(false, true) {
		return errors.New("announce addresses: already run")
	}
	incoming, frames, failed := make(chan news, 16), make(chan heard, 64), make(chan error, 2)
	done := make(chan struct{})
	var receivers sync.WaitGroup
	receivers.Go(func() { receiveNews(a.events, incoming, done) })
	for _, s := range []*packetSocket{a.arp, a.ndp} {
		receivers.Go(func() {
			err := s.receive(func(index int, frame []byte) {
				m, ok := parse(frame)
				if _, wanted := (*a.interesting.Load())[m.address]; !ok || !wanted && m.kind != queried {
					return
				}
				select {
				case frames <- heard{index, m}:
				case <-done:
				}
			})
			if err != nil {
				failed <- fmt.Errorf("receive from packet socket: %w", err)
			}
		})
	}
	defer func() {
		close(done)
		a.close()
		receivers.Wait()
	}()

	t := newTable(a, a.log, a.timing)
	h, err := readHost(a.handle)
	if err != nil {
		return err
	}
	if err := t.see(h, time.Now()); err != nil {
		return err
	}
	var look, earliest time.Time // when to read links and addresses again; not before
	var told []netip.Addr
	var first map[netip.Addr]struct{} // wanted at the first Set, and not decided yet
	ready := false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		if due(look, now) {
			look = time.Time{}
			if h, err := readHost(a.handle); err != nil {
				a.log.Warn("read links and addresses", "error", err)
				look = now.Add(time.Second)
			} else if err := t.see(h, now); err != nil {
				return err
			}
			earliest = now.Add(time.Since(now) * readShare)
		}
		if w := a.takeWanted(); w != nil {
			if err := t.take(*w, now); err != nil {
				return err
			}
			addresses := make(map[netip.Addr]struct{}, len(t.claims))
			for address := range t.claims {
				addresses[address.WithZone("")] = struct{}{}
			}
			a.interesting.Store(&addresses)
			if first == nil {
				first = map[netip.Addr]struct{}{}
				for address := range t.claims {
					first[address] = struct{}{}
				}
			}
		}
		t.advance(now)
		a.publish(t)
		if first != nil {
			if owned := t.owned(); told == nil || !slices.Equal(told, owned) {
				told = owned
				a.onChange(slices.Clone(owned))
			}
			t.transmit(now)
			for address := range first {
				if c := t.claims[address]; c == nil || c.decided() {
					delete(first, address)
				}
			}
			if len(first) == 0 && !ready {
				ready = true
				close(a.ready)
			}
		}
		next := t.next()
		if next.IsZero() || !look.IsZero() && look.Before(next) {
			next = look
		}
		if next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}

		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-a.wake:
		case <-timer.C:
		case f := <-frames:
			for more := true; more; {
				t.hear(f.index, f.message, time.Now())
				select {
				case f = <-frames:
				default:
					more = false
				}
			}
		case n := <-incoming:
			if n.err != nil {
				return fmt.Errorf("receive netlink news: %w", n.err)
			}
			t.bounce(n)
			if look.IsZero() {
				if look = time.Now().Add(settleTime); look.Before(earliest) {
					look = earliest
				}
			}
		}
	}
}

func (a *Announcer) takeWanted() *Wanted {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.wanted
	a.wanted = nil
	return w
}
