package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// certificate returns a new authority's, in PEM.
func certificate(name string) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true,
		NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return block("CERTIFICATE", der)
}

func block(kind string, data []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}))
}

// testFiles are testHost's.
var testFiles = map[string]string{
	"/etc/ssl/own.pem": "# ours\n" + certificate("own") + certificate("next"),
	"/ca.pem":          block("PRIVATE KEY", []byte("a")) + certificate("ca"),
	"/key.pem":         block("PRIVATE KEY", []byte("a")),
	"/empty.pem":       "",
	"/text.pem":        "no PEM here",
	"/torn.pem":        certificate("whole") + block("CERTIFICATE", []byte("a")),
	"/large.pem":       strings.Repeat("#", maxAuthorities+1),
}

func rootsOf(tb testing.TB, path string) *x509.CertPool {
	tb.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(testFiles[path])) {
		tb.Fatalf("%s holds no certificate", path)
	}
	return roots
}

// TestLoadHealth reads every field of every type of check.
func TestLoadHealth(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "health.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := mustParse(t, string(data))
	web, games := cfg.Services[0], cfg.Services[1]
	if web.AllDown != AllDownReset || web.Panic != 30 || games.AllDown != AllDownOpen || games.Panic != 0 {
		t.Errorf("all_down %v and %v, panic %d and %d", web.AllDown, games.AllDown, web.Panic, games.Panic)
	}
	whole := Health{Type: HealthHTTPS, Path: "/healthz", Port: 8443, Host: "chat.example:8443", SNI: "backend.example",
		CA: "/etc/ssl/own.pem", Roots: rootsOf(t, "/etc/ssl/own.pem"), Verify: true,
		Status: []StatusRange{{200, 299}, {304, 304}}, Body: regexp.MustCompile(`^ok\b`), Via: ViaBackend,
		Interval: 4 * time.Second, FastInterval: 400 * time.Millisecond, Timeout: 3 * time.Second, Jitter: 20, Rise: 4, Fall: 5,
		Initial: InitialUp, Flaps: 6, FlapWindow: 10 * time.Minute, HoldDown: 2 * time.Minute,
		DrainStatus: []StatusRange{{404, 404}, {410, 410}}, StateHeader: "X-Fairlead-State"}
	wss := whole
	wss.Type, wss.Port, wss.CA, wss.Roots, wss.Verify, wss.Status, wss.Body, wss.DrainStatus = HealthWSS, 443, "", nil, false, nil, nil, nil
	exec := wss
	exec.Type, exec.Port, exec.Path, exec.Host, exec.SNI, exec.StateHeader = HealthExec, 8443, "", "", "", ""
	exec.Command = []string{"/usr/lib/fairlead/check", "--deep"}
	want := []Health{whole, wss, exec, {Type: HealthNone}}
	for i, b := range web.Backends {
		if got := web.HealthOf(b); !got.Equal(want[i]) {
			t.Errorf("backend %s (-want +got):\n%s", b.Name, diffHealth(want[i], got))
		}
	}
	if !web.Health.Equal(whole) || web.Backends[0].Health != nil {
		t.Errorf("service web (-want +got):\n%s", diffHealth(whole, web.Health))
	}
	tcp := checks(Health{Type: HealthTCP, Port: 27000, Via: ViaService})
	if got := games.HealthOf(games.Backends[0]); !got.Equal(tcp) {
		t.Errorf("service games (-want +got):\n%s", diffHealth(tcp, got))
	}
	if errs := cfg.Unsupported(); errs != nil {
		t.Errorf("health.yaml is unsupported: %v", errs)
	}
}

// TestExamplesAreWhole holds that the examples leave no field out, so that what reads them reads every field.
func TestExamplesAreWhole(t *testing.T) {
	given := map[string]bool{}
	index := regexp.MustCompile(`\[\d+\]`)
	for _, name := range []string{"example.yaml", "lists.yaml", "health.yaml"} {
		data, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		for field := range mustParse(t, string(data)).places {
			given[index.ReplaceAllString(field, "")] = true
		}
	}
	for prefix, fields := range map[string][]field{"": new(rawConfig).fields(), "control": new(rawControl).fields(),
		"services": new(rawService).fields(), "services.health": new(rawHealth).fields(),
		"services.backends": new(rawBackend).fields(), "services.balance": new(rawBalance).fields()} {
		for _, f := range fields {
			path := join(prefix, f.name)
			if !given[path] && !given[strings.Replace(path, "services.health", "services.backends.health", 1)] {
				t.Errorf("no example has %s", path)
			}
		}
	}
}

// diffHealth tells what of two healths differs, where their own Equal says only that it does.
func diffHealth(want, got Health) string {
	type health Health // without Equal
	return cmp.Diff(health(want), health(got), cmp.Comparer(func(a, b *regexp.Regexp) bool {
		return a == b || a != nil && b != nil && a.String() == b.String()
	}), cmp.Comparer((*x509.CertPool).Equal))
}

// checks fills in the documented defaults of what every type has.
func checks(h Health) Health {
	or(&h.Via, ViaBackend)
	or(&h.Interval, 2*time.Second)
	or(&h.FastInterval, h.Interval/4)
	or(&h.Timeout, time.Second)
	or(&h.Jitter, 10)
	or(&h.Rise, 2)
	or(&h.Fall, 3)
	or(&h.Initial, InitialDown)
	or(&h.Flaps, 3)
	or(&h.FlapWindow, time.Minute)
	or(&h.HoldDown, 30*time.Second)
	return h
}

func or[T comparable](field *T, def T) {
	var zero T
	if *field == zero {
		*field = def
	}
}

