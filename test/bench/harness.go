package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// XDP's actions, as the kernel's headers number them.
const (
	xdpPass = 2
	xdpTX   = 3
)

// outputRoom is how much longer a frame may become.
const outputRoom = 128

// path is the two ends of a frame.
type path struct{ from, to netip.AddrPort }

// harness gives frames to programs: every repeat of a run is the next frame of the order. It holds on to the array of
// programs, which the kernel empties when nobody does.
type harness struct {
	harnessObjects
	order  *ebpf.Memory
	frame  frame
	frames int
}

// newHarness loads the harness with room for so many frames of one family. Its programs take the flags of the data
// plane's: a tail call asks for the same kind on both sides.
func newHarness(ipv6 bool, frames int, plane *ebpf.Program, like *ebpf.ProgramSpec) (_ *harness, err error) {
	spec, err := loadHarness()
	if err != nil {
		return nil, fmt.Errorf("read the compiled harness: %w", err)
	}
	spec.Maps["order"].MaxEntries = uint32(frames)
	for _, p := range spec.Programs {
		p.Flags, p.AttachType = like.Flags, like.AttachType
	}
	if ipv6 {
		if err := spec.Variables["ipv6"].Set(uint8(1)); err != nil {
			return nil, fmt.Errorf("set the harness's family: %w", err)
		}
	}
	h := new(harness)
	if err := spec.LoadAndAssign(&h.harnessObjects, nil); err != nil {
		return nil, fmt.Errorf("load the harness: %w", err)
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if h.order, err = h.Order.Memory(); err != nil {
		return nil, fmt.Errorf("map the harness's order: %w", err)
	}
	for taker, program := range map[harnessTaker]*ebpf.Program{
		harnessTakerTAKER_PLANE: plane, harnessTakerTAKER_NOTHING: h.TakeNothing,
		harnessTakerTAKER_FLOOR: h.TakeFloor, harnessTakerTAKER_DISTURBANCE: h.TakeDisturbance,
	} {
		if err := h.Takers.Put(taker, program); err != nil {
			return nil, fmt.Errorf("give the harness %s: %w", program, err)
		}
	}
	return h, nil
}

// load makes frames of a template, one for each path, the order of the harness.
func (h *harness) load(template frame, paths []path) error {
	if len(paths) == 0 || uint64(len(paths)) > uint64(h.Order.MaxEntries()) {
		return fmt.Errorf("load %d frames: the harness has room for 1 to %d", len(paths), h.Order.MaxEntries())
	}
	h.frame, h.frames = template, len(paths)
	orderer, entries := newOrderer(template), make([]harnessEnds, len(paths))
	for i, p := range paths {
		entries[i] = orderer.entry(p.from, p.to)
	}
	size := len(entries) * int(unsafe.Sizeof(entries[0]))
	if _, err := h.order.WriteAt(unsafe.Slice((*byte)(unsafe.Pointer(&entries[0])), size), 0); err != nil {
		return fmt.Errorf("write the order of frames: %w", err)
	}
	var words [10]uint64
	if len(template.bytes) < len(words)*8 && (template.ipv6 || len(template.bytes) < 56) {
		return fmt.Errorf("load a template of %d bytes: it is too short for its headers", len(template.bytes))
	}
	for i := range words {
		if end := i*8 + 8; end <= len(template.bytes) {
			words[i] = binary.NativeEndian.Uint64(template.bytes[i*8:])
		}
	}
	return errors.Join(h.Template.Set(words), h.FrameLength.Set(uint32(len(template.bytes))),
		h.FrameCount.Set(uint32(h.frames)))
}

// begin makes a frame of the order the next one. The kernel gives each run a packet of its own.
func (h *harness) begin(next int) error {
	return errors.Join(h.Head.Set(int64(0)), h.Lost.Set(uint32(0)), h.FrameNext.Set(uint32(next)))
}

// errInterrupted says that the kernel cut a run short, and does not tell where.
var errInterrupted = errors.New("the run was cut short: was this process stopped or traced meanwhile?")

// undisturbed keeps signals, of which Go's runtime sends itself many, from this thread: each would end the run under way.
func undisturbed(run func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var every, before unix.Sigset_t
	for i := range every.Val {
		every.Val[i] = ^every.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &every, &before); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	return errors.Join(run(), unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil))
}

// time lets one of the programs `give_…` give the whole order, so many times, and returns the kernel's nanoseconds a
// repeat.
func (h *harness) time(give *ebpf.Program, passes int) (ns float64, err error) {
	if err := h.begin(0); err != nil {
		return 0, err
	}
	interrupted := false
	if err := undisturbed(func() error {
		_, each, err := give.Benchmark(h.frame.bytes, passes*h.frames, func() { interrupted = true })
		ns = float64(each.Nanoseconds())
		return err
	}); err != nil {
		return 0, err
	}
	if interrupted {
		return 0, errInterrupted
	}
	return ns, h.arrived()
}

// arrived tells whether all repeats came to whom they were for.
func (h *harness) arrived() error {
	var lost uint32
	if err := h.Lost.Get(&lost); err != nil {
		return err
	}
	if lost > 0 {
		return fmt.Errorf("%d frames were lost in the harness", lost)
	}
	return nil
}

// show gives the data plane a few frames in a row and returns what became of the last, number i of the order.
func (h *harness) show(i, row int) (action uint32, out []byte, err error) {
	if err := h.begin(((i-row+1)%h.frames + h.frames) % h.frames); err != nil {
		return 0, nil, err
	}
	options := ebpf.RunOptions{
		Data: h.frame.bytes, DataOut: make([]byte, len(h.frame.bytes)+outputRoom), Repeat: uint32(row),
	}
	if err := undisturbed(func() (err error) {
		action, err = h.GivePlane.Run(&options)
		return err
	}); err != nil {
		return 0, nil, err
	}
	return action, options.DataOut, h.arrived()
}

// shuffled is a copy in random order.
func shuffled[T any](random *rand.Rand, items []T) []T {
	items = append([]T(nil), items...)
	random.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
	return items
}
