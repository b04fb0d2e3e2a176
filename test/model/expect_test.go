package model

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"fairlead/bpf"
	"fairlead/maps"
)

// What may be said of a packet: the verdicts that RFCs and the design leave open for it, before it is seen which one the
// data plane gave.

const (
	passNotOurs       = bpf.FairleadVerdictPASS_NOT_OURS
	passFragment      = bpf.FairleadVerdictPASS_FRAGMENT
	passReplyUnknown  = bpf.FairleadVerdictPASS_REPLY_UNKNOWN
	passICMP          = bpf.FairleadVerdictPASS_ICMP
	passTunnelError   = bpf.FairleadVerdictPASS_TUNNEL_ERROR
	forwardRing       = bpf.FairleadVerdictFORWARD_RING
	forwardTable      = bpf.FairleadVerdictFORWARD_TABLE
	forwardHalfOpen   = bpf.FairleadVerdictFORWARD_HALF_OPEN
	forwardNew        = bpf.FairleadVerdictFORWARD_NEW
	forwardAdopted    = bpf.FairleadVerdictFORWARD_ADOPTED
	forwardUnknown    = bpf.FairleadVerdictFORWARD_UNKNOWN
	forwardICMP       = bpf.FairleadVerdictFORWARD_ICMP
	forwardFragment   = bpf.FairleadVerdictFORWARD_FRAGMENT
	replyTable        = bpf.FairleadVerdictREPLY_TABLE
	replyHalfOpen     = bpf.FairleadVerdictREPLY_HALF_OPEN
	replyICMP         = bpf.FairleadVerdictREPLY_ICMP
	replyFragment     = bpf.FairleadVerdictREPLY_FRAGMENT
	answerARP         = bpf.FairleadVerdictANSWER_ARP
	answerNDP         = bpf.FairleadVerdictANSWER_NDP
	answerEcho        = bpf.FairleadVerdictANSWER_ECHO
	answerTooBig      = bpf.FairleadVerdictANSWER_TOO_BIG
	resetUnknown      = bpf.FairleadVerdictRESET_UNKNOWN
	resetNoBackend    = bpf.FairleadVerdictRESET_NO_BACKEND
	resetTableFull    = bpf.FairleadVerdictRESET_TABLE_FULL
	resetNoPort       = bpf.FairleadVerdictRESET_NO_PORT
	resetBackendDown  = bpf.FairleadVerdictRESET_BACKEND_DOWN
	resetLeaving      = bpf.FairleadVerdictRESET_LEAVING
	resetReplyUnknown = bpf.FairleadVerdictRESET_REPLY_UNKNOWN
	dropTruncated     = bpf.FairleadVerdictDROP_TRUNCATED
	dropBadHeader     = bpf.FairleadVerdictDROP_BAD_HEADER
	dropBadSource     = bpf.FairleadVerdictDROP_BAD_SOURCE
	dropBadFlags      = bpf.FairleadVerdictDROP_BAD_FLAGS
	dropLater         = bpf.FairleadVerdictDROP_LATER_FRAGMENT
	dropUnknownRST    = bpf.FairleadVerdictDROP_UNKNOWN_RST
	dropNoNeighbor    = bpf.FairleadVerdictDROP_NO_NEIGHBOR
	dropTTL           = bpf.FairleadVerdictDROP_TTL
	dropTooBig        = bpf.FairleadVerdictDROP_TOO_BIG
	dropLimited       = bpf.FairleadVerdictDROP_ANSWER_LIMITED
	dropNoHeadroom    = bpf.FairleadVerdictDROP_NO_HEADROOM
	dropNoRing        = bpf.FairleadVerdictDROP_NO_RING
)

// set is a set of verdicts.
type set uint64

func of(list ...verdict) (s set) {
	for _, v := range list {
		s |= 1 << v
	}
	return s
}

func (s set) has(v verdict) bool { return s>>v&1 != 0 }

func (s set) String() string {
	var names []string
	for ; s != 0; s &= s - 1 {
		names = append(names, verdictNames[bits.TrailingZeros64(uint64(s))])
	}
	return strings.Join(names, " ")
}

