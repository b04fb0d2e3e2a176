package maps

import (
	"time"

	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// Tick is the unit of all times in the maps: 2^24 ns of the monotonic clock, which starts with the host.
const Tick = time.Duration(1) << bpf.FairleadLimitsTICK_SHIFT

// Now is the tick of this moment, by the same coarse clock that the data plane asks.
func Now() uint32 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts); err != nil {
		panic("read the monotonic coarse clock, which every Linux since 2.6.32 has: " + err.Error())
	}
	return uint32(uint64(ts.Nano()) >> bpf.FairleadLimitsTICK_SHIFT)
}

// Ticks is a duration in whole ticks, rounded up.
func Ticks(d time.Duration) uint32 { return uint32((d + Tick - 1) / Tick) }

// since is the age of a tick; a tick just ahead of the clock has age 0.
func since(now, then uint32) uint32 {
	if age := int32(now - then); age > 0 {
		return uint32(age)
	}
	return 0
}

// Age is how long ago a tick was.
func Age(now, then uint32) time.Duration { return time.Duration(since(now, then)) * Tick }

// later is the later of two ticks.
func later(a, b uint32) uint32 {
	if int32(a-b) > 0 {
		return a
	}
	return b
}
