package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// XDP's actions, as the kernel's headers number them.
const (
	xdpPass = 2
	xdpTX   = 3
)

const (
	outputRoom = 128  // how much longer a frame may become
	pieceSize  = 1024 // frames: their part of the order fits into the first cache
)

// path is the two ends of a frame.
type path struct{ from, to netip.AddrPort }

// harness gives frames to programs: every repeat of a run is the next frame of the order. It holds on to the array of
// programs, which the kernel empties when nobody does.
type harness struct {
	harnessObjects
	order, pieces *ebpf.Memory
	frame         frame
	shared        harnessFrameSet
}

// newHarness loads the harness with room for so many frames of one family, and for runs of so many repeats. Its programs
// take the flags of the data plane's: a tail call asks for the same kind on both sides.
func newHarness(ipv6 bool, frames, repeats int, plane *ebpf.Program, like *ebpf.ProgramSpec) (_ *harness, err error) {
	spec, err := loadHarness()
	if err != nil {
		return nil, fmt.Errorf("read the compiled harness: %w", err)
	}
	spec.Maps["order"].MaxEntries = uint32(frames)
	spec.Maps["pieces"].MaxEntries = uint32((repeats+frames)/pieceSize + 2)
	for _, p := range spec.Programs {
		p.Flags, p.AttachType = like.Flags, like.AttachType
	}
	family := uint8(0)
	if ipv6 {
		family = 1
	}
	if err := errors.Join(spec.Variables["ipv6"].Set(family),
		spec.Variables["piece_size"].Set(uint32(pieceSize))); err != nil {
		return nil, fmt.Errorf("set the harness's constants: %w", err)
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
	if h.pieces, err = h.Pieces.Memory(); err != nil {
		return nil, fmt.Errorf("map the harness's pieces: %w", err)
	}
	for turn, program := range map[harnessTurn]*ebpf.Program{
		harnessTurnTURN_TOUCH: h.TakeNothing, harnessTurnTURN_NOTHING: h.TakeNothing,
		harnessTurnTURN_FLOOR: h.TakeFloor, harnessTurnTURN_DISTURBANCE: h.TakeDisturbance,
		harnessTurnTURN_PLANE: plane,
	} {
		if err := h.Takers.Put(turn, program); err != nil {
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
	orderer, entries := newOrderer(template), make([]harnessEnds, len(paths))
	for i, p := range paths {
		entries[i] = orderer.entry(p.from, p.to)
	}
	if _, err := h.order.WriteAt(memory(entries), 0); err != nil {
		return fmt.Errorf("write the order of frames: %w", err)
	}
	h.frame = template
	h.shared = harnessFrameSet{
		Length: uint32(len(template.bytes)), Count: uint32(len(paths)), L4: uint32(template.l4),
		Check: uint32(template.l4 + template.check),
	}
	words := &h.shared.Template
	if len(template.bytes) < len(words)*8 && (template.ipv6 || len(template.bytes) < 56) {
		return fmt.Errorf("load a template of %d bytes: it is too short for its headers", len(template.bytes))
	}
	for i := range words {
		if end := i*8 + 8; end <= len(template.bytes) {
			words[i] = binary.NativeEndian.Uint64(template.bytes[i*8:])
		}
	}
	return h.Frames.Set(h.shared)
}

// memory is the bytes of values as they lie in a map.
func memory[T any](values []T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&values[0])), len(values)*int(unsafe.Sizeof(values[0])))
}