// aForward are the verdicts that send a client's packet on.
var aForward = of(forwardRing, forwardTable, forwardHalfOpen, forwardNew, forwardAdopted, forwardUnknown)

// aReset are those that tell the sender that there is nobody.
var aReset = of(resetUnknown, resetNoBackend, resetTableFull, resetNoPort, resetBackendDown, resetLeaving, resetReplyUnknown)

// expectation is what a packet may lead to.
type expectation struct {
	verdicts set
	why      string
	service  *service // whose packet it is, where that is known
	key      netip.AddrPort
	reply    bool
	flags    byte // of TCP

	conversation *conversation
	ghost        bool
	choices      []*backend // whom a client's packet may go to
	note         *note
	quoted       *quoted
	unanswerable string // why no answer may go to its sender
	solicitation bool
}

// unanswerable says why nobody may answer a packet's sender: RFC 1122, sections 3.2.2 and 3.3.6; RFC 4443, section 2.4
// (e); RFC 9293, section 3.10.7.
func unanswerable(p *packet) string {
	switch {
	case p.from.group():
		return "its link-layer source is a group"
	case p.to.group():
		return "it came by link-layer broadcast or multicast"
	case p.family != 0 && !unicast(p.source):
		return fmt.Sprintf("its source %v is no host's", p.source)
	case p.family != 0 && !unicast(p.destination):
		return fmt.Sprintf("its destination %v is no host's", p.destination)
	}
	return ""
}

// expect is what the model expects of a frame that comes by a device.
func (m *model) expect(p *packet, ingress uint32) *expectation {
	e := &expectation{unanswerable: unanswerable(p)}
	switch {
	case p.ether == etherARP && p.l3 <= len(p.frame):
		m.expectARP(e, p, ingress)
	case p.family == 0:
		e.verdicts, e.why = of(passNotOurs), "neither IPv4, IPv6 nor ARP"
	case p.malformed != "":
		e.verdicts, e.why = of(passNotOurs, passFragment, passICMP, passReplyUnknown), "malformed: "+p.malformed
		if !p.source.IsValid() || m.world.ours[p.destination] || m.natSource(p.source) {
			e.verdicts |= of(dropTruncated, dropBadHeader, dropLater)
		}
	case p.protocol == protoICMP && p.family == 4, p.protocol == protoICMPv6 && p.family == 6:
		m.expectICMP(e, p, ingress)
	case p.later():
		m.expectLater(e, p, ingress)
	case p.protocol != protoTCP && p.protocol != protoUDP:
		e.verdicts, e.why = of(passNotOurs), fmt.Sprintf("protocol %d", p.protocol)
		if p.fragment() {
			e.verdicts |= of(passFragment)
		}
	case !p.ported:
		e.verdicts, e.why = of(passNotOurs), "the packet ends before its ports"
		if m.world.ours[p.destination] || m.natSource(p.source) {
			e.verdicts |= of(dropTruncated, dropBadHeader, passReplyUnknown)
		}
	default:
		m.expectSegment(e, p, ingress)
	}
	m.expectStranger(e, p)
	if p.exotic != "" {
		e.why += " (" + p.exotic + ")"
		e.verdicts |= of(passNotOurs, passFragment, passICMP, dropBadHeader)
	}
	return e
}

// everyPass are the verdicts that leave a packet to the host's stack.
var everyPass = of(passNotOurs, passFragment, passICMP, passReplyUnknown, passTunnelError)

// expectStranger is a packet that nobody may send on: it came by link-layer broadcast or from a group (RFC 1122, section
// 3.3.6; RFC 1812, section 5.3.4), or its source is no host's (RFC 1122, section 3.2.1.3; RFC 1812, section 5.3.7; RFC
// 4291, sections 2.5.2, 2.5.3 and 2.7). A solicitation has rules of its own.
func (m *model) expectStranger(e *expectation, p *packet) {
	if p.family == 0 || !p.source.IsValid() || e.solicitation {
		return
	}
	const firstDrop = dropTruncated
	drops := e.verdicts &^ (1<<firstDrop - 1)
	switch {
	case p.to.group() || p.from.group():
		e.why += ", by a link-layer group"
		e.verdicts = drops | everyPass
	case !unicast(p.source):
		e.why += ", from no host"
		e.verdicts = drops | e.verdicts&everyPass | of(dropBadSource)
		if p.malformed == "" && p.protocol != protoTCP && p.protocol != protoUDP || p.later() {
			e.verdicts |= everyPass
		}
	}
}

