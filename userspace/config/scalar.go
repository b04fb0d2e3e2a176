package config

import (
	"fmt"
	"math"
	"net/netip"
	"net/textproto"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// complaint says why a value is refused: the problem and the remedy of an [Error].
type complaint struct{ problem, remedy string }

func complain(remedy, problem string, args ...any) *complaint {
	return &complaint{problem: fmt.Sprintf(problem, args...), remedy: remedy}
}

// scalar returns what parse makes of t, or def where t is absent, or the zero value where t is refused.
func scalar[T any](c *checker, t text, def T, parse func(string) (T, *complaint)) T {
	var zero T
	switch t.state {
	case absent:
		return def
	case broken:
		return zero
	case empty:
		c.refuse(t.place, "has no value", "write one, or take the line out")
		return zero
	}
	value, bad := parse(t.value)
	if bad != nil {
		c.refuse(t.place, bad.problem, bad.remedy)
		return zero
	}
	return value
}

func choose[T ~string](c *checker, t text, def T, all []T) T {
	return scalar(c, t, def, func(s string) (T, *complaint) {
		names := make([]string, len(all))
		for i, choice := range all {
			if names[i] = string(choice); s == names[i] {
				return choice, nil
			}
		}
		remedy := "take one of these"
		if near := nearest(s, names); near != "" {
			remedy = "did you mean " + near + "?"
		}
		return "", complain(remedy, "%q is not one of %s", s, spell(all))
	})
}

func spell[T ~string](all []T) string {
	names := make([]string, len(all))
	for i, choice := range all {
		names[i] = string(choice)
	}
	return strings.Join(names, ", ")
}

// number reads a whole decimal number. Other notations are refused: 0100 is 64 in one YAML and 100 in another.
func (c *checker) number(t text, def, least, most uint32) uint32 {
	return scalar(c, t, def, func(s string) (uint32, *complaint) {
		remedy := fmt.Sprintf("take a whole number from %d to %d", least, most)
		n, err := strconv.ParseUint(s, 10, 64)
		switch {
		case err != nil && isDigits(s):
			n = math.MaxUint64
		case err != nil, len(s) > 1 && s[0] == '0':
			return 0, complain(remedy, "%q is not a plain decimal number", s)
		}
		if n < uint64(least) {
			return 0, complain(remedy, "%s is too small", s)
		}
		if n > uint64(most) {
			return 0, complain(remedy, "%s is too large", s)
		}
		return uint32(n), nil
	})
}

func isDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

func (c *checker) duration(t text, def, least, most time.Duration) time.Duration {
	return scalar(c, t, def, func(s string) (time.Duration, *complaint) {
		remedy := fmt.Sprintf("take a duration from %v to %v", least, most)
		d, err := time.ParseDuration(s)
		switch {
		case err != nil && isDigits(s), err == nil && isDigits(s):
			return 0, complain(fmt.Sprintf("write its unit, as in %ss", s), "%q has no unit", s)
		case err != nil:
			if days, found := strings.CutSuffix(s, "d"); found && isDigits(days) {
				if n, err := strconv.ParseUint(days, 10, 16); err == nil {
					remedy = fmt.Sprintf("write %dh", n*24)
				}
			}
			return 0, complain(remedy, "%q is not a duration in h, m, s and ms", s)
		case d < least:
			return 0, complain(remedy, "%v is too short", d)
		case d > most:
			return 0, complain(remedy, "%v is too long", d)
		}
		return d, nil
	})
}

// address reads an address that packets can be sent to or from. Under mode userspace loopback is one of them; XDP
// stands on no packet's way there.
func (c *checker) address(t text, mode Mode) netip.Addr {
	return scalar(c, t, netip.Addr{}, func(s string) (netip.Addr, *complaint) {
		a, bad := parseAddress(s)
		if bad == nil && a.IsLoopback() && mode != ModeUserspace && mode != "" {
			bad = complain("take an address that others can reach, or dataplane.mode userspace",
				"%s is a loopback address, which no packet on an interface has", a)
		}
		if bad != nil {
			return netip.Addr{}, bad
		}
		return a, nil
	})
}

func parseAddress(s string) (netip.Addr, *complaint) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		if prefix, err := netip.ParsePrefix(s); err == nil {
			return a, complain("write "+prefix.Addr().String(), "%q is a network", s)
		}
		if _, err := netip.ParseAddrPort(s); err == nil {
			return a, complain("write the port in its own field", "%q is an address with a port", s)
		}
		return a, complain("write it as 192.0.2.10 or 2001:db8::10; names are not looked up", "%q is not an IP address", s)
	}
	zone := a.Zone()
	switch bare := a.WithZone(""); {
	case bare.Is4In6():
		return a, complain("write "+bare.Unmap().String(), "%s is an IPv4 address mapped into IPv6", s)
	case bare.IsUnspecified():
		return a, complain("write the address itself", "%s is the unspecified address", s)
	case bare.IsMulticast():
		return a, complain("write a unicast address", "%s is a multicast address", s)
	case bare == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return a, complain("write a unicast address", "%s is the broadcast address", s)
	case bare.IsLinkLocalUnicast() && bare.Is4():
		return a, complain("take an address of a network of yours",
			"%s is a link-local IPv4 address, which can't name its interface", s)
	case bare.IsLinkLocalUnicast() && zone == "":
		return a, complain("add its interface, as in "+s+"%eth0", "%s is a link-local address without an interface", s)
	case zone != "" && !bare.IsLinkLocalUnicast():
		return a, complain("write "+bare.String(), "%s names an interface, which only link-local addresses need", s)
	case zone != "":
		if _, bad := parseInterface(zone); bad != nil {
			return a, bad
		}
	}
	return a, nil
}

