// Command fairlead is the daemon and everything an operator asks it or its pinned maps. It parses, calls and prints;
// what there is to know and to do lives in the packages that it calls.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"fairlead/loader"
	"fairlead/test/lab"
	"fairlead/userspace/control"
)

// What a command's end says to the shell.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2 // wrong usage
	exitNothing = 3 // not running, or nothing attached
)

const (
	defaultConfig = "/etc/fairlead/fairlead.yaml"
	configVar     = "FAIRLEAD_CONFIG"
)

func main() {
	lab.PeerMain() // the demo's peers are this program, started again
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr, os.Getenv))
}

// run is the whole of the program: args without its name, and the environment to ask. It returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, env func(string) string) int {
	app := newApp(stdout, stderr, env)
	call := arrange(app.Commands, args)
	err := call.check(app)
	if err == nil {
		err = app.RunContext(ctx, call.args(app.Name))
	}
	if err == nil {
		return exitDone
	}
	var usage *usageError
	var coded cli.ExitCoder
	switch {
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "fairlead: %s\n", err)
		fmt.Fprintln(stderr, call.hint(app))
		return exitUsage
	case errors.As(err, &coded):
		if text := coded.Error(); text != "" {
			fmt.Fprintln(stderr, text)
		}
		return coded.ExitCode()
	}
	fmt.Fprintf(stderr, "fairlead: %s\n", err)
	if errors.Is(err, loader.ErrNothing) || errors.Is(err, control.ErrNotRunning) {
		return exitNothing
	}
	return exitFailed
}

// usageError is a command that was not called as it can be.
type usageError struct{ problem string }

func (e *usageError) Error() string { return e.problem }

func wrongUsage(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

func newApp(stdout, stderr io.Writer, env func(string) string) *cli.App {
	config := func() cli.Flag {
		path := env(configVar)
		if path == "" {
			path = defaultConfig
		}
		return &cli.StringFlag{Name: "config", Aliases: []string{"c"}, Value: path,
			Usage: "read the configuration from `FILE`; $" + configVar + " names another default"}
	}
	app := &cli.App{
		Name:            "fairlead",
		HelpName:        "fairlead",
		Usage:           "a layer-4 forwarder for connections that live long",
		UsageText:       "fairlead COMMAND [arguments, flags]",
		Writer:          stdout,
		ErrWriter:       stderr,
		HideHelpCommand: true,
		HideVersion:     true,
		ExitErrHandler:  func(*cli.Context, error) {}, // run decides
		Commands: []*cli.Command{
			runCommand(), checkCommand(), demoCommand(), benchCommand(), statusCommand(), backendsCommand(),
			connectionsCommand(), explainCommand(), mapsCommand(), stateCommand(), reloadCommand(), unloadCommand(), holdCommand(), decapCommand(), versionCommand(), completionCommand(),
		},
	}
	finish(app.Commands, config)
	return app
}

// finish gives every command that does something what all of them have.
func finish(commands []*cli.Command, config func() cli.Flag) {
	for _, c := range commands {
		c.HideHelpCommand = true
		c.OnUsageError = func(c *cli.Context, err error, _ bool) error { return &usageError{flagProblem(c, err)} }
		if len(c.Subcommands) > 0 {
			finish(c.Subcommands, config)
			continue
		}
		if !slices.ContainsFunc(c.Flags, func(f cli.Flag) bool { return slices.Contains(f.Names(), "config") }) {
			c.Flags = append(c.Flags, config())
		}
	}
}

// flagProblem says what the flag package found in the words of this program.
func flagProblem(c *cli.Context, err error) string {
	text := err.Error()
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: "); ok {
		if len(name) > 2 {
			name = "-" + name
		}
		text = "there is no flag " + name
		if near := cli.SuggestFlag(c.Command.Flags, strings.TrimLeft(name, "-"), false); near != "" {
			text += ": did you mean " + near + "?"
		}
	}
	return text
}

// words refuses more arguments, or fewer, than a command takes.
func words(c *cli.Context, least, most int) ([]string, error) {
	got := c.Args().Slice()
	switch {
	case len(got) < least:
		return nil, wrongUsage("%s: too few arguments", commandName(c))
	case len(got) > most:
		return nil, wrongUsage("%s: one argument too many: %q", commandName(c), got[most])
	}
	return got, nil
}

func commandName(c *cli.Context) string {
	return strings.TrimPrefix(c.Command.HelpName, c.App.Name+" ")
}
