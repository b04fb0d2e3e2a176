package journal

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Options of a Journal. The zero value has defaults for all.
type Options struct {
	Logger *slog.Logger // default: none
	// Interval is how far apart the disk is asked to make what was written safe: 250 ms by default. What a power cut
	// may take is that, and what the disk takes to do it.
	Interval time.Duration
	// QueueBytes is how much may wait for the disk, 32 MiB by default: some 600,000 new connections. What comes beyond
	// it is lost, counted, and made good by a snapshot.
	QueueBytes int
	// SegmentBytes and SnapshotAge are when a new snapshot is asked for: when the journal since the last is as large as
	// this (64 MiB by default) and as twice that snapshot, or when that is so old (10 minutes by default) and something
	// has happened since.
	SegmentBytes int64
	SnapshotAge  time.Duration
	// Late is how far behind the journal may be and still be called healthy: 1 s by default.
	Late time.Duration

	files    *files           // tests: instead of a disk's own
	synced   func(group)      // tests: called when a group is safe
	patience time.Duration    // tests: how long Open waits
	now      func() time.Time // tests: the wall clock
}

// retryMost is how long at most a disk that failed is left alone.
const retryMost = 5 * time.Second

// ErrClosed is what the methods of a closed Journal fail with.
var ErrClosed = errors.New("the journal is closed")

// Status is how a journal does.
type Status struct {
	// Healthy: what was added more than a moment ago is on disk, and nothing is missing there. Since is when that became
	// so or ceased to be, Text what is wrong and what can be done, empty when healthy.
	Healthy bool
	Since   time.Time
	Text    string

	Events  uint64 // taken since Open
	Lost    uint64 // not taken, because too much waited for the disk; a later snapshot makes them good
	Refused uint64 // not taken, or left out of snapshots, because they can't be written: a name too long, an address with a zone

	Behind time.Duration // the age of the oldest event that is not yet safe
	Lag    time.Duration // from Add to safe, of the oldest event of the group last written
	Queued int           // bytes that wait

	Written       uint64    // bytes written since Open, snapshots included
	SegmentBytes  int64     // of the journal since the last snapshot
	SnapshotBytes int64     // of the last snapshot; 0: none yet
	Snapshot      time.Time // when it was begun; zero: none by this process
	Entries       uint64    // in it
}

// block is a sealed one: its header is filled in when it is known which file it goes to.
type block struct {
	blockHead
	bytes []byte
}

// group is what is made safe at once.
type group struct {
	upTo   uint64        // all events up to this count are safe now
	bytes  int           // written
	lag    time.Duration // from Add to safe, of its oldest event
	number uint64        // of its segment
}

type waiter struct {
	upTo uint64
	done chan error
}

// rotation is where a snapshot begins.
type rotation struct {
	number, sequence uint64
	gaps, events     uint64 // what was lost, and what was taken, before it
	tail             int64  // bytes of segments before it
	err              error
}

