package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"fairlead/loader"
	"fairlead/maps"
	"fairlead/maps/journal"
	"fairlead/userspace/config"
	"fairlead/userspace/daemon"
)

func stateCommand() *cli.Command {
	dir := func() cli.Flag {
		return &cli.StringFlag{Name: "dir",
			Usage: "read the state directory, or copy of one, `DIR`, whatever the configuration says; it is not read then"}
	}
	return &cli.Command{
		Name:  "state",
		Usage: "the connections kept on disk: save, show, verify, restore",
		Subcommands: []*cli.Command{
			{
				Name: "show", Usage: "list the connections kept on disk",
				Description: "With a daemon or without one; nothing is changed. Which files were read, and what is missing or\n" +
					"damaged, goes to stderr. Filters are as those of `connections list`.",
				Flags: []cli.Flag{
					dir(),
					&cli.StringSliceFlag{Name: "service", Usage: "of `SERVICE`: its name or address:port"},
					&cli.StringSliceFlag{Name: "backend", Usage: "on `BACKEND`: its name, or service/backend"},
					&cli.StringSliceFlag{Name: "client", Usage: "from `CLIENT`: address, prefix/length, or address:port"},
					&cli.StringSliceFlag{Name: "state", Usage: "in `STATE`: young, established, half-closed, idle, condemned"},
					&cli.DurationFlag{Name: "idle", Usage: "without a packet for `DURATION` or longer"},
					outputFlag(),
				},
				Action: showState,
			},
			{
				Name: "verify", Usage: "say what is wrong with the files that connections are kept in",
				Description: "Reads every file to its end; nothing is changed. Exit code 0: all is whole, 1: something is damaged.",
				Flags:       []cli.Flag{dir(), outputFlag()},
				Action:      verifyState,
			},
			{
				Name: "save", Usage: "write the connections of now into a directory", ArgsUsage: "DIR",
				Description: "Reads the pinned maps: with a daemon or without one. DIR is to be empty, or not there yet. `state show\n" +
					"--dir DIR` lists what it holds, `state restore DIR` has the next run begin with it.",
				Flags:  []cli.Flag{pinPathFlag()},
				Action: saveState,
			},
			{
				Name: "restore", Usage: "have the next run begin with the connections of a directory", ArgsUsage: "DIR",
				Description: "DIR is one that `state save` wrote, or a state directory or its copy. No daemon may run, and nothing be\n" +
					"pinned: a run goes on with the connections in the pinned maps. What the state directory has is set\n" +
					"aside in it, as connections.before-N, which can be restored in turn.",
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "damaged", Usage: "take what is whole of a DIR that is damaged"},
					&cli.BoolFlag{Name: "dry-run", Usage: "check all, say what would be done, and change nothing"},
				},
				Action: restoreState,
			},
		},
	}
}

var journalFile = regexp.MustCompile(`^(journal|snapshot)-[0-9a-f]{16}$`)

// stateDir is the directory to read, by flag or by configuration.
func stateDir(c *cli.Context) (string, error) {
	if dir := c.String("dir"); dir != "" {
		return stateAt(dir)
	}
	cfg, err := config.Load(c.String("config"))
	if err != nil {
		return "", fmt.Errorf("%w\nwith --dir DIR this command does without the configuration", err)
	}
	return cfg.StateDir, nil
}

// stateAt is the state directory that a person means: the files themselves lie in a directory below.
func stateAt(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	if !slices.ContainsFunc(entries, func(e os.DirEntry) bool { return journalFile.MatchString(e.Name()) }) {
		return dir, nil
	}
	if filepath.Base(dir) == daemon.ConnectionsDir {
		return filepath.Dir(dir), nil
	}
	return "", fmt.Errorf("%s has the files themselves: move them into a directory named %s, and name the one above",
		dir, daemon.ConnectionsDir)
}

