package journal

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// LoadOptions are how files are read. The zero value has defaults for all.
type LoadOptions struct {
	// Most is how many connections are held in memory at once, 2 million by default, at some 250 bytes each. Where there
	// may be more, the files are read several times, each time for another part of the connections.
	Most int

	now    time.Time // tests: the reader's clocks
	uptime time.Duration
	boot   *[16]byte
}

// FileReport is what was found in one file.
type FileReport struct {
	Name     string
	Snapshot bool
	Used     bool      // its records count; false: a newer snapshot stands for it
	Size     int64     // bytes
	Blocks   int       // whole ones
	Opened   uint64    // entries opened in them; in a snapshot, all
	Begun    time.Time // by its header; zero: that is damaged
	Notes    []string  // what is wrong with it; empty: nothing
}

// Report is what a directory was found to hold.
type Report struct {
	Directory string
	Missing   bool // there is none yet
	Files     []FileReport
	Others    []string // names of files that are not fairlead's; they are left alone

	Entries  uint64    // connections that were open at the end
	Written  time.Time // when the last block was, by its writer's clock; zero: there is none
	Rebooted bool      // since then, as far as can be told

	Opened, Updated, Closed uint64   // events read, the entries of snapshots among Opened
	Astray                  uint64   // updates of connections that are not there: what opened them is lost, or they were closed since
	Lost                    uint64   // events that the writer could not keep, by its own word
	Missed                  uint64   // blocks that are missing
	Malformed               uint64   // blocks whose records make no sense
	Bytes                   int64    // that are no whole block, torn ends included
	Notes                   []string // what is wrong with the whole; that of each file is with it
}

// Whole tells whether nothing is missing or damaged that can be told to be. A torn end is what a power cut leaves of the
// last group of events, and counts as damage here all the same: some connections may have been in it.
func (r *Report) Whole() bool {
	if len(r.Notes) > 0 || len(r.Others) > 0 {
		return false
	}
	for _, f := range r.Files {
		if len(f.Notes) > 0 {
			return false
		}
	}
	return true
}

// String is the report on one line.
func (r *Report) String() string {
	if r.Missing {
		return fmt.Sprintf("there is no journal in %s", r.Directory)
	}
	used := 0
	for _, f := range r.Files {
		if f.Used {
			used++
		}
	}
	text := fmt.Sprintf("%d connections in %d files", r.Entries, used)
	if !r.Written.IsZero() {
		text += ", last written at " + r.Written.UTC().Format(time.RFC3339)
	}
	var wrong []string
	wrong = append(wrong, r.Notes...)
	for _, f := range r.Files {
		for _, note := range f.Notes {
			wrong = append(wrong, f.Name+": "+note)
		}
	}
	if len(r.Others) > 0 {
		wrong = append(wrong, "not fairlead's, left alone: "+strings.Join(first(r.Others, 5), ", "))
	}
	if len(wrong) == 0 {
		return text + "; all whole"
	}
	return text + "; " + strings.Join(first(wrong, 8), "; ")
}

// first is the first n of a list, and how many more there are.
func first(list []string, n int) []string {
	if len(list) <= n {
		return list
	}
	return append(list[:n:n], fmt.Sprintf("and %d more", len(list)-n))
}

// Load gives visit each connection that was open when the journal under a state directory ended. It takes no lock and
// writes nothing, so it can read a directory in use, where it finds what was written when it began. An entry belongs to
// visit only until that returns; an error of visit's ends it.
//
// Times are by this reader's clock. A block carries the wall clock and the time since boot of its writing: within one
// boot the latter tells how long ago that was, else the wall clock does; where that has been set back behind the writing,
// no time has passed since. So no age is negative, nor less than it was at writing.
//
// What is damaged is left out and said in the Report: a torn end, blocks that are no more what was written, a snapshot
// that is not whole (then the one before is read, with all that was journaled since). Files that are not fairlead's are
// left alone. A lost block may lose connections, or leave some that had been closed; none is ever given another's
// backend. It fails if the directory can't be read, and with ErrVersion if a file is of a later version, and gives nothing to visit
// then. A missing directory is an empty journal.
func Load(dir string, options LoadOptions, visit func(*Entry) error) (Report, error) {
	return load(dir, options, visit, false)
}