// Journal is a journal being written. Its methods may be called by several goroutines at once; the order of calls to Add
// is the order of events.
type Journal struct {
	dir     string
	options Options
	files   files
	log     *slog.Logger
	run     uint64
	boot    [16]byte

	kick      chan struct{} // to the writer: look again
	wanted    chan struct{}
	done      chan struct{} // the writer has ended
	snapshots chan struct{} // holds one token: who has it may make a snapshot
	stop      chan struct{} // closed by Close
	stopOnce  sync.Once

	mu       sync.Mutex
	encoder  encoder
	current  block // being filled; no bytes: none
	sealed   []block
	free     [][]byte
	queued   int
	added    uint64    // events taken
	durable  uint64    // of these, safe
	oldest   time.Time // when the oldest event came that the writer has not taken; zero: none
	flight   time.Time // the same of those it has taken and are not safe
	waiters  []waiter
	rotates  []chan rotation
	closing  bool // no more events
	finish   bool // the writer is to end
	alone    bool // Open has not waited for the first segment
	closeErr error

	lost, lostTold, refused uint64
	refusedWhy              error
	gaps                    uint64 // how often something was lost that only a snapshot can make good
	healed                  uint64 // the gaps that one has
	failure                 error  // of the disk, nil while it works
	late                    bool
	lateTimer               *time.Timer
	retryAt                 time.Time
	retry                   time.Duration

	need        bool // a snapshot
	asked       bool // it was asked for
	needAt      time.Time
	needRetry   time.Duration
	ageAt       time.Time
	sinceEvents uint64 // count of events at the last rotation whose snapshot succeeded
	tail        int64  // bytes of segments since the base
	known       bool   // base and spare
	base, spare uint64 // numbers of the newest snapshot and of the one before; 0: none
	aside       string // the snapshot being written
	dropped     uint64 // the base whose elders were removed to make room
	baseBytes   int64
	baseEntries uint64
	baseTime    time.Time
	written     uint64
	lag         time.Duration
	told        string // the state last logged
	toldRefused bool
	since       time.Time
	telling     bool
	tellers     sync.WaitGroup

	// The writer's own.
	lock   io.Closer
	rooted bool   // the directory is there, ours, and its files are known
	number uint64 // of the last file
	out    *output
	next   uint64 // sequence of the next block
	kept   []block
}

// output is the segment being written.
type output struct {
	header
	path   string
	file   file
	blocks int // safe ones
}

// Open begins a new segment of the journal under a state directory; both are made when missing. Nothing is read of
// earlier files but their headers.
//
// It fails if another process has the journal (ErrLocked), or if a later version of fairlead wrote it (ErrVersion). A
// disk that can't be written, or that has not answered within 5 seconds, is no error: Status and the log tell of it, and it
// is tried again until it works. Those two are then told in the same way.
func Open(dir string, options Options) (*Journal, error) {
	options.Interval = cmp.Or(options.Interval, 250*time.Millisecond)
	options.QueueBytes = cmp.Or(options.QueueBytes, 32<<20)
	options.SegmentBytes = cmp.Or(options.SegmentBytes, 64<<20)
	options.SnapshotAge = cmp.Or(options.SnapshotAge, 10*time.Minute)
	options.Late = cmp.Or(options.Late, time.Second)
	options.patience = cmp.Or(options.patience, 5*time.Second)
	if options.now == nil {
		options.now = time.Now
	}
	j := &Journal{
		dir: directory(dir), options: options, log: options.Logger, run: rand.Uint64(), boot: bootID(),
		kick: make(chan struct{}, 1), wanted: make(chan struct{}, 1), done: make(chan struct{}),
		snapshots: make(chan struct{}, 1), stop: make(chan struct{}),
		since: options.now(), need: true, ageAt: time.Now().Add(options.SnapshotAge),
	}
	if options.files != nil {
		j.files = *options.files
	} else {
		j.files = diskFiles()
	}
	if j.log == nil {
		j.log = slog.New(slog.DiscardHandler)
	}
	j.lateTimer = time.AfterFunc(time.Hour, j.checkLate)
	j.lateTimer.Stop()
	first := make(chan error, 1)
	go func() {
		if j.begins(first) {
			j.write()
		}
	}()
	timer := time.NewTimer(options.patience)
	defer timer.Stop()
	var err error
	select {
	case err = <-first:
	case <-timer.C:
		j.mu.Lock()
		select {
		case err = <-first:
		default:
			j.alone = true
			j.failure = errSilent
			j.tell()
		}
		j.mu.Unlock()
	}
	if err != nil {
		return nil, fmt.Errorf("open the journal: %w", err)
	}
	return j, nil
}

// errSilent: the disk has not even failed.
var errSilent = errors.New("the disk does not answer")

