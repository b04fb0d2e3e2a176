package model

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead/bpf"
	"fairlead/maps"
)

// fault is a lie about what came of a packet. It answers false where it can't be told of this one.
type fault struct {
	name  string
	rules []string // one of which must be seen to be broken
	lie   func(f *forgery) bool
}

// forgery is a packet, what truly came of it, and what is told.
type forgery struct {
	*judged // what truly came of it, judged
	r       *result
	out     *packet // what was sent, if anything
	random  *rand.Rand
}

// sent tells whether a whole packet of this transport went to a backend, its checksums right on both sides.
func (f *forgery) sent(protocol uint8) bool {
	return aForward.has(f.v) && f.p.protocol == protocol && !f.p.fragment() && f.p.exotic == "" && f.p.wrongness() == 0 &&
		f.p.headerWrongness() == 0
}

// plainly: the same by a method that puts nothing in front of it.
func (f *forgery) plainly(protocol uint8) bool {
	return f.sent(protocol) && f.backend.overhead() == 0
}

func (f *forgery) tunnelled(m maps.Method, outer uint8) bool {
	return aForward.has(f.v) && f.backend.method == m && f.out.family == outer
}

// l3 and l4 are bytes of what was sent.
func (f *forgery) l3() []byte { return f.r.out[f.out.l3:f.out.end] }
func (f *forgery) l4() []byte { return f.r.out[f.out.l4:f.out.end] }

// count moves the one verdict to another.
func (f *forgery) count(v verdict) {
	f.r.verdicts = [bpf.FairleadVerdictVERDICT_COUNT]int64{}
	f.r.verdicts[v] = 1
}

// drop, pass and send tell that another thing was done, and counted so.
func (f *forgery) drop(v verdict) bool {
	f.count(v)
	f.r.action, f.r.traffic = xdpDrop, nil
	if f.e.service != nil {
		f.r.traffic = []moved{{false, f.e.service.id, traffic{refused: 1}}}
	}
	return true
}

func (f *forgery) pass(v verdict) bool {
	f.count(v)
	f.r.action, f.r.traffic, f.r.out = xdpPass, nil, bytes.Clone(f.p.frame)
	return true
}

// other is a backend of the same service that can be reached, another than it went to.
func (f *forgery) other() *backend {
	for _, b := range f.e.service.members {
		if b != f.backend && b.hop.Known && b.method == f.backend.method && b.hop.MTU >= f.backend.hop.MTU && b.address != f.backend.address {
			return b
		}
	}
	return nil
}

// edit changes bytes of what was sent and makes its checksums right.
func (f *forgery) edit(change func(l3, l4 []byte)) bool {
	change(f.l3(), f.l4())
	repaired(f.r.out)
	return true
}