// savedItem is a connection on disk as it is printed.
type savedItem struct {
	Client          netip.AddrPort  `json:"client"`
	Service         string          `json:"service"`
	ServiceAddress  netip.AddrPort  `json:"service_address"`
	Protocol        string          `json:"protocol"`
	Backend         string          `json:"backend"`
	BackendAddress  netip.AddrPort  `json:"backend_address"`
	Method          string          `json:"method"`
	State           string          `json:"state"`
	Age             float64         `json:"age_seconds"`
	Idle            float64         `json:"idle_seconds"`
	Source          *netip.AddrPort `json:"source"` // fullnat: what the backend sees as its client
	SequenceEnd     uint32          `json:"sequence_end"`
	Acknowledgement uint32          `json:"acknowledgement"`
	Timestamp       *uint32         `json:"timestamp,omitempty"`
	TimestampEcho   *uint32         `json:"timestamp_echo,omitempty"`
	ClientMAC       string          `json:"client_mac"`
	Interface       string          `json:"interface"` // that the client's packets come by
	Generation      uint32          `json:"generation"`

	age, idle time.Duration
}

func savedItemOf(e *journal.Entry, now time.Time) savedItem {
	item := savedItem{
		Client: e.Tuple.Source, Service: e.Service, ServiceAddress: e.Tuple.Destination, Protocol: maps.ProtocolName(e.Tuple.Protocol),
		Backend: e.Backend.Name, BackendAddress: e.Backend.Address, Method: e.Backend.Method, State: maps.State(e.State).String(),
		SequenceEnd: e.SequenceEnd, Acknowledgement: e.Acknowledgement, ClientMAC: net.HardwareAddr(e.Hop.MAC[:]).String(),
		Interface: e.Hop.Interface, Generation: e.Generation, age: max(now.Sub(e.Opened), 0), idle: max(now.Sub(e.Seen), 0),
	}
	item.Age, item.Idle = seconds(item.age), seconds(item.idle)
	if e.SourceAddr.IsValid() {
		item.Source = &e.SourceAddr
	}
	if e.Timestamp != 0 || e.TimestampEcho != 0 {
		item.Timestamp, item.TimestampEcho = &e.Timestamp, &e.TimestampEcho
	}
	return item
}

// savedFilter chooses connections on disk. Which services and backends there are is known at the end only.
type savedFilter struct {
	*connectionFilter
	services, backends []string
	now                time.Time
	known              map[[2]string]bool // service and backend
	met                map[string]bool    // words that meant something
}

func (f *savedFilter) passes(e *journal.Entry) bool {
	f.known[[2]string{e.Service, e.Backend.Name}] = true
	service, backend := len(f.services) == 0, len(f.backends) == 0
	for _, word := range f.services {
		if word == e.Service || word == e.Tuple.Destination.String() {
			service, f.met[word] = true, true
		}
	}
	for _, word := range f.backends {
		if word == e.Backend.Name || word == e.Service+"/"+e.Backend.Name {
			backend, f.met[word] = true, true
		}
	}
	from := func(is func(netip.AddrPort) bool) bool { return is(e.Tuple.Source) }
	return service && backend && (f.clients == nil || slices.ContainsFunc(f.clients, from)) &&
		(f.states == nil || slices.Contains(f.states, maps.State(e.State).String())) && (f.idle == 0 || f.now.Sub(e.Seen) >= f.idle)
}

// unmet is the first word that meant nothing on disk.
func (f *savedFilter) unmet() error {
	var services, backends []string
	for name := range f.known {
		services, backends = append(services, name[0]), append(backends, name[0]+"/"+name[1])
	}
	for _, word := range f.services {
		if !f.met[word] {
			return unknown("connection kept of service", word, services)
		}
	}
	for _, word := range f.backends {
		if !f.met[word] {
			return unknown("connection kept of backend", word, backends)
		}
	}
	return nil
}

