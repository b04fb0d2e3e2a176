package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands and string sets of linux/ethtool.h.
const (
	ethtoolGetDriver     = 0x03
	ethtoolGetStrings    = 0x1b
	ethtoolGetStatistics = 0x1d
	ethtoolGetSetInfo    = 0x37
	ethtoolGetFeatures   = 0x3a
	ethtoolSetFeatures   = 0x3b
	ethtoolGetChannels   = 0x3c

	statisticsSet = 1
	featuresSet   = 4

	stringLength = 32 // ETH_GSTRING_LEN
)

// ethtool hands a request to a device by SIOCETHTOOL. A request begins with its command; the answer is written into it.
// It is of the heap and stays where it is, because the kernel is given its address as a number.
func ethtool(device string, request []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("ask %s by ethtool: %w", device, err)
	}
	defer unix.Close(fd)
	ifreq := &struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&request[0])}
	copy(ifreq.name[:unix.IFNAMSIZ-1], device)
	var pin runtime.Pinner
	pin.Pin(&request[0])
	defer pin.Unpin()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL,
		uintptr(unsafe.Pointer(ifreq))); errno != 0 {
		return fmt.Errorf("ask %s by ethtool: %w", device, errno)
	}
	return nil
}

// words makes a request of 32-bit numbers, with room behind them.
func words(room int, numbers ...uint32) []byte {
	request := make([]byte, 4*len(numbers)+room)
	for i, n := range numbers {
		binary.NativeEndian.PutUint32(request[4*i:], n)
	}
	return request
}

func word(answer []byte, i int) uint32 { return binary.NativeEndian.Uint32(answer[4*i:]) }

// ethtoolDriver names a device's driver.
func ethtoolDriver(device string) (string, error) {
	const size = 196 // struct ethtool_drvinfo
	answer := words(size-4, ethtoolGetDriver)
	if err := ethtool(device, answer); err != nil {
		return "", err
	}
	return unix.ByteSliceToString(answer[4:36]), nil
}

// ethtoolStrings are the names of a device's features or statistics.
func ethtoolStrings(device string, set uint32) ([]string, error) {
	answer := words(12, ethtoolGetSetInfo, 0)
	binary.NativeEndian.PutUint64(answer[8:], 1<<set)
	if err := ethtool(device, answer); err != nil {
		return nil, err
	}
	if binary.NativeEndian.Uint64(answer[8:]) == 0 {
		return nil, nil
	}
	// The kernel writes as many as there are by then, whatever room it is told of.
	count := int(word(answer, 4))
	room := 2*count + 256
	answer = words(room*stringLength, ethtoolGetStrings, set, uint32(count))
	if err := ethtool(device, answer); err != nil {
		return nil, err
	}
	names := make([]string, min(int(word(answer, 2)), room))
	for i := range names {
		names[i] = unix.ByteSliceToString(answer[12+i*stringLength:][:stringLength])
	}
	return names, nil
}

// offload is a feature of a device, as ethtool -k shows it.
type offload struct {
	on    bool
	fixed bool // can't be changed by hand
}

// ethtoolOffloads are a device's features by ethtool's names, such as rx-lro.
func ethtoolOffloads(device string) (map[string]offload, error) {
	names, err := ethtoolStrings(device, featuresSet)
	if err != nil {
		return nil, err
	}
	// Blocks of 32 features: changeable, wanted, on, never changed.
	blocks := (len(names) + 31) / 32
	answer := words(16*blocks, ethtoolGetFeatures, uint32(blocks))
	if err := ethtool(device, answer); err != nil {
		return nil, err
	}
	if int(word(answer, 1)) < blocks {
		return nil, fmt.Errorf("ask %s by ethtool: %d features, and the state of %d", device, len(names), 32*word(answer, 1))
	}
	offloads := make(map[string]offload, len(names))
	for i, name := range names {
		block, bit := 2+4*(i/32), uint32(1)<<(i%32)
		offloads[name] = offload{on: word(answer, block+2)&bit != 0,
			fixed: word(answer, block)&bit == 0 || word(answer, block+3)&bit != 0}
	}
	return offloads, nil
}

// ethtoolSwitch turns features of a device on or off, all in one call. What the device makes of it is to be read back: a
// driver may refuse, or keep some for the sake of others.
func ethtoolSwitch(device string, wanted map[string]bool) error {
	names, err := ethtoolStrings(device, featuresSet)
	if err != nil {
		return err
	}
	blocks := (len(names) + 31) / 32
	request := words(8*blocks, ethtoolSetFeatures, uint32(blocks))
	found := 0
	for i, name := range names {
		on, ok := wanted[name]
		if !ok {
			continue
		}
		found++
		block, bit := request[8+8*(i/32):], uint32(1)<<(i%32)
		binary.NativeEndian.PutUint32(block, binary.NativeEndian.Uint32(block)|bit)
		if on {
			binary.NativeEndian.PutUint32(block[4:], binary.NativeEndian.Uint32(block[4:])|bit)
		}
	}
	if found < len(wanted) {
		return fmt.Errorf("ask %s by ethtool: this kernel doesn't know all of %v", device, wanted)
	}
	return ethtool(device, request)
}

// channels are a device's queues. Where a driver counts pairs, rx and tx are zero; else combined is.
type channels struct {
	maxRx, maxTx, maxCombined uint32
	rx, tx, combined          uint32
}

// ethtoolChannels are a device's queues; none, where the driver does not tell.
func ethtoolChannels(device string) (channels, error) {
	answer := words(32, ethtoolGetChannels)
	if err := ethtool(device, answer); errors.Is(err, unix.EOPNOTSUPP) {
		return channels{}, nil
	} else if err != nil {
		return channels{}, err
	}
	return channels{word(answer, 1), word(answer, 2), word(answer, 4), word(answer, 5), word(answer, 6), word(answer, 8)},
		nil
}

// ethtoolStatistics are a driver's own counters, as ethtool -S shows them; none, where it has none.
func ethtoolStatistics(device string) (map[string]uint64, error) {
	// Their number goes with that of the queues, which may change in between: names and values have to be of one time.
	for try := 1; ; try++ {
		names, err := ethtoolStrings(device, statisticsSet)
		if errors.Is(err, unix.EOPNOTSUPP) || err == nil && len(names) == 0 {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		room := 2*len(names) + 256
		answer := words(8*room, ethtoolGetStatistics, uint32(len(names)))
		if err := ethtool(device, answer); err != nil {
			return nil, err
		}
		if int(word(answer, 1)) != len(names) {
			if try == 3 {
				return nil, fmt.Errorf("ask %s by ethtool: its statistics keep changing in number", device)
			}
			continue
		}
		values := make(map[string]uint64, len(names))
		for i, name := range names {
			values[strings.TrimSpace(name)] += binary.NativeEndian.Uint64(answer[8+8*i:])
		}
		return values, nil
	}
}
