package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// A block's payload is a row of records. What many entries share is told once a block, before the first that refers to
// it, and is then called by its place among its kind: so every block can be read by itself, and a damaged one takes
// nothing with it but its own records.
//
// The first byte of a record is its kind (low half) and what it has (high half).
const (
	recordDestination = 1 // family, address, port, protocol
	recordService     = 2 // name
	recordBackend     = 3 // name, family, address, port, method
	recordHop         = 4 // interface, MAC, source MAC, two tags
	recordSource      = 5 // family, address
	recordOpened      = 8
	recordUpdated     = 9
	recordClosed      = 10
	recordLost        = 11 // how many events the writer could not keep before this place
	recordEnd         = 12 // of a snapshot: how many entries it has

	hasIPv6       = 0x10 // the client's address has 16 bytes
	hasSource     = 0x20 // fullnat
	hasTimestamp  = 0x40
	hasSequence   = 0x80
	recordKind    = 0x0f
	recordOptions = 0xf0
)

type destination struct {
	address  netip.AddrPort
	protocol uint8
}

// numbers gives things their places in a block. The last one asked for is answered without a look into the map.
type numbers[T comparable] struct {
	places map[T]uint64
	last   T
	place  uint64
}

// of is a thing's place, counted from 0; it is new if it had none yet.
func (n *numbers[T]) of(thing T) (place uint64, isNew bool) {
	if thing == n.last && len(n.places) > 0 {
		return n.place, false
	}
	place, ok := n.places[thing]
	if !ok {
		if n.places == nil {
			n.places = make(map[T]uint64)
		}
		place = uint64(len(n.places))
		n.places[thing] = place
	}
	n.last, n.place = thing, place
	return place, !ok
}

func (n *numbers[T]) forget() { clear(n.places) }

// encoder writes the records of one block after another.
type encoder struct {
	base         int64 // milliseconds of the wall clock that the block's times are told from
	destinations numbers[destination]
	services     numbers[string]
	backends     numbers[Backend]
	hops         numbers[Hop]
	sources      numbers[netip.Addr]
}

// begin is the start of a block: nothing is told yet.
func (e *encoder) begin(base int64) {
	e.base = base
	e.destinations.forget()
	e.services.forget()
	e.backends.forget()
	e.hops.forget()
	e.sources.forget()
}

func appendAddr(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		v4 := a.As4()
		return append(append(b, 4), v4[:]...)
	}
	v6 := a.As16()
	return append(append(b, 6), v6[:]...)
}

func appendName(b []byte, name string) []byte {
	return append(append(b, byte(len(name))), name...)
}

func (e *encoder) destination(b []byte, t *Tuple) ([]byte, uint64) {
	place, isNew := e.destinations.of(destination{t.Destination, t.Protocol})
	if isNew {
		b = appendAddr(append(b, recordDestination), t.Destination.Addr())
		b = binary.LittleEndian.AppendUint16(b, t.Destination.Port())
		b = append(b, t.Protocol)
	}
	return b, place
}

// hop is 0 for none, else one more than its place.
func (e *encoder) hop(b []byte, hop *Hop) ([]byte, uint64) {
	if *hop == (Hop{}) {
		return b, 0
	}
	place, isNew := e.hops.of(*hop)
	if isNew {
		b = appendName(append(b, recordHop), hop.Interface)
		b = append(append(b, hop.MAC[:]...), hop.SourceMAC[:]...)
		b = binary.LittleEndian.AppendUint16(b, hop.VLAN[0])
		b = binary.LittleEndian.AppendUint16(b, hop.VLAN[1])
	}
	return b, place + 1
}

// client is the beginning of every record of a connection.
func client(b []byte, kind byte, t *Tuple, place uint64, generation uint32) []byte {
	if a := t.Source.Addr(); a.Is4() {
		v4 := a.As4()
		b = append(append(b, kind), v4[:]...)
	} else {
		v6 := a.As16()
		b = append(append(b, kind|hasIPv6), v6[:]...)
	}
	b = binary.LittleEndian.AppendUint16(b, t.Source.Port())
	b = binary.AppendUvarint(b, place)
	return binary.LittleEndian.AppendUint32(b, generation)
}

