package maps

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// mapped is a map's memory, shared with the data plane.
func mapped[T any](m *ebpf.Map, write bool) (*T, error) {
	prot := unix.PROT_READ
	if write {
		prot |= unix.PROT_WRITE
	}
	page := unix.Getpagesize()
	size := (int(unsafe.Sizeof(*new(T))) + page - 1) / page * page
	b, err := unix.Mmap(m.FD(), 0, size, prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap %s: %w", m, err)
	}
	return (*T)(unsafe.Pointer(&b[0])), nil
}

func unmap[T any](p *T) error {
	if p == nil {
		return nil
	}
	page := unix.Getpagesize()
	size := (int(unsafe.Sizeof(*p)) + page - 1) / page * page
	return unix.MunmapPtr(unsafe.Pointer(p), uintptr(size))
}

// Control owns the data plane's switches and reads its counts. Its words are read and written atomically: every CPU may
// be looking.
type Control struct{ block *bpf.FairleadControlBlock }

// Epoch is the running number of the epoch; its lowest bit names the fresh bitmap in use.
func (c Control) Epoch() uint32 { return atomic.LoadUint32(&c.block.Epoch) }

// Connections is the number of entries in the connection table.
func (c Control) Connections() int64 { return atomic.LoadInt64(&c.block.Connections) }

// Young is the number of young entries among them.
func (c Control) Young() int64 { return atomic.LoadInt64(&c.block.Young) }

func (c Control) turnEpoch()                 { atomic.AddUint32(&c.block.Epoch, 1) }
func (c Control) exceptionIndex() uint32     { return atomic.LoadUint32(&c.block.ExceptionIndex) & 1 }
func (c Control) setExceptionIndex(i uint32) { atomic.StoreUint32(&c.block.ExceptionIndex, i) }

func (c Control) setExceptionBoth(both bool) {
	var v uint32
	if both {
		v = 1
	}
	atomic.StoreUint32(&c.block.ExceptionBoth, v)
}

// Bitmaps owns the exception and the fresh bitmaps.
type Bitmaps struct {
	set     *bpf.FairleadBitmapSet
	control Control
}

func place(bit uint32) (word uint32, mask uint64) { return bit / 64, 1 << (bit % 64) }

// Exception tells whether a connection's bit is set in the exception bitmap that the data plane asks.
func (b Bitmaps) Exception(hash uint64) bool {
	word, mask := place(ExceptionBit(hash))
	return atomic.LoadUint64(&b.set.Exception[b.control.exceptionIndex()][word])&mask != 0
}

// Fresh tells whether a connection's bit is set in the fresh bitmap of this epoch.
func (b Bitmaps) Fresh(hash uint64) bool {
	epoch := b.control.Epoch()
	word, mask := place(FreshBit(hash, epoch))
	return atomic.LoadUint64(&b.set.Fresh[epoch&1][word])&mask != 0
}

// noteException does what the data plane's exception_note does: first the exception bit, then the fresh one.
func (b Bitmaps) noteException(hash uint64, both bool) {
	index := b.control.exceptionIndex()
	b.setException(hash, index)
	if both {
		b.setException(hash, index^1)
	}
	epoch := b.control.Epoch()
	word, mask := place(FreshBit(hash, epoch))
	atomic.AndUint64(&b.set.Fresh[epoch&1][word], ^mask)
}

func (b Bitmaps) setException(hash uint64, index uint32) {
	word, mask := place(ExceptionBit(hash))
	atomic.OrUint64(&b.set.Exception[index][word], mask)
}

func clearWords(words *[bpf.FairleadLimitsBITMAP_WORDS]uint64) {
	for i := range words {
		if atomic.LoadUint64(&words[i]) != 0 {
			atomic.StoreUint64(&words[i], 0)
		}
	}
}
