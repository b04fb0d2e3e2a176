package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// barWidth is the length of the longest bar of a group, in characters.
const barWidth = 40

// teller writes a story line by line and takes nothing back, so that a log of it reads as the terminal did.
type teller struct {
	out   io.Writer
	plain bool // ASCII alone
	began time.Time
}

// newTeller tells in plain text where the output is no terminal.
func newTeller(out io.Writer) *teller {
	return &teller{out: out, plain: !isTerminal(out), began: time.Now()}
}

// ascii writes in plain text what the story is told with.
var ascii = strings.NewReplacer("✓", "ok:", "✗", "FAILED:", "─", "-", "…", "...", "µ", "u")

func (t *teller) line(text string) {
	if t.plain {
		text = ascii.Replace(text)
	}
	fmt.Fprintln(t.out, strings.TrimRight(text, " "))
}

// headline begins a chapter, at its time since the beginning.
func (t *teller) headline(format string, args ...any) {
	t.line(fmt.Sprintf("\n%5.1f s  ", time.Since(t.began).Seconds()) + fmt.Sprintf(format, args...))
}

// say writes indented lines.
func (t *teller) say(format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		t.line("         " + strings.TrimSuffix(line, "\n"))
	}
}

// verdict writes what was found, and whether it is as it should be.
func (t *teller) verdict(good bool, found string) {
	t.say("%s %s", map[bool]string{true: "✓", false: "✗"}[good], found)
}

// bar is a line of a group of bars.
type bar struct {
	label string
	value int
	note  string // after the figures
}

// bars draws a group: label, bar, value, and its part of the sum. The largest value's bar is the longest.
func (t *teller) bars(group []bar) {
	var most, sum, labels, figures int
	for _, b := range group {
		most, sum = max(most, b.value), sum+b.value
		labels = max(labels, utf8.RuneCountInString(b.label))
		figures = max(figures, len(grouped(b.value)))
	}
	for _, b := range group {
		share := 0.0
		if sum > 0 {
			share = 100 * float64(b.value) / float64(sum)
		}
		t.say("  %-*s  %-*s  %*s  %5.1f %%  %s", labels, b.label, barWidth, drawn(b.value, most, barWidth, t.plain),
			figures, grouped(b.value), share, b.note)
	}
}

// drawn is a bar of value where most has the whole width: eighths of a character, or # in plain text. Only nothing is
// drawn as nothing.
func drawn(value, most, width int, plain bool) string {
	if value <= 0 || most <= 0 {
		return ""
	}
	if plain {
		return strings.Repeat("#", max(1, (value*width+most/2)/most))
	}
	eighths := max(1, (value*width*8+most/2)/most)
	parts := []string{"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"}
	return strings.Repeat("█", eighths/8) + parts[eighths%8]
}

// row is a line of a table.
type row struct{ name, value string }

// table aligns names to the left and values to the right.
func (t *teller) table(rows []row) {
	var names, values int
	for _, r := range rows {
		names, values = max(names, utf8.RuneCountInString(r.name)), max(values, utf8.RuneCountInString(r.value))
	}
	rule := strings.Repeat("─", names+3+values)
	t.say("%s", rule)
	for _, r := range rows {
		t.say("%-*s   %*s", names, r.name, values, r.value)
	}
	t.say("%s", rule)
}

// grouped writes a number with its thousands apart: 12,345.
func grouped[T int | int64 | uint64](n T) string {
	digits := fmt.Sprint(n)
	sign := digits[:len(digits)-len(strings.TrimLeft(digits, "-"))]
	digits = digits[len(sign):]
	var groups []string
	for len(digits) > 3 {
		groups = append([]string{digits[len(digits)-3:]}, groups...)
		digits = digits[:len(digits)-3]
	}
	return sign + strings.Join(append([]string{digits}, groups...), ",")
}

// brief writes a duration with as many digits as a reader needs.
func brief(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// counted writes a number and its noun.
func counted(n int, noun string) string {
	return grouped(n) + " " + cmp.Or(map[bool]string{n == 1: noun}[true], noun+"s")
}
