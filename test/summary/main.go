// Command summary reads what `go test -json` says and tells people: a line a package, slow tests as they end, the whole
// output of what failed, and closing lines. It fails where a test failed, was skipped (a test that can't run here has to
// say so by failing), never ended, or where there was none.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// slow is how long a test takes at least to be told about.
const slow = 3 * time.Second

// event is a line of `go test -json` (cmd/test2json, and `go help buildjson`).
type event struct {
	Action      string
	Package     string
	ImportPath  string // of a build
	Test        string
	Elapsed     float64 // seconds
	Output      string
	FailedBuild string
}

func (e event) elapsed() time.Duration { return time.Duration(e.Elapsed * float64(time.Second)) }

// report is what was read so far.
type report struct {
	out     io.Writer
	output  map[string][]string // by package, test or build: what it has printed and nobody was told
	running map[string]bool     // packages

	packages, failedPackages     int
	passed, failed, skipped, sub int
	bad                          []string // tests and packages that did not pass
}

func main() {
	began := time.Now()
	r := &report{out: os.Stdout, output: make(map[string][]string), running: make(map[string]bool)}
	if err := r.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		os.Exit(1)
	}
	if !r.close(time.Since(began)) {
		os.Exit(1)
	}
}

func (r *report) read(from io.Reader) error {
	lines := bufio.NewReader(from)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil {
				r.take(e)
			} else {
				r.out.Write(line) // what the go command itself has to say
			}
		}
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the events: %w", err)
		}
	}
}

func (r *report) take(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "build-output":
		r.output[e.ImportPath] = append(r.output[e.ImportPath], e.Output)
	case "start":
		r.running[e.Package] = true
	case "output":
		r.output[key] = append(r.output[key], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(e)
		}
		delete(r.output, key)
	}
}

func (r *report) endTest(e event) {
	top := !strings.Contains(e.Test, "/")
	if !top {
		r.sub++
	}
	if e.Action == "pass" {
		if top {
			r.passed++
		}
		if top && e.elapsed() >= slow {
			fmt.Fprintf(r.out, "        %-48s %6.1f s\n", e.Test, e.Elapsed)
		}
		return
	}
	if top && e.Action == "fail" {
		r.failed++
	} else if e.Action == "skip" {
		r.skipped++
	}
	r.bad = append(r.bad, fmt.Sprintf("%s %s %s", e.Action, e.Package, e.Test))
	fmt.Fprint(r.out, strings.Join(r.output[e.Package+" "+e.Test], ""))
}

func (r *report) endPackage(e event) {
	delete(r.running, e.Package)
	r.packages++
	switch e.Action {
	case "pass":
		fmt.Fprintf(r.out, "ok      %-48s %6.1f s\n", e.Package, e.Elapsed)
	case "skip":
		r.packages-- // no test files
	case "fail":
		r.failedPackages++
		for _, key := range []string{e.FailedBuild, e.Package + " "} {
			fmt.Fprint(r.out, strings.Join(r.output[key], ""))
		}
		fmt.Fprintf(r.out, "FAILED  %-48s %6.1f s\n", e.Package, e.Elapsed)
		r.bad = append(r.bad, "fail "+e.Package)
	}
}

// close writes the closing lines, and says whether all is well.
func (r *report) close(took time.Duration) bool {
	for name := range r.running {
		r.bad = append(r.bad, "no end of "+name)
	}
	slices.SortFunc(r.bad, cmp.Compare)
	fmt.Fprintln(r.out)
	for _, line := range r.bad {
		fmt.Fprintln(r.out, line)
	}
	fmt.Fprintf(r.out, "%d packages, %d tests and %d subtests in %v: %d passed, %d failed, %d skipped\n", r.packages,
		r.passed+r.failed, r.sub, took.Round(time.Second), r.passed, r.failed, r.skipped)
	return len(r.bad) == 0 && r.passed > 0
}
