// Package daemon joins the parts: configuration, next hops, loader and map manager. Its Run is start, steady state and
// stop, in this order, from top to bottom.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/maps/journal"
	"fairlead/userspace/announce"
	"fairlead/userspace/config"
	"fairlead/userspace/control"
	"fairlead/userspace/health"
	"fairlead/userspace/neighbor"
	"fairlead/userspace/orders"
	"fairlead/userspace/probe"
	"fairlead/userspace/through"
)

// Options are what Run touches.
type Options struct {
	Config string           // path of the configuration
	Logger *slog.Logger     // default: slog.Default()
	Reload <-chan os.Signal // each one reads the configuration again
	Ready  func()           // called once everything is in place
}

// daemon is a running one.
type daemon struct {
	log      *slog.Logger
	path     string
	config   *config.Config
	watcher  *neighbor.Watcher
	loader   *loader.Loader
	manager  *maps.Manager
	moved    chan []neighbor.NextHop
	local    config.PortRange // that the host's own connections take their ports from
	hostPort config.PortRange // that this leaves for fullnat
	applied  maps.Wanted      // what the maps hold

	announcer *announce.Announcer
	held      map[netip.Addr]string // addresses of the host's own, and their interfaces
	needs     needs                 // of the devices

	checker  *health.Checker
	checked  chan []health.Report
	said     map[health.Key]said          // what checks said last
	departed map[health.Key]health.Target // backends that have left the configuration, not their connections
	orders   *orders.Store                // nil: could not be read
	calls    chan call
	again    time.Time // when to judge backends anew though nothing happened; zero: never

	running   context.Context  // the daemon's own
	journal   *journal.Journal // nil: connections are not kept on disk
	tasks     *errgroup.Group
	through   *through.Stack // nil: no check has needed it yet
	socket    *probe.Socket
	teller    *probe.Teller
	campaigns map[uint32]*campaign // by the backend's number
}