// TestHealthDefaults is what a health says that gives little.
func TestHealthDefaults(t *testing.T) {
	good := []StatusRange{{200, 399}}
	with := func(h Health, change func(*Health)) Health {
		h = checks(h)
		change(&h)
		return h
	}
	for text, want := range map[string]Health{
		"type: none, interval: 1s": {Type: HealthNone},
		"type: tcp":                checks(Health{Type: HealthTCP}),
		"type: http":               checks(Health{Type: HealthHTTP, Path: "/", Status: good}),
		"type: https":              checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true}),
		"type: websocket":          checks(Health{Type: HealthWebSocket, Path: "/"}),
		"type: wss":                checks(Health{Type: HealthWSS, Path: "/", Verify: true}),

		"type: exec, command: /usr/lib/fairlead/check":   checks(Health{Type: HealthExec, Command: []string{"/usr/lib/fairlead/check"}}),
		"type: exec, command: [/usr/lib/fairlead/check]": checks(Health{Type: HealthExec, Command: []string{"/usr/lib/fairlead/check"}}),
		"type: exec, command: [/usr/lib/fairlead/check, '', 5, '-a b']": checks(Health{Type: HealthExec,
			Command: []string{"/usr/lib/fairlead/check", "", "5", "-a b"}}),

		"type: tcp, interval: 500ms": checks(Health{Type: HealthTCP, Interval: 500 * time.Millisecond, Timeout: 500 * time.Millisecond}),
		"type: tcp, interval: 200ms": checks(Health{Type: HealthTCP, Interval: 200 * time.Millisecond, Timeout: 200 * time.Millisecond,
			FastInterval: 100 * time.Millisecond}),
		"type: tcp, interval: 100ms": checks(Health{Type: HealthTCP, Interval: 100 * time.Millisecond, Timeout: 100 * time.Millisecond,
			FastInterval: 100 * time.Millisecond}),
		"type: tcp, fast_interval: 2s": checks(Health{Type: HealthTCP, FastInterval: 2 * time.Second}),
		"type: tcp, jitter: 0":         with(Health{Type: HealthTCP}, func(h *Health) { h.Jitter = 0 }),
		"type: tcp, jitter: 50%":       checks(Health{Type: HealthTCP, Jitter: 50}),

		"type: tcp, hold_down: 0s":           with(Health{Type: HealthTCP}, func(h *Health) { h.Flaps, h.FlapWindow, h.HoldDown = 0, 0, 0 }),
		"type: tcp, flaps: 0":                with(Health{Type: HealthTCP}, func(h *Health) { h.Flaps, h.FlapWindow, h.HoldDown = 0, 0, 0 }),
		"type: tcp, flaps: 0, hold_down: 0s": with(Health{Type: HealthTCP}, func(h *Health) { h.Flaps, h.FlapWindow, h.HoldDown = 0, 0, 0 }),

		"type: https, host: chat.example:8443": checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true,
			Host: "chat.example:8443", SNI: "chat.example"}),
		"type: https, host: '192.0.2.1:8443'": checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true, Host: "192.0.2.1:8443"}),
		"type: https, host: '[2001:db8::1]'":  checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true, Host: "[2001:db8::1]"}),
		"type: https, host: a.example, sni: b.example": checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true,
			Host: "a.example", SNI: "b.example"}),
		"type: http, host: chat.example": checks(Health{Type: HealthHTTP, Path: "/", Status: good, Host: "chat.example"}),
		"type: wss, ca: /ca.pem": checks(Health{Type: HealthWSS, Path: "/", Verify: true, CA: "/ca.pem",
			Roots: rootsOf(t, "/ca.pem")}),

		"type: http, status: 204": checks(Health{Type: HealthHTTP, Path: "/", Status: []StatusRange{{204, 204}}}),
		"type: http, status: [300-399, 101, 200-299], drain_status: []": checks(Health{Type: HealthHTTP, Path: "/",
			Status: []StatusRange{{101, 101}, {200, 399}}}),
		"type: http, drain_status: 503, state_header: x-fairlead-state": checks(Health{Type: HealthHTTP, Path: "/",
			Status: good, DrainStatus: []StatusRange{{503, 503}}, StateHeader: "X-Fairlead-State"}),
	} {
		if got := mustParse(t, service("health: {"+text+"}")).Services[0].Health; !got.Equal(want) {
			t.Errorf("%s (-want +got):\n%s", text, diffHealth(want, got))
		}
	}
}