func showState(c *cli.Context) error {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	used, err := usedFilters(c)
	if err != nil {
		return err
	}
	if slices.Contains(used.states, stateHalfOpen) {
		return wrongUsage("--state %s: what is half-open is not kept on disk", stateHalfOpen)
	}
	dir, err := stateDir(c)
	if err != nil {
		return err
	}
	f := savedFilter{
		connectionFilter: used, services: c.StringSlice("service"), backends: c.StringSlice("backend"), now: time.Now(),
		known: make(map[[2]string]bool), met: make(map[string]bool),
	}
	for i, word := range f.services {
		if a, err := parseAddrPort(word); err == nil {
			f.services[i] = a.String()
		}
	}
	type item = savedItem
	l := newList(c.App.Writer, formatOf(c),
		column[item]{title: "CLIENT", text: func(i *item) string { return i.Client.String() }},
		column[item]{title: "SERVICE", text: func(i *item) string { return i.Service }},
		column[item]{title: "BACKEND", text: func(i *item) string { return i.Backend }},
		column[item]{title: "STATE", text: func(i *item) string { return i.State }},
		column[item]{title: "AGE", right: true, text: func(i *item) string { return span(i.age) }},
		column[item]{title: "IDLE", right: true, text: func(i *item) string { return span(i.idle) }},
		column[item]{title: "METHOD", wide: true, text: func(i *item) string { return i.Method }},
		column[item]{title: "BACKEND-ADDRESS", wide: true, text: func(i *item) string { return i.BackendAddress.String() }},
		column[item]{title: "SOURCE", wide: true, text: func(i *item) string { return orDash(i.Source) }},
		column[item]{title: "SEQUENCE", wide: true, right: true, text: func(i *item) string { return fmt.Sprint(i.SequenceEnd) }},
		column[item]{title: "ACK", wide: true, right: true, text: func(i *item) string { return fmt.Sprint(i.Acknowledgement) }},
		column[item]{title: "CLIENT-MAC", wide: true, text: func(i *item) string { return i.ClientMAC }},
		column[item]{title: "INTERFACE", wide: true, text: func(i *item) string { return cmp.Or(i.Interface, "-") }},
	)
	report, err := journal.Load(dir, journal.LoadOptions{}, func(e *journal.Entry) error {
		if !f.passes(e) {
			return nil
		}
		return l.add(savedItemOf(e, f.now))
	})
	if err != nil {
		return err
	}
	if report.Missing {
		return noState(&report)
	}
	if err := l.end(); err != nil {
		return err
	}
	tellState(c.App.ErrWriter, &report)
	return f.unmet()
}

func noState(report *journal.Report) error {
	return fmt.Errorf("there is no %s: no connections were ever kept there", report.Directory)
}

// tellState says which files were read, and what is wrong.
func tellState(w io.Writer, report *journal.Report) {
	fmt.Fprintf(w, "%s: %s%s\n", report.Directory, plural(int(report.Entries), "connection"), writtenText(report))
	for i := range report.Files {
		f := &report.Files[i]
		fmt.Fprintf(w, "  %s: %s\n", f.Name, usedText(f))
		for _, note := range f.Notes {
			fmt.Fprintf(w, "  %s: %s\n", f.Name, note)
		}
	}
	for _, name := range report.Others {
		fmt.Fprintf(w, "  %s: not fairlead's, left alone\n", name)
	}
	for _, note := range report.Notes {
		fmt.Fprintf(w, "  %s\n", note)
	}
}

func writtenText(report *journal.Report) string {
	if report.Written.IsZero() {
		return ""
	}
	text := ", last written " + span(time.Since(report.Written)) + " ago"
	if report.Rebooted {
		text += ", before a reboot or elsewhere"
	}
	return text
}

func usedText(f *journal.FileReport) string {
	switch {
	case f.Used:
		return "read"
	case f.Snapshot:
		return "not needed: a newer snapshot is whole"
	}
	return "not needed: a snapshot stands for it"
}

