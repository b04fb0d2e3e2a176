package neighbor

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	askAgain     = time.Second      // nobody answered: at first this often,
	askAgainMax  = 5 * time.Second  // and at last
	checkEvery   = 5 * time.Second  // an entry that we keep fresh ourselves
	trustManaged = 30 * time.Second // an entry that the kernel keeps fresh, or that nobody may
	// A lost entry is asked for again when the burst of news it came in is over: the device may be going down.
	askLost = 2 * settleTime
)

// target is a wanted destination.
type target struct {
	ip     netip.Addr
	looked bool // route holds an answer
	dirty  bool // look the route up again
	stale  bool // collect it
	next   NextHop
	via    *neighbor // nil: nothing to resolve
}

// neighbor is an entry of the kernel's that targets need.
type neighbor struct {
	key    entryKey
	users  map[*target]struct{}
	mac    [6]byte // the last one known
	hasMAC bool
	asked  bool  // told the kernel to keep the entry fresh
	sought bool  // asked everyone, and nobody has answered since
	failed bool  // and the kernel has given up on that
	err    error // of asking
	wait   time.Duration
	due    time.Time // of the next check
}

// table is what Run knows; only its goroutine touches it.
type table struct {
	kernel    kernel
	log       *slog.Logger
	links     map[int]link
	targets   map[netip.Addr]*target
	neighbors map[entryKey]*neighbor

	passAt    time.Time // when to look up dirty targets; zero: none
	earliest  time.Time // no pass before
	refreshAt time.Time
}

// kernel is what the table asks; *requests is it.
type kernel interface {
	links() (map[int]link, error)
	route(ip netip.Addr, index int) (route, error)
	entry(entryKey) (entry, error)
	entries(func(entryKey, entry)) error
	ask(entryKey, entry) error
	verify(entryKey, entry) error
	release(entryKey) error
}

func newTable(k kernel, log *slog.Logger) *table {
	return &table{kernel: k, log: log, links: map[int]link{}, targets: map[netip.Addr]*target{},
		neighbors: map[entryKey]*neighbor{}}
}

func (t *table) readLinks() error {
	links, err := t.kernel.links()
	if err == nil {
		t.links = links
	}
	return err
}

func (t *table) setDestinations(wanted map[netip.Addr]struct{}) {
	for ip, d := range t.targets {
		if _, ok := wanted[ip]; !ok {
			t.attach(d, nil)
			delete(t.targets, ip)
		}
	}
	for ip := range wanted {
		if t.targets[ip] == nil {
			t.targets[ip] = &target{ip: ip, dirty: true}
			t.passAt = time.Now() // at once: there is no burst to wait for
			t.earliest = time.Time{}
		}
	}
}

func (t *table) suspect(ip netip.Addr) {
	d := t.targets[ip]
	if d == nil || d.via == nil {
		return
	}
	n := d.via
	n.due = time.Time{}
	n.asked = false // verify takes the managed flag away
	// A proof a moment ago is no proof now, so the entry's own state is passed over; others' fixed entries are not.
	if e, err := t.kernel.entry(n.key); err == nil && e.usable() && e.state&unaskedStates == 0 {
		n.err = t.kernel.verify(n.key, e)
	}
}

// markAll has every target looked up again.
func (t *table) markAll(now time.Time) {
	for _, d := range t.targets {
		d.dirty = true
	}
	t.schedulePass(now)
}

func (t *table) mark(now time.Time, concerned func(netip.Addr) bool) {
	found := false
	for ip, d := range t.targets {
		if !d.dirty && concerned(ip) {
			d.dirty, found = true, true
		}
	}
	if found {
		t.schedulePass(now)
	}
}

func (t *table) schedulePass(now time.Time) {
	if t.passAt.IsZero() {
		t.passAt = now.Add(settleTime)
		if t.passAt.Before(t.earliest) {
			t.passAt = t.earliest
		}
	}
}

// checkAll has every neighbour's entry read again.
func (t *table) checkAll() {
	for _, n := range t.neighbors {
		n.due = time.Time{}
	}
}

