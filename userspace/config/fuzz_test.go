package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

// FuzzParse asks of any bytes: they are refused with errors that name lines of theirs, or they give a configuration
// that keeps the rules the data plane relies on, and that is the same when every value of it is written out and read
// again.
func FuzzParse(f *testing.F) {
	for _, name := range []string{"example.yaml", "lists.yaml", "health.yaml"} {
		file, err := os.ReadFile("testdata/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(file)
	}
	for _, seed := range []string{"", "services: []", service(""), service("health: {type: http}"),
		service("health: {type: wss, host: '[::1]:80', ca: /ca.pem, jitter: 5%, status: 200}"), service("health: {type: https, status: [200, 201-299], body: '(a', sni: a.b}"),
		with("health: {type: exec, command: /usr/lib/fairlead/check}", "{name: b, address: 10.0.0.1, disabled: true, health: {type: tcp, hold_down: 0s, fast_interval: 1s}}"),
		service("source_ports: 1-2"),
		with("method: gue", "{name: b, address: fe80::1%eth0, health: {type: tcp}}"), "a: &a [*a]", "control: &a\n  <<: *a\n",
		"dataplane: &a {mode: xdp}\ncontrol: {<<: [*a, *a]}\n", "? node\n: a\n", "node: !!str a\n", "- - -", "services:\n-\n-",
		"services: [&s {name: a, address: 10.0.0.1, port: 1, backends: [{name: b, address: 10.0.0.2}]}, {<<: *s, name: b, port: 2}]",
		listed("addresses: ['fe80::1%a', 'fe80::2%b'], ports: [1-65535], method: ipip, tunnel_source: [10.9.0.0/8, '2001:db8::/32']", ""),
		listed("addresses: &a [192.0.2.10], ports: [80, 90-99], method: nat, source_addresses: *a", ", port: 80"),
		tunnelled("&t 10.9.0.1"), "node: |\n  a\r\n", "\"node\": \"\\x41\"", "services: [{}, ~, [], a]", "&a node: *a", "{", "}", "*", "&", "!", "|", ">", "%", "@", "`"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := parse("fuzz.yaml", data, testHost)
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
		again, err := parse("again.yaml", text, testHost)
		if err != nil {
			t.Fatalf("accepted:\n%q\nbut refused when written out:\n%s\n%v", data, text, err)
		}
		if !again.Equal(cfg) {
			t.Errorf("read again (-first +again):\n%s", cmp.Diff(cfg, again, asValue))
		}
	})
}

