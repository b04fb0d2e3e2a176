package main

import (
	"fmt"
	"log/slog"

	"github.com/urfave/cli/v2"

	"fairlead/userspace/config"
	"fairlead/userspace/daemon"
)

func unloadCommand() *cli.Command {
	return &cli.Command{
		Name:  "unload",
		Usage: "end forwarding: detach the programs, remove every pin",
		Description: "The connections noted are forgotten: those by fullnat break. A running daemon is to be stopped first;\n" +
			"a stop alone ends nothing. Prints what was removed.",
		Flags: []cli.Flag{outputFlag(), pinPathFlag(), &cli.BoolFlag{Name: "hold",
			Usage: "from then on, hold what is for services, as `fairlead hold` does: no connection is reset"}},
		Action: func(c *cli.Context) error {
			if _, err := words(c, 0, 0); err != nil {
				return err
			}
			removed, failed := []string(nil), error(nil)
			if c.Bool("hold") {
				removed, failed = unloadHeld(c)
			} else if path, _, err := pinPath(c); err != nil {
				return err
			} else {
				removed, failed = daemon.Unload(path)
			}
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
		},
	}
}

// unloadHeld leaves what is for services to the program of `fairlead hold`.
func unloadHeld(c *cli.Context) (removed []string, err error) {
	if c.IsSet("pin-path") {
		return nil, wrongUsage("unload: --hold goes by the configuration, and so without --pin-path")
	}
	cfg, err := config.Load(c.String("config"))
	if err != nil {
		return nil, err
	}
	options, err := daemon.HoldOptions(cfg)
	if err != nil {
		return nil, err
	}
	options.Logger = slog.New(slog.DiscardHandler)
	report, removed, err := daemon.UnloadHeld(options)
	if report != nil && !isJSON(c) {
		for _, at := range report.Held {
			fmt.Fprintf(c.App.Writer, "%s is held: `fairlead run` takes over, `fairlead unload` lets go\n", at.Interface)
		}
	}
	return removed, err
}
