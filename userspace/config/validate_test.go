package config

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// service returns a good file whose service has extra, a line of its own, as line 6.
func service(extra string) string {
	return "# line 1\nservices:\n- name: chat\n  address: 192.0.2.10\n  port: 443\n  " + extra +
		"\n  backends:\n  - {name: ws1, address: 10.0.0.11}\n  - {name: ws2, address: 10.0.0.12}\n"
}

// with returns a good file whose second backend, in line 9, is backend.
func with(extra, backend string) string {
	return strings.Replace(service(extra), "{name: ws2, address: 10.0.0.12}", backend, 1)
}

// at returns a good file whose service has address in line 4.
func at(address string) string {
	return strings.Replace(service("method: ipip"), "192.0.2.10", address, 1)
}

// two returns a file with a second service, in line 10, that adds or replaces first's fields.
func two(first, second string) string {
	return service(first) + "- {" + second + ", backends: [{name: b, address: 10.0.0.20}]}\n"
}

func backends(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "  - {name: b%d, address: 10.%d.%d.%d}\n", i, i>>16, i>>8&255, i&255)
	}
	return b.String()
}

func sources(n int) []string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("10.1.0.%d", i))
	}
	return list
}

func services(n, each int) string {
	var b strings.Builder
	b.WriteString("services:\n")
	for i := range n {
		fmt.Fprintf(&b, "- name: s%d\n  address: 192.0.%d.%d\n  port: 80\n  ring_size: 2000003\n  backends:\n%s", i, i>>8, i&255, backends(each))
	}
	return b.String()
}

// refused returns the first line of every error of text, without the file's name.
func refused(text string) []string {
	_, err := parse("edge.yaml", []byte(text), testHost)
	var all Errors
	errors.As(err, &all)
	lines := []string{}
	for _, e := range all {
		first, _, _ := strings.Cut(e.Error(), "\n")
		lines = append(lines, strings.TrimPrefix(first, "edge.yaml:"))
	}
	return lines
}