// Verify reads all files, those too that Load has no need of, and says what is wrong with them. It fails as Load does.
func Verify(dir string) (Report, error) {
	return load(dir, LoadOptions{}, func(*Entry) error { return nil }, true)
}

// source is a file being read.
type source struct {
	found
	*scan
	file   *os.File
	report *FileReport
	apply  bool
}

// reading is one Load.
type reading struct {
	options LoadOptions
	report  *Report
	catalog catalog
	decoder decoder
	entries map[key]held
	now     int64 // ms
	uptime  int64 // ns
	boot    [16]byte
	buffer  []byte
	part    uint64
	parts   uint64
}

func load(dir string, options LoadOptions, visit func(*Entry) error, verify bool) (report Report, err error) {
	options.Most = cmp.Or(options.Most, 2<<20)
	report.Directory = directory(dir)
	r := &reading{options: options, report: &report, now: options.now.UnixMilli(), uptime: int64(options.uptime)}
	if options.now.IsZero() {
		r.now = time.Now().UnixMilli()
	}
	if options.uptime == 0 {
		r.uptime = int64(uptime())
	}
	if options.boot != nil {
		r.boot = *options.boot
	} else {
		r.boot = bootID()
	}
	r.decoder.catalog = &r.catalog
	sources, err := r.open()
	defer func() {
		for _, s := range sources {
			s.file.Close()
		}
	}()
	if err != nil {
		return report, fmt.Errorf("read the journal: %w", err)
	}
	if report.Missing {
		return report, nil
	}
	r.choose(sources)
	opened := uint64(0)
	for _, s := range sources {
		if s.apply {
			opened += s.opened
		}
	}
	r.parts = opened/uint64(options.Most) + 1
	for r.part = range r.parts {
		r.entries = make(map[key]held, min(opened/r.parts, 1<<16))
		for _, s := range sources {
			if s.apply || verify && r.part == 0 {
				r.file(s)
			}
		}
		for k, h := range r.entries {
			entry := r.entry(&k, &h)
			report.Entries++
			if err := visit(&entry); err != nil {
				return report, err
			}
		}
	}
	return report, nil
}

// open finds and scans the files. A directory in use may lose some between listing and opening: it is listed again then.
func (r *reading) open() (sources []*source, err error) {
	for range 100 {
		var again bool
		sources, again, err = r.openOnce()
		if !again {
			return sources, err
		}
		for _, s := range sources {
			s.file.Close()
		}
	}
	return nil, fmt.Errorf("files vanish from %s while they are read", r.report.Directory)
}

func (r *reading) openOnce() (sources []*source, again bool, err error) {
	ours, _, others, err := inventory(r.report.Directory)
	if errors.Is(err, fs.ErrNotExist) {
		r.report.Missing = true
		return nil, false, nil
	} else if err != nil {
		return nil, false, err
	}
	*r.report = Report{Directory: r.report.Directory, Others: others}
	for _, f := range ours {
		path := filepath.Join(r.report.Directory, f.name)
		file, err := os.Open(path)
		if isGone(err) {
			return sources, true, nil
		}
		var info os.FileInfo
		if err == nil {
			if info, err = file.Stat(); err != nil {
				file.Close()
			}
		}
		if err != nil {
			r.report.Notes = append(r.report.Notes, fmt.Sprintf("%s can't be read: %v", f.name, plainError(err)))
			continue
		}
		sources = append(sources, &source{found: f, file: file, scan: &scan{size: info.Size()}})
	}
	var kept []*source
	for _, s := range sources {
		path := filepath.Join(r.report.Directory, s.name)
		scanned, err := scanFile(s.file, s.size, s.kind, s.number)
		report := FileReport{Name: s.name, Snapshot: s.kind == snapshot, Size: s.size}
		switch {
		case errors.Is(err, ErrVersion):
			return sources, false, fmt.Errorf("%s: %w", path, err)
		case errors.Is(err, errForeign):
			r.report.Others = append(r.report.Others, s.name)
			if err != errForeign {
				r.report.Notes = append(r.report.Notes, fmt.Sprintf("%s: %v", s.name, err))
			}
			s.file.Close()
			continue
		case errors.Is(err, errDamaged):
			if s.size < headerSize {
				report.Notes = append(report.Notes, "it has no header: power went when it was made")
			} else {
				report.Notes = append(report.Notes, "neither its header nor any of its blocks is whole")
			}
			r.report.Bytes += s.size
		}
		s.scan = scanned
		r.report.Files = append(r.report.Files, report)
		kept = append(kept, s)
	}
	for i, s := range kept {
		s.report = &r.report.Files[i]
	}
	return kept, false, nil
}