var faults = []fault{
	{"a byte of the payload is another", []string{"forwarded"}, func(f *forgery) bool {
		return f.plainly(protoTCP) && len(f.l4()) > 25 && f.edit(func(_, l4 []byte) { l4[len(l4)-1] ^= 1 })
	}},
	{"time to live is not decremented", []string{"forwarded"}, func(f *forgery) bool {
		return f.plainly(protoTCP) && f.out.family == 4 && f.edit(func(l3, _ []byte) { l3[8]++ })
	}},
	{"hop limit is not decremented", []string{"forwarded"}, func(f *forgery) bool {
		return f.plainly(protoTCP) && f.out.family == 6 && f.edit(func(l3, _ []byte) { l3[7]++ })
	}},
	{"traffic class is changed", []string{"forwarded"}, func(f *forgery) bool {
		return f.plainly(protoUDP) && f.edit(func(l3, _ []byte) { l3[1] ^= 0x20 })
	}},
	{"DF is lost", []string{"forwarded"}, func(f *forgery) bool {
		return f.plainly(protoTCP) && f.out.family == 4 && f.p.df && f.edit(func(l3, _ []byte) { l3[6] &^= 0x40 })
	}},
	{"IPv4 header checksum is wrong", []string{"forwarded"}, func(f *forgery) bool {
		if !f.plainly(protoTCP) || f.out.family != 4 {
			return false
		}
		f.l3()[11]++
		return true
	}},
	{"TCP checksum is wrong", []string{"forwarded"}, func(f *forgery) bool {
		if !f.plainly(protoTCP) {
			return false
		}
		f.l4()[17]++
		return true
	}},
	{"UDP checksum is wrong", []string{"forwarded"}, func(f *forgery) bool {
		if !f.plainly(protoUDP) || be16(f.l4()[6:]) == 0 {
			return false
		}
		f.l4()[7] += 3
		return true
	}},
	{"a wrong checksum is made right", []string{"forwarded"}, func(f *forgery) bool {
		if !aForward.has(f.v) || !f.backend.stateful() || f.p.fragment() || f.p.wrongness() == 0 || be16(f.p.transport()[checksumAt(f.p.protocol):]) == 0 {
			return false
		}
		repaired(f.r.out)
		return true
	}},
	{"UDP without checksum gets one", []string{"forwarded"}, func(f *forgery) bool {
		if !aForward.has(f.v) || f.p.protocol != protoUDP || f.p.fragment() || f.p.family != 4 || be16(f.p.transport()[6:]) != 0 || f.backend.overhead() > 0 {
			return false
		}
		binary.BigEndian.PutUint16(f.l4()[6:], computed(f.out.source, f.out.destination, protoUDP, f.l4()))
		return true
	}},
	{"a computed UDP checksum is told as none", []string{"forwarded"}, func(f *forgery) bool {
		if !f.plainly(protoUDP) || be16(f.p.transport()[6:]) == 0 {
			return false
		}
		f.l4()[6], f.l4()[7] = 0, 0
		return true
	}},
	{"to another's Ethernet address", []string{"forwarded"}, func(f *forgery) bool {
		if !aForward.has(f.v) {
			return false
		}
		f.r.out[5] ^= 1
		return true
	}},
	{"from another Ethernet address", []string{"forwarded"}, func(f *forgery) bool {
		if !aForward.has(f.v) {
			return false
		}
		f.r.out[11] ^= 1
		return true
	}},
	{"a VLAN id is another", []string{"forwarded"}, func(f *forgery) bool {
		if !aForward.has(f.v) || len(f.out.tags) == 0 {
			return false
		}
		f.r.out[15] ^= 1
		return true
	}},
	{"the tag is missing", []string{"forwarded"}, func(f *forgery) bool {
		if !aForward.has(f.v) || len(f.out.tags) == 0 {
			return false
		}
		f.r.out = slices.Delete(bytes.Clone(f.r.out), 12, 16)
		return true
	}},
	{"by another device", []string{"device"}, func(f *forgery) bool {
		if !aForward.has(f.v) {
			return false
		}
		f.r.action = xdpTX + xdpRedirect - f.r.action
		return true
	}},
	{"a reply by another device", []string{"device"}, func(f *forgery) bool {
		if f.v != replyTable && f.v != replyHalfOpen {
			return false
		}
		f.r.action = xdpTX + xdpRedirect - f.r.action
		return true
	}},
	{"something is sent behind the packet", []string{"forwarded"}, func(f *forgery) bool {
		if !aForward.has(f.v) {
			return false
		}
		f.r.out = append(bytes.Clone(f.r.out), 0x55)
		return true
	}},
	{"a confirmed connection goes to another backend", []string{"pinned"}, func(f *forgery) bool {
		c := f.e.conversation
		if f.v != forwardTable || c == nil || !c.confirmed || c.mayBeGone || f.p.fragment() || f.backend.method != maps.MethodNAT && f.backend.method != maps.MethodDSR {
			return false
		}
		b := f.other()
		if b == nil {
			return false
		}
		i := rewritten(f.p, f.p.from4(), b.at(f.p.to4()), 0, false)
		f.r.out = slices.Concat(ethernet(b.hop.MAC, b.hop.SourceMAC, hopTags(b.hop.VLAN), f.p.ether), i.bytes, f.p.frame[f.p.end:])
		f.r.action = xdpRedirect
		if b.hop.Interface == f.ingress {
			f.r.action = xdpTX
		}
		for i := range f.r.traffic {
			if f.r.traffic[i].backend {
				f.r.traffic[i].id = b.id
			}
		}
		return true
	}},
	{"a confirmed connection is chosen anew", []string{"pinned"}, func(f *forgery) bool {
		c := f.e.conversation
		if f.v != forwardTable || c == nil || !c.confirmed || c.closing || c.mayBeGone {
			return false
		}
		f.count(forwardNew)
		for i := range f.r.traffic {
			f.r.traffic[i].by.connections = 1
		}
		return true
	}},
	{"fullnat from a port of nobody's", []string{"forwarded"}, func(f *forgery) bool {
		return f.plainly(protoTCP) && f.backend.method == maps.MethodFullNAT && f.v == forwardNew &&
			f.edit(func(_, l4 []byte) { binary.BigEndian.PutUint16(l4, 9) })
	}},
	{"fullnat from another's port", []string{"forwarded"}, func(f *forgery) bool {
		return f.plainly(protoTCP) && f.backend.method == maps.MethodFullNAT && f.v == forwardTable && f.e.conversation != nil && !f.e.conversation.mayBeGone &&
			f.edit(func(_, l4 []byte) { binary.BigEndian.PutUint16(l4, be16(l4)^1) })
	}},
	{"a reply to another client", []string{"reply"}, func(f *forgery) bool {
		return (f.v == replyTable || f.v == replyHalfOpen) && !f.out.fragment() && f.e.conversation != nil && !f.e.conversation.mayBeGone &&
			f.edit(func(l3, _ []byte) {
				at, size := addressesAt(f.out.family)
				l3[at+2*size-1] ^= 1
			})
	}},
	{"a reply to another port", []string{"reply"}, func(f *forgery) bool {
		return (f.v == replyTable || f.v == replyHalfOpen) && !f.out.fragment() && f.e.conversation != nil && !f.e.conversation.mayBeGone &&
			f.edit(func(_, l4 []byte) { l4[3] ^= 1 })
	}},
	{"a reply from the backend's own address", []string{"reply"}, func(f *forgery) bool {
		return (f.v == replyTable || f.v == replyHalfOpen) && !f.out.fragment() &&
			f.edit(func(l3, _ []byte) {
				at, _ := addressesAt(f.out.family)
				putAddress(l3[at:], f.p.source)
			})
	}},
	{"a reply to nobody is sent", []string{"verdict"}, func(f *forgery) bool {
		if f.v != passReplyUnknown || f.p.malformed != "" || len(f.ghosts) > 0 {
			return false
		}
		f.count(replyTable)
		f.r.action = xdpTX
		return true
	}},
	{"an outer source outside of its prefix", []string{"forwarded"}, func(f *forgery) bool {
		return f.tunnelled(maps.MethodGUE, 4) && f.edit(func(l3, _ []byte) { l3[12] ^= 1 })
	}},
	{"an outer source of another hash", []string{"forwarded"}, func(f *forgery) bool {
		return f.tunnelled(maps.MethodIPIP, 6) && f.backend.tunnel.Bits() < 128 && f.edit(func(l3, _ []byte) { l3[23] ^= 1 })
	}},
	{"outer ECN is not the inner's", []string{"forwarded"}, func(f *forgery) bool {
		return f.tunnelled(maps.MethodIPIP, 4) && f.edit(func(l3, _ []byte) { l3[1] ^= 1 })
	}},
	{"outer DF is lost", []string{"forwarded"}, func(f *forgery) bool {
		return f.tunnelled(maps.MethodIPIP, 4) && f.out.df && f.p.family == 4 && f.edit(func(l3, _ []byte) { l3[6] &^= 0x40 })
	}},
	{"the tunnel's protocol is the other family's", []string{"forwarded"}, func(f *forgery) bool {
		return f.tunnelled(maps.MethodIPIP, 4) && f.edit(func(l3, _ []byte) { l3[9] ^= protoIPIP ^ protoIPv6 })
	}},
	{"a GUE source port of another hash", []string{"forwarded"}, func(f *forgery) bool {
		if !f.tunnelled(maps.MethodGUE, 6) {
			return false
		}
		f.l4()[1] ^= 1
		return true
	}},
	{"a GUE length is another", []string{"forwarded", "well-formed"}, func(f *forgery) bool {
		if !f.tunnelled(maps.MethodGUE, 4) {
			return false
		}
		f.l4()[5] ^= 1
		return true
	}},
	{"an inner time to live is not decremented", []string{"forwarded"}, func(f *forgery) bool {
		if !f.tunnelled(maps.MethodIPIP, 6) || f.p.family != 6 {
			return false
		}
		f.l4()[7]++
		return true
	}},
	{"a later fragment by another ID", []string{"forwarded"}, func(f *forgery) bool {
		return f.v == forwardFragment && f.out.family == 4 && f.backend.overhead() == 0 && f.edit(func(l3, _ []byte) { l3[5] ^= 1 })
	}},
	{"a later fragment at another offset", []string{"forwarded", "reply"}, func(f *forgery) bool {
		return (f.v == forwardFragment || f.v == replyFragment) && f.out.family == 4 && f.edit(func(l3, _ []byte) { l3[7] ^= 2 })
	}},
	{"an ICMP error's quoted packet is as it was", []string{"forwarded", "reply"}, func(f *forgery) bool {
		if f.v != forwardICMP && f.v != replyICMP || f.v == forwardICMP && !f.backend.stateful() {
			return false
		}
		was, is := f.p.frame[f.p.l4+8:f.p.end], f.l4()[8:]
		if bytes.Equal(was, is) {
			return false
		}
		copy(is, was)
		repaired(f.r.out)
		return true
	}},
	{"an ICMP error's checksum is as it was", []string{"forwarded", "reply"}, func(f *forgery) bool {
		if f.v != forwardICMP && f.v != replyICMP || f.v == forwardICMP && !f.backend.stateful() {
			return false
		}
		if be16(f.l4()[2:])%0xffff == be16(f.p.transport()[2:])%0xffff {
			return false
		}
		copy(f.l4()[2:4], f.p.transport()[2:4])
		return true
	}},
	{"two verdicts", []string{"one verdict"}, func(f *forgery) bool { f.r.verdicts[dropTTL]++; return true }},
	{"one verdict twice", []string{"one verdict"}, func(f *forgery) bool { f.r.verdicts[f.v]++; return true }},
	{"no verdict", []string{"one verdict"}, func(f *forgery) bool { f.r.verdicts[f.v] = 0; return true }},
	{"counted as dropped, and sent", []string{"action", "verdict"}, func(f *forgery) bool {
		if !aForward.has(f.v) {
			return false
		}
		f.count(dropTTL)
		return true
	}},
	{"aborted", []string{"action"}, func(f *forgery) bool { f.r.action = xdpAborted; return true }},
	{"another service's counters", []string{"traffic"}, func(f *forgery) bool { return f.moves(func(m *moved) { m.id ^= 1 }) }},
	{"a byte less is counted", []string{"traffic"}, func(f *forgery) bool { return aForward.has(f.v) && f.moves(func(m *moved) { m.by.bytes-- }) }},
	{"a packet too many is counted", []string{"traffic"}, func(f *forgery) bool { return f.moves(func(m *moved) { m.by.packets++ }) }},
	{"a connection is not counted", []string{"traffic"}, func(f *forgery) bool {
		return f.v == forwardNew && f.moves(func(m *moved) { m.by.connections = 0 })
	}},
	{"a refusal is not counted", []string{"traffic"}, func(f *forgery) bool {
		if !reset(f.v) || len(f.r.traffic) == 0 {
			return false
		}
		f.r.traffic = nil
		return true
	}},
	{"a reply is counted as a client's packet", []string{"traffic"}, func(f *forgery) bool {
		return f.v == replyTable && f.moves(func(m *moved) { m.by = traffic{packets: m.by.replyPackets, bytes: m.by.replyBytes} })
	}},
	{"what is not ours is counted", []string{"traffic"}, func(f *forgery) bool {
		if f.v != passNotOurs {
			return false
		}
		f.r.traffic = []moved{{false, 1, traffic{packets: 1, bytes: uint64(len(f.p.frame))}}}
		return true
	}},
	{"an event of a packet that is not ours", []string{"event"}, func(f *forgery) bool {
		if f.v != passNotOurs {
			return false
		}
		f.r.events[bpf.FairleadEventEVENT_CONFIRMED]++
		return true
	}},
	{"an event twice", []string{"event"}, func(f *forgery) bool {
		if f.v != forwardHalfOpen {
			return false
		}
		f.r.events[bpf.FairleadEventEVENT_RESOLVED_SELF] = 2
		return true
	}},
	{"a path's MTU from another error", []string{"event"}, func(f *forgery) bool {
		if f.v != passTunnelError {
			return false
		}
		if _, told := toldMTU(f.p); told {
			return false
		}
		f.r.events[bpf.FairleadEventEVENT_PATH_MTU] = 1
		return true
	}},
	{"confirmed by an ACK of nothing", []string{"confirmed"}, func(f *forgery) bool {
		c := f.e.conversation
		if f.v != forwardHalfOpen || c == nil || c.confirmed || !c.backend.stateful() || f.p.protocol != protoTCP || len(c.openers) > 0 {
			return false
		}
		f.r.events[bpf.FairleadEventEVENT_CONFIRMED] = 1
		return true
	}},
	{"passed, and changed", []string{"untouched"}, func(f *forgery) bool {
		if !passed(f.v) {
			return false
		}
		f.r.out[f.random.IntN(len(f.r.out))] ^= 0x10
		return true
	}},
	{"passed, and shortened", []string{"untouched"}, func(f *forgery) bool {
		if !passed(f.v) {
			return false
		}
		f.r.out = f.r.out[:len(f.r.out)-1]
		return true
	}},
	{"a good segment is dropped", []string{"verdict"}, func(f *forgery) bool {
		return f.v == forwardTable && f.p.exotic == "" && f.drop(dropBadHeader)
	}},
	{"a good SYN is passed", []string{"verdict"}, func(f *forgery) bool {
		return f.v == forwardNew && f.p.exotic == "" && f.pass(passNotOurs)
	}},
	{"what is not ours is dropped", []string{"verdict"}, func(f *forgery) bool {
		return f.v == passNotOurs && f.p.exotic == "" && f.p.malformed == "" && unicast(f.p.source) && f.drop(dropBadHeader)
	}},
	{"a spent time to live goes on", []string{"verdict", "obstacle"}, func(f *forgery) bool {
		if f.v != dropTTL || f.e.service == nil || f.e.reply || f.p.later() || len(f.e.choices) != 1 || f.e.ghost || f.e.quoted != nil {
			return false
		}
		f.count(forwardTable)
		f.r.action = xdpTX
		return true
	}},
	{"a malformed packet goes on", []string{"malformed"}, func(f *forgery) bool {
		if f.p.malformed == "" {
			return false
		}
		f.count(forwardTable)
		f.r.action = xdpTX
		return true
	}},
	{"a malformed segment goes on", []string{"malformed"}, func(f *forgery) bool {
		if f.p.malformed != "" || f.p.family == 0 || !f.p.ported || f.p.transportFault() == "" {
			return false
		}
		f.count(forwardTable)
		f.r.action = xdpTX
		return true
	}},
	{"a RST is answered", []string{"answer"}, func(f *forgery) bool {
		if f.v != dropUnknownRST {
			return false
		}
		f.count(resetUnknown)
		f.r.action = xdpTX
		return true
	}},
	{"a RST's sequence number is another", []string{"answer"}, func(f *forgery) bool {
		return reset(f.v) && f.p.protocol == protoTCP && f.edit(func(_, l4 []byte) { l4[7]++ })
	}},
	{"a RST without ACK that needs one", []string{"answer"}, func(f *forgery) bool {
		return reset(f.v) && f.p.protocol == protoTCP && f.e.flags&ack == 0 && f.edit(func(_, l4 []byte) { l4[13] &^= ack })
	}},
	{"port unreachable of another code", []string{"answer"}, func(f *forgery) bool {
		return reset(f.v) && f.p.protocol == protoUDP && f.edit(func(_, l4 []byte) { l4[1]++ })
	}},
	{"packet too big tells another MTU", []string{"answer", "path"}, func(f *forgery) bool {
		return f.v == answerTooBig && f.edit(func(_, l4 []byte) { l4[7]++ })
	}},
	{"a packet too big goes on", []string{"verdict", "forwarded"}, func(f *forgery) bool {
		if f.v != answerTooBig {
			return false
		}
		f.count(forwardTable)
		return true
	}},
	{"packet too big quotes something else", []string{"answer"}, func(f *forgery) bool {
		return f.v == answerTooBig && f.edit(func(_, l4 []byte) { l4[len(l4)-1]++ })
	}},
	{"packet too big from another address", []string{"answer"}, func(f *forgery) bool {
		return f.v == answerTooBig && f.edit(func(l3, _ []byte) {
			at, size := addressesAt(f.out.family)
			l3[at+size-1] ^= 1
		})
	}},
	{"an ICMP error is answered by one", []string{"answer"}, func(f *forgery) bool {
		if f.v != passICMP && f.v != forwardICMP {
			return false
		}
		f.count(answerTooBig)
		f.r.action = xdpTX
		return true
	}},
	{"an echo's payload is another", []string{"answer"}, func(f *forgery) bool {
		return f.v == answerEcho && f.edit(func(_, l4 []byte) { l4[len(l4)-1]++ })
	}},
	{"an echo's time to live is the asker's", []string{"answer"}, func(f *forgery) bool {
		return f.v == answerEcho && f.p.ttl != 64 && f.edit(func(l3, _ []byte) {
			if f.p.family == 4 {
				l3[8] = f.p.ttl
			} else {
				l3[7] = f.p.ttl
			}
		})
	}},
	{"an ARP reply with another's address", []string{"answer"}, func(f *forgery) bool {
		if f.v != answerARP {
			return false
		}
		f.r.out[f.p.l3+13] ^= 1
		return true
	}},
	{"an ARP reply for another", []string{"answer"}, func(f *forgery) bool {
		if f.v != answerARP {
			return false
		}
		f.r.out[f.p.l3+17] ^= 1
		return true
	}},
	{"an ARP request is not answered", []string{"verdict"}, func(f *forgery) bool {
		return f.v == answerARP && !f.e.verdicts.has(passNotOurs) && f.pass(passNotOurs)
	}},
	{"an advertisement that does not override", []string{"answer"}, func(f *forgery) bool {
		return f.v == answerNDP && f.edit(func(_, l4 []byte) { l4[4] &^= 0x20 })
	}},
	{"an advertisement with hop limit 64", []string{"answer"}, func(f *forgery) bool {
		return f.v == answerNDP && f.edit(func(l3, _ []byte) { l3[7] = 64 })
	}},
	{"a solicitation of wrong checksum is answered", []string{"verdict"}, func(f *forgery) bool {
		if !f.e.solicitation || f.e.verdicts.has(answerNDP) {
			return false
		}
		f.count(answerNDP)
		f.r.action, f.r.out = xdpTX, advertisement(f.p, f.world.devices.by(f.ingress))
		return true
	}},
	{"a packet by link-layer broadcast goes on", []string{"link broadcast"}, func(f *forgery) bool {
		if !f.p.to.group() || f.p.family == 0 || f.p.from.group() || !f.p.ported {
			return false
		}
		f.count(forwardTable)
		f.r.action = xdpTX
		return true
	}},
	{"a packet from a multicast address goes on", []string{"source"}, func(f *forgery) bool {
		if f.p.family == 0 || !f.p.source.IsValid() || unicast(f.p.source) || !f.p.ported {
			return false
		}
		f.count(forwardTable)
		f.r.action = xdpTX
		return true
	}},
	{"no neighbour, and sent", []string{"forwarded", "verdict"}, func(f *forgery) bool {
		if f.v != dropNoNeighbor {
			return false
		}
		f.count(forwardTable)
		f.r.action = xdpTX
		return true
	}},
}

