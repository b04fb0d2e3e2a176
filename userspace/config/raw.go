package config

// The raw configuration: every field as it was written, and where. Nothing here is checked but the shape.

// state says what a file tells of a field.
type state uint8

const (
	absent state = iota // not mentioned
	empty               // mentioned without a value: null
	broken              // of the wrong shape, refused already
	given
)

// text is one scalar. Its field, not its spelling, decides what it means: 443 and "443" are the same.
type text struct {
	place
	state state
	value string
}

// list is a sequence of raw fields.
type list[T any, PT readable[T]] struct {
	place
	state state
	items []T
}

type texts = list[text, *text]

// oneOrMore is a list that may be written as its one item alone.
type oneOrMore struct{ texts }

// field is a name that a mapping may hold, and where its value goes.
type field struct {
	name string
	to   target
}

// target is what a value can be read into. locate tells it where it would stand, before and whether or not it is read.
type target interface {
	locate(at place)
	read(d *decoder, node node, at place)
}

type readable[T any] interface {
	*T
	target
}

type rawConfig struct {
	place
	node      text
	dataplane rawDataplane
	stateDir  text
	control   rawControl
	services  list[rawService, *rawService]
}

func (r *rawConfig) fields() []field {
	return []field{{"node", &r.node}, {"dataplane", &r.dataplane}, {"state_dir", &r.stateDir},
		{"control", &r.control}, {"services", &r.services}}
}

type rawDataplane struct {
	place
	mode, xdp, connections, halfOpen, pinPath, epoch text
	interfaces                                       texts
}

func (r *rawDataplane) fields() []field {
	return []field{{"mode", &r.mode}, {"interfaces", &r.interfaces}, {"xdp", &r.xdp}, {"connections", &r.connections},
		{"half_open", &r.halfOpen}, {"pin_path", &r.pinPath}, {"epoch", &r.epoch}}
}

type rawControl struct {
	place
	socket, http text
}

func (r *rawControl) fields() []field {
	return []field{{"socket", &r.socket}, {"http", &r.http}}
}

type rawService struct {
	place
	state                                     state
	name, address, port, protocol, method     text
	affinity, ringSize, idleTimeout           text
	onBackendDown, sourcePorts, proxyProtocol text
	announce, allDown, panic, resetRate       text
	slowStart                                 text
	addresses, ports, sourceAddresses         texts
	tunnelSource                              oneOrMore
	health                                    rawHealth
	balance                                   rawBalance
	backends                                  list[rawBackend, *rawBackend]
}

func (r *rawService) fields() []field {
	return []field{{"name", &r.name}, {"address", &r.address}, {"addresses", &r.addresses}, {"port", &r.port},
		{"ports", &r.ports}, {"protocol", &r.protocol}, {"method", &r.method}, {"affinity", &r.affinity},
		{"ring_size", &r.ringSize}, {"idle_timeout", &r.idleTimeout}, {"on_backend_down", &r.onBackendDown},
		{"all_down", &r.allDown}, {"panic", &r.panic}, {"reset_rate", &r.resetRate}, {"slow_start", &r.slowStart},
		{"source_addresses", &r.sourceAddresses}, {"source_ports", &r.sourcePorts},
		{"tunnel_source", &r.tunnelSource}, {"health", &r.health}, {"balance", &r.balance},
		{"proxy_protocol", &r.proxyProtocol}, {"announce", &r.announce}, {"backends", &r.backends}}
}

type rawHealth struct {
	place
	state                                              state
	kind, path, port, host, sni, ca, verify, body, via text
	interval, fastInterval, timeout, jitter            text
	rise, fall, initial, flaps, flapWindow, holdDown   text
	stateHeader                                        text
	status, drainStatus, command                       oneOrMore
}

func (r *rawHealth) fields() []field {
	return []field{{"type", &r.kind}, {"path", &r.path}, {"port", &r.port}, {"host", &r.host}, {"sni", &r.sni},
		{"ca", &r.ca}, {"verify", &r.verify}, {"status", &r.status}, {"body", &r.body}, {"command", &r.command},
		{"via", &r.via}, {"interval", &r.interval}, {"fast_interval", &r.fastInterval}, {"timeout", &r.timeout},
		{"jitter", &r.jitter}, {"rise", &r.rise}, {"fall", &r.fall}, {"initial", &r.initial}, {"flaps", &r.flaps},
		{"flap_window", &r.flapWindow}, {"hold_down", &r.holdDown}, {"drain_status", &r.drainStatus},
		{"state_header", &r.stateHeader}}
}

// rawOverride is a backend's health, which few of many have: nil where it is absent.
type rawOverride struct{ *rawHealth }

func (r *rawOverride) locate(place) {}

// special is a field that not every type of check takes.
type special struct {
	at    place
	state *state
	types []HealthType // that take it
}

func (r *rawHealth) specials() []special {
	return []special{
		{r.path.place, &r.path.state, requesting},
		{r.port.place, &r.port.state, checking},
		{r.host.place, &r.host.state, requesting},
		{r.sni.place, &r.sni.state, encrypting},
		{r.ca.place, &r.ca.state, encrypting},
		{r.verify.place, &r.verify.state, encrypting},
		{r.status.place, &r.status.state, reading},
		{r.body.place, &r.body.state, reading},
		{r.command.place, &r.command.state, executing},
		{r.via.place, &r.via.state, connecting},
		{r.drainStatus.place, &r.drainStatus.state, reading},
		{r.stateHeader.place, &r.stateHeader.state, requesting},
	}
}

type rawBalance struct {
	place
	mode text
}

func (r *rawBalance) fields() []field { return []field{{"mode", &r.mode}} }

type rawBackend struct {
	place
	state                                 state
	name, address, port, weight, disabled text
	health                                rawOverride
}

func (r *rawBackend) fields() []field {
	return []field{{"name", &r.name}, {"address", &r.address}, {"port", &r.port}, {"weight", &r.weight},
		{"disabled", &r.disabled}, {"health", &r.health}}
}