// choose decides which files count: the newest whole snapshot and all that follows it. A snapshot that is not whole gives
// what it has, in its place: it is of use where no other is.
func (r *reading) choose(sources []*source) {
	from := 0
	for i, s := range sources {
		if s.kind == snapshot && s.complete(s.file) {
			from = i
		}
	}
	var run, next uint64
	for i, s := range sources {
		s.apply = i >= from
		f := s.report
		f.Used = s.apply
		f.Blocks, f.Opened = len(s.blocks), s.opened
		if !s.headless {
			f.Begun = time.UnixMilli(s.wall)
		} else if len(s.blocks) > 0 {
			f.note("its header is damaged")
		}
		if s.bad > 0 {
			f.note("%d bytes from byte %d on are damaged", s.bad, s.badAt)
			r.report.Bytes += s.bad
		}
		if s.missing > 0 {
			f.note("%d blocks are missing from its middle", s.missing)
			r.report.Missed += s.missing
		}
		if s.misplaced > 0 {
			f.note("%d blocks stand where they were not written: they are left out", s.misplaced)
		}
		if s.unread != nil {
			f.note("it can't be read everywhere: %v", plainError(s.unread))
		}
		if s.torn > 0 && (len(s.blocks) > 0 || !s.headless) {
			f.note("the last %d bytes are no whole block: torn by a power cut, or being written", s.torn)
			r.report.Bytes += s.torn
		}
		if n := len(s.blocks); n > 0 {
			if written := time.UnixMilli(s.blocks[n-1].wall); written.After(r.report.Written) || s.kind == segment {
				r.report.Written = written
				r.report.Rebooted = s.headless || !r.sameBoot(s)
			}
		}
		if s.kind == snapshot {
			if !s.complete(s.file) {
				f.note("the snapshot is not whole")
			}
			if s.apply && !s.headless {
				run, next = s.run, s.sequence
			}
			continue
		}
		if s.headless || !s.apply {
			run = 0
			continue
		}
		// Within a run, numbers of blocks go on from segment to segment. One that could not be made safe was written again
		// into the next: then they overlap.
		if run == s.run && s.header.sequence > next {
			f.note("%d blocks before it are missing", s.header.sequence-next)
			r.report.Missed += s.header.sequence - next
		}
		if run != s.run {
			next = s.header.sequence
		}
		run = s.run
		for len(s.blocks) > 0 && s.blocks[0].sequence < next {
			s.opened -= uint64(s.blocks[0].opened)
			s.blocks = s.blocks[1:]
		}
		if n := len(s.blocks); n > 0 {
			next = s.blocks[n-1].sequence + 1
		} else {
			next = max(next, s.header.sequence)
		}
	}
	if len(sources) > 0 && from == 0 && sources[0].kind == segment && sources[0].number > 1 {
		r.report.Notes = append(r.report.Notes, "there is no snapshot: what was before "+sources[0].name+" is missing")
	}
}

func (f *FileReport) note(format string, args ...any) {
	const most = 20
	switch n := len(f.Notes); {
	case n < most:
		f.Notes = append(f.Notes, fmt.Sprintf(format, args...))
	case n == most:
		f.Notes = append(f.Notes, "and more of the kind")
	}
}

func (r *reading) sameBoot(s *source) bool { return r.boot != [16]byte{} && s.boot == r.boot }

// file reads the records of a file, and applies them if they count.
func (r *reading) file(s *source) {
	apply := func(rec *record) { r.apply(rec, s.kind) }
	if !s.apply {
		apply = func(*record) {}
	}
	for i := range s.blocks {
		b := &s.blocks[i]
		n := blockHeader + int(b.size)
		if cap(r.buffer) < n {
			r.buffer = make([]byte, n)
		}
		r.buffer = r.buffer[:n]
		_, err := s.file.ReadAt(r.buffer, b.offset)
		if err == nil && blockSum(r.buffer) != binary.LittleEndian.Uint32(r.buffer[44:]) {
			err = errors.New("it is another than a moment ago")
		}
		if err != nil {
			r.report.Missed++
			s.report.note("the block at byte %d can't be read again: %v", b.offset, plainError(err))
			continue
		}
		if err := r.decoder.decode(r.buffer[blockHeader:], b.wall-r.shift(s, b), apply); err != nil {
			if r.part == 0 {
				r.report.Malformed++
				s.report.note("the block at byte %d is malformed: %v: its rest is left out", b.offset, err)
			}
		}
	}
}