// hear takes one piece of news from the kernel.
func (t *table) hear(m syscall.NetlinkMessage, now time.Time) {
	switch m.Header.Type {
	case unix.RTM_NEWLINK:
		if l, ok := decodeLink(m.Data); ok && t.links[l.index] != l {
			t.links[l.index] = l
			t.markAll(now) // IPv4 routes vanish with their device without news of their own
		}
	case unix.RTM_DELLINK:
		if l, ok := decodeLink(m.Data); ok {
			delete(t.links, l.index)
			t.markAll(now)
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if p, ok := decodeRoutePrefix(m.Data); ok {
			t.mark(now, func(ip netip.Addr) bool { return p.Contains(ip.WithZone("")) })
		}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.RTM_NEWRULE, unix.RTM_DELRULE:
		if len(m.Data) > 0 {
			v4 := m.Data[0] == unix.AF_INET
			t.mark(now, func(ip netip.Addr) bool { return ip.Is4() == v4 })
		}
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		t.markAll(now)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		key, e, ok := decodeEntry(m.Data)
		n := t.neighbors[key]
		if !ok || n == nil {
			return
		}
		if m.Header.Type == unix.RTM_DELNEIGH {
			n.due = earlier(n.due, now.Add(askLost))
			e = entry{}
		}
		t.note(n, e)
		switch {
		case e.state&netlink.NUD_FAILED != 0 && !n.failed:
			n.due = now
		case e.state&netlink.NUD_STALE != 0 && !e.managed:
			n.due = earlier(n.due, now.Add(rand.N(time.Second)))
		}
	}
}

// note takes in what the kernel says of an entry. Only an answer changes the verdict here: an entry that is dropped or
// asked for again doesn't take a good next hop away.
func (t *table) note(n *neighbor, e entry) {
	if !e.usable() {
		return
	}
	if n.hasMAC && n.mac != e.mac {
		t.log.Info("neighbour has another Ethernet address", "neighbour", n.key.ip, "interface", t.links[n.key.index].name,
			"mac", hardwareAddr(e.mac), "before", hardwareAddr(n.mac))
	}
	if !n.hasMAC || n.mac != e.mac || n.failed || n.err != nil {
		n.touch()
	}
	n.mac, n.hasMAC, n.sought, n.failed, n.err, n.wait = e.mac, true, false, false, nil, 0
}

func (n *neighbor) touch() {
	for d := range n.users {
		d.stale = true
	}
}

// next says when work has something to do.
func (t *table) next(now time.Time) time.Time {
	due := t.refreshAt
	for _, n := range t.neighbors {
		due = earlier(due, n.due)
	}
	// In batches, so that thousands of neighbours aren't thousands of wake-ups.
	if soon := now.Add(batchEvery); due.Before(soon) {
		due = soon
	}
	if !t.passAt.IsZero() {
		due = earlier(due, t.passAt)
	}
	return due
}

// work does what is due.
func (t *table) work(now time.Time) {
	if !now.Before(t.refreshAt) {
		if !t.refreshAt.IsZero() {
			if err := t.readLinks(); err != nil {
				t.log.Warn("read links", "error", err)
			}
			t.markAll(now)
		}
		t.refreshAt = now.Add(refreshEvery)
	}
	if !t.passAt.IsZero() && !now.Before(t.passAt) {
		t.passAt = time.Time{}
		for _, d := range t.targets {
			if d.dirty {
				d.dirty = false
				t.resolve(d)
			}
		}
		t.earliest = now.Add(time.Since(now) * passShare)
	}
	budget := batchSize
	for _, n := range t.neighbors {
		if now.Before(n.due) {
			continue
		}
		if budget--; budget < 0 {
			break
		}
		t.check(n, now)
	}
}

// resolve looks up a target's route and device and says which neighbour it needs.
func (t *table) resolve(d *target) {
	d.looked, d.stale = true, true
	h, key := t.look(d.ip)
	d.next = h
	if !key.ip.IsValid() {
		t.attach(d, nil)
		return
	}
	n := t.neighbors[key]
	if n == nil {
		n = &neighbor{key: key, users: map[*target]struct{}{}}
		t.neighbors[key] = n
	}
	t.attach(d, n)
}

// look returns what is known without a neighbour, and the neighbour that is needed, or none with State and Reason set.
func (t *table) look(ip netip.Addr) (NextHop, entryKey) {
	h := NextHop{Destination: ip}
	end := func(s State, format string, args ...any) (NextHop, entryKey) {
		h.State, h.Reason = s, fmt.Sprintf(format, args...)
		return h, entryKey{}
	}
	if ip.IsUnspecified() || ip.IsMulticast() {
		return end(Unsuitable, "%s is not the address of one host", ip)
	}
	index := 0
	if zone := ip.Zone(); zone != "" {
		if index = t.linkNamed(zone); index == 0 {
			return end(Unreachable, "no interface named %s", zone)
		}
	} else if ip.Is6() && ip.IsLinkLocalUnicast() {
		return end(Unsuitable, "link-local address %s needs an interface (%s%%eth0)", ip, ip)
	}
	r, err := t.kernel.route(ip.WithZone(""), index)
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETDOWN):
		return end(Unreachable, "no route to %s", ip)
	case errors.Is(err, unix.EACCES), r.kind == unix.RTN_PROHIBIT:
		return end(Unreachable, "the route to %s is of type prohibit", ip)
	case errors.Is(err, unix.EINVAL), r.kind == unix.RTN_BLACKHOLE:
		return end(Unreachable, "the route to %s is of type blackhole", ip)
	case r.kind == unix.RTN_UNREACHABLE:
		return end(Unreachable, "the route to %s is of type unreachable", ip)
	case err != nil:
		return end(Unreachable, "look up route to %s: %v", ip, err)
	case r.kind == unix.RTN_LOCAL, r.kind == unix.RTN_ANYCAST:
		return end(Unsuitable, "%s is an address of this host", ip)
	case r.kind != unix.RTN_UNICAST:
		return end(Unsuitable, "%s is not the address of one host (a broadcast address?)", ip)
	}

	h.Source, h.Gateway, h.OnLink = r.source, r.gateway, !r.gateway.IsValid()
	e, err := resolveEgress(t.links, r.index)
	h.Interface, h.Index, h.RouteInterface = e.device.name, e.device.index, e.route.name
	h.VLAN, h.VLANProtocols = e.vlan, e.vlanTypes
	if h.MTU = e.route.mtu; r.mtu > 0 {
		h.MTU = min(h.MTU, r.mtu)
	}
	if e.route.hasMAC {
		h.SourceMAC = hardwareAddr(e.route.mac)
	}
	var down errDown
	switch {
	case errors.As(err, &down):
		return end(Unreachable, "%v", err)
	case err != nil:
		return end(Unsuitable, "%v", err)
	case r.encap:
		return end(Unsuitable, "the route to %s encapsulates (encap …), which XDP would pass over", ip)
	}
	key := entryKey{e.route.index, ip.WithZone("")}
	if !h.OnLink {
		key.ip = r.gateway
	}
	return h, key
}

