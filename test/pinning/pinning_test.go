package pinning

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fairlead/bpf"
	"fairlead/maps"
)

var (
	long        = flag.Bool("pinning.long", false, "100,000 connections, and both families with each method")
	connections = flag.Int("pinning.connections", 0, "connections of TestPinning (default 20,000, the long form 100,000)")
	changes     = flag.Int("pinning.changes", 50, "changes of backends and weights in TestPinning")
	seed        = flag.Uint64("pinning.seed", 0, "seed of the changes (default: of the clock)")
)

// role is how a connection behaves.
type role int

const (
	busy           role = iota // talks often
	rare                       // talks once in two epochs
	silent                     // says nothing until the end
	endedByClient              // half-closed: the client has ended its side and listens on
	endedByBackend             // the other way round
	spoofed                    // met blind RSTs, FINs and SYNs, then behaves as rare or silent
	spoofedFit                 // met a RST or FIN whose numbers fit, and talks on
	newcomer                   // opened while the configuration changed
	roles
)

func (r role) String() string {
	return [...]string{"busy", "rare", "silent", "ended by its client", "ended by its backend", "spoofed", "spoofed to fit",
		"newcomer"}[r]
}

// pinned is a connection of a scene.
type pinned struct {
	*connection
	role  role
	quiet bool        // says nothing until the end
	fit   atomic.Bool // met a RST or FIN that fits: its entry may go after two epochs of silence
	gone  atomic.Bool // was silent for so long that its entry may have gone: nothing is to be seen by it any more
}

// talk is what the connection says next, in its role.
func (k *pinned) talk(c *cpu) error {
	switch k.role {
	case endedByClient:
		if k.pin.method == fullnat {
			if err := k.answer(c); err != nil {
				return err
			}
		} else {
			k.ack.Add(4)
		}
		return k.acknowledge(c)
	case endedByBackend:
		if err := k.say(c); err != nil {
			return err
		}
		return k.reply(c, "the backend's ACK", ack, k.ack.Load(), k.seq.Load(), 0)
	}
	if k.pin.method == dsr {
		k.ack.Add(4)
	}
	return k.connection.talk(c)
}

// scene is services of both methods and families, connections in every role, and traffic from two CPUs.
type scene struct {
	*plane
	random *rand.Rand
	sites  []*scenery
	all    []*pinned
	by     [roles][]*pinned // those that talk while the configuration changes
	closed time.Duration    // how long a closing connection may be silent

	halfOpen []*connection // from before the changes until after them

	stop     atomic.Bool
	running  sync.WaitGroup
	packets  atomic.Int64
	late     atomic.Int64 // connections that had been silent for so long that their entries may have gone
	failures struct {
		sync.Mutex
		count int
		first []string
	}
	opened [2][]*pinned
}

// scenery is a site with what is wanted of it.
type scenery struct {
	site
	method  maps.Method // 0: each backend has its own, which may change
	idle    time.Duration
	members []member
	// none is set while a configuration without backends may be in force: SYNs are refused.
	none atomic.Bool
}

func newScene(t *testing.T, epoch time.Duration, n int) *scene {
	number := *seed
	if number == 0 {
		number = uint64(time.Now().UnixNano())
	}
	t.Logf("-pinning.seed=%d", number)
	// Two CPUs for the traffic are two threads that never let go; the Manager wants a third and a fourth.
	before := runtime.GOMAXPROCS(4)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
	s := &scene{plane: load(t, epoch), random: rand.New(rand.NewPCG(number, 0)), closed: 2 * epoch}
	s.sites = []*scenery{
		{site: site{1, false}, method: dsr, idle: 4 * epoch},
		{site: site{2, true}, method: fullnat, idle: 4 * epoch},
		{site: site{3, true}, method: dsr, idle: time.Hour},
		{site: site{4, false}, method: fullnat, idle: time.Hour},
		{site: site{5, false}, idle: time.Hour},
	}
	for _, at := range s.sites {
		for b := range uint8(6) {
			m := member{backend: b + 1, weight: 1 + s.random.Uint32N(4), method: at.method}
			if at.method == 0 {
				m.method = []maps.Method{dsr, fullnat}[b%2]
			}
			at.members = append(at.members, m)
		}
	}
	s.apply(s.config())
	for _, at := range s.sites {
		for i := range n / len(s.sites) {
			s.all = append(s.all, s.begin(at, uint32(i)))
		}
		for i := range n / len(s.sites) / 50 {
			k := at.client(500_000 + uint32(i))
			if !k.open(s.cpu) {
				t.Fatal("SYN refused")
			}
			if i%2 == 0 {
				s.must(k.accept(s.cpu))
			}
			s.halfOpen = append(s.halfOpen, k)
		}
	}
	for _, k := range s.all {
		if !k.quiet {
			s.by[k.role] = append(s.by[k.role], k)
		}
	}
	if got := s.connections(); got != len(s.all) {
		t.Fatalf("%d connections in the table, %d were opened", got, len(s.all))
	}
	return s
}

