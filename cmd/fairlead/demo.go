package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/test/lab"
	"fairlead/userspace/config"
)

const (
	demoLab  = "fairleaddemo" // what the names of namespaces begin with
	demoDir  = "/run/fairlead-demo"
	demoPins = "/sys/fs/bpf/fairlead-demo"

	leastDemoClients = 100
	mostDemoClients  = 11_000 // with those that come later, one process of the lab holds them
	mostDemoBackends = 50
)

var (
	errDemoFailed = errors.New("not everything went as it should")
	validDemoName = regexp.MustCompile(`^[a-z0-9]{0,12}$`)
)

// demoOptions are what a person may choose.
type demoOptions struct {
	name     string // sets demos apart that run at the same time
	clients  int
	backends int
	method   config.Method
	ipv6     bool
	keep     bool
	program  string // path of this binary
}

// demo is one run of the story, and what it has to clear away.
type demo struct {
	demoOptions
	*teller
	ctx context.Context

	lab     *lab.Topology
	service netip.AddrPort
	daemon  *lab.Process
	crowd   *lab.Clients
	listed  []*lab.Backend // in the configuration
	failed  []string       // checks
}

func demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "the whole thing on this machine alone: namespaces, WebSocket backends, clients, faults",
		Description: "Builds a network of namespaces, runs the daemon in it with XDP between WebSocket clients and " +
			"backends, changes\nbackends, kills the daemon, and tells what becomes of the connections. Exit code 0: none " +
			"was broken or moved.\nIt takes root, and touches nothing outside of its own namespaces, " + demoDir + " and " +
			demoPins + ".",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "clients", Value: 3000, Usage: "WebSockets to begin with; more come later"},
			&cli.IntFlag{Name: "backends", Value: 3, Usage: "backends to begin with; one more comes later"},
			&cli.StringFlag{Name: "method", Value: string(config.MethodFullNAT), Usage: "forwarding method: fullnat or dsr"},
			&cli.BoolFlag{Name: "ipv6", Usage: "IPv6 in place of IPv4"},
			&cli.BoolFlag{Name: "keep", Usage: "leave everything up at the end, and say how to look around"},
			&cli.BoolFlag{Name: "clean", Usage: "end what --keep left up, and nothing else"},
			&cli.StringFlag{Name: "name", Hidden: true, Usage: "sets demos apart that run at the same time"},
		},
		Action: func(c *cli.Context) error {
			o := demoOptions{
				name: c.String("name"), clients: c.Int("clients"), backends: c.Int("backends"),
				method: config.Method(c.String("method")), ipv6: c.Bool("ipv6"), keep: c.Bool("keep"),
			}
			if err := o.check(c.Args().Slice()); err != nil {
				return wrongUsage("demo: %v", err)
			}
			if err := o.prepare(); err != nil {
				return fmt.Errorf("demo: %w", err)
			}
			ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			context.AfterFunc(ctx, stop) // the second Ctrl-C ends us at once; the next run clears away then
			// A closed pipe at the output ends the story as well, but never us: there is much to clear away.
			ctx, heard := signal.NotifyContext(ctx, syscall.SIGPIPE)
			defer heard()
			run := runDemo
			if c.Bool("clean") {
				run = cleanDemo
			}
			if err := run(ctx, o, c.App.Writer); err != nil {
				return fmt.Errorf("demo: %w", err)
			}
			return nil
		},
	}
}

// check refuses what can't be told.
func (o demoOptions) check(arguments []string) error {
	switch {
	case len(arguments) > 0:
		return fmt.Errorf("takes no arguments, and there is %q", arguments[0])
	case o.clients < leastDemoClients || o.clients > mostDemoClients:
		return fmt.Errorf("--clients %d: want %d to %d", o.clients, leastDemoClients, mostDemoClients)
	case o.backends < 1 || o.backends > mostDemoBackends:
		return fmt.Errorf("--backends %d: want 1 to %d", o.backends, mostDemoBackends)
	case o.method != config.MethodFullNAT && o.method != config.MethodDSR:
		return fmt.Errorf("--method %s: want fullnat or dsr", o.method)
	case !validDemoName.MatchString(o.name):
		return fmt.Errorf("--name %q: want up to 12 lower-case letters and digits", o.name)
	}
	return nil
}

// prepare sees to what the machine must have.
func (o *demoOptions) prepare() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces and loads XDP programs, which takes root: run it with sudo")
	}
	if _, err := exec.LookPath("nsenter"); err != nil {
		return fmt.Errorf("%w: install it (Debian: apt install util-linux)", err)
	}
	if o.program, err = os.Executable(); err != nil {
		return fmt.Errorf("find this program, to start it as the daemon: %w", err)
	}
	return nil
}

func (o demoOptions) labName() string { return demoLab + o.name }
func (o demoOptions) dir() string     { return suffixed(demoDir, o.name) }
func (o demoOptions) pins() string    { return suffixed(demoPins, o.name) }
func (o demoOptions) file() string    { return filepath.Join(o.dir(), "fairlead.yaml") }

