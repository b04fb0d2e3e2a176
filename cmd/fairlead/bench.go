package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"fairlead/test/bench"
)

func benchCommand() *cli.Command {
	return &cli.Command{
		Name:  "bench",
		Usage: "nanoseconds a packet on this kernel, per method",
		Description: "Runs the data plane over frames of its own making, attaches nothing and sends nothing. Figures are net of\n" +
			"what makes the frames; RATIO is to the least program that forwards, GROWTH to the fewest connections measured.\n" +
			"Whether frames leave as they should is checked first. It takes root, a quarter of an hour, and memory for the\n" +
			"connections; other work on the host blurs it.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "established", Usage: "measure with `N,…` connections in the table",
				DefaultText: "1,1000,100000,1000000; quick: 1000"},
			&cli.StringFlag{Name: "method", Usage: "measure `METHOD,…` alone", DefaultText: strings.Join(benchMethods(), ",")},
			&cli.StringFlag{Name: "family", Usage: "measure `FAMILY,…` alone", DefaultText: "ipv4,ipv6"},
			&cli.IntFlag{Name: "runs", Usage: "take the median of `N` runs", DefaultText: "11; quick: 1"},
			&cli.BoolFlag{Name: "quick", Usage: "one short run, some seconds in all"},
			outputFlag(),
		},
		Action: benchAction,
	}
}

func benchMethods() (names []string) {
	for _, m := range bench.Methods() {
		names = append(names, m.String())
	}
	return names
}

func benchAction(c *cli.Context) error {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	options, err := benchOptions(c)
	if err != nil {
		return err
	}
	if !isJSON(c) {
		options.Tell = func(about string) { fmt.Fprintln(c.App.ErrWriter, about) }
	}
	l := newBenchList(c)
	err = bench.Run(c.Context, options, func(r bench.Result) error {
		if err := l.add(r); err != nil || formatOf(c) != formatLines {
			return err
		}
		return l.out.Flush() // minutes pass between lines
	})
	return errors.Join(err, l.end())
}

func newBenchList(c *cli.Context) *list[bench.Result] {
	type item = bench.Result
	tenths := func(n float64) string { return fmt.Sprintf("%.1f", n) }
	return newList(c.App.Writer, formatOf(c),
		column[item]{title: "METHOD", text: func(r *item) string { return r.Method }},
		column[item]{title: "FAMILY", text: benchFamily},
		column[item]{title: "PROTOCOL", text: func(r *item) string { return r.Protocol }},
		column[item]{title: "PACKETS", text: func(r *item) string { return r.Case }},
		column[item]{title: "CONNECTIONS", right: true, text: func(r *item) string { return strconv.Itoa(r.Connections) }},
		column[item]{title: "EXCEPTIONS", right: true, wide: true,
			text: func(r *item) string { return strconv.Itoa(r.Exceptions) }},
		column[item]{title: "NS", right: true, text: func(r *item) string { return tenths(r.Nanoseconds) }},
		column[item]{title: "LOWEST", right: true, text: func(r *item) string { return tenths(r.Lowest) }},
		column[item]{title: "HIGHEST", right: true, text: func(r *item) string { return tenths(r.Highest) }},
		column[item]{title: "GROWTH", right: true, text: func(r *item) string {
			if r.Growth == 0 {
				return "-"
			}
			return fmt.Sprintf("%.2f", r.Growth)
		}},
		column[item]{title: "RATIO", right: true, text: func(r *item) string { return tenths(r.Ratio) }},
		column[item]{title: "FLOOR", right: true, wide: true, text: func(r *item) string { return tenths(r.Floor) }},
		column[item]{title: "HARNESS", right: true, wide: true, text: func(r *item) string { return tenths(r.Harness) }},
		column[item]{title: "RUNS", right: true, wide: true, text: func(r *item) string { return strconv.Itoa(r.Runs) }},
		column[item]{title: "REPEATS", right: true, wide: true, text: func(r *item) string { return count(r.Repeats) }},
		column[item]{title: "VERDICTS", wide: true, text: verdictShares},
	)
}

func benchFamily(r *bench.Result) string {
	if r.Outer == "" {
		return string(r.Family)
	}
	return string(r.Family) + " in " + string(r.Outer)
}

// verdictShares is what was decided, most often first.
func verdictShares(r *bench.Result) string {
	names := make([]string, 0, len(r.Verdicts))
	for name := range r.Verdicts {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return int(r.Verdicts[b]) - int(r.Verdicts[a]) })
	for i, name := range names {
		names[i] = name + " " + percent(r.Verdicts[name], uint64(r.Repeats))
	}
	return strings.Join(names, ", ")
}

func benchOptions(c *cli.Context) (o bench.Options, err error) {
	o.Quick, o.Runs = c.Bool("quick"), c.Int("runs")
	if c.IsSet("runs") && o.Runs < 1 {
		return o, wrongUsage("--runs %d: at least one is needed", o.Runs)
	}
	for _, word := range commaList(c, "established") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 || n > bench.MaxConnections {
			return o, wrongUsage("--established %q: a number from 1 to %d, or several with commas", word, bench.MaxConnections)
		}
		o.Connections = append(o.Connections, n)
	}
	for _, word := range commaList(c, "method") {
		i := slices.Index(benchMethods(), word)
		if i < 0 {
			return o, wrongUsage("--method %q: one of %s", word, strings.Join(benchMethods(), ", "))
		}
		o.Methods = append(o.Methods, bench.Methods()[i])
	}
	for _, word := range commaList(c, "family") {
		if !slices.Contains(bench.Families(), bench.Family(word)) {
			return o, wrongUsage("--family %q: one of ipv4, ipv6", word)
		}
		o.Families = append(o.Families, bench.Family(word))
	}
	return o, nil
}

// commaList is a flag's words; none where it is not set.
func commaList(c *cli.Context, flag string) []string {
	if !c.IsSet(flag) {
		return nil
	}
	return strings.Split(c.String(flag), ",")
}
