package model

import (
	"bytes"
	"errors"
	"fmt"
	maps2 "maps"
	"net/netip"
	"time"

	"fairlead/bpf"
	"fairlead/maps"
)

// model judges what comes of packets, and remembers what it saw.
type model struct {
	world         *world
	limits        limits
	conversations map[maps.Tuple]*conversation
	waysBack      map[maps.Tuple]*conversation
	ghosts        map[maps.Tuple]*conversation // perhaps noted, the backend unknown: packets that were let in, and then could not go on
	fragments     map[fragmentKey]*note
	paths         map[netip.Addr]*path
	identities    map[identity]map[uint32]fragmentKey // of rewritten fragments
	met           map[string]int                      // what was seen of what is left open, for the log
}

// shortEpoch is below what a round takes: what is closing may be gone after a turn.
const shortEpoch = time.Second

func newModel(w *world, l limits) *model {
	m := &model{
		world: w, limits: l, conversations: map[maps.Tuple]*conversation{}, waysBack: map[maps.Tuple]*conversation{},
		ghosts: map[maps.Tuple]*conversation{}, fragments: map[fragmentKey]*note{}, paths: map[netip.Addr]*path{},
		identities: map[identity]map[uint32]fragmentKey{}, met: map[string]int{},
	}
	return m
}

// breach is a rule that was broken.
type breach struct {
	rule, text string
}

// judged is one packet, and what came of it.
type judged struct {
	*model
	learns   bool
	p        *packet
	ingress  uint32
	r        *result
	e        *expectation
	v        verdict
	backend  *backend      // a client's packet went to
	client   *conversation // a backend's packet went to
	breaches []breach
}

func (j *judged) broken(rule, format string, args ...any) {
	j.breaches = append(j.breaches, breach{rule, fmt.Sprintf(format, args...)})
}

// judge says which rules the outcome of a packet breaks, and learns from it, unless it is only asked.
func (m *model) judge(frame []byte, ingress uint32, r *result, learn bool) *judged {
	j := &judged{model: m, p: parse(frame), ingress: ingress, r: r, learns: learn}
	j.e = m.expect(j.p, ingress)
	v, ok := r.verdict()
	if !ok {
		j.broken("one verdict", "not exactly one verdict was counted once")
		return j
	}
	j.v = v
	j.checkAction()
	if !j.e.verdicts.has(v) {
		j.broken("verdict", "%s is not among %v", verdictNames[v], j.e.verdicts)
	}
	if r.action == xdpTX || r.action == xdpRedirect {
		j.checkSent()
	}
	j.checkEvents()
	switch {
	case passed(v):
		if !bytes.Equal(frame, r.out) {
			j.broken("untouched", "passed, and changed: %x", r.out)
		}
		if v == passTunnelError {
			j.checkPath()
		}
	case forwarded(v):
		j.checkForward()
	case replied(v):
		j.checkReply()
	case answered(v):
		j.checkAnswer()
	}
	j.checkTraffic()
	if learn {
		j.learn()
	}
	return j
}

func (j *judged) checkAction() {
	want := xdpDrop
	switch v := j.v; {
	case passed(v):
		want = xdpPass
	case answered(v):
		want = xdpTX
	case forwarded(v), replied(v):
		if j.r.action != xdpTX && j.r.action != xdpRedirect {
			j.broken("action", "%s, and %s", verdictNames[v], actionNames[min(j.r.action, xdpRedirect)])
		}
		return
	}
	if j.r.action != want {
		j.broken("action", "%s, and action %d, not %s", verdictNames[j.v], j.r.action, actionNames[want])
	}
}

