package config

import "strings"

// nearest returns the one of names that word most likely was meant to be, or "" where none is near.
func nearest(word string, names []string) string {
	word = strings.ReplaceAll(strings.ToLower(word), "-", "_")
	best, limit := "", 1+min(len(word)/5, 2) // one slip in a short word, up to three in a long one
	for _, name := range names {
		if len(word) > len(name)+limit || len(name) > len(word)+limit {
			continue
		}
		if d := distance(word, name); d <= limit && d < len(name) {
			best, limit = name, d-1
		}
	}
	return best
}

// distance counts the insertions, deletions, replacements and swaps of neighbours that turn a into b (optimal string
// alignment).
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