// begin opens a connection and makes it what its role says.
func (s *scene) begin(at *scenery, i uint32) *pinned {
	s.Helper()
	k := &pinned{connection: at.client(i)}
	s.must(k.establish(s.cpu))
	far, lasting := uint32(1<<30)+rand.Uint32N(1<<30), at.idle == time.Hour
	switch i % 20 {
	case 0, 1:
		k.role = rare
	case 2, 3, 4:
		k.role, k.quiet = silent, lasting
		if !lasting {
			k.role = busy
		}
	case 5:
		k.role = endedByClient
		k.quiet = lasting && k.pin.method == fullnat // under dsr that may be the end: it must be heard
		s.must(k.end(s.cpu))
	case 6:
		k.role = endedByBackend
		k.quiet = lasting
		s.must(k.endBackend(s.cpu))
	case 7, 8:
		k.role, k.quiet = spoofed, lasting
		for _, l := range []landing{
			k.send(s.cpu, rst, k.seq.Load()+far, 0, 0),
			k.send(s.cpu, fin|ack, k.seq.Load()-far, k.ack.Load(), 0),
			k.send(s.cpu, syn, far, 0, 0),
		} {
			s.must(k.check("spoofed", l))
		}
	case 9:
		k.role = spoofedFit
		s.must(k.check("spoofed to fit", k.send(s.cpu, []uint8{rst, fin | ack}[i/20%2], k.seq.Load(), k.ack.Load(), 0)))
	}
	return k
}

func (s *scene) config() (w maps.Wanted) {
	for _, at := range s.sites {
		w.Services = append(w.Services, at.wanted(at.idle, at.members...))
	}
	return w
}