func parsePortField(s string) (uint16, *complaint) {
	port, err := parsePort(s)
	if err != nil {
		return 0, complain("take a number from 1 to 65535", "%q is not a port", s)
	}
	return port, nil
}

func parseServicePort(s string) (uint16, *complaint) {
	port, bad := parsePortField(s)
	if r, err := ParsePortRange(s); bad != nil && err == nil {
		bad.remedy = fmt.Sprintf("write ports: [%s]", r.plain())
	}
	return port, bad
}

// parsePorts reads one port or a range.
func parsePorts(s string) (PortRange, *complaint) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := parsePort(first)
	b, errB := parsePort(last)
	switch {
	case errA != nil || errB != nil:
		return PortRange{}, complain("take a number from 1 to 65535, or two, as in 8000-8100",
			"%q is not a port or a range of ports", s)
	case a > b:
		return PortRange{}, complain(fmt.Sprintf("write %d-%d", b, a), "%q ends before it begins", s)
	}
	return PortRange{a, b}, nil
}

func parseSourcePorts(s string) (PortRange, *complaint) {
	r, err := ParsePortRange(s)
	if err == nil {
		return r, nil
	}
	if port, bad := parsePort(s); bad == nil {
		return r, complain(fmt.Sprintf("write %d-%[1]d", port), "%q is one port where a range belongs", s)
	}
	text := err.Error()
	at := strings.LastIndex(text, ": ") // the value itself may hold one
	return r, &complaint{text[:at], text[at+2:]}
}

// parseName keeps '/' out: the command line writes a backend as service/backend.
func parseName(s string) (string, *complaint) { return parseWord(s, maxName) }

func parseNode(s string) (string, *complaint) { return parseWord(s, maxNode) }

func parseWord(s string, most int) (string, *complaint) {
	const remedy = "use letters, digits, '.', '_' and '-'"
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-", r)
	}
	switch at := strings.IndexFunc(s, func(r rune) bool { return !plain(r) }); {
	case s == "":
		return "", complain(remedy, "the name is empty")
	case at >= 0:
		return "", complain(remedy, "%q holds %q", s, []rune(s[at:])[0])
	case s[0] == '-':
		return "", complain("begin it with a letter or digit", "%q begins as a flag of the command line does", s)
	case len(s) > most:
		return "", complain(fmt.Sprintf("take %d or fewer", most), "the name has %d bytes", len(s))
	}
	return s, nil
}

