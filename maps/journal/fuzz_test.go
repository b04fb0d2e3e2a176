package journal

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net/netip"
	"os"
	"testing"
	"time"
)

// FuzzLoad: any bytes as the files of a directory. They are read or refused, and what comes out is at least well-formed:
// it can be written, and comes back the same.
func FuzzLoad(f *testing.F) {
	tr := newTraffic(f, 50)
	dir := f.TempDir()
	j := mustOpen(f, dir, quiet)
	for range 3 {
		j.Add(tr.events(4))
		mustFlush(f, j)
	}
	must(f, j.Snapshot(f.Context(), tr.walk))
	j.Add(tr.events(6))
	must(f, closeWithin(j))
	first, second, whole := mustRead(f, path(dir, segment, 1)), mustRead(f, path(dir, segment, 2)), mustRead(f, path(dir, snapshot, 2))
	f.Add(first, whole, second, false)
	f.Add(first, whole, second, true)
	f.Add([]byte{}, []byte{}, second[:100], true)
	f.Add(second, first, whole, true)
	dir = scratch(f)
	must(f, os.Mkdir(directory(dir), 0o700))
	f.Fuzz(func(t *testing.T, first, whole, second []byte, mend bool) {
		if mend { // sums are right, so that what they guard is looked at
			mended(first, segment, 1)
			mended(whole, snapshot, 2)
			mended(second, segment, 2)
		}
		mustWrite(t, path(dir, segment, 1), first)
		mustWrite(t, path(dir, snapshot, 2), whole)
		mustWrite(t, path(dir, segment, 2), second)
		now := time.Now()
		var encoded encoder
		encoded.begin(now.UnixMilli())
		_, err := Load(dir, LoadOptions{now: now, Most: 16}, func(e *Entry) error {
			if err := e.check(); err != nil {
				t.Fatalf("%+v: %v", e, err)
			}
			if e.Opened.After(now) || e.Seen.After(now) {
				t.Fatalf("%+v is ahead of the clock", e)
			}
			encoded.begin(now.UnixMilli())
			b := encoded.opened(nil, e)
			r := reading{now: now.UnixMilli()}
			d := decoder{catalog: &r.catalog}
			if err := d.decode(b, now.UnixMilli(), func(rec *record) {
				if back := r.entry(&rec.key, &rec.entry); back != *e {
					t.Fatalf("%+v came back as %+v", *e, back)
				}
			}); err != nil {
				t.Fatal(err)
			}
			return nil
		})
		if err != nil && !errors.Is(err, ErrVersion) {
			t.Fatal(err)
		}
		if _, err := Verify(dir); err != nil && !errors.Is(err, ErrVersion) {
			t.Fatal(err)
		}
	})
}

// mended makes header and blocks of a file look like what they should be.
func mended(b []byte, kind fileKind, number uint64) {
	if len(b) < headerSize {
		return
	}
	copy(b, fileMagic)
	if b[8]%16 != 2 {
		binary.LittleEndian.PutUint32(b[8:], version)
	}
	binary.LittleEndian.PutUint32(b[12:], uint32(kind))
	binary.LittleEndian.PutUint64(b[16:], number)
	binary.LittleEndian.PutUint32(b[76:], crc32.Checksum(b[:76], castagnoli))
	for at := headerSize; at+blockHeader <= len(b); {
		size := int(binary.LittleEndian.Uint32(b[at+4:]))
		if size < 0 || size > len(b)-at-blockHeader {
			size = len(b) - at - blockHeader
		}
		block := b[at : at+blockHeader+size]
		copy(block, blockMagic)
		binary.LittleEndian.PutUint32(block[4:], uint32(size))
		copy(block[8:16], b[24:32])
		binary.LittleEndian.PutUint32(block[44:], blockSum(block))
		at += blockHeader + size
	}
}

// FuzzDecode: any bytes as a block's records.
func FuzzDecode(f *testing.F) {
	tr := newTraffic(f, 50)
	var enc encoder
	enc.begin(1000)
	var b []byte
	for range 5 {
		e := tr.entry()
		b = enc.opened(b, &e)
		b = enc.updated(b, &e)
		b = enc.closed(b, &e.Tuple, 7)
	}
	f.Add(appendCount(appendCount(b, recordLost, 300), recordEnd, 1<<60))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := reading{now: 1 << 40}
		d := decoder{catalog: &r.catalog}
		n := 0
		d.decode(b, 0, func(rec *record) {
			n++
			if rec.kind == recordOpened {
				e := r.entry(&rec.key, &rec.entry)
				if err := e.check(); err != nil {
					t.Fatal(err)
				}
				if e.SourceAddr != (netip.AddrPort{}) && !e.SourceAddr.IsValid() {
					t.Fatalf("%+v", e)
				}
			}
		})
		if n > len(b) {
			t.Fatalf("%d records of %d bytes", n, len(b))
		}
	})
}