// begins makes the first segment, and tells how that went; false: Open is to fail.
func (j *Journal) begins(first chan<- error) bool {
	err := j.root()
	if err == nil {
		err = j.begin(j.next)
	}
	if err != nil {
		j.letGo()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.failure = nil
	if (errors.Is(err, ErrLocked) || errors.Is(err, ErrVersion)) && !j.alone {
		first <- err
		close(j.done)
		return false
	}
	if err != nil {
		j.failed(err)
	}
	j.tell()
	first <- nil
	return true
}

// Add takes events to be written. It never waits for a disk.
func (j *Journal) Add(events []Event) {
	if len(events) == 0 {
		return
	}
	now := time.Now()
	j.mu.Lock()
	wasIdle, lost, refused := j.oldest.IsZero(), j.lost, j.refused
	for i := range events {
		j.add(&events[i], now)
	}
	wake := !j.oldest.IsZero() && (wasIdle || j.queued >= j.options.QueueBytes/4)
	if wasIdle && wake && j.flight.IsZero() {
		j.lateTimer.Reset(j.options.Late)
	}
	if lost != j.lost && !j.closing {
		j.gaps++
		j.need = true
	}
	if lost != j.lost || refused != j.refused {
		j.tell()
	}
	j.mu.Unlock()
	if wake {
		j.wake()
	}
}

func (j *Journal) wake() {
	select {
	case j.kick <- struct{}{}:
	default:
	}
}

// blockRoom is what a block's buffer has beyond where it is full: the largest record, with all that it tells first.
const blockRoom = 4096

func (j *Journal) add(event *Event, now time.Time) {
	entry := &event.Entry
	var err error
	switch event.Kind {
	case Opened:
		err = entry.check()
	case Updated:
		if err = entry.Tuple.check(); err == nil && len(entry.Hop.Interface) > maxName {
			err = errName
		}
	case Closed:
		err = entry.Tuple.check()
	default:
		err = errKind
	}
	if err != nil {
		j.refused++
		j.refusedWhy = fmt.Errorf("%v of %v: %w", event.Kind, entry.Tuple, err)
		return
	}
	if j.queued >= j.options.QueueBytes || j.closing {
		j.lost++
		return
	}
	j.begun()
	b := j.current.bytes
	before := len(b)
	switch event.Kind {
	case Opened:
		b = j.encoder.opened(b, entry)
		j.current.opened++
	case Updated:
		b = j.encoder.updated(b, entry)
	case Closed:
		b = j.encoder.closed(b, &entry.Tuple, entry.Generation)
	}
	j.current.bytes = b
	j.queued += len(b) - before
	j.added++
	if j.oldest.IsZero() {
		j.oldest = now
	}
	if len(b) >= blockFull {
		j.sealed = append(j.sealed, j.current)
		j.current = block{}
	}
}

// begun sees to it that there is a block to write into, and that what was lost is told in it. The caller holds mu.
func (j *Journal) begun() {
	if j.current.bytes == nil {
		j.current = block{blockHead{wall: j.options.now().UnixMilli(), uptime: int64(uptime())}, j.buffer()}
		j.encoder.begin(j.current.wall)
		j.queued += blockHeader
	}
	if j.lost != j.lostTold {
		before := len(j.current.bytes)
		j.current.bytes = appendCount(j.current.bytes, recordLost, j.lost-j.lostTold)
		j.queued += len(j.current.bytes) - before
		j.lostTold = j.lost
	}
}

func appendCount(b []byte, kind byte, count uint64) []byte {
	return binary.AppendUvarint(append(b, kind), count)
}

// buffer is an empty block: room for its header.
func (j *Journal) buffer() []byte {
	if n := len(j.free); n > 0 {
		b := j.free[n-1]
		j.free = j.free[:n-1]
		return b[:blockHeader]
	}
	return make([]byte, blockHeader, blockFull+blockRoom)
}

// Flush waits until all that was added before is safe on disk, and fails if an attempt at it does.
func (j *Journal) Flush(ctx context.Context) error {
	j.mu.Lock()
	if j.durable == j.added {
		j.mu.Unlock()
		return nil
	}
	w := waiter{j.added, make(chan error, 1)}
	j.waiters = append(j.waiters, w)
	j.mu.Unlock()
	j.wake()
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("flush the journal: %w", ctx.Err())
	case <-j.done:
		select {
		case err := <-w.done:
			return err
		default:
			return ErrClosed
		}
	}
}

