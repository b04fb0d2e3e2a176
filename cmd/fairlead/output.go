package main

import (
	"bufio"
	"encoding/json"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
)

// The formats of -o.
const (
	formatTable = "table"
	formatWide  = "wide"
	formatJSON  = "json"  // one array, or one object
	formatLines = "jsonl" // a line an item, streamed
)

var formats = []string{formatTable, formatWide, formatJSON, formatLines}

func outputFlag() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: formatTable,
		Usage: "print as `FORMAT`: " + strings.Join(formats, ", "),
		Action: func(_ *cli.Context, format string) error {
			if !slices.Contains(formats, format) {
				return wrongUsage("-o %q: one of %s", format, strings.Join(formats, ", "))
			}
			return nil
		}}
}

func formatOf(c *cli.Context) string { return c.String("output") }

func isJSON(c *cli.Context) bool { return formatOf(c) == formatJSON || formatOf(c) == formatLines }

// column is a column of a table of items.
type column[T any] struct {
	title string
	right bool // numbers
	wide  bool // in wide tables only
	text  func(*T) string
}

// list prints items one by one as they come, in any format.
type list[T any] struct {
	out     *bufio.Writer
	format  string
	columns []column[T]
	table   *table
	items   int
}

// newList prints to w. Columns may still be set before the first item.
func newList[T any](w io.Writer, format string, columns ...column[T]) *list[T] {
	return &list[T]{out: bufio.NewWriterSize(w, 64<<10), format: format, columns: columns}
}

func (l *list[T]) add(item T) error {
	l.items++
	switch l.format {
	case formatJSON, formatLines:
		line, err := json.Marshal(item)
		if err != nil {
			return err
		}
		if l.format == formatJSON {
			l.out.WriteString(map[bool]string{true: "[\n", false: ",\n"}[l.items == 1])
			_, err = l.out.Write(line)
			return err
		}
		l.out.Write(line)
		return l.out.WriteByte('\n')
	}
	l.head()
	row := make([]string, 0, len(l.columns))
	for _, c := range l.columns {
		row = append(row, c.text(&item))
	}
	return l.table.add(row...)
}

func (l *list[T]) head() {
	if l.table != nil {
		return
	}
	l.columns = slices.DeleteFunc(l.columns, func(c column[T]) bool { return c.wide && l.format != formatWide })
	l.table = &table{out: l.out}
	for _, c := range l.columns {
		l.table.columns = append(l.table.columns, tableColumn{title: c.title, right: c.right})
	}
}

// end prints what is left. A table without items is its head alone.
func (l *list[T]) end() error {
	switch l.format {
	case formatJSON:
		l.out.WriteString(map[bool]string{true: "[]\n", false: "\n]\n"}[l.items == 0])
	case formatLines:
	default:
		l.head()
		if err := l.table.flush(); err != nil {
			return err
		}
	}
	return l.out.Flush()
}

// object prints one value: over several lines as json, in one as jsonl.
func object(c *cli.Context, v any) error {
	encoder := json.NewEncoder(c.App.Writer)
	encoder.SetEscapeHTML(false)
	if formatOf(c) == formatJSON {
		encoder.SetIndent("", "  ")
	}
	return encoder.Encode(v)
}

// table aligns rows under titles. Rows are printed by the thousand, so that a long list streams; widths only grow.
type table struct {
	out     io.Writer
	indent  string
	columns []tableColumn
	rows    [][]string
	headed  bool
}

type tableColumn struct {
	title string
	right bool
	width int
}

const tableRows = 1000

func (t *table) add(row ...string) error {
	t.rows = append(t.rows, row)
	if len(t.rows) < tableRows {
		return nil
	}
	return t.flush()
}

func (t *table) flush() error {
	if !t.headed && len(t.columns) > 0 {
		t.headed = true
		titles := make([]string, len(t.columns))
		for i, c := range t.columns {
			titles[i] = c.title
		}
		t.rows = slices.Insert(t.rows, 0, titles)
	}
	for _, row := range t.rows {
		for i, cell := range row {
			t.columns[i].width = max(t.columns[i].width, utf8.RuneCountInString(cell))
		}
	}
	var all strings.Builder
	for _, row := range t.rows {
		var b strings.Builder
		b.WriteString(t.indent)
		for i, cell := range row {
			c := &t.columns[i]
			fill := strings.Repeat(" ", c.width-utf8.RuneCountInString(cell))
			switch {
			case c.right:
				b.WriteString(fill + cell)
			case i == len(row)-1:
				b.WriteString(cell)
			default:
				b.WriteString(cell + fill)
			}
			if i < len(row)-1 {
				b.WriteString("  ")
			}
		}
		all.WriteString(strings.TrimRight(b.String(), " ") + "\n")
	}
	t.rows = t.rows[:0]
	_, err := io.WriteString(t.out, all.String())
	return err
}
