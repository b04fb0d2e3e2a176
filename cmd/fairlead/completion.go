package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

func completionCommand() *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Usage:     "print a completion script for a shell",
		ArgsUsage: "bash|zsh|fish",
		Description: "bash: source <(fairlead completion bash)\nzsh:  source <(fairlead completion zsh)\n" +
			"fish: fairlead completion fish | source",
		Action: func(c *cli.Context) error {
			args, err := words(c, 1, 1)
			if err != nil {
				return err
			}
			var script string
			switch args[0] {
			case "bash":
				script = bashCompletion(c.App)
			case "zsh":
				script = "autoload -U +X bashcompinit && bashcompinit\n" + bashCompletion(c.App)
			case "fish":
				script = fishCompletion(c.App)
			default:
				return wrongUsage("completion for %q: one of bash, zsh, fish", args[0])
			}
			_, err = fmt.Fprint(c.App.Writer, script)
			return err
		},
	}
}

func flagWords(c *cli.Command) (words []string) {
	for _, f := range c.Flags {
		for _, name := range f.Names() {
			if len(name) > 1 {
				words = append(words, "--"+name)
			}
		}
	}
	return words
}

func commandNames(commands []*cli.Command) (names []string) {
	for _, c := range commands {
		if !c.Hidden {
			names = append(names, c.Names()...)
		}
	}
	return names
}

// takesDirectory tells whether a command's argument is a directory.
func takesDirectory(c *cli.Command) bool { return c.ArgsUsage == "DIR" }

// bashCompletion offers commands, then their flags; files after -c and --socket, directories where they are asked for.
func bashCompletion(app *cli.App) string {
	var cases strings.Builder
	var walk func(commands []*cli.Command, before string)
	walk = func(commands []*cli.Command, before string) {
		for _, c := range commands {
			for _, name := range c.Names() {
				place := strings.TrimPrefix(before+" "+name, " ")
				directories := map[bool]string{true: " directories=-d"}[takesDirectory(c)]
				fmt.Fprintf(&cases, "\t'%s') offer='%s'%s ;;\n", place,
					strings.Join(append(commandNames(c.Subcommands), flagWords(c)...), " "), directories)
				walk(c.Subcommands, place)
			}
		}
	}
	walk(app.Commands, "")
	return `_fairlead() {
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} place= w offer directories=
	case $before in
	-c|--config|--socket) COMPREPLY=($(compgen -f -- "$word")); return ;;
	--dir|--pin-path) COMPREPLY=($(compgen -d -- "$word")); return ;;
	-o|--output) COMPREPLY=($(compgen -W '` + strings.Join(formats, " ") + `' -- "$word")); return ;;
	esac
	for w in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
		case $w in
		-*) ;;
		*) place="${place:+$place }$w" ;;
		esac
	done
	case $place in
	'') offer='` + strings.Join(commandNames(app.Commands), " ") + `' ;;
` + cases.String() + `	*) offer= ;;
	esac
	COMPREPLY=($(compgen $directories -W "$offer" -- "$word"))
}
complete -F _fairlead fairlead
`
}

func fishCompletion(app *cli.App) string {
	var b strings.Builder
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `\'`) + "'" }
	fmt.Fprintf(&b, "complete -c fairlead -f\n")
	var walk func(commands []*cli.Command, condition string)
	walk = func(commands []*cli.Command, condition string) {
		siblings := strings.Join(commandNames(commands), " ")
		for _, c := range commands {
			here := condition + "; and not __fish_seen_subcommand_from " + siblings
			for _, name := range c.Names() {
				fmt.Fprintf(&b, "complete -c fairlead -n %s -a %s -d %s\n", quote(here), name, quote(c.Usage))
			}
			seen := condition + "; and __fish_seen_subcommand_from " + strings.Join(c.Names(), " ")
			for _, f := range c.Flags {
				long := slices.IndexFunc(f.Names(), func(n string) bool { return len(n) > 1 })
				if long < 0 {
					continue
				}
				argument := ""
				if name := f.Names()[long]; name == "dir" || name == "pin-path" {
					argument = " -x -a '(__fish_complete_directories)'"
				}
				fmt.Fprintf(&b, "complete -c fairlead -n %s -l %s%s\n", quote(seen), f.Names()[long], argument)
			}
			if takesDirectory(c) {
				fmt.Fprintf(&b, "complete -c fairlead -n %s -a '(__fish_complete_directories)'\n", quote(seen))
			}
			walk(c.Subcommands, seen)
		}
	}
	walk(app.Commands, "true")
	return b.String()
}
