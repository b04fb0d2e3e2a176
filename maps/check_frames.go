package maps

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"

	"fairlead/bpf"
)

// CheckFrames are the backends' answers to checks through their method, as they came in. There is one reader: what one
// has read, no other sees.
type CheckFrames struct {
	reader *ringbuf.Reader
	record ringbuf.Record
}

// CheckFrame is a frame that answers a check. Data is valid until the next Read.
type CheckFrame struct {
	Interface uint32 // index of the device that it came by
	Length    uint32 // bytes of the whole frame
	Data      []byte // the frame, or its first CheckFrameMax bytes
}

// CheckFrameMax is how many bytes of a frame are kept.
const CheckFrameMax = int(bpf.FairleadLimitsCHECK_FRAME_MAX)

const checkFrameData = int(unsafe.Offsetof(bpf.FairleadCheckFrame{}.Data))

// CheckFrames opens the ring of answers to checks, for its one reader. It holds those that nobody has read yet.
func (s *Set) CheckFrames() (*CheckFrames, error) {
	reader, err := ringbuf.NewReader(s.raw.CheckFrames)
	if err != nil {
		return nil, fmt.Errorf("open the ring of answers to checks: %w", err)
	}
	return &CheckFrames{reader: reader}, nil
}

// Read waits for a frame until ctx ends, and then answers its error. After Close the error matches os.ErrClosed. It is
// not for two goroutines at a time.
func (c *CheckFrames) Read(ctx context.Context) (CheckFrame, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.reader.Flush() })
	defer stop()
	for {
		if err := ctx.Err(); err != nil {
			return CheckFrame{}, err
		}
		err := c.reader.ReadInto(&c.record)
		if errors.Is(err, ringbuf.ErrFlushed) {
			continue // as ctx ended: this one's, or too late for an earlier reading
		}
		if err != nil {
			return CheckFrame{}, fmt.Errorf("read an answer to a check: %w", err)
		}
		raw := c.record.RawSample
		if len(raw) < checkFrameData {
			return CheckFrame{}, fmt.Errorf("read an answer to a check: a record of %d bytes: not ours", len(raw))
		}
		f := CheckFrame{Interface: binary.NativeEndian.Uint32(raw), Length: binary.NativeEndian.Uint32(raw[4:])}
		kept := min(int(f.Length), len(raw)-checkFrameData, CheckFrameMax)
		f.Data = raw[checkFrameData:][:kept]
		return f, nil
	}
}

// Close lets go of the ring, and ends a Read that waits.
func (c *CheckFrames) Close() error {
	if err := c.reader.Close(); err != nil {
		return fmt.Errorf("close the ring of answers to checks: %w", err)
	}
	return nil
}
