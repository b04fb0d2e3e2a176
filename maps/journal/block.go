package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// version is of the files. The first 80 bytes of a file, its header, mean the same in every version; all else may not.
const version = 1

// ErrVersion is what a file of a later version is refused with. Nothing in the directory is touched then.
var ErrVersion = errors.New("written by a later version of fairlead: use that version, or move the file away, which loses what it tells")

const (
	fileMagic  = "fairlead"
	headerSize = 80

	blockMagic  = "FLB\x01" // ends with the version
	blockHeader = 48
	blockFull   = 128 << 10 // a block takes no further records beyond this size
	leastOpened = 18        // bytes of the shortest record of an entry opened
	blockMost   = 256 << 10 // no payload is larger; what says so is damaged
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// kind of file.
type fileKind uint32

const (
	segment  fileKind = 1
	snapshot fileKind = 2
)

// name is what the file of a number is called.
func (k fileKind) name(number uint64) string {
	if k == snapshot {
		return fmt.Sprintf("snapshot-%016x", number)
	}
	return fmt.Sprintf("journal-%016x", number)
}

// aside is where a snapshot is written before it gets its name.
const aside = ".new"

// parseName is a file's kind and number; false: it has no name of ours.
func parseName(name string) (kind fileKind, number uint64, ok bool) {
	digits, isSegment := strings.CutPrefix(name, "journal-")
	kind = segment
	if !isSegment {
		if digits, ok = strings.CutPrefix(name, "snapshot-"); !ok {
			return 0, 0, false
		}
		kind = snapshot
	}
	number, err := strconv.ParseUint(digits, 16, 64)
	return kind, number, err == nil && kind.name(number) == name
}

// header is a file's first 80 bytes:
//
//	 0 "fairlead"          32 run            72 entries at most (snapshot: none)
//	 8 version   12 kind   40 sequence       76 CRC-32C of all before
//	16 number              48 boot id
//	24 file id             64 wall clock, ms
type header struct {
	kind     fileKind
	number   uint64
	id       uint64 // of the file, and in each of its blocks: a block of another file is none of its
	run      uint64 // of the process that wrote it
	sequence uint64 // of the journal's first block in this segment, or in the one that follows this snapshot
	boot     [16]byte
	wall     int64
}

func (h *header) encode() []byte {
	b := make([]byte, 0, headerSize)
	b = append(b, fileMagic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, uint32(h.kind))
	b = binary.LittleEndian.AppendUint64(b, h.number)
	b = binary.LittleEndian.AppendUint64(b, h.id)
	b = binary.LittleEndian.AppendUint64(b, h.run)
	b = binary.LittleEndian.AppendUint64(b, h.sequence)
	b = append(b, h.boot[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.wall))
	b = binary.LittleEndian.AppendUint32(b, 0)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// errDamaged is of a header that is not whole; errForeign of one that was never ours.
var (
	errDamaged = errors.New("its header is damaged")
	errForeign = errors.New("it is not fairlead's")
)

func decodeHeader(b []byte, kind fileKind, number uint64) (h header, err error) {
	if !strings.HasPrefix(fileMagic, string(b[:min(len(b), len(fileMagic))])) {
		return h, errForeign
	}
	if len(b) < headerSize {
		return h, errDamaged
	}
	if crc32.Checksum(b[:76], castagnoli) != binary.LittleEndian.Uint32(b[76:]) {
		return h, errDamaged
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v > version {
		return h, fmt.Errorf("it has version %d, this fairlead knows version %d: %w", v, version, ErrVersion)
	} else if v == 0 {
		return h, errForeign
	}
	h = header{
		kind: fileKind(binary.LittleEndian.Uint32(b[12:])), number: binary.LittleEndian.Uint64(b[16:]),
		id: binary.LittleEndian.Uint64(b[24:]), run: binary.LittleEndian.Uint64(b[32:]),
		sequence: binary.LittleEndian.Uint64(b[40:]), boot: [16]byte(b[48:]), wall: int64(binary.LittleEndian.Uint64(b[64:])),
	}
	if h.kind != kind || h.number != number {
		return h, fmt.Errorf("it was %s, and got its name by hand: %w", h.kind.name(h.number), errForeign)
	}
	return h, nil
}

// blockHead stands before each payload:
//
//	0 "FLB", version       16 sequence            32 clock since boot, ns
//	4 bytes of payload     24 wall clock, ms      40 entries opened, 44 CRC-32C of all before and the payload
//	8 file id
type blockHead struct {
	size     uint32
	id       uint64
	sequence uint64
	wall     int64
	uptime   int64
	opened   uint32
}

// seal fills the header of a block whose payload stands behind room for it.
func (h *blockHead) seal(b []byte) {
	copy(b, blockMagic)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)-blockHeader))
	binary.LittleEndian.PutUint64(b[8:], h.id)
	binary.LittleEndian.PutUint64(b[16:], h.sequence)
	binary.LittleEndian.PutUint64(b[24:], uint64(h.wall))
	binary.LittleEndian.PutUint64(b[32:], uint64(h.uptime))
	binary.LittleEndian.PutUint32(b[40:], h.opened)
	binary.LittleEndian.PutUint32(b[44:], blockSum(b))
}