func suffixed(path, name string) string {
	if name == "" {
		return path
	}
	return path + "-" + name
}

// clearPlaces takes away what a demo keeps outside of its lab. The caller holds the lab of the demo's name.
func (o demoOptions) clearPlaces() error {
	_, err := loader.Unload(o.pins())
	var locked *loader.LockedError
	if errors.As(err, &locked) && locked.PID != 0 {
		// A daemon that someone started by hand in a lab that was kept: the lab knows nothing of it.
		for deadline := time.Now().Add(demoPatience); errors.Is(err, loader.ErrLocked) && time.Now().Before(deadline); {
			if err := unix.Kill(locked.PID, unix.SIGTERM); err != nil && err != unix.ESRCH {
				return fmt.Errorf("end the daemon that holds %s (pid %d): %w", o.pins(), locked.PID, err)
			}
			time.Sleep(demoPoll)
			_, err = loader.Unload(o.pins())
		}
	}
	if errors.Is(err, loader.ErrNothing) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(o.dir()))
}

// cleanDemo ends what an earlier demo kept.
func cleanDemo(_ context.Context, o demoOptions, out io.Writer) error {
	// A new lab of the name clears the old one away, and nobody else can begin one meanwhile.
	l, err := lab.New(o.labName())
	if err != nil {
		return advisedInUse(err)
	}
	if err := errors.Join(o.clearPlaces(), l.Close()); err != nil {
		return err
	}
	fmt.Fprintln(out, "Nothing of the demo is left: no namespaces, processes, pins or files.")
	return nil
}

func advisedInUse(err error) error {
	if errors.Is(err, lab.ErrInUse) {
		return fmt.Errorf("another demo is being told right now: %w", err)
	}
	return err
}

// runDemo tells the whole story, and clears everything away unless it is to be kept.
func runDemo(ctx context.Context, o demoOptions, out io.Writer) (err error) {
	d := &demo{demoOptions: o, teller: newTeller(out), ctx: ctx}
	err = d.tell()
	if d.lab == nil {
		return err
	}
	if err != nil && ctx.Err() != nil {
		// What failed, failed because of this.
		err = errors.New("interrupted")
	}
	if d.keep && ctx.Err() == nil {
		return errors.Join(err, d.leave())
	}
	d.headline("Clearing away …")
	if clearErr := d.clear(); clearErr != nil {
		return errors.Join(err, fmt.Errorf("clear away: %w", clearErr))
	}
	d.say("No namespaces, processes, pins or files are left.")
	return err
}

func (d *demo) clear() error {
	var errs []error
	if d.daemon != nil {
		errs = append(errs, d.daemon.Stop())
	}
	// The lab last: it is what keeps another demo from taking these places.
	return errors.Join(append(errs, d.clearPlaces(), d.lab.Close())...)
}

// leave gives the lab up as it stands, and says how to look around in it.
func (d *demo) leave() error {
	// The binary may be rebuilt or, by go run, removed: what runs here stays at hand.
	program := filepath.Join(d.dir(), "fairlead")
	if err := copyFile(program, d.program); err != nil {
		return errors.Join(fmt.Errorf("keep a copy of this program: %w", err), d.clear())
	}
	client := "CLIENT:PORT"
	if d.crowd != nil {
		if connections, err := d.crowd.Connections(d.ctx); err == nil && len(connections) > 0 {
			client = connections[0].Local.String()
		}
	}
	if err := d.lab.Keep(); err != nil {
		return err
	}
	clean := program + " demo --clean"
	if d.name != "" {
		clean += " --name " + d.name
	}
	edge := fmt.Sprintf("nsenter --net=/run/netns/%s", d.lab.Edge.Namespace())
	d.headline("Kept: lab, daemon, clients and their chatter. As root, look around:")
	d.say("  export FAIRLEAD_CONFIG=%s", d.file())
	for _, command := range []string{
		"status", "connections count", "connections list | head", "explain " + client + " " + demoService, "maps list",
	} {
		d.say("  %s %s %s", edge, program, command)
	}
	if d.daemon != nil {
		d.say("Change the configuration and have the daemon read it again; kill it, and start it again:")
		d.say("  $EDITOR %s && kill -HUP %d", d.file(), d.daemon.PID())
		d.say("  tail -f %s", d.daemon.Log())
		d.say("  kill -KILL %d", d.daemon.PID())
		d.say("  %s %s run", edge, program)
	}
	d.say("End it:")
	d.say("  %s", clean)
	return nil
}

func copyFile(to, from string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}

// check notes whether something is as it should be, and tells it.
func (d *demo) check(good bool, format string, args ...any) {
	found := fmt.Sprintf(format, args...)
	d.verdict(good, found)
	if !good {
		d.failed = append(d.failed, found)
	}
}

// outcome is the error of a story told to its end.
func (d *demo) outcome() error {
	if len(d.failed) == 0 {
		return nil
	}
	return fmt.Errorf("%w:\n  %s", errDemoFailed, strings.Join(d.failed, "\n  "))
}
