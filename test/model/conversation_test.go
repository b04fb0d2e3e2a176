package model

import (
	"net/netip"
	"slices"

	"fairlead/bpf"
	"fairlead/maps"
)

// What the model knows of connections: only what it saw happen.

// conversation is a client's connection to a service.
type conversation struct {
	tuple     maps.Tuple
	service   *service
	backend   *backend
	source    netip.AddrPort // whom a stateful method's backend talks to
	confirmed bool
	closing   bool // FIN or RST were seen: it may end
	mayBeGone bool // it is closing, and an epoch was turned
	hops      []hop
	syns      []uint32          // sequence numbers behind the client's SYNs, without and with their data, in their order
	openers   map[uint32]uint32 // acknowledgements that confirm it: from that of a SYN-ACK to the end of what the backend sent since
}

func newConversation(t maps.Tuple) *conversation {
	return &conversation{tuple: t, openers: map[uint32]uint32{}}
}

// hop is where a client's packets came from.
type hop struct {
	to, from mac
	vlan     [2]uint16
	ingress  uint32
}

// hopOf is the way back to where a packet came from. Priority tags name no VLAN.
func hopOf(p *packet, ingress uint32) hop {
	h := hop{to: p.from, from: p.to, ingress: ingress}
	n := 0
	for _, t := range p.tags {
		if t.id() == 0 {
			continue
		}
		h.vlan[n] = t.id()
		if t.ether == ether8021AD {
			h.vlan[n] |= maps.Tag8021AD
		}
		n++
	}
	return h
}

// saw notes where a client's packet came from, the latest last.
func saw(hops []hop, h hop) []hop {
	if i := slices.Index(hops, h); i >= 0 {
		hops = slices.Delete(slices.Clone(hops), i, i+1)
	}
	return append(hops[:len(hops):len(hops)], h)
}

// wayBack is the tuple of the replies to a conversation.
func (c *conversation) wayBack() (maps.Tuple, bool) {
	if c.backend == nil || !c.backend.stateful() {
		return maps.Tuple{}, false
	}
	return maps.Tuple{Source: c.backend.at(c.tuple.Destination), Destination: c.source, Protocol: c.tuple.Protocol}, true
}

// fragmentKey is what the fragments of one packet share (RFC 791, section 3.2; RFC 8200, section 4.5).
type fragmentKey struct {
	source, destination netip.Addr
	id                  uint32
	protocol            uint8
}

func fragmentKeyOf(p *packet) fragmentKey {
	if p.family == 6 {
		return fragmentKey{p.source, p.destination, p.id, 0}
	}
	return fragmentKey{p.source, p.destination, p.id, p.protocol}
}

// note is where the fragments of a packet go.
type note struct {
	reply               bool
	service             *service
	backend             *backend
	conversation        *conversation
	source, destination netip.AddrPort // of what goes out
	id                  uint32         // of what goes out, where it is rewritten
	hash                uint64
	hops                []hop
	mayBeGone           bool
}

// identity is what IDs have to tell apart (RFC 6864, section 4.1).
type identity struct {
	source, destination netip.Addr
	protocol            uint8
}

// path is what the model knows that the data plane knows of the way to an end of a tunnel: one of these, 0 for nothing.
// A later error that told more must not have raised it (RFC 8201, section 4).
type path struct {
	known  map[uint32]bool
	raised uint32 // the most that was told later; 0: none
}

// forget drops a conversation whose backend or service is no more.
func (m *model) forget() {
	for t, c := range m.conversations {
		if m.world.backends[c.backend.id] != c.backend || m.world.keys[key{t.Destination, t.Protocol}] == nil {
			m.drop(c)
			continue
		}
		c.service = m.world.keys[key{t.Destination, t.Protocol}]
	}
	for t := range m.ghosts {
		if m.world.keys[key{t.Destination, t.Protocol}] == nil {
			delete(m.ghosts, t)
		}
	}
	for _, n := range m.fragments {
		if m.world.backends[n.backend.id] != n.backend {
			n.mayBeGone = true
		}
	}
}

func (m *model) drop(c *conversation) {
	if m.conversations[c.tuple] == c {
		delete(m.conversations, c.tuple)
	}
	if t, ok := c.wayBack(); ok && m.waysBack[t] == c {
		delete(m.waysBack, t)
	}
}

// turned is what an epoch's turn may do.
func (m *model) turned() {
	for _, c := range m.conversations {
		c.mayBeGone = c.mayBeGone || c.closing && m.world.plane.epoch < shortEpoch
	}
}

// livePorts counts confirmed conversations that hold a source port of a backend's pools, and those of whom it is not
// known whether they do.
func (m *model) livePorts(b *backend) (held, unsure int) {
	for _, c := range m.conversations {
		if c.backend.method == maps.MethodFullNAT && c.backend.address == b.address && c.backend.port == b.port &&
			c.tuple.Protocol == b.service.protocol && c.confirmed {
			held++
		}
	}
	return held, len(m.ghosts)
}

// The verdicts by what they say was done.
func passed(v verdict) bool { return v <= bpf.FairleadVerdictPASS_TUNNEL_ERROR }
func forwarded(v verdict) bool {
	return v >= bpf.FairleadVerdictFORWARD_RING && v <= bpf.FairleadVerdictFORWARD_FRAGMENT
}
func replied(v verdict) bool {
	return v >= bpf.FairleadVerdictREPLY_TABLE && v <= bpf.FairleadVerdictREPLY_FRAGMENT
}
func answered(v verdict) bool {
	return v >= bpf.FairleadVerdictANSWER_ARP && v <= bpf.FairleadVerdictRESET_REPLY_UNKNOWN
}
func reset(v verdict) bool {
	return v >= bpf.FairleadVerdictRESET_UNKNOWN && v <= bpf.FairleadVerdictRESET_REPLY_UNKNOWN
}
func dropped(v verdict) bool { return v >= bpf.FairleadVerdictDROP_TRUNCATED }