func TestRefusals(t *testing.T) {
	tests := []struct {
		name, text string
		want       string // line, field and part of the text
	}{
		// the file
		{"empty file", "", "1: the file holds nothing: write the services"},
		{"comment alone", "# nothing\n", "1: the file holds nothing"},
		{"null", "null\n", "1: the file holds nothing"},
		{"list at the top", "- a\n", "1: is a list where fields belong: write node:"},
		{"two documents", "node: a\n---\nnode: b\n", "3: a second document"},
		{"directive", "%TAG ! tag:a\n---\nnode: a\n", "1: YAML directives are not understood"},
		{"not UTF-8", "node: a\n# \xff\n", "2: the line is not UTF-8"},
		{"control character", "node: a\n\x01\n", "2: the line holds the control character U+0001"},
		{"tab", "dataplane:\n\tmode: xdp\n", "2: found character"},
		{"bracket", "node: a\nservices: [\n", "2: sequence end token ']' not found: close the bracket"},
		{"bare ::", "services:\n- name: a\n  address: 2001:db8::\n", "3: mapping value is not allowed in this context: correct the indentation, or quote"},
		{"too deep", strings.Repeat("[", 40), "1: values are nested too deep"},
		{"too deep by dashes", strings.Repeat("- ", 40), "1: values are nested too deep"},
		{"alias without anchor", "node: *n\n", "1: node: alias *n has no anchor before it"},
		{"alias before its anchor", "node: *n\nstate_dir: &n /a\n", "1: node: alias *n has no anchor before it"},
		{"anchor twice", "node: &n a\nstate_dir: &n /a\n", "2: anchor \"n\" is defined in line 1 already"},
		{"merge of a scalar", "node: &n a\ncontrol:\n  <<: *n\n", "3: control: only mappings can be merged"},
		{"merge into itself", "control: &n\n  <<: *n\n", "2: control: merges are nested too deep"},
		{"aliases without end", "services:\n- &s\n  name: a\n  address: 192.0.2.1\n  port: 1\n  backends: [&b {name: a, address: 10.0.0.1}" + strings.Repeat(", *b", 2000) + "]\n" + strings.Repeat("- *s\n", 1000), "6: services[209].backends[842].name: the file holds too many values"},
		{"tag", "node: !!str a\n", "1: node: tag !!str is not understood"},
		{"list for one value", "node: [a]\n", "1: node: is a list where one value belongs"},
		{"mapping for one value", "node:\n  a: b\n", "2: node: is a mapping where one value belongs"},
		{"value for a mapping", "dataplane: xdp\n", "1: dataplane: is a single value where fields belong: write mode:"},
		{"value for a list", service("source_addresses: 10.0.0.1"), "6: services[0].source_addresses: is a single value where a list belongs: write it in [ ]"},
		{"unknown field", "node: a\ndataplan: {}\n", "2: dataplan: unknown field: did you mean dataplane?"},
		{"unknown field far off", "control:\n  colour: red\n", "2: control.colour: unknown field: take one of socket, http"},
		{"unknown field with a dash", service("idle-timeout: 1h"), "6: services[0].idle-timeout: unknown field: did you mean idle_timeout?"},
		{"unknown field of a backend", with("", "{name: ws2, address: 10.0.0.12, wieght: 1}"), "9: services[0].backends[1].wieght: unknown field: did you mean weight?"},
		{"field twice", service("port: 80"), "6: services[0].port: is given in line 5 already: keep one"},
		{"no value", service("method:"), "6: services[0].method: has no value"},

		// node, dataplane, control
		{"node", "node: a/b\n", "1: node: \"a/b\" holds '/': use letters"},
		{"node empty", "node: ''\n", "1: node: the name is empty"},
		{"mode", "dataplane: {mode: user-space}\n", "1: dataplane.mode: \"user-space\" is not one of auto, xdp, userspace"},
		{"mode near", "dataplane: {mode: XDP}\n", "1: dataplane.mode: \"XDP\" is not one of auto, xdp, userspace: did you mean xdp?"},
		{"xdp", "dataplane:\n  xdp: skb\n", "2: dataplane.xdp: \"skb\" is not one of auto, native, generic"},
		{"connections too few", "dataplane: {connections: 1023}\n", "1: dataplane.connections: 1023 is too small: take a whole number from 1024 to 67108864"},
		{"connections too many", "dataplane: {connections: 67108865}\n", "1: dataplane.connections: 67108865 is too large"},
		{"connections far too many", "dataplane: {connections: 99999999999999999999999}\n", "1: dataplane.connections: 99999999999999999999999 is too large"},
		{"connections not a number", "dataplane: {connections: 1M}\n", "1: dataplane.connections: \"1M\" is not a plain decimal number"},
		{"connections octal", "dataplane: {connections: 0200000}\n", "1: dataplane.connections: \"0200000\" is not a plain decimal number"},
		{"connections hex", "dataplane: {connections: 0x10000}\n", "1: dataplane.connections: \"0x10000\" is not a plain decimal number"},
		{"half_open", "dataplane: {half_open: 12}\n", "1: dataplane.half_open: 12 is too small"},
		{"pin_path relative", "dataplane: {pin_path: fairlead}\n", "1: dataplane.pin_path: \"fairlead\" is not an absolute path"},
		{"pin_path with a dot", "dataplane: {pin_path: /sys/fs/bpf/fair.lead/a}\n", "1: dataplane.pin_path: \"fair.lead/a\" holds a dot"},
		{"pin_path elsewhere with a dot", "dataplane: {pin_path: /run/a.b/fair.lead}\n", "1: dataplane.pin_path: \"fair.lead\" holds a dot"},
		{"pin_path with ..", "dataplane: {pin_path: /sys/fs/bpf/../a}\n", "1: dataplane.pin_path: \"/sys/fs/bpf/../a\" is not a plain path"},
		{"pin_path all", "dataplane: {pin_path: /sys/fs/bpf/}\n", "1: dataplane.pin_path: /sys/fs/bpf is the whole file system"},
		{"epoch short", "dataplane: {epoch: 99ms}\n", "1: dataplane.epoch: 99ms is too short: take a duration from 100ms to 10s"},
		{"epoch long", "dataplane: {epoch: 11s}\n", "1: dataplane.epoch: 11s is too long"},
		{"interface long", "dataplane: {interfaces: [eth0, abcdefghijklmnop]}\n", "1: dataplane.interfaces[1]: interface name \"abcdefghijklmnop\" is longer than 15 bytes"},
		{"interface slash", "dataplane:\n  interfaces:\n  - a/b\n", "3: dataplane.interfaces[0]: \"a/b\" is not an interface's name"},
		{"interface empty", "dataplane:\n  interfaces:\n  - eth0\n  -\n", "4: dataplane.interfaces[1]: has no value"},
		{"interface twice", "dataplane:\n  interfaces:\n  - eth0\n  - eth0\n", "4: dataplane.interfaces[1]: interface eth0 is named already"},
		{"state_dir", "state_dir: lib\n", "1: state_dir: \"lib\" is not an absolute path"},
		{"state_dir of two lines", "state_dir: |\n  /a\n  b\n", "1: state_dir: \"/a\\nb\\n\" holds a control character"},
		{"state_dir root", "state_dir: /\n", "1: state_dir: \"/\" is not a plain path"},
		{"socket relative", "control: {socket: a.sock}\n", "1: control.socket: \"a.sock\" is not an absolute path"},
		{"socket long", "control: {socket: /" + strings.Repeat("a", 107) + "}\n", "1: control.socket: a unix socket's path of 108 bytes is over the limit of 107"},
		{"socket a directory", "control: {socket: /run/}\n", "1: control.socket: \"/run/\" names a directory"},
		{"http name", "control: {http: 'localhost:80'}\n", "1: control.http: \"localhost:80\" is not an IP address with a port"},
		{"http port alone", "control: {http: ':9870'}\n", "1: control.http: \":9870\" is not an IP address with a port: write [::]:9870 for every address"},

		// services: who they are
		{"service empty", "services:\n- name: a\n  address: 192.0.2.1\n  port: 1\n  backends: [{name: a, address: 10.0.0.1}]\n-\n", "6: services[1]: the item is empty"},
		{"name missing", "services:\n- address: 192.0.2.1\n  port: 1\n  backends: [{name: a, address: 10.0.0.1}]\n", "2: services[0].name: is missing: write name:"},
		{"address missing", "services:\n- name: a\n  port: 1\n  backends: [{name: a, address: 10.0.0.1}]\n", "2: services[0].address: is missing"},
		{"port missing", "services:\n\n- name: a\n  address: 192.0.2.1\n  backends: [{name: a, address: 10.0.0.1}]\n", "3: services[0].port: is missing"},
		{"name with a slash", strings.Replace(service(""), "chat", "a/b", 1), "3: services[0].name: \"a/b\" holds '/'"},
		{"name with a letter of elsewhere", strings.Replace(service(""), "chat", "bücher", 1), "3: services[0].name: \"bücher\" holds 'ü'"},
		{"name like a flag", strings.Replace(service(""), "chat", "-chat", 1), "3: services[0].name: \"-chat\" begins as a flag"},
		{"name long", strings.Replace(service(""), "chat", strings.Repeat("a", 64), 1), "3: services[0].name: the name has 64 bytes: take 63"},
		{"name empty", strings.Replace(service(""), "chat", "''", 1), "3: services[0].name: the name is empty"},
		{"name twice", two("", "name: chat, address: 192.0.2.10, port: 80"), "10: services[1].name: service chat stands in line 3 already"},
		{"address, port, protocol twice", two("", "name: web, address: 192.0.2.10, port: 443"), "10: services[1].address: 192.0.2.10:443 tcp is service chat of line 3 already"},
		{"port zero", strings.Replace(service(""), "443", "0", 1), "5: services[0].port: \"0\" is not a port"},
		{"port large", strings.Replace(service(""), "443", "65536", 1), "5: services[0].port: \"65536\" is not a port"},
		{"protocol", service("protocol: sctp"), "6: services[0].protocol: \"sctp\" is not one of tcp, udp"},
		{"method", service("method: fulnat"), "6: services[0].method: \"fulnat\" is not one of fullnat, nat, dsr, ipip, gue: did you mean fullnat?"},
		{"affinity", service("affinity: none"), "6: services[0].affinity: \"none\" is not one of connection, client"},
		{"on_backend_down", service("on_backend_down: drop"), "6: services[0].on_backend_down: \"drop\" is not one of reset, keep, rehash"},
		{"announce", service("announce: on"), "6: services[0].announce: \"on\" is not one of auto, off"},
		{"too many services", services(maxServices+1, 1), "2: services: 4097 services are over the limit of 4096"},

		// addresses
		{"not an address", at("chat.example"), "4: services[0].address: \"chat.example\" is not an IP address"},
		{"network", at("192.0.2.0/24"), "4: services[0].address: \"192.0.2.0/24\" is a network: write 192.0.2.0"},
		{"address with port", at("192.0.2.1:80"), "4: services[0].address: \"192.0.2.1:80\" is an address with a port"},
		{"multicast", at("224.0.0.1"), "4: services[0].address: 224.0.0.1 is a multicast address"},
		{"multicast 6", at("ff02::1"), "4: services[0].address: ff02::1 is a multicast address"},
		{"unspecified", at("0.0.0.0"), "4: services[0].address: 0.0.0.0 is the unspecified address: write the address itself"},
		{"unspecified 6", at("'::'"), "4: services[0].address: :: is the unspecified address"},
		{"v4-mapped", at("::ffff:192.0.2.1"), "4: services[0].address: ::ffff:192.0.2.1 is an IPv4 address mapped into IPv6: write 192.0.2.1"},
		{"link-local", at("fe80::1"), "4: services[0].address: fe80::1 is a link-local address without an interface: add its interface, as in fe80::1%eth0"},
		{"link-local 4", at("169.254.1.1"), "4: services[0].address: 169.254.1.1 is a link-local IPv4 address"},
		{"zone of a bad name", at("fe80::1%a/b"), "4: services[0].address: \"a/b\" is not an interface's name"},
		{"zone of a global address", at("2001:db8::1%eth0"), "4: services[0].address: 2001:db8::1%eth0 names an interface, which only link-local"},
		{"loopback", at("127.0.0.1"), "4: services[0].address: 127.0.0.1 is a loopback address"},
		{"loopback 6", at("::1"), "4: services[0].address: ::1 is a loopback address"},
		{"broadcast", at("255.255.255.255"), "4: services[0].address: 255.255.255.255 is the broadcast address"},
		{"backend multicast", with("", "{name: ws2, address: 239.1.1.1}"), "9: services[0].backends[1].address: 239.1.1.1 is a multicast address"},
		{"source unspecified", service("source_addresses: [0.0.0.0]"), "6: services[0].source_addresses[0]: 0.0.0.0 is the unspecified address"},

		// ring, times, health
		{"ring not prime", service("ring_size: 65536"), "6: services[0].ring_size: 65536 is not a prime: take a prime, as 65537"},
		{"ring too small", service("ring_size: 199"), "6: services[0].ring_size: a ring of 199 slots is too small for 2 backends: take a prime of at least 100 slots a backend, as 211"},
		{"default ring too small", "services:\n- name: a\n  address: 192.0.2.1\n  port: 1\n  backends:\n" + backends(656), "2: services[0].ring_size: a ring of 65537 slots is too small for 656 backends"},
		{"ring too large", service("ring_size: 5000027"), "6: services[0].ring_size: 5000027 is too large"},
		{"ring negative", service("ring_size: -1"), "6: services[0].ring_size: \"-1\" is not a plain decimal number"},
		{"no ring is enough", "services:\n- name: a\n  address: 192.0.2.1\n  port: 1\n  backends:\n" + backends(50001), "2: services[0].ring_size: no ring is large enough for 50001 backends"},
		{"idle under four epochs", service("idle_timeout: 39s"), "6: services[0].idle_timeout: 39s is under four epochs of 10s: take 40s or more"},
		{"idle long", service("idle_timeout: 9000h"), "6: services[0].idle_timeout: 9000h0m0s is too long"},
		{"idle in days", service("idle_timeout: 7d"), "6: services[0].idle_timeout: \"7d\" is not a duration in h, m, s and ms: write 168h"},
		{"idle without unit", service("idle_timeout: 90"), "6: services[0].idle_timeout: \"90\" has no unit: write its unit, as in 90s"},
		{"idle negative", service("idle_timeout: -1h"), "6: services[0].idle_timeout: -1h0m0s is too short"},
		{"health without type", service("health: {interval: 1s}"), "6: services[0].health.type: is missing: write type: and one of tcp, http"},
		{"health type", service("health: {type: icmp}"), "6: services[0].health.type: \"icmp\" is not one of tcp, http, https, websocket, wss, exec, none"},
		{"health path for tcp", service("health: {type: tcp, path: /}"), "6: services[0].health.path: a check of type tcp takes no path"},
		{"health path relative", service("health: {type: http, path: a}"), "6: services[0].health.path: \"a\" is not a path"},
		{"health path with a space", service("health: {type: http, path: /a b}"), "6: services[0].health.path: \"/a b\" holds what a request can't"},
		{"health interval", service("health: {type: tcp, interval: 1ms}"), "6: services[0].health.interval: 1ms is too short"},
		{"health timeout over interval", service("health: {type: tcp, timeout: 3s}"), "6: services[0].health.timeout: 3s is longer than the interval of 2s"},
		{"health path long", service("health: {type: http, path: /" + strings.Repeat("a", 1024) + "}"), "6: services[0].health.path: a path of 1025 bytes is over"},
		{"health rise", service("health: {type: tcp, rise: 0}"), "6: services[0].health.rise: 0 is too small"},
		{"health fall", service("health: {type: tcp, fall: 1001}"), "6: services[0].health.fall: 1001 is too large"},
		{"backend's health", with("", "{name: ws2, address: 10.0.0.12, health: {path: /a}}"), "9: services[0].backends[1].health.path: a check of type none takes no path"},
		{"balance", service("balance: {mode: least}"), "6: services[0].balance.mode: \"least\" is not one of hash, load"},
		{"balance as a word", service("balance: load"), "6: services[0].balance: is a single value where fields belong: write mode:"},
		{"proxy_protocol", service("proxy_protocol: v3"), "6: services[0].proxy_protocol: \"v3\" is not one of none, v1, v2"},
		{"proxy_protocol by xdp", service("proxy_protocol: v2") + "dataplane: {mode: xdp}\n", "6: services[0].proxy_protocol: xdp can't write a PROXY header"},
		{"proxy_protocol v1 by udp", service("proxy_protocol: v1\n  protocol: udp"), "6: services[0].proxy_protocol: version 1 of the PROXY protocol does not know udp"},

		// backends
		{"no backends", "services:\n- name: a\n  address: 192.0.2.1\n  port: 1\n", "2: services[0].backends: the service has no backend: add a backend or remove the service"},
		{"empty backends", "services:\n- name: a\n  address: 192.0.2.1\n  port: 1\n  backends: []\n", "5: services[0].backends: the service has no backend"},
		{"null backends", "services:\n- name: a\n  address: 192.0.2.1\n  port: 1\n  backends:\n", "5: services[0].backends: the service has no backend"},
		{"backend empty", with("", ""), "9: services[0].backends[1]: the item is empty"},
		{"backend a word", with("", "10.0.0.12"), "9: services[0].backends[1]: is a single value where fields belong: write name:"},
		{"backend without name", with("", "{address: 10.0.0.12}"), "9: services[0].backends[1].name: is missing"},
		{"backend without address", with("", "{name: ws2}"), "9: services[0].backends[1].address: is missing"},
		{"backend name twice", with("", "{name: ws1, address: 10.0.0.12}"), "9: services[0].backends[1].name: backend ws1 stands in line 8 already"},
		{"backend name", with("", "{name: a/b, address: 10.0.0.12}"), "9: services[0].backends[1].name: \"a/b\" holds '/'"},
		{"backend twice", with("", "{name: ws2, address: 10.0.0.11}"), "9: services[0].backends[1].address: 10.0.0.11:443 is backend ws1 of line 8 already"},
		{"backend is a service", two("", "name: web, address: 10.0.0.12, port: 443"), "9: services[0].backends[1].address: 10.0.0.12:443 tcp is the address of service web, so that"},
		{"backend port", with("", "{name: ws2, address: 10.0.0.12, port: http}"), "9: services[0].backends[1].port: \"http\" is not a port"},
		{"weight large", with("", "{name: ws2, address: 10.0.0.12, weight: 1001}"), "9: services[0].backends[1].weight: 1001 is too large: take a whole number from 0 to 1000"},
		{"weight negative", with("", "{name: ws2, address: 10.0.0.12, weight: -1}"), "9: services[0].backends[1].weight: \"-1\" is not a plain decimal number"},
		{"weight fraction", with("", "{name: ws2, address: 10.0.0.12, weight: 0.5}"), "9: services[0].backends[1].weight: \"0.5\" is not a plain decimal number"},
		{"port under dsr", with("method: dsr", "{name: ws2, address: 10.0.0.12, port: 80}"), "9: services[0].backends[1].port: port 80 is not the service's port 443, and under dsr"},
		{"port under ipip", with("method: ipip", "{name: ws2, address: 10.0.0.12, port: 80}"), "9: services[0].backends[1].port: port 80 is not the service's port 443, and under ipip"},
		{"port under gue", with("method: gue", "{name: ws2, address: 10.0.0.12, port: 80}"), "9: services[0].backends[1].port: port 80 is not the service's port 443, and under gue"},
		{"family under fullnat", with("method: fullnat", "{name: ws2, address: '2001:db8::2'}"), "9: services[0].backends[1].address: 2001:db8::2 is IPv6, but clients come by IPv4, and fullnat can't cross"},
		{"family under nat", with("method: nat", "{name: ws2, address: '2001:db8::2'}"), "9: services[0].backends[1].address: 2001:db8::2 is IPv6, but clients come by IPv4, and nat can't cross"},
		{"family under dsr", with("method: dsr", "{name: ws2, address: '2001:db8::2'}"), "9: services[0].backends[1].address: 2001:db8::2 is IPv6, but clients come by IPv4, and dsr can't cross"},
		{"too many backends", services(3, 17000) + "- {name: z, address: 192.0.2.1, port: 1, ring_size: 2000003, backends: [" + strings.ReplaceAll(strings.ReplaceAll(backends(14536), "  - ", ""), "\n", ",\n ") + "]}\n",
			"2: services: 65536 backends altogether are over the limit of 65535"},

		// sources
		{"source under dsr", service("method: dsr\n  source_addresses: [10.0.0.1]"), "7: services[0].source_addresses: method dsr keeps the client's address"},
		{"source ports under nat", service("method: nat\n  source_ports: 1-2"), "7: services[0].source_ports: method nat keeps the client's port"},
		{"source family", service("source_addresses: ['2001:db8::1']"), "6: services[0].source_addresses[0]: 2001:db8::1 is IPv6, but the backends of an IPv4 service are IPv4: list IPv4 addresses"},
		{"source twice", service("source_addresses: [10.0.0.1, 10.0.0.1]"), "6: services[0].source_addresses[1]: 10.0.0.1 is listed already"},
		{"too many sources", service("source_addresses: [" + strings.Join(sources(17), ", ") + "]"), "6: services[0].source_addresses: 17 source addresses are over the limit of 16"},
		{"source ports one", service("source_ports: 5000"), "6: services[0].source_ports: \"5000\" is one port where a range belongs: write 5000-5000"},
		{"source ports reversed", service("source_ports: 10-5"), "6: services[0].source_ports: \"10-5\" ends before it begins: write 5-10"},
		{"source ports from zero", service("source_ports: 0-5"), "6: services[0].source_ports: \"0-5\" is not a range of ports"},
		{"source ports with a colon", service("source_ports: 'a: b'"), "6: services[0].source_ports: \"a: b\" is not a range of ports: write two, as in 1024-32767"},
		{"source ports over a service", service("source_addresses: [10.0.0.1, 192.0.2.10]\n  source_ports: 1-443"), "7: services[0].source_ports: ports 1-443 of 192.0.2.10 hold port 443 of service chat on that address"},
		{"source ports over another service", two("source_addresses: [192.0.2.99]\n  source_ports: 1024-9000", "name: web, address: 192.0.2.99, port: 8080"), "7: services[0].source_ports: ports 1024-9000 of 192.0.2.99 hold port 8080 of service web"},
		{"source ports differ", two("source_addresses: [10.0.0.1]\n  source_ports: 1024-9000", "name: web, address: 192.0.2.10, port: 80, source_addresses: [10.0.0.1]"), "11: services[1].source_addresses[0]: 10.0.0.1 has source ports by default here, but 1024-9000 in service chat"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := parse("edge.yaml", []byte(test.text), testHost)
			if err == nil {
				t.Fatalf("accepted:\n%.400s", test.text)
			}
			var all Errors
			if !errors.As(err, &all) {
				t.Fatalf("error is %T", err)
			}
			for _, e := range all {
				if strings.HasPrefix(e.Error(), "edge.yaml:"+test.want) {
					if len(all) > 1 {
						t.Errorf("more than that one error:\n%.2000v", err)
					}
					return
				}
			}
			t.Errorf("want edge.yaml:%s\ngot:\n%.2000v", test.want, err)
		})
	}
}