// moves changes the first traffic counter that moved.
func (f *forgery) moves(change func(*moved)) bool {
	if len(f.r.traffic) == 0 {
		return false
	}
	change(&f.r.traffic[0])
	return true
}

// TestFaults: the model can fail. Each of these lies about what came of a packet is found out, each time it is told.
func TestFaults(t *testing.T) {
	d, err := newDevices()
	if err != nil {
		t.Fatal(err)
	}
	const times = 3 // that each lie is told
	random := rand.New(rand.NewPCG(1, 4))
	told := make([]int, len(faults))
	for seed := uint64(1); seed <= 6 && slices.Min(told) < times; seed++ {
		g, err := newGame(d, setup{seed, limits{epoch: 10 * time.Second}})
		if err != nil {
			t.Fatal(err)
		}
		g.spy = func(g *game, truth *result) {
			if slices.Min(told) >= times {
				return
			}
			truly := g.model.judge(g.frame, g.ingress, truth, false)
			if len(truly.breaches) > 0 {
				return // TestModel tells
			}
			for i, one := range faults {
				if told[i] >= times {
					continue
				}
				lie := *truth
				lie.out, lie.traffic = bytes.Clone(truth.out), slices.Clone(truth.traffic)
				f := &forgery{judged: truly, r: &lie, out: parse(truth.out), random: random}
				if !one.lie(f) {
					continue
				}
				told[i]++
				j := g.model.judge(g.frame, g.ingress, &lie, false)
				if !slices.ContainsFunc(j.breaches, func(b breach) bool { return slices.Contains(one.rules, b.rule) }) {
					t.Errorf("%q is not found out by %v, but by %v\nin   %s\nout  %s\nlie  %s\n%v", one.name, one.rules, j.breaches,
						hexadecimal(g.frame), hexadecimal(truth.out), hexadecimal(lie.out), &lie)
				}
			}
		}
		from := newGenerator(g.world, rand.New(rand.NewPCG(seed, 3)))
		for range packetsAGame {
			a := from.next()
			j, err := g.play(step{frame: a.frame, device: d.number(a.ingress)})
			if err != nil {
				t.Fatal(err)
			}
			from.heard(a, j)
			if from.random.IntN(1000) == 0 {
				if _, err := g.play(step{change: from.random.Uint64()}); err != nil {
					t.Fatal(err)
				}
			}
			if slices.Min(told) >= times {
				break
			}
		}
		g.close()
	}
	for i, one := range faults {
		if told[i] < times {
			t.Logf("%q: told %d times", one.name, told[i])
		}
		if told[i] == 0 {
			t.Errorf("%q: no packet came of which it could be told", one.name)
		}
	}
}