// opened appends an entry that check has found right.
func (e *encoder) opened(b []byte, entry *Entry) []byte {
	b, place := e.destination(b, &entry.Tuple)
	service, isNew := e.services.of(entry.Service)
	if isNew {
		b = appendName(append(b, recordService), entry.Service)
	}
	backend, isNew := e.backends.of(entry.Backend)
	if isNew {
		b = appendName(append(b, recordBackend), entry.Backend.Name)
		b = appendAddr(b, entry.Backend.Address.Addr())
		b = binary.LittleEndian.AppendUint16(b, entry.Backend.Address.Port())
		b = appendName(b, entry.Backend.Method)
	}
	b, hop := e.hop(b, &entry.Hop)
	kind, source := byte(recordOpened), uint64(0)
	if entry.SourceAddr.IsValid() {
		kind |= hasSource
		if source, isNew = e.sources.of(entry.SourceAddr.Addr()); isNew {
			b = appendAddr(append(b, recordSource), entry.SourceAddr.Addr())
		}
	}
	b = client(b, kind|entry.numbers(), &entry.Tuple, place, entry.Generation)
	b = binary.AppendUvarint(b, service)
	b = binary.AppendUvarint(b, backend)
	if kind&hasSource != 0 {
		b = binary.AppendUvarint(b, source)
		b = binary.LittleEndian.AppendUint16(b, entry.SourceAddr.Port())
	}
	seen := entry.Seen.UnixMilli()
	b = binary.AppendVarint(b, seen-entry.Opened.UnixMilli())
	return e.changing(b, entry, seen, hop)
}

// updated appends what may change of an entry whose tuple check has found right.
func (e *encoder) updated(b []byte, entry *Entry) []byte {
	b, place := e.destination(b, &entry.Tuple)
	b, hop := e.hop(b, &entry.Hop)
	b = client(b, recordUpdated|entry.numbers(), &entry.Tuple, place, entry.Generation)
	return e.changing(b, entry, entry.Seen.UnixMilli(), hop)
}

// changing is the end of opened and updated.
func (e *encoder) changing(b []byte, entry *Entry, seen int64, hop uint64) []byte {
	b = binary.AppendVarint(b, e.base-seen)
	b = binary.AppendUvarint(b, hop)
	b = binary.AppendUvarint(b, uint64(entry.State))
	has := entry.numbers()
	if has&hasSequence != 0 {
		b = binary.LittleEndian.AppendUint32(b, entry.SequenceEnd)
		b = binary.LittleEndian.AppendUint32(b, entry.Acknowledgement)
	}
	if has&hasTimestamp != 0 {
		b = binary.LittleEndian.AppendUint32(b, entry.Timestamp)
		b = binary.LittleEndian.AppendUint32(b, entry.TimestampEcho)
	}
	return b
}

func (e *encoder) closed(b []byte, t *Tuple, generation uint32) []byte {
	b, place := e.destination(b, t)
	return client(b, recordClosed, t, place, generation)
}

// numbers is which of its optional numbers an entry has.
func (e *Entry) numbers() (has byte) {
	if e.SequenceEnd != 0 || e.Acknowledgement != 0 {
		has |= hasSequence
	}
	if e.Timestamp != 0 || e.TimestampEcho != 0 {
		has |= hasTimestamp
	}
	return has
}

// key is a tuple within one reading of files.
type key struct {
	source      [16]byte
	destination uint32 // place in the reading's catalog
	port        uint16
	ipv6        bool
}