// verifiedFile is a file as `state verify` prints it.
type verifiedFile struct {
	Name     string   `json:"name"`
	Snapshot bool     `json:"snapshot"`
	Used     bool     `json:"used"`
	Size     int64    `json:"bytes"`
	Blocks   int      `json:"blocks"`
	Opened   uint64   `json:"opened"`
	Begun    *float64 `json:"begun_seconds"` // ago
	Wrong    []string `json:"wrong"`

	begun time.Duration
}

// verified is all that `state verify` prints.
type verified struct {
	Directory   string         `json:"directory"`
	Missing     bool           `json:"missing"`
	Whole       bool           `json:"whole"`
	Connections uint64         `json:"connections"`
	Written     *float64       `json:"written_seconds"` // ago
	Rebooted    bool           `json:"rebooted"`
	Files       []verifiedFile `json:"files"`
	Others      []string       `json:"others"` // not fairlead's
	Wrong       []string       `json:"wrong"`  // with the whole
	Opened      uint64         `json:"opened"`
	Updated     uint64         `json:"updated"`
	Closed      uint64         `json:"closed"`
	Astray      uint64         `json:"astray"` // updates of connections that are not there
	Lost        uint64         `json:"lost"`   // events that could not be written
	Missed      uint64         `json:"missing_blocks"`
	Malformed   uint64         `json:"malformed_blocks"`
	Damaged     int64          `json:"damaged_bytes"`
}

func verifiedOf(report *journal.Report) verified {
	ago := func(t time.Time) (time.Duration, *float64) {
		if t.IsZero() {
			return 0, nil
		}
		d := max(time.Since(t), 0)
		s := seconds(d)
		return d, &s
	}
	v := verified{
		Directory: report.Directory, Missing: report.Missing, Whole: report.Whole() && !report.Missing, Connections: report.Entries,
		Rebooted: report.Rebooted, Files: []verifiedFile{}, Others: append([]string{}, report.Others...),
		Wrong: append([]string{}, report.Notes...), Opened: report.Opened, Updated: report.Updated, Closed: report.Closed,
		Astray: report.Astray, Lost: report.Lost, Missed: report.Missed, Malformed: report.Malformed, Damaged: report.Bytes,
	}
	_, v.Written = ago(report.Written)
	for _, f := range report.Files {
		file := verifiedFile{
			Name: f.Name, Snapshot: f.Snapshot, Used: f.Used, Size: f.Size, Blocks: f.Blocks, Opened: f.Opened,
			Wrong: append([]string{}, f.Notes...),
		}
		file.begun, file.Begun = ago(f.Begun)
		v.Files = append(v.Files, file)
	}
	return v
}

// wrongs is how much is wrong.
func (v *verified) wrongs() int {
	n := len(v.Wrong) + len(v.Others)
	for _, f := range v.Files {
		n += len(f.Wrong)
	}
	return n
}

// verifyAttempts is how often files that a daemon writes meanwhile are read, before what looks torn is taken to be.
const verifyAttempts = 3

func verifyState(c *cli.Context) error {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	dir, err := stateDir(c)
	if err != nil {
		return err
	}
	var report journal.Report
	for range verifyAttempts {
		if report, err = journal.Verify(dir); err != nil {
			return err
		}
		if report.Whole() || loader.Holder(report.Directory) == 0 {
			break
		}
	}
	v := verifiedOf(&report)
	if isJSON(c) {
		if err := object(c, v); err != nil {
			return err
		}
	} else if !v.Missing {
		if err := v.print(c); err != nil {
			return err
		}
	}
	switch {
	case v.Missing:
		return noState(&report)
	case v.Whole:
		return nil
	}
	return fmt.Errorf("verify %s: damaged in %s: what is whole, %s, a run takes all the same", v.Directory,
		plural(v.wrongs(), "place"), plural(int(v.Connections), "connection"))
}

