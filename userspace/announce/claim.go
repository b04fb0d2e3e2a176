package announce

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	probes        = 3 // PROBE_NUM of RFC 5227, 1.1
	announcements = 2 // ANNOUNCE_NUM
	// So often may another host probe at the same time as we until it counts as one that has the address.
	maxCollisions = 4
)

// claim is an address that is wanted.
type claim struct {
	address netip.Addr
	holder  string // the host's own interface that has it
	owned   bool
	ports   []*port

	// Not asked before, because somebody has it, or because somebody else asked at the same time (collided).
	retry      time.Time
	collided   bool
	collisions int
	counted    time.Time // the last of them
}

// port is a claim on one interface.
type port struct {
	claim *claim
	name  string
	link  link // as last seen
	there bool

	probing bool
	sent    int
	due     time.Time // of the next probe or, after the last one, of the end
	clear   bool      // nobody there has it: it may be announced
	failed  string    // why the last frame could not be sent

	// Of another host that has it, or asks for it as well.
	other    mac
	hasOther bool
	heard    time.Time // from it, last
	retry    time.Time // where the address is ours already but not clear here

	left     int       // announcements
	announce time.Time // when
	defend   time.Time // when to tell that it's ours; zero: no need to
	defended time.Time
}

// portKey finds a port by what is heard. A link-local address may be wanted once per interface.
type portKey struct {
	name    string
	address netip.Addr // no zone
}

// wire is how frames leave.
type wire interface {
	send(index int, frame []byte) error
	member(name string, group mac, add bool) error
	listen(indexes4, indexes6 []int) error
}

// table is what Run knows; only its goroutine touches it.
type table struct {
	wire   wire
	log    *slog.Logger
	timing Timing

	host       *host
	interfaces []string
	claims     map[netip.Addr]*claim
	ports      map[portKey]*port
	indexes    map[int][]string // the interfaces that are heard by an index: itself, or a bridge's or bond's ports
	listening  string           // what the sockets were told last
	bounced    map[int]struct{} // since the last look
	joined     map[groupKey]struct{}
	left       []groupKey // to leave once nobody is answered any more
	listeners  map[string]*listener
}

func newTable(w wire, log *slog.Logger, timing Timing) *table {
	return &table{wire: w, log: log, timing: timing, claims: map[netip.Addr]*claim{}, ports: map[portKey]*port{},
		indexes: map[int][]string{}, bounced: map[int]struct{}{}, joined: map[groupKey]struct{}{},
		listeners: map[string]*listener{}}
}

// between is a random time from least to most.
func between(least, most time.Duration) time.Duration {
	if most <= least {
		return least
	}
	return least + rand.N(most-least+1)
}

// round is the longest time that probing takes.
func (t *table) round() time.Duration {
	return t.timing.ProbeWait + (probes-1)*t.timing.ProbeMax + t.timing.AnnounceWait
}

// later is when to ask again for what is taken: hosts that wait for the same address must not do so in step.
func (t *table) later(now time.Time) time.Time {
	return now.Add(between(t.timing.Retry*4/5, t.timing.Retry*6/5))
}

// soon is when to ask again after the nth collision on end. Who comes first is heard by the others before they ask;
// where the machine is too busy for that, there is twice the room the next time.
func (t *table) soon(now time.Time, n int) time.Time {
	return now.Add(between(t.round(), t.round()+t.round()<<max(0, n-1)))
}

// take makes w what is wanted.
func (t *table) take(w Wanted, now time.Time) error {
	t.interfaces = w.Interfaces
	for address, c := range t.claims {
		if !slices.Contains(w.Addresses, address) {
			delete(t.claims, address)
			if c.owned {
				t.log.Info("address is given up", "address", address)
			}
		}
	}
	for _, address := range w.Addresses {
		if t.claims[address] == nil {
			t.claims[address] = &claim{address: address, owned: slices.Contains(w.Adopt, address)}
		}
	}
	// What an earlier process owned it has joined the groups of: left, unless they are wanted again.
	for _, address := range w.Adopt {
		for _, name := range t.interfaces {
			if l, ok := t.host.links[name]; ok && address.Is6() {
				t.left = append(t.left, groupKey{name, l.index, solicitedNode(address)})
			}
		}
	}
	// Who has found a conflict and put it right reloads: no need to wait.
	for _, c := range t.claims {
		if !c.retry.IsZero() && !c.collided {
			c.retry = now
		}
		for _, p := range c.ports {
			if !p.retry.IsZero() {
				p.retry = now
			}
		}
	}
	return t.follow(now)
}

// see takes in what the kernel has now.
func (t *table) see(h *host, now time.Time) error {
	t.host = h
	return t.follow(now)
}

