package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"fairlead/bpf"
)

// Saved is a connection as it was kept on disk: by names and ages, as numbers and clocks don't outlive the host.
type Saved struct {
	Tuple   Tuple
	Backend SavedBackend
	Source  netip.AddrPort // fullnat
	State   State
	// Opened and Seen are ages: how long ago.
	Opened, Seen                 time.Duration
	SequenceEnd, Acknowledgement uint32
	Timestamp, TimestampEcho     uint32
	Hop                          Hop // its interface by today's index; 0: gone
}

// SavedBackend is a backend as it was when a connection was given to it.
type SavedBackend struct {
	Name    string
	Address netip.Addr
	Port    uint16
	Method  Method
}

// Restored is what became of connections that were kept on disk.
type Restored struct {
	Connections int // in the table again
	Leaving     int // of them, those whose backend has left the configuration
	// Lost are those that could not be restored, by the reason why.
	Lost map[string]int
}

// keptStates are the bits of a State that outlive the host.
const keptStates = StateYoung | StateStateless | StateClientFIN | StateBackendFIN

type portKey struct {
	backend  netip.AddrPort
	protocol uint8
	source   netip.Addr
}

// portSet are ports of a source address that connections about to be restored have.
type portSet [65536 / 64]uint64

func (s *portSet) add(port uint16)      { s[port/64] |= 1 << (port % 64) }
func (s *portSet) remove(port uint16)   { s[port/64] &^= 1 << (port % 64) }
func (s *portSet) has(port uint16) bool { return s != nil && s[port/64]>>(port%64)&1 != 0 }

// Reserve keeps the source port of a connection that is about to be restored out of the queues of unused ones. It is to be
// called before Apply has filled them, for each such connection.
func (m *Manager) Reserve(c *Saved) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.Backend.Method != MethodFullNAT || !c.Source.IsValid() {
		return
	}
	key := portKey{netip.AddrPortFrom(c.Backend.Address, c.Backend.Port), c.Tuple.Protocol, c.Source.Addr()}
	if m.reserved == nil {
		m.reserved = make(map[portKey]*portSet)
	}
	if m.reserved[key] == nil {
		m.reserved[key] = new(portSet)
	}
	m.reserved[key].add(c.Source.Port())
}

// Restore puts connections into the tables, which are empty yet and which no packet meets: after Apply, before the program
// is attached. What has left the configuration meanwhile comes back as leaving; what would have expired does not. Ports
// reserved for connections that are not restored are given back.
func (m *Manager) Restore(list func(yield func(*Saved) error) error, hop func(netip.Addr) NextHop) (Restored, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &restorer{
		Manager: m, hop: hop, now: Now(), done: Restored{Lost: make(map[string]int)},
		services: make(map[serviceKey]*Service), known: make(map[identity]*Backend), sources: make(map[netip.Addr]*Source),
	}
	for _, s := range m.services {
		for _, key := range s.Keys {
			r.services[keyOf(key, s.Protocol)] = s
		}
	}
	for _, b := range m.backends {
		r.known[identityOf(b)] = b
	}
	for _, s := range m.sources {
		r.sources[s.Address] = s
	}
	if err := list(r.take); err != nil {
		return r.done, err
	}
	if err := r.flush(); err != nil {
		return r.done, err
	}
	if err := r.giveBack(); err != nil {
		return r.done, err
	}
	m.reserved = nil
	if err := m.raiseGenerations(r.generation); err != nil {
		return r.done, err
	}
	atomic.AddInt64(&m.set.Control.block.Connections, int64(r.done.Connections))
	atomic.AddInt64(&m.set.Control.block.Young, int64(r.young))
	if err := errors.Join(m.putAddresses(), m.putNear(false), m.putPaths()); err != nil {
		return r.done, err
	}
	m.granted = r.now
	// Who is where the ring would not send it becomes an exception before any packet asks.
	return r.done, m.tendTables()
}

// restorer is Restore at work.
type restorer struct {
	*Manager
	hop        func(netip.Addr) NextHop
	now        uint32
	done       Restored
	young      int
	generation uint32 // how many numbers were given out
	services   map[serviceKey]*Service
	known      map[identity]*Backend
	sources    map[netip.Addr]*Source
	four       restoreBatch[bpf.FairleadTuple4, bpf.FairleadReply4]
	six        restoreBatch[bpf.FairleadTuple6, bpf.FairleadReply6]
}

