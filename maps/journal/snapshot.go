package journal

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// snapshotSync is how many bytes of a snapshot are written before the disk is asked to take them: were it all at once,
// events would wait for it.
const snapshotSync = 8 << 20

// Snapshot writes down all connections there are, as walk yields them, so that what was written before is needed no more.
// Whatever happens while walk is under way may be in what it yields or not; the journal has it either way, if it is added.
//
// The snapshot before is kept, with the segments since, in case this one is damaged later; what is older is removed.
// Should the disk be full, the older ones go first. It fails if walk does, which must return the errors of yield, if the
// disk does, or when the context ends; then everything stays as it was, and a snapshot stays wanted.
func (j *Journal) Snapshot(ctx context.Context, walk func(yield func(*Entry) error) error) (err error) {
	select {
	case j.snapshots <- struct{}{}:
		defer func() { <-j.snapshots }()
	case <-ctx.Done():
		return fmt.Errorf("write a snapshot: %w", ctx.Err())
	case <-j.stop:
		return fmt.Errorf("write a snapshot: %w", ErrClosed)
	}
	var at rotation
	defer func() {
		if err != nil {
			err = fmt.Errorf("write a snapshot: %w", err)
		}
		j.ended(at, err)
	}()
	if at, err = j.rotate(ctx); err != nil {
		return err
	}
	s := &snapshotFile{journal: j, ctx: ctx, header: header{
		kind: snapshot, number: at.number, id: rand.Uint64(), run: j.run, sequence: at.sequence, boot: j.boot,
		wall: j.options.now().UnixMilli(),
	}}
	path := filepath.Join(j.dir, snapshot.name(at.number))
	j.mu.Lock()
	j.aside = snapshot.name(at.number) + aside
	j.mu.Unlock()
	if err := s.write(path+aside, walk); err != nil {
		if s.file != nil {
			s.file.Close()
			j.files.remove(path + aside)
		}
		if isFull(err) {
			j.dropSpare()
		}
		return fmt.Errorf("in %s: %w", j.dir, plainError(err))
	}
	// What walk saw may be the outcome of events that are not safe yet. Were they missing behind this snapshot, those
	// before them would undo what it says.
	err = j.Flush(ctx)
	if err == nil {
		err = j.files.rename(path+aside, path)
	}
	if err != nil {
		j.files.remove(path + aside)
		return fmt.Errorf("in %s: %w", j.dir, plainError(err))
	}
	j.mu.Lock()
	j.written += uint64(s.size)
	j.mu.Unlock()
	if err := j.files.syncDir(j.dir); err != nil {
		return fmt.Errorf("in %s: %w", j.dir, plainError(err))
	}
	j.mu.Lock()
	j.spare, j.base = j.base, at.number
	j.baseBytes, j.baseEntries, j.baseTime = s.size, s.entries, time.UnixMilli(s.wall)
	spare := j.spare
	j.mu.Unlock()
	j.removeBefore(spare)
	return nil
}

// rotate has the writer begin a new segment.
func (j *Journal) rotate(ctx context.Context) (rotation, error) {
	reply := make(chan rotation, 1)
	j.mu.Lock()
	j.rotates = append(j.rotates, reply)
	j.mu.Unlock()
	j.wake()
	select {
	case at := <-reply:
		return at, at.err
	case <-ctx.Done():
		return rotation{}, ctx.Err()
	case <-j.stop:
		return rotation{}, ErrClosed
	}
}

// snapshotRetryMost is how far apart at most a snapshot that fails is asked for.
const snapshotRetryMost = time.Minute

// ended notes how a snapshot did.
func (j *Journal) ended(at rotation, err error) {
	j.mu.Lock()
	j.asked, j.aside = false, ""
	if err != nil {
		j.need = true
		j.needRetry = min(max(2*j.needRetry, time.Second), snapshotRetryMost)
		j.needAt = time.Now().Add(j.needRetry)
	} else {
		j.needRetry = 0
		j.healed = at.gaps
		j.need = j.gaps != j.healed
		j.tail = max(j.tail-at.tail, 0)
		j.sinceEvents = at.events
		j.ageAt = time.Now().Add(j.options.SnapshotAge)
	}
	j.tell()
	j.mu.Unlock()
	j.wake()
}

