package main

import (
	"fmt"
	"math"
	"net/netip"
	"os/signal"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
	"fairlead/loader"
)

// decapStartFlags go with a start alone.
var decapStartFlags = []string{"address", "source", "gue-port", "xdp"}

func decapCommand() *cli.Command {
	return &cli.Command{
		Name:  "decap",
		Usage: "open ipip and gue on a backend that has no device for them",
		Description: "Opens what comes in a tunnel to an address of the interface (4in4, 6in4, 4in6, 6in6, GUE variant 1) and hands\n" +
			"the inner packet to the host's stack. Everything else passes untouched. It runs until SIGINT or SIGTERM, to keep\n" +
			"the addresses current; packets are opened on when it ends. Started again, it takes over without a loss;\n" +
			"--remove takes it away.\n\n" +
			"What a backend needs besides:\n" +
			"- room: the outer packet is longer than the client's by 20 bytes over IPv4 and 40 over IPv6, by 8 more with gue.\n" +
			"  The interface must take it: ip link set dev IF mtu 1548, say, or the forwarder asks clients for smaller ones.\n" +
			"- the service's address, held where nobody asks for it: ip address add 192.0.2.10/32 dev lo\n" +
			"- silence about it: sysctl net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2\n" +
			"- no strict rp_filter where the way back to clients leaves by another interface. The larger of all and IF counts,\n" +
			"  2 is loose: sysctl net.ipv4.conf.all.rp_filter=2\n" +
			"Whoever reaches the addresses can send inner packets from any source: name the forwarders by --source.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "interface", Usage: "open what comes in by `IF`"},
			&cli.StringSliceFlag{Name: "address", Usage: "open what is sent to `ADDRESS`; repeatable",
				DefaultText: "all addresses of the interface, as they change"},
			&cli.StringSliceFlag{Name: "source", Usage: "open what is sent from `PREFIX` alone; repeatable",
				DefaultText: "from anywhere"},
			&cli.UintFlag{Name: "gue-port", Usage: "GUE comes to UDP port `PORT`", Value: uint(bpf.DecapLimitsGUE_PORT)},
			&cli.StringFlag{Name: "xdp", Usage: "attach in `MODE`: auto, native, generic", Value: string(loader.ModeAuto)},
			&cli.StringFlag{Name: "pin-path", Usage: "keep the pins in `DIRECTORY`",
				DefaultText: loader.DecapPinPath("IF")},
			&cli.BoolFlag{Name: "remove", Usage: "detach the program, remove the pins"},
			&cli.BoolFlag{Name: "status", Usage: "show what is attached and what it has done"},
			&cli.StringFlag{Name: "log-level", Value: "info", Usage: "log from `LEVEL` up: debug, info, warn, error"},
			&cli.StringFlag{Name: "log-format", Value: "text", Usage: "log as `FORMAT`: text, json"},
			outputFlag(),
		},
		Action: decap,
	}
}

func decap(c *cli.Context) error {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	name := c.String("interface")
	if name == "" {
		return wrongUsage("decap: on which interface? --interface IF")
	}
	path := c.String("pin-path")
	if path == "" {
		path = loader.DecapPinPath(name)
	}
	remove, status := c.Bool("remove"), c.Bool("status")
	if remove && status {
		return wrongUsage("decap: --remove or --status, not both")
	}
	if remove || status {
		if i := slices.IndexFunc(decapStartFlags, c.IsSet); i >= 0 {
			return wrongUsage("decap: --%s goes with a start, not with --remove or --status", decapStartFlags[i])
		}
	}
	switch {
	case remove:
		return decapRemove(c, path)
	case status:
		return decapStatus(c, path)
	}
	return decapRun(c, name, path)
}

func decapRun(c *cli.Context, name, path string) error {
	logger, err := newLogger(c)
	if err != nil {
		return err
	}
	options := loader.DecapOptions{Interface: name, PinPath: path, Mode: loader.XDPMode(c.String("xdp")), Logger: logger}
	modes := []loader.XDPMode{loader.ModeAuto, loader.ModeNative, loader.ModeGeneric}
	if !slices.Contains(modes, options.Mode) {
		return wrongUsage("--xdp %q: one of auto, native, generic", options.Mode)
	}
	port := c.Uint("gue-port")
	if port == 0 || port > math.MaxUint16 {
		return wrongUsage("--gue-port %d: not a port, 1 to %d", port, math.MaxUint16)
	}
	options.GUEPort = uint16(port)
	for _, text := range c.StringSlice("address") {
		address, err := netip.ParseAddr(text)
		if err != nil || address.IsUnspecified() || address.IsMulticast() {
			return wrongUsage("--address %q: not an address that a host has", text)
		}
		options.Addresses = append(options.Addresses, address)
	}
	for _, text := range c.StringSlice("source") {
		source, err := parseSource(text)
		if err != nil {
			return err
		}
		options.Sources = append(options.Sources, source)
	}

	ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
	defer stop()
	d, err := loader.AttachDecap(options)
	if err != nil {
		return err
	}
	defer d.Close()
	logger.Info("decap is ready", "interface", name, "mode", d.Attachment().Mode, "addresses", d.Addresses(),
		"sources", options.Sources, "gue_port", options.GUEPort)
	if err := d.Run(ctx); err != nil {
		return err
	}
	logger.Info("decap stopped, and stays attached: packets are opened on without it", "interface", name,
		"remove", decapAgain(c, name)+" --remove")
	return nil
}

