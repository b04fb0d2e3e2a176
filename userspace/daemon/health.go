package daemon

import (
	"context"
	"net/netip"
	"time"

	"fairlead/maps"
	"fairlead/userspace/config"
	"fairlead/userspace/health"
	"fairlead/userspace/orders"
)

// This file has backends checked, and keeps what checks said.

// said is what checks say of one backend. Its ticks are those of the report's times, taken once, so that they don't
// differ each time they are asked for.
type said struct {
	report          health.Report
	since, failedAt uint32
}

// parallelChecks is how many checks are made at once: 2,000 backends of which each is silent for the usual second need
// half as many.
const parallelChecks = 1024

// watchHealth makes the checker. What the maps know of an earlier run holds until checks say otherwise.
func (d *daemon) watchHealth(ctx context.Context) {
	d.said = make(map[health.Key]said)
	d.departed = make(map[health.Key]health.Target)
	d.checker = health.New(health.Options{Logger: d.log, Parallel: parallelChecks, OnChange: func(reports []health.Report) {
		select {
		case d.checked <- reports:
		case <-ctx.Done():
		}
	}})
	d.adoptHealth(d.config)
	d.checker.Set(d.targets(d.config))
}

// adoptHealth notes what the maps know of backends that no check has said anything of: of an earlier run, or by another
// port. Who serves and was not checked before is up.
func (d *daemon) adoptHealth(cfg *config.Config) {
	living := make(map[orders.Name][]maps.Backend)
	for _, b := range d.manager.Backends() {
		name := orders.Name{Service: b.Service.Name, Backend: b.Backend.Name}
		living[name] = append(living[name], b.Backend)
	}
	for _, t := range d.targets(cfg) {
		if _, ok := d.said[t.Key]; ok {
			continue
		}
		for _, b := range living[orders.Name{Service: t.Service, Backend: t.Backend}] {
			status, known := statuses[b.Shown.Health]
			if b.Address != t.Address.Addr() || b.Leaving || !known || b.Shown.Health == maps.HealthNone && !b.Up {
				continue
			}
			d.said[t.Key] = said{
				report: health.Report{
					Key: t.Key, Status: status, Since: timeOf(b.Shown.Since), Failure: b.Shown.Failure,
					FailedAt: timeOf(b.Shown.FailedAt), Percent: 100,
				},
				since: b.Shown.Since, failedAt: b.Shown.FailedAt,
			}
		}
	}
}

var statuses = map[maps.Health]health.Status{
	maps.HealthNone: health.Up, maps.HealthUp: health.Up, maps.HealthDown: health.Down, maps.HealthHeld: health.Held,
}

func checkKey(s *config.Service, b *config.Backend, check *config.Health) health.Key {
	return health.Key{Service: s.Name, Backend: b.Name, Address: netip.AddrPortFrom(b.Address, check.Port)}
}

// targets are the backends to check: the configuration's, and those that have left it but not their connections.
func (d *daemon) targets(cfg *config.Config) (list []health.Target) {
	for i := range cfg.Services {
		s := &cfg.Services[i]
		for j := range s.Backends {
			b := &s.Backends[j]
			if check := s.HealthOf(*b); check.NeedsChecks() && !b.Disabled {
				list = append(list, d.target(s, b, check))
			}
		}
	}
	for _, t := range d.departed {
		list = append(list, t)
	}
	return list
}

func (d *daemon) target(s *config.Service, b *config.Backend, check config.Health) health.Target {
	key := checkKey(s, b, &check)
	t := health.Target{Key: key, Check: check, Adopt: d.said[key].report}
	if goesThrough(check) {
		t.Via = netip.AddrPortFrom(s.Address, check.Port)
		if d.through != nil {
			t.Dial = d.through.Dialer(d.destination(*s, *b, t.Via))
		}
	}
	return t
}

// checksChanged makes the checker follow a new configuration. Who leaves it is checked as before for as long as it has
// connections: their clients are to be told of its death as anyone's.
func (d *daemon) checksChanged(old, cfg *config.Config) {
	now := make(map[health.Key]bool)
	for _, t := range d.targets(cfg) {
		now[t.Key] = true
	}
	for i := range old.Services {
		s := &old.Services[i]
		for j := range s.Backends {
			b := &s.Backends[j]
			if check := s.HealthOf(*b); check.NeedsChecks() && !b.Disabled {
				if t := d.target(s, b, check); !now[t.Key] {
					d.departed[t.Key] = t
				}
			}
		}
	}
	for i := range cfg.Services {
		s := &cfg.Services[i]
		for j := range s.Backends {
			check := s.HealthOf(s.Backends[j])
			delete(d.departed, checkKey(s, &s.Backends[j], &check))
		}
	}
	d.forgetGone()
	d.checker.Set(d.targets(cfg))
}