// checkSent holds what goes for everything that leaves.
func (j *judged) checkSent() {
	p := j.p
	if p.malformed != "" {
		j.broken("malformed", "sent on: %s", p.malformed)
	} else if (p.protocol == protoTCP || p.protocol == protoUDP) && p.family != 0 && !p.later() {
		if fault := p.transportFault(); fault != "" {
			j.broken("malformed", "sent on: %s", fault)
		}
	}
	sender := forwarded(j.v) || replied(j.v)
	switch {
	case p.family != 0 && !unicast(p.source) && !(j.v == answerNDP && p.source.IsUnspecified()):
		// RFC 1122, section 3.2.1.3; RFC 1812, section 5.3.7; RFC 4291, sections 2.5.2, 2.5.3 and 2.7.
		j.broken("source", "%s: its source %v is no host's", verdictNames[j.v], p.source)
	case p.from.group():
		j.broken("link source", "%s: its link-layer source %x is a group", verdictNames[j.v], p.from)
	case p.family != 0 && p.to.group() && (sender || j.v != answerNDP):
		// RFC 1122, section 3.3.6; RFC 1812, section 5.3.4.
		j.broken("link broadcast", "%s: it came to the group %x", verdictNames[j.v], p.to)
	}
	if fault := secondOpinion(p); fault != "" && p.exotic == "" {
		j.broken("malformed", "sent on: gopacket: %s", fault)
	}
	out := parse(j.r.out)
	if fault := secondOpinion(out); fault != "" && p.exotic == "" {
		j.broken("well-formed", "gopacket of what was sent: %s", fault)
	}
	if out.malformed != "" && p.malformed == "" {
		j.broken("well-formed", "what was sent is malformed: %s", out.malformed)
	}
	if out.from.group() {
		j.broken("link source", "what was sent has a group as source, %x", out.from)
	}
	if out.family == 4 && out.malformed == "" && p.family != 4 && out.headerWrongness() != 0 {
		j.broken("checksum", "what was sent has a wrong IPv4 header checksum")
	}
}

// by tells how a frame leaves a device that may be the one that it came by.
func (j *judged) by(index uint32) {
	want := xdpRedirect
	if index == j.ingress {
		want = xdpTX
	}
	if j.r.action != want {
		j.broken("device", "%s by device %d, came by %d: want %s", actionNames[min(j.r.action, xdpRedirect)], index, j.ingress, actionNames[want])
	}
}

// checkForward is a packet that was sent to a backend.
func (j *judged) checkForward() {
	p, e := j.p, j.e
	if p.family == 0 || p.malformed != "" {
		return
	}
	var candidates []*backend
	switch {
	case e.note != nil:
		candidates = []*backend{e.note.backend}
	case e.service == nil:
		j.broken("not ours", "sent to a backend, and to no service")
		return
	default:
		candidates = e.service.members
	}
	var nearest error
	for _, b := range candidates {
		if !b.hop.Known {
			continue
		}
		header := ethernet(b.hop.MAC, b.hop.SourceMAC, hopTags(b.hop.VLAN), j.outerEther(b))
		err := j.forwardedTo(b, header)
		if err == nil {
			j.backend = b
			break
		}
		if nearest == nil || bytes.HasPrefix(j.r.out, header[:6]) {
			nearest = fmt.Errorf("to %v: %w", b, err)
		}
	}
	b := j.backend
	if b == nil {
		if nearest == nil {
			nearest = errors.New("the service has no backend that can be reached")
		}
		j.broken("forwarded", "%v", nearest)
		return
	}
	j.by(b.hop.Interface)
	if j.raisedPath(b) {
		j.broken("path", "%d bytes to %v, of which is known that it takes %v: an error that told %d has raised it",
			j.p.length()+b.overhead(), b.address, j.paths[b.address].known, j.paths[b.address].raised)
		j.believeRaised(b)
	}
	if obstacles, free := j.obstaclesOf(b); !free {
		j.broken("obstacle", "forwarded to %v, and should not: %v", b, obstacles)
	}
	c := e.conversation
	switch j.v {
	case forwardICMP, forwardFragment:
		if c != nil && j.v == forwardICMP && b != c.backend && !c.mayBeGone {
			j.broken("pinned", "an error goes to %v, its connection is with %v", b, c.backend)
		}
		return
	}
	switch {
	case c != nil && c.confirmed && b != c.backend && !c.mayBeGone && !(c.closing && j.v == forwardNew):
		j.broken("pinned", "to %v, confirmed with %v", b, c.backend)
	case c != nil && c.confirmed && j.v == forwardNew && !c.mayBeGone && !c.closing:
		j.broken("pinned", "chosen anew, and confirmed with %v", c.backend)
	case c != nil && !c.confirmed && b != c.backend && c.backend.usable() && !c.mayBeGone:
		j.broken("pinned", "to %v, half-open with %v", b, c.backend)
	}
	if c == nil || j.v == forwardNew {
		listed := len(e.choices) == 0
		for _, choice := range e.choices {
			listed = listed || choice == b
		}
		if !listed {
			j.broken("ring", "to %v, and its slot says %v", b, e.choices)
		}
		if j.v == forwardNew && b.leaving {
			j.broken("leaving", "a new connection to %v, which is leaving", b)
		}
	}
}

