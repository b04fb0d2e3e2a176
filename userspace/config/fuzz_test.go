package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

// FuzzParse asks of any bytes: they are refused with errors that name lines of theirs, or they give a configuration
// that keeps the rules the data plane relies on, and that is the same when every value of it is written out and read
// again.
func FuzzParse(f *testing.F) {
	example, err := os.ReadFile("testdata/example.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	for _, seed := range []string{"", "services: []", service(""), service("health: {type: http}"), service("source_ports: 1-2"),
		with("method: gue", "{name: b, address: fe80::1%eth0, health: {type: tcp}}"), "a: &a [*a]", "control: &a\n  <<: *a\n",
		"dataplane: &a {mode: xdp}\ncontrol: {<<: [*a, *a]}\n", "? node\n: a\n", "node: !!str a\n", "- - -", "services:\n-\n-",
		"services: [&s {name: a, address: 10.0.0.1, port: 1, backends: [{name: b, address: 10.0.0.2}]}, {<<: *s, name: b, port: 2}]",
		"node: |\n  a\r\n", "\"node\": \"\\x41\"", "services: [{}, ~, [], a]", "&a node: *a", "{", "}", "*", "&", "!", "|", ">", "%", "@", "`"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := parse("fuzz.yaml", data, testHostname)
		if err != nil {
			var all Errors
			if !errors.As(err, &all) || len(all) == 0 {
				t.Fatalf("error is %T of %d", err, len(all))
			}
			for _, e := range all {
				if e.Line < 1 || e.Column < 1 || e.Problem == "" || e.Remedy == "" || e.Error() == "" {
					t.Errorf("error without a place or words: %+v", e)
				}
			}
			return
		}
		keepsRules(t, cfg)
		cfg.Unsupported()
		text, err := yaml.Marshal(written(cfg))
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse("again.yaml", text, testHostname)
		if err != nil {
			t.Fatalf("accepted:\n%q\nbut refused when written out:\n%s\n%v", data, text, err)
		}
		if !again.Equal(cfg) {
			t.Errorf("read again (-first +again):\n%s", cmp.Diff(cfg, again, asValue))
		}
	})
}

func keepsRules(t *testing.T, cfg *Config) {
	t.Helper()
	if cfg.Node == "" || cfg.Dataplane.Connections == 0 || cfg.Dataplane.HalfOpen == 0 || cfg.Dataplane.Epoch == 0 ||
		cfg.StateDir == "" || cfg.Control.Socket == "" || cfg.Dataplane.PinPath == "" {
		t.Errorf("something is unset: %+v", cfg)
	}
	seen := map[string]bool{}
	once := func(what string, args ...any) {
		if key := fmt.Sprintf(what, args...); seen[key] {
			t.Errorf("twice: %s", key)
		} else {
			seen[key] = true
		}
	}
	reachable := func(a netip.Addr) {
		if !a.IsValid() || a.IsMulticast() || a.IsUnspecified() || a.Is4In6() {
			t.Errorf("address %v", a)
		}
	}
	for _, s := range cfg.Services {
		once("name %s", s.Name)
		once("endpoint %v %d %s", s.Address.WithZone(""), s.Port, s.Protocol)
		reachable(s.Address)
		if s.Name == "" || s.Port == 0 || s.Protocol.Number() == 0 || !isPrime(s.RingSize) ||
			int(s.RingSize) < 100*len(s.Backends) || s.IdleTimeout < 4*cfg.Dataplane.Epoch || len(s.Backends) == 0 {
			t.Errorf("service %+v", s)
		}
		for _, b := range s.Backends {
			once("name %s/%s", s.Name, b.Name)
			once("backend %s %v %d", s.Name, b.Address.WithZone(""), b.Port)
			reachable(b.Address)
			if b.Name == "" || b.Port == 0 || s.Method.keepsPort() && b.Port != s.Port {
				t.Errorf("backend %+v", b)
			}
		}
	}
}

// written returns cfg as a file that leaves nothing to defaults, but what has no other spelling than absence.
func written(cfg *Config) map[string]any {
	addresses := func(list []netip.Addr) []string {
		texts := []string{}
		for _, a := range list {
			texts = append(texts, a.String())
		}
		return texts
	}
	health := func(h Health) map[string]any {
		m := map[string]any{"type": h.Type.String()}
		if h.Type != HealthNone {
			m["interval"], m["timeout"], m["rise"], m["fall"] = h.Interval.String(), h.Timeout.String(), h.Rise, h.Fall
		}
		if h.Type.hasPath() {
			m["path"] = h.Path
		}
		return m
	}
	services := []any{}
	for _, s := range cfg.Services {
		backends := []any{}
		for _, b := range s.Backends {
			m := map[string]any{"name": b.Name, "address": b.Address.String(), "port": b.Port, "weight": b.Weight}
			if b.Health != nil {
				m["health"] = health(*b.Health)
			}
			backends = append(backends, m)
		}
		m := map[string]any{"name": s.Name, "address": s.Address.String(), "port": s.Port, "protocol": s.Protocol,
			"method": s.Method, "affinity": s.Affinity, "ring_size": s.RingSize, "idle_timeout": s.IdleTimeout.String(),
			"on_backend_down": s.OnBackendDown, "source_addresses": addresses(s.SourceAddresses),
			"health": health(s.Health), "balance": map[string]any{"mode": s.Balance.Mode},
			"proxy_protocol": s.ProxyProtocol, "announce": s.Announce, "backends": backends}
		if !s.SourcePorts.IsZero() {
			m["source_ports"] = s.SourcePorts.String()
		}
		services = append(services, m)
	}
	http := ""
	if cfg.Control.HTTP.IsValid() {
		http = cfg.Control.HTTP.String()
	}
	d := cfg.Dataplane
	return map[string]any{"node": cfg.Node, "state_dir": cfg.StateDir, "services": services,
		"control": map[string]any{"socket": cfg.Control.Socket, "http": http},
		"dataplane": map[string]any{"mode": d.Mode, "interfaces": d.Interfaces, "xdp": d.XDP, "connections": d.Connections,
			"half_open": d.HalfOpen, "pin_path": d.PinPath, "epoch": d.Epoch.String()}}
}