// Wanted tells when a snapshot is due: after Open, after a loss once the disk works again, and as the options say. It is
// told again, at growing distances, when the snapshot failed.
func (j *Journal) Wanted() <-chan struct{} { return j.wanted }

// Close makes safe what was added, lets go of the files and ends. It fails, and gives up what waits, if the disk does or
// when the context ends; a write that hangs in the kernel is then left to end by itself.
func (j *Journal) Close(ctx context.Context) error {
	j.mu.Lock()
	j.closing = true
	j.mu.Unlock()
	j.stopOnce.Do(func() { close(j.stop) })
	select {
	case j.snapshots <- struct{}{}: // one under way sees stop
		defer func() { <-j.snapshots }()
	case <-ctx.Done():
	}
	j.mu.Lock()
	j.finish = true
	j.mu.Unlock()
	j.wake()
	select {
	case <-j.done:
		j.tellers.Wait()
		return j.closeErr
	case <-ctx.Done():
		return fmt.Errorf("close the journal: what waits is given up: %w", ctx.Err())
	}
}

// write is the writer: the one goroutine that appends.
func (j *Journal) write() {
	defer close(j.done)
	timer := time.NewTimer(time.Hour)
	for {
		wait, work := j.due(time.Now())
		if !work {
			timer.Reset(wait)
			select {
			case <-j.kick:
			case <-timer.C:
			}
			continue
		}
		if j.turn() {
			return
		}
	}
}

// due tells whether the writer has something to do, or else how long it may sleep. It also says when a snapshot is due.
func (j *Journal) due(now time.Time) (wait time.Duration, work bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.waiters) > 0 || len(j.rotates) > 0 || j.finish {
		return 0, true
	}
	var at []time.Time
	if j.failure != nil {
		at = append(at, j.retryAt)
	} else {
		if !j.oldest.IsZero() {
			due := j.oldest.Add(j.options.Interval)
			if j.queued >= j.options.QueueBytes/4 {
				due = now
			}
			at = append(at, due)
		}
	}
	if len(at) > 0 && !at[0].After(now) {
		return 0, true
	}
	if !now.Before(j.ageAt) {
		j.ageAt = now.Add(j.options.SnapshotAge)
		if j.added != j.sinceEvents {
			j.need = true
		}
	}
	at = append(at, j.ageAt)
	if j.need && !j.asked && j.failure == nil && !j.closing {
		if now.Before(j.needAt) {
			at = append(at, j.needAt)
		} else {
			j.asked = true
			select {
			case j.wanted <- struct{}{}:
			default:
			}
		}
	}
	return max(slices.MinFunc(at, time.Time.Compare).Sub(now), time.Millisecond), false
}