// parseInterface follows the kernel's dev_valid_name (net/core/dev.c).
func parseInterface(s string) (string, *complaint) {
	switch {
	case s == "", s == ".", s == "..", strings.ContainsAny(s, "/:"), strings.ContainsFunc(s, unicode.IsSpace):
		return "", complain("write it as ip link shows it", "%q is not an interface's name", s)
	case len(s) > maxInterface:
		return "", complain("write it as ip link shows it", "interface name %q is longer than %d bytes", s, maxInterface)
	}
	return s, nil
}

// parsePath reads an absolute path; a final slash is taken off.
func parsePath(s string) (string, *complaint) {
	if !path.IsAbs(s) {
		return "", complain("begin it with /", "%q is not an absolute path", s)
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		return "", complain("write it in one line, without such", "%q holds a control character", s)
	}
	clean := path.Clean(s)
	if clean != s && clean+"/" != s || clean == "/" {
		return "", complain("write it without '.', '..' and empty parts", "%q is not a plain path to a directory or file", s)
	}
	return clean, nil
}

const bpffs = "/sys/fs/bpf"

func parsePinPath(s string) (string, *complaint) {
	s, bad := parsePath(s)
	if bad != nil {
		return "", bad
	}
	if s == bpffs {
		return "", complain("take a directory in it, as "+defaultPinPath, "%s is the whole file system", s)
	}
	inside, found := strings.CutPrefix(s, bpffs+"/")
	if !found {
		inside = path.Base(s) // mounted elsewhere, who knows where; the last part is certainly inside
	}
	if strings.Contains(inside, ".") {
		return "", complain("use '_' or '-' instead", "%q holds a dot, which names in a bpffs may not", inside)
	}
	return s, nil
}

func parseSocket(s string) (string, *complaint) {
	clean, bad := parsePath(s)
	if bad == nil && len(clean) > maxSocketPath {
		bad = complain("take a shorter path", "a unix socket's path of %d bytes is over the limit of %d", len(clean),
			maxSocketPath)
	}
	if bad == nil && clean != s {
		bad = complain("write "+clean, "%q names a directory, not a socket", s)
	}
	return clean, bad
}

func parseHTTP(s string) (netip.AddrPort, *complaint) {
	if s == "" {
		return netip.AddrPort{}, nil
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		remedy := "write an address and a port, as in " + defaultHTTP.String()
		if port, found := strings.CutPrefix(s, ":"); found && isDigits(port) {
			remedy = fmt.Sprintf("write [::]:%s for every address, 127.0.0.1:%[1]s for this host alone", port)
		}
		return ap, complain(remedy, "%q is not an IP address with a port", s)
	}
	return ap, nil
}

// parseHealthPath asks for what can stand in a request line as it is (RFC 9112, section 3.2.1).
func parseHealthPath(s string) (string, *complaint) {
	switch {
	case !strings.HasPrefix(s, "/"):
		return "", complain("begin it with /", "%q is not a path", s)
	case strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '#' }):
		return "", complain("write it percent-encoded", "%q holds what a request can't", s)
	case len(s) > maxHealthPath:
		return "", complain("take a shorter path", "a path of %d bytes is over the limit of %d", len(s), maxHealthPath)
	}
	return s, nil
}

// percent reads a whole number with or without its sign.
func (c *checker) percent(t text, def, most uint32) uint32 {
	if t.state == given && isDigits(strings.TrimSuffix(t.value, "%")) {
		t.value = strings.TrimSuffix(t.value, "%")
	}
	return c.number(t, def, 0, most)
}

func (c *checker) boolean(t text, def bool) bool {
	return scalar(c, t, def, func(s string) (bool, *complaint) {
		if s != "true" && s != "false" {
			return false, complain("take one of these", "%q is not one of true, false", s)
		}
		return s == "true", nil
	})
}