func blockSum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:44], castagnoli), castagnoli, b[blockHeader:])
}

func decodeBlockHead(b []byte) (h blockHead, ok bool) {
	if string(b[:4]) != blockMagic {
		return h, false
	}
	h = blockHead{
		size: binary.LittleEndian.Uint32(b[4:]), id: binary.LittleEndian.Uint64(b[8:]),
		sequence: binary.LittleEndian.Uint64(b[16:]), wall: int64(binary.LittleEndian.Uint64(b[24:])),
		uptime: int64(binary.LittleEndian.Uint64(b[32:])), opened: binary.LittleEndian.Uint32(b[40:]),
	}
	return h, h.size <= blockMost && uint64(h.opened)*leastOpened <= uint64(h.size)
}

// blockAt is where a whole block lies.
type blockAt struct {
	offset int64
	blockHead
}

// scan is what one file holds, as far as it can be told without reading records.
type scan struct {
	header
	size      int64
	headless  bool // the header is damaged; its id is that of the first block
	blocks    []blockAt
	opened    uint64 // entries opened in all blocks
	missing   uint64 // blocks that must have been between others
	misplaced int    // blocks that stand where they can't have been written
	bad       int64  // bytes before the last whole block that are no block
	badAt     int64  // where the first of them is
	torn      int64  // bytes behind the last whole block
	unread    error  // what kept the rest from being read
}

// whole is whether all that was written is there, a torn end aside.
func (s *scan) whole() bool {
	return !s.headless && s.missing == 0 && s.misplaced == 0 && s.bad == 0 && s.unread == nil
}

// window reads a file through a buffer, and survives places that can't be read.
type window struct {
	file   io.ReaderAt
	size   int64
	buffer []byte
	start  int64
	errors int
	err    error
}

const (
	windowSize   = 1 << 20
	page         = 4096
	windowErrors = 16 // a disk may take seconds for each
)

// at is n bytes at an offset, fewer at the file's end; nil where they can't be read.
func (w *window) at(offset int64, n int) []byte {
	n = int(min(int64(n), w.size-offset))
	if n <= 0 {
		return nil
	}
	if offset < w.start || offset+int64(n) > w.start+int64(len(w.buffer)) {
		w.fill(offset, max(n, windowSize))
		if offset+int64(n) > w.start+int64(len(w.buffer)) && w.err != nil && w.errors < windowErrors {
			w.fill(offset, n) // what spoiled the large read may lie behind what is asked for
		}
	}
	if have := w.start + int64(len(w.buffer)) - offset; have < int64(n) {
		return nil
	}
	return w.buffer[offset-w.start:][:n]
}

func (w *window) fill(offset int64, n int) {
	n = int(min(int64(n), w.size-offset))
	if cap(w.buffer) < n {
		w.buffer = make([]byte, n)
	}
	got, err := w.file.ReadAt(w.buffer[:n], offset)
	w.start, w.buffer = offset, w.buffer[:got]
	if err != nil && err != io.EOF {
		w.errors++
		w.err = err
	}
}

// scanFile finds the whole blocks of a file. It fails with what decodeHeader fails with, but for a damaged header of a
// file that has blocks.
func scanFile(file io.ReaderAt, size int64, kind fileKind, number uint64) (*scan, error) {
	s := &scan{size: size}
	w := &window{file: file, size: size}
	var err error
	s.header, err = decodeHeader(w.at(0, headerSize), kind, number)
	at := int64(headerSize)
	if err != nil {
		if errors.Is(err, ErrVersion) {
			return nil, err
		}
		if s.header.kind != 0 && errors.Is(err, errForeign) { // a whole header, but of another
			return nil, err
		}
		// Blocks speak for themselves: only of which run the file is can't be known.
		s.header = header{kind: kind, number: number}
		s.headless = true
		at = 0
	}
	headerErr := err
	next, started := s.header.sequence, !s.headless
	if kind == snapshot {
		next = 0
	}
	for at < size {
		head, ok := s.block(w, at)
		if !ok {
			if w.errors >= windowErrors {
				break
			}
			to := s.resync(w, at+1)
			if to >= size {
				break
			}
			if s.bad == 0 {
				s.badAt = at
			}
			s.bad += to - at
			at = to
			continue
		}
		if s.headless && len(s.blocks) == 0 {
			s.header.id = head.id
		}
		switch {
		case !started:
			started = true
		case head.sequence < next:
			s.misplaced++
			at += blockHeader + int64(head.size)
			continue
		default:
			s.missing += head.sequence - next
		}
		next = head.sequence + 1
		s.blocks = append(s.blocks, blockAt{at, head})
		s.opened += uint64(head.opened)
		at += blockHeader + int64(head.size)
	}
	s.torn = size - min(at, size)
	if s.headless && len(s.blocks) == 0 {
		if errors.Is(headerErr, errForeign) && allZero(w) {
			headerErr = errDamaged // made, and not yet written when the power went
		}
		if headerErr != errDamaged || w.err == nil {
			return s, headerErr
		}
	}
	s.unread = w.err
	return s, nil
}

