package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

const passes = `{"Action":"start","Package":"a"}
{"Action":"output","Package":"a","Test":"TestA","Output":"    a.go:1: quiet\n"}
{"Action":"pass","Package":"a","Test":"TestA/one","Elapsed":9}
{"Action":"pass","Package":"a","Test":"TestA","Elapsed":9}
{"Action":"pass","Package":"a","Elapsed":9.5}
{"Action":"start","Package":"b"}
{"Action":"skip","Package":"b","Elapsed":0}
`

func TestSummary(t *testing.T) {
	for name, c := range map[string]struct {
		events       string
		ok           bool
		shows, hides []string
	}{
		"all pass": {passes, true, []string{"ok      a", "TestA ", "1 packages, 1 tests and 1 subtests", "1 passed, 0 failed"},
			[]string{"quiet"}},
		"nothing at all": {"", false, []string{"0 packages"}, nil},
		"a failure is told whole": {passes + `{"Action":"start","Package":"c"}
{"Action":"output","Package":"c","Test":"TestC","Output":"    c.go:1: loud\n"}
{"Action":"fail","Package":"c","Test":"TestC","Elapsed":1}
{"Action":"output","Package":"c","Output":"goroutines leaked\n"}
{"Action":"fail","Package":"c","Elapsed":1}
`, false, []string{"c.go:1: loud", "goroutines leaked", "FAILED  c", "fail c TestC", "1 passed, 1 failed"}, []string{"quiet"}},
		"a skipped test is no passed one": {passes + `{"Action":"skip","Package":"c","Test":"TestC","Elapsed":0}
{"Action":"pass","Package":"c","Elapsed":1}
`, false, []string{"skip c TestC", "1 skipped"}, nil},
		"a build fails": {passes + `{"ImportPath":"c","Action":"build-output","Output":"c.go:1: undefined\n"}
{"ImportPath":"c","Action":"build-fail"}
{"Action":"start","Package":"c"}
{"Action":"fail","Package":"c","Elapsed":0,"FailedBuild":"c"}
`, false, []string{"c.go:1: undefined", "FAILED  c"}, nil},
		"the stream ends in the middle": {passes + `{"Action":"start","Package":"c"}` + "\nkilled\n", false,
			[]string{"no end of c", "killed"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			r := &report{out: &out, output: make(map[string][]string), running: make(map[string]bool)}
			if err := r.read(strings.NewReader(c.events)); err != nil {
				t.Fatal(err)
			}
			if ok := r.close(time.Minute); ok != c.ok {
				t.Errorf("all is well: %v, want %v", ok, c.ok)
			}
			for _, text := range c.shows {
				if !strings.Contains(out.String(), text) {
					t.Errorf("%q is not told", text)
				}
			}
			for _, text := range c.hides {
				if strings.Contains(out.String(), text) {
					t.Errorf("%q is told", text)
				}
			}
			if t.Failed() {
				t.Log(out.String())
			}
		})
	}
}

// TestLongestLine: a test may print a line of any length.
func TestLongestLine(t *testing.T) {
	line, err := json.Marshal(event{Action: "output", Package: "a", Test: "TestA", Output: strings.Repeat("x", 1<<20) + "\n"})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	r := &report{out: &out, output: make(map[string][]string), running: make(map[string]bool)}
	if err := r.read(bytes.NewReader(append(line, '\n'))); err != nil || len(r.output["a TestA"]) != 1 {
		t.Errorf("%d lines kept: %v", len(r.output["a TestA"]), err)
	}
}
