package main

import (
	"fmt"
	"strconv"
	"time"
)

// Numbers as people read them; JSON has them exact.

// count is a number with three digits at least: 9999, 12.3k, 1.23M.
func count[N int | int64 | uint32 | uint64](n N) string {
	if n < 0 {
		return "-" + count(-n)
	}
	if n < 10000 {
		return strconv.FormatInt(int64(n), 10)
	}
	return scaled(float64(n), 1000, []string{"k", "M", "G", "T", "P", "E"})
}

// size is a number of bytes: 512 B, 1.5 KiB, 34 GiB.
func size(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	return scaled(float64(n), 1024, []string{" KiB", " MiB", " GiB", " TiB", " PiB", " EiB"})
}

func scaled(f, step float64, units []string) string {
	i := -1
	// 999.5 and more would be shown as 1000: that is 1 of the next unit.
	for (i < 0 || f >= 999.5) && i+1 < len(units) {
		f /= step
		i++
	}
	digits := 2
	switch {
	case f >= 99.95:
		digits = 0
	case f >= 9.995:
		digits = 1
	}
	text := strconv.FormatFloat(f, 'f', digits, 64)
	if digits > 0 {
		for text[len(text)-1] == '0' {
			text = text[:len(text)-1]
		}
		if text[len(text)-1] == '.' {
			text = text[:len(text)-1]
		}
	}
	return text + units[i]
}

// span is a duration in its two greatest units: 0s, 12s, 3m20s, 5h12m, 3d4h.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	d = max(d, 0)
	pair := func(big time.Duration, bigName string, small time.Duration, smallName string) string {
		text := fmt.Sprintf("%d%s", d/big, bigName)
		if rest := d % big / small; rest != 0 {
			text += fmt.Sprintf("%d%s", rest, smallName)
		}
		return text
	}
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return pair(time.Minute, "m", time.Second, "s")
	case d < day:
		return pair(time.Hour, "h", time.Minute, "m")
	}
	return pair(day, "d", time.Hour, "h")
}

// percent is a share: 33.3 %.
func percent(part, whole uint64) string {
	if whole == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(part)/float64(whole))
}

// seconds are a duration as JSON has it.
func seconds(d time.Duration) float64 { return float64(d.Milliseconds()) / 1000 }
