package announce

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// groupKey is a solicited-node group at a device.
type groupKey struct {
	name  string
	index int
	group netip.Addr
}

// listener is what switches are told of groups at one interface.
type listener struct {
	link  link
	left  int // unasked reports
	due   time.Time
	asked bool      // a query waits for its answer
	old   time.Time // MLDv1 is spoken here until then
}

// followGroups fits the devices' filters to the claims. Groups are joined before anyone is asked (RFC 4862, 5.4.2),
// and left after nobody is answered any more.
func (t *table) followGroups(now time.Time) {
	wanted := map[groupKey]struct{}{}
	for _, c := range t.claims {
		if !c.address.Is6() || c.holder != "" {
			continue
		}
		for _, p := range c.ports {
			if p.there && !p.link.silent {
				wanted[groupKey{p.name, p.link.index, solicitedNode(c.address)}] = struct{}{}
			}
		}
	}
	for key := range t.joined {
		if _, ok := wanted[key]; !ok {
			delete(t.joined, key)
			t.left = append(t.left, key)
		}
	}
	t.left = slices.DeleteFunc(t.left, func(key groupKey) bool { _, again := wanted[key]; return again })
	report := map[string]struct{}{}
	for key := range wanted {
		if _, ok := t.joined[key]; ok {
			continue
		}
		err := t.wire.member(key.name, groupMAC(key.group), true)
		if gone(err) {
			continue // there will be news of it
		}
		t.joined[key] = struct{}{}
		report[key.name] = struct{}{}
		// EINVAL: a device without a filter.
		if err != nil && !errors.Is(err, unix.EINVAL) {
			t.log.Warn("join solicited-node group: a card that filters will not hand solicitations over", "interface", key.name,
				"group", groupMAC(key.group), "error", err, "what to do", "ip link set "+key.name+" allmulticast on")
		}
	}
	for name := range t.listeners {
		if len(t.keys(name)) == 0 {
			delete(t.listeners, name)
		}
	}
	for key := range t.joined {
		l := t.listeners[key.name]
		if l == nil {
			l = &listener{}
			t.listeners[key.name] = l
		}
		was := l.link
		l.link = t.host.links[key.name]
		if _, ok := report[key.name]; ok || l.link.usable() && (!was.usable() || was.index != l.link.index) {
			l.left, l.due = announcements, now
		}
	}
}

// keys are the groups joined at an interface, in order.
func (t *table) keys(name string) (keys []groupKey) {
	for key := range t.joined {
		if key.name == name {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, func(a, b groupKey) int { return a.group.Compare(b.group) })
	return keys
}

// Switches that look into MLD hand a group's frames only to ports that have asked for it, and forget after some four
// minutes (RFC 4541, 3). The kernel doesn't speak for groups that are at the device alone, so we do. It would for a
// socket's; but then it would also tell the switch to stop at once when this process ends.
const (
	reportInterval = time.Second // Unsolicited Report Interval (RFC 3810, 9.11)
	oldVersionTime = 260 * time.Second
)

func (t *table) query(name string, m message, now time.Time) {
	l := t.listeners[name]
	if l == nil {
		return
	}
	at := now.Add(between(0, m.within))
	if l.left == 0 && !l.asked || at.Before(l.due) {
		l.due = at
	}
	l.asked = true
	if m.old {
		l.old = now.Add(oldVersionTime)
	}
}

func (t *table) report(name string, l *listener, now time.Time) {
	var groups []netip.Addr
	for _, key := range t.keys(name) {
		groups = append(groups, key.group)
	}
	source := t.host.linkLocal(name)
	var frames [][]byte
	if now.Before(l.old) {
		for _, g := range groups {
			frames = append(frames, oldReportFrame(l.link.mac, source, g))
		}
	} else {
		record := uint8(recordToExclude)
		if l.asked {
			record = recordIsExclude
		}
		for part := range slices.Chunk(groups, groupsAFrame) {
			frames = append(frames, reportFrame(l.link.mac, source, record, part))
		}
	}
	for _, f := range frames {
		if err := t.wire.send(l.link.index, f); err != nil && !gone(err) {
			t.log.Warn("report groups to switches", "interface", name, "error", err)
		}
	}
	l.asked = false
	l.left = max(0, l.left-1)
	l.due = now.Add(reportInterval)
}

// Join has the device of this name, in the calling thread's network namespace, let frames for the solicited-node group
// of an IPv6 address through, so that a card that filters hands solicitations over to XDP. It lasts until Leave or
// until the device goes, whatever becomes of the process. Joining twice is joining once; for IPv4 there is nothing to
// join. An Announcer does it by itself.
func Join(name string, address netip.Addr) error { return setMember(name, address, true) }

// Leave takes back what Join or an Announcer did: where XDP is detached, and nobody answers any more. Addresses that
// end in the same three bytes share a group. What the host's own IPv6 has joined stays; leaving what wasn't joined is
// no error.
func Leave(name string, address netip.Addr) error { return setMember(name, address, false) }

func setMember(name string, address netip.Addr, add bool) error {
	if address = address.Unmap(); !address.Is6() {
		return nil
	}
	verb := "leave"
	if add {
		verb = "join"
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s solicited-node group of %s on %s: open socket: %w", verb, address, name, err)
	}
	defer unix.Close(fd)
	if err := membership(fd, name, groupMAC(solicitedNode(address)), add); err != nil {
		return fmt.Errorf("%s solicited-node group of %s on %s: %w", verb, address, name, err)
	}
	return nil
}
