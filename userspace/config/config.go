// Package config reads Fairlead's configuration: strict YAML, decoded into raw fields that remember where they stand,
// validated, and handed on as one checked value that nobody changes any more.
//
// All errors of a file are found in one pass and told together, each with file, line, field, what is wrong and what to
// do. The files that it names for health checks belong to it: certificates are read with it, commands must be there.
// What else only the host can tell (whether a dsr backend is on-link, whether an interface exists) is not checked here;
// the daemon reports it in the same form by [Config.Refuse].
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Config is a checked configuration with every default filled in. It is shared and must not be changed by anyone.
type Config struct {
	Path      string // the file, as it was named
	Node      string // this host's name in metrics, events and logs
	Dataplane Dataplane
	StateDir  string // absolute; journal and snapshots
	Control   Control
	Services  []Service // in the file's order; may be empty: the daemon then waits

	source    source
	places    map[string]place // by field path
	endpoints endpoints
}

// Dataplane is what concerns the kernel side as a whole.
type Dataplane struct {
	Mode        Mode
	Interfaces  []string // empty: those with a route to the services' backends and clients
	XDP         XDPMode
	Connections uint32        // capacity of the connection table, entries
	HalfOpen    uint32        // capacity of the half-open table, entries
	PinPath     string        // absolute, inside a bpffs; its own directory
	Epoch       time.Duration // how often fresh bits are forgotten
}

// Control says where the daemon is spoken to.
type Control struct {
	Socket string         // absolute path of the unix socket
	HTTP   netip.AddrPort // metrics, dashboard, health, read-only; not IsValid: off. Port 0 lets the kernel choose
}

// Service is a virtual address, port and protocol, or several of its addresses and ports, and the backends behind it.
type Service struct {
	Name            string
	Address         netip.Addr   // the first of Addresses
	Port            uint16       // the first of Ports; host byte order, as everywhere in this package
	Addresses       []netip.Addr // at least one, of one family, each once, in the file's order
	Ports           []PortRange  // at least one, rising; no two overlap or touch
	Protocol        Protocol
	Method          Method
	Affinity        Affinity
	RingSize        uint32 // a prime
	IdleTimeout     time.Duration
	OnBackendDown   DownPolicy
	AllDown         AllDown
	Panic           uint32         // percent: with a smaller share of backends up, the checks' verdict is off; 0: never
	ResetRate       uint32         // clients of a dead backend told a second
	SlowStart       time.Duration  // over which the weight of a backend that comes up grows; 0: at once
	SourceAddresses []netip.Addr   // fullnat only; empty: the address of the outgoing interface
	SourcePorts     PortRange      // fullnat only; zero: the default, which only the host can tell
	TunnelSources   []netip.Prefix // ipip and gue only; at most one of each family, IPv4 first: see [Service.TunnelSource]
	Health          Health
	Balance         Balance
	ProxyProtocol   ProxyProtocol
	Announce        Announce
	Backends        []Backend // at least one, in the file's order
}

// Backend is one server of a service.
type Backend struct {
	Name     string
	Address  netip.Addr
	Port     uint16  // 0: as the client's packet has it, under dsr, ipip and gue with a service of several ports
	Weight   uint32  // 0: draining
	Disabled bool    // no new connections, no checks
	Health   *Health // nil: the service's; else whole, what the override left out taken from it: see [Service.HealthOf]
}

// Balance says how new connections are spread.
type Balance struct {
	Mode BalanceMode
}

// Load reads and checks the file at path. A file that can't be read gives an error that wraps the cause
// (fs.ErrNotExist and its like); a file that is wrong gives [Errors].
func Load(path string) (*Config, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read configuration: %w: name the file with -c or $FAIRLEAD_CONFIG", err)
	}
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer file.Close()
	// One byte more than allowed is enough for Parse to see that the file is too large.
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(path, data)
}

// Parse checks data, the content of the file called name. Its error is always [Errors].
func Parse(name string, data []byte) (*Config, error) {
	return parse(name, data, thisHost)
}

func parse(name string, data []byte, h host) (*Config, error) {
	raw, src, places, errs := decode(name, data)
	if raw == nil {
		return nil, errs
	}
	c := newChecker(src, errs, h)
	cfg := c.config(raw)
	if len(c.errs) > 0 {
		c.errs.sort()
		return nil, c.errs
	}
	cfg.Path, cfg.source, cfg.places = name, src, places
	return cfg, nil
}

// Equal reports whether both say the same, wherever they were read from and however they were written. Certificates
// count by what they are, so that a file of them that was replaced makes a difference.
func (c *Config) Equal(other *Config) bool {
	if c == nil || other == nil {
		return c == other
	}
	a, b := *c, *other
	a.Path, a.source, a.places, a.endpoints = "", source{}, nil, nil
	b.Path, b.source, b.places, b.endpoints = "", source{}, nil, nil
	var checksA, checksB []*Health
	a.Services, checksA = apart(a.Services)
	b.Services, checksB = apart(b.Services)
	return reflect.DeepEqual(a, b) && slices.EqualFunc(checksA, checksB, func(a, b *Health) bool {
		return a == b || a != nil && b != nil && a.Equal(*b)
	})
}

// apart returns services without their healths, and those, which reflect can't compare.
func apart(services []Service) (rest []Service, checks []*Health) {
	rest = slices.Clone(services)
	for i := range rest {
		s := &rest[i]
		checks = append(checks, &services[i].Health)
		s.Health, s.Backends = Health{}, slices.Clone(s.Backends)
		for j := range s.Backends {
			checks = append(checks, s.Backends[j].Health)
			s.Backends[j].Health = nil
		}
	}
	return rest, checks
}

// Refuse makes an error in the form of this package's own for what was found out later, at the line of field, as in
// "services[0].backends[2].address". A field that the file leaves out is shown at the mapping it would stand in.
func (c *Config) Refuse(field, problem, remedy string) *Error {
	at := place{line: 1, column: 1}
	for path := field; path != ""; {
		if p, ok := c.places[path]; ok {
			at = p
			break
		}
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	at.field = field
	return c.source.refuse(at, problem, remedy)
}
