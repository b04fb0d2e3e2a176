package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"fairlead/userspace/config"
)

// finding is something wrong with a configuration.
type finding struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Field   string `json:"field"`
	Problem string `json:"problem"`
	Remedy  string `json:"remedy"`
}

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "validate a configuration",
		ArgsUsage: "[FILE]",
		Description: "Reads the configuration as the daemon would and says everything that is wrong with it. Nothing is\n" +
			"changed. What only the host can tell, the daemon says.",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			args, err := words(c, 0, 1)
			if err != nil {
				return err
			}
			path := c.String("config")
			if len(args) == 1 {
				path = args[0]
			}
			return check(c, path)
		},
	}
}

func check(c *cli.Context, path string) error {
	cfg, err := config.Load(path)
	var wrong []*config.Error
	if errs := config.Errors(nil); errors.As(err, &errs) {
		wrong = errs
	} else if err != nil {
		return err
	}
	if cfg != nil {
		for _, err := range cfg.Unsupported() {
			var e *config.Error
			if !errors.As(err, &e) {
				return err
			}
			wrong = append(wrong, e)
		}
	}
	if isJSON(c) {
		l := newList[finding](c.App.Writer, formatOf(c))
		for _, e := range wrong {
			if err := l.add(finding{e.File, e.Line, e.Column, e.Field, e.Problem, e.Remedy}); err != nil {
				return err
			}
		}
		if err := l.end(); err != nil {
			return err
		}
	}
	if len(wrong) > 0 {
		if !isJSON(c) {
			fmt.Fprintln(c.App.ErrWriter, config.Errors(wrong))
		}
		return fmt.Errorf("check %s: %s", path, plural(len(wrong), "error"))
	}
	if !isJSON(c) {
		backends := 0
		for _, s := range cfg.Services {
			backends += len(s.Backends)
		}
		fmt.Fprintf(c.App.Writer, "%s is right: %s, %s\n", path, plural(len(cfg.Services), "service"),
			plural(backends, "backend"))
	}
	return nil
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
