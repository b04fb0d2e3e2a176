package e2e

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/maps"
	"fairlead/test/lab"
)

var reloads = flag.Int("reloads", 20, "reloads of TestReloads, half of them of broken files")

// manyReloads is from where on two thousand WebSockets live through them.
const manyReloads = 100

// TestReloads: at random moments, by signal or by command, the daemon reads a file in which backends have come, gone or
// another weight, or one that is broken. Connections notice neither; after each, the maps hold the last good file, whole.
func TestReloads(t *testing.T) {
	t.Parallel()
	connections := 300
	if *reloads >= manyReloads {
		connections = 2000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	const backends = 5
	fl := mustFleet(t, lab.TwoArm, form{"fullnat", 4, 4}, backends, time.Minute+time.Duration(*reloads)*5*time.Second,
		"health: {type: tcp, interval: 2s, timeout: 2s, fall: 5}")
	r := &rereader{fleet: fl, random: random}
	fl.begin()
	fl.healthy("ws1", "ws2", "ws3", "ws4", "ws5")
	r.hold(fl.service)
	c := fl.crowd()
	c.join(connections)
	if err := c.clients.Chatter(fl.ctx, lab.ChatterOptions{Rate: 1000}); err != nil {
		t.Fatal(err)
	}

	// Half of them are broken, in an order of chance.
	var broken []bool
	for i := range *reloads {
		broken = append(broken, i%2 == 1)
	}
	random.Shuffle(len(broken), func(i, j int) { broken[i], broken[j] = broken[j], broken[i] })
	kinds := slices.Collect(func(yield func(breakage) bool) {
		for i := 0; i < *reloads; i += len(breakages) {
			for _, b := range breakages {
				if !yield(b) {
					return
				}
			}
		}
	})
	count := map[string]int{}
	for _, bad := range broken {
		c.echoes(random.IntN(200)) // a random moment
		if bad {
			count[r.refused(kinds[0])]++
			kinds = kinds[1:]
		} else {
			count[r.taken()]++
		}
		r.holds()
		c.stats()
	}
	t.Logf("reloads: %v", count)

	// Nobody new was hurt by anything that was left over.
	late := c.join(60)
	for name := range late {
		if w := r.weight(name); late[name] > 0 && w == 0 {
			t.Errorf("%d new connections reached %s, whose weight is 0 or who has left", late[name], name)
		}
	}
	c.echoes(2 * c.opened)
	st := c.leave()
	t.Logf("opened %d, broken %d, moved %d, messages echoed %d", c.opened, st.Broken, st.Moved, st.Echoed)
	// Those that have left go when their last connection has.
	fl.until("the maps hold nothing but the configuration", func() bool {
		return !slices.ContainsFunc(fl.inventory().Backends, func(b maps.Backend) bool { return b.Leaving })
	})
	r.holds()
}

// rereader has a daemon read its configuration again and again.
type rereader struct {
	*fleet
	random *rand.Rand
	good   []service // in force
	text   []byte    // its file

	refusals int // in the log
}

// hold notes what is in force now.
func (r *rereader) hold(services ...service) {
	r.t.Helper()
	text, err := os.ReadFile(r.config)
	if err != nil {
		r.t.Fatal(err)
	}
	r.good, r.text = services, text
}

// weight is what a backend of the first service has in the file in force; 0 where it isn't in it.
func (r *rereader) weight(name string) int {
	for _, b := range r.good[0].backends {
		if b.name == name {
			return b.weight
		}
	}
	return 0
}

// holds fails the test unless the maps hold what is in force, and beside it only what is leaving.
func (r *rereader) holds() {
	r.t.Helper()
	var want, have []string
	inv := r.inventory()
	names := map[uint32]string{}
	for i, s := range r.good {
		want = append(want, fmt.Sprintf("service%d at %v", i, s.addrPort()))
		for _, b := range s.backends {
			want = append(want, fmt.Sprintf("service%d/%s at %v by %s, weight %d of %[5]d", i, b.name, netip.AddrPortFrom(b.address, s.port),
				s.method, b.weight))
		}
	}
	for _, s := range inv.Services {
		names[s.ID] = s.Name
		if !s.Leaving {
			have = append(have, fmt.Sprintf("%s at %v", s.Name, s.AddrPort()))
		}
	}
	for _, b := range inv.Backends {
		if !b.Leaving {
			have = append(have, fmt.Sprintf("%s/%s at %v by %v, weight %d of %d", names[b.Service], b.Name,
				netip.AddrPortFrom(b.Address, b.Port), b.Method, b.Weight, b.Shown.Configured))
		}
	}
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(want, have) {
		r.t.Fatalf("the maps hold\n%s\nwant\n%s\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"), r.story())
	}
	// Slots are those of whom may have new connections; a backend that is new gets them when its first check was good.
	r.until("the ring is the configuration's", func() bool {
		shares := r.shares()
		for _, b := range r.good[0].backends {
			if (shares[b.name] > 0) != (b.weight > 0) {
				return false
			}
		}
		for name := range shares {
			if r.weight(name) == 0 {
				return false
			}
		}
		return true
	})
}

