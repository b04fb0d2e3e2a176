package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"fairlead/userspace/daemon"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "run the daemon",
		Description: "Attaches the data plane, or adopts what an earlier run left attached, and looks after it until SIGINT or\n" +
			"SIGTERM. Forwarding goes on when it ends: `fairlead unload` ends forwarding. SIGHUP reads the configuration\n" +
			"again; a wrong one changes nothing.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "log-level", Value: "info", Usage: "log from `LEVEL` up: debug, info, warn, error"},
			&cli.StringFlag{Name: "log-format", Value: "text", Usage: "log as `FORMAT`: text, json"},
		},
		Action: func(c *cli.Context) error {
			if _, err := words(c, 0, 0); err != nil {
				return err
			}
			logger, err := newLogger(c)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
			defer stop()
			reload := make(chan os.Signal, 1)
			signal.Notify(reload, unix.SIGHUP)
			defer signal.Stop(reload)
			return daemon.Run(ctx, daemon.Options{Config: c.String("config"), Logger: logger, Reload: reload})
		},
	}
}

func newLogger(c *cli.Context) (*slog.Logger, error) {
	var level slog.Level
	switch name := c.String("log-level"); name {
	case "debug", "info", "warn", "error":
		if err := level.UnmarshalText([]byte(strings.ToUpper(name))); err != nil {
			return nil, fmt.Errorf("log level %s: %w", name, err)
		}
	default:
		return nil, wrongUsage("--log-level %q: one of debug, info, warn, error", name)
	}
	options := &slog.HandlerOptions{Level: level}
	switch format := c.String("log-format"); format {
	case "text":
		return slog.New(slog.NewTextHandler(c.App.ErrWriter, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(c.App.ErrWriter, options)), nil
	default:
		return nil, wrongUsage("--log-format %q: one of text, json", format)
	}
}