func (m *model) natSource(a netip.Addr) bool {
	for k := range m.world.byNAT {
		if k.at.Addr() == a {
			return true
		}
	}
	return false
}

func (m *model) expectSegment(e *expectation, p *packet, ingress uint32) {
	k := key{p.to4(), p.protocol}
	switch {
	case m.world.keys[k] != nil:
		e.service, e.key = m.world.keys[k], k.at
		m.expectClient(e, p)
	case m.world.isSource(k.at), m.world.byNAT[key{p.from4(), p.protocol}]:
		m.expectReply(e, p, ingress)
	default:
		e.verdicts, e.why = of(passNotOurs), fmt.Sprintf("%v is no service, %v no backend by nat", p.to4(), p.from4())
		if p.fragment() {
			e.verdicts |= of(passFragment)
		}
	}
}

func tupleOf(p *packet) maps.Tuple {
	return maps.Tuple{Source: p.from4(), Destination: p.to4(), Protocol: p.protocol}
}

// badFlags tells flags that no segment carries (RFC 9293, section 3.10.7; RFC 3128 calls some an attack). Doubtful are
// those that a strict reader may refuse.
func badFlags(flags byte) (bad, doubtful bool) {
	switch {
	case flags&syn != 0 && flags&(fin|rst) != 0, flags&(syn|rst|ack) == 0:
		return true, false
	case flags&(syn|ack) == syn|ack, flags&(rst|fin) == rst|fin:
		return false, true
	}
	return false, false
}

// expectClient is a packet to a service.
func (m *model) expectClient(e *expectation, p *packet) {
	if fault := p.transportFault(); fault != "" {
		e.verdicts, e.why = of(dropTruncated, dropBadHeader), "malformed: "+fault
		return
	}
	if p.protocol == protoTCP {
		e.flags = p.transport()[13]
		bad, doubtful := badFlags(e.flags)
		if bad {
			e.verdicts, e.why = of(dropBadFlags), fmt.Sprintf("TCP flags %#x", e.flags)
			return
		}
		if doubtful {
			e.verdicts |= of(dropBadFlags)
		}
	}
	t := tupleOf(p)
	e.conversation, e.ghost = m.conversations[t], m.ghosts[t] != nil
	c := e.conversation
	leaving := e.service.leaving || e.service.leavingKeys[e.key]
	opens := p.protocol == protoUDP || e.flags&syn != 0
	if c != nil {
		e.verdicts |= m.known(e, c)
		e.choices = []*backend{c.backend}
		switch {
		case c.confirmed:
			e.why = fmt.Sprintf("confirmed, with %v", c.backend)
		default:
			e.why = fmt.Sprintf("half-open, with %v", c.backend)
		}
	}
	anew := c == nil || c.mayBeGone || !c.confirmed && opens && (leaving || !c.backend.usable()) || c.closing && opens
	if anew {
		if c == nil {
			e.why = "unknown"
		}
		e.verdicts |= m.fresh(e, t, opens, leaving)
	}
	if e.ghost {
		e.why += ", perhaps noted"
		e.verdicts |= of(forwardHalfOpen, forwardTable, forwardRing)
		e.choices = e.service.members
	}
	if m.limits.answers != 0 && p.protocol == protoUDP && e.verdicts&aReset != 0 {
		e.verdicts |= of(dropLimited)
	}
	m.obstruct(e, p)
}

// known are the verdicts for a conversation that the tables hold.
func (m *model) known(e *expectation, c *conversation) set {
	if !c.confirmed {
		return of(forwardHalfOpen)
	}
	if c.backend.stateful() {
		return of(forwardTable)
	}
	return of(forwardTable, forwardRing)
}

