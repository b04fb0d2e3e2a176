package through

import "math"

const (
	portsWanted = 1024
	// portsFirst is the lowest port that a client may come from by custom (bindresvport(3)).
	portsFirst = 512
)

// ChoosePorts chooses the ports that checks come from: 1024 at most, the highest of those outside of the host's local
// port range (net.ipv4.ip_local_port_range, both ends included), as the host's own connections to a service must not
// meet them. Those that avoid tells are left out: services' own.
func ChoosePorts(first, last uint16, avoid func(uint16) bool) (ports []uint16) {
	for port := math.MaxUint16; port >= portsFirst && len(ports) < portsWanted; port-- {
		p := uint16(port)
		if p >= first && p <= last || avoid != nil && avoid(p) {
			continue
		}
		ports = append(ports, p)
	}
	return ports
}