// snapshotFile is a snapshot being written.
type snapshotFile struct {
	header
	journal  *Journal
	ctx      context.Context
	file     file
	encoder  encoder
	current  block
	buffer   []byte
	next     uint64
	size     int64
	unsynced int64
	entries  uint64
}

func (s *snapshotFile) write(path string, walk func(yield func(*Entry) error) error) (err error) {
	files := &s.journal.files
	s.file, err = files.create(path)
	if errors.Is(err, os.ErrExist) { // left by an attempt that could not even remove it
		if err = files.remove(path); err == nil {
			s.file, err = files.create(path)
		}
	}
	if err != nil {
		return err
	}
	if err := s.put(s.header.encode()); err != nil {
		return err
	}
	if err := walk(s.entry); err != nil {
		return err
	}
	if err := s.seal(); err != nil {
		return err
	}
	s.begin()
	s.current.bytes = appendCount(s.current.bytes, recordEnd, s.entries)
	if err := s.seal(); err != nil {
		return err
	}
	if err := s.file.Sync(); err != nil {
		return err
	}
	err = s.file.Close()
	s.file = nil
	if err != nil {
		s.journal.files.remove(path)
	}
	return err
}

func (s *snapshotFile) put(b []byte) error {
	if _, err := s.file.Write(b); err != nil {
		return err
	}
	s.size += int64(len(b))
	if s.unsynced += int64(len(b)); s.unsynced < snapshotSync {
		return nil
	}
	s.unsynced = 0
	return s.file.Sync()
}

func (s *snapshotFile) begin() {
	if s.buffer == nil {
		s.buffer = make([]byte, blockHeader, blockFull+blockRoom)
	}
	s.current = block{blockHead{
		id: s.id, sequence: s.next, wall: s.journal.options.now().UnixMilli(), uptime: int64(uptime()),
	}, s.buffer[:blockHeader]}
	s.encoder.begin(s.current.wall)
	s.next++
}

func (s *snapshotFile) entry(entry *Entry) error {
	if err := entry.check(); err != nil {
		s.journal.refuse(fmt.Errorf("%v: %w", entry.Tuple, err))
		return nil
	}
	if s.current.bytes == nil {
		s.begin()
	}
	s.current.bytes = s.encoder.opened(s.current.bytes, entry)
	s.current.opened++
	s.entries++
	if len(s.current.bytes) >= blockFull {
		return s.seal()
	}
	return nil
}

// seal writes the current block, if there is one.
func (s *snapshotFile) seal() error {
	select {
	case <-s.journal.stop:
		return ErrClosed
	default:
	}
	if err := s.ctx.Err(); err != nil {
		return err
	}
	b := s.current
	if b.bytes == nil {
		return nil
	}
	s.current = block{}
	b.seal(b.bytes)
	return s.put(b.bytes)
}

func (j *Journal) refuse(why error) {
	j.mu.Lock()
	j.refused++
	j.refusedWhy = why
	j.tell()
	j.mu.Unlock()
}

// removeBefore removes our files of lower numbers. What can't be removed is tried again after the next snapshot.
func (j *Journal) removeBefore(number uint64) {
	ours, _, _, err := inventory(j.dir)
	if err != nil {
		return
	}
	for _, f := range ours {
		path := filepath.Join(j.dir, f.name)
		if f.number >= number {
			continue
		}
		if err := readHeader(path, f.kind, f.number); err == nil || errors.Is(err, errDamaged) {
			j.files.remove(path)
		}
	}
}

// dropSpare makes room on a full disk: what is kept for the case that the newest snapshot is damaged goes, if that is
// found whole.
func (j *Journal) dropSpare() {
	j.mu.Lock()
	base, dropped := j.base, j.dropped
	j.dropped = base
	j.mu.Unlock()
	if base == 0 || base == dropped {
		return
	}
	f, err := os.Open(filepath.Join(j.dir, snapshot.name(base)))
	if err != nil {
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return
	}
	s, err := scanFile(f, info.Size(), snapshot, base)
	if err != nil || !s.complete(f) {
		return
	}
	j.log.Warn("the disk is full: the snapshot before the last is removed to make room", "directory", j.dir)
	j.removeBefore(base)
}