// move tells by how many bytes the data plane makes the frames of the order longer.
func (h *harness) move(bytes int) error {
	h.shared.Moved = int32(bytes)
	return h.Frames.Set(h.shared)
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

// run gives so many frames of the order, from one of them on, piece by piece to the first of a turn and all behind it.
// One repeat more than that takes is there to note how long the last turn took.
func (h *harness) run(first harnessTurn, frame, frames, repeats int, out []byte) (action uint32, got []byte, err error) {
	if err := h.Run.Set(harnessRunState{
		FirstTurn: uint32(first), Turn: uint32(harnessTurnTURN_COUNT), Next: uint32(frame), Rest: uint32(frames),
	}); err != nil {
		return 0, nil, err
	}
	interrupted := false
	options := ebpf.RunOptions{Data: h.frame.bytes, DataOut: out, Repeat: uint32(repeats)}
	//lint:ignore SA1019 nothing else tells that the run was interrupted and begun again
	options.Reset = func() { interrupted = true }
	if err := undisturbed(func() (err error) {
		action, err = h.Give.Run(&options)
		return err
	}); err != nil {
		return 0, nil, err
	}
	var state harnessRunState
	if err := h.Run.Get(&state); err != nil {
		return 0, nil, err
	}
	switch {
	case interrupted:
		return 0, nil, errInterrupted
	case state.Lost > 0:
		return 0, nil, fmt.Errorf("%d frames were lost in the harness", state.Lost)
	case state.Rest > 0 || state.Left > 0 || (state.Finished > 0) != (repeats > frames):
		return 0, nil, fmt.Errorf("the harness did not come to an end: %+v", state)
	}
	return action, options.DataOut, nil
}

// give gives the data plane the whole order, so many times.
func (h *harness) give(passes int) error {
	frames := passes * int(h.shared.Count)
	_, _, err := h.run(harnessTurnTURN_PLANE, 0, frames, frames, nil)
	return err
}

// show gives the data plane a few frames in a row and returns what became of the last, number i of the order.
func (h *harness) show(i, row int) (action uint32, out []byte, err error) {
	count := int(h.shared.Count)
	return h.run(harnessTurnTURN_PLANE, ((i-row+1)%count+count)%count, row, row,
		make([]byte, len(h.frame.bytes)+outputRoom))
}

// timing is what a frame takes, in nanoseconds: medians of all pieces.
type timing struct {
	plane   float64 // the data plane, net of the harness
	floor   float64 // the floor, net of the harness
	harness float64
}

// time gives everyone in turn the whole order, so many times.
func (h *harness) time(passes int) (timing, error) {
	turns := int(harnessTurnTURN_COUNT)
	if h.shared.Moved == 0 {
		turns--
	}
	frames := passes * int(h.shared.Count)
	if _, _, err := h.run(harnessTurnTURN_TOUCH, 0, frames, frames*turns+1, nil); err != nil {
		return timing{}, err
	}
	pieces := make([]harnessPiece, (frames+pieceSize-1)/pieceSize)
	if _, err := h.pieces.ReadAt(memory(pieces), 0); err != nil {
		return timing{}, fmt.Errorf("read how long the pieces took: %w", err)
	}
	if rest := frames % pieceSize; rest > 0 && len(pieces) > 1 {
		pieces = pieces[:len(pieces)-1] // the last is shorter
		frames = pieceSize
	}
	frames = min(frames, pieceSize)
	var all [3][]float64
	for _, p := range pieces {
		took := func(turn harnessTurn) float64 { return float64(p.Ns[turn]) / float64(frames) }
		nothing := took(harnessTurnTURN_NOTHING)
		plane := took(harnessTurnTURN_PLANE) - nothing
		if h.shared.Moved != 0 {
			// There and back are one call each of the same helper: the way back is the harness's.
			plane -= (took(harnessTurnTURN_DISTURBANCE) - nothing) / 2
		}
		for i, ns := range []float64{plane, took(harnessTurnTURN_FLOOR) - nothing, nothing} {
			all[i] = append(all[i], ns)
		}
	}
	return timing{plane: median(all[0]), floor: median(all[1]), harness: median(all[2])}, nil
}

func median(of []float64) float64 {
	of = slices.Sorted(slices.Values(of))
	middle := len(of) / 2
	if len(of)%2 == 0 {
		return (of[middle-1] + of[middle]) / 2
	}
	return of[middle]
}

// shuffled is a copy in random order.
func shuffled[T any](random *rand.Rand, items []T) []T {
	items = append([]T(nil), items...)
	random.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
	return items
}
