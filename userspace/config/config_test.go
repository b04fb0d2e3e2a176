package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// asValue lets go-cmp compare what configurations say, without their lines.
var asValue = cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{}), cmpopts.IgnoreUnexported(Config{})}

func mustParse(tb testing.TB, text string) *Config {
	tb.Helper()
	cfg, err := parse("edge.yaml", []byte(text), testHost)
	if err != nil {
		tb.Fatal(err)
	}
	return cfg
}

// testHost has the files that tests name.
var testHost = host{
	name: func() (string, error) { return "edge-test", nil },
	file: func(path string) ([]byte, error) {
		if text, ok := testFiles[path]; ok {
			return []byte(text), nil
		}
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	},
	program: func(path string) error {
		if path != "/usr/lib/fairlead/check" {
			return &fs.PathError{Op: "stat", Path: path, Err: fs.ErrNotExist}
		}
		return nil
	},
}

// TestLoadWholeExample reads the contract's own example, with every field given.
func TestLoadWholeExample(t *testing.T) {
	path := filepath.Join("testdata", "example.yaml")
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		Path: path,
		Node: "edge-1",
		Dataplane: Dataplane{Mode: ModeAuto, Interfaces: []string{"eth0"}, XDP: XDPAuto, Connections: 1048576,
			HalfOpen: 131072, PinPath: "/sys/fs/bpf/fairlead", Epoch: 10 * time.Second},
		StateDir: "/var/lib/fairlead",
		Control:  Control{Socket: "/run/fairlead/control.sock", HTTP: netip.MustParseAddrPort("127.0.0.1:9870")},
		Services: []Service{{
			Name: "chat", Address: netip.MustParseAddr("192.0.2.10"), Port: 443,
			Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.10")}, Ports: []PortRange{{443, 443}}, Protocol: ProtocolTCP,
			Method: MethodFullNAT, Affinity: AffinityConnection, RingSize: 65537, IdleTimeout: 24 * time.Hour,
			OnBackendDown:   DownReset,
			SourceAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
			SourcePorts:     PortRange{First: 1024, Last: 32767},
			AllDown:         AllDownOpen, Panic: 30, ResetRate: 20000, SlowStart: 30 * time.Second,
			Health: Health{Type: HealthWebSocket, Path: "/healthz", Via: ViaBackend, Interval: 2 * time.Second,
				FastInterval: 500 * time.Millisecond, Timeout: time.Second, Jitter: 10, Rise: 2, Fall: 3,
				Initial: InitialDown, Flaps: 3, FlapWindow: time.Minute, HoldDown: 30 * time.Second},
			Balance:       Balance{Mode: BalanceHash},
			ProxyProtocol: ProxyNone, Announce: AnnounceAuto,
			Backends: []Backend{{Name: "ws1", Address: netip.MustParseAddr("10.0.0.11"), Port: 8765, Weight: 1},
				{Name: "ws2", Address: netip.MustParseAddr("10.0.0.12"), Port: 8765, Weight: 1, Disabled: true}},
		}},
	}
	if diff := cmp.Diff(want, got, asValue); diff != "" {
		t.Errorf("example.yaml (-want +got):\n%s", diff)
	}
}

func TestDefaults(t *testing.T) {
	got := mustParse(t, `
services:
- {name: web, address: "2001:db8::10", port: 80, backends: [{name: a, address: "2001:db8::a"}]}
- {name: dns, address: 192.0.2.10, port: 53, protocol: udp, backends: [{name: a, address: 10.0.0.1, weight: 0}]}
`)
	want := &Config{
		Path: "edge.yaml",
		Node: "edge-test",
		Dataplane: Dataplane{Mode: ModeAuto, XDP: XDPAuto, Connections: 1 << 20, HalfOpen: 1 << 17,
			PinPath: "/sys/fs/bpf/fairlead", Epoch: 10 * time.Second},
		StateDir: "/var/lib/fairlead",
		Control:  Control{Socket: "/run/fairlead/control.sock", HTTP: netip.MustParseAddrPort("127.0.0.1:9870")},
	}
	for _, s := range []Service{{
		Name: "web", Address: netip.MustParseAddr("2001:db8::10"), Port: 80, Protocol: ProtocolTCP,
		IdleTimeout: 24 * time.Hour,
		Backends:    []Backend{{Name: "a", Address: netip.MustParseAddr("2001:db8::a"), Port: 80, Weight: 1}},
	}, {
		Name: "dns", Address: netip.MustParseAddr("192.0.2.10"), Port: 53, Protocol: ProtocolUDP,
		IdleTimeout: 120 * time.Second,
		Backends:    []Backend{{Name: "a", Address: netip.MustParseAddr("10.0.0.1"), Port: 53, Weight: 0}},
	}} {
		s.Method, s.Affinity, s.RingSize, s.OnBackendDown = MethodFullNAT, AffinityConnection, 65537, DownReset
		s.Addresses, s.Ports = []netip.Addr{s.Address}, []PortRange{{s.Port, s.Port}}
		s.Health, s.Balance = Health{Type: HealthNone}, Balance{Mode: BalanceHash}
		s.ProxyProtocol, s.Announce, s.AllDown, s.ResetRate = ProxyNone, AnnounceAuto, AllDownOpen, 20000
		want.Services = append(want.Services, s)
	}
	if diff := cmp.Diff(want, got, asValue); diff != "" {
		t.Errorf("defaults (-want +got):\n%s", diff)
	}
}