// block is the header of the whole block at an offset.
func (s *scan) block(w *window, at int64) (blockHead, bool) {
	b := w.at(at, blockHeader)
	if len(b) < blockHeader {
		return blockHead{}, false
	}
	head, ok := decodeBlockHead(b)
	if !ok || head.id != s.header.id && (!s.headless || len(s.blocks) > 0) {
		return head, false
	}
	b = w.at(at, blockHeader+int(head.size))
	return head, len(b) == blockHeader+int(head.size) && blockSum(b) == binary.LittleEndian.Uint32(b[44:])
}

// resync is where the next whole block begins, the file's size if none does.
func (s *scan) resync(w *window, at int64) int64 {
	for at < w.size {
		n := int(min(windowSize/2, w.size-at))
		b := w.at(at, n)
		if b == nil && n > page { // something in there can't be read: by pages
			n = int(page - at%page)
			b = w.at(at, n)
		}
		if b == nil {
			if w.errors >= windowErrors {
				return w.size
			}
			at += page - at%page
			continue
		}
		i := bytes.Index(b, []byte(blockMagic))
		if i < 0 {
			at += int64(max(len(b)-len(blockMagic)+1, 1))
			continue
		}
		if _, ok := s.block(w, at+int64(i)); ok {
			return at + int64(i)
		}
		at += int64(i) + 1
	}
	return w.size
}

func allZero(w *window) bool {
	for at := int64(0); at < w.size; at += page {
		for _, b := range w.at(at, page) {
			if b != 0 {
				return false
			}
		}
	}
	return true
}

// complete is whether a snapshot has all its entries: its last block is the end, which has no entries, and says how many
// entries were before.
func (s *scan) complete(file io.ReaderAt) bool {
	if !s.whole() || s.torn != 0 || len(s.blocks) == 0 {
		return false
	}
	last := s.blocks[len(s.blocks)-1]
	payload := make([]byte, last.size)
	if n, err := file.ReadAt(payload, last.offset+blockHeader); n < len(payload) && err != nil {
		return false
	}
	var end *uint64
	d := decoder{catalog: &catalog{}}
	err := d.decode(payload, 0, func(r *record) {
		if r.kind == recordEnd {
			end = &r.count
		}
	})
	return err == nil && end != nil && *end == s.opened
}

// found is a file of the directory that has a name of ours.
type found struct {
	kind   fileKind
	number uint64
	name   string
}

// inventory is what a directory holds: files with our names, by number, each snapshot before the segment of its number;
// snapshots half-written; names that are not ours.
func inventory(dir string) (ours []found, half, others []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	for _, entry := range entries {
		name := entry.Name()
		if kind, number, ok := parseName(name); ok && entry.Type().IsRegular() {
			ours = append(ours, found{kind, number, name})
		} else if kind, _, ok := parseName(strings.TrimSuffix(name, aside)); ok && kind == snapshot && strings.HasSuffix(name, aside) &&
			entry.Type().IsRegular() {
			half = append(half, name)
		} else {
			others = append(others, name)
		}
	}
	slices.SortFunc(ours, func(a, b found) int {
		switch {
		case a.number != b.number && a.number < b.number, a.number == b.number && a.kind == snapshot:
			return -1
		}
		return 1
	})
	return ours, half, others, nil
}

// readHeader judges a file by its first bytes alone: nil, errDamaged, errForeign or ErrVersion, or what kept it from being
// read.
func readHeader(path string, kind fileKind, number uint64) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	b := make([]byte, headerSize)
	n, err := io.ReadFull(file, b)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return err
	}
	_, err = decodeHeader(b[:n], kind, number)
	if errors.Is(err, errForeign) {
		info, statErr := file.Stat()
		if statErr != nil {
			return statErr
		}
		if _, scanErr := scanFile(file, info.Size(), kind, number); scanErr == nil {
			return errDamaged
		} else {
			err = scanErr
		}
	}
	return err
}

// directory is where below a state directory the files are.
func directory(dir string) string { return filepath.Join(dir, "connections") }

// bootID tells one run of the kernel from the next; zero: it can't be told.
func bootID() (id [16]byte) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id
	}
	digits := strings.ReplaceAll(strings.TrimSpace(string(text)), "-", "")
	for i := range id {
		if len(digits) < 2*i+2 {
			return [16]byte{}
		}
		b, err := strconv.ParseUint(digits[2*i:2*i+2], 16, 8)
		if err != nil {
			return [16]byte{}
		}
		id[i] = byte(b)
	}
	return id
}

// uptime is the clock that counts from boot, sleep included.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("read the clock since boot, which every Linux since 2.6.39 has: " + err.Error())
	}
	return time.Duration(ts.Nano())
}

// isGone is whether a file vanished between listing and opening.
func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) }
