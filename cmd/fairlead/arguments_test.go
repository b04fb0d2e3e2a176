package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

func TestArrange(t *testing.T) {
	for line, want := range map[string]string{
		"status":                                   "fairlead status",
		"status -c x":                              "fairlead status -c x",
		"-c x status":                              "fairlead status -c x",
		"-o json --config=x status":                "fairlead status -o json --config=x",
		"-ojson status":                            "fairlead status -o json",
		"flows list":                               "fairlead connections list",
		"connections -c x list --service chat":     "fairlead connections list -c x --service chat",
		"explain 1.2.3.4:5 chat -o json":           "fairlead explain -o json -- 1.2.3.4:5 chat",
		"explain 1.2.3.4:5 -o json chat":           "fairlead explain -o json -- 1.2.3.4:5 chat",
		"explain -o json 1.2.3.4:5 chat":           "fairlead explain -o json -- 1.2.3.4:5 chat",
		"connections get -- -o json":               "fairlead connections get -- -o json",
		"connections get [2001:db8::7]:1 list":     "fairlead connections get -- [2001:db8::7]:1 list",
		"maps dump --service list rings":           "fairlead maps dump --service list -- rings",
		"maps dump help":                           "fairlead maps dump -- help",
		"status --connections --rates":             "fairlead status --connections --rates",
		"help":                                     "fairlead --help",
		"help connections list":                    "fairlead connections list --help",
		"connections help":                         "fairlead connections --help",
		"connections get -h 1.2.3.4:5":             "fairlead connections get --help",
		"--version":                                "fairlead version",
		"run --log-level debug":                    "fairlead run --log-level debug",
		"connections list --client":                "fairlead connections list --client",
		"connections get 1.2.3.4:5 -o":             "fairlead connections get -o",
		"backends drain ws1 --rate 500/s --wait":   "fairlead backends drain --rate 500/s --wait -- ws1",
		"backends --wait drain drain -c x":         "fairlead backends drain --wait -c x -- drain",
		"state restore show --dry-run":             "fairlead state restore --dry-run -- show",
		"state show --dir state --state idle":      "fairlead state show --dir state --state idle",
		"flows close 1.2.3.4:5->chat":              "fairlead connections close -- 1.2.3.4:5->chat",
		"connections count --idle=5m --state idle": "fairlead connections count --idle=5m --state idle",
	} {
		app := newApp(new(bytes.Buffer), new(bytes.Buffer), func(string) string { return "" })
		k := arrange(app.Commands, strings.Fields(line))
		if got := strings.Join(k.args("fairlead"), " "); got != want {
			t.Errorf("%s\n became %s\n want   %s", line, got, want)
		}
	}
}

// TestFlagsAgree holds what arrange relies on: a flag takes a value in every command or in none.
func TestFlagsAgree(t *testing.T) {
	takes := make(map[string]bool)
	var walk func(commands []*cli.Command)
	walk = func(commands []*cli.Command) {
		for _, c := range commands {
			for _, f := range c.Flags {
				_, isBool := f.(*cli.BoolFlag)
				for _, name := range f.Names() {
					// `status --connections` is a word alone, as is the command.
					if before, known := takes[name]; known && before == isBool {
						t.Errorf("flag %s of %s differs from that of another command", name, c.Name)
					}
					takes[name] = !isBool
				}
			}
			walk(c.Subcommands)
		}
	}
	walk(newApp(nil, nil, func(string) string { return "" }).Commands)
}

// fairlead runs the program in process.
func fairlead(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(t.Context(), args, &out, &err, func(name string) string {
		return map[string]string{configVar: "testdata/good.yaml"}[name]
	})
	return code, out.String(), err.String()
}