func (j *judged) obstaclesOf(b *backend) (set, bool) {
	if j.v == forwardICMP {
		return j.errorObstacles(j.p, b)
	}
	return j.obstacles(j.e, j.p, b)
}

// outerEther is the EtherType of a packet to a backend.
func (j *judged) outerEther(b *backend) uint16 {
	if b.overhead() > 0 {
		return etherOf(familyOf(b.address))
	}
	return j.p.ether
}

// forwardedTo compares the frame with the packet's image on its way to a backend.
func (j *judged) forwardedTo(b *backend, header []byte) error {
	p, e, out := j.p, j.e, j.r.out
	trailing := p.frame[p.end:]
	if len(out) < len(header) {
		return fmt.Errorf("the frame is shorter than its link header")
	}
	body := out[len(header):]
	switch j.v {
	case forwardFragment:
		n := e.note
		return matches(out, header, j.around(b, rewritten(p, n.source, n.destination, n.id, n.rewrites(b)), n.hash, body), trailing)
	case forwardICMP:
		return j.errorForwarded(b, header, body, trailing)
	}
	hash := tupleOf(p).Hash()
	switch b.method {
	case maps.MethodFullNAT, maps.MethodNAT:
		source, destination := p.from4(), b.at(p.to4())
		if b.method == maps.MethodFullNAT {
			got := parse(out)
			if !got.ported {
				return errors.New("no ports can be read")
			}
			source = got.from4()
			if c := e.conversation; c != nil && j.v != forwardNew && !c.mayBeGone {
				source = c.source
			}
			if !j.isPort(b, source) {
				return fmt.Errorf("from %v, no source address and port of its", source)
			}
		}
		id, rewrite := uint32(0), p.fragment()
		if rewrite {
			id = parse(out).id
		}
		return matches(out, header, rewritten(p, source, destination, id, rewrite), trailing)
	}
	return matches(out, header, j.around(b, rewritten(p, p.from4(), p.to4(), 0, false), hash, body), trailing)
}

func (n *note) rewrites(b *backend) bool { return b.stateful() }

func (j *judged) isPort(b *backend, at netip.AddrPort) bool {
	for _, s := range b.sources {
		if s.Address == at.Addr() && at.Port() >= s.First && at.Port() <= s.Last {
			return true
		}
	}
	return false
}

// around encapsulates where the backend's method does.
func (j *judged) around(b *backend, inner image, hash uint64, body []byte) image {
	if b.overhead() == 0 {
		return inner
	}
	return b.encapsulated(j.p, inner, hash, body, j.learned(b))
}

// errorForwarded compares an ICMP error on its way to a backend.
func (j *judged) errorForwarded(b *backend, header, body, trailing []byte) error {
	p, q, c := j.p, j.e.quoted, j.e.conversation
	if q == nil {
		return errors.New("it quotes nothing of ours")
	}
	t := q.swapped()
	if !b.stateful() {
		i := rewritten(p, netip.AddrPortFrom(p.source, 0), netip.AddrPortFrom(p.destination, 0), 0, false)
		return matches(j.r.out, header, j.around(b, i, t.Hash(), body), trailing)
	}
	source, client := p.source, t.Source
	if b.method == maps.MethodFullNAT {
		if c != nil {
			client = c.source
		} else { // noted, and not seen to be: whom it says that the backend talks to
			q := quotedBy(parse(j.r.out))
			if q == nil || !j.isPort(b, q.destination) {
				return errors.New("what it quotes is to no source address and port of ours")
			}
			client = q.destination
		}
		source = client.Addr()
	}
	return matches(j.r.out, header, translatedError(p, q, source, b.address, b.at(t.Destination), client), trailing)
}