// restoreBatch is what one system call puts into each table.
type restoreBatch[K, R any] struct {
	keys   []K
	values []bpf.FairleadConnection
	ways   []K
	backs  []R
}

const restoreBatchSize = 4096

func (r *restorer) lose(why string) error {
	r.done.Lost[why]++
	return nil
}

func (r *restorer) take(c *Saved) error {
	s := r.services[serviceKey{c.Tuple.Destination.Addr(), c.Tuple.Destination.Port(), c.Tuple.Protocol}]
	switch {
	case s == nil:
		return r.lose("its service has left the configuration")
	case c.Seen >= s.IdleTimeout:
		return r.lose("it was idle for its timeout")
	case int64(r.done.Connections) >= int64(r.set.raw.Connections4.MaxEntries()):
		return r.lose("the connection table is full")
	}
	b, err := r.backendOf(s, c)
	if err != nil {
		return err
	}
	stateless := c.Backend.Method.Stateless()
	v := bpf.FairleadConnection{
		Backend: b.ID, Generation: r.next(), Tag: uint32(c.Tuple.Hash()), Seen: r.ago(c.Seen), State: uint32(c.State & keptStates),
		SequenceEnd: c.SequenceEnd, Acknowledgement: c.Acknowledgement, Service: s.ID, Opened: r.ago(c.Opened),
		BaseSequence: c.SequenceEnd, BaseAcknowledgement: c.Acknowledgement,
		Timestamp: c.Timestamp, TimestampEcho: c.TimestampEcho,
		Hop: bpf.FairleadHop{Mac: c.Hop.MAC, SourceMac: c.Hop.SourceMAC, Ifindex: c.Hop.Interface, Vlan: c.Hop.VLAN},
	}
	way := Tuple{Source: netip.AddrPortFrom(b.Address, b.Port), Destination: c.Tuple.Source, Protocol: c.Tuple.Protocol}
	back := bpf.FairleadWayBack{Generation: v.Generation, Token: uint32(bpf.FairleadTokenTOKEN_OUT), First: v.Opened}
	if c.Backend.Method == MethodFullNAT {
		src := r.sources[c.Source.Addr()]
		if src == nil || c.Source.Port() < src.First || c.Source.Port() > src.Last {
			return r.lose("its source address or port has left the configuration")
		}
		pool, ok := r.pools[poolKey{b.Address, b.Port, b.protocol, src.ID}]
		reserved := r.reserved[portKey{way.Source, c.Tuple.Protocol, src.Address}]
		if !ok || !reserved.has(c.Source.Port()) {
			return r.lose("its source port is another's")
		}
		reserved.remove(c.Source.Port()) // what stays reserved is given back
		v.Source, v.SourcePort = uint16(src.ID), portWire(c.Source.Port())
		back.Pool, way.Destination = pool, c.Source
	}
	if c.Tuple.Source.Addr().Is4() {
		r.four.keys, r.four.values = append(r.four.keys, tuple4(c.Tuple)), append(r.four.values, v)
		if !stateless {
			r.four.ways = append(r.four.ways, tuple4(way))
			r.four.backs = append(r.four.backs, bpf.FairleadReply4{Back: back, Client: tuple4(c.Tuple)})
		}
	} else {
		r.six.keys, r.six.values = append(r.six.keys, tuple6(c.Tuple)), append(r.six.values, v)
		if !stateless {
			r.six.ways = append(r.six.ways, tuple6(way))
			r.six.backs = append(r.six.backs, bpf.FairleadReply6{Back: back, Client: tuple6(c.Tuple)})
		}
	}
	r.done.Connections++
	if b.Leaving {
		r.done.Leaving++
	}
	if c.State&StateYoung != 0 {
		r.young++
	}
	if len(r.four.keys) >= restoreBatchSize || len(r.six.keys) >= restoreBatchSize {
		return r.flush()
	}
	return nil
}

// next is a generation number. Programs count on from the last one.
func (r *restorer) next() uint32 {
	r.generation++
	return r.generation << 8
}

// ago is the tick of an age. The clock may have started later than that: ages are differences, so that does no harm.
func (r *restorer) ago(age time.Duration) uint32 {
	return r.now - uint32(min(max(age, 0), maxAge)/Tick)
}