// turn writes what waits and answers those who wait for it; true: that was the last.
func (j *Journal) turn() (last bool) {
	j.mu.Lock()
	if j.lost != j.lostTold {
		j.begun()
	}
	if j.current.bytes != nil {
		j.sealed = append(j.sealed, j.current)
		j.current = block{}
	}
	taken := j.sealed
	j.sealed = nil
	if j.flight.IsZero() {
		j.flight = j.oldest
	}
	j.oldest = time.Time{}
	oldest := j.flight
	upTo := j.added
	rotates := j.rotates
	j.rotates = nil
	last = j.finish
	gaps := j.gaps
	j.mu.Unlock()

	for i := range taken {
		taken[i].sequence = j.next
		j.next++
	}
	j.kept = append(j.kept, taken...)
	bytes, err := j.commit(len(rotates) > 0)
	if err != nil {
		if isFull(err) {
			j.dropSpare()
		}
		j.letGo()
	}
	number := uint64(0)
	if j.out != nil {
		number = j.out.number
	}

	j.mu.Lock()
	if err != nil {
		for _, w := range j.waiters {
			w.done <- err
		}
		j.waiters = nil
		j.failed(err)
	} else {
		j.failure, j.retry = nil, 0
		if oldest.IsZero() {
			j.lag = 0
		} else {
			j.lag = time.Since(oldest)
		}
		j.durable = upTo
		j.flight = time.Time{}
		j.written += uint64(bytes)
		j.tail += int64(bytes)
		for _, b := range j.kept {
			j.queued -= len(b.bytes)
			if len(j.free) < 64 {
				j.free = append(j.free, b.bytes)
			}
		}
		j.waiters = slices.DeleteFunc(j.waiters, func(w waiter) bool {
			if w.upTo <= upTo {
				w.done <- nil
				return true
			}
			return false
		})
		if j.tail >= max(j.options.SegmentBytes, 2*j.baseBytes) {
			j.need = true
		}
		j.judgeLate()
		j.tell()
	}
	for _, r := range rotates {
		r <- rotation{number, j.next, gaps, upTo, j.tail, err} // each has room for it
	}
	lag := j.lag
	if last {
		j.closeErr = err
		j.lateTimer.Stop()
	}
	j.mu.Unlock()
	if err == nil {
		clear(j.kept)
		j.kept = j.kept[:0]
		if j.options.synced != nil && !oldest.IsZero() {
			j.options.synced(group{upTo, bytes, lag, number})
		}
	}
	if last {
		j.letGo()
	}
	return last
}

// failed notes that the disk did, and when it is tried again. The caller holds mu, or is alone.
func (j *Journal) failed(err error) {
	j.failure = err
	j.retry = min(max(2*j.retry, j.options.Interval), retryMost)
	j.retryAt = time.Now().Add(j.retry)
	j.tell()
}

// commit writes what is kept and makes it safe; rotate: and then begins a new segment. After an error nothing is known
// of what the current segment's end holds: the kernel may have dropped what it could not write, and say of the next
// attempt that all is well. So the segment is not used again, and all that was not safe goes into another one.
func (j *Journal) commit(rotate bool) (bytes int, err error) {
	if err := j.root(); err != nil {
		return 0, err
	}
	if j.out == nil {
		first := j.next
		if len(j.kept) > 0 {
			first = j.kept[0].sequence
		}
		if err := j.begin(first); err != nil {
			return 0, err
		}
	}
	if len(j.kept) > 0 {
		for i := range j.kept {
			b := &j.kept[i]
			b.id = j.out.id
			b.seal(b.bytes)
			if _, err := j.out.file.Write(b.bytes); err != nil {
				return 0, fmt.Errorf("write the journal in %s: %w", j.dir, plainError(err))
			}
			bytes += len(b.bytes)
		}
		if err := j.out.file.Sync(); err != nil {
			return 0, fmt.Errorf("write the journal in %s: %w", j.dir, plainError(err))
		}
		j.out.blocks += len(j.kept)
	}
	// Whoever removes the directory under us does it without an error of ours.
	if err := j.files.same(j.out.path, j.out.file); err != nil {
		j.missed()
		return 0, fmt.Errorf("write the journal in %s: %w", j.dir, plainError(err))
	}
	if rotate {
		j.mu.Lock()
		base := j.base
		j.mu.Unlock()
		if j.out.blocks > 0 || j.out.number == base {
			j.out.file.Close() // all in it is safe
			j.out = nil
			if err := j.begin(j.next); err != nil {
				return 0, err // what was written is written again into the next segment, which changes nothing
			}
		}
	}
	return bytes, nil
}