// TestHealthOverride is what a backend's health takes from its service's: all that it leaves out and its type takes.
func TestHealthOverride(t *testing.T) {
	const second, milli = time.Second, time.Millisecond
	good := []StatusRange{{200, 399}}
	for _, test := range []struct {
		service, backend string
		want             Health
	}{
		{"type: websocket, path: /ready, interval: 4s, timeout: 3s, rise: 5", "interval: 2s, fall: 9",
			checks(Health{Type: HealthWebSocket, Path: "/ready", Interval: 2 * second, Timeout: 2 * second, Rise: 5, Fall: 9})},
		{"type: websocket, path: /ready, interval: 4s, timeout: 3s, rise: 5", "type: tcp",
			checks(Health{Type: HealthTCP, Interval: 4 * second, Timeout: 3 * second, Rise: 5})},
		{"type: websocket, path: /ready", "type: none", Health{Type: HealthNone}},
		// A type that took nothing of it does not lose it.
		{"type: none, interval: 8s, initial: up", "type: tcp", checks(Health{Type: HealthTCP, Interval: 8 * second, Initial: InitialUp})},
		// What follows from another field follows from the override's.
		{"type: tcp, interval: 400ms", "interval: 8s", checks(Health{Type: HealthTCP, Interval: 8 * second})},
		{"type: tcp, interval: 8s, fast_interval: 5s", "interval: 6s",
			checks(Health{Type: HealthTCP, Interval: 6 * second, FastInterval: 5 * second})},
		{"type: tcp, interval: 8s, fast_interval: 5s", "interval: 400ms",
			checks(Health{Type: HealthTCP, Interval: 400 * milli, FastInterval: 400 * milli, Timeout: 400 * milli})},
		{"type: https, host: a.example", "host: b.example",
			checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true, Host: "b.example", SNI: "b.example"})},
		{"type: https, host: a.example, sni: c.example", "host: b.example",
			checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true, Host: "b.example", SNI: "c.example"})},
		{"type: https, ca: /ca.pem, port: 8443", "verify: false", checks(Health{Type: HealthHTTPS, Path: "/", Port: 8443, Status: good})},
		{"type: https, verify: false", "verify: true, ca: /ca.pem",
			checks(Health{Type: HealthHTTPS, Path: "/", Status: good, Verify: true, CA: "/ca.pem", Roots: rootsOf(t, "/ca.pem")})},
		{"type: http, drain_status: 503, status: 200, body: a", "drain_status: [], type: https",
			checks(Health{Type: HealthHTTPS, Path: "/", Status: []StatusRange{{200, 200}}, Body: regexp.MustCompile("a"), Verify: true})},
		{"type: tcp, hold_down: 0s", "hold_down: 5s", checks(Health{Type: HealthTCP, HoldDown: 5 * second})},
		{"type: tcp, flaps: 0", "flaps: 7", checks(Health{Type: HealthTCP, Flaps: 7})},
		{"type: tcp, jitter: 0, initial: up, port: 80", "port: 81", func() Health {
			h := checks(Health{Type: HealthTCP, Port: 81, Initial: InitialUp})
			h.Jitter = 0
			return h
		}()},
		{"type: exec, command: [/usr/lib/fairlead/check, a]", "command: [/usr/lib/fairlead/check]",
			checks(Health{Type: HealthExec, Command: []string{"/usr/lib/fairlead/check"}})},
	} {
		cfg := mustParse(t, with("health: {"+test.service+"}", "{name: ws2, address: 10.0.0.12, health: {"+test.backend+"}}"))
		got := cfg.Services[0].Backends[1].Health
		if got == nil || !got.Equal(test.want) {
			t.Errorf("{%s} over {%s} (-want +got):\n%s", test.backend, test.service, diffHealth(test.want, *got))
		}
	}
	// via: service is for types that connect: a command over it loses it.
	s := mustParse(t, with("method: dsr\n  health: {type: tcp, via: service}",
		"{name: ws2, address: 10.0.0.12, health: {type: exec, command: /usr/lib/fairlead/check}}")).Services[0]
	if a, b := s.HealthOf(s.Backends[0]), s.HealthOf(s.Backends[1]); a.Via != ViaService || b.Via != ViaBackend {
		t.Errorf("via %v and %v", a.Via, b.Via)
	}
}

// TestHealthOf is where checks go.
func TestHealthOf(t *testing.T) {
	for _, test := range []struct {
		text string
		want uint16 // of the second backend
	}{
		{service("health: {type: tcp}"), 443},
		{service("health: {type: tcp, port: 80}"), 80},
		{with("health: {type: tcp}", "{name: b, address: 10.0.0.12, port: 81}"), 81},
		{with("health: {type: tcp, port: 80}", "{name: b, address: 10.0.0.12, port: 81}"), 80},
		{with("health: {type: tcp, port: 80}", "{name: b, address: 10.0.0.12, port: 81, health: {port: 82}}"), 82},
		{with("health: {type: tcp}", "{name: b, address: 10.0.0.12, port: 81, health: {rise: 3}}"), 81},
		{with("health: {type: tcp}", "{name: b, address: 10.0.0.12, health: {type: none}}"), 0},
		{service("health: {type: exec, command: /usr/lib/fairlead/check}"), 443},
		{service("health: {type: exec, command: /usr/lib/fairlead/check, port: 80}"), 80},
		{listed("address: 192.0.2.10, ports: [80, 443], method: dsr, health: {type: exec, command: /usr/lib/fairlead/check}", ""), 0},
		{listed("address: 192.0.2.10, ports: [80, 443], method: dsr, health: {type: tcp, port: 443}", ""), 443},
		{listed("address: 192.0.2.10, ports: [80, 443], method: nat, health: {type: tcp}", ", port: 8080"), 8080},
	} {
		s := mustParse(t, test.text).Services[0]
		got := s.HealthOf(s.Backends[1])
		if got.Port != test.want || got.NeedsChecks() != (got.Type != HealthNone) {
			t.Errorf("checks of type %s go to port %d, want %d:\n%s", got.Type, got.Port, test.want, test.text)
		}
	}
	if (Health{}).NeedsChecks() {
		t.Error("no health at all needs checks")
	}
}