// Run is the daemon, until ctx ends. Then the programs stay attached and go on forwarding: a stop ends no connection.
func Run(ctx context.Context, opts Options) (err error) {
	d := &daemon{
		log: cmp.Or(opts.Logger, slog.Default()), path: opts.Config,
		moved: make(chan []neighbor.NextHop, 64), checked: make(chan []health.Report, 64), calls: make(chan call),
		campaigns: make(map[uint32]*campaign),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	// Start: what is wanted, where it is to be reached, then the maps, then the program.
	if d.config, err = read(opts.Config); err != nil {
		return err
	}
	if d.local, err = localPorts(); err != nil {
		return err
	}
	if d.hostPort, err = defaultSourcePorts(d.local); err != nil {
		return err
	}
	d.watcher, err = neighbor.New(neighbor.Options{
		Logger: d.log,
		OnChange: func(hops []neighbor.NextHop) {
			select {
			case d.moved <- hops:
			case <-ctx.Done():
			}
		},
	})
	if err != nil {
		return fmt.Errorf("watch neighbours: %w", err)
	}
	d.watcher.SetDestinations(destinations(d.config))
	tasks, ctx := errgroup.WithContext(ctx)
	d.running, d.tasks = ctx, tasks
	tasks.Go(func() error { return d.watcher.Run(ctx) })
	d.openOrders()
	err = d.start(ctx)
	if err == nil {
		err = d.own(ctx, tasks)
	}
	if err == nil {
		err = d.startTeller()
	}
	if err != nil {
		cancel()
		return errors.Join(err, tasks.Wait(), d.close())
	}
	socket := d.listen()
	if opts.Ready != nil {
		opts.Ready()
	}
	d.tell(sd.SdNotifyReady)

	// Steady state.
	tasks.Go(func() error { return d.manager.Keep(ctx) })
	tasks.Go(func() error { return d.checker.Run(ctx) })
	tasks.Go(func() error { return d.followSigns(ctx) })
	tasks.Go(func() error { return d.followPressure(ctx) })
	if socket != nil {
		tasks.Go(func() error { return control.Serve(ctx, socket, commands{d}, d.log) })
	}
	tasks.Go(func() error { return d.followDevices(ctx) })
	tasks.Go(func() error { return d.complain(ctx) })
	tasks.Go(func() error { return d.keepJournal(ctx) })
	tasks.Go(func() error { return d.takeSnapshots(ctx) })
	tasks.Go(func() error { return d.feedWatchdog(ctx) })
	tasks.Go(func() error { return d.follow(ctx, opts.Reload) })
	err = tasks.Wait()
	d.tell(sd.SdNotifyStopping)

	// Stop.
	if n := len(d.loader.Attachments()); n > 0 {
		d.log.Info("daemon stopped: forwarding goes on without it", "interfaces", n)
	}
	return errors.Join(err, d.close())
}

func (d *daemon) close() (err error) {
	if d.through != nil {
		err = d.through.Close()
	}
	if d.socket != nil {
		err = errors.Join(err, d.socket.Close())
	}
	if d.manager != nil {
		err = errors.Join(err, d.manager.Close())
	}
	if d.loader != nil {
		err = errors.Join(err, d.loader.Close())
	}
	return err
}

// read reads a configuration that this version can carry out.
func read(path string) (*config.Config, error) {
	cfg, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	if errs := cfg.Unsupported(); len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return cfg, nil
}

// nextHopsTime is how long a start or reload waits for the next hops of new backends. Later ones come as they are found.
const nextHopsTime = 2 * time.Second

func (d *daemon) start(ctx context.Context) error {
	d.drain(ctx, d.watcher.Ready(), nextHopsTime) // the maps are not there yet: they will ask for what was told
	if _, err := d.wanted(d.config); err != nil { // before anything is touched
		return err
	}
	attached, err := attachments(d.config.Dataplane.PinPath)
	if err != nil {
		return err
	}
	interfaces, err := d.interfaces(d.config)
	if err != nil {
		return err
	}
	settings, err := d.settings(d.config)
	if err != nil {
		return err
	}
	if d.needs, err = d.needsOf(d.config, interfaces); err != nil {
		return err
	}
	options := loader.Options{
		PinPath: d.config.Dataplane.PinPath, Interfaces: interfaces, Mode: loader.XDPMode(d.config.Dataplane.XDP.String()),
		Settings: settings, Logger: d.log, VLAN: d.needs.vlan, Targets: d.needs.targets,
	}
	if err := d.check(options); err != nil {
		return err
	}
	d.loader, err = loader.Open(options)
	if err != nil {
		return err
	}
	programs := d.loader.Programs()
	d.manager, err = maps.NewManager(d.loader.Maps(), maps.ManagerOptions{
		Tend: programs.Tend, Fill: programs.Fill, Epoch: d.config.Dataplane.Epoch, Logger: d.log,
	})
	if err != nil {
		return err
	}
	if err := d.devices(); err != nil {
		return err
	}
	// What an earlier run knew of backends holds until checks say otherwise.
	if err := d.openThrough(d.config); err != nil {
		return err
	}
	d.watchHealth(ctx)
	wanted, err := d.wanted(d.config)
	if err != nil {
		return err
	}
	d.watcher.SetDestinations(d.destinationsInUse())
	d.openJournal()
	fresh := !d.loader.Adopted()
	if fresh {
		d.reserve()
	}
	if len(attached) == 0 {
		// The maps first: no packet meets a program that has nothing to go by.
		if _, err := d.apply(wanted); err != nil {
			return err
		}
		if fresh {
			if err := d.restoreConnections(ctx); err != nil {
				return err
			}
		}
		return d.loader.Attach()
	}
	// Another program is at work, perhaps without what the configuration now asks for: it is replaced first.
	if err := d.manager.Refuse(wanted); err != nil {
		return fmt.Errorf("apply the configuration: %w", err)
	}
	if err := d.loader.Attach(); err != nil {
		return err
	}
	_, err = d.apply(wanted)
	return err
}

// check looks at kernel, privileges and interfaces before anything is touched; what can't work ends the start.
func (d *daemon) check(options loader.Options) error {
	var errs []error
	for _, f := range loader.Check(options) {
		switch f.Level {
		case loader.LevelFail:
			errs = append(errs, fmt.Errorf("%s: %s: %s", f.Subject, f.What, f.Advice))
		case loader.LevelWarn:
			d.log.Warn(f.What, "about", f.Subject, "advice", f.Advice)
		}
	}
	return errors.Join(errs...)
}

// drain waits for a channel and answers what the watcher had to tell meanwhile: it must not wait for us.
func (d *daemon) drain(ctx context.Context, until <-chan struct{}, most time.Duration) (moved []neighbor.NextHop) {
	timeout := time.After(most)
	for {
		select {
		case <-until:
			return moved
		case hops := <-d.moved:
			moved = append(moved, hops...)
		case <-timeout:
			return moved
		case <-ctx.Done():
			return moved
		}
	}
}

// follow carries out reloads, commands, and changes of next hops and of health, one at a time.
func (d *daemon) follow(ctx context.Context, reload <-chan os.Signal) error {
	d.campaign()
	for {
		var again <-chan time.Time
		if !d.again.IsZero() {
			again = time.After(time.Until(d.again))
		}
		select {
		case <-ctx.Done():
			return nil
		case reports := <-d.checked:
			if err := d.heard(reports); err != nil {
				d.log.Error("follow health", "err", err)
			}
		case <-again:
			if err := d.refresh(); err != nil {
				d.log.Error("follow health", "err", err)
			}
		case c := <-d.calls:
			c.done <- c.do()
		case hops := <-d.moved:
			if err := d.nextHopsChanged(hops); err != nil {
				d.log.Error("follow next hops", "err", err)
			}
		case _, ok := <-reload:
			if !ok {
				reload = nil
				continue
			}
			if _, err := d.reload(ctx); err != nil {
				d.log.Error("reload refused: nothing is changed", "err", err)
			}
		}
	}
}

// reload makes the configuration of now take effect, whole or not at all. It answers what changed, a line each.
func (d *daemon) reload(ctx context.Context) (changes []string, err error) {
	cfg, err := read(d.path)
	if err != nil {
		return nil, err
	}
	if err := d.fixed(cfg); err != nil {
		return nil, err
	}
	d.watcher.SetDestinations(append(destinations(cfg), d.destinationsInUse()...))
	moved := d.drain(ctx, d.resolved(ctx, destinations(cfg)), nextHopsTime)
	defer func() {
		if later := d.nextHopsChanged(moved); later != nil {
			d.log.Error("follow next hops", "err", later)
		}
	}()
	d.adoptHealth(cfg)
	wanted, err := d.wanted(cfg)
	if err == nil {
		err = d.openThrough(cfg)
	}
	if err == nil {
		err = d.manager.Refuse(wanted) // before anything is touched
	}
	if err == nil {
		err = d.replace(cfg)
	}
	if err == nil {
		changes, err = d.apply(wanted)
	}
	if err != nil {
		return nil, errors.Join(err, d.restore())
	}
	old := d.config
	d.config = cfg
	for _, line := range changed(old, cfg) {
		d.log.Info(line)
		changes = append(changes, line)
	}
	d.watcher.SetDestinations(d.destinationsInUse())
	if err := d.claim(cfg); err != nil {
		d.log.Error("announce addresses", "err", err)
	}
	d.checksChanged(old, cfg)
	d.campaign()
	d.log.Info("reloaded", "services", len(cfg.Services), "changes", len(changes))
	return changes, nil
}

// restore goes back to the configuration in force after a new one failed half-way.
func (d *daemon) restore() error {
	d.watcher.SetDestinations(d.destinationsInUse())
	wanted, err := d.wanted(d.config)
	if err == nil {
		err = d.replace(d.config)
	}
	if err == nil {
		_, err = d.apply(wanted)
	}
	if err != nil {
		return fmt.Errorf("go back to the configuration in force: %w", err)
	}
	return nil
}

// replace puts a program in place that can do what the new configuration asks for; what the old one asks for, it can
// still do, for connections that live on.
func (d *daemon) replace(cfg *config.Config) error {
	interfaces, err := d.interfaces(cfg)
	if err != nil {
		return err
	}
	settings, err := d.settings(cfg)
	if err != nil {
		return err
	}
	// Sizes are those of the maps, whatever the configuration says.
	inForce := d.loader.Settings()
	settings.Connections, settings.HalfOpen = inForce.Connections, inForce.HalfOpen
	needs, err := d.needsOf(cfg, interfaces)
	if err != nil {
		return err
	}
	if settings == inForce && sameInterfaces(d.loader.Attachments(), interfaces) && needs.equal(d.needs) {
		return nil
	}
	d.loader.SetNeeds(needs.vlan, needs.targets)
	d.needs = needs
	if err := d.loader.Replace(settings, interfaces); err != nil {
		return err
	}
	programs := d.loader.Programs()
	d.manager.SetPrograms(programs.Tend, programs.Fill)
	return nil
}

func (d *daemon) apply(wanted maps.Wanted) (changes []string, err error) {
	d.applied = maps.Wanted{}
	changes, err = d.manager.Apply(wanted, d.nextHop)
	for _, line := range changes {
		d.log.Info(line)
	}
	if err != nil {
		return changes, fmt.Errorf("apply the configuration: %w", err)
	}
	d.applied = wanted
	return changes, nil
}

// applyIfOther is for what may have changed nothing.
func (d *daemon) applyIfOther(wanted maps.Wanted) error {
	if reflect.DeepEqual(wanted, d.applied) {
		return nil
	}
	_, err := d.apply(wanted)
	return err
}

func (d *daemon) nextHopsChanged(hops []neighbor.NextHop) error {
	changed := make(map[netip.Addr]maps.NextHop, len(hops))
	for _, h := range hops {
		changed[h.Destination] = mapsNextHop(h)
	}
	turned, err := d.manager.SetNextHops(changed)
	for _, b := range turned {
		if b.NextHop.Known {
			d.log.Info("backend has a next hop", "backend", b.Name, "address", b.Address)
		} else {
			d.log.Warn("backend has no next hop", "backend", b.Name, "address", b.Address, "reason", b.NextHop.Reason)
		}
	}
	if err != nil {
		return err
	}
	// Rings leave out whom nobody can reach. And source addresses that nobody configured are those of the routes.
	wanted, err := d.wanted(d.config)
	if err != nil {
		return err
	}
	if len(turned) == 0 {
		return d.applyIfOther(wanted)
	}
	_, err = d.apply(wanted)
	return err
}
