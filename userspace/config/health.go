package config

import (
	"crypto/x509"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Health says how a backend is checked. What its type does not take is zero; under HealthNone all else is.
type Health struct {
	Type         HealthType
	Path         string         // http, https, websocket, wss
	Port         uint16         // that checks go to; 0: the backend's, see [Service.HealthOf]
	Host         string         // http, https, websocket, wss: of the request; empty: the address and port asked
	SNI          string         // https, wss: the name asked for and verified; empty: the address alone is verified
	CA           string         // https, wss: the file that Roots were read from; empty: the system's roots
	Roots        *x509.CertPool // https, wss: nil: the system's
	Verify       bool           // https, wss: whether the certificate must be right
	Status       []StatusRange  // http, https: good ones, rising; no two overlap or touch
	Body         *regexp.Regexp // http, https: what the body's beginning must match; nil: anything
	Command      []string       // exec: absolute path and arguments
	Via          Via            // service: under dsr, ipip and gue only, not by exec
	Interval     time.Duration
	FastInterval time.Duration // while the state is in doubt; never longer than Interval
	Timeout      time.Duration // never longer than Interval
	Jitter       uint32        // percent of the interval
	Rise         uint32        // good checks in a row that make a backend up
	Fall         uint32        // bad checks in a row that make it down
	Initial      Initial
	Flaps        uint32        // going down so many times within FlapWindow makes a backend held down
	FlapWindow   time.Duration // zero, as Flaps, where HoldDown is
	HoldDown     time.Duration // until its checks have been good for so long without a break; 0: off
	DrainStatus  []StatusRange // http, https: as Status: these mean alive, but draining, before Status is asked
	StateHeader  string        // http, https, websocket, wss: canonical name; empty: none is looked at
}

// NeedsChecks reports whether there is anything to do.
func (h Health) NeedsChecks() bool { return h.Type != HealthNone && h.Type != "" }

// Equal reports whether both ask for the same checks, certificates compared by what they are.
func (h Health) Equal(other Health) bool {
	if (h.Body == nil) != (other.Body == nil) || h.Body != nil && h.Body.String() != other.Body.String() ||
		!h.Roots.Equal(other.Roots) {
		return false
	}
	h.Body, h.Roots, other.Body, other.Roots = nil, nil, nil, nil
	return reflect.DeepEqual(h, other)
}

// HealthOf returns how b, a backend of s, is checked: by its own health or else the service's, with the port that
// checks go to.
func (s Service) HealthOf(b Backend) Health {
	h := s.Health
	if b.Health != nil {
		h = *b.Health
	}
	if h.NeedsChecks() && h.Port == 0 {
		h.Port = b.Port
	}
	return h
}

// StatusRange is a range of HTTP statuses, both ends included.
type StatusRange struct{ First, Last int }

// Contains reports whether status lies in r.
func (r StatusRange) Contains(status int) bool { return r.First <= status && status <= r.Last }

// String returns "200-299", and "204" for a range of one.
func (r StatusRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// complete fills in what follows from other fields, and empties what does nothing.
func (h Health) complete() Health {
	if !h.NeedsChecks() {
		return Health{Type: h.Type}
	}
	if h.Timeout == 0 {
		h.Timeout = defaultTimeout(h.Interval)
	}
	if h.FastInterval == 0 {
		h.FastInterval = defaultFastInterval(h.Interval)
	}
	// What an override takes from its service gives way to an interval of its own.
	h.Timeout, h.FastInterval = min(h.Timeout, h.Interval), min(h.FastInterval, h.Interval)
	if h.HoldDown == 0 || h.Flaps == 0 {
		h.Flaps, h.FlapWindow, h.HoldDown = 0, 0, 0
	}
	takes := func(types []HealthType) bool { return slices.Contains(types, h.Type) }
	if !takes(requesting) {
		h.Path, h.Host, h.StateHeader = "", "", ""
	}
	if !takes(reading) {
		h.Status, h.Body, h.DrainStatus = nil, nil, nil
	}
	switch {
	case !takes(encrypting):
		h.SNI, h.CA, h.Roots, h.Verify = "", "", nil, false
	case h.SNI == "":
		h.SNI = nameIn(h.Host)
	}
	if !h.Verify {
		h.CA, h.Roots = "", nil
	}
	if !takes(executing) {
		h.Command = nil
	}
	if !takes(connecting) {
		h.Via = ViaBackend
	}
	return h
}

// stated is a health as the file has it, before [Health.complete]: what an override leaves out is taken from there.
type stated struct {
	Health
	sound bool // nothing in it was refused
}

func (c *checker) serviceHealth(raw *rawHealth, s *Service) stated {
	checks := stated{defaultHealth, true}
	if raw.state == given {
		if raw.kind.state == absent {
			c.refuse(raw.kind.place, "is missing", "write type: and one of "+spell(healthTypes))
			raw.kind.state = broken
		}
		checks = c.health(raw, s, checks)
	}
	s.Health = checks.complete()
	return checks
}

// backendHealth reads what a backend has instead of its service's.
func (c *checker) backendHealth(raw *rawHealth, s *Service, several bool, service stated) *Health {
	checks := c.health(raw, s, service)
	if !inheritsPort(raw) {
		c.healthPort(raw.port.place, checks, s, several)
	}
	h := checks.complete()
	return &h
}

// inheritsPort reports whether raw, of a backend, leaves it to its service whether checks have a port to go to.
func inheritsPort(raw *rawHealth) bool {
	return raw == nil || raw.state != given || raw.kind.state == absent && raw.port.state == absent
}

// serviceHealthPort asks for a port in the service's health where a backend relies on it.
func (c *checker) serviceHealthPort(raw *rawService, s *Service, several bool, checks stated) {
	if slices.ContainsFunc(raw.backends.items, func(b rawBackend) bool { return inheritsPort(b.health.rawHealth) }) {
		c.healthPort(raw.health.port.place, checks, s, several)
	}
}

// healthPort refuses checks that have no port to go to.
func (c *checker) healthPort(at place, h stated, s *Service, several bool) {
	switch {
	case !h.sound || h.Port != 0 || !slices.Contains(connecting, h.Type):
	case s.Protocol == ProtocolUDP:
		c.refuse(at, fmt.Sprintf("is missing, and a check of type %s can't ask a port of udp", h.Type),
			"write port: and one where backends listen by tcp, or take type exec")
	case several && s.Method.keepsPort():
		c.refuse(at, fmt.Sprintf("is missing, and under %s backends of a service of several ports have none of their own",
			s.Method), "write port: and the one that checks go to, or take type exec")
	}
}

// health reads raw over base.
func (c *checker) health(raw *rawHealth, s *Service, base stated) stated {
	before := len(c.errs)
	h := base.Health
	h.Type = choose(c, raw.kind, base.Type, healthTypes)
	for _, f := range raw.specials() {
		if h.Type == "" || *f.state == absent || *f.state == broken || slices.Contains(f.types, h.Type) {
			continue
		}
		c.refuse(f.at, fmt.Sprintf("a check of type %s takes no %s", h.Type, lastName(f.at.field)),
			"take it out, or take type "+oneOf(f.types))
		*f.state = broken
	}
	h.Path = scalar(c, raw.path, base.Path, parseHealthPath)
	h.Port = scalar(c, raw.port, base.Port, parsePortField)
	h.Host = scalar(c, raw.host, base.Host, parseHost)
	h.SNI = scalar(c, raw.sni, base.SNI, parseServerName)
	h.Verify = c.boolean(raw.verify, base.Verify)
	c.authority(raw.ca, &h)
	h.Status = c.statuses(&raw.status, base.Status)
	if raw.status.state == given && len(raw.status.items) == 0 { // of drain_status none may be wanted
		c.refuse(raw.status.place, "the list is empty", "list one at least, or take the line out")
	}
	h.Body = scalar(c, raw.body, base.Body, c.expression)
	h.Command = c.command(&raw.command, base.Command)
	h.Via = choose(c, raw.via, base.Via, vias)
	h.Interval = c.duration(raw.interval, base.Interval, minHealthInterval, maxHealthInterval)
	h.FastInterval = c.duration(raw.fastInterval, base.FastInterval, minHealthInterval, maxHealthInterval)
	h.Timeout = c.duration(raw.timeout, base.Timeout, minHealthTimeout, maxHealthInterval)
	h.Jitter = c.percent(raw.jitter, base.Jitter, maxJitter)
	h.Rise = c.number(raw.rise, base.Rise, 1, maxRiseFall)
	h.Fall = c.number(raw.fall, base.Fall, 1, maxRiseFall)
	h.Initial = choose(c, raw.initial, base.Initial, initials)
	h.Flaps = c.number(raw.flaps, base.Flaps, 0, maxFlaps)
	h.FlapWindow = c.duration(raw.flapWindow, base.FlapWindow, minFlapWindow, maxFlapWindow)
	h.HoldDown = c.duration(raw.holdDown, base.HoldDown, 0, maxHoldDown)
	h.DrainStatus = c.statuses(&raw.drainStatus, base.DrainStatus)
	h.StateHeader = scalar(c, raw.stateHeader, base.StateHeader, parseHeaderName)

	for _, f := range []struct {
		text
		value time.Duration
	}{{raw.timeout, h.Timeout}, {raw.fastInterval, h.FastInterval}} {
		if f.state == given && h.Interval != 0 && f.value > h.Interval {
			c.refuse(f.place, fmt.Sprintf("%v is longer than the interval of %v", f.value, h.Interval),
				fmt.Sprintf("take %v or less, or a longer interval", h.Interval))
		}
	}
	if raw.via.state == given && h.Via == ViaService && s.Method.rewritesPort() {
		c.refuse(raw.via.place, fmt.Sprintf("under %s backends don't have the service's address", s.Method),
			"take via: backend, or method dsr, ipip or gue")
	}
	if base.sound && len(c.errs) == before { // else a zero may stand for what was refused
		c.healthFits(raw, &h)
	}
	return stated{h, base.sound && len(c.errs) == before}
}

// healthFits refuses what does nothing beside the rest of h.
func (c *checker) healthFits(raw *rawHealth, h *Health) {
	if h.Type == HealthExec && len(h.Command) == 0 {
		c.refuse(raw.command.place, "is missing", "write command: and a list of an absolute path and arguments")
	}
	if raw.ca.state == given && !h.Verify {
		c.refuse(raw.ca.place, "verify is false, so that no certificate is asked for", "take one of the two out")
	}
	if raw.holdDown.state == given && h.HoldDown != 0 && h.Flaps == 0 {
		c.refuse(raw.holdDown.place, "flaps is 0, so that no backend is ever held down",
			"take it out, or write flaps: and 1 or more")
	}
	if raw.flaps.state == given && h.Flaps != 0 && h.HoldDown == 0 {
		c.refuse(raw.flaps.place, "hold_down is 0s, so that flaps hold no backend down",
			"take it out, or write hold_down: and a duration")
	}
	if raw.flapWindow.state == given && (h.Flaps == 0 || h.HoldDown == 0) {
		c.refuse(raw.flapWindow.place, "no backend is held down here, so that no flaps are counted",
			"take it out, or write flaps: and hold_down:")
	}
}

// statuses reads one or more statuses, or ranges of them.
func (c *checker) statuses(raw *oneOrMore, def []StatusRange) []StatusRange {
	switch raw.state {
	case absent:
		return def
	case broken:
		return nil
	case empty:
		c.refuse(raw.place, "has no value", "write a status, a range or a list of them, or take the line out")
	}
	var list []StatusRange
	for _, item := range raw.items {
		r := scalar(c, item, StatusRange{}, parseStatus)
		if r == (StatusRange{}) {
			continue
		}
		at := slices.IndexFunc(list, func(other StatusRange) bool { return other.Last >= r.First })
		if at < 0 {
			at = len(list)
		} else if list[at].First <= r.Last {
			problem := fmt.Sprintf("%v overlaps %v, which is listed already", r, list[at])
			if list[at] == r {
				problem = r.String() + " is listed already"
			}
			c.refuse(item.place, problem, "list each status once")
			continue
		}
		list = slices.Insert(list, at, r)
	}
	// Ranges that touch are one, so that one set of statuses has one spelling.
	var out []StatusRange
	for _, r := range list {
		if last := len(out) - 1; last >= 0 && out[last].Last+1 == r.First {
			out[last].Last = r.Last
		} else {
			out = append(out, r)
		}
	}
	return out
}

// command reads an absolute path and arguments.
func (c *checker) command(raw *oneOrMore, def []string) []string {
	switch raw.state {
	case absent:
		return def
	case broken:
		return nil
	case empty:
		c.refuse(raw.place, "has no value", "write a list of an absolute path and arguments, or take the line out")
		return nil
	}
	if len(raw.items) == 0 {
		c.refuse(raw.place, "the list is empty", "list an absolute path and arguments, or take the line out")
		return nil
	}
	var command []string
	size := 0
	for i, item := range raw.items {
		parse := parseArgument
		if i == 0 {
			parse = c.program
		}
		word := scalar(c, item, "", parse)
		command, size = append(command, word), size+len(word)+1
	}
	if size > maxCommand {
		c.refuse(raw.place, fmt.Sprintf("a command of %d bytes is over the limit of %d", size, maxCommand),
			"write a script that says the rest")
	}
	return command
}

// oneOf spells types as a choice between them.
func oneOf(types []HealthType) string {
	text := spell(types)
	if last := strings.LastIndex(text, ", "); last >= 0 {
		text = text[:last] + " or " + text[last+2:]
	}
	return text
}
