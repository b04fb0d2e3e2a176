package config

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
)

// PortRange is a range of ports, both ends included, host byte order. The zero value is no range.
type PortRange struct{ First, Last uint16 }

// ParsePortRange reads "A-B", 1 ≤ A ≤ B ≤ 65535.
func ParsePortRange(s string) (PortRange, error) {
	first, last, ok := strings.Cut(s, "-")
	if !ok {
		return PortRange{}, fmt.Errorf("%q is not a range of ports: write two, as in 1024-32767", s)
	}
	a, errA := parsePort(first)
	b, errB := parsePort(last)
	if errA != nil || errB != nil {
		return PortRange{}, fmt.Errorf("%q is not a range of ports: write two from 1 to 65535, as in 1024-32767", s)
	}
	if a > b {
		return PortRange{}, fmt.Errorf("%q ends before it begins: write %d-%d", s, b, a)
	}
	return PortRange{First: a, Last: b}, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err == nil && (n == 0 || s[0] == '0') {
		err = strconv.ErrRange
	}
	return uint16(n), err
}

// IsZero reports whether r is no range at all.
func (r PortRange) IsZero() bool { return r == PortRange{} }

// Contains reports whether port lies in r. No port lies in the zero range.
func (r PortRange) Contains(port uint16) bool {
	return !r.IsZero() && r.First <= port && port <= r.Last
}

// Count returns how many ports r holds, up to 65535.
func (r PortRange) Count() int {
	if r.IsZero() {
		return 0
	}
	return int(r.Last) - int(r.First) + 1
}

// All returns the ports of r, rising.
func (r PortRange) All() iter.Seq[uint16] {
	return func(yield func(uint16) bool) {
		for i := range r.Count() {
			if !yield(r.First + uint16(i)) {
				return
			}
		}
	}
}

// plain returns what String does, but one port as a number alone.
func (r PortRange) plain() string {
	if r.Count() == 1 {
		return strconv.Itoa(int(r.First))
	}
	return r.String()
}

// reaching returns the place of the first range that ends at port or above, in a list that rises.
func reaching(list []PortRange, port uint16) int {
	i, _ := slices.BinarySearchFunc(list, port, func(r PortRange, port uint16) int { return cmp.Compare(r.Last, port) })
	return i
}

// String returns "A-B", and "" for the zero range.
func (r PortRange) String() string {
	if r.IsZero() {
		return ""
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// MarshalText writes what String returns.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (r *PortRange) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*r = PortRange{}
		return nil
	}
	parsed, err := ParsePortRange(string(text))
	if err == nil {
		*r = parsed
	}
	return err
}
