package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/userspace/config"
	"fairlead/userspace/control"
)

// This file is about asking the daemon: what changes something goes through its socket.

func socketFlag() cli.Flag {
	return &cli.StringFlag{Name: "socket",
		Usage: "ask the daemon at `SOCKET`, whatever the configuration says; it is not read then"}
}

// daemonOf is the daemon of a command's configuration, and where its pins are if that is known.
func daemonOf(c *cli.Context) (daemon *control.Client, pins string, err error) {
	if path := c.String("socket"); path != "" {
		return control.Dial(path), "", nil
	}
	cfg, err := config.Load(c.String("config"))
	if err != nil {
		return nil, "", fmt.Errorf("%w\nwith --socket SOCKET this command does without the configuration", err)
	}
	return control.Dial(cfg.Control.Socket), cfg.Dataplane.PinPath, nil
}

// asked has a daemon do something, and says what can be done where none is there.
func asked(c *cli.Context, do func(*control.Client) error) error {
	daemon, pins, err := daemonOf(c)
	if err != nil {
		return err
	}
	err = do(daemon)
	if !errors.Is(err, control.ErrNotRunning) {
		return err
	}
	if pid := loader.Holder(pins); pins != "" && pid != 0 {
		return fmt.Errorf("%w; yet a daemon runs (pid %d): control.socket has changed since its start, it is still starting, "+
			"or it is of a version without one", err, pid)
	}
	return fmt.Errorf("%w; start it with `fairlead run`", err)
}

func reloadCommand() *cli.Command {
	return &cli.Command{
		Name:  "reload",
		Usage: "have the daemon read its configuration again",
		Description: "It takes effect whole, or not at all where something is wrong with it. Prints what changed, a line each,\n" +
			"or what is wrong.",
		Flags: []cli.Flag{outputFlag(), socketFlag()},
		Action: func(c *cli.Context) error {
			if _, err := words(c, 0, 0); err != nil {
				return err
			}
			return asked(c, func(daemon *control.Client) error {
				changes, err := daemon.Reload(c.Context)
				if err != nil {
					return err
				}
				if isJSON(c) {
					l := newList[string](c.App.Writer, formatOf(c))
					for _, line := range changes {
						if err := l.add(line); err != nil {
							return err
						}
					}
					return l.end()
				}
				for _, line := range changes {
					fmt.Fprintln(c.App.Writer, line)
				}
				if len(changes) == 0 {
					fmt.Fprintln(c.App.Writer, "nothing has changed")
				}
				return nil
			})
		},
	}
}

func drainCommand() *cli.Command {
	return &cli.Command{
		Name: "drain", Usage: "give a backend no new connections, and end the old ones at a chosen rate", ArgsUsage: "NAME",
		Description: "NAME is a backend, or service/backend where several services have one of that name. Without --rate and\n" +
			"--deadline its connections stay until they end by themselves. The order holds over reloads and restarts,\n" +
			"until `fairlead backends resume NAME`.\n\n" +
			"With --wait, exits when no connection is left (0) or when interrupted (1): the drain goes on then.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "rate", Usage: "end `N/s` of its connections: both ends are told by RST"},
			&cli.DurationFlag{Name: "deadline", Usage: "end what is left after `DURATION`"},
			&cli.BoolFlag{Name: "wait", Usage: "show how far it has come, until no connection is left"},
			socketFlag(),
		},
		Action: func(c *cli.Context) error {
			args, err := words(c, 1, 1)
			if err != nil {
				return err
			}
			r := control.DrainRequest{Backend: args[0], Deadline: c.Duration("deadline")}
			if c.IsSet("deadline") && r.Deadline <= 0 {
				return wrongUsage("--deadline %v: a time from now, as in 5m", r.Deadline)
			}
			if c.IsSet("rate") {
				if r.Rate, err = parseRate(c.String("rate")); err != nil {
					return err
				}
			}
			return asked(c, func(daemon *control.Client) error { return drain(c, daemon, r) })
		},
	}
}

// parseRate reads connections a second: 500/s, or 500.
func parseRate(word string) (uint32, error) {
	n, err := strconv.ParseUint(strings.TrimSuffix(word, "/s"), 10, 32)
	if err != nil || n < 1 || n > control.MaxRate {
		return 0, wrongUsage("--rate %q: connections a second, 1 to %d, as in 500/s", word, control.MaxRate)
	}
	return uint32(n), nil
}

