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
	defaultAllDown       = AllDownOpen
	defaultPanic         = 0
	defaultResetRate     = 20000
	defaultSlowStart     = 0
	defaultBalance       = BalanceHash
	defaultProxyProtocol = ProxyNone
	defaultAnnounce      = AnnounceAuto
	defaultWeight        = 1
)

var (
	defaultHTTP = netip.MustParseAddrPort("127.0.0.1:9870")

	// defaultHealth is what holds of every field that the type takes, but for what follows from others:
	// [Health.complete] knows that. A service without health has its type; where health is given, its type must be.
	defaultHealth = Health{
		Type:       HealthNone,
		Path:       "/",
		Verify:     true,
		Status:     []StatusRange{{200, 399}},
		Via:        ViaBackend,
		Interval:   2 * time.Second,
		Jitter:     10,
		Rise:       2,
		Fall:       3,
		Initial:    InitialDown,
		Flaps:      3,
		FlapWindow: time.Minute,
		HoldDown:   30 * time.Second,
	}
)

// defaultTimeout gives way to a short interval.
func defaultTimeout(interval time.Duration) time.Duration { return min(time.Second, interval) }

// defaultFastInterval settles a doubt four times as fast as the steady checks would.
func defaultFastInterval(interval time.Duration) time.Duration {
	return min(max(interval/4, minHealthInterval), interval)
}

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
	maxJitter         = 50 // percent
	maxRiseFall       = 1000
	maxFlaps          = 1000
	minFlapWindow     = time.Second
	maxFlapWindow     = 24 * time.Hour
	maxHoldDown       = 24 * time.Hour
	maxSlowStart      = time.Hour
	maxResetRate      = 1000000
	maxHealthPath     = 1024     // bytes
	maxHostName       = 253      // bytes: RFC 1035, section 2.3.4, in text
	maxHeaderName     = 128      // bytes
	maxExpression     = 1024     // bytes
	maxCommand        = 32 << 10 // bytes of a command with its arguments
	maxAuthorities    = 16 << 20 // bytes of a file of certificates
	minStatus         = 100      // RFC 9110, section 15
	maxStatus         = 599
)