// held is what a reading keeps of an entry. Neither it nor its key has a pointer, so that millions cost the garbage
// collector nothing.
type held struct {
	opened, seen                 int64 // milliseconds of the reader's wall clock
	generation, state            uint32
	service, backend             uint32 // places in the reading's catalog
	hop, source                  uint32 // one more than the place there; 0: none
	sequenceEnd, acknowledgement uint32
	timestamp, timestampEcho     uint32
	sourcePort                   uint16
}

// record is one record of a connection, or what is lost or the end.
type record struct {
	kind  byte
	key   key
	entry held
	count uint64 // lost: events; end: entries
}

// catalog is what the blocks of one reading told once each, under places that hold for all of them.
type catalog struct {
	destinations places[destination]
	services     places[string]
	backends     places[Backend]
	hops         places[Hop]
	sources      places[netip.Addr]
}

type places[T comparable] struct {
	all    []T
	places map[T]uint32
}

func (p *places[T]) of(thing T) uint32 {
	place, ok := p.places[thing]
	if !ok {
		if p.places == nil {
			p.places = make(map[T]uint32)
		}
		place = uint32(len(p.all))
		p.places[thing] = place
		p.all = append(p.all, thing)
	}
	return place
}

// decoder reads blocks. What it was told in a block is forgotten at the next.
type decoder struct {
	catalog *catalog

	destinations, services, backends, hops, sources []uint32 // of this block: places in the catalog
}

var (
	errShort   = errors.New("a record is cut off")
	errUnknown = errors.New("a record of an unknown kind")
	errUntold  = errors.New("a record refers to what the block does not tell")
	errNumber  = errors.New("a number out of its range")
	errFamily  = errors.New("an address of an unknown family")
)

// decode gives visit each record of a block's payload. A payload that is wrong somewhere is given up there: what stands
// before it was given.
func (d *decoder) decode(payload []byte, base int64, visit func(*record)) error {
	d.destinations, d.services, d.backends = d.destinations[:0], d.services[:0], d.backends[:0]
	d.hops, d.sources = d.hops[:0], d.sources[:0]
	c := cursor{rest: payload}
	var r record
	for len(c.rest) > 0 && c.err == nil {
		first := c.byte()
		r = record{kind: first & recordKind}
		switch has := first & recordOptions; r.kind {
		case recordOpened:
			d.opened(&c, &r, has, base)
		case recordUpdated:
			if has&hasSource != 0 {
				c.fail(errUnknown)
			}
			d.client(&c, &r, has)
			d.changing(&c, &r, has, base)
		case recordClosed:
			if has&^hasIPv6 != 0 {
				c.fail(errUnknown)
			}
			d.client(&c, &r, has)
		case recordLost, recordEnd:
			if has != 0 {
				c.fail(errUnknown)
			}
			r.count = c.uvarint()
		default:
			if has != 0 {
				c.fail(errUnknown)
			}
			d.told(&c, r.kind)
			continue
		}
		if c.err == nil {
			visit(&r)
		}
	}
	return c.err
}

// told reads what later records of the block refer to.
func (d *decoder) told(c *cursor, kind byte) {
	switch kind {
	case recordDestination:
		told := destination{netip.AddrPortFrom(c.addr(), c.uint16()), c.byte()}
		if c.err == nil {
			d.destinations = append(d.destinations, d.catalog.destinations.of(told))
		}
	case recordService:
		told := c.name(1)
		if c.err == nil {
			d.services = append(d.services, d.catalog.services.of(told))
		}
	case recordBackend:
		told := Backend{Name: c.name(1), Address: netip.AddrPortFrom(c.addr(), c.uint16()), Method: c.name(0)}
		if c.err == nil {
			d.backends = append(d.backends, d.catalog.backends.of(told))
		}
	case recordHop:
		told := Hop{Interface: c.name(0)}
		copy(told.MAC[:], c.take(6))
		copy(told.SourceMAC[:], c.take(6))
		told.VLAN = [2]uint16{c.uint16(), c.uint16()}
		if c.err == nil {
			d.hops = append(d.hops, d.catalog.hops.of(told))
		}
	case recordSource:
		told := c.addr()
		if c.err == nil {
			d.sources = append(d.sources, d.catalog.sources.of(told))
		}
	default:
		c.fail(errUnknown)
	}
}