// clockStep is by how much two clocks must disagree on how long ago something was, for the wall clock to be wrong.
const clockStep = 2000 // ms

// shift is by how many milliseconds the writer's wall clock was ahead of what the reader's would have shown then.
func (r *reading) shift(s *source, b *blockAt) int64 {
	passed := r.now - b.wall
	if !s.headless && r.sameBoot(s) && r.uptime >= b.uptime {
		elapsed := (r.uptime - b.uptime) / int64(time.Millisecond)
		if d := passed - elapsed; d > clockStep || d < -clockStep {
			return -d
		}
	}
	if passed < 0 {
		return -passed
	}
	return 0
}

// partOf is which part of the connections a key is in.
func (r *reading) partOf(k *key) uint64 {
	h := binary.LittleEndian.Uint64(k.source[:8])*0x9e3779b97f4a7c15 ^ binary.LittleEndian.Uint64(k.source[8:])*0xc2b2ae3d27d4eb4f ^
		uint64(k.port)*0x165667b19e3779f9
	h ^= h >> 32
	h *= 0xd6e8feb86659fd93
	return (h ^ h>>32) % r.parts
}

func (r *reading) apply(rec *record, kind fileKind) {
	switch rec.kind {
	case recordLost:
		if r.part == 0 {
			r.report.Lost += rec.count
			r.lostNote()
		}
		return
	case recordEnd:
		return
	}
	if r.parts > 1 && r.partOf(&rec.key) != r.part {
		return
	}
	switch rec.kind {
	case recordOpened:
		r.report.Opened++
		r.entries[rec.key] = rec.entry
	case recordUpdated:
		r.report.Updated++
		old, ok := r.entries[rec.key]
		if !ok || old.generation != rec.entry.generation {
			r.report.Astray++
			return
		}
		e := rec.entry
		e.opened, e.service, e.backend, e.source, e.sourcePort = old.opened, old.service, old.backend, old.source, old.sourcePort
		r.entries[rec.key] = e
	case recordClosed:
		r.report.Closed++
		if old, ok := r.entries[rec.key]; ok && old.generation == rec.entry.generation {
			delete(r.entries, rec.key)
		}
	}
}

// lostNote keeps the note of the writer's losses up to date; it is the first.
func (r *reading) lostNote() {
	const end = " events could not be written at their time: the disk was full, failing or too slow"
	note := fmt.Sprint(r.report.Lost) + end
	if len(r.report.Notes) > 0 && strings.HasSuffix(r.report.Notes[0], end) {
		r.report.Notes[0] = note
		return
	}
	r.report.Notes = append([]string{note}, r.report.Notes...)
}

// entry is what is held of a connection as its user knows it.
func (r *reading) entry(k *key, h *held) Entry {
	d := r.catalog.destinations.all[k.destination]
	e := Entry{
		Tuple:   Tuple{Destination: d.address, Protocol: d.protocol},
		Service: r.catalog.services.all[h.service], Backend: r.catalog.backends.all[h.backend],
		Generation: h.generation, State: h.state, Opened: r.time(h.opened), Seen: r.time(h.seen),
		SequenceEnd: h.sequenceEnd, Acknowledgement: h.acknowledgement, Timestamp: h.timestamp, TimestampEcho: h.timestampEcho,
	}
	source := netip.AddrFrom16(k.source)
	if !k.ipv6 {
		source = netip.AddrFrom4([4]byte(k.source[:4]))
	}
	e.Tuple.Source = netip.AddrPortFrom(source, k.port)
	if h.source > 0 {
		e.SourceAddr = netip.AddrPortFrom(r.catalog.sources.all[h.source-1], h.sourcePort)
	}
	if h.hop > 0 {
		e.Hop = r.catalog.hops.all[h.hop-1]
	}
	return e
}

// time is a moment that is not ahead of the reader's clock.
func (r *reading) time(ms int64) time.Time { return time.UnixMilli(min(ms, r.now)).UTC() }
