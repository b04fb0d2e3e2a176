package loader

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// NFT is what drops the same by nftables, for interfaces that XDP can't be had on: text for `nft -f`. It replaces what
// it made before; nothing but a person takes it away.
func (opts HoldOptions) NFT(interfaces []string) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	var quoted []string
	for _, name := range interfaces {
		quoted = append(quoted, fmt.Sprintf("%q", name))
	}
	line("table inet fairlead_hold")
	line("delete table inet fairlead_hold")
	line("table inet fairlead_hold {")
	line("\tchain hold {")
	line("\t\ttype filter hook prerouting priority raw; policy accept;")
	line("\t\tiifname != { %s } accept", strings.Join(quoted, ", "))
	for _, to := range together(opts.Services) {
		line("\t\t%s counter drop", to)
	}
	for _, from := range opts.Backends {
		ports := ""
		if from.First > 0 || from.Last < 65535 {
			ports = fmt.Sprintf(" %s dport %s", transport(from.Protocol), portText(from.First, from.Last))
		}
		line("\t\t%s saddr %s %s sport %d%s counter drop", network(from.Address.Addr()), from.Address.Addr(),
			transport(from.Protocol), from.Address.Port(), ports)
	}
	for _, to := range together(opts.Sources) {
		line("\t\t%s jump sources", to)
	}
	line("\t}")
	line("\tchain sources {")
	// A listener is a socket for the first packet of a connection alone.
	line("\t\tmeta l4proto udp socket wildcard { 0, 1 } accept")
	line("\t\ttcp flags & (syn | ack) == syn socket wildcard { 0, 1 } accept")
	line("\t\ttcp flags & (syn | ack) != syn socket wildcard 0 accept")
	line("\t\tcounter drop")
	line("\t}")
	line("}")
	return b.String()
}

// together is a match for each address and protocol, with all of its ports.
func together(list []HeldPorts) (matches []string) {
	type key struct {
		address  netip.Addr
		protocol uint8
	}
	var keys []key
	ranges := make(map[key][]HeldPorts)
	for _, p := range list {
		k := key{p.Address, p.Protocol}
		if ranges[k] == nil {
			keys = append(keys, k)
		}
		ranges[k] = append(ranges[k], p)
	}
	for _, k := range keys {
		// nft refuses a set of ranges that overlap.
		slices.SortFunc(ranges[k], func(a, b HeldPorts) int { return cmp.Compare(a.First, b.First) })
		merged := ranges[k][:1]
		for _, p := range ranges[k][1:] {
			if last := &merged[len(merged)-1]; int(p.First) <= int(last.Last)+1 {
				last.Last = max(last.Last, p.Last)
			} else {
				merged = append(merged, p)
			}
		}
		var ports []string
		for _, p := range merged {
			ports = append(ports, portText(p.First, p.Last))
		}
		matches = append(matches, fmt.Sprintf("%s daddr %s %s dport { %s }", network(k.address), k.address,
			transport(k.protocol), strings.Join(ports, ", ")))
	}
	return matches
}

func network(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip6"
}

func transport(protocol uint8) string {
	if protocol == 17 {
		return "udp"
	}
	return "tcp"
}

func portText(first, last uint16) string {
	if first == last {
		return fmt.Sprint(first)
	}
	return fmt.Sprintf("%d-%d", first, last)
}
