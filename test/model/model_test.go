// Package model judges the data plane by a model that was written from the RFCs and the design, not from the C: random
// and mutated packets, of which none may be forwarded wrongly, and no counter may be out of place.
package model

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

var (
	packetsFlag = flag.Int("model.packets", 60_000, "how many packets TestModel judges")
	seedFlag    = flag.Uint64("model.seed", 1, "seed of TestModel; 0: of the clock")
	replayFlag  = flag.String("model.replay", "", "a trace to play again in place of random packets")
	shrinkFlag  = flag.Duration("model.shrink", 20*time.Second, "how long to look for a shorter way to each of the first failures")
)

// packetsAGame is how many packets a data plane gets before another takes its place: it takes a few seconds, so that
// nothing ends by its age.
const packetsAGame = 15_000

// mostFailures is how many different ones are told whole, mostShrunk how many are shortened.
const (
	mostFailures = 25
	mostShrunk   = 5
)

// TestModel judges random packets, and mutated ones.
func TestModel(t *testing.T) {
	d, err := newDevices()
	if err != nil {
		t.Fatal(err)
	}
	if *replayFlag != "" {
		replay(t, d, *replayFlag)
		return
	}
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	found := &failures{T: t, devices: d, known: map[string]int{}}
	total := newTally()
	started := time.Now()
	for done, round := 0, uint64(0); done < *packetsFlag; round++ {
		n := min(packetsAGame, *packetsFlag-done)
		found.game(setup{seed + round, limitsOf(round)}, n, total)
		done += n
	}
	t.Logf("%d packets in %v\n%s", *packetsFlag, time.Since(started).Round(time.Millisecond), total)
	found.tell()
}

// limitsOf are the limits of a round: out of the way, or tight.
func limitsOf(round uint64) limits {
	l := limits{epoch: 10 * time.Second}
	switch round % 4 {
	case 1:
		l.epoch = 20 * time.Millisecond
	case 2:
		l = limits{answers: 3, adoptions: 4, epoch: 10 * time.Second}
	case 3:
		l = limits{connections: 60, young: 20, epoch: 20 * time.Millisecond}
	}
	return l
}

// tally counts what was met, for the log.
type tally struct {
	verdicts, events map[string]int
	met              map[string]int
}

func newTally() *tally { return &tally{map[string]int{}, map[string]int{}, map[string]int{}} }

func (a *tally) String() string {
	var b strings.Builder
	for _, part := range []struct {
		name string
		all  map[string]int
	}{{"verdicts", a.verdicts}, {"events", a.events}, {"met", a.met}} {
		var names []string
		for name := range part.all {
			names = append(names, name)
		}
		slices.SortFunc(names, func(x, y string) int { return part.all[y] - part.all[x] })
		fmt.Fprintf(&b, "%s:\n", part.name)
		for _, name := range names {
			fmt.Fprintf(&b, "  %8d %s\n", part.all[name], name)
		}
	}
	return b.String()
}

func (a *tally) note(j *judged) {
	if v, ok := j.r.verdict(); ok {
		a.verdicts[verdictNames[v]]++
	}
	for i, n := range j.r.events {
		if n > 0 {
			a.events[eventNames[i]] += int(n)
		}
	}
}

// failures are those found so far, one of each kind.
type failures struct {
	*testing.T
	devices devices
	known   map[string]int
	found   []failure
}

// failure is the first of its kind.
type failure struct {
	rule    string
	verdict verdict
	text    string
	out     []byte
	trace   trace // up to it
}

// game plays one game of random packets.
func (f *failures) game(s setup, packets int, total *tally) {
	g, err := newGame(f.devices, s)
	if err != nil {
		f.Fatal(err)
	}
	defer g.close()
	random := rand.New(rand.NewPCG(s.seed, 3))
	from := newGenerator(g.world, random)
	played := &trace{setup: s}
	for range packets {
		if random.IntN(400) == 0 {
			change := step{change: random.Uint64()}
			played.steps = append(played.steps, change)
			if _, err := g.play(change); err != nil {
				f.Fatal(err)
			}
		}
		a := from.next()
		one := step{frame: a.frame, device: f.devices.number(a.ingress)}
		played.steps = append(played.steps, one)
		j, err := g.play(one)
		if err != nil {
			f.Fatal(err)
		}
		total.note(j)
		for _, b := range j.breaches {
			f.add(played, j, b)
		}
		from.heard(a, j)
	}
	for what, n := range g.model.met {
		total.met[what] += n
	}
}