// TestWayBack: that a new connection is given the source port of one that is confirmed is found out.
func TestWayBack(t *testing.T) {
	d, err := newDevices()
	if err != nil {
		t.Fatal(err)
	}
	g, err := newGame(d, setup{1, limits{epoch: 10 * time.Second}})
	if err != nil {
		t.Fatal(err)
	}
	defer g.close()
	robbed := false
	g.spy = func(g *game, truth *result) {
		j := g.model.judge(g.frame, g.ingress, truth, false)
		if j.v != forwardNew || len(j.breaches) > 0 || j.backend.method != maps.MethodFullNAT || j.p.fragment() {
			return
		}
		robbed = true
		c := newConversation(maps.Tuple{Source: netip.MustParseAddrPort("203.0.113.5:5"), Destination: j.p.to4(), Protocol: j.p.protocol})
		c.service, c.backend, c.source, c.confirmed = j.e.service, j.backend, parse(truth.out).from4(), true
		g.model.conversations[c.tuple] = c
		way, _ := c.wayBack()
		g.model.waysBack[way] = c
	}
	from := newGenerator(g.world, rand.New(rand.NewPCG(1, 3)))
	for range packetsAGame {
		a := from.next()
		j, err := g.play(step{frame: a.frame, device: d.number(a.ingress)})
		if err != nil {
			t.Fatal(err)
		}
		if robbed {
			if !slices.ContainsFunc(j.breaches, func(b breach) bool { return b.rule == "way back" }) {
				t.Errorf("it is not found out: %v", j.breaches)
			}
			return
		}
		from.heard(a, j)
	}
	t.Error("no connection by fullnat was opened")
}

// TestOwnIdentity: an ID that another packet between the same ends has is found out.
func TestOwnIdentity(t *testing.T) {
	m := newModel(&world{}, limits{})
	at := netip.MustParseAddrPort("192.0.2.1:1")
	first := &judged{model: m, p: &packet{family: 4, id: 1, protocol: protoUDP}}
	first.ownIdentity(&note{source: at, destination: at, id: 7})
	second := &judged{model: m, p: &packet{family: 4, id: 2, protocol: protoUDP}}
	second.ownIdentity(&note{source: at, destination: at, id: 7})
	if len(first.breaches) != 0 || len(second.breaches) != 1 {
		t.Errorf("of two packets by one ID, %v and %v are found out", first.breaches, second.breaches)
	}
}