// parseHost asks for what can stand in a request's Host field (RFC 9110, section 7.2).
func parseHost(s string) (string, *complaint) {
	const remedy = "write it as chat.example, 192.0.2.10 or [2001:db8::10], with or without :8080 after it"
	name, port, found := s, "", false
	if at := strings.LastIndexByte(s, ':'); at > strings.LastIndexByte(s, ']') {
		name, port, found = s[:at], s[at+1:], true
	}
	if _, err := netip.ParseAddr(s); err == nil && strings.Contains(s, ":") {
		return "", complain(fmt.Sprintf("write [%s]", s), "%q is an IPv6 address without brackets", s)
	}
	if found {
		if _, bad := parsePortField(port); bad != nil {
			return "", bad
		}
	}
	if inside, bracketed := strings.CutPrefix(name, "["); bracketed {
		inside, closed := strings.CutSuffix(inside, "]")
		if a, err := netip.ParseAddr(inside); !closed || err != nil || !a.Is6() || a.Zone() != "" {
			return "", complain(remedy, "%q is not a host with or without a port", s)
		}
		return s, nil
	}
	if a, err := netip.ParseAddr(name); err == nil && a.Is4() {
		return s, nil
	}
	if !isHostName(name) {
		return "", complain(remedy, "%q is not a host with or without a port", s)
	}
	return s, nil
}

// nameIn returns the name in a host that parseHost took, or "" for an address.
func nameIn(host string) string {
	name, _, _ := strings.Cut(host, ":")
	if !isHostName(name) {
		return ""
	}
	return name
}

// parseServerName asks for a name: an address can't be asked for (RFC 6066, section 3).
func parseServerName(s string) (string, *complaint) {
	if isHostName(s) {
		return s, nil
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return "", complain("take it out: the address that is asked is verified without it",
			"%q is an address, not a host's name", s)
	}
	return "", complain("write it as chat.example", "%q is not a host's name", s)
}

// isHostName follows RFC 1123, section 2.1, but allows the '_' that some hosts have. What ends in a number is an address
// or nothing (WHATWG URL, section 3.5).
func isHostName(s string) bool {
	if len(s) > maxHostName {
		return false
	}
	labels := strings.Split(s, ".")
	for _, label := range labels {
		plain := func(r rune) bool {
			return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '_'
		}
		if label == "" || len(label) > maxName || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.ContainsFunc(label, func(r rune) bool { return !plain(r) }) {
			return false
		}
	}
	return !isDigits(labels[len(labels)-1])
}

// parseHeaderName asks for a token (RFC 9110, section 5.6.2), and returns it as net/http spells it.
func parseHeaderName(s string) (string, *complaint) {
	token := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	}
	const remedy = "write it as X-Fairlead-State"
	switch {
	case s == "":
		return "", complain(remedy, "the name is empty")
	case strings.ContainsFunc(s, func(r rune) bool { return !token(r) }):
		return "", complain(remedy, "%q is not a header's name", s)
	case len(s) > maxHeaderName:
		return "", complain(fmt.Sprintf("take %d or fewer", maxHeaderName), "the name has %d bytes", len(s))
	}
	return textproto.CanonicalMIMEHeaderKey(s), nil
}

// parseStatus reads one status or a range.
func parseStatus(s string) (StatusRange, *complaint) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	status := func(s string) (int, bool) {
		n, err := strconv.Atoi(s)
		return n, err == nil && isDigits(s) && len(s) == 3 && minStatus <= n && n <= maxStatus
	}
	a, okA := status(first)
	b, okB := status(last)
	switch {
	case !okA || !okB:
		return StatusRange{}, complain(fmt.Sprintf("take a number from %d to %d, or two, as in 200-399", minStatus, maxStatus),
			"%q is not a status or a range of them", s)
	case a > b:
		return StatusRange{}, complain(fmt.Sprintf("write %d-%d", b, a), "%q ends before it begins", s)
	}
	return StatusRange{a, b}, nil
}

// parseArgument takes anything that exec can hand on.
func parseArgument(s string) (string, *complaint) {
	if strings.Contains(s, "\x00") {
		return "", complain("take it out", "%q holds a NUL", s)
	}
	return s, nil
}
