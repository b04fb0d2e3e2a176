package config

// The choices are strings, spelled as in the file: they print, compare and travel as JSON by that spelling. A checked
// configuration holds none but those listed here.

// Mode says which plane carries connections.
type Mode string

const (
	ModeAuto      Mode = "auto" // xdp where it can be had, else userspace
	ModeXDP       Mode = "xdp"
	ModeUserspace Mode = "userspace"
)

var modes = []Mode{ModeAuto, ModeXDP, ModeUserspace}

func (m Mode) String() string { return string(m) }

// XDPMode says where XDP runs: in the driver or in the network stack.
type XDPMode string

const (
	XDPAuto    XDPMode = "auto" // native where the driver has it, else generic
	XDPNative  XDPMode = "native"
	XDPGeneric XDPMode = "generic"
)

var xdpModes = []XDPMode{XDPAuto, XDPNative, XDPGeneric}

func (m XDPMode) String() string { return string(m) }

// Protocol is a service's transport protocol.
type Protocol string

const (
	ProtocolTCP Protocol = "tcp"
	ProtocolUDP Protocol = "udp"
)

var protocols = []Protocol{ProtocolTCP, ProtocolUDP}

func (p Protocol) String() string { return string(p) }

// Number returns the protocol's number in the IP header (IANA, assigned internet protocol numbers), 0 for none.
func (p Protocol) Number() uint8 {
	switch p {
	case ProtocolTCP:
		return 6
	case ProtocolUDP:
		return 17
	}
	return 0
}

// Method is a forwarding method.
type Method string

const (
	MethodFullNAT Method = "fullnat" // both addresses are rewritten; replies pass through Fairlead
	MethodNAT     Method = "nat"     // the destination is rewritten; replies pass through Fairlead
	MethodDSR     Method = "dsr"     // the packet goes unchanged to the backend's MAC; replies go straight to the client
	MethodIPIP    Method = "ipip"    // as dsr, inside IP
	MethodGUE     Method = "gue"     // as dsr, inside UDP
)

var methods = []Method{MethodFullNAT, MethodNAT, MethodDSR, MethodIPIP, MethodGUE}

func (m Method) String() string { return string(m) }

// keepsPort reports whether the client's packet reaches the backend with the port that the client sent it to.
func (m Method) keepsPort() bool { return m == MethodDSR || m == MethodIPIP || m == MethodGUE }

// rewritesPort reports whether the client's packet reaches the backend with the backend's port, whatever it had.
func (m Method) rewritesPort() bool { return m == MethodFullNAT || m == MethodNAT }

// encapsulates reports whether packets go to the backend inside an outer header of Fairlead's own.
func (m Method) encapsulates() bool { return m == MethodIPIP || m == MethodGUE }

// keepsFamily reports whether clients and backends must speak the same IP version.
func (m Method) keepsFamily() bool { return m == MethodFullNAT || m == MethodNAT || m == MethodDSR }

// Affinity says what is hashed to a ring slot.
type Affinity string

const (
	AffinityConnection Affinity = "connection" // the 4-tuple
	AffinityClient     Affinity = "client"     // the source address: a reconnect finds its server again
)

var affinities = []Affinity{AffinityConnection, AffinityClient}

func (a Affinity) String() string { return string(a) }

// DownPolicy says what becomes of a connection whose backend is gone.
type DownPolicy string

const (
	DownReset  DownPolicy = "reset"
	DownKeep   DownPolicy = "keep"
	DownRehash DownPolicy = "rehash"
)

var downPolicies = []DownPolicy{DownReset, DownKeep, DownRehash}

func (p DownPolicy) String() string { return string(p) }

// HealthType is the kind of a health check.
type HealthType string

const (
	HealthTCP       HealthType = "tcp"
	HealthHTTP      HealthType = "http"
	HealthHTTPS     HealthType = "https"
	HealthWebSocket HealthType = "websocket"
	HealthWSS       HealthType = "wss"  // websocket inside TLS
	HealthExec      HealthType = "exec" // a command decides
	HealthNone      HealthType = "none"
)

var healthTypes = []HealthType{HealthTCP, HealthHTTP, HealthHTTPS, HealthWebSocket, HealthWSS, HealthExec, HealthNone}

func (t HealthType) String() string { return string(t) }

// What a check of a type does, which decides what fields it takes.
var (
	checking   = []HealthType{HealthTCP, HealthHTTP, HealthHTTPS, HealthWebSocket, HealthWSS, HealthExec}
	connecting = []HealthType{HealthTCP, HealthHTTP, HealthHTTPS, HealthWebSocket, HealthWSS}
	requesting = []HealthType{HealthHTTP, HealthHTTPS, HealthWebSocket, HealthWSS}
	reading    = []HealthType{HealthHTTP, HealthHTTPS} // an answer with a status and a body
	encrypting = []HealthType{HealthHTTPS, HealthWSS}
	executing  = []HealthType{HealthExec}
)

// Via says which address a check asks for.
type Via string

const (
	ViaBackend Via = "backend" // the backend's own
	ViaService Via = "service" // the service's, as its clients do, sent to the backend
)

var vias = []Via{ViaBackend, ViaService}

func (v Via) String() string { return string(v) }

// Initial is what a backend counts as until its first check has ended.
type Initial string

const (
	InitialUp   Initial = "up"
	InitialDown Initial = "down"
)

var initials = []Initial{InitialUp, InitialDown}

func (i Initial) String() string { return string(i) }

// AllDown says what becomes of new connections while every backend is down.
type AllDown string

const (
	AllDownOpen  AllDown = "open"  // they are tried on all backends
	AllDownReset AllDown = "reset" // they are refused at once
)

var allDowns = []AllDown{AllDownOpen, AllDownReset}

func (a AllDown) String() string { return string(a) }

// BalanceMode says what new connections are spread by.
type BalanceMode string

const (
	BalanceHash BalanceMode = "hash" // the configured weights alone
	BalanceLoad BalanceMode = "load" // live connection counts too
)

var balanceModes = []BalanceMode{BalanceHash, BalanceLoad}

func (m BalanceMode) String() string { return string(m) }

// ProxyProtocol is the version of the PROXY protocol header that backends get (HAProxy, proxy-protocol.txt).
type ProxyProtocol string

const (
	ProxyNone ProxyProtocol = "none"
	ProxyV1   ProxyProtocol = "v1"
	ProxyV2   ProxyProtocol = "v2"
)

var proxyProtocols = []ProxyProtocol{ProxyNone, ProxyV1, ProxyV2}

func (p ProxyProtocol) String() string { return string(p) }

// Announce says whether an address of XDP's own is announced to the neighbours.
type Announce string

const (
	AnnounceAuto Announce = "auto"
	AnnounceOff  Announce = "off"
)

var announces = []Announce{AnnounceAuto, AnnounceOff}

func (a Announce) String() string { return string(a) }