// TestAllAtOnce is what a person sees who got several things wrong, of every kind but YAML itself.
func TestAllAtOnce(t *testing.T) {
	_, err := parse("edge.yaml", []byte(`node: a b
dataplane:
  mod: xdp
  epoch: 1h
services:
- name: chat
  address: 224.0.0.1
  port: [443]
  ring_size: 100
  backends:
  - {name: a, address: 10.0.0.1, weight: 1, weight: 2}
- name: chat
  port: 80
`), testHost)
	var all Errors
	if !errors.As(err, &all) {
		t.Fatalf("error %v", err)
	}
	var got []string
	for _, e := range all {
		got = append(got, fmt.Sprintf("%d %s: %s", e.Line, e.Field, e.Problem))
	}
	want := []string{
		`1 node: "a b" holds ' '`,
		`3 dataplane.mod: unknown field`,
		`4 dataplane.epoch: 1h0m0s is too long`,
		`7 services[0].address: 224.0.0.1 is a multicast address`,
		`8 services[0].port: is a list where one value belongs`,
		`9 services[0].ring_size: 100 is not a prime`,
		`11 services[0].backends[0].weight: is given in line 11 already`,
		`12 services[1].address: is missing`,
		`12 services[1].backends: the service has no backend`,
		`12 services[1].name: service chat stands in line 6 already`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("errors (-want +got):\n%s", diff)
	}
}