// change draws other backends and weights for most services, and gives some backends another MAC.
func (s *scene) change() {
	for _, at := range s.sites {
		if s.random.IntN(10) < 3 {
			continue
		}
		at.members = nil
		none := s.random.IntN(25) == 0
		for _, b := range s.random.Perm(12)[:1+s.random.IntN(8)] {
			m := member{backend: uint8(b + 1), weight: s.random.Uint32N(10), method: at.method}
			if at.method == 0 {
				m.method = []maps.Method{dsr, fullnat}[s.random.IntN(2)]
			}
			if none {
				m.weight = 0
			}
			at.members = append(at.members, m)
		}
		if !none {
			at.members[0].weight++
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.sites[s.random.IntN(len(s.sites))]
	s.hops[at.backend(uint8(1+s.random.IntN(12)))]++
}

func (at *scenery) empty() bool {
	return !slices.ContainsFunc(at.members, func(m member) bool { return m.weight > 0 })
}

// enforce applies the configuration and says how long it took until every slot was settled.
func (s *scene) enforce() time.Duration {
	s.Helper()
	for _, at := range s.sites {
		if at.empty() {
			at.none.Store(true)
		}
	}
	start := time.Now()
	s.apply(s.config())
	for _, at := range s.sites {
		if n := unsettled(s.ring(at.site)); n != 0 {
			s.Errorf("%d slots of service %s are unsettled after a change", n, at.name())
		}
	}
	took := time.Since(start)
	for _, at := range s.sites {
		if !at.empty() {
			at.none.Store(false)
		}
	}
	return took
}

func (s *scene) failed(text string) {
	s.failures.Lock()
	defer s.failures.Unlock()
	if s.failures.count++; len(s.failures.first) < 8 {
		s.failures.first = append(s.failures.first, text)
	}
}

// speak lets a connection talk and judges what becomes of it.
func (s *scene) speak(c *cpu, k *pinned) {
	before := k.last.Load()
	err := k.talk(c)
	s.packets.Add(1)
	if err == nil || k.gone.Load() {
		return
	}
	// Whoever was silent for so long has no claim: this host was too busy to let it speak.
	silence := maps.Age(maps.Now(), before)
	closing := k.fit.Load() || k.role == spoofedFit || k.role == endedByClient && k.pin.method == dsr
	if closing && silence > s.closed-2*maps.Tick || !k.quiet && silence > 8*s.epoch {
		k.gone.Store(true)
		s.late.Add(1)
		return
	}
	s.failed(fmt.Sprintf("%v, silent for %v: %v\n\tnow: %s", k.role, silence, err, s.explained(k.connection)))
}

// explained is what the maps say of a connection.
func (s *scene) explained(k *connection) string {
	set := s.set
	inv, err := set.Inventory()
	if err != nil {
		return err.Error()
	}
	i := slices.IndexFunc(inv.Services, func(v maps.Service) bool { return v.AddrPort() == k.tuple.Destination })
	e, err := set.Explain(inv, k.tuple.Source, inv.Services[i])
	if err != nil {
		return err.Error()
	}
	text := fmt.Sprintf("rule %q, backend %v, slot %d holds %d, settled %t, exception %t, fresh %t", e.Rule, e.Backend.Address,
		e.Slot, e.SlotNow.Backend, e.SlotNow.Settled, e.Exception, e.Fresh)
	if e.Entry != nil {
		text += fmt.Sprintf(", entry %+v", *e.Entry)
	}
	if e.HalfOpen != nil {
		text += fmt.Sprintf(", half-open %+v", *e.HalfOpen)
	}
	return text + fmt.Sprintf(", tick %d", maps.Now())
}

// traffic is one CPU's part: packets of all connections that talk, each in its rhythm, spoofed packets for all of them,
// and new connections whose handshakes last over the time of many others' packets.
func (s *scene) traffic(number int) error {
	if err := onCPU(number); err != nil {
		return err
	}
	c := newCPU(s.Fairlead)
	random := rand.New(rand.NewPCG(rand.Uint64(), uint64(number)))
	begin := time.Now()
	rhythms := []struct {
		list   []*pinned
		period time.Duration // in which each talks once
		at     int
	}{
		{list: slices.Concat(s.by[rare], s.by[spoofed], s.by[endedByBackend]), period: s.epoch * 19 / 10},
		{list: slices.Concat(s.by[endedByClient], s.by[spoofedFit]), period: s.epoch * 3 / 4},
	}
	type handshake struct {
		*connection
		steps []func(*cpu) error
	}
	var handshakes []handshake
	next := uint32(number+1) * 1_000_000
	others, other := s.by[busy], number*len(s.by[busy])/2
	mine, told := 0, begin // the newcomer to talk next, and when the last one did
	for i := 0; !s.stop.Load(); i++ {
		// Each CPU has every other connection of these; together each talks once in the period.
		for r := range rhythms {
			list := &rhythms[r]
			if len(list.list) == 0 {
				continue
			}
			for due := int(float64(time.Since(begin)) / float64(list.period) * float64(len(list.list))); list.at < due; list.at++ {
				if k := list.list[list.at%len(list.list)]; list.at%2 == number || len(list.list) < 2 {
					s.speak(c, k)
				}
			}
		}
		for range 32 {
			s.speak(c, others[other%len(others)])
			other++
		}
		s.speak(c, others[random.IntN(len(others))])
		if newcomers := s.opened[number]; len(newcomers) > 0 {
			now := time.Now()
			for pace := s.epoch / time.Duration(len(newcomers)); now.Sub(told) >= pace; told = told.Add(pace) {
				s.speak(c, newcomers[mine%len(newcomers)])
				mine++
			}
		}
		// Blind packets, for anyone.
		k := s.all[random.IntN(len(s.all))]
		flags := []uint8{syn, rst, fin | ack, rst | ack}[random.IntN(4)]
		blind := segment{k.tuple.Source, k.tuple.Destination, k.seq.Load() + 1<<30, k.ack.Load(), flags, 0}
		if l := c.run(&blind, clientMAC); k.check("spoofed", l) != nil && k.role != spoofedFit && k.role != endedByClient {
			s.failed(fmt.Sprintf("%v: %v", k.role, &moved{k.connection, "spoofed", l}))
		}
		if k = others[random.IntN(len(others))]; i%16 == 0 {
			// And one whose numbers fit: its connection talks on.
			k.fit.Store(true)
			c.run(&segment{k.tuple.Source, k.tuple.Destination, k.seq.Load(), k.ack.Load(), rst, 0}, clientMAC)
		}

		if len(handshakes) < 200 && len(s.opened[number]) < len(s.all)/10 {
			at := s.sites[random.IntN(len(s.sites))]
			k := at.client(next)
			next++
			none := at.none.Load()
			if k.open(c) {
				steps := []func(*cpu) error{k.openAgain, k.accept, k.acknowledge, k.talk, k.talk}
				handshakes = append(handshakes, handshake{k, steps[random.IntN(2):]})
			} else if !none && !at.none.Load() {
				s.failed(fmt.Sprintf("%v: a new connection's SYN was refused", k.tuple))
			}
		}
		if n := len(handshakes); n > 0 {
			at := random.IntN(n)
			h := &handshakes[at]
			if err := h.steps[0](c); err != nil {
				s.failed(fmt.Sprintf("in its handshake: %v", err))
				h.steps = nil
			} else if h.steps = h.steps[1:]; len(h.steps) == 0 {
				s.opened[number] = append(s.opened[number], &pinned{connection: h.connection, role: newcomer})
			}
			if len(h.steps) == 0 {
				handshakes[at] = handshakes[n-1]
				handshakes = handshakes[:n-1]
			}
		}
	}
	for _, h := range handshakes {
		for _, step := range h.steps {
			if err := step(c); err != nil {
				s.failed(fmt.Sprintf("at the end of its handshake: %v", err))
			}
		}
		s.opened[number] = append(s.opened[number], &pinned{connection: h.connection, role: newcomer})
	}
	return nil
}

// run starts the traffic; halt ends it and takes in those who came meanwhile.
func (s *scene) run() {
	s.stop.Store(false)
	for number := range 2 {
		s.running.Go(func() {
			if err := s.traffic(number); err != nil {
				s.failed(err.Error())
			}
		})
	}
}

func (s *scene) halt() {
	s.Helper()
	s.stop.Store(true)
	s.running.Wait()
	for n, opened := range s.opened {
		s.all = append(s.all, opened...)
		s.by[newcomer] = append(s.by[newcomer], opened...)
		s.opened[n] = nil
	}
	s.verdict("with traffic running")
}

func (s *scene) verdict(when string) {
	s.Helper()
	s.failures.Lock()
	defer s.failures.Unlock()
	for _, text := range s.failures.first {
		s.Errorf("%s: %s", when, text)
	}
	if s.failures.count > 0 {
		s.Fatalf("%s: %d packets of %d went elsewhere than their handshakes", when, s.failures.count, s.packets.Load())
	}
	if late := s.late.Load(); late > int64(len(s.all)/1000) {
		s.Fatalf("%s: %d of %d connections spoke so late that they show nothing: this host is too busy", when, late, len(s.all))
	}
}

// finish ends the handshakes that have waited since before the changes.
func (s *scene) finish() {
	s.Helper()
	for _, k := range s.halfOpen {
		for _, step := range []func(*cpu) error{k.openAgain, k.accept, k.acknowledge, k.talk, k.talk} {
			if err := step(s.cpu); err != nil {
				s.failed(fmt.Sprintf("half-open all along: %v", err))
				break
			}
		}
		s.all = append(s.all, &pinned{connection: k, role: newcomer})
	}
	s.halfOpen = nil
}

// everyone lets every connection talk.
func (s *scene) everyone(when string) {
	s.Helper()
	for _, k := range s.all {
		s.speak(s.cpu, k)
	}
	s.verdict(when)
}

// missing names connections that are not in the connection table.
func (s *scene) missing() {
	s.Helper()
	totals, err := s.set.Counters.Totals()
	s.must(err)
	for i, name := range bpf.EventNames() {
		s.Logf("%s: %d", name, totals.Events[i])
	}
	for _, k := range s.all {
		if _, found := s.entry(k.connection); !found {
			s.Logf("not in the connection table: %v, %v, to %v, half-open %t, last packet %v ago", k.tuple, k.role, k.pin,
				s.plane.halfOpen(k.connection), maps.Age(maps.Now(), k.last.Load()))
		}
	}
}

// whilePackets returns when the traffic has sent so many more packets.
func (s *scene) whilePackets(n int64) {
	s.Helper()
	deadline := time.Now().Add(time.Minute)
	for until := s.packets.Load() + n; s.packets.Load() < until; runtime.Gosched() {
		if time.Now().After(deadline) {
			s.Fatal("no traffic for a minute")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestPinning is the promise: whatever becomes of backends and weights, every packet of every connection goes to the
// backend that its handshake went to; and when connections end, nothing is left of them.
func TestPinning(t *testing.T) {
	n := *connections
	if n == 0 {
		n = 20_000
		if *long {
			n = 100_000
		}
	}
	s := newScene(t, 2*time.Second, n)
	begin := time.Now()

	// The daemon's epochs, faster than they must be: more rebuilds, more fresh bits that move.
	var manager sync.Mutex
	turning, turned := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(turned)
		ticker := time.NewTicker(150 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-turning:
				return
			case <-ticker.C:
				manager.Lock()
				err := s.manager.Turn()
				manager.Unlock()
				if err != nil {
					s.failed(err.Error())
				}
			}
		}
	}()
	s.run()
	var slowest time.Duration
	for i := range *changes {
		s.whilePackets(20_000)
		s.change()
		slowest = max(slowest, s.enforce())
		if i == *changes/2 {
			manager.Lock()
			s.restart()
			manager.Unlock()
		}
		if time.Since(begin) > 45*time.Second && s.halfOpen != nil { // before their 75 s are over
			s.finish()
		}
		if s.failures.count > 0 {
			break
		}
	}
	close(turning)
	<-turned
	s.halt()
	s.finish()
	s.checkExceptions()
	s.everyone("at the end")
	if n := s.connections(); n > len(s.all) || n < len(s.all)-int(s.late.Load()) {
		t.Errorf("%d connections in the table, want %d", n, len(s.all))
		s.missing()
	}
	s.allFresh()
	s.everyone("at the end, all fresh bits shared")
	t.Logf("%d connections (%d opened meanwhile), %d changes in %v, the slowest settled after %v, %d packets, %d connections "+
		"too late to count: 0 moved", len(s.all), len(s.by[newcomer]), *changes, time.Since(begin).Round(time.Millisecond),
		slowest.Round(time.Millisecond), s.packets.Load(), s.late.Load())
	if slowest > 5*time.Second {
		t.Errorf("a change took %v to settle", slowest)
	}
	s.ends()
}

// TestPinningDaemonStopped: the same with nobody there to turn epochs for longer than the idle timeout. The daemon is
// killed in the middle of a change; the next one takes over and goes on changing.
func TestPinningDaemonStopped(t *testing.T) {
	n := 10_000
	if *long {
		n = 50_000
	}
	const epoch, idle = 250 * time.Millisecond, 4 * 250 * time.Millisecond
	s := newScene(t, epoch, n)
	for _, at := range s.sites {
		at.idle = idle
	}
	for range 3 { // epochs have turned, bits are fresh, and exceptions there
		s.change()
		s.enforce()
		s.everyone("before")
		s.turn()
	}
	// Killed between the swap of the rings and their sweep.
	s.change()
	for _, at := range s.sites[:2] {
		at.members = append(at.members[:1:1], member{backend: 13, weight: 3, method: at.method})
	}
	for _, at := range s.sites { // a change may leave a service without backends: then its SYNs are refused
		at.none.Store(at.empty())
	}
	s.applyUnswept(s.config())
	left := unsettled(s.ring(s.sites[0].site))
	if left == 0 {
		t.Error("no slot was left unsettled")
	}

	stopped := maps.Now()
	s.run()
	await(stopped + 5*maps.Ticks(idle)/2)
	s.halt()
	s.finish()
	there := s.connections()
	if there > len(s.all) || there < len(s.all)-int(s.late.Load()) {
		t.Errorf("%d connections in the table, want %d", there, len(s.all))
		s.missing()
	}
	t.Logf("no daemon for %v, idle timeout %v: %d connections, %d packets, %d slots unsettled all the while",
		maps.Age(maps.Now(), stopped), idle, there, s.packets.Load(), left)

	// Those that are closing may go now if they are silent: they aren't. (Any of the busy ones may have met a RST last.)
	closing := slices.Concat(s.by[endedByClient], s.by[spoofedFit])
	for _, k := range slices.Concat(closing, s.by[busy]) {
		s.speak(s.cpu, k)
	}
	s.restart()
	started := maps.Now()
	for _, at := range s.sites {
		if n := unsettled(s.ring(at.site)); n != 0 {
			t.Errorf("%d slots of service %s are unsettled after the start", n, at.name())
		}
	}
	s.checkExceptions()
	for i := range 6 {
		s.turn()
		for _, k := range closing {
			s.speak(s.cpu, k)
		}
		if maps.Now()-started < maps.Ticks(idle) {
			if n := s.connections(); n != there && s.late.Load() == 0 {
				t.Fatalf("%d connections of %d are left %v after the start, the idle timeout is %v", n, there,
					maps.Age(maps.Now(), started), idle)
			}
		}
		if i%2 == 0 {
			s.change()
			s.enforce()
		}
	}
	s.checkExceptions()
	s.allFresh()
	s.everyone("after the start")
	s.ends()
}

// ends ends all connections: a part by FINs, a part by RST, the others by silence. Each entry goes when it is time and
// not before, and then nothing is left of any.
func (s *scene) ends() {
	s.Helper()
	// Epochs and timeouts are shorter now, and fewer backends wanted.
	s.epoch = 250 * time.Millisecond
	s.restart()
	begin := time.Now()
	for _, at := range s.sites {
		at.idle = 4 * s.epoch
		at.members = []member{{backend: 1, weight: 1, method: at.method}, {backend: 14, weight: 1, method: at.method}}
		for i := range at.members {
			if at.method == 0 {
				at.members[i].method = []maps.Method{dsr, fullnat}[i]
			}
		}
	}
	s.enforce()
	silence, timeout := 2*maps.Ticks(s.epoch), 4*maps.Ticks(s.epoch)

	type fate struct {
		*pinned
		idle  bool
		seen  uint32 // tick of the last packet that its entry knows of
		ended bool   // its entry has gone
	}
	fates := make(map[maps.Tuple]*fate, len(s.all))
	for i, k := range s.all {
		f := &fate{pinned: k}
		var err error
		switch {
		case i%3 == 0 && k.role != endedByClient && k.role != endedByBackend:
			f.idle = true
			err = k.talk(s.cpu)
		case i%3 == 1:
			err = k.reset(s.cpu)
		case i%6 == 2 && k.pin.method == fullnat:
			err = k.resetBackend(s.cpu)
		default:
			if k.role != endedByClient {
				err = k.end(s.cpu)
			}
			if k.role != endedByBackend {
				err = errors.Join(err, k.endBackend(s.cpu), k.acknowledge(s.cpu))
			}
		}
		f.seen = k.last.Load()
		if err != nil && !k.gone.Load() {
			s.failed(fmt.Sprintf("%v, at its end: %v", k.role, err))
		}
		fates[k.tuple] = f
	}
	s.verdict("ending")

	set, early, overdue := s.set, 0, 0
	var example string
	deadline := maps.Now() + 20*timeout
	for left := len(fates); left > 0; {
		s.turns(maps.Now()+1, func(before, after uint32) {
			present := make(map[*fate]bool, left)
			s.must(set.Connections.Walk(func(c *maps.Connection) error {
				f := fates[c.Tuple]
				if f == nil || f.ended {
					s.Errorf("%v is in the table and has no reason to", c.Tuple)
					return nil
				}
				present[f], f.seen = true, c.Seen
				if age := int32(before - f.last.Load()); !f.idle && age > int32(silence+2) {
					overdue++
					example = fmt.Sprintf("%v, %v: ended, and there %d ticks after its last packet, state %v", f.tuple, f.role, age, c.State)
				}
				return nil
			}))
			left = 0
			for _, f := range fates {
				if present[f] {
					left++
					continue
				}
				if f.ended {
					continue
				}
				f.ended = true
				least := silence
				if f.idle {
					least = 2 * timeout
				}
				if after-f.seen < least && !f.gone.Load() {
					early++
					example = fmt.Sprintf("%v, %v: gone %d ticks after its last packet, idle %t", f.tuple, f.role, after-f.seen, f.idle)
				}
			}
		})
		if int32(maps.Now()-deadline) > 0 {
			s.Fatalf("%d connections are still there, %d timeouts after their last packets", left, 20)
		}
	}
	if early > 0 || overdue > 0 {
		s.Errorf("%d entries went too early, %d looks met one too late: for example %s", early, overdue, example)
	}
	if n := s.connections(); n != 0 {
		s.Errorf("%d connections are counted, all have ended", n)
	}
	for range 6 { // two walks without a connection for a backend, then two for its port pools
		s.turn()
	}
	for _, table := range []struct {
		name string
		n    int
	}{
		{"replies4", s.entries(s.Replies4)}, {"replies6", s.entries(s.Replies6)},
		{"half_open4", s.entries(s.HalfOpen4)}, {"half_open6", s.entries(s.HalfOpen6)},
		{"half_replies4", s.entries(s.HalfReplies4)}, {"half_replies6", s.entries(s.HalfReplies6)},
	} {
		if table.n != 0 {
			s.Errorf("%s holds %d entries, all connections have ended", table.name, table.n)
		}
	}

	inv, err := set.Inventory()
	s.must(err)
	var have, want []string
	for _, b := range inv.Backends {
		have = append(have, fmt.Sprintf("%v by %v", b.Address, b.Method))
		if b.Leaving {
			s.Errorf("backend %v of service %d is leaving, its last connection has ended", b.Address, b.Service)
		}
	}
	for _, at := range s.sites {
		for _, m := range at.members {
			want = append(want, fmt.Sprintf("%v by %v", at.backend(m.backend), m.method))
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		s.Errorf("backends %v, want %v", have, want)
	}
	pools := 0
	for id := range uint32(1024) {
		var pool bpf.FairleadPool
		s.must(s.Pools.Lookup(id, &pool))
		if pool.Family == 0 {
			continue
		}
		pools++
		ports := s.ports(id)
		slices.Sort(ports)
		for i, port := range ports {
			if port != 1024+uint16(i) {
				s.Errorf("port pool %d: %d stands in the place of %d", id, port, 1024+i)
				break
			}
		}
		if len(ports) != 32767-1024+1 {
			s.Errorf("port pool %d: %d ports in its queues, want %d", id, len(ports), 32767-1024+1)
		}
	}
	fullnats := 0
	for _, at := range s.sites {
		for _, m := range at.members {
			if m.method == fullnat {
				fullnats++
			}
		}
	}
	if pools != 2*fullnats {
		s.Errorf("%d port pools are left, %d backends with two source addresses each are wanted", pools, fullnats)
	}
	s.Logf("all connections, %d backends' and %d port pools' remains gone in %v", len(inv.Backends), pools,
		time.Since(begin).Round(time.Millisecond))
}