// checkReply is a packet that was sent to a client.
func (j *judged) checkReply() {
	p, e := j.p, j.e
	if p.family == 0 || p.malformed != "" {
		return
	}
	c := e.conversation
	if c == nil || c.mayBeGone && e.note == nil {
		if other := j.haunted(); other != nil && (c == nil || other.tuple != c.tuple) {
			c = other
		}
	}
	j.client = c
	if c == nil && e.note == nil {
		j.broken("reply", "sent to a client, and no conversation is known that it belongs to")
		return
	}
	hops := []hop(nil)
	if e.note != nil {
		hops = e.note.hops
	} else {
		hops = c.hops
	}
	trailing := p.frame[p.end:]
	var nearest error
	for i := len(hops) - 1; i >= 0; i-- {
		h := hops[i]
		header := ethernet(h.to, h.from, hopTags(h.vlan), p.ether)
		var err error
		switch {
		case j.v == replyFragment && e.note != nil:
			err = matches(j.r.out, header, rewritten(p, e.note.source, e.note.destination, e.note.id, true), trailing)
		case j.v == replyICMP && e.quoted != nil:
			err = matches(j.r.out, header, translatedError(p, e.quoted, c.tuple.Destination.Addr(), c.tuple.Source.Addr(),
				c.tuple.Source, c.tuple.Destination), trailing)
		default:
			id, rewrite := uint32(0), p.fragment()
			if rewrite {
				id = parse(j.r.out).id
			}
			err = matches(j.r.out, header, rewritten(p, c.tuple.Destination, c.tuple.Source, id, rewrite), trailing)
		}
		if err == nil {
			j.by(h.ingress)
			if i != len(hops)-1 {
				j.met["a reply by a hop that is not the latest"]++
			}
			return
		}
		if nearest == nil {
			nearest = err
		}
	}
	j.broken("reply", "to %v: %v", c.tuple.Source, nearest)
}

// haunted finds the conversation that a reply shows to be noted: one whose client's packet was let in and not sent on.
func (j *judged) haunted() *conversation {
	out := parse(j.r.out)
	t := maps.Tuple{Source: out.to4(), Destination: out.from4(), Protocol: out.protocol}
	at, source := j.p.from4(), j.p.to4()
	if q := j.e.quoted; q != nil { // of an error, it is in what is quoted
		told := quotedBy(out)
		if told == nil {
			return nil
		}
		t = maps.Tuple{Source: told.source, Destination: told.destination, Protocol: told.protocol}
		at, source = q.destination, q.source
	}
	s := j.world.keys[key{t.Destination, t.Protocol}]
	if s == nil || j.ghosts[t] == nil {
		return nil
	}
	for _, b := range s.members {
		if b.stateful() && b.at(t.Destination) == at {
			j.met["a reply to a client whose first packet was dropped"]++
			c := *j.ghosts[t]
			c.service, c.backend, c.source = s, b, source
			return &c
		}
	}
	return nil
}

// checkAnswer is a frame that goes back where it came from.
func (j *judged) checkAnswer() {
	p, e, out := j.p, j.e, j.r.out
	d := j.world.devices.by(j.ingress)
	if e.unanswerable != "" && j.v != answerARP && j.v != answerNDP {
		j.broken("unanswerable", "%s, and %s", verdictNames[j.v], e.unanswerable)
	}
	if p.malformed != "" {
		return
	}
	var err error
	switch {
	case j.v == answerARP:
		if p.ether != etherARP || len(p.frame) < p.l3+28 {
			err = errors.New("it is no ARP request")
		} else if want := arpReply(p, d); !bytes.Equal(out[6:], want[6:]) || mac(out) != mac(want) && mac(out) != p.from {
			err = fmt.Errorf("want %x\ngot  %x", want, out)
		}
	case j.v == answerNDP:
		if p.protocol != protoICMPv6 || p.end-p.l4 < 24 {
			err = errors.New("it is no neighbour solicitation")
		} else if want := advertisement(p, d); !bytes.Equal(out, want) {
			err = fmt.Errorf("want %x\ngot  %x", want, out)
		}
	case j.v == answerEcho:
		if p.protocol != protoICMP && p.protocol != protoICMPv6 || p.end-p.l4 < 8 {
			err = errors.New("it is no echo request")
		} else {
			err = matches(out, ethernet(p.from, p.to, p.tags, p.ether), echoed(p), p.frame[p.end:])
		}
	case j.v == answerTooBig:
		err = j.tooBigAnswered()
	case p.protocol == protoUDP:
		kind, code := uint8(3), uint8(3)
		if p.family == 6 {
			kind, code = 1, 4
		}
		err = errorAbout(p, out, kind, code, 0)
	case p.protocol == protoTCP && p.end-p.l4 >= 20:
		if p.fragment() {
			j.met["a RST about a first fragment"]++
		}
		err = resetFor(p, out)
	default:
		err = errors.New("it is neither TCP nor UDP")
	}
	if err != nil {
		j.broken("answer", "%s: %v", verdictNames[j.v], err)
	}
}