// fresh are the verdicts for a packet that no table knows.
func (m *model) fresh(e *expectation, t maps.Tuple, opens, leaving bool) (s set) {
	first := m.world.choices(e.service, t)
	var other []*backend
	for _, b := range e.service.members {
		if b.usable() {
			other = append(other, b)
		}
	}
	refusals := of(resetNoBackend, resetBackendDown, dropNoNeighbor, dropNoRing)
	if m.limits.connections != 0 {
		refusals |= of(resetTableFull)
	}
	switch {
	case e.flags&rst != 0:
		s |= of(dropUnknownRST)
		if len(first) > 0 && !first[0].stateful() {
			s |= of(forwardUnknown, forwardRing)
			e.choices = append(e.choices, first...)
		}
		return s
	case leaving && opens:
		return of(resetLeaving)
	case !opens && len(first) == 0:
		return of(resetUnknown) | refusals
	case !opens && first[0].stateful():
		s = of(resetUnknown)
		if !first[0].usable() {
			s |= refusals
		}
		return s
	case !opens: // hash alone decides, or the ring: a fresh bit may be another's
		s = of(forwardAdopted, forwardUnknown, forwardRing)
		e.choices = append(e.choices, first...)
		if leaving {
			s |= of(resetLeaving, resetUnknown)
		}
		if !first[0].usable() {
			s |= refusals
			e.choices = append(e.choices, other...)
		}
		return s
	}
	// New: the slot's backend, if it takes any and has room for this one.
	if len(first) == 0 || !first[0].usable() {
		s |= refusals
		if len(other) > 0 {
			s |= of(forwardNew)
			e.choices = append(e.choices, other...)
		}
		for _, b := range other {
			if b.stateful() { // whose ways back may all be another's
				s |= of(resetNoPort)
			}
		}
		return s
	}
	s |= of(forwardNew)
	if t.Protocol == protoUDP && !first[0].stateful() {
		s |= of(forwardRing) // by another's fresh bit: to the same backend
	}
	e.choices = append(e.choices, first...)
	switch b := first[0]; b.method {
	case maps.MethodFullNAT:
		held, unsure := m.livePorts(b)
		if room := m.poolSize(b); held+unsure >= room {
			s |= of(resetNoPort)
			e.choices = append(e.choices, other...)
		}
	case maps.MethodNAT:
		if owner := m.waysBack[maps.Tuple{Source: b.at(t.Destination), Destination: t.Source, Protocol: t.Protocol}]; owner != nil &&
			owner.tuple != t || len(m.ghosts) > 0 {
			s |= of(resetNoPort, resetNoBackend)
			e.choices = append(e.choices, other...)
		}
	}
	if m.limits.connections != 0 {
		s |= of(resetTableFull)
	}
	return s
}

func (m *model) poolSize(b *backend) (n int) {
	for _, s := range b.sources {
		n += int(s.Last-s.First) + 1
	}
	return n
}

// obstruct adds what may stand in the way, and takes away what forwards where something surely does.
func (m *model) obstruct(e *expectation, p *packet) {
	if e.verdicts&aForward == 0 {
		return
	}
	free := len(e.choices) == 0
	for _, b := range e.choices {
		obstacles, passable := m.obstacles(e, p, b)
		e.verdicts |= obstacles
		free = free || passable
	}
	if !free {
		e.verdicts &^= aForward
	}
}

// leastChecked is up to how many bytes every way is taken to let pass (RFC 791: 576).
const leastChecked = 576

// leastIPv6 is the MTU that every way has for IPv6 (RFC 8200, section 5).
const leastIPv6 = 1280

// learned are the MTUs that the way to a backend may be known to have; 0: none is known.
func (m *model) learned(b *backend) []uint32 {
	known := m.paths[b.address]
	if b.overhead() == 0 || known == nil {
		return []uint32{0}
	}
	var all []uint32
	for mtu := range known.known {
		all = append(all, mtu)
	}
	if known.raised != 0 && !known.known[known.raised] {
		all = append(all, known.raised) // wrong, and judged by itself
	}
	return all
}