// taken has the daemon read a good file, in which something is another than before, and returns how.
func (r *rereader) taken() string {
	r.t.Helper()
	all := r.service
	s := all
	s.backends = nil
	for _, i := range r.random.Perm(len(all.backends)) {
		b := all.backends[i]
		b.weight = r.random.IntN(4)
		if len(s.backends) == 0 {
			b.weight++ // somebody has to serve
		}
		s.backends = append(s.backends, b)
	}
	s.backends = s.backends[:1+r.random.IntN(len(s.backends))]
	services := []service{s}
	if r.random.IntN(3) == 0 {
		other := all.at("tcp", websocketPort+1)
		other.backends = slices.Clone(all.backends[:2])
		services = append(services, other)
	}
	r.write(services...)
	if r.random.IntN(2) == 0 {
		before := r.answered()
		r.hangUp()
		r.until("the reload is done", func() bool { return r.answered() > before })
		if n := strings.Count(r.log(), "reload refused"); n != r.refusals {
			r.t.Fatalf("a good file was refused\n%s", r.story())
		}
		r.hold(services...)
		return "good, by signal"
	}
	r.does("reload")
	r.hold(services...)
	return "good, by command"
}

// answered counts the reloads that the daemon is done with.
func (r *rereader) answered() int {
	log := r.log()
	return strings.Count(log, "msg=reloaded") + strings.Count(log, "reload refused")
}

func (r *rereader) hangUp() {
	r.t.Helper()
	if err := r.process.Signal(unix.SIGHUP); err != nil {
		r.t.Fatal(err)
	}
}

// breakage is a way to break a file, and what is said of it.
type breakage struct {
	name string
	// spoil breaks the text of a file, and returns the line that is to be named, if any, and a word that is to be said.
	spoil func(r *rereader, text string) (broken string, line int, word string)
	// living: the file is good in itself, and only the living state refuses it.
	living bool
}

// lineOf is the number of the first line that holds a word.
func lineOf(text, word string) int { return lineAt(text, strings.Index(text, word)) }

// lineAt is the number of the line that a byte is in.
func lineAt(text string, place int) int { return 1 + strings.Count(text[:place], "\n") }

var breakages = []breakage{
	{name: "wrong field", spoil: func(r *rereader, text string) (string, int, string) {
		return strings.Replace(text, "  method:", "  methud:", 1), lineOf(text, "  method:"), "methud"
	}},
	{name: "bad address", spoil: func(r *rereader, text string) (string, int, string) {
		return strings.Replace(text, `address: "10.0.0.`, `address: "10.0.0.1.`, 1), lineOf(text, `address: "10.0.0.`), "10.0.0.1."
	}},
	{name: "half a file", spoil: func(r *rereader, text string) (string, int, string) {
		last := strings.LastIndex(text, "{name:")
		return text[:last+8+r.random.IntN(12)], lineAt(text, last), ""
	}},
	{name: "empty", spoil: func(*rereader, string) (string, int, string) { return "", 1, "the file holds nothing" }},
	{name: "backend twice", spoil: func(r *rereader, text string) (string, int, string) {
		first := text[strings.Index(text, "  - {name: ws"):]
		first = first[:strings.Index(first, "\n")+1]
		return strings.Replace(text, first, first+first, 1), lineOf(text, first) + 1, "ws"
	}},
	{name: "another ring_size", living: true, spoil: func(r *rereader, text string) (string, int, string) {
		// Beside it, all weights change: none of them may come through.
		text = strings.ReplaceAll(text, "weight: ", "weight: 1")
		return strings.Replace(text, fmt.Sprintf("ring_size: %d", fleetRing), "ring_size: 2003", 1), 0, "ring_size"
	}},
	{name: "another pin_path", living: true, spoil: func(r *rereader, text string) (string, int, string) {
		text = strings.ReplaceAll(text, "weight: ", "weight: 2")
		return strings.Replace(text, r.pinPath, r.pinPath+"-2", 1), lineOf(text, "pin_path"), "pin_path"
	}},
}

// refused has the daemon read a broken file, and returns how it was broken.
func (r *rereader) refused(b breakage) string {
	r.t.Helper()
	broken, line, word := b.spoil(r, string(r.text))
	if broken == string(r.text) {
		r.t.Fatalf("%s: the file is as good as it was:\n%s", b.name, broken)
	}
	if err := os.WriteFile(r.config, []byte(broken), 0o644); err != nil {
		r.t.Fatal(err)
	}
	how := []string{"by signal", "by command", "by command with --socket"}[r.random.IntN(3)]
	var said string
	switch how {
	case "by signal":
		before := r.answered()
		r.hangUp()
		r.until("the reload is refused", func() bool { return r.answered() > before })
		log := r.log()
		said, _, _ = strings.Cut(log[strings.LastIndex(log, "reload refused"):], "\n")
		r.refusals++
	default:
		words := []string{"reload"}
		if how != "by command" {
			words = append(words, "--socket", filepath.Join(filepath.Dir(r.config), "control.sock"))
		}
		ran := r.run(words...)
		if said = ran.stderr; ran.code != 1 || ran.stdout != "" {
			r.t.Errorf("fairlead %s of a broken file, %s: exit code %d, want 1\n%s%s", strings.Join(words, " "), b.name, ran.code,
				ran.stdout, ran.stderr)
		}
		if how != "by command" || b.living { // else the program finds out before it asks the daemon
			r.refusals++
		}
	}
	r.until("the refusal is in the log", func() bool { return strings.Count(r.log(), "reload refused") == r.refusals })
	if place := fmt.Sprintf("fairlead.yaml:%d", line); line > 0 && !strings.Contains(said, place) || !strings.Contains(said, word) {
		r.t.Errorf("%s, %s: %q does not name %s and %q", b.name, how, said, place, word)
	}
	if err := os.WriteFile(r.config, r.text, 0o644); err != nil {
		r.t.Fatal(err)
	}
	return "refused: " + b.name
}