// tooBigAnswered checks the answer to a packet that is too big, for each way that it may have been meant for.
func (j *judged) tooBigAnswered() error {
	p, e := j.p, j.e
	if p.protocol == protoICMP || p.protocol == protoICMPv6 {
		return errors.New("ICMP is answered")
	}
	if p.later() {
		return errors.New("a later fragment is answered (RFC 1122, section 3.2.2)")
	}
	if !p.df {
		return errors.New("it may be fragmented")
	}
	kind, code := uint8(3), uint8(4)
	if p.family == 6 {
		kind, code = 2, 0
	}
	var limits []uint32
	var raised []*backend // whose path's MTU an error may have raised
	switch {
	case e.reply && e.conversation != nil:
		for _, h := range e.conversation.hops {
			limits = append(limits, j.world.devices.by(h.ingress).mtu)
		}
	case e.reply:
		for _, d := range j.world.devices {
			limits = append(limits, d.mtu)
		}
	default:
		backends := e.choices
		if e.note != nil {
			backends = []*backend{e.note.backend}
		}
		for _, b := range backends {
			for _, learned := range j.learned(b) {
				if b.fits(p, learned) {
					continue
				}
				if known := j.paths[b.address]; known != nil && learned == known.raised && !known.known[learned] {
					raised = append(raised, b)
					continue
				}
				limits = append(limits, b.told(p, learned))
			}
		}
	}
	nearest := errors.New("nothing limits it")
	for _, mtu := range limits {
		err := errorAbout(p, j.r.out, kind, code, mtu)
		if err == nil {
			if int(mtu) >= p.length() {
				j.met["packet too big tells an MTU that it does not exceed"]++
			}
			return nil
		}
		nearest = err
	}
	for _, b := range raised {
		known := j.paths[b.address]
		if errorAbout(p, j.r.out, kind, code, b.told(p, known.raised)) == nil {
			j.broken("path", "the sender is told %d; of %v is known that it takes %v: an error that told %d has raised it",
				b.told(p, known.raised), b.address, known.known, known.raised)
			j.believeRaised(b)
			return nil
		}
	}
	return nearest
}

// checkTraffic holds the counters of services and backends against the verdict.
func (j *judged) checkTraffic() {
	length := uint64(len(j.p.frame))
	e := j.e
	var want, perhaps []moved
	add := func(list *[]moved, s *service, b *backend, by traffic) {
		if s != nil {
			*list = append(*list, moved{false, s.id, by})
		}
		if b != nil {
			*list = append(*list, moved{true, b.id, by})
		}
	}
	switch v := j.v; {
	case v == forwardICMP:
		add(&want, e.service, j.backend, traffic{packets: 1, bytes: length})
	case forwarded(v):
		by := traffic{packets: 1, bytes: length}
		if v == forwardNew {
			by.connections = 1
		}
		add(&want, e.service, j.backend, by)
	case replied(v):
		if c := j.client; c != nil {
			add(&want, c.service, c.backend, traffic{replyPackets: 1, replyBytes: length})
		} else if e.note != nil {
			add(&want, e.note.service, e.note.backend, traffic{replyPackets: 1, replyBytes: length})
		}
	case v == answerTooBig: // told to its sender: not served
		add(&perhaps, e.service, nil, traffic{refused: 1})
	case v == resetReplyUnknown:
	case reset(v):
		add(&want, e.service, nil, traffic{refused: 1})
	case dropped(v):
		switch {
		case e.service != nil && !e.reply && e.quoted == nil && e.note == nil:
			add(&want, e.service, nil, traffic{refused: 1})
		case e.service != nil:
			add(&perhaps, e.service, nil, traffic{refused: 1})
		case j.p.malformed != "" || !j.p.ported:
			for _, s := range j.world.services {
				add(&perhaps, s, nil, traffic{refused: 1})
			}
		}
	}
	for _, w := range want {
		found := false
		for _, got := range j.r.traffic {
			found = found || got == w
		}
		if !found {
			j.broken("traffic", "%s should have moved %+v", verdictNames[j.v], w)
		}
	}
	for _, got := range j.r.traffic {
		known := false
		for _, w := range append(want, perhaps...) {
			known = known || got == w
		}
		if !known {
			j.broken("traffic", "%s moved %+v", verdictNames[j.v], got)
		}
	}
}