const maxAge = 365 * 24 * time.Hour

// backendOf finds a saved connection's backend, or makes it anew, as leaving.
func (r *restorer) backendOf(s *Service, c *Saved) (*Backend, error) {
	key := identity{s.ID, c.Backend.Name, c.Backend.Address, c.Backend.Port, c.Backend.Method}
	if b := r.known[key]; b != nil {
		return b, nil
	}
	id, err := freeNumber(r.backends, uint32(bpf.FairleadLimitsMAX_BACKENDS), "backend")
	if err != nil {
		return nil, err
	}
	b := &Backend{
		ID: id, Service: s.ID, Name: c.Backend.Name, Address: c.Backend.Address, Port: c.Backend.Port, Method: c.Backend.Method,
		Leaving: true, Up: true, protocol: s.Protocol, Shown: Shown{Percent: 100},
	}
	b.NextHop = b.NextHop.followedBy(r.hop(b.Address), b.Method)
	if src := r.sources[c.Source.Addr()]; b.Method == MethodFullNAT && src != nil {
		if b.pools, err = r.poolsFor(b, []WantedSource{{src.Address, src.First, src.Last}}); err != nil {
			return nil, err
		}
		if err := r.putPools(); err != nil {
			return nil, err
		}
	}
	if err := zeroPerCPU[bpf.FairleadTraffic](r.set.raw.BackendTraffic, id); err != nil {
		return nil, err
	}
	if err := r.writeBackend(b); err != nil {
		return nil, err
	}
	r.backends[id], r.known[key] = b, b
	return b, nil
}

func (r *restorer) flush() error {
	four, six := &r.four, &r.six
	for _, put := range []struct {
		table        *ebpf.Map
		n            int
		keys, values any
	}{
		{r.set.raw.Replies4, len(four.ways), four.ways, four.backs},
		{r.set.raw.Replies6, len(six.ways), six.ways, six.backs},
		{r.set.raw.Connections4, len(four.keys), four.keys, four.values},
		{r.set.raw.Connections6, len(six.keys), six.keys, six.values},
	} {
		if put.n == 0 {
			continue
		}
		if _, err := put.table.BatchUpdate(put.keys, put.values, nil); err != nil {
			return fmt.Errorf("restore %d connections into %s: %w", put.n, put.table, err)
		}
	}
	four.keys, four.values, four.ways, four.backs = four.keys[:0], four.values[:0], four.ways[:0], four.backs[:0]
	six.keys, six.values, six.ways, six.backs = six.keys[:0], six.values[:0], six.ways[:0], six.backs[:0]
	return nil
}

// giveBack puts ports into the queues of unused ones that were reserved for connections not restored.
func (r *restorer) giveBack() error {
	for key, ports := range r.reserved {
		src := r.sources[key.source]
		if src == nil {
			continue
		}
		pool, ok := r.pools[poolKey{key.backend.Addr(), key.backend.Port(), key.protocol, src.ID}]
		if !ok {
			continue
		}
		for port := int(src.First); port <= int(src.Last); port++ {
			if ports.has(uint16(port)) {
				if err := r.fillPorts(pool, uint32(port), 1); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// raiseGenerations makes the programs count on from a number.
func (m *Manager) raiseGenerations(n uint32) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count the host's CPUs: %w", err)
	}
	each := make([]uint32, cpus)
	for i := range each {
		each[i] = n
	}
	if err := m.set.raw.Generations.Put(uint32(0), each); err != nil {
		return fmt.Errorf("write the generations: %w", err)
	}
	return nil
}

// fillPorts puts ports into a pool's queue of unused ones.
func (m *Manager) fillPorts(pool, first, count uint32) error {
	request := bpf.FairleadFillRequest{Pool: pool, FirstPort: first, Count: count}
	packet, err := binary.Append(nil, binary.NativeEndian, &request)
	if err != nil {
		return err
	}
	verdict, err := m.fill.Run(&ebpf.RunOptions{Data: packet})
	if err != nil {
		return fmt.Errorf("fill port pool %d: %w", pool, err)
	}
	if verdict != xdpPass {
		return fmt.Errorf("fill port pool %d with ports from %d: the queue does not take them (answer %d)", pool, first, verdict)
	}
	return nil
}