// root makes the directory ours, unless it is.
func (j *Journal) root() error {
	if j.rooted {
		return nil
	}
	if err := j.files.makeDir(j.dir); err != nil {
		return fmt.Errorf("make %s: %w", j.dir, plainError(err))
	}
	lock, err := j.files.lock(j.dir)
	if err != nil {
		return err
	}
	j.lock = lock
	ours, half, others, err := inventory(j.dir)
	if err != nil {
		return fmt.Errorf("list %s: %w", j.dir, plainError(err))
	}
	var base, spare uint64
	var tail, baseBytes int64
	for _, f := range ours {
		path := filepath.Join(j.dir, f.name)
		if err := readHeader(path, f.kind, f.number); errors.Is(err, ErrVersion) {
			return fmt.Errorf("%s: %w", path, err)
		} else if errors.Is(err, errForeign) {
			others = append(others, f.name)
		}
		j.number = max(j.number, f.number)
		info, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("list %s: %w", j.dir, plainError(err))
		}
		if f.kind == snapshot {
			base, spare, tail, baseBytes = f.number, base, 0, info.Size()
		} else {
			tail += info.Size()
		}
	}
	for _, name := range others {
		j.log.Warn("a file in the journal's directory is not fairlead's: it is left alone", "file", filepath.Join(j.dir, name))
	}
	j.mu.Lock()
	writing := j.aside
	j.mu.Unlock()
	for _, name := range half {
		if name == writing {
			continue
		}
		if err := j.files.remove(filepath.Join(j.dir, name)); err != nil && !isGone(err) {
			return fmt.Errorf("remove %s, which was left half-written: %w", filepath.Join(j.dir, name), plainError(err))
		}
	}
	j.mu.Lock()
	if j.known && j.base != base { // the disk is not what it was
		j.gaps++
		j.need = true
	}
	j.known, j.base, j.spare, j.tail, j.baseBytes = true, base, spare, tail, baseBytes
	j.mu.Unlock()
	j.rooted = true
	return nil
}

// missed notes that only a snapshot can make good what is not on disk.
func (j *Journal) missed() {
	j.mu.Lock()
	j.gaps++
	j.need = true
	j.mu.Unlock()
}

// letGo leaves the directory, lock and all, so that a disk that failed can be unmounted, mended and mounted again. At the
// next attempt it is looked at anew.
func (j *Journal) letGo() {
	j.abandon()
	if j.lock != nil {
		j.lock.Close()
		j.lock = nil
	}
	j.rooted = false
}

// begin makes the next segment, whose first block will have this number.
func (j *Journal) begin(first uint64) error {
	out := &output{header: header{
		kind: segment, id: rand.Uint64(), run: j.run, sequence: first, boot: j.boot, wall: j.options.now().UnixMilli(),
	}}
	for {
		j.number++
		out.number = j.number
		out.path = filepath.Join(j.dir, segment.name(j.number))
		f, err := j.files.create(out.path)
		if errors.Is(err, os.ErrExist) {
			continue
		} else if err != nil {
			return fmt.Errorf("write the journal in %s: %w", j.dir, plainError(err))
		}
		out.file = f
		break
	}
	j.out = out
	_, err := out.file.Write(out.header.encode())
	if err == nil {
		err = out.file.Sync()
	}
	if err == nil {
		err = j.files.syncDir(j.dir)
	}
	if err != nil {
		j.abandon()
		return fmt.Errorf("write the journal in %s: %w", j.dir, plainError(err))
	}
	j.mu.Lock()
	j.tail += headerSize
	j.written += headerSize
	j.mu.Unlock()
	return nil
}

// abandon ends the current segment. One that has nothing is removed, so that a disk that fails for a day is not found
// full of them.
func (j *Journal) abandon() {
	if j.out == nil {
		return
	}
	j.out.file.Close()
	if j.out.blocks == 0 {
		j.files.remove(j.out.path)
	}
	j.out = nil
}

// isFull tells whether an error says that room would help.
func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// plainError is an error without the name of a file that has another number at the next attempt: what is told twice
// should read alike.
func plainError(err error) error {
	var path *os.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		return path.Err
	case errors.As(err, &link):
		return link.Err
	}
	return err
}