// follow fits claims to what is wanted and what the kernel has.
func (t *table) follow(now time.Time) error {
	clear(t.ports)
	for _, c := range t.claims {
		t.hold(c)
		was, fresh := c.ports, c.ports == nil
		c.ports = []*port{}
		for _, name := range t.interfaces {
			if zone := c.address.Zone(); zone != "" && zone != name {
				continue
			}
			var p *port
			if i := slices.IndexFunc(was, func(p *port) bool { return p.name == name }); i >= 0 {
				p = was[i]
			} else {
				p = &port{claim: c, name: name, clear: c.owned && fresh}
			}
			c.ports = append(c.ports, p)
			t.ports[portKey{name, c.address.WithZone("")}] = p
			t.followLink(p, now)
		}
	}
	clear(t.bounced)
	t.followGroups(now)
	return t.followIndexes()
}

// bounce takes note of interfaces that were down for a moment, if only for that.
func (t *table) bounce(n news) {
	for _, index := range n.bounced {
		t.bounced[index] = struct{}{}
	}
	if n.lost {
		for _, l := range t.host.links {
			t.bounced[l.index] = struct{}{}
		}
	}
}

// hold sees to addresses that the host's stack has, or has no more.
func (t *table) hold(c *claim) {
	holder := t.host.addresses[c.address]
	if holder == c.holder {
		return
	}
	if (holder == "") != (c.holder == "") {
		if holder != "" {
			t.log.Warn("address is the host's own: it is not answered for by XDP", "address", c.address, "interface", holder,
				"what to do", fmt.Sprintf("to have XDP own it, take it off: ip address del %s dev %s",
					c.address.WithZone(""), holder))
		} else {
			t.log.Info("address is not the host's own any more", "address", c.address, "interface", c.holder)
		}
		// Either way it begins anew: the ports see their links for the first time.
		*c = claim{address: c.address}
	}
	c.holder = holder
}

func (t *table) followLink(p *port, now time.Time) {
	c, was := p.claim, p.link
	wasUsable := p.there && was.usable()
	p.link, p.there = t.host.links[p.name]
	_, bounced := t.bounced[p.link.index]
	switch {
	case c.holder != "":
	case !p.there || !p.link.usable():
		p.probing = false
		p.hasOther = p.hasOther && p.clear
	case wasUsable && !bounced && was.index == p.link.index && was.mac == p.link.mac:
	case c.owned && p.clear:
		// The segment may have forgotten us, or learnt another port or Ethernet address. There is no asking again:
		// connections live by this address, and whoever has taken it meanwhile will be heard.
		p.left, p.announce = announcements, now
	case c.retry.IsZero() && p.retry.IsZero():
		t.probe(p, now)
	}
}

// probe starts asking.
func (t *table) probe(p *port, now time.Time) {
	p.probing, p.clear, p.sent = true, false, 0
	p.due = now.Add(between(0, t.timing.ProbeWait))
}

func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENETDOWN)
}