func TestDefaultsThatDepend(t *testing.T) {
	t.Run("half_open follows connections, with a floor", func(t *testing.T) {
		for connections, want := range map[uint32]uint32{1024: 65536, 1 << 20: 131072, 64 << 20: 8 << 20} {
			got := mustParse(t, fmt.Sprintf("dataplane: {connections: %d}", connections)).Dataplane.HalfOpen
			if got != want {
				t.Errorf("connections %d: half_open %d, want %d", connections, got, want)
			}
		}
	})
	t.Run("http is off when empty", func(t *testing.T) {
		for _, text := range []string{"control: {http: }", `control: {http: ""}`, "control:\n  http:\n"} {
			if got := mustParse(t, text).Control.HTTP; got.IsValid() {
				t.Errorf("%q: http %v, want off", text, got)
			}
		}
	})
	t.Run("sections may be empty", func(t *testing.T) {
		if got := mustParse(t, "dataplane:\ncontrol:\nservices:\n"); len(got.Services) != 0 {
			t.Errorf("services %v, want none", got.Services)
		}
	})
	t.Run("a host's name that can't be had is an error", func(t *testing.T) {
		fail := testHost
		fail.name = func() (string, error) { return "", fs.ErrPermission }
		if _, err := parse("edge.yaml", []byte("services: []"), fail); err == nil ||
			!strings.Contains(err.Error(), "edge.yaml:1: node: the host's name can't be read") {
			t.Errorf("error %v", err)
		}
		if _, err := parse("edge.yaml", []byte("node: a"), fail); err != nil {
			t.Errorf("a name was given, yet: %v", err)
		}
	})
}

func TestYAMLForms(t *testing.T) {
	block := mustParse(t, `
services:
- name: chat
  address: 192.0.2.10
  port: 443
  backends:
  - name: a
    address: 10.0.0.1
  - name: b
    address: 10.0.0.2
`)
	for name, text := range map[string]string{
		"json":            `{"services": [{"name": "chat", "address": "192.0.2.10", "port": 443, "backends": [{"name": "a", "address": "10.0.0.1"}, {"name": "b", "address": "10.0.0.2"}]}]}`,
		"quoted":          "services: [{name: 'chat', address: \"192.0.2.10\", port: '443', backends: [{name: a, address: 10.0.0.1}, {name: b, address: 10.0.0.2}]}]",
		"windows, marked": "\ufeffservices:\r\n- name: chat # the chat\r\n  address: 192.0.2.10\r\n  port: 443\r\n  backends:\r\n  - {name: a, address: 10.0.0.1}\r\n  - {name: b, address: 10.0.0.2}\r\n",
		"document mark":   "---\nservices:\n- {name: chat, address: 192.0.2.10, port: 443, backends: [{name: a, address: 10.0.0.1}, {name: b, address: 10.0.0.2}]}\n",
		"aliases": `
services:
- name: &n chat
  address: 192.0.2.10
  port: 443
  backends:
  - &a {name: a, address: 10.0.0.1, weight: 1}
  - <<: *a
    name: b
    address: 10.0.0.2
`,
	} {
		if got := mustParse(t, text); !got.Equal(block) {
			t.Errorf("%s: not the same (-block +%[1]s):\n%s", name, cmp.Diff(block, got, asValue))
		}
	}
	if block.Equal(mustParse(t, "services: []")) {
		t.Error("different configurations are Equal")
	}
}

func TestLoadErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "absent.yaml")); !errors.Is(err, fs.ErrNotExist) ||
		!strings.Contains(err.Error(), "$FAIRLEAD_CONFIG") {
		t.Errorf("absent file: %v", err)
	}
	if _, err := Load(dir); err == nil {
		t.Error("a directory was read")
	}
	large := filepath.Join(dir, "large.yaml")
	if err := os.WriteFile(large, make([]byte, maxFileBytes+5), 0o600); err != nil {
		t.Fatal(err)
	}
	var wrong *Error
	if _, err := Load(large); !errors.As(err, &wrong) || wrong.Problem != "the file is over 16 MiB" {
		t.Errorf("large file: %v", err)
	}
}

func TestErrorText(t *testing.T) {
	_, err := Parse("edge.yaml", []byte("node: edge-1\nservices:\n- {name: chat, address: 192.0.2.10, port: 99999, backend: []}\n"))
	want := `edge.yaml:3: services[0].backends: the service has no backend: add a backend or remove the service
    3 | - {name: chat, address: 192.0.2.10, port: 99999, backend: []}
      |   ^
edge.yaml:3: services[0].port: "99999" is not a port: take a number from 1 to 65535
    3 | - {name: chat, address: 192.0.2.10, port: 99999, backend: []}
      |                                           ^
edge.yaml:3: services[0].backend: unknown field: did you mean backends?
    3 | - {name: chat, address: 192.0.2.10, port: 99999, backend: []}
      |                                                  ^`
	if err == nil {
		t.Fatal("no error")
	}
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Errorf("text (-want +got):\n%s", diff)
	}

	long := &Error{File: "f", Line: 1, Column: 501, Problem: "p", Remedy: "r",
		Source: strings.Repeat("é", 500) + "X" + strings.Repeat("é", 500)}
	lines := strings.Split(long.Error(), "\n")
	if at := strings.IndexByte(lines[2], '^'); len(lines) != 3 || []rune(lines[1])[at] != 'X' {
		t.Errorf("the mark misses:\n%s", long.Error())
	}
}

func TestRefuse(t *testing.T) {
	cfg := mustParse(t, `
services:
- name: chat
  address: 192.0.2.10
  port: 443
  method: dsr
  backends:
  - name: a
    address: 10.0.0.1
`)
	for field, line := range map[string]int{
		"services[0].backends[0].address": 9,
		"services[0].backends[0].port":    8,
		"services[0].method":              6,
		"services[0].health.type":         3,
		"services[0]":                     3,
		"dataplane.interfaces":            1,
	} {
		err := cfg.Refuse(field, "is not on-link", "take fullnat")
		if err.Line != line || err.Field != field {
			t.Errorf("%s: line %d field %s, want line %d", field, err.Line, err.Field, line)
		}
	}
}

func TestPortRange(t *testing.T) {
	r := PortRange{First: 1024, Last: 32767}
	text, err := r.MarshalText()
	if err != nil || string(text) != "1024-32767" || r.Count() != 31744 || (PortRange{}).Count() != 0 {
		t.Errorf("range %s, %d ports, %v", text, r.Count(), err)
	}
	for _, want := range []PortRange{r, {}, {1, 65535}, {7, 7}} {
		var got PortRange
		text, _ := want.MarshalText()
		if err := got.UnmarshalText(text); err != nil || got != want {
			t.Errorf("%s came back as %v, %v", text, got, err)
		}
	}
	if got := slices.Collect((PortRange{65533, 65535}).All()); !slices.Equal(got, []uint16{65533, 65534, 65535}) {
		t.Errorf("65533-65535 is %v", got)
	}
	if got := slices.Collect((PortRange{}).All()); len(got) > 0 {
		t.Errorf("no range has %v", got)
	}
	for _, bad := range []string{"1", "0-5", "5-4", "1-65536", "a-b", "-", "1-2-3", " 1-2", "+1-2", "01-2"} {
		if got, err := ParsePortRange(bad); err == nil {
			t.Errorf("%q was taken as %v", bad, got)
		}
	}
}

func TestPrimes(t *testing.T) {
	if !isPrime(maxRingSize) || !isPrime(defaultRingSize) || isPrime(65535) || isPrime(1) || !isPrime(2) {
		t.Error("isPrime is wrong")
	}
	if got := nextPrime(65536); got != 65537 {
		t.Errorf("next prime %d", got)
	}
}
