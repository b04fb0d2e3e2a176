package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Error is one thing that is wrong in a file.
type Error struct {
	File         string
	Line, Column int    // from 1
	Field        string // as in services[0].backends[2].port; empty where the text is not YAML at all
	Problem      string // what is wrong
	Remedy       string // what to do about it
	Source       string // the line itself
}

// Error returns "file:line: field: problem: remedy", and below it the line with a mark under its column.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s:%d: ", e.File, e.Line)
	if e.Field != "" {
		fmt.Fprintf(&b, "%s: ", e.Field)
	}
	fmt.Fprintf(&b, "%s: %s", e.Problem, e.Remedy)
	// Long lines are shown around the column; a tab is shown as one space, so that the mark stands right.
	const width = 120
	line := []rune(strings.ReplaceAll(e.Source, "\t", " "))
	column := min(max(e.Column-1, 0), len(line))
	if from := column - width/2; from > 0 && len(line) > width {
		line, column = line[from:], column-from
	}
	if line = line[:min(width, len(line))]; len(line) > 0 {
		number := fmt.Sprintf("%5d", e.Line)
		fmt.Fprintf(&b, "\n%s | %s\n%*s | %*s^", number, string(line), len(number), "", column, "")
	}
	return b.String()
}

// Errors are all that is wrong in a file, in the order of its lines; errors.As finds the first *Error in it.
type Errors []*Error

// Error returns every error, each beginning on a line of its own.
func (e Errors) Error() string {
	texts := make([]string, len(e))
	for i, err := range e {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "\n")
}

// Unwrap returns them one by one, for errors.Is and errors.As.
func (e Errors) Unwrap() []error {
	errs := make([]error, len(e))
	for i, err := range e {
		errs[i] = err
	}
	return errs
}

func (e Errors) sort() {
	slices.SortStableFunc(e, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// place is where a field stands; that of an absent field is the mapping it would stand in.
type place struct {
	field        string
	line, column int // from 1
}

func (p *place) locate(at place) { *p = at }

func (p place) in(field string) place {
	p.field = join(p.field, field)
	return p
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// source is a file's text, kept to show lines of it.
type source struct {
	name  string
	lines []string
}

func (s source) refuse(at place, problem, remedy string) *Error {
	line := ""
	if at.line >= 1 && at.line <= len(s.lines) {
		line = s.lines[at.line-1]
	}
	return &Error{File: s.name, Line: max(at.line, 1), Column: max(at.column, 1), Field: at.field, Problem: problem,
		Remedy: remedy, Source: line}
}