// advice is what a person can do about an error.
func advice(err error) string {
	switch {
	case isFull(err):
		return "make room on its file system"
	case errors.Is(err, syscall.EROFS):
		return "mount its file system writable; look into the kernel's log for why it is not"
	case errors.Is(err, syscall.EIO):
		return "look at the disk, and into the kernel's log"
	case errors.Is(err, os.ErrPermission):
		return "let fairlead's user write there"
	case errors.Is(err, ErrLocked):
		return "end the other process"
	case errors.Is(err, ErrVersion):
		return "nothing there is touched"
	}
	return "see that the directory is there and can be written"
}

// state is what is wrong, in words that stay the same as long as it does; empty: nothing. The caller holds mu.
func (j *Journal) state() string {
	switch {
	case j.failure != nil:
		return fmt.Sprintf("%v: connections opened from now on may not survive a reboot: %s", j.failure, advice(j.failure))
	case j.late:
		return fmt.Sprintf("the disk of %s is slow: events wait for longer than %v, and would be lost in a power cut", j.dir, j.options.Late)
	case j.gaps != j.healed:
		return "events were lost: until the next snapshot, connections of that time may not survive a reboot"
	}
	return ""
}

// behind is the age of the oldest event that is not safe. The caller holds mu.
func (j *Journal) behind() time.Duration {
	switch {
	case !j.flight.IsZero():
		return time.Since(j.flight)
	case !j.oldest.IsZero():
		return time.Since(j.oldest)
	}
	return 0
}

// checkLate is called when an event has waited for as long as is healthy.
func (j *Journal) checkLate() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.judgeLate()
	j.tell()
}

// judgeLate finds out whether the journal is late, and asks again when it would be. The caller holds mu.
func (j *Journal) judgeLate() {
	behind := j.behind()
	j.late = behind > j.options.Late
	if behind > 0 && !j.late && !j.finish {
		j.lateTimer.Reset(j.options.Late - behind + time.Millisecond)
	}
}

// tell sees to it that a change of state is logged: by a goroutine of its own, because a log may be as slow as a disk. The
// caller holds mu.
func (j *Journal) tell() {
	text := j.state()
	if text == j.told && (j.refused == 0 || j.toldRefused) || j.telling || j.finish {
		return
	}
	j.telling = true
	j.tellers.Add(1)
	go func() {
		defer j.tellers.Done()
		for j.tellOne() {
		}
	}()
}

// tellOne logs a change, if there is one.
func (j *Journal) tellOne() (told bool) {
	j.mu.Lock()
	text, lost, refused, why := j.state(), j.lost, j.refused, j.refusedWhy
	changed, sayRefused := text != j.told, refused > 0 && !j.toldRefused
	wasWell := j.told == ""
	if changed {
		j.told = text
		if wasWell || text == "" {
			j.since = j.options.now()
		}
	}
	j.toldRefused = refused > 0
	j.telling = changed || sayRefused
	j.mu.Unlock()
	if sayRefused {
		j.log.Warn("the journal leaves out what it can't write; this is said once, Status counts", "first", why)
	}
	switch {
	case !changed:
	case text == "":
		j.log.Info("the journal of connections is healthy again", "lost", lost)
	default:
		j.log.Error("the journal of connections: "+text, "lost", lost)
	}
	return changed || sayRefused
}

// Status is how the journal does now.
func (j *Journal) Status() Status {
	j.mu.Lock()
	defer j.mu.Unlock()
	text := j.state()
	since := j.since
	if (text == "") != (j.told == "") { // not logged yet
		since = j.options.now()
	}
	return Status{
		Healthy: text == "", Since: since, Text: text, Events: j.added, Lost: j.lost, Refused: j.refused,
		Behind: j.behind(), Lag: j.lag, Queued: j.queued, Written: j.written,
		SegmentBytes: j.tail, SnapshotBytes: j.baseBytes, Snapshot: j.baseTime, Entries: j.baseEntries,
	}
}

// Missed says that so many events were lost before they could be added. The next snapshot makes them good.
func (j *Journal) Missed(events uint64) {
	j.mu.Lock()
	j.lost += events
	j.gaps++
	j.need = true
	j.tell()
	j.mu.Unlock()
	j.wake()
}