// TestHealthEqual holds that whoever compares sees every change, and nothing but changes.
func TestHealthEqual(t *testing.T) {
	full := "type: https, path: /a, port: 80, host: a, sni: a.b, ca: /ca.pem, status: 200, body: a, interval: 4s, fast_interval: 1s, " +
		"timeout: 2s, jitter: 1, rise: 1, fall: 1, initial: up, flaps: 1, flap_window: 1s, hold_down: 1s, drain_status: 404, state_header: A, via: service"
	parsed := func(health string) *Config {
		return mustParse(t, with("method: dsr\n  health: {"+health+"}", "{name: ws2, address: 10.0.0.12, health: {}}"))
	}
	first := parsed(full)
	if again := parsed(full); !again.Equal(first) || !again.Services[0].Health.Equal(first.Services[0].Health) {
		t.Error("read twice, it is not the same")
	}
	for _, change := range []string{"type: http", "path: /b", "port: 81", "host: b", "sni: b.b", "ca: /etc/ssl/own.pem", "status: 201", "body: b",
		"interval: 5s", "fast_interval: 2s", "timeout: 3s", "jitter: 2", "rise: 2", "fall: 2", "initial: down", "flaps: 2", "flap_window: 2s",
		"hold_down: 2s", "drain_status: 405", "state_header: B", "via: backend"} {
		name, _, _ := strings.Cut(change, ":")
		text := regexp.MustCompile("(^|, )"+name+": [^,]*").ReplaceAllString(full, "${1}"+change)
		if name == "type" {
			text = regexp.MustCompile(", (sni|ca): [^,]*").ReplaceAllString(text, "")
		}
		if text == full {
			t.Fatalf("%s changes nothing", change)
		}
		if other := parsed(text); other.Equal(first) || first.Equal(other) || other.Services[0].Health.Equal(first.Services[0].Health) {
			t.Errorf("%s is the same as without", change)
		}
	}
	// The same path with other certificates in it is another configuration; with the same ones rewritten it is not.
	other := testHost
	for content, want := range map[string]bool{certificate("other"): false, "# rewritten\n" + testFiles["/ca.pem"]: true} {
		other.file = func(string) ([]byte, error) { return []byte(content), nil }
		again, err := parse("edge.yaml", []byte(with("method: dsr\n  health: {"+full+"}", "{name: ws2, address: 10.0.0.12, health: {}}")), other)
		if err != nil {
			t.Fatal(err)
		}
		if again.Equal(first) != want {
			t.Errorf("with other content in its file of certificates: the same %v, want %v", !want, want)
		}
	}
	// An override that says no more than its service is one all the same, and only backends that differ make a difference.
	plain := mustParse(t, service("health: {type: tcp}"))
	for backend, want := range map[string]bool{"": true, ", health: {}": false, ", health: {type: none}": false, ", disabled: true": false} {
		text := with("health: {type: tcp}", "{name: ws2, address: 10.0.0.12"+backend+"}")
		if got := mustParse(t, text).Equal(plain); got != want {
			t.Errorf("backend with %q: the same %v, want %v", backend, got, want)
		}
	}
	if plain.Services[0].Health.Type != HealthTCP {
		t.Error("comparing changed it")
	}
}

func TestServiceFields(t *testing.T) {
	got := mustParse(t, with("all_down: reset\n  panic: 100%\n  reset_rate: 1000000\n  slow_start: 1h", "{name: b, address: 10.0.0.1, disabled: true}")).Services[0]
	if got.AllDown != AllDownReset || got.Panic != 100 || got.ResetRate != 1000000 || got.SlowStart != time.Hour ||
		got.Backends[0].Disabled || !got.Backends[1].Disabled {
		t.Errorf("service %+v", got)
	}
	if got := mustParse(t, service("panic: 0\n  slow_start: 0s")).Services[0]; got.Panic != 0 || got.SlowStart != 0 {
		t.Errorf("service %+v", got)
	}
}