// TestLinesStayRight puts what makes a parser lose count before an error.
func TestLinesStayRight(t *testing.T) {
	for name, before := range map[string]string{
		"comments":           "# a\n\n# b\n\n",
		"comment, indented":  "node: a\n    # b\n\n",
		"literal block":      "node: |\n  a b\n\n  c\n\n",
		"folded block":       "node: >-\n  a b\n\n\n  c\n\n\n",
		"quoted break":       "node: \"a\n\n  b\"\n",
		"single-quoted":      "node: 'a\n  b\n\n  c'\n",
		"plain over lines":   "node: a\n  b\n  c\n",
		"flow over lines":    "control: {\n  http: ,\n\n  # c\n}\n",
		"list over lines":    "services: [\n\n]\n",
		"windows":            "# a\r\nnode: |\r\n  a b\r\n\r\n",
		"old line ends":      "# a\rnode: b\r",
		"anchors and quotes": "node: &n\n  'it''s'\nstate_dir:\n  *n\n",
		"key on its own":     "? node\n: a\n",
		"document mark":      "---\n\n",
	} {
		lines := strings.Count(strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(before), "\n")
		_, err := parse("edge.yaml", []byte(before+"dataplane:\n  mode: no\n"), testHost)
		var all Errors
		if !errors.As(err, &all) {
			t.Errorf("%s: error %v", name, err)
			continue
		}
		last := all[len(all)-1]
		if last.Field != "dataplane.mode" || last.Line != lines+2 || last.Source != "  mode: no" || last.Column != 9 {
			t.Errorf("%s: want dataplane.mode in line %d, got line %d column %d:\n%v", name, lines+2, last.Line, last.Column, err)
		}
	}
}

