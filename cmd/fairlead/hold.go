package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/userspace/config"
	"fairlead/userspace/daemon"
)

func holdCommand() *cli.Command {
	return &cli.Command{
		Name:  "hold",
		Usage: "until the daemon attaches, keep this host's stack from resetting connections to services",
		Description: "A host answers RST for a service's address that it holds itself and has no socket for: between boot and\n" +
			"attach that would end every connection that is to be kept. This attaches a small program that drops, and counts,\n" +
			"what is for services, and replies of backends; all else passes. `fairlead run` takes over in place. It needs no\n" +
			"daemon, and none stays behind. Called again, it changes what is held to what the configuration says now.\n\n" +
			"The interfaces are those of dataplane.interfaces. Where none is named, they are those with routes to backends and\n" +
			"default routes; where there are no routes yet, all Ethernet devices. An address that the host does not hold, and\n" +
			"one that is routed here, needs none of this.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "timeout", Value: 10 * time.Second, Usage: "wait for interfaces that are not there yet, for up to `DURATION`"},
			&cli.BoolFlag{Name: "dry-run", Usage: "show what would be held where, and the same for nftables; change nothing"},
			&cli.BoolFlag{Name: "status", Usage: "show what is held, and what was dropped"},
			&cli.StringFlag{Name: "log-level", Value: "warn", Usage: "log from `LEVEL` up: debug, info, warn, error"},
			&cli.StringFlag{Name: "log-format", Value: "text", Usage: "log as `FORMAT`: text, json"},
			outputFlag(),
		},
		Action: hold,
	}
}

// holdReport is all that hold shows.
type holdReport struct {
	PinPath    string          `json:"pin_path"`
	Interfaces []heldInterface `json:"interfaces"`
	Found      string          `json:"found,omitempty"` // how the interfaces were found
	Services   []heldPorts     `json:"services,omitempty"`
	Sources    []heldPorts     `json:"sources,omitempty"`
	Backends   []heldPorts     `json:"backends,omitempty"` // whose packets to these ports are held
	Entries    int             `json:"entries,omitempty"`
	Verdicts   []counterStatus `json:"verdicts,omitempty"`
	NFT        string          `json:"nft,omitempty"` // text for nft -f, where XDP can't be had
}

