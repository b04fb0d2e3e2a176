package daemon

import (
	"fmt"
	"net/netip"

	"fairlead/userspace/config"
	"fairlead/userspace/through"
)

// This file has checks go through their service's method (`via: service`).

func goesThrough(check config.Health) bool {
	return check.NeedsChecks() && check.Via == config.ViaService
}

// anyThrough tells whether a configuration has such checks.
func anyThrough(cfg *config.Config) bool {
	for _, s := range cfg.Services {
		for _, b := range s.Backends {
			if goesThrough(s.HealthOf(b)) {
				return true
			}
		}
	}
	return false
}

// openThrough makes what these checks need, once, before the first of them is made.
func (d *daemon) openThrough(cfg *config.Config) error {
	if d.through != nil || !anyThrough(cfg) {
		return nil
	}
	frames, err := d.manager.Set().CheckFrames()
	if err != nil {
		return err
	}
	ports := through.ChoosePorts(d.local.First, d.local.Last, nil)
	stack, err := through.New(through.Options{
		Frames: frames, Ports: ports, Avoid: d.manager.IsService, Source: d.manager.AddCheckSource, Logger: d.log,
	})
	if err != nil {
		frames.Close()
		return err
	}
	if err := d.manager.SetCheckPorts(ports); err != nil {
		stack.Close()
		return fmt.Errorf("checks through their method: %w", err)
	}
	d.through = stack
	d.tasks.Go(func() error { return stack.Run(d.running) })
	return nil
}

// destination looks up the way to a backend through its service's method, as it is now.
func (d *daemon) destination(s config.Service, b config.Backend, to netip.AddrPort) func() (through.Destination, error) {
	return func() (through.Destination, error) {
		way := through.Destination{
			Service: to, Method: methods[s.Method], Backend: b.Address, Hop: d.nextHop(b.Address), TunnelSource: d.tunnelSource(s, b),
		}
		if hop, ok := d.watcher.Lookup(b.Address); ok {
			way.Source = hop.Source
		}
		return way, nil
	}
}