// forgetGone ends the checks of those whose last connection has ended.
func (d *daemon) forgetGone() (some bool) {
	living := make(map[health.Key]bool) // without port
	for _, b := range d.manager.Backends() {
		living[health.Key{Service: b.Service.Name, Backend: b.Backend.Name, Address: netip.AddrPortFrom(b.Backend.Address, 0)}] = true
	}
	there := func(k health.Key) bool {
		k.Address = netip.AddrPortFrom(k.Address.Addr(), 0)
		return living[k]
	}
	for key := range d.departed {
		if !there(key) {
			delete(d.departed, key)
			some = true
		}
	}
	for key := range d.said {
		if !there(key) {
			delete(d.said, key)
		}
	}
	return some
}

// heard takes what the checker has to say, and what it has said since, and makes it hold: a verdict that is over by now
// is not carried out.
func (d *daemon) heard(reports []health.Report) error {
	there := make(map[health.Key]bool)
	for _, t := range d.targets(d.config) {
		there[t.Key] = true
	}
	for more := true; more; {
		select {
		case later := <-d.checked:
			reports = append(reports, later...)
		default:
			more = false
		}
	}
	for _, r := range reports {
		if !there[r.Key] {
			continue // not checked any more
		}
		d.said[r.Key] = said{r, tick(r.Since), tick(r.FailedAt)}
	}
	return d.refresh()
}

// knownOf is what there is to go by for a service's backends.
func (d *daemon) knownOf(s *config.Service) []known {
	all := make([]known, len(s.Backends))
	for i := range s.Backends {
		b := &s.Backends[i]
		if d.orders != nil {
			all[i].order = d.orders.Get(s.Name, b.Name)
		}
		check := s.HealthOf(*b)
		if was, ok := d.said[checkKey(s, b, &check)]; ok && check.NeedsChecks() {
			all[i].report, all[i].since, all[i].failedAt = was.report, was.since, was.failedAt
		}
	}
	return all
}

// refresh makes the data plane follow what is known of backends now. Flags first: whoever still sends to a dead backend
// is told at once; then those who don't; then the rings.
func (d *daemon) refresh() error {
	wanted, err := d.wanted(d.config)
	if err != nil {
		return err
	}
	type name struct {
		service, backend string
		address          netip.AddrPort
		method           maps.Method
	}
	down := make(map[name]*maps.WantedBackend)
	for i := range wanted.Services {
		s := &wanted.Services[i]
		for j := range s.Backends {
			b := &s.Backends[j]
			down[name{s.Name, b.Name, netip.AddrPortFrom(b.Address, b.Port), b.Method}] = b
		}
	}
	turned, err := d.manager.SetDown(func(service string, b *maps.Backend) (bool, bool, bool) {
		if w := down[name{service, b.Name, netip.AddrPortFrom(b.Address, b.Port), b.Method}]; w != nil && !b.Leaving {
			return w.Down, w.Tried, true
		}
		return d.leavingDown(service, b)
	})
	for _, b := range turned {
		if b.Up {
			d.log.Info("backend serves its connections again", "backend", b.Name, "address", b.Address)
		} else {
			d.log.Warn("backend is down: its connections are lost", "backend", b.Name, "address", b.Address)
		}
	}
	if err != nil {
		return err
	}
	d.campaign()
	return d.applyIfOther(wanted)
}

// leavingDown judges a backend that has left the configuration.
func (d *daemon) leavingDown(service string, b *maps.Backend) (down, tried, known bool) {
	for key := range d.departed {
		if key.Service != service || key.Backend != b.Name || key.Address.Addr() != b.Address {
			continue
		}
		r := d.said[key].report
		return !r.Maint && (r.Status == health.Down || r.Status == health.Held), false, r.Status != health.Unknown
	}
	return false, false, false
}

// lookEvery is how often the backends' counters are looked at for signs.
const lookEvery = 250 * time.Millisecond

// silentSYNs is how many unanswered SYNs in a row of looks are a sign.
const silentSYNs = 3

// followSigns looks for signs that a backend is not well, where its answers pass: RST in answer to a SYN, or no answer at
// all. It is checked at once then.
func (d *daemon) followSigns(ctx context.Context) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	type seen struct {
		traffic maps.Traffic
		silent  uint64 // SYNs since the last answer
	}
	before := make(map[uint32]seen)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now := make(map[uint32]seen)
		for _, b := range d.manager.Backends() {
			if b.Backend.Method.Stateless() || b.Service.Protocol != config.ProtocolTCP.Number() {
				continue
			}
			traffic, err := d.manager.Set().Counters.Backend(b.Backend.ID)
			if err != nil {
				d.log.Error("look for signs of backends", "err", err)
				break
			}
			was, ok := before[b.Backend.ID]
			is := seen{traffic: traffic}
			if ok && traffic.Connections >= was.traffic.Connections {
				if traffic.Answered == was.traffic.Answered {
					is.silent = was.silent + traffic.Connections - was.traffic.Connections
				}
				if traffic.Rejected > was.traffic.Rejected || is.silent >= silentSYNs {
					is.silent = 0
					d.hurry(b)
				}
			}
			now[b.Backend.ID] = is
		}
		before = now
	}
}

func (d *daemon) hurry(b maps.ServiceBackend) {
	for _, r := range d.checker.Reports() {
		if r.Service == b.Service.Name && r.Backend == b.Backend.Name && r.Address.Addr() == b.Backend.Address {
			d.checker.Hurry(r.Key)
		}
	}
}