func (t *table) linkNamed(name string) int {
	for index, l := range t.links {
		if l.name == name {
			return index
		}
	}
	if index, err := strconv.Atoi(name); err == nil && t.links[index].index != 0 {
		return index
	}
	return 0
}

// attach makes n the neighbour of d, and lets go of one that nobody needs any more.
func (t *table) attach(d *target, n *neighbor) {
	if d.via == n {
		return
	}
	if old := d.via; old != nil {
		delete(old.users, d)
		if len(old.users) == 0 {
			delete(t.neighbors, old.key)
			t.release(old.key)
		}
	}
	if d.via = n; n != nil {
		n.users[d] = struct{}{}
	}
}

// check reads a neighbour's entry and has the kernel ask where nothing else keeps it fresh.
func (t *table) check(n *neighbor, now time.Time) {
	e, err := t.kernel.entry(n.key)
	if err != nil {
		t.log.Debug("read neighbour entry", "neighbour", n.key.ip, "error", err)
	}
	t.note(n, e)
	again := checkEvery
	ask := false
	switch {
	case e.usable() && (e.state&unaskedStates != 0 || e.learned || e.managed):
		again = trustManaged
	case e.usable():
		// Asked once even if fresh, for the managed flag. Where the kernel doesn't know it, whenever it goes stale.
		ask = !n.asked || e.state&netlink.NUD_STALE != 0
	default:
		// The kernel gives up on an entry after asking its old Ethernet address alone, and when somebody deletes it. The
		// verdict falls when everyone was asked after that, and by the entry itself: news may be older than our asking.
		if e.state&netlink.NUD_FAILED != 0 && n.sought && !n.failed {
			n.failed = true
			n.touch()
		}
		ask = true
		if n.wait += askAgain; n.wait > askAgainMax {
			n.wait = askAgainMax
		}
		again = n.wait
	}
	if ask {
		err := t.kernel.ask(n.key, e)
		n.asked = err == nil
		n.sought = n.asked && !e.usable()
		if (err == nil) != (n.err == nil) || err != nil && err.Error() != n.err.Error() {
			n.touch()
		}
		n.err = err
	}
	// A fifth of jitter keeps neighbours that came together from being asked together for ever.
	n.due = now.Add(again - rand.N(again/5))
}

