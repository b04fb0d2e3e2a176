package main

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"

	"fairlead/test/bench"
)

func runBench(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(context.Background(), append([]string{"bench"}, args...), &out, &errs, func(string) string { return "" })
	return code, out.String(), errs.String()
}

// TestBench: figures in every format, or words about what was asked for wrongly.
func TestBench(t *testing.T) {
	chosen := []string{"--quick", "--method", "dsr", "--family", "ipv6", "--established", "20,1"}
	code, stdout, stderr := runBench(append(chosen, "-o", "json")...)
	var results []bench.Result
	if err := json.Unmarshal([]byte(stdout), &results); code != exitDone || err != nil {
		t.Fatalf("exit code %d, %v: %s%s", code, err, stdout, stderr)
	}
	settled := 0
	for _, r := range results {
		if r.Method != "dsr" || r.Protocol != "tcp" || r.Outer != "" || r.Family != bench.IPv6 || r.Connections != 1 && r.Connections != 20 {
			t.Errorf("a figure that nobody asked for: %+v", r)
		}
		if r.Case == bench.Settled && r.Verdicts["forward_ring"] == uint64(r.Repeats) {
			settled++
		}
	}
	if settled != 2 {
		t.Errorf("%d figures of settled slots: want one with 1 and one with 20 connections:\n%s", settled, stdout)
	}
	code, stdout, stderr = runBench(append(chosen, "--runs", "1", "-o", "wide")...)
	if lines := strings.Count(stdout, "\n"); code != exitDone || lines != len(results)+1 ||
		!strings.Contains(stdout, "forward_ring 100.0 %") || !strings.Contains(stderr, "establish 20 connections") {
		t.Errorf("exit code %d, %d lines of %d:\n%s%s", code, lines, len(results)+1, stdout, stderr)
	}
	code, stdout, stderr = runBench("--quick", "--method", "gue", "--family", "ipv6", "--established", "1")
	if code != exitDone || !strings.Contains(stdout, "ipv6 in ipv4") {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	for args, word := range map[string]string{
		"--method tcp": `"tcp"`, "--family ipx": `"ipx"`, "--established 0": `"0"`, "--established 1,x": `"x"`,
		"--runs 0": "--runs 0", "-o xml": `"xml"`, "chat": `"chat"`,
	} {
		if code, _, stderr := runBench(strings.Fields(args)...); code != exitUsage || !strings.Contains(stderr, word) {
			t.Errorf("bench %s: exit code %d: %s", args, code, stderr)
		}
	}
}