func within(length int, mtu uint32) bool {
	return mtu == 0 || length <= leastChecked || length <= int(mtu)
}

// fits tells whether a packet may go to a backend by a way of an MTU. An IPv6 packet that every way lets pass goes into
// a tunnel whose way does not: there, the outer one is fragmented (RFC 4213, section 3.2.2; RFC 2473, section 7.1).
func (b *backend) fits(p *packet, learned uint32) bool {
	outer := p.length() + b.overhead()
	return within(outer, b.hop.MTU) && (within(outer, learned) || p.family == 6 && p.length() <= leastIPv6)
}

// lost tells an IPv6 packet that every way lets pass, and that is too big in its outer IPv6 packet: who does not fragment
// that, as the tunnel's entry should (RFC 2473, section 7.1), may drop it by name.
func (b *backend) lost(p *packet, learned uint32) bool {
	return b.address.Is6() && p.family == 6 && p.length() <= leastIPv6 && !within(p.length()+b.overhead(), learned)
}

// told is the MTU that the sender of a packet is told, which does not fit; 0: nothing limits it. Nobody goes below IPv6's
// least (RFC 8201, section 4).
func (b *backend) told(p *packet, learned uint32) uint32 {
	mtu := b.hop.MTU
	if learned != 0 && (mtu == 0 || learned < mtu) {
		mtu = learned
	}
	if mtu == 0 {
		return 0
	}
	mtu -= uint32(b.overhead())
	if p.family == 6 {
		mtu = max(mtu, leastIPv6)
	}
	return mtu
}

// obstacles are the verdicts on a packet that can't go to a backend, in the design's order: no neighbour, too big, time
// to live. Free: as far as is known, nothing has to be in its way.
func (m *model) obstacles(e *expectation, p *packet, b *backend) (s set, free bool) {
	if !b.hop.Known {
		return of(dropNoNeighbor), false
	}
	for _, learned := range m.learned(b) {
		switch {
		case !b.fits(p, learned):
			s |= m.tooBig(e, p)
		case p.ttl <= 1:
			s |= of(dropTTL)
		default:
			free = true
		}
		if b.lost(p, learned) {
			s |= of(dropTooBig)
		}
	}
	return s, free
}

// tooBig are the verdicts on a packet that is too big: RFC 1191, section 4; RFC 4443, section 3.2.
func (m *model) tooBig(e *expectation, p *packet) set {
	if !p.df {
		return of(dropTooBig)
	}
	if e.unanswerable != "" || p.later() {
		return of(dropTooBig, dropLimited) | of(answerTooBig) // the answer is judged by itself
	}
	s := of(answerTooBig)
	if p.family == 6 && p.length() <= leastIPv6 {
		s |= of(dropTooBig) // nothing that it could be told would help
	}
	if m.limits.answers != 0 {
		s |= of(dropLimited)
	}
	return s
}