func TestExitCodesAndMessages(t *testing.T) {
	sweepPins(t)
	for _, test := range []struct {
		line   string
		code   int
		stdout string // parts of it
		stderr string
	}{
		{"", exitUsage, "", "which command? one of run, check"},
		{"help", exitDone, "COMMANDS:", ""},
		{"--help", exitDone, "COMMANDS:", ""},
		{"help status", exitDone, "--rates", ""},
		{"maps --help", exitDone, "dump", ""},
		{"statsu", exitUsage, "", `there is no command statsu: did you mean "status"?`},
		{"maps", exitUsage, "", "maps what? one of list, dump"},
		{"maps lst", exitUsage, "", `there is no command maps lst: did you mean "list"?`},
		{"status --rate", exitUsage, "", "there is no flag --rate: did you mean --rates?"},
		{"status extra", exitUsage, "", `status: one argument too many: "extra"`},
		{"status -o yaml", exitUsage, "", `-o "yaml": one of table, wide, json, jsonl`},
		{"status -o", exitUsage, "", "flag needs an argument: -o"},
		{"explain 198.51.100.7:1 chat -o", exitUsage, "", "flag needs an argument: -o"},
		{"backends list", exitNothing, "", "nothing is attached"},
		{"completion bash", exitDone, "'backends drain') offer='--rate --deadline --wait --socket --config' ;;", ""},
		{"completion bash", exitDone, "'connections close') offer='--socket --config' ;;", ""},
		{"completion fish", exitDone, "-a resume -d ", ""},
		{"explain", exitUsage, "", "usage: fairlead explain CLIENT:PORT SERVICE [flags]"},
		{"explain 198.51.100.7:1", exitUsage, "", "to which SERVICE?"},
		{"explain nonsense chat", exitUsage, "", `"nonsense" is not ADDRESS:PORT`},
		{"connections get 2001:db8::7:1", exitUsage, "", "or [2001:db8::7]:40000"},
		{"connections list --state open", exitUsage, "", `--state "open": one of young, established`},
		{"connections list --client here", exitUsage, "", `--client "here"`},
		{"connections list --idle soon", exitUsage, "", "soon"},
		{"connections list --idle=-5s", exitUsage, "", "can't be negative"},
		{"connections list --plane userspace", exitUsage, "", "xdp is the one plane of this version"},
		{"maps dump control --service chat", exitUsage, "", "--service goes with the map rings alone"},
		{"run --log-level loud", exitUsage, "", "one of debug, info, warn, error"},
		{"run --log-format xml", exitUsage, "", "one of text, json"},
		{"run -c testdata/absent.yaml", exitFailed, "", "testdata/absent.yaml: no such file"},
		{"completion ksh", exitUsage, "", "one of bash, zsh, fish"},

		{"check", exitDone, "testdata/good.yaml is right: 1 service, 2 backends\n", ""},
		{"check testdata/good.yaml", exitDone, "is right", ""},
		{"check -c testdata/wrong.yaml", exitFailed, "", `testdata/wrong.yaml:4: services[0].adress: unknown field: did you mean address?`},
		{"check testdata/wrong.yaml", exitFailed, "", `"70000" is not a port`},
		{"check testdata/wrong.yaml -o jsonl", exitFailed, `{"file":"testdata/wrong.yaml","line":`, "check testdata/wrong.yaml: 3 errors"},
		{"check testdata/unsupported.yaml", exitFailed, "", "balance mode load is not built yet in this version: use hash"},
		{"check testdata/absent.yaml", exitFailed, "", "no such file"},
		{"check -o json", exitDone, "[]\n", ""},

		{"status", exitNothing, "", "nothing is attached under /sys/fs/bpf/fairlead-test-cli/check; no daemon runs"},
		{"status --pin-path /sys/fs/bpf/fairlead-test-cli/no -c testdata/absent.yaml", exitNothing, "", "nothing is attached"},
		{"status -c testdata/absent.yaml", exitFailed, "", "--pin-path DIRECTORY"},
		{"connections list", exitNothing, "", "nothing is attached"},
		{"flows count", exitNothing, "", "nothing is attached"},
		{"connections get 198.51.100.7:1 chat", exitNothing, "", "nothing is attached"},
		{"explain 198.51.100.7:1 chat", exitNothing, "", "nothing is attached"},
		{"maps list", exitNothing, "", "nothing is attached"},
		{"maps dump control", exitNothing, "", "nothing is attached"},
		{"unload", exitNothing, "", "nothing is attached"},

		{"state", exitUsage, "", "state what? one of show, verify, save, restore"},
		{"state save", exitUsage, "", "usage: fairlead state save DIR [flags]"},
		{"state save one two", exitUsage, "", `state save: one argument too many: "two"`},
		{"state save one", exitNothing, "", "nothing is attached"},
		{"state restore one --dry", exitUsage, "", "there is no flag --dry: did you mean --dry-run?"},
		{"state show -c testdata/absent.yaml", exitFailed, "", "with --dir DIR this command does without the configuration"},
		{"state verify -c testdata/absent.yaml", exitFailed, "", "--dir DIR"},
		{"state restore testdata -c testdata/absent.yaml", exitFailed, "", "testdata/absent.yaml: no such file"},
		{"completion bash", exitDone, "'state restore') offer='--damaged --dry-run --config' directories=-d ;;", ""},
		{"completion fish", exitDone, "-l dir -x -a '(__fish_complete_directories)'", ""},

		{"version", exitDone, "fairlead development", ""},
		{"version -o json", exitDone, `"schema": 3`, ""},
		{"completion bash", exitDone, "complete -F _fairlead fairlead", ""},
		{"completion zsh", exitDone, "bashcompinit", ""},
		{"completion fish", exitDone, "complete -c fairlead", ""},
	} {
		code, stdout, stderr := fairlead(t, strings.Fields(test.line)...)
		if code != test.code {
			t.Errorf("%q: exit code %d, want %d\n%s%s", test.line, code, test.code, stdout, stderr)
		}
		if !strings.Contains(stdout, test.stdout) || test.stdout == "" && stdout != "" {
			t.Errorf("%q: stdout %q, want %q", test.line, stdout, test.stdout)
		}
		if !strings.Contains(stderr, test.stderr) || test.stderr == "" && stderr != "" {
			t.Errorf("%q: stderr %q, want %q", test.line, stderr, test.stderr)
		}
		if code == exitUsage && !strings.Contains(stderr, "\nusage: fairlead ") {
			t.Errorf("%q: no hint how it is used in %q", test.line, stderr)
		}
	}
}

func TestQuantities(t *testing.T) {
	got := fmt.Sprint(count(0), " ", count(9999), " ", count(10000), " ", count(12345), " ", count(999499), " ", count(999500),
		" ", count(1234567), " ", count(uint64(1)<<63), " ", count(-12345))
	if diff := cmp.Diff("0 9999 10k 12.3k 999k 1M 1.23M 9.22E -12.3k", got); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
	got = fmt.Sprint(size(0), ", ", size(1023), ", ", size(1024), ", ", size(1536), ", ", size(34<<30), ", ", size(1<<20-1))
	if diff := cmp.Diff("0 B, 1023 B, 1 KiB, 1.5 KiB, 34 GiB, 1 MiB", got); diff != "" {
		t.Errorf("sizes (-want +got):\n%s", diff)
	}
	for text, want := range map[string]string{"0s": "0s", "-3s": "0s", "59.9s": "59s", "200s": "3m20s", "60m": "1h",
		"5h12m7s": "5h12m", "76h": "3d4h", "24h30m": "1d"} {
		if got := span(mustDuration(t, text)); got != want {
			t.Errorf("span of %s: %s, want %s", text, got, want)
		}
	}
}