// decapAgain is the command line that finds the same pins.
func decapAgain(c *cli.Context, name string) string {
	line := "fairlead decap --interface " + name
	if path := c.String("pin-path"); path != "" {
		line += " --pin-path " + path
	}
	return line
}

// parseSource reads ADDRESS/LENGTH, or an address alone.
func parseSource(text string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil && address.Zone() == "" && !address.Is4In6() {
		return netip.PrefixFrom(address, address.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil || prefix.Addr().Is4In6() {
		return prefix, wrongUsage("--source %q: not a prefix, as 10.0.0.0/24 or 2001:db8::/64", text)
	}
	if prefix != prefix.Masked() {
		return prefix, wrongUsage("--source %s: bits are set behind its length: is it %v?", text, prefix.Masked())
	}
	return prefix, nil
}

func decapRemove(c *cli.Context, path string) error {
	removed, failed := loader.RemoveDecap(path)
	if isJSON(c) {
		l := newList[string](c.App.Writer, formatOf(c))
		for _, pin := range removed {
			if err := l.add(pin); err != nil {
				return err
			}
		}
		if err := l.end(); err != nil {
			return err
		}
		return failed
	}
	for _, pin := range removed {
		fmt.Fprintln(c.App.Writer, "removed", pin)
	}
	return failed
}

// decapReport is all that decap --status shows.
type decapReport struct {
	PinPath   string          `json:"pin_path"`
	Process   daemonStatus    `json:"process"`
	Interface interfaceStatus `json:"interface"`
	Addresses []netip.Addr    `json:"addresses"`
	Sources   []netip.Prefix  `json:"sources"`            // none: from anywhere
	GUEPort   uint16          `json:"gue_port,omitempty"` // absent: it takes CAP_SYS_ADMIN
	Verdicts  []counterStatus `json:"verdicts"`           // as events, those that are not zero; all with -o wide
	Events    []counterStatus `json:"events"`
}

func decapStatus(c *cli.Context, path string) error {
	s, err := loader.ReadDecap(path)
	if err != nil {
		return err
	}
	at := s.Attachment
	wide := formatOf(c) == formatWide
	r := &decapReport{
		PinPath:   s.PinPath,
		Process:   daemonStatus{Running: s.PID != 0, PID: s.PID},
		Interface: interfaceOf(&at),
		Addresses: append([]netip.Addr{}, s.Addresses...), Sources: append([]netip.Prefix{}, s.Sources...), GUEPort: s.GUEPort,
		Verdicts: decapCounters(s.Verdicts, wide), Events: decapCounters(s.Events, wide),
	}
	if isJSON(c) {
		return object(c, r)
	}
	p := &statusPrinter{w: c.App.Writer}
	p.decap(r)
	return p.err
}

func decapCounters(all []loader.DecapCounter, zero bool) []counterStatus {
	list := []counterStatus{}
	for _, counter := range all {
		if counter.Count != 0 || zero {
			list = append(list, counterStatus{Name: counter.Name, Count: counter.Count})
		}
	}
	return list
}

func (p *statusPrinter) decap(r *decapReport) {
	process := "not running: packets are opened on without it, the addresses stay as they were"
	if r.Process.Running {
		process = fmt.Sprintf("running, pid %d", r.Process.PID)
	}
	mode := r.Interface.Mode
	switch {
	case r.Interface.Index == 0:
		mode = "gone"
	case mode == "":
		mode = "unknown"
	}
	p.line("decap on %s (%s), program %d, link %d, pins in %s", r.Interface.Name, mode, r.Interface.Program,
		r.Interface.Link, r.PinPath)
	port := "not to be known without CAP_SYS_ADMIN"
	if r.GUEPort != 0 {
		port = strconv.Itoa(int(r.GUEPort))
	}
	p.line("process    %s", process)
	p.line("addresses  %s", listed(r.Addresses, "none: nothing is opened"))
	p.line("sources    %s", listed(r.Sources, "from anywhere"))
	p.line("gue port   %s", port)
	p.counters("VERDICTS", r.Verdicts)
	p.counters("EVENTS", r.Events)
}

func listed[T fmt.Stringer](items []T, none string) string {
	if len(items) == 0 {
		return none
	}
	var texts []string
	for _, item := range items {
		texts = append(texts, item.String())
	}
	return strings.Join(texts, ", ")
}