// expectReply is a packet to a source address and port of ours, or from a backend by nat.
func (m *model) expectReply(e *expectation, p *packet, ingress uint32) {
	e.reply = true
	t := tupleOf(p)
	unknown := of(passReplyUnknown)
	if m.world.isOwn(p.destination) {
		unknown = of(resetReplyUnknown)
		if m.limits.answers != 0 && p.protocol == protoUDP {
			unknown |= of(dropLimited)
		}
	}
	if p.protocol == protoTCP && len(p.transport()) >= 14 && p.transport()[13]&rst != 0 {
		unknown = of(passReplyUnknown, dropUnknownRST)
	}
	if fault := p.transportFault(); fault != "" {
		e.verdicts, e.why = of(dropTruncated, dropBadHeader, passReplyUnknown), "malformed: "+fault
		return
	}
	if p.protocol == protoTCP {
		e.flags = p.transport()[13]
		if bad, doubtful := badFlags(e.flags); bad || doubtful || e.flags&syn != 0 {
			e.verdicts |= of(dropBadFlags)
		}
	}
	c := m.waysBack[t]
	e.conversation = c
	if c == nil {
		e.why = "no conversation has this way back"
		e.verdicts |= unknown
		if len(m.ghosts) > 0 {
			e.ghost = true
			e.verdicts |= of(replyHalfOpen, replyTable) | of(dropTTL, dropTooBig, answerTooBig)
		}
		return
	}
	e.service = c.service
	switch {
	case c.confirmed:
		e.why = fmt.Sprintf("the way back to %v, confirmed", c.tuple.Source)
		e.verdicts |= of(replyTable)
	default:
		e.why = fmt.Sprintf("the way back to %v, half-open", c.tuple.Source)
		e.verdicts |= of(replyHalfOpen)
		if p.protocol != protoTCP {
			break
		}
		if surely, _ := m.answersSYN(c, p); !surely {
			e.verdicts |= unknown | of(dropUnknownRST)
		}
	}
	if c.mayBeGone {
		e.verdicts |= unknown
		if m.ghosts[c.tuple] != nil {
			e.verdicts |= of(replyHalfOpen)
		}
	}
	m.obstructReply(e, p, ingress, c.hops)
}

// answersSYN tells the backend's SYN-ACK to the client's own SYN: surely where that is its first or its last; perhaps, where
// there were more, or where it acknowledges more than that.
func (m *model) answersSYN(c *conversation, p *packet) (surely, perhaps bool) {
	t := p.transport()
	if t[13]&(syn|ack|rst) != syn|ack {
		return false, false
	}
	answered := be32(t[8:])
	for _, end := range c.syns {
		perhaps = perhaps || answered-end <= openingWindow
	}
	n := len(c.syns)
	surely = n > 0 && (slices.Contains(c.syns[:2], answered) || slices.Contains(c.syns[n-2:], answered))
	return surely, perhaps
}

// obstructReply is what stands in a reply's way.
func (m *model) obstructReply(e *expectation, p *packet, ingress uint32, hops []hop) {
	blocked, free := set(0), false
	for _, h := range hops {
		mtu := m.world.devices.by(h.ingress)
		switch {
		case mtu.told && h.ingress != ingress && !within(p.length(), mtu.mtu):
			blocked |= m.tooBig(e, p)
		case p.ttl <= 1:
			blocked |= of(dropTTL)
		default:
			free = true
		}
		if mtu.told && h.ingress == ingress && !within(p.length(), mtu.mtu) {
			blocked |= m.tooBig(e, p) // by the device that it came by: it may be taken to be wide enough, or not
			free = free || p.ttl > 1
		}
	}
	e.verdicts |= blocked
	if !free {
		e.verdicts &^= of(replyTable, replyHalfOpen, replyFragment, replyICMP)
	}
}

// expectLater is a fragment that carries no ports.
func (m *model) expectLater(e *expectation, p *packet, ingress uint32) {
	n := m.fragments[fragmentKeyOf(p)]
	if n == nil || n.mayBeGone {
		e.why = "a later fragment, its first not seen"
		e.verdicts = of(passFragment)
		if p.protocol != protoTCP && p.protocol != protoUDP {
			e.verdicts |= of(passNotOurs)
		}
		if m.world.isOwn(p.destination) {
			e.verdicts = of(dropLater)
			if p.protocol != protoTCP && p.protocol != protoUDP {
				e.verdicts |= of(passNotOurs, passFragment)
			}
		}
		if n == nil {
			return
		}
		e.verdicts |= of(dropNoRing, dropNoNeighbor)
	}
	e.note, e.service, e.reply, e.conversation = n, n.service, n.reply, n.conversation
	if n.reply {
		e.why = "a later fragment of a reply"
		e.verdicts |= of(replyFragment)
		m.obstructReply(e, p, ingress, n.hops)
		return
	}
	e.why = fmt.Sprintf("a later fragment of a packet to %v", n.backend)
	obstacles, free := m.obstacles(e, p, n.backend)
	e.verdicts |= obstacles
	if free {
		e.verdicts |= of(forwardFragment)
	}
}
