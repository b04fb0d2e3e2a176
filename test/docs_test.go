package test

import (
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"fairlead/bpf"
	"fairlead/maps"
	"fairlead/userspace/config"
)

// TestVerdictsPage: the page tells every verdict and every event that the data plane counts, in their order, and no
// others.
func TestVerdictsPage(t *testing.T) {
	page := mustRead(t, "../docs/VERDICTS.md")
	row := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|")
	var got []string
	for _, match := range row.FindAllStringSubmatch(page, -1) {
		got = append(got, match[1])
	}
	want := slices.Concat(bpf.VerdictNames(), bpf.EventNames())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("docs/VERDICTS.md (-counted by the data plane +told by the page):\n%s", diff)
	}
}

// TestExamples: the configurations that the pages show are right, and this version carries them out.
func TestExamples(t *testing.T) {
	block := regexp.MustCompile("(?s)```yaml\n(.*?)```")
	for _, page := range []string{"../README.md", "../docs/ARCHITECTURE.md", "../docs/HEALTH.md"} {
		found := block.FindAllStringSubmatch(mustRead(t, page), -1)
		if page == "../README.md" && len(found) == 0 {
			t.Errorf("%s shows no configuration", page)
		}
		for _, match := range found {
			cfg, err := config.Parse(page, []byte(match[1]))
			if err != nil {
				t.Error(err)
				continue
			}
			for _, err := range cfg.Unsupported() {
				t.Error(err)
			}
		}
	}
}

// TestLinks: what the pages point at is there: files, and make's targets.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	target := regexp.MustCompile("`make ([a-z-]+)")
	makefile := mustRead(t, "../Makefile")
	pages := 0
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == "node_modules" || entry.Name() == ".git"):
			return filepath.SkipDir
		case filepath.Ext(path) != ".md":
			return nil
		}
		pages++
		text := mustRead(t, path)
		for _, match := range link.FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), match[1])); err != nil {
				t.Errorf("%s points at %s: %v", path, match[1], err)
			}
		}
		for _, match := range target.FindAllStringSubmatch(text, -1) {
			if !strings.Contains(makefile, "\n"+match[1]+":") {
				t.Errorf("%s names `make %s`, which the Makefile lacks", path, match[1])
			}
		}
		return nil
	})
	if err != nil || pages < 8 {
		t.Errorf("%d pages read: %v", pages, err)
	}
}

func mustRead(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestArchitectureExample: the numbers of the page's example are those that Fairlead computes.
func TestArchitectureExample(t *testing.T) {
	const size = 65537
	tuple := maps.Tuple{
		Source:      netip.MustParseAddrPort("198.51.100.11:40001"),
		Destination: netip.MustParseAddrPort("192.0.2.10:443"),
		Protocol:    6,
	}
	backends := []maps.Member{{Name: "ws1", Weight: 1}, {Name: "ws2", Weight: 1}, {Name: "ws3", Weight: 1}, {Name: "ws4", Weight: 1}}
	before, err := maps.BuildRing(size, backends[:3])
	if err != nil {
		t.Fatal(err)
	}
	after, err := maps.BuildRing(size, backends)
	if err != nil {
		t.Fatal(err)
	}
	changed := 0
	for slot := range before {
		if before[slot] != after[slot] {
			changed++
		}
	}
	hash := tuple.Hash()
	slot := maps.SlotOf(hash, size)
	page := strings.Join(strings.Fields(mustRead(t, "../docs/ARCHITECTURE.md")), " ")
	for _, text := range []string{
		tuple.Source.String(),
		fmt.Sprintf("hash is `%#016x`", hash),
		fmt.Sprintf("chooses slot %d, which names %s", slot, backends[before[slot]].Name),
		fmt.Sprintf("exception bit %d clear", maps.ExceptionBit(hash)),
		fmt.Sprintf("%d,%03d of the 65,537 slots change hands, %.2f %%", changed/1000, changed%1000, 100*float64(changed)/size),
		fmt.Sprintf("slot %d among them: it belongs to %s now", slot, backends[after[slot]].Name),
	} {
		if !strings.Contains(page, text) {
			t.Errorf("docs/ARCHITECTURE.md does not say %q", text)
		}
	}
}