func drain(c *cli.Context, daemon *control.Client, r control.DrainRequest) error {
	ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := daemon.Drain(ctx, r); ctx.Err() != nil {
		return fmt.Errorf("interrupted before the daemon answered: `fairlead backends list` shows whether %s drains", r.Backend)
	} else if err != nil {
		return err
	}
	fmt.Fprintln(c.App.Writer, drainText(r))
	if !c.Bool("wait") {
		return nil
	}
	w := drainWatch{
		daemon: daemon, name: r.Backend, out: c.App.Writer, terminal: isTerminal(c.App.Writer), ask: time.Second, say: 5 * time.Second,
	}
	return w.run(ctx)
}

// drainText is what was asked for.
func drainText(r control.DrainRequest) string {
	text := fmt.Sprintf("backend %s drains: no new connections", r.Backend)
	switch {
	case r.Rate != 0 && r.Deadline != 0:
		return text + fmt.Sprintf("; its connections are ended, %d a second, and what is left in %v", r.Rate, r.Deadline)
	case r.Rate != 0:
		return text + fmt.Sprintf("; its connections are ended, %d a second", r.Rate)
	case r.Deadline != 0:
		return text + fmt.Sprintf("; its connections stay, and what is left in %v is ended", r.Deadline)
	}
	return text + "; its connections stay until they end by themselves"
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil && os.Getenv("TERM") != "dumb"
}

func resumeCommand() *cli.Command {
	return &cli.Command{
		Name: "resume", Usage: "take a drain back: the backend takes new connections again", ArgsUsage: "NAME",
		Description: "NAME is a backend, or service/backend where several services have one of that name. Connections that\n" +
			"were told to end do end.",
		Flags: []cli.Flag{socketFlag()},
		Action: func(c *cli.Context) error {
			args, err := words(c, 1, 1)
			if err != nil {
				return err
			}
			return asked(c, func(daemon *control.Client) error {
				if err := daemon.Resume(c.Context, args[0]); err != nil {
					return err
				}
				_, err := fmt.Fprintf(c.App.Writer, "backend %s: its drain is taken back\n", args[0])
				return err
			})
		},
	}
}

func weightCommand() *cli.Command {
	return &cli.Command{
		Name: "weight", Usage: "set a backend's weight, in place of the configured", ArgsUsage: "NAME N|default",
		Description: "NAME is a backend, or service/backend where several services have one of that name. N is " +
			fmt.Sprintf("0 to %d;\n", control.MaxWeight) +
			"0 gives it no new connections. No connection moves. The order holds over reloads and restarts; `default`\n" +
			"takes it back.",
		Flags: []cli.Flag{socketFlag()},
		Action: func(c *cli.Context) error {
			args, err := words(c, 2, 2)
			if err != nil {
				return err
			}
			weight, text, err := parseWeight(args[1])
			if err != nil {
				return err
			}
			return asked(c, func(daemon *control.Client) error {
				if err := daemon.Weight(c.Context, args[0], weight); err != nil {
					return err
				}
				_, err := fmt.Fprintf(c.App.Writer, "backend %s: weight %s\n", args[0], text)
				return err
			})
		},
	}
}

// parseWeight reads N, or default: no weight of its own.
func parseWeight(word string) (weight *uint32, text string, err error) {
	if word == "default" {
		return nil, "as configured", nil
	}
	n, err := strconv.ParseUint(word, 10, 32)
	if err != nil || n > control.MaxWeight {
		return nil, "", wrongUsage("weight %q: 0 to %d, or default", word, control.MaxWeight)
	}
	w := uint32(n)
	return &w, word, nil
}

func closeCommand() *cli.Command {
	return &cli.Command{
		Name: "close", Usage: "end a connection: both ends are told by RST", ArgsUsage: "CLIENT:PORT [SERVICE]",
		Description: "Without SERVICE, the one connection that the client's address and port have. Also as one word:\n" +
			"'CLIENT:PORT->SERVICE'.",
		Flags: []cli.Flag{socketFlag()},
		Action: func(c *cli.Context) error {
			args, err := words(c, 1, 2)
			if err != nil {
				return err
			}
			client, service, err := parseTuple(args)
			if err != nil {
				return err
			}
			if client.Port() == 0 {
				return wrongUsage("client %v: no connection comes from port 0", client)
			}
			return asked(c, func(daemon *control.Client) error {
				done, err := daemon.Close(c.Context, control.CloseRequest{Client: client, Service: service})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(c.App.Writer, done)
				return err
			})
		},
	}
}