// possible are the events that each kind of verdict may come with.
func (j *judged) possible(e event) bool {
	v, p := j.v, j.p
	tcp := p.family != 0 && p.malformed == "" && p.protocol == protoTCP && p.ported
	client := forwarded(v) && v != forwardICMP && v != forwardFragment
	reply := v == replyTable || v == replyHalfOpen
	// A packet may be looked up, and then not go on.
	late := v == answerTooBig || v >= dropNoNeighbor && j.e.service != nil && p.ported
	ends := tcp && j.e.flags&(fin|rst) != 0
	switch e {
	case bpf.FairleadEventEVENT_CONFIRMED:
		return client || reply && p.protocol == protoUDP || late
	case bpf.FairleadEventEVENT_MATURED:
		return client && v != forwardNew || late
	case bpf.FairleadEventEVENT_ADOPTION_LIMITED:
		return j.limits.adoptions != 0 && (v == forwardUnknown || late)
	case bpf.FairleadEventEVENT_YOUNG_LIMITED:
		return j.limits.young != 0 && (client || reply || late)
	case bpf.FairleadEventEVENT_TABLE_FULL:
		return j.limits.connections != 0 && (client || reply || late || v == resetTableFull)
	case bpf.FairleadEventEVENT_CLOSING:
		return ends && (client || reply || late)
	case bpf.FairleadEventEVENT_CLOSING_UNFIT:
		return ends && (client || reply || late)
	case bpf.FairleadEventEVENT_TAKEN_BACK:
		return client || reply || late
	case bpf.FairleadEventEVENT_PORT_STOLEN:
		return v == forwardNew || late
	case bpf.FairleadEventEVENT_RESOLVED_SELF:
		return client || reply || late
	case bpf.FairleadEventEVENT_REMOVED:
		return client || reset(v) || late
	case bpf.FairleadEventEVENT_COLLISION:
		return v == forwardNew || v == resetNoPort || v == resetNoBackend || v == resetTableFull || late
	case bpf.FairleadEventEVENT_PATH_MTU:
		if v != passTunnelError {
			return false
		}
		_, told := toldMTU(p)
		return told
	}
	return false
}

// openingWindow is how far beyond the SYN-ACK the client's first acknowledgement may be.
const openingWindow = 1<<16 - 1

func (j *judged) checkEvents() {
	for i, n := range j.r.events {
		if n == 0 {
			continue
		}
		if n < 0 || n > 1 && event(i) != bpf.FairleadEventEVENT_COLLISION { // each backend that was tried
			j.broken("event", "%s moved by %d", eventNames[i], n)
		}
		if !j.possible(event(i)) {
			j.broken("event", "%s can't come of this packet (%s)", eventNames[i], verdictNames[j.v])
		}
	}
	c := j.e.conversation
	if !j.r.event(bpf.FairleadEventEVENT_CONFIRMED) || j.e.reply || j.p.protocol != protoTCP || c == nil || c.confirmed ||
		!c.backend.stateful() || j.v != forwardHalfOpen {
		return
	}
	// Confirmed means: the backend's SYN-ACK, and then the client's ACK of it, and of nothing that was not sent.
	t := j.p.transport()
	fits := false
	for from, end := range c.openers {
		fits = fits || be32(t[8:])-from <= max(end-from, openingWindow)
	}
	if t[13]&ack == 0 || !fits {
		j.broken("confirmed", "by a segment that acknowledges %d; what the backend sent since its SYN-ACK: %v", be32(t[8:]), c.openers)
	}
}

