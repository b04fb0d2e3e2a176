package config

import (
	"math"
	"net/netip"
	"time"
)

// What a file may leave out, and what then holds. A backend's port is its service's, where that has one; the parts of a
// backend's health that it leaves out are its service's; node is the host's name; interfaces, source_addresses,
// source_ports and tunnel_source stay empty, because only the host can tell them.
const (
	defaultMode        = ModeAuto
	defaultXDP         = XDPAuto
	defaultConnections = 1 << 20
	defaultPinPath     = "/sys/fs/bpf/fairlead"
	defaultEpoch       = 10 * time.Second
	defaultStateDir    = "/var/lib/fairlead"
	defaultSocket      = "/run/fairlead/control.sock"

	defaultProtocol      = ProtocolTCP
	defaultMethod        = MethodFullNAT
	defaultAffinity      = AffinityConnection
	defaultRingSize      = 65537
	defaultOnBackendDown = DownReset
	defaultBalance       = BalanceHash
	defaultProxyProtocol = ProxyNone
	defaultAnnounce      = AnnounceAuto
	defaultWeight        = 1

	defaultHealthType = HealthNone // of a service without health; where health is given, its type must be
	defaultHealthPath = "/"
)

var (
	defaultHTTP = netip.MustParseAddrPort("127.0.0.1:9870")

	// defaultChecks is what holds for a health of any type but none. The timeout gives way to a shorter interval.
	defaultChecks = Health{Interval: 2 * time.Second, Timeout: time.Second, Rise: 2, Fall: 3}
)

// defaultHalfOpen is an eighth of the connections: half-open entries live 75 s, established ones hours. The floor keeps
// room for an ordinary flood beside a small table.
func defaultHalfOpen(connections uint32) uint32 { return max(connections/8, 1<<16) }

// defaultIdleTimeout is generous for TCP, whose ends say when they are done, and short for UDP, whose don't.
func defaultIdleTimeout(p Protocol) time.Duration {
	if p == ProtocolUDP {
		return 120 * time.Second
	}
	return 24 * time.Hour
}

// Bounds.
const (
	maxFileBytes  = 16 << 20
	maxServices   = 4096
	maxBackends   = math.MaxUint16 // altogether
	maxEndpoints  = 1 << 16        // addresses times ports of services, altogether
	maxSources    = 16             // source addresses of a service
	minTunnel4    = 8              // bits of a tunnel_source
	minTunnel6    = 32             // likewise
	minTable      = 1024           // entries of either table
	maxTable      = 64 << 20
	minEpoch      = 100 * time.Millisecond
	maxEpoch      = 10 * time.Second
	idleEpochs    = 4       // an idle timeout is at least so many epochs: a touch may come an epoch late, twice over
	slotsABackend = 100     // fewer would let shares of new connections differ by more than some percent
	maxRingSize   = 5000011 // a prime; 20 MB a ring
	maxIdle       = 365 * 24 * time.Hour
	maxWeight     = 1000
	maxName       = 63 // bytes
	maxNode       = 253
	maxSocketPath = 107 // bytes: sun_path holds 108 with its final NUL (unix(7))
	maxInterface  = 15  // bytes: IFNAMSIZ is 16 with its final NUL

	minHealthInterval = 100 * time.Millisecond
	maxHealthInterval = time.Hour
	minHealthTimeout  = 10 * time.Millisecond
	maxRiseFall       = 1000
	maxHealthPath     = 1024 // bytes
)
