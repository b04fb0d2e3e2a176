package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

// call is a command line taken apart: people write flags before the command, after it, and behind its arguments.
type call struct {
	path  []*cli.Command // from the outermost command to the one meant
	flags []string
	words []string // the arguments
	help  bool
	lacks bool // the last flag lacks its value
}

// arrange takes a command line apart. Which words are values of flags is known from the flags of all commands; a flag of
// one name takes a value in all of them or in none.
func arrange(commands []*cli.Command, args []string) call {
	valued := make(map[string]bool)
	collectFlags(commands, valued)
	var k call
	for i := 0; i < len(args); i++ {
		arg := args[i]
		next := find(commands, arg)
		switch {
		case arg == "--":
			k.words = append(k.words, args[i+1:]...)
			return k
		case len(arg) > 1 && arg[0] == '-':
			name := strings.TrimLeft(arg, "-")
			if name == "help" || name == "h" {
				k.help = true
				continue
			}
			if name == "version" && len(k.path) == 0 {
				k.path = append(k.path, find(commands, name))
				commands = nil
				continue
			}
			// -ojson is -o json.
			if _, known := valued[name]; !known && arg[1] != '-' && valued[name[:1]] && !strings.HasPrefix(name[1:], "=") {
				k.flags = append(k.flags, arg[:2], arg[2:])
				continue
			}
			k.flags = append(k.flags, arg)
			if k.lacks = valued[name] && i+1 == len(args); valued[name] && !k.lacks {
				i++
				k.flags = append(k.flags, args[i])
			}
		case len(k.words) == 0 && commands != nil && arg == "help":
			k.help = true
		case len(k.words) == 0 && next != nil:
			k.path = append(k.path, next)
			commands = next.Subcommands
		default:
			k.words = append(k.words, arg)
		}
	}
	return k
}

func collectFlags(commands []*cli.Command, valued map[string]bool) {
	for _, c := range commands {
		for _, f := range c.Flags {
			_, isBool := f.(*cli.BoolFlag)
			for _, name := range f.Names() {
				valued[name] = !isBool
			}
		}
		collectFlags(c.Subcommands, valued)
	}
}

func find(commands []*cli.Command, name string) *cli.Command {
	for _, c := range commands {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

// check refuses a command line that names no command that does something.
func (k *call) check(app *cli.App) error {
	commands, missing := app.Commands, "which command?"
	if n := len(k.path); n > 0 {
		commands, missing = k.path[n-1].Subcommands, strings.TrimPrefix(k.name(app), app.Name+" ")+" what?"
		if len(commands) == 0 {
			return nil
		}
	}
	switch {
	case len(k.words) > 0:
		near := cli.SuggestCommand(commands, k.words[0])
		return wrongUsage("there is no command %s: %s",
			strings.TrimPrefix(k.name(app)+" "+k.words[0], app.Name+" "), decapitalise(near))
	case k.help:
		return nil
	}
	var names []string
	for _, c := range commands {
		if !c.Hidden {
			names = append(names, c.Name)
		}
	}
	return wrongUsage("%s one of %s", missing, strings.Join(names, ", "))
}

func decapitalise(s string) string { return strings.ToLower(s[:min(1, len(s))]) + s[min(1, len(s)):] }

func (k *call) name(app *cli.App) string {
	parts := []string{app.Name}
	for _, c := range k.path {
		parts = append(parts, c.Name)
	}
	return strings.Join(parts, " ")
}

// args are the command line as the cli package wants it: commands, their flags, then arguments.
func (k *call) args(program string) []string {
	args := []string{program}
	for _, c := range k.path {
		args = append(args, c.Name)
	}
	if k.help {
		return append(args, "--help")
	}
	args = append(args, k.flags...)
	// Nothing may come after a flag that lacks its value: it would be taken for it.
	if len(k.words) > 0 && !k.lacks {
		args = append(append(args, "--"), k.words...)
	}
	return args
}

// hint is how the command is called, for someone who got it wrong.
func (k *call) hint(app *cli.App) string {
	usage, help := app.UsageText, strings.TrimSpace("fairlead help "+strings.TrimPrefix(k.name(app), app.Name+" "))
	if len(k.path) == 0 {
		help = "fairlead help"
	} else if c := k.path[len(k.path)-1]; c.ArgsUsage != "" || len(c.Subcommands) == 0 {
		usage = strings.TrimSpace(k.name(app)+" "+c.ArgsUsage) + " [flags]"
	} else {
		usage = k.name(app) + " COMMAND [arguments, flags]"
	}
	return fmt.Sprintf("usage: %s\n`%s` says more", usage, help)
}
