package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"fairlead/userspace/daemon"
)

func unloadCommand() *cli.Command {
	return &cli.Command{
		Name:  "unload",
		Usage: "end forwarding: detach the programs, remove every pin",
		Description: "The connections noted are forgotten: those by fullnat break. A running daemon is to be stopped first;\n" +
			"a stop alone ends nothing. Prints what was removed.",
		Flags: []cli.Flag{outputFlag(), pinPathFlag()},
		Action: func(c *cli.Context) error {
			if _, err := words(c, 0, 0); err != nil {
				return err
			}
			path, _, err := pinPath(c)
			if err != nil {
				return err
			}
			removed, failed := daemon.Unload(path)
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