func (v *verified) print(c *cli.Context) error {
	type item = verifiedFile
	l := newList(c.App.Writer, formatOf(c),
		column[item]{title: "FILE", text: func(i *item) string { return i.Name }},
		column[item]{title: "NEEDED", text: func(i *item) string { return yes(i.Used) }},
		column[item]{title: "SIZE", right: true, text: func(i *item) string { return size(uint64(i.Size)) }},
		column[item]{title: "BLOCKS", right: true, text: func(i *item) string { return count(i.Blocks) }},
		column[item]{title: "OPENED", right: true, text: func(i *item) string { return count(i.Opened) }},
		column[item]{title: "BEGUN", right: true, text: func(i *item) string {
			if i.Begun == nil {
				return "-"
			}
			return span(i.begun) + " ago"
		}},
		column[item]{title: "WHOLE", text: func(i *item) string { return yes(len(i.Wrong) == 0) }},
	)
	for _, f := range v.Files {
		if err := l.add(f); err != nil {
			return err
		}
	}
	if err := l.end(); err != nil {
		return err
	}
	w := c.App.Writer
	fmt.Fprintln(w)
	for _, f := range v.Files {
		for _, wrong := range f.Wrong {
			fmt.Fprintf(w, "%s: %s\n", f.Name, wrong)
		}
	}
	for _, name := range v.Others {
		fmt.Fprintf(w, "%s: not fairlead's, left alone\n", name)
	}
	for _, wrong := range v.Wrong {
		fmt.Fprintln(w, wrong)
	}
	text := plural(int(v.Connections), "connection")
	if v.Whole {
		text += "; all is whole"
	}
	_, err := fmt.Fprintln(w, text)
	return err
}

func saveState(c *cli.Context) (err error) {
	args, err := words(c, 1, 1)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(args[0])
	if err != nil {
		return err
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM) // what is half-written is taken away
	defer stop()
	saved, err := daemon.SaveState(ctx, dir, v.set, v.inv)
	if err != nil {
		return err
	}
	if saved.LeftOut > 0 {
		fmt.Fprintf(c.App.ErrWriter, "left out: %s whose backend or source address came or went meanwhile\n",
			plural(int(saved.LeftOut), "connection"))
	}
	_, err = fmt.Fprintf(c.App.Writer, "saved %s in %s (%s)\n", plural(int(saved.Connections), "connection"), dir, size(uint64(saved.Bytes)))
	return err
}

func restoreState(c *cli.Context) error {
	args, err := words(c, 1, 1)
	if err != nil {
		return err
	}
	from, err := stateAt(args[0])
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	cfg, err := config.Load(c.String("config"))
	if err != nil {
		return err
	}
	dry := c.Bool("dry-run")
	done, err := daemon.RestoreState(daemon.RestoreOptions{
		From: from, StateDir: cfg.StateDir, PinPath: cfg.Dataplane.PinPath, Damaged: c.Bool("damaged"), DryRun: dry,
	})
	if err == nil && !done.Report.Whole() || errors.Is(err, daemon.ErrDamaged) {
		tellState(c.App.ErrWriter, &done.Report)
	}
	if errors.Is(err, daemon.ErrDamaged) {
		return fmt.Errorf("%w: nothing is changed; with --damaged, what is whole is taken", err)
	} else if err != nil {
		return err
	}
	aside, begins := "set aside", "the next run begins with"
	if dry {
		aside, begins = "would be set aside", "the next run would begin with"
	}
	if done.Before != "" {
		fmt.Fprintf(c.App.Writer, "%s: what %s has, in %s\n", aside, cfg.StateDir, done.Before)
	}
	_, err = fmt.Fprintf(c.App.Writer, "%s %s of %s%s\n", begins, plural(int(done.Report.Entries), "connection"), from,
		writtenText(&done.Report))
	return err
}