// TestAccepted holds what stands close to a refusal and is right.
func TestAccepted(t *testing.T) {
	for name, text := range map[string]string{
		"families cross under ipip":     with("method: ipip", "{name: ws2, address: '2001:db8::2'}"),
		"families cross under gue":      with("method: gue", "{name: ws2, address: '2001:db8::2'}"),
		"the same port under dsr":       with("method: dsr", "{name: ws2, address: 10.0.0.12, port: 443}"),
		"another port under nat":        with("method: nat", "{name: ws2, address: 10.0.0.12, port: 80}"),
		"one address, two ports":        with("", "{name: ws2, address: 10.0.0.11, port: 80}"),
		"tcp and udp on one port":       two("", "name: web, address: 192.0.2.10, port: 443, protocol: udp"),
		"one backend of two services":   two("", "name: web, address: 192.0.2.10, port: 80"),
		"draining backend":              with("", "{name: ws2, address: 10.0.0.12, weight: 0}"),
		"exactly 100 slots a backend":   with("ring_size: 211", "{name: ws2, address: 10.0.0.12}"),
		"the largest ring":              service("ring_size: 5000011"),
		"exactly four epochs":           service("idle_timeout: 400ms") + "dataplane: {epoch: 100ms}\n",
		"link-local with interface":     strings.Replace(with("method: ipip", "{name: ws2, address: 10.0.0.12}"), "192.0.2.10", "fe80::1%eth0", 1),
		"loopback under userspace":      strings.Replace(service(""), "192.0.2.10", "127.0.0.1", 1) + "dataplane: {mode: userspace}\n",
		"source ports beside a service": service("source_addresses: [192.0.2.10]\n  source_ports: 444-65535"),
		"source ports under udp's":      two("source_addresses: [192.0.2.99]\n  source_ports: 1024-9000", "name: web, address: 192.0.2.99, port: 8080, protocol: udp"),
		"shared source, shared ports":   two("source_addresses: [10.0.0.1]\n  source_ports: 1-9", "name: web, address: 192.0.2.10, port: 80, source_ports: 1-9, source_addresses: [10.0.0.1]"),
		"16 sources":                    service("source_addresses: [" + strings.Join(sources(16), ", ") + "]"),
		"a trailing slash":              "state_dir: /var/lib/fairlead/\ndataplane: {pin_path: /sys/fs/bpf/fairlead/}\n",
		"a pin path below a dot":        "dataplane: {pin_path: /run/netns.d/fairlead}\n",
		"words of YAML 1.1":             service("announce: off"),
		"4096 services":                 services(maxServices, 1),
		"udp by every method": two("protocol: udp", "name: a, address: 192.0.2.10, port: 1, protocol: udp, method: nat") +
			"- {name: b, address: 192.0.2.10, port: 2, protocol: udp, method: dsr, backends: [{name: b, address: 10.0.0.20}]}\n" +
			"- {name: c, address: 192.0.2.10, port: 3, protocol: udp, method: ipip, backends: [{name: b, address: 10.0.0.20}]}\n" +
			"- {name: d, address: 192.0.2.10, port: 4, protocol: udp, method: gue, backends: [{name: b, address: 10.0.0.20}]}\n",
	} {
		if _, err := parse("edge.yaml", []byte(text), testHost); err != nil {
			t.Errorf("%s: %.2000v", name, err)
		}
	}
}