func (d *decoder) client(c *cursor, r *record, has byte) {
	if has&hasIPv6 != 0 {
		r.key.ipv6 = true
		copy(r.key.source[:], c.take(16))
	} else {
		copy(r.key.source[:], c.take(4))
	}
	r.key.port = c.uint16()
	r.key.destination = c.place(d.destinations)
	r.entry.generation = c.uint32()
}

func (d *decoder) opened(c *cursor, r *record, has byte, base int64) {
	d.client(c, r, has)
	r.entry.service = c.place(d.services)
	r.entry.backend = c.place(d.backends)
	if has&hasSource != 0 {
		r.entry.source = c.place(d.sources) + 1
		r.entry.sourcePort = c.uint16()
	}
	before := c.varint()
	d.changing(c, r, has, base)
	r.entry.opened = r.entry.seen - before
}

func (d *decoder) changing(c *cursor, r *record, has byte, base int64) {
	r.entry.seen = base - c.varint()
	if hop := c.uvarint(); hop > uint64(len(d.hops)) {
		c.fail(errUntold)
	} else if hop > 0 {
		r.entry.hop = d.hops[hop-1] + 1
	}
	state := c.uvarint()
	if state > 1<<32-1 {
		c.fail(errNumber)
	}
	r.entry.state = uint32(state)
	if has&hasSequence != 0 {
		r.entry.sequenceEnd, r.entry.acknowledgement = c.uint32(), c.uint32()
	}
	if has&hasTimestamp != 0 {
		r.entry.timestamp, r.entry.timestampEcho = c.uint32(), c.uint32()
	}
}

// cursor reads a payload; after its first error everything is zero.
type cursor struct {
	rest []byte
	err  error
}

func (c *cursor) fail(err error) {
	if c.err == nil {
		c.err, c.rest = err, nil
	}
}

func (c *cursor) take(n int) []byte {
	if c.err != nil || len(c.rest) < n {
		c.fail(errShort)
		return nil
	}
	taken := c.rest[:n]
	c.rest = c.rest[n:]
	return taken
}

func (c *cursor) byte() byte {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *cursor) uint16() uint16 {
	if b := c.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) uint32() uint32 {
	if b := c.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) uvarint() uint64 {
	value, n := binary.Uvarint(c.rest)
	return c.number(value, n)
}

func (c *cursor) varint() int64 {
	value, n := binary.Varint(c.rest)
	return int64(c.number(uint64(value), n))
}

func (c *cursor) number(value uint64, n int) uint64 {
	switch {
	case c.err != nil:
	case n == 0:
		c.fail(errShort)
	case n < 0:
		c.fail(errNumber)
	default:
		c.rest = c.rest[n:]
		return value
	}
	return 0
}

// place reads a reference to one of what the block told.
func (c *cursor) place(told []uint32) uint32 {
	n := c.uvarint()
	if c.err == nil && n < uint64(len(told)) {
		return told[n]
	}
	c.fail(errUntold)
	return 0
}

func (c *cursor) name(least int) string {
	n := int(c.byte())
	if n < least {
		c.fail(errName)
	}
	return string(c.take(n))
}

func (c *cursor) addr() netip.Addr {
	switch family := c.byte(); {
	case c.err != nil:
	case family == 4:
		if b := c.take(4); b != nil {
			return netip.AddrFrom4([4]byte(b))
		}
	case family == 6:
		if b := c.take(16); b != nil {
			return netip.AddrFrom16([16]byte(b))
		}
	default:
		c.fail(errFamily)
	}
	return netip.Addr{}
}

// String is for the errors of tests.
func (r *record) String() string { return fmt.Sprintf("record %d of %+v: %+v", r.kind, r.key, r.entry) }