// checkPath judges, and notes, what an error said of a tunnel's way (RFC 1191, section 6.3; RFC 8201, section 4).
func (j *judged) checkPath() {
	q := j.e.quoted
	if q == nil {
		return
	}
	end := q.destination.Addr()
	noted := j.r.event(bpf.FairleadEventEVENT_PATH_MTU)
	mtu, told := toldMTU(j.p)
	if !told || mtu == 0 && !noted { // a router that knows no MTU (RFC 1191, section 5): a guess is as good as none
		return
	}
	least := uint32(576)
	if end.Is6() {
		least = 1280
	}
	mtu = max(mtu, least)
	known := &path{known: map[uint32]bool{0: true}}
	if j.paths[end] != nil {
		known = j.paths[end]
	}
	now := path{known: maps2.Clone(known.known), raised: known.raised}
	defer func() {
		if j.learns {
			j.paths[end] = &now
		}
	}()
	lower, surely := false, true // than what is known
	for one := range known.known {
		is := one == 0 || mtu < one
		lower, surely = lower || is, surely && is
	}
	switch {
	case noted && !lower && (known.raised == 0 || mtu >= known.raised):
		j.broken("path", "%d noted, and %v is known", mtu, known.known)
	case noted:
		if !lower {
			j.broken("path", "%d noted, and %v was known: an error that told %d must have raised it", mtu, known.known, known.raised)
		}
		now = path{known: map[uint32]bool{mtu: true}}
	case surely && !known.known[0]:
		j.broken("path", "%d is lower than what is known, %v, and was not noted", mtu, known.known)
	case lower:
		now.known[mtu] = true
	case mtu > known.raised:
		now.raised = mtu
	}
}

// raisedPath tells whether a packet shows that a path's MTU was raised by what an error told.
func (j *judged) raisedPath(b *backend) bool {
	known := j.paths[b.address]
	if b.overhead() == 0 || known == nil || known.raised == 0 {
		return false
	}
	for learned := range known.known {
		if b.fits(j.p, learned) {
			return false
		}
	}
	return true
}

// believeRaised goes on with what the data plane was seen to believe.
func (j *judged) believeRaised(b *backend) {
	if j.learns {
		j.paths[b.address] = &path{known: map[uint32]bool{j.paths[b.address].raised: true}}
	}
}

// learn notes what the packet changed.
func (j *judged) learn() {
	p, e := j.p, j.e
	if p.family == 0 || p.malformed != "" || p.later() || !p.ported {
		return
	}
	switch {
	case forwarded(j.v) && j.backend != nil && e.service != nil:
		j.learnForward()
	case replied(j.v):
		j.learnReply()
	case e.service != nil && !e.reply && (dropped(j.v) && j.v >= dropNoNeighbor || j.v == answerTooBig):
		c := e.conversation
		opens := p.protocol == protoUDP || e.flags&syn != 0
		if c == nil || c.closing || !c.confirmed && opens && !c.backend.usable() {
			j.haunt()
		}
		if j.r.event(bpf.FairleadEventEVENT_PORT_STOLEN) { // whose is not known
			for _, robbed := range j.conversations {
				robbed.mayBeGone = robbed.mayBeGone || !robbed.confirmed && robbed.backend.method == maps.MethodFullNAT
			}
		}
		if c != nil {
			j.mark(c)
			j.learnSYN(c)
			c.hops = saw(c.hops, hopOf(p, j.ingress))
		}
	case e.reply && e.conversation != nil:
		j.mark(e.conversation) // looked up before it was seen that it can't go on
		j.learnNumbers(e.conversation)
	}
}

func (j *judged) mark(c *conversation) {
	if j.p.protocol == protoTCP && j.e.flags&(fin|rst) != 0 {
		c.closing = true
	}
	if j.r.event(bpf.FairleadEventEVENT_CONFIRMED) {
		c.confirmed = true
	}
}

func (j *judged) learnForward() {
	p, e, b := j.p, j.e, j.backend
	t := tupleOf(p)
	c := e.conversation
	ghost := j.ghosts[t]
	delete(j.ghosts, t)
	out := parse(j.r.out)
	source := p.from4()
	if b.method == maps.MethodFullNAT && out.ported {
		source = out.from4()
	}
	switch {
	case j.v == forwardUnknown, j.v == forwardRing && c == nil:
		if c != nil && j.v == forwardUnknown {
			j.drop(c)
		}
		j.noteFragments(nil, source)
		return
	case c == nil || j.v == forwardNew || j.v == forwardAdopted || c.backend != b:
		if c != nil {
			j.drop(c)
		}
		c = ghost
		if c == nil {
			c = newConversation(t)
		}
		c.service, c.backend, c.source = e.service, b, source
		c.confirmed = j.v == forwardAdopted || j.v == forwardTable
		j.conversations[t] = c
		if way, ok := c.wayBack(); ok {
			if owner := j.waysBack[way]; owner != nil && owner != c && j.conversations[owner.tuple] == owner {
				switch {
				case owner.mayBeGone:
				case !owner.confirmed && b.method == maps.MethodFullNAT && j.r.event(bpf.FairleadEventEVENT_PORT_STOLEN):
				case !owner.confirmed && !owner.backend.usable():
				default:
					j.broken("way back", "%v is given the way back %v of %v (confirmed: %t)", t, way, owner.tuple, owner.confirmed)
				}
				j.drop(owner)
			}
			j.waysBack[way] = c
		}
	}
	if j.v == forwardTable || j.v == forwardRing {
		c.confirmed = true
	}
	c.hops = saw(c.hops, hopOf(p, j.ingress))
	j.mark(c)
	j.learnSYN(c)
	j.noteFragments(c, source)
}