func TestUnsupported(t *testing.T) {
	cfg := mustParse(t, `
dataplane:
  mode: userspace
services:
- name: chat
  address: 192.0.2.10
  port: 443
  protocol: udp
  method: ipip
  balance:
    mode: load
  proxy_protocol: v2
  health: {type: http, port: 80}
  backends:
  - {name: a, address: 10.0.0.1}
  - name: b
    address: 10.0.0.2
    health:
      interval: 5s
  - {name: c, address: 10.0.0.3, health: {type: none}}
- {name: nat, address: 192.0.2.10, port: 1, method: nat, backends: [{name: a, address: 10.0.0.1}]}
- {name: gue, address: 192.0.2.10, port: 2, method: gue, backends: [{name: a, address: 10.0.0.1}]}
- {name: dsr, address: 192.0.2.10, port: 3, method: dsr, backends: [{name: a, address: 10.0.0.1}]}
- {name: dns, addresses: [192.0.2.10, 192.0.2.11], ports: [53, 5300-5400], protocol: udp, method: gue, tunnel_source: 10.9.0.0/24, backends: [{name: a, address: 10.0.0.1}]}
`)
	var got []string
	for _, err := range cfg.Unsupported() {
		text, _, _ := strings.Cut(err.Error(), "\n")
		got = append(got, text)
	}
	want := []string{
		"edge.yaml:3: dataplane.mode: mode userspace is not built yet in this version: use auto or xdp",
		"edge.yaml:11: services[0].balance.mode: service chat: balance mode load is not built yet in this version: use hash",
		"edge.yaml:12: services[0].proxy_protocol: service chat: proxy_protocol v2 is not built yet in this version: use none",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("unsupported (-want +got):\n%s", diff)
	}
	if errs := mustParse(t, service("")).Unsupported(); errs != nil {
		t.Errorf("a plain service: %v", errs)
	}
}
