package daemon

import (
	"fmt"
	"reflect"
	"slices"

	"fairlead/userspace/config"
)

// changed says, a line each, what a new configuration sets otherwise for services and backends that stay. What comes,
// goes or changes weight is said by the map manager.
func changed(old, cfg *config.Config) (lines []string) {
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if !reflect.DeepEqual(old.Dataplane.Interfaces, cfg.Dataplane.Interfaces) {
		say("interfaces: %v, were %v", cfg.Dataplane.Interfaces, old.Dataplane.Interfaces)
	}
	for i := range cfg.Services {
		s := &cfg.Services[i]
		n := slices.IndexFunc(old.Services, func(o config.Service) bool { return o.Name == s.Name })
		if n < 0 {
			continue
		}
		o := &old.Services[n]
		for _, f := range []struct {
			name     string
			was, now any
		}{
			{"idle_timeout", o.IdleTimeout, s.IdleTimeout},
			{"on_backend_down", o.OnBackendDown, s.OnBackendDown},
			{"all_down", o.AllDown, s.AllDown},
			{"panic", o.Panic, s.Panic},
			{"reset_rate", o.ResetRate, s.ResetRate},
			{"slow_start", o.SlowStart, s.SlowStart},
			{"source_addresses", o.SourceAddresses, s.SourceAddresses},
			{"source_ports", o.SourcePorts, s.SourcePorts},
			{"tunnel_source", o.TunnelSources, s.TunnelSources},
			{"announce", o.Announce, s.Announce},
		} {
			if was, now := fmt.Sprint(f.was), fmt.Sprint(f.now); was != now {
				say("service %s: %s %s, was %s", s.Name, f.name, now, was)
			}
		}
		for j := range s.Backends {
			b := &s.Backends[j]
			k := slices.IndexFunc(o.Backends, func(o config.Backend) bool { return o.Name == b.Name })
			if k < 0 {
				continue
			}
			was := &o.Backends[k]
			if was.Disabled != b.Disabled {
				say("backend %s/%s: disabled %v, was %v", s.Name, b.Name, b.Disabled, was.Disabled)
			}
			if is, before := s.HealthOf(*b), o.HealthOf(*was); !is.Equal(before) {
				say("backend %s/%s: its checks changed: %s", s.Name, b.Name, checks(is, before))
			}
		}
	}
	return lines
}

func checks(is, before config.Health) string {
	if is.Type != before.Type {
		return fmt.Sprintf("%s, were %s", is.Type, before.Type)
	}
	return is.Type.String()
}