// followIndexes has the sockets hear the interfaces that somebody may answer on.
func (t *table) followIndexes() error {
	byIndex := map[int]link{}
	for _, l := range t.host.links {
		byIndex[l.index] = l
	}
	clear(t.indexes)
	var indexes [2][]int // IPv4, IPv6
	for _, name := range t.interfaces {
		l, ok := t.host.links[name]
		if !ok || l.silent {
			continue
		}
		var families [2]bool
		for _, c := range t.claims {
			families[family(c.address)] = true
		}
		// Frames that come in by a port of a bridge or bond are the bridge's by the time that sockets hear them.
		for depth := 0; ok && depth < 4; depth++ {
			t.indexes[l.index] = append(t.indexes[l.index], name)
			for f, wanted := range families {
				if wanted && !slices.Contains(indexes[f], l.index) {
					indexes[f] = append(indexes[f], l.index)
				}
			}
			l, ok = byIndex[l.master]
		}
	}
	slices.Sort(indexes[0])
	slices.Sort(indexes[1])
	now := fmt.Sprint(indexes)
	if now == t.listening {
		return nil
	}
	if err := t.wire.listen(indexes[0], indexes[1]); err != nil {
		return fmt.Errorf("listen for other hosts' use of addresses: %w", err)
	}
	t.listening = now
	return nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// hear takes in a message that came in by the interface of this index.
func (t *table) hear(index int, m message, now time.Time) {
	names := t.indexes[index]
	if m.kind == queried {
		for _, name := range names {
			t.query(name, m, now)
		}
		return
	}
	if _, ours := t.host.macs[m.host]; ours {
		return // by a loop, or another interface on the same segment
	}
	for _, name := range names {
		p := t.ports[portKey{name, m.address}]
		switch {
		case p == nil || p.claim.holder != "" || !p.link.usable():
		case m.kind == used:
			t.used(p, m.host, now)
		default:
			t.probed(p, m.host, now)
		}
	}
}

// note keeps who else has the address, or asks for it; true: it wasn't known.
func (p *port) note(host mac, now time.Time) bool {
	known := p.hasOther && p.other == host
	p.other, p.hasOther, p.heard = host, true, now
	return !known
}

// used: another host has the address.
func (t *table) used(p *port, host mac, now time.Time) {
	c := p.claim
	if c.owned && p.clear {
		// RFC 5227, 2.4, leaves the choice: (a) give it up, (b) defend once, (c) never give up. Giving up would cut every
		// living connection, here and now, for what may be one stray packet; a forwarder's address is what its clients
		// know it by, so it is (c), with what (c) asks for: one announcement in DefendInterval and no more. Where the
		// other spoke again meanwhile, ours follows when the time is over, so that its word is not the segment's last.
		p.note(host, now)
		if p.defend.IsZero() {
			p.defend = now
			if next := p.defended.Add(t.timing.DefendInterval); next.After(now) {
				p.defend = next
			}
		}
		return
	}
	if p.note(host, now) || c.collided {
		t.log.Warn("address is in use by another host: it is not announced", "address", c.address, "interface", p.name,
			"mac", host, "what to do", "take the address off that host, or give the service another one",
			"asked again every", t.timing.Retry)
	}
	p.probing = false
	if c.owned {
		// An interface that came later: the address is ours by others, whose connections stay.
		if p.retry.IsZero() {
			p.retry = t.later(now)
		}
		return
	}
	t.pause(c)
	if c.retry.IsZero() || c.collided {
		c.retry, c.collided, c.collisions = t.later(now), false, 0
	}
}

// probed: another host asks whether it may have the address.
func (t *table) probed(p *port, host mac, now time.Time) {
	c := p.claim
	switch {
	case c.owned && p.clear:
		// XDP answers these, and they end there. One that got here came before XDP had heard that the address is its own,
		// or while its program was away; left unanswered, two would have it.
		t.send(p, answerFrame(p.link.mac, c.address, host))
	case c.owned:
		if p.probing {
			p.probing, p.retry = false, t.soon(now, 1)
		}
	case !c.retry.IsZero() && !c.collided:
		// Somebody has it, and tells that one, too.
	default:
		// RFC 5227, 2.1.1: neither may take it. Who was heard first goes on, since who hears stops asking; where both were
		// heard at the same time, chance decides.
		p.note(host, now)
		t.pause(c)
		again := now.Sub(c.counted) <= t.round() // the same asking
		if !again {
			c.collisions, c.counted = c.collisions+1, now
		}
		c.retry, c.collided = t.soon(now, c.collisions), true
		if again {
			return
		}
		if c.collisions < maxCollisions {
			t.log.Info("another host asks for the address at the same time: stepping back", "address", c.address,
				"interface", p.name, "mac", host)
			return
		}
		c.retry, c.collided, c.collisions = t.later(now), false, 0
		t.log.Warn("another host keeps asking for the address: it is not announced", "address", c.address,
			"interface", p.name, "mac", host, "what to do", "take the address off that host, or give the service another one",
			"asked again every", t.timing.Retry)
	}
}

// pause stops asking on all interfaces: an address is owned on all or on none.
func (t *table) pause(c *claim) {
	for _, p := range c.ports {
		p.probing, p.clear = false, false
	}
}

func due(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

// advance does what is due, but for what must wait until the change of what is owned was told.
func (t *table) advance(now time.Time) {
	for _, c := range t.claims {
		if c.holder != "" {
			continue
		}
		if due(c.retry, now) {
			c.retry = time.Time{}
			for _, p := range c.ports {
				if p.link.usable() {
					t.probe(p, now)
				}
			}
		}
		for _, p := range c.ports {
			if due(p.retry, now) {
				p.retry = time.Time{}
				if p.link.usable() {
					t.probe(p, now)
				}
			}
			if p.probing && due(p.due, now) {
				t.step(p, now)
			}
			if p.clear && p.hasOther && due(p.heard.Add(t.timing.Retry), now) {
				t.log.Info("nothing more is heard of the other host with our address", "address", c.address, "interface", p.name,
					"mac", p.other)
				p.hasOther = false
			}
		}
		t.decide(c, now)
	}
}

// step sends the next probe, or ends the asking.
func (t *table) step(p *port, now time.Time) {
	switch {
	case p.sent < probes:
		// A probe that could not be sent has asked nobody.
		if t.send(p, probeFrame(p.link.mac, p.claim.address)) {
			p.sent++
		}
		p.due = now.Add(between(t.timing.ProbeMin, t.timing.ProbeMax))
		if p.sent == probes {
			p.due = now.Add(t.timing.AnnounceWait)
		}
	default:
		p.probing, p.clear, p.hasOther = false, true, false
		if p.claim.owned {
			t.log.Info("address is free on this interface, too", "address", p.claim.address, "interface", p.name)
			p.left, p.announce = announcements, now
		}
	}
}

// decide makes an address ours when nobody has it on any interface. One that is down can't be asked; it is when it
// comes.
func (t *table) decide(c *claim, now time.Time) {
	if c.owned || !c.retry.IsZero() {
		return
	}
	clear, silent, down := 0, 0, 0
	for _, p := range c.ports {
		switch {
		case p.probing:
			return
		case p.there && p.link.silent:
			silent++
		case !p.link.usable():
			down++
		case p.clear:
			clear++
		}
	}
	if clear == 0 && (silent == 0 || down > 0) {
		return
	}
	c.owned, c.collided, c.collisions = true, false, 0
	names := []string{}
	for _, p := range c.ports {
		if p.clear {
			p.left, p.announce = announcements, now
			names = append(names, p.name)
		}
	}
	t.log.Info("address is ours", "address", c.address, "announced on", strings.Join(names, ","))
}

// transmit does what waits until XDP has been told what is owned: first it answers, then it is announced; first it
// stops answering, then the groups are left.
func (t *table) transmit(now time.Time) {
	for _, c := range t.claims {
		if !c.owned {
			continue
		}
		for _, p := range c.ports {
			if !p.clear || !p.link.usable() {
				continue
			}
			if p.left > 0 && due(p.announce, now) {
				if t.send(p, announcementFrame(p.link.mac, c.address)) {
					p.left--
				}
				p.announce = now.Add(t.timing.AnnounceInterval)
			}
			if due(p.defend, now) {
				t.send(p, announcementFrame(p.link.mac, c.address))
				p.defend, p.defended = time.Time{}, now
				t.log.Warn("another host uses an address of ours: announced again", "address", c.address, "interface", p.name,
					"mac", p.other, "what to do", "take the address off that host: until then clients may reach either")
			}
		}
	}
	for _, key := range t.left {
		// By name, so it must still be that device's.
		if t.host.links[key.name].index != key.index {
			continue
		}
		if err := t.wire.member(key.name, groupMAC(key.group), false); err != nil && !gone(err) {
			t.log.Warn("leave solicited-node group", "interface", key.name, "group", groupMAC(key.group), "error", err)
		}
	}
	t.left = nil
	for name, l := range t.listeners {
		if l.link.usable() && (l.left > 0 || l.asked) && due(l.due, now) {
			t.report(name, l, now)
		}
	}
}

func (t *table) send(p *port, frame []byte) bool {
	err := t.wire.send(p.link.index, frame)
	text := ""
	if err != nil {
		text = err.Error()
		if text != p.failed && !gone(err) {
			t.log.Warn("send frame about an address", "address", p.claim.address, "interface", p.name, "error", err)
		}
	}
	p.failed = text
	return err == nil
}

// next says when something will be due; zero: nothing.
func (t *table) next() (next time.Time) {
	consider := func(at time.Time) {
		if !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	for _, c := range t.claims {
		if c.holder != "" {
			continue
		}
		consider(c.retry)
		for _, p := range c.ports {
			consider(p.retry)
			if p.probing {
				consider(p.due)
			}
			if p.clear && p.hasOther {
				consider(p.heard.Add(t.timing.Retry))
			}
			if c.owned && p.clear && p.link.usable() {
				if p.left > 0 {
					consider(p.announce)
				}
				consider(p.defend)
			}
		}
	}
	for _, l := range t.listeners {
		if l.link.usable() && (l.left > 0 || l.asked) {
			consider(l.due)
		}
	}
	return next
}

// owned are the addresses that may be answered for, in order.
func (t *table) owned() []netip.Addr {
	owned := []netip.Addr{}
	for _, c := range t.claims {
		if c.owned {
			owned = append(owned, c.address)
		}
	}
	slices.SortFunc(owned, netip.Addr.Compare)
	return owned
}

// decided says whether it is known of an address if it can be ours now.
func (c *claim) decided() bool {
	if c.owned || c.holder != "" {
		return true
	}
	if c.collided {
		return false
	}
	return !slices.ContainsFunc(c.ports, func(p *port) bool { return p.probing && !p.hasOther })
}