var numbers = regexp.MustCompile(`[0-9a-f:.]*[0-9][0-9a-f:.]*`)

// add notes a failure, and of the first of its kind all there is to know.
func (f *failures) add(t *trace, j *judged, b breach) {
	kind := b.rule + "/" + verdictNames[j.v] + "/" + numbers.ReplaceAllString(j.e.why, "#")
	f.known[kind]++
	if f.known[kind] == 1 && len(f.found) < mostFailures {
		f.found = append(f.found, failure{b.rule, j.v, describe(j, b), bytes.Clone(j.r.out), trace{t.setup, t.steps[:len(t.steps):len(t.steps)]}})
	}
}

// tell tells the failures, each with the shortest way to it that is found in time.
func (f *failures) tell() {
	for kind, n := range f.known {
		f.Errorf("%d of %s", n, kind)
	}
	for i, one := range f.found {
		short := &one.trace
		if i < mostShrunk {
			short = short.shrink(f.devices, one.rule, one.verdict, one.out, time.Now().Add(*shrinkFlag))
		}
		name := filepath.Join(os.TempDir(), fmt.Sprintf("fairlead-model-%d-%d.trace", short.setup.seed, i))
		var file bytes.Buffer
		if err := short.write(&file); err != nil {
			f.Fatal(err)
		}
		if err := os.WriteFile(name, file.Bytes(), 0o600); err != nil {
			f.Fatal(err)
		}
		text := one.text
		for k, s := range short.steps[:len(short.steps)-1] {
			if len(short.steps) > 12 {
				break
			}
			if s.frame == nil {
				text += fmt.Sprintf("  step %d: change %d\n", k+1, s.change)
				continue
			}
			text += fmt.Sprintf("  step %d: device %d: %s\n", k+1, s.device, hexadecimal(s.frame))
		}
		f.Errorf("%sagain, in %d steps: go test ./test/model -run 'TestModel$' -v -model.replay=%s", text, len(short.steps), name)
	}
}

// describe tells a failure: the rule, the packet as bytes and as gopacket reads it, and what came of it.
func describe(j *judged, b breach) string {
	var text strings.Builder
	fmt.Fprintf(&text, "rule %q is broken: %s\n", b.rule, b.text)
	fmt.Fprintf(&text, "expected (%s): %v\n", j.e.why, j.e.verdicts)
	fmt.Fprintf(&text, "got: %v\n", j.r)
	fmt.Fprintf(&text, "in, by device %d: %s\n", j.ingress, hexadecimal(j.p.frame))
	if j.r.action == xdpTX || j.r.action == xdpRedirect {
		fmt.Fprintf(&text, "out: %s\n", hexadecimal(j.r.out))
	}
	text.WriteString(decoded(j.p.frame))
	return text.String()
}

// hexadecimal are a frame's bytes; of a long one, its first. The trace has all.
func hexadecimal(b []byte) string {
	const most = 300
	if len(b) > most {
		return fmt.Sprintf("%x… (%d bytes)", b[:most], len(b))
	}
	return fmt.Sprintf("%x", b)
}

func decoded(frame []byte) string {
	var text strings.Builder
	for _, layer := range gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default).Layers() {
		line := gopacket.LayerString(layer)
		if len(line) > 400 {
			line = line[:400] + "…"
		}
		fmt.Fprintf(&text, "  %s\n", line)
	}
	return text.String()
}

// replay plays a trace step by step and tells each.
func replay(t *testing.T, d devices, name string) {
	file, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	played, err := readTrace(file)
	if err != nil {
		t.Fatal(err)
	}
	g, err := newGame(d, played.setup)
	if err != nil {
		t.Fatal(err)
	}
	defer g.close()
	found := &failures{T: t, devices: d, known: map[string]int{}}
	for i, s := range played.steps {
		j, err := g.play(s)
		if err != nil {
			t.Fatal(err)
		}
		if j == nil {
			t.Logf("step %d: change %d", i+1, s.change)
			continue
		}
		if len(played.steps) <= 200 {
			t.Logf("step %d: %s: expected %v, got %v\n  in  %s\n  out %s\n%s", i+1, j.e.why, j.e.verdicts, j.r,
				hexadecimal(s.frame), hexadecimal(j.r.out), decoded(s.frame))
		}
		for _, b := range j.breaches {
			if i < len(played.steps)-1 {
				t.Logf("step %d breaks rule %q: %s", i+1, b.rule, b.text)
				continue
			}
			found.add(&trace{played.setup, played.steps}, j, b)
		}
	}
	found.tell()
}