func TestHealthRefusals(t *testing.T) {
	const line = "6: services[0].health."
	h := func(text string) string { return service("health: {" + text + "}") }
	b := func(health, backend string) string {
		return with("health: {"+health+"}", "{name: ws2, address: 10.0.0.12, health: {"+backend+"}}")
	}
	exec := "type: exec, command: "
	tests := []struct {
		name, text string
		want       []string
	}{
		// the service's own
		{"all_down", service("all_down: reject"), []string{`6: services[0].all_down: "reject" is not one of open, reset: did you mean reset?`}},
		{"panic", service("panic: 101%"), []string{"6: services[0].panic: 101 is too large: take a whole number from 0 to 100"}},
		{"panic fraction", service("panic: 0.3"), []string{`6: services[0].panic: "0.3" is not a plain decimal number: take a whole number from 0 to 100`}},
		{"panic signs", service("panic: 30%%"), []string{`6: services[0].panic: "30%%" is not a plain decimal number: take a whole number from 0 to 100`}},
		{"reset_rate", service("reset_rate: 0"), []string{"6: services[0].reset_rate: 0 is too small: take a whole number from 1 to 1000000"}},
		{"slow_start", service("slow_start: 61m"), []string{"6: services[0].slow_start: 1h1m0s is too long: take a duration from 0s to 1h0m0s"}},
		{"slow_start unit", service("slow_start: 0"), []string{`6: services[0].slow_start: "0" has no unit: write its unit, as in 0s`}},
		{"slow_start negative", service("slow_start: -1s"), []string{"6: services[0].slow_start: -1s is too short: take a duration from 0s to 1h0m0s"}},
		{"disabled", with("", "{name: ws2, address: 10.0.0.12, disabled: yes}"), []string{
			`9: services[0].backends[1].disabled: "yes" is not one of true, false: take one of these`}},

		// fields that a type does not take
		{"none", h("type: none, path: /, port: 80, via: backend"), []string{
			line + "path: a check of type none takes no path: take it out, or take type http, https, websocket or wss",
			line + "port: a check of type none takes no port: take it out, or take type tcp, http, https, websocket, wss or exec",
			line + "via: a check of type none takes no via: take it out, or take type tcp, http, https, websocket or wss"}},
		{"tcp", h("type: tcp, host: a, sni: 1, state_header: a b, command: []"), []string{
			line + "host: a check of type tcp takes no host: take it out, or take type http, https, websocket or wss",
			line + "sni: a check of type tcp takes no sni: take it out, or take type https or wss",
			line + "state_header: a check of type tcp takes no state_header: take it out, or take type http, https, websocket or wss",
			line + "command: a check of type tcp takes no command: take it out, or take type exec"}},
		{"http", h("type: http, ca: /absent, verify: no"), []string{
			line + "ca: a check of type http takes no ca: take it out, or take type https or wss",
			line + "verify: a check of type http takes no verify: take it out, or take type https or wss"}},
		{"websocket", h("type: websocket, status: 200, drain_status: [], body: '('"), []string{
			line + "status: a check of type websocket takes no status: take it out, or take type http or https",
			line + "drain_status: a check of type websocket takes no drain_status: take it out, or take type http or https",
			line + "body: a check of type websocket takes no body: take it out, or take type http or https"}},
		{"exec", h(exec + "/usr/lib/fairlead/check, via: backend"), []string{
			line + "via: a check of type exec takes no via: take it out, or take type tcp, http, https, websocket or wss"}},
		{"backend", b("type: http, path: /", "type: tcp, path: /"), []string{
			"9: services[0].backends[1].health.path: a check of type tcp takes no path: take it out, or take type http, https, websocket or wss"}},
		{"backend by its service's type", b("type: tcp", "status: 200"), []string{
			"9: services[0].backends[1].health.status: a check of type tcp takes no status: take it out, or take type http or https"}},
		{"a type that is refused judges nothing", h("type: htp, path: /, command: /usr/lib/fairlead/check"), []string{
			line + `type: "htp" is not one of tcp, http, https, websocket, wss, exec, none: did you mean http?`}},
		{"websockets", h("type: wws"), []string{line + `type: "wws" is not one of tcp, http, https, websocket, wss, exec, none: did you mean wss?`}},

		// where checks go
		{"port", h("type: tcp, port: 0"), []string{line + `port: "0" is not a port: take a number from 1 to 65535`}},
		{"several ports", listed("address: 192.0.2.10, ports: [80, 443], method: dsr, health: {type: tcp}", ""), []string{
			"2: services[0].health.port: is missing, and under dsr backends of a service of several ports have none of their own: write port: and the one that checks go to, or take type exec"}},
		{"several ports, one backend's", strings.Replace(listed("address: 192.0.2.10, ports: [80, 443], method: gue", ""), ".12", ".12, health: {type: http}", 1), []string{
			"5: services[0].backends[1].health.port: is missing, and under gue backends of a service of several ports have none of their own: write port: and the one that checks go to, or take type exec"}},
		{"several ports, a port refused", listed("address: 192.0.2.10, ports: [80, 443], method: dsr, health: {type: tcp, port: a}", ""), []string{
			`2: services[0].health.port: "a" is not a port: take a number from 1 to 65535`}},
		{"udp", service("protocol: udp\n  health: {type: tcp}"), []string{
			"7: services[0].health.port: is missing, and a check of type tcp can't ask a port of udp: write port: and one where backends listen by tcp, or take type exec"}},
		{"udp, one backend's", with("protocol: udp\n  health: {type: none}", "{name: ws2, address: 10.0.0.12, health: {type: https}}"), []string{
			"10: services[0].backends[1].health.port: is missing, and a check of type https can't ask a port of udp: write port: and one where backends listen by tcp, or take type exec"}},
		{"via under fullnat", h("type: tcp, via: service"), []string{
			line + "via: under fullnat backends don't have the service's address: take via: backend, or method dsr, ipip or gue"}},
		{"via under nat", with("method: nat", "{name: ws2, address: 10.0.0.12, health: {type: tcp, via: service}}"), []string{
			"9: services[0].backends[1].health.via: under nat backends don't have the service's address: take via: backend, or method dsr, ipip or gue"}},
		{"via inherited is told once", b("type: tcp, via: service", "rise: 3"), []string{
			line + "via: under fullnat backends don't have the service's address: take via: backend, or method dsr, ipip or gue"}},
		{"via", h("type: tcp, via: vip"), []string{line + `via: "vip" is not one of backend, service: take one of these`}},

		// what they ask for
		{"host empty", h("type: http, host: ''"), []string{line + `host: "" is not a host with or without a port: write it as chat.example, 192.0.2.10 or [2001:db8::10], with or without :8080 after it`}},
		{"host with a scheme", h("type: http, host: 'http://a'"), []string{line + `host: "//a" is not a port: take a number from 1 to 65535`}},
		{"host with a path", h("type: http, host: a/b"), []string{line + `host: "a/b" is not a host with or without a port: write it as chat.example, 192.0.2.10 or [2001:db8::10], with or without :8080 after it`}},
		{"host IPv6", h("type: http, host: '2001:db8::1'"), []string{line + `host: "2001:db8::1" is an IPv6 address without brackets: write [2001:db8::1]`}},
		{"host half a bracket", h("type: http, host: '[2001:db8::1'"), []string{line + `host: "[2001:db8::1" is not a host with or without a port: write it as chat.example, 192.0.2.10 or [2001:db8::10], with or without :8080 after it`}},
		{"host with a zone", h("type: http, host: '[fe80::1%eth0]:80'"), []string{line + `host: "[fe80::1%eth0]:80" is not a host with or without a port: write it as chat.example, 192.0.2.10 or [2001:db8::10], with or without :8080 after it`}},
		{"host port", h("type: http, host: 'a:99999'"), []string{line + `host: "99999" is not a port: take a number from 1 to 65535`}},
		{"host without port", h("type: http, host: 'a:'"), []string{line + `host: "" is not a port: take a number from 1 to 65535`}},
		{"host no address", h("type: http, host: 192.0.2.300"), []string{line + `host: "192.0.2.300" is not a host with or without a port: write it as chat.example, 192.0.2.10 or [2001:db8::10], with or without :8080 after it`}},
		{"sni an address", h("type: wss, sni: 192.0.2.1"), []string{line + `sni: "192.0.2.1" is an address, not a host's name: take it out: the address that is asked is verified without it`}},
		{"sni with a port", h("type: wss, sni: 'a:443'"), []string{line + `sni: "a:443" is not a host's name: write it as chat.example`}},
		{"sni beyond ASCII", h("type: wss, sni: é.example"), []string{line + `sni: "é.example" is not a host's name: write it as chat.example`}},
		{"sni with a wildcard", h("type: wss, sni: '*.example'"), []string{line + `sni: "*.example" is not a host's name: write it as chat.example`}},
		{"sni long", h("type: wss, sni: " + strings.Repeat("a.", 127)), []string{line + `sni: "` + strings.Repeat("a.", 127) + `" is not a host's name: write it as chat.example`}},
		{"path null", h("type: http, path: "), []string{line + "path: has no value: write one, or take the line out"}},
		{"state_header", h("type: wss, state_header: 'a:'"), []string{line + `state_header: "a:" is not a header's name: write it as X-Fairlead-State`}},
		{"state_header empty", h("type: wss, state_header: ''"), []string{line + "state_header: the name is empty: write it as X-Fairlead-State"}},
		{"state_header long", h("type: wss, state_header: " + strings.Repeat("a", 129)), []string{line + "state_header: the name has 129 bytes: take 128 or fewer"}},

		// certificates
		{"ca relative", h("type: https, ca: own.pem"), []string{line + `ca: "own.pem" is not an absolute path: begin it with /`}},
		{"ca absent", h("type: https, ca: /absent.pem"), []string{line + "ca: /absent.pem can't be read (file does not exist): name a file of certificates in PEM, which this machine must have as well"}},
		{"ca empty", h("type: https, ca: /empty.pem"), []string{line + "ca: /empty.pem holds no certificate in PEM: name a file of certificates in PEM, which this machine must have as well"}},
		{"ca of text", h("type: https, ca: /text.pem"), []string{line + "ca: /text.pem holds no certificate in PEM: name a file of certificates in PEM, which this machine must have as well"}},
		{"ca a key", h("type: https, ca: /key.pem"), []string{line + "ca: /key.pem holds no certificate, but a private key: name a file of certificates in PEM, which this machine must have as well"}},
		{"ca torn", h("type: https, ca: /torn.pem"), []string{line + "ca: certificate 2 in /torn.pem can't be read (malformed certificate): take it out of the file, or put it right"}},
		{"ca large", h("type: https, ca: /large.pem"), []string{line + "ca: /large.pem is over 16 MiB: name a file of certificates in PEM, which this machine must have as well"}},
		{"ca null", h("type: https, ca: "), []string{line + "ca: has no value: write one, or take the line out"}},
		{"ca without verifying", h("type: https, ca: /ca.pem, verify: false"), []string{line + "ca: verify is false, so that no certificate is asked for: take one of the two out"}},
		{"ca of two backends is told twice", "services:\n- {name: a, address: 192.0.2.1, port: 1, backends: [\n  {name: a, address: 10.0.0.1, health: &h {type: wss, ca: /text.pem}},\n  {name: b, address: 10.0.0.2, health: {type: wss, ca: /text.pem}}]}\n", []string{
			"3: services[0].backends[0].health.ca: /text.pem holds no certificate in PEM: name a file of certificates in PEM, which this machine must have as well",
			"4: services[0].backends[1].health.ca: /text.pem holds no certificate in PEM: name a file of certificates in PEM, which this machine must have as well"}},
		{"verify", h("type: https, verify: never"), []string{line + `verify: "never" is not one of true, false: take one of these`}},

		// answers
		{"status low", h("type: http, status: 99"), []string{line + `status: "99" is not a status or a range of them: take a number from 100 to 599, or two, as in 200-399`}},
		{"status high", h("type: http, status: [200, 500-600]"), []string{line + `status[1]: "500-600" is not a status or a range of them: take a number from 100 to 599, or two, as in 200-399`}},
		{"status class", h("type: http, status: 2xx"), []string{line + `status: "2xx" is not a status or a range of them: take a number from 100 to 599, or two, as in 200-399`}},
		{"status reversed", h("type: http, status: 399-200"), []string{line + `status: "399-200" ends before it begins: write 200-399`}},
		{"status twice", h("type: http, status: [200, 204-206, 200, 205-300]"), []string{
			line + "status[2]: 200 is listed already: list each status once",
			line + "status[3]: 205-300 overlaps 204-206, which is listed already: list each status once"}},
		{"status none", h("type: http, status: []"), []string{line + "status: the list is empty: list one at least, or take the line out"}},
		{"status null", h("type: http, status: "), []string{line + "status: has no value: write a status, a range or a list of them, or take the line out"}},
		{"status mapping", h("type: http, status: {a: b}"), []string{line + "status: is a mapping where one value belongs: write one value"}},
		{"drain_status", h("type: http, drain_status: ready"), []string{line + `drain_status: "ready" is not a status or a range of them: take a number from 100 to 599, or two, as in 200-399`}},
		{"body empty", h("type: http, body: ''"), []string{line + "body: the expression is empty: write what must be there, or take the line out"}},
		{"body long", h("type: http, body: " + strings.Repeat("a", 1025)), []string{line + "body: an expression of 1025 bytes is over the limit of 1024: take a shorter one"}},
		{"body", h("type: http, body: 'é(a'"), []string{line + `body: "é(a" is not a regular expression: missing closing ) at character 2: correct it (RE2 syntax); a \ stands before a character that means itself`}},

		// commands
		{"command missing", h("type: exec"), []string{line + "command: is missing: write command: and a list of an absolute path and arguments"}},
		{"command missing from both", b("type: exec", "rise: 3"), []string{line + "command: is missing: write command: and a list of an absolute path and arguments"}},
		{"command missing from a backend's", b("type: tcp", "type: exec"), []string{"9: services[0].backends[1].health.command: is missing: write command: and a list of an absolute path and arguments"}},
		{"command null", h(exec), []string{line + "command: has no value: write a list of an absolute path and arguments, or take the line out"}},
		{"command empty", h(exec + "[]"), []string{line + "command: the list is empty: list an absolute path and arguments, or take the line out"}},
		{"command relative", h(exec + "[check]"), []string{line + `command[0]: "check" is not an absolute path: begin it with /`}},
		{"command slash", h(exec + "/usr/lib/fairlead/check/"), []string{line + `command: "/usr/lib/fairlead/check/" names a directory, not a command: write /usr/lib/fairlead/check`}},
		{"command absent", h(exec + "[/absent, a]"), []string{line + "command[0]: /absent can't be found (file does not exist): install it on this machine as well"}},
		{"command as in a shell", h(exec + "/usr/lib/fairlead/check --deep"), []string{
			line + "command: /usr/lib/fairlead/check --deep can't be found (file does not exist): write its arguments as items of their own, as in [/usr/lib/fairlead/check, --deep], or install it on this machine as well"}},
		{"argument null", h(exec + "[/usr/lib/fairlead/check, ~]"), []string{line + "command[1]: has no value: write one, or take the line out"}},
		{"argument NUL", h(exec + `[/usr/lib/fairlead/check, "\0"]`), []string{line + `command[1]: "\x00" holds a NUL: take it out`}},
		{"argument large", h(exec + "[/usr/lib/fairlead/check, " + strings.Repeat("a", 32768) + "]"), []string{line + "command: a command of 32793 bytes is over the limit of 32768: write a script that says the rest"}},

		// times and counts
		{"interval long", h("type: tcp, interval: 2h"), []string{line + "interval: 2h0m0s is too long: take a duration from 100ms to 1h0m0s"}},
		{"fast_interval over interval", h("type: tcp, fast_interval: 3s"), []string{line + "fast_interval: 3s is longer than the interval of 2s: take 2s or less, or a longer interval"}},
		{"fast_interval over a backend's", b("type: tcp, interval: 5s", "interval: 1s, fast_interval: 2s, timeout: 2s"), []string{
			"9: services[0].backends[1].health.fast_interval: 2s is longer than the interval of 1s: take 1s or less, or a longer interval",
			"9: services[0].backends[1].health.timeout: 2s is longer than the interval of 1s: take 1s or less, or a longer interval"}},
		{"fast_interval short", h("type: tcp, fast_interval: 99ms"), []string{line + "fast_interval: 99ms is too short: take a duration from 100ms to 1h0m0s"}},
		{"timeout short", h("type: tcp, timeout: 9ms"), []string{line + "timeout: 9ms is too short: take a duration from 10ms to 1h0m0s"}},
		{"an interval refused judges nothing", h("type: tcp, interval: 5, fast_interval: 5s, timeout: 5s"), []string{line + `interval: "5" has no unit: write its unit, as in 5s`}},
		{"jitter", h("type: tcp, jitter: 51%"), []string{line + "jitter: 51 is too large: take a whole number from 0 to 50"}},
		{"initial", h("type: tcp, initial: unknown"), []string{line + `initial: "unknown" is not one of up, down: take one of these`}},
		{"flaps", h("type: tcp, flaps: 1001"), []string{line + "flaps: 1001 is too large: take a whole number from 0 to 1000"}},
		{"flap_window", h("type: tcp, flap_window: 10ms"), []string{line + "flap_window: 10ms is too short: take a duration from 1s to 24h0m0s"}},
		{"hold_down", h("type: tcp, hold_down: 25h"), []string{line + "hold_down: 25h0m0s is too long: take a duration from 0s to 24h0m0s"}},
		{"hold_down without flaps", h("type: tcp, flaps: 0, hold_down: 5s"), []string{line + "hold_down: flaps is 0, so that no backend is ever held down: take it out, or write flaps: and 1 or more"}},
		{"hold_down without its service's flaps", b("type: tcp, flaps: 0", "hold_down: 5s"), []string{
			"9: services[0].backends[1].health.hold_down: flaps is 0, so that no backend is ever held down: take it out, or write flaps: and 1 or more"}},
		{"flaps without hold_down", h("type: tcp, hold_down: 0s, flaps: 3, flap_window: 1m"), []string{
			line + "flaps: hold_down is 0s, so that flaps hold no backend down: take it out, or write hold_down: and a duration",
			line + "flap_window: no backend is held down here, so that no flaps are counted: take it out, or write flaps: and hold_down:"}},
		{"flap_window without flaps", b("type: tcp, hold_down: 0s", "flap_window: 1m"), []string{
			"9: services[0].backends[1].health.flap_window: no backend is held down here, so that no flaps are counted: take it out, or write flaps: and hold_down:"}},

		// shapes
		{"health a word", service("health: tcp"), []string{"6: services[0].health: is a single value where fields belong: write type: and its like below it"}},
		{"unknown field", h("type: tcp, hold: 5s"), []string{line + "hold: unknown field: take one of type, path, port, host, sni, ca, verify, status, body, command, via, interval, fast_interval, timeout, jitter, rise, fall, initial, flaps, flap_window, hold_down, drain_status, state_header"}},
		{"misspelt", h("type: tcp, fast-interval: 1s"), []string{line + "fast-interval: unknown field: did you mean fast_interval?"}},
	}
	for _, test := range tests {
		got := refused(test.text)
		slices.Sort(got)
		slices.Sort(test.want)
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

func TestHealthAccepted(t *testing.T) {
	for name, text := range map[string]string{
		"udp, another port":                  service("protocol: udp\n  health: {type: tcp, port: 80}"),
		"udp, the same port by tcp, as dns":  service("protocol: udp\n  health: {type: tcp, port: 443}"),
		"udp by a command":                   service("protocol: udp\n  health: {type: exec, command: /usr/lib/fairlead/check}"),
		"udp, each backend with its port":    "services:\n- {name: a, address: 192.0.2.1, port: 1, protocol: udp, health: {type: tcp}, backends: [{name: a, address: 10.0.0.1, health: {port: 2}}]}\n",
		"several ports by a command":         listed("address: 192.0.2.10, ports: [80, 443], method: dsr, health: {type: exec, command: /usr/lib/fairlead/check}", ""),
		"several ports, the backends' ports": listed("address: 192.0.2.10, ports: [80, 443], health: {type: tcp}", ", port: 80"),
		"several ports, each its own check":  listed("address: 192.0.2.10, ports: [80, 443], method: dsr, health: {type: tcp}", ", health: {port: 80}"),
		"several ports, nobody checked":      listed("address: 192.0.2.10, ports: [80, 443], method: dsr, health: {type: tcp}", ", health: {type: none}"),
		"via service under dsr":              service("method: dsr\n  health: {type: wss, via: service, port: 8443}"),
		"via service under ipip":             service("method: ipip\n  health: {type: tcp, via: service}"),
		"via service under gue":              service("method: gue\n  health: {type: http, via: service}"),
		"via backend under nat":              service("method: nat\n  health: {type: http, via: backend}"),
		"all of them disabled":               "services:\n- {name: a, address: 192.0.2.1, port: 1, backends: [{name: a, address: 10.0.0.1, disabled: true}]}\n",
		"a status in both":                   service("health: {type: http, status: 200-599, drain_status: 503}"),
		"names with underscores":             service("health: {type: wss, host: 'my_chat.internal:1', sni: a-b.c1}"),
		"a key beside a certificate":         service("health: {type: wss, ca: /ca.pem}"),
		"the longest expression":             service("health: {type: http, body: " + strings.Repeat("a", 1024) + "}"),
	} {
		if errs := refused(text); len(errs) > 0 {
			t.Errorf("%s: %s", name, strings.Join(errs, "\n"))
		}
	}
}

// TestWrongExpressions holds that the mark stands where the expression goes wrong.
func TestWrongExpressions(t *testing.T) {
	c := newChecker(source{}, nil, testHost)
	for _, test := range []struct {
		expression string
		at         string
	}{
		{"(a", "missing closing ) at character 1"},
		{"(a)[(](b", "missing closing ) at character 7"},
		{"((a)", "missing closing ) at character 1"},
		{"é(a))b", "unexpected ) at character 5"},
		{"b*|*", "missing argument to repetition operator at character 4"},
		{"ab**", "invalid nested repetition operator at character 4"},
		{"[a]x[b", "missing closing ] at character 5"},
		{"a(b[z-a]c)", "invalid character class range at character 4"},
		{"a{2,1}b", "invalid repeat count at character 6"},
		{`ab\8`, "invalid escape sequence at character 3"},
		{`ab\`, `trailing backslash at end of expression at character 3`},
		{"x(?<=a)b", "invalid named capture at character 3"},
		{"x(?=a)b", "invalid or unsupported Perl syntax at character 3"},
	} {
		_, bad := c.expression(test.expression)
		if bad == nil {
			t.Errorf("%q was taken", test.expression)
		} else if !strings.HasSuffix(bad.problem, "is not a regular expression: "+test.at) {
			t.Errorf("%q: %s, want %s", test.expression, bad.problem, test.at)
		}
	}
	a, _ := c.expression("a+")
	if b, _ := c.expression("a+"); a == nil || a != b {
		t.Errorf("one expression was compiled twice")
	}
}

// TestHost asks the file system itself.
func TestHost(t *testing.T) {
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	must(os.WriteFile(path("ca.pem"), []byte(testFiles["/ca.pem"]), 0o600))
	must(os.WriteFile(path("check"), []byte("#!/bin/sh\n"), 0o755))
	must(os.WriteFile(path("plain"), []byte("#!/bin/sh\n"), 0o644))
	must(os.Symlink(path("check"), path("link")))
	must(os.Symlink(path("nowhere"), path("dangling")))
	must(syscall.Mkfifo(path("pipe"), 0o600))
	must(os.WriteFile(path("edge.yaml"), []byte(with("health: {type: wss, ca: "+path("ca.pem")+"}",
		"{name: b, address: 10.0.0.2, health: {type: exec, command: "+path("link")+"}}")), 0o600))
	cfg, err := Load(path("edge.yaml"))
	must(err)
	s := cfg.Services[0]
	if s.Health.CA != path("ca.pem") || !s.Health.Roots.Equal(rootsOf(t, "/ca.pem")) || s.Backends[1].Health.Command[0] != path("link") {
		t.Errorf("service %+v", s)
	}
	for _, test := range []struct{ ca, command, want string }{
		{"absent", "", "can't be read (no such file or directory)"},
		{"dangling", "", "can't be read (no such file or directory)"},
		{"pipe", "", "can't be read (it is not a file)"},
		{".", "", "can't be read (it is not a file)"},
		{"plain", "", "holds no certificate in PEM"},
		{"", "absent", "can't be found (no such file or directory): install it"},
		{"", "plain/check", "can't be found (not a directory): install it"},
		{"", "plain", "is not executable: chmod +x "},
		{"", "pipe", "is not a file: name the command itself"},
		{"", ".", "is not a file: name the command itself"},
	} {
		text, at := "health: {type: wss, ca: "+path(test.ca)+"}", path(test.ca)
		if test.command != "" {
			text, at = "health: {type: exec, command: "+path(test.command)+"}", path(test.command)
		}
		if _, err := Parse("edge.yaml", []byte(service(text))); err == nil || !strings.Contains(err.Error(), at+" "+test.want) {
			t.Errorf("%s: error %v, want %s %s", text, err, at, test.want)
		}
	}
	// Root reads everything: what another is refused comes from elsewhere.
	refusing := testHost
	refusing.file = func(path string) ([]byte, error) {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrPermission}
	}
	if _, err := parse("edge.yaml", []byte(service("health: {type: wss, ca: /ca.pem}")), refusing); err == nil ||
		!strings.Contains(err.Error(), "/ca.pem can't be read (permission denied): ") {
		t.Errorf("error %v", err)
	}
}