// noteFragments notes where the rest of a fragmented client's packet goes, and that its new ID is its own.
func (j *judged) noteFragments(c *conversation, source netip.AddrPort) {
	p, b := j.p, j.backend
	if !p.fragment() {
		return
	}
	n := &note{
		service: j.e.service, backend: b, conversation: c, source: source, destination: p.to4(), hash: tupleOf(p).Hash(),
	}
	if b.stateful() {
		n.destination = b.at(p.to4())
		n.id = parse(j.r.out).id
		j.ownIdentity(n)
	}
	j.fragments[fragmentKeyOf(p)] = n
}

// ownIdentity holds a rewritten ID against RFC 6864, section 4.3, and RFC 8200, section 4.5: not that of another packet
// between the same ends that may yet be on its way.
func (j *judged) ownIdentity(n *note) {
	at := identity{n.source.Addr(), n.destination.Addr(), j.p.protocol}
	known := j.identities[at]
	if known == nil {
		known = map[uint32]fragmentKey{}
		j.identities[at] = known
	}
	if other, used := known[n.id]; used && len(known) < 1<<15 {
		j.broken("identification", "%#x is also that of %v, between the same ends", n.id, other)
	}
	known[n.id] = fragmentKeyOf(j.p)
}

func (j *judged) learnReply() {
	p, c := j.p, j.client
	if c == nil {
		return
	}
	if j.ghosts[c.tuple] != nil { // it is noted, then
		delete(j.ghosts, c.tuple)
		j.conversations[c.tuple] = c
		if way, ok := c.wayBack(); ok {
			if owner := j.waysBack[way]; owner != nil && owner != c {
				j.drop(owner)
			}
			j.waysBack[way] = c
		}
	}
	j.mark(c)
	if j.v == replyTable {
		c.confirmed = true
	}
	j.learnNumbers(c)
	if p.fragment() {
		n := &note{
			reply: true, service: c.service, backend: c.backend, conversation: c,
			source: c.tuple.Destination, destination: c.tuple.Source, id: parse(j.r.out).id, hops: c.hops,
		}
		j.ownIdentity(n)
		j.fragments[fragmentKeyOf(p)] = n
	}
}

// learnNumbers notes what a backend's segment sends, and so may be acknowledged.
func (j *judged) learnNumbers(c *conversation) {
	p := j.p
	if p.protocol != protoTCP || p.transportFault() != "" {
		return
	}
	t := p.transport()
	end := be32(t[4:]) + uint32(len(t)-int(t[12]>>4)*4)
	if t[13]&(syn|fin) != 0 {
		end++
	}
	if _, perhaps := j.answersSYN(c, p); perhaps {
		c.openers[be32(t[4:])+1] = end
	}
	for from, last := range c.openers {
		if int32(end-last) > 0 {
			c.openers[from] = end
		}
	}
}

// haunt notes a client that may be noted, though its packet did not go on.
func (j *judged) haunt() {
	t := tupleOf(j.p)
	c := j.ghosts[t]
	if c == nil {
		c = newConversation(t)
		j.ghosts[t] = c
	}
	c.hops = saw(c.hops, hopOf(j.p, j.ingress))
	j.learnSYN(c)
}

// learnSYN notes which acknowledgements answer the client's SYNs.
func (j *judged) learnSYN(c *conversation) {
	if j.p.protocol != protoTCP || j.e.flags&syn == 0 {
		return
	}
	t := j.p.transport()
	end := be32(t[4:]) + 1
	c.syns = append(c.syns, end, end+uint32(len(t)-int(t[12]>>4)*4))
}
