package kernels

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// verifiedPrefix is what TestLoad's figures begin with.
const verifiedPrefix = "verified instructions: "

// machineRun is what the tests' port of a machine said.
type machineRun struct {
	booted  string // release, and seconds since boot; empty: not so far
	results map[string]*result
}

// result is what came of a step.
type result struct {
	verdict  string // succeeded, or an error; empty: it never ended
	took     string
	passed   int               // tests and subtests
	failed   []string          // failed, skipped or never ended
	verified []string          // figures of TestLoad
	printed  map[string]string // by test; "": by none
	order    []string          // in which tests were begun
}

// problem says what is wrong with a step, if anything is.
func (r *result) problem() string {
	switch {
	case r.verdict == "":
		return "it never ended"
	case len(r.failed) > 0:
		return fmt.Sprintf("%d tests did not pass", len(r.failed))
	case r.verdict != succeeded:
		return r.verdict
	case r.passed == 0:
		return "no test ran"
	}
	return ""
}

// outputLines is how much is shown of what tests have printed: where all of them fail, the first ones tell.
const outputLines = 300

// output is what the tests that did not pass have printed, and what no test has, without the lines on who runs.
func (r *result) output() string {
	var lines []string
	for _, test := range append(r.failed, "") {
		for line := range strings.Lines(r.printed[test]) {
			if !strings.HasPrefix(line, "=== ") {
				lines = append(lines, line)
			}
		}
	}
	if left := len(lines) - outputLines; left > 0 {
		lines = append(lines[:outputLines], fmt.Sprintf("… and %d lines more\n", left))
	}
	return strings.Join(lines, "")
}

// readRun reads what the tests' port of a machine said.
func readRun(ctx context.Context, text string) (machineRun, error) {
	r := machineRun{results: make(map[string]*result)}
	var step string
	var printed strings.Builder
	finish := func() error {
		if step == "" {
			return nil
		}
		err := r.results[step].read(ctx, printed.String())
		step = ""
		printed.Reset()
		return err
	}
	for line := range strings.Lines(text) {
		content := strings.TrimSuffix(line, "\n")
		if release, ok := strings.CutPrefix(content, bootedMark); ok {
			r.booted = release
		} else if name, ok := strings.CutPrefix(content, beginsMark); ok {
			step = name
			r.results[step] = &result{printed: make(map[string]string)}
		} else if end, ok := strings.CutPrefix(content, endsMark); ok {
			name, rest, _ := strings.Cut(end, " ")
			if result := r.results[name]; result != nil {
				result.took, result.verdict, _ = strings.Cut(rest, " ")
			}
			if err := finish(); err != nil {
				return r, err
			}
		} else {
			printed.WriteString(line)
		}
	}
	return r, finish()
}

// read reads what a test binary has printed under -test.v=test2json.
func (r *result) read(ctx context.Context, printed string) error {
	command := exec.CommandContext(ctx, "go", "tool", "test2json")
	var complaints bytes.Buffer
	command.Stdin, command.Stderr = strings.NewReader(printed), &complaints
	events, err := command.Output()
	if err != nil {
		return fmt.Errorf("go tool test2json: %w: %s", err, &complaints)
	}
	running := make(map[string]bool)
	for decoder := json.NewDecoder(bytes.NewReader(events)); ; {
		var event struct{ Action, Test, Output string }
		if err := decoder.Decode(&event); err == io.EOF {
			break
		} else if err != nil {
			return fmt.Errorf("read what go tool test2json says: %w", err)
		}
		switch event.Action {
		case "output":
			r.printed[event.Test] += event.Output
			if _, figures, ok := strings.Cut(event.Output, verifiedPrefix); ok {
				_, part, _ := strings.Cut(event.Test, "/")
				r.verified = append(r.verified, part+": "+verifiedPrefix+strings.TrimSpace(figures))
			}
		case "run":
			running[event.Test] = true
			r.order = append(r.order, event.Test)
		case "pass":
			if event.Test != "" {
				r.passed++
			}
			delete(running, event.Test)
		}
	}
	for _, test := range r.order { // failed and skipped ones among them
		if running[test] {
			r.failed = append(r.failed, test)
		}
	}
	return nil
}

// TestReadRun: what did not pass is found, be it failed, skipped, cut off or never begun.
func TestReadRun(t *testing.T) {
	const mark = "\x16" // where the testing package begins its own lines under -test.v=test2json
	text := strings.ReplaceAll(bootedMark+`6.1.0 3s
`+beginsMark+`load
#=== RUN   TestLoad
#=== RUN   TestLoad/everything
    load_test.go:1: `+verifiedPrefix+`fairlead 7
#--- PASS: TestLoad/everything (0.10s)
#=== NAME  TestLoad
#--- PASS: TestLoad (0.10s)
#=== NAME  
#PASS

`+endsMark+`load 2s ok
`+beginsMark+`skips
#=== RUN   TestA
    a_test.go:1: not here
#--- SKIP: TestA (0.00s)
#=== NAME  
#PASS

`+endsMark+`skips 1s ok
`+beginsMark+`cut
#=== RUN   TestB
#--- PASS: TestB (0.00s)
#=== RUN   TestC
`, "#", mark)
	got, err := readRun(t.Context(), text)
	must(t, err)
	type outcome struct {
		Problem  string
		Passed   int
		Verified []string
	}
	outcomes := make(map[string]outcome)
	for name, r := range got.results {
		outcomes[name] = outcome{r.problem(), r.passed, r.verified}
	}
	want := map[string]outcome{
		"load":  {"", 2, []string{"everything: " + verifiedPrefix + "fairlead 7"}},
		"skips": {"1 tests did not pass", 0, nil},
		"cut":   {"it never ended", 1, nil},
	}
	if diff := cmp.Diff(want, outcomes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !strings.Contains(got.results["skips"].output(), "not here") {
		t.Error("a skipped test's reason is not told")
	}
}