// keepsHealthRules holds for how b of s is checked.
func keepsHealthRules(t *testing.T, s Service, b Backend) {
	t.Helper()
	h := s.HealthOf(b)
	takes := func(types ...HealthType) bool { return slices.Contains(types, h.Type) }
	switch {
	case !slices.Contains(healthTypes, h.Type):
	case h.NeedsChecks() != (h.Type != HealthNone):
	case h.Type == HealthNone && !h.Equal(Health{Type: HealthNone}):
	case h.Type == HealthNone:
		return
	case h.Interval < 100*time.Millisecond || h.Timeout <= 0 || h.Timeout > h.Interval || h.Rise == 0 || h.Fall == 0 || h.Jitter > 50:
	case h.FastInterval < 100*time.Millisecond || h.FastInterval > h.Interval || h.Initial != InitialUp && h.Initial != InitialDown:
	case (h.Flaps == 0) != (h.HoldDown == 0) || (h.FlapWindow == 0) != (h.HoldDown == 0):
	case h.Port == 0 && h.Type != HealthExec:
	case (h.Path != "") != takes(HealthHTTP, HealthHTTPS, HealthWebSocket, HealthWSS):
	case (h.Host != "" || h.StateHeader != "") && h.Path == "":
	case (len(h.Status) > 0) != takes(HealthHTTP, HealthHTTPS) || (h.Body != nil || h.DrainStatus != nil) && h.Status == nil:
	case (h.SNI != "" || h.Verify) && !takes(HealthHTTPS, HealthWSS):
	case (h.CA != "") != (h.Roots != nil) || h.CA != "" && !h.Verify:
	case (len(h.Command) > 0) != takes(HealthExec):
	case h.Via == ViaService && (s.Method.rewritesPort() || h.Type == HealthExec) || h.Via == "":
	default:
		return
	}
	t.Errorf("backend %s of service %+v is checked by %+v", b.Name, s, h)
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
	type endpoint struct {
		at       netip.AddrPort
		protocol Protocol
	}
	endpoints := map[endpoint]bool{}
	reachable := func(a netip.Addr) {
		if !a.IsValid() || a.IsMulticast() || a.IsUnspecified() || a.Is4In6() {
			t.Errorf("address %v", a)
		}
	}
	for _, s := range cfg.Services {
		once("name %s", s.Name)
		count := 0
		for at := range s.Endpoints() {
			key := endpoint{netip.AddrPortFrom(at.Addr().WithZone(""), at.Port()), s.Protocol}
			if endpoints[key] {
				t.Errorf("twice: %v", key)
			}
			endpoints[key] = true
			reachable(at.Addr())
			if at.Port() == 0 || at.Addr().Is4() != s.Address.Is4() || count == 0 && at != netip.AddrPortFrom(s.Address, s.Port) {
				t.Errorf("endpoint %v of service %+v", at, s)
			}
			count++
		}
		for i, r := range s.Ports {
			if r.IsZero() || r.Last < r.First || i > 0 && int(r.First) <= int(s.Ports[i-1].Last)+1 {
				t.Errorf("ports %v", s.Ports)
			}
		}
		if count == 0 || count != s.EndpointCount() {
			t.Errorf("%d endpoints of service %+v", count, s)
		}
		for _, p := range s.TunnelSources {
			once("tunnel source of IPv4 %v of %s", p.Addr().Is4(), s.Name)
			reachable(p.Addr())
			for _, other := range cfg.Services {
				for _, a := range other.Addresses {
					if p.Contains(a.WithZone("")) {
						t.Errorf("tunnel source %v holds service %v", p, a)
					}
				}
				for _, b := range other.Backends {
					if p.Contains(b.Address.WithZone("")) {
						t.Errorf("tunnel source %v holds backend %v", p, b.Address)
					}
				}
			}
		}
		if len(s.TunnelSources) > 0 && !s.Method.encapsulates() {
			t.Errorf("service %+v has tunnel sources", s)
		}
		several := len(s.Ports) > 1 || s.Ports[0].Count() > 1
		if s.Name == "" || s.Port == 0 || s.Protocol.Number() == 0 || !isPrime(s.RingSize) ||
			int(s.RingSize) < 100*len(s.Backends) || s.IdleTimeout < 4*cfg.Dataplane.Epoch || len(s.Backends) == 0 {
			t.Errorf("service %+v", s)
		}
		for _, b := range s.Backends {
			once("name %s/%s", s.Name, b.Name)
			once("backend %s %v %d", s.Name, b.Address.WithZone(""), b.Port)
			reachable(b.Address)
			want := b.Port
			switch {
			case s.Method.keepsPort() && several:
				want = 0
			case s.Method.keepsPort():
				want = s.Port
			}
			keepsHealthRules(t, s, b)
			if b.Name == "" || b.Port != want || b.Port == 0 && !s.Method.keepsPort() ||
				s.Method.keepsFamily() && b.Address.Is4() != s.Address.Is4() {
				t.Errorf("backend %+v of service %+v", b, s)
			}
		}
	}
	if len(endpoints) > maxEndpoints {
		t.Errorf("%d endpoints", len(endpoints))
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
	statuses := func(list []StatusRange) []string {
		texts := []string{}
		for _, r := range list {
			texts = append(texts, r.String())
		}
		return texts
	}
	health := func(h Health) map[string]any {
		m := map[string]any{"type": h.Type.String()}
		unlessZero := func(name string, value any) {
			if !reflect.ValueOf(value).IsZero() {
				m[name] = value
			}
		}
		if !h.NeedsChecks() {
			return m
		}
		m["interval"], m["timeout"], m["rise"], m["fall"] = h.Interval.String(), h.Timeout.String(), h.Rise, h.Fall
		m["fast_interval"], m["jitter"], m["initial"], m["hold_down"] = h.FastInterval.String(), h.Jitter, h.Initial, h.HoldDown.String()
		if h.HoldDown != 0 {
			m["flaps"], m["flap_window"] = h.Flaps, h.FlapWindow.String()
		}
		if h.Type != HealthExec {
			m["via"] = h.Via
		}
		if h.Type == HealthHTTPS || h.Type == HealthWSS {
			m["verify"] = h.Verify
		}
		if h.Status != nil {
			m["status"], m["drain_status"] = statuses(h.Status), statuses(h.DrainStatus)
		}
		if h.Body != nil {
			m["body"] = h.Body.String()
		}
		unlessZero("path", h.Path)
		unlessZero("port", h.Port)
		unlessZero("host", h.Host)
		unlessZero("sni", h.SNI)
		unlessZero("ca", h.CA)
		unlessZero("command", h.Command)
		unlessZero("state_header", h.StateHeader)
		return m
	}
	services := []any{}
	for _, s := range cfg.Services {
		backends := []any{}
		for _, b := range s.Backends {
			m := map[string]any{"name": b.Name, "address": b.Address.String(), "weight": b.Weight, "disabled": b.Disabled}
			if b.Port != 0 {
				m["port"] = b.Port
			}
			if b.Health != nil {
				m["health"] = health(*b.Health)
			}
			backends = append(backends, m)
		}
		ports, tunnels := []string{}, []string{}
		for _, r := range s.Ports {
			ports = append(ports, r.String())
		}
		for _, p := range s.TunnelSources {
			tunnels = append(tunnels, p.String())
		}
		m := map[string]any{"name": s.Name, "addresses": addresses(s.Addresses), "ports": ports, "protocol": s.Protocol,
			"method": s.Method, "affinity": s.Affinity, "ring_size": s.RingSize, "idle_timeout": s.IdleTimeout.String(),
			"on_backend_down": s.OnBackendDown, "all_down": s.AllDown, "panic": s.Panic, "reset_rate": s.ResetRate, "slow_start": s.SlowStart.String(), "source_addresses": addresses(s.SourceAddresses), "tunnel_source": tunnels,
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