type heldInterface struct {
	Name    string `json:"name"`
	State   string `json:"state"` // held, attached (the data plane is), released, failed; to hold (a dry run)
	Mode    string `json:"mode,omitempty"`
	Program uint32 `json:"program_id,omitempty"`
	Link    uint32 `json:"link_id,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

type heldPorts struct {
	Address  netip.Addr `json:"address"`
	Port     uint16     `json:"port,omitempty"` // a backend's
	Protocol string     `json:"protocol"`
	First    uint16     `json:"first_port"`
	Last     uint16     `json:"last_port"`
}

func hold(c *cli.Context) error {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	wait := c.Duration("timeout")
	switch {
	case c.Bool("status") && (c.Bool("dry-run") || c.IsSet("timeout")):
		return wrongUsage("hold: --status goes without --dry-run and --timeout")
	case wait < 0:
		return wrongUsage("--timeout %v: not a time to wait", wait)
	}
	logger, err := newLogger(c)
	if err != nil {
		return err
	}
	cfg, err := config.Load(c.String("config"))
	if err != nil {
		return err
	}
	if c.Bool("status") {
		return holdStatus(c, cfg)
	}
	options, err := daemon.HoldOptions(cfg)
	if err != nil {
		return err
	}
	options.Logger = logger
	ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
	defer stop()
	if len(cfg.Services) == 0 {
		logger.Warn("the configuration has no services: nothing is dropped")
	}
	r := reportOf(options)
	if options.Interfaces, r.Found, err = daemon.HoldInterfaces(ctx, cfg, wait); err != nil {
		return err
	}
	if c.Bool("dry-run") {
		for _, name := range options.Interfaces {
			r.Interfaces = append(r.Interfaces, heldInterface{Name: name, State: "to hold"})
		}
		r.NFT = options.NFT(options.Interfaces)
		return printHold(c, r)
	}
	done, err := loader.Hold(options)
	if done != nil {
		r.add(done)
	}
	var failed []string
	if done != nil {
		for _, f := range done.Failed {
			failed = append(failed, f.Interface)
		}
	}
	if len(failed) > 0 {
		r.NFT = options.NFT(failed)
		err = errors.Join(err, fmt.Errorf("not held: %s: the host's stack resets connections that come in there until the daemon "+
			"attaches; nftables can drop the same (see above)", strings.Join(failed, ", ")))
	}
	if done == nil {
		return err
	}
	return errors.Join(printHold(c, r), err)
}

func reportOf(options loader.HoldOptions) *holdReport {
	r := &holdReport{PinPath: options.PinPath, Interfaces: []heldInterface{}}
	ports := func(list []loader.HeldPorts) (all []heldPorts) {
		for _, p := range list {
			all = append(all, heldPorts{Address: p.Address, Protocol: maps.ProtocolName(p.Protocol), First: p.First, Last: p.Last})
		}
		return all
	}
	r.Services, r.Sources = ports(options.Services), ports(options.Sources)
	for _, b := range options.Backends {
		r.Backends = append(r.Backends, heldPorts{Address: b.Address.Addr(), Port: b.Address.Port(),
			Protocol: maps.ProtocolName(b.Protocol), First: b.First, Last: b.Last})
	}
	return r
}

func (r *holdReport) add(done *loader.HoldReport) {
	for state, list := range map[string][]loader.Attachment{"held": done.Held, "attached": done.Attached, "released": done.Released} {
		for i := range list {
			r.Interfaces = append(r.Interfaces, heldInterfaceOf(&list[i], state))
		}
	}
	for _, f := range done.Failed {
		r.Interfaces = append(r.Interfaces, heldInterface{Name: f.Interface, State: "failed", Reason: f.Err.Error()})
	}
	slices.SortFunc(r.Interfaces, func(a, b heldInterface) int { return cmp.Compare(a.Name, b.Name) })
}

func heldInterfaceOf(at *loader.Attachment, state string) heldInterface {
	if at.Index == 0 {
		state = "gone"
	}
	return heldInterface{Name: at.Interface, State: state, Mode: string(at.Mode), Program: uint32(at.Program), Link: uint32(at.Link)}
}

func holdStatus(c *cli.Context, cfg *config.Config) error {
	s, err := loader.ReadHold(cfg.Dataplane.PinPath)
	if err != nil {
		return err
	}
	r := &holdReport{PinPath: s.PinPath, Interfaces: []heldInterface{}, Entries: s.Entries}
	for i := range s.Interfaces {
		r.Interfaces = append(r.Interfaces, heldInterfaceOf(&s.Interfaces[i], "held"))
	}
	for _, v := range s.Verdicts {
		r.Verdicts = append(r.Verdicts, counterStatus{Name: v.Name, Count: v.Count})
	}
	return printHold(c, r)
}

func printHold(c *cli.Context, r *holdReport) error {
	if isJSON(c) {
		return object(c, r)
	}
	p := &statusPrinter{w: c.App.Writer}
	for _, i := range r.Interfaces {
		mode := ""
		if i.Mode != "" {
			mode = fmt.Sprintf(" (%s), program %d, link %d", i.Mode, i.Program, i.Link)
		}
		what := i.State
		switch i.State {
		case "attached":
			what = "left as it is: the data plane is attached"
		case "failed":
			what = "NOT HELD: " + i.Reason
		case "released":
			what, mode = "no longer held: it is not asked for", ""
		}
		p.line("%s: %s%s", i.Name, what, mode)
	}
	if r.Found != "" {
		p.line("interfaces: %s", r.Found)
	}
	list := func(what string, all []heldPorts) {
		for _, h := range all {
			ports := fmt.Sprint(h.First)
			if h.Last != h.First {
				ports = fmt.Sprintf("%d-%d", h.First, h.Last)
			}
			switch {
			case h.Port == 0:
				p.line("%s %s %s port %s", what, h.Protocol, h.Address, ports)
			case h.First == 0:
				p.line("%s %s %s", what, h.Protocol, netip.AddrPortFrom(h.Address, h.Port))
			default:
				p.line("%s %s %s, to port %s", what, h.Protocol, netip.AddrPortFrom(h.Address, h.Port), ports)
			}
		}
	}
	list("drops: to service", r.Services)
	list("drops: to source address", r.Sources)
	list("drops: from backend", r.Backends)
	if len(r.Verdicts) > 0 {
		p.counters("VERDICTS", r.Verdicts)
	}
	if r.NFT != "" {
		p.line("")
		p.line("Where XDP can't be had, nftables is second choice. This drops the same, until `nft delete table inet fairlead_hold`,")
		p.line("which `fairlead run` does not do:")
		p.line("")
		p.line("nft -f - <<'END'\n%sEND", r.NFT)
	}
	return p.err
}