// collect returns the next hops of the targets that something happened to.
func (t *table) collect() []NextHop {
	var hops []NextHop
	for _, d := range t.targets {
		if !d.looked || !d.stale {
			continue
		}
		d.stale = false
		h := d.next
		if n := d.via; n != nil {
			t.judge(&h, n)
		}
		hops = append(hops, h)
	}
	return hops
}

func (t *table) judge(h *NextHop, n *neighbor) {
	if n.hasMAC {
		h.MAC = hardwareAddr(n.mac)
	}
	protocol := "ARP"
	if n.key.ip.Is6() {
		protocol = "NDP"
	}
	whom := fmt.Sprintf("%s on %s for %s", protocol, h.RouteInterface, n.key.ip)
	if !h.OnLink {
		whom += fmt.Sprintf(" (gateway to %s)", h.Destination)
	}
	switch {
	case n.failed:
		h.State, h.Reason = Failed, "no answer to "+whom
	case n.hasMAC:
		h.State = Resolved
	default:
		h.State, h.Reason = Resolving, "waiting for an answer to "+whom
	}
	if n.err != nil && h.State != Resolved {
		h.Reason = "can't ask by " + whom + ": " + explainAsk(n.err, n.key.ip)
	}
}

func explainAsk(err error, ip netip.Addr) string {
	switch {
	case errors.Is(err, unix.ENOBUFS):
		family := "ipv4"
		if ip.Is6() {
			family = "ipv6"
		}
		return fmt.Sprintf("the kernel's neighbour table is full, raise net.%s.neigh.default.gc_thresh3", family)
	case errors.Is(err, unix.EPERM):
		return "CAP_NET_ADMIN is missing"
	}
	return err.Error()
}

func (t *table) release(key entryKey) {
	if err := t.kernel.release(key); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EPERM) {
		t.log.Debug("release neighbour entry", "neighbour", key.ip, "error", err)
	}
}

// releaseAll takes back all that the kernel was to keep resolved.
func (t *table) releaseAll() {
	for key := range t.neighbors {
		t.release(key)
	}
}

// sweep takes back what a Watcher that was killed had the kernel keep, as far as it isn't wanted now.
func (t *table) sweep() {
	var left []entryKey
	err := t.kernel.entries(func(key entryKey, e entry) {
		if e.managed && e.protocol == neighborProtocol && t.neighbors[key] == nil {
			left = append(left, key)
		}
	})
	if err != nil {
		t.log.Warn("read neighbour entries", "error", err)
	}
	for _, key := range left {
		t.release(key)
	}
}
