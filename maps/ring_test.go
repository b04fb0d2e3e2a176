package maps

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

func mustRing(tb testing.TB, size uint32, members []Member) []int32 {
	tb.Helper()
	ring, err := BuildRing(size, members)
	if err != nil {
		tb.Fatal(err)
	}
	return ring
}

// backends makes count members ws1, ws2 and so on; weight gives each its own.
func backends(count int, weight func(i int) uint32) []Member {
	members := make([]Member, count)
	for i := range members {
		members[i] = Member{fmt.Sprintf("ws%d", i+1), weight(i)}
	}
	return members
}

func even(int) uint32 { return 1 }

// uneven is a weight from 1 to 10, the same in every run.
func uneven(i int) uint32 { return 1 + uint32(finish(uint64(i)+1)%10) }

func slotsOf(ring []int32, members []Member) []int {
	counts := make([]int, len(members))
	for _, member := range ring {
		counts[member]++
	}
	return counts
}

// without is the same members, those at the indexes given with no weight: their indexes stay comparable.
func without(members []Member, gone ...int) []Member {
	left := slices.Clone(members)
	for _, i := range gone {
		left[i].Weight = 0
	}
	return left
}

// The ring must never change silently: edge hosts of different versions share their connections by it.
func TestBuildRingGolden(t *testing.T) {
	members := []Member{{"ws1", 1}, {"ws2", 1}, {"ws3", 2}, {"ws4", 0}}
	want := []int32{0, 2, 0, 2, 2, 0, 2, 2, 2, 0, 1, 1, 2, 1, 2, 1, 2, 0, 2, 1, 0, 1, 2}
	if diff := gocmp.Diff(want, mustRing(t, 23, members)); diff != "" {
		t.Errorf("ring of 23 slots (-want +got):\n%s", diff)
	}
	for _, golden := range []struct {
		name    string
		size    uint32
		members []Member
		sha256  string // of the slots as 32-bit little-endian integers
	}{
		{"3 even", 65537, backends(3, even), "cec1cfe3f7b7773234ecd55ca5cf0e3cf589854021be61aca41f65273c94e875"},
		{"100 even", 65537, backends(100, even), "2f4bbe25476186cebd9a915a7d579622ecbb76bf1e448a93ca8d226b9ad8fcbb"},
		{"1000 uneven", 65537, backends(1000, uneven), "01668174a87dc5407155f75fbd87a72d58aad50ebe1cc847790a0da7120f432b"},
		{"10 far apart", 655373, backends(10, func(i int) uint32 { return math.MaxUint32 >> (3 * i) }),
			"386bf092789411c402b597d95e25e8254297496f8e9970f26ef7611d37c9d42a"},
	} {
		ring, err := binary.Append(nil, binary.LittleEndian, mustRing(t, golden.size, golden.members))
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(ring)
		if got := hex.EncodeToString(sum[:]); got != golden.sha256 {
			t.Errorf("%s: ring has the SHA-256 %s, want %s", golden.name, got, golden.sha256)
		}
	}
}

// slowRing follows BuildRing's description word for word: whole permutations, all turns sorted by exact fractions.
func slowRing(size uint32, members []Member) []int32 {
	type turn struct {
		at          *big.Rat
		phase       uint32
		member      int
		permutation []uint32
	}
	var order []turn
	for i, member := range members {
		if member.Weight == 0 {
			continue
		}
		name := fnv1a(member.Name)
		offset, skip := finish(name^offsetSeed)%uint64(size), finish(name^skipSeed)%uint64(size-1)+1
		phase := uint32(finish(name^phaseSeed) >> 32)
		permutation := make([]uint32, size)
		for k := range permutation {
			permutation[k] = uint32((offset + uint64(k)*skip) % uint64(size))
		}
		for k := range uint64(size) {
			at := new(big.Rat)
			if k > 0 {
				at.SetFrac(new(big.Int).SetUint64(k<<32|uint64(phase)), big.NewInt(int64(member.Weight)))
			}
			order = append(order, turn{at, phase, i, permutation})
		}
	}
	slices.SortStableFunc(order, func(a, b turn) int {
		if a.at.Sign() == 0 && b.at.Sign() == 0 {
			return cmp.Compare(a.phase, b.phase)
		}
		return a.at.Cmp(b.at)
	})
	ring := slices.Repeat([]int32{-1}, int(size))
	free := len(ring)
	for _, turn := range order {
		if free == 0 {
			break
		}
		for _, slot := range turn.permutation {
			if ring[slot] < 0 {
				ring[slot] = int32(turn.member)
				free--
				break
			}
		}
	}
	return ring
}

func TestBuildRingAsDescribed(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for _, size := range []uint32{2, 3, 5, 31, 101} {
		for range 40 {
			most := uint64(1) << random.IntN(33)
			members := backends(1+random.IntN(min(int(size), 12)), func(int) uint32 { return uint32(random.Uint64N(most)) })
			if !slices.ContainsFunc(members, func(m Member) bool { return m.Weight > 0 }) {
				continue
			}
			if diff := gocmp.Diff(slowRing(size, members), mustRing(t, size, members)); diff != "" {
				t.Fatalf("ring of %d slots for %v (-described +built):\n%s", size, members, diff)
			}
		}
	}
}

func TestBuildRingRefuses(t *testing.T) {
	for _, refused := range []struct {
		size    uint32
		members []Member
		want    string
	}{
		{0, nil, "size 0 is not a prime"},
		{1, nil, "size 1 is not a prime"},
		{65536, backends(3, even), "size 65536 is not a prime"},
		{4294967291, nil, "not a prime below 2^31"}, // a prime, but too great
		{65537, []Member{{"ws1", 1}, {"ws2", 1}, {"ws1", 2}}, `two members are named "ws1"`},
		{65537, []Member{{"ws1", 0}, {"ws1", 0}}, `two members are named "ws1"`},
		{7, backends(8, even), "8 members with weight are more than the 7 slots"},
	} {
		ring, err := BuildRing(refused.size, refused.members)
		if err == nil || !strings.Contains(err.Error(), refused.want) {
			t.Errorf("ring of %d slots for %v: error %v, want one with %q", refused.size, refused.members, err, refused.want)
		}
		if ring != nil {
			t.Errorf("ring of %d slots for %v was built in spite of its error", refused.size, refused.members)
		}
	}
	full := mustRing(t, 7, backends(9, func(i int) uint32 { return uint32(min(i, 2) / 2) }))
	for member, count := range slotsOf(full, make([]Member, 9)) {
		if want := min(member, 2) / 2; count != want {
			t.Errorf("ring as large as its members with weight: member %d has %d slots, want %d", member, count, want)
		}
	}
}

func TestBuildRingOfNobody(t *testing.T) {
	for _, members := range [][]Member{nil, backends(3, func(int) uint32 { return 0 })} {
		if diff := gocmp.Diff(slices.Repeat([]int32{-1}, 13), mustRing(t, 13, members)); diff != "" {
			t.Errorf("ring of %v (-want +got):\n%s", members, diff)
		}
	}
}

// Neither the members' order, nor a common factor of the weights, nor members without weight, nor members that came and
// went have any influence.
func TestBuildRingFromNamesAndWeightsAlone(t *testing.T) {
	const size = 10007
	random := rand.New(rand.NewPCG(5, 6))
	named := func(members []Member) []string {
		var names []string
		for _, member := range mustRing(t, size, members) {
			names = append(names, members[member].Name)
		}
		return names
	}
	for _, weight := range []func(int) uint32{even, uneven, func(i int) uint32 { return 1 << (i % 20) }} {
		members := backends(100, weight)
		want := named(members)
		same := func(what string, members []Member) {
			t.Helper()
			if !slices.Equal(named(members), want) {
				t.Errorf("another ring for %s", what)
			}
		}
		for range 5 {
			shuffled := slices.Clone(members)
			random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
			same("another order", shuffled)

			newcomer := Member{fmt.Sprintf("newcomer%d", random.Uint32()), 1 + random.Uint32N(10)}
			at := random.IntN(len(members) + 1)
			came := slices.Insert(slices.Clone(members), at, newcomer)
			if slices.Equal(named(came), want) {
				t.Errorf("%v came and took no slot", newcomer)
			}
			same("a member that came and went", slices.Delete(slices.Clone(came), at, at+1))
			same("a member without weight", without(came, at))
		}
		for _, factor := range []uint32{2, 7, 4096} {
			same(fmt.Sprintf("weights times %d", factor), backends(100, func(i int) uint32 { return factor * weight(i) }))
		}
	}
}

func TestBuildRingEvenWithinOne(t *testing.T) {
	for _, size := range []uint32{1009, 65537} {
		for _, count := range []int{1, 2, 3, 7, 10, 64, 99, 100, 655, 1000} {
			for _, weight := range []uint32{1, 3, math.MaxUint32} {
				members := backends(count, func(int) uint32 { return weight })
				slots := slotsOf(mustRing(t, size, members), members)
				if slices.Max(slots)-slices.Min(slots) > 1 {
					t.Errorf("%d slots, %d members of weight %d: from %d to %d slots each",
						size, count, weight, slices.Min(slots), slices.Max(slots))
				}
			}
		}
	}
}

func TestBuildRingProportional(t *testing.T) {
	const size = 65537
	random := rand.New(rand.NewPCG(7, 8))
	sets := map[string][]Member{
		"one heavy among many": backends(600, func(i int) uint32 { return uint32(max(1, 600-600*i)) }),
		"one canary":           backends(10, func(i int) uint32 { return uint32(min(1+100*i, 100)) }),
	}
	for range 60 {
		count, most := 2+random.IntN(500), 1+random.Uint32N(1000)
		sets[fmt.Sprintf("%d up to %d", count, most)] = backends(count, func(int) uint32 { return 1 + random.Uint32N(most) })
	}
	for name, members := range sets {
		slots := slotsOf(mustRing(t, size, members), members)
		total := 0.0
		for _, member := range members {
			total += float64(member.Weight)
		}
		// One pace for all: no member's turn was due before one that another has had.
		had, due, worst := 0.0, math.Inf(1), 0.0
		for i, member := range members {
			weight, count := float64(member.Weight), float64(slots[i])
			had, due = max(had, (count-1)/weight), min(due, (count+1)/weight)
			// Phases round each member's share up or down at random, which moves the common pace by less than the square
			// root of their number.
			share := size * weight / total
			off := math.Abs(count - share)
			if bound := 1 + math.Sqrt(float64(len(members)))*weight/total; off > bound {
				t.Errorf("%s: %v has %v slots, its share is %.2f", name, member, count, share)
			}
			worst = max(worst, off)
		}
		if had >= due {
			t.Errorf("%s: a member got its slot at %v, before another that was due at %v", name, had, due)
		}
		t.Logf("%s: at most %.2f slots from the share", name, worst)
	}
}

// A backend that is up and has weight answers somebody, however small its share.
func TestBuildRingAtLeastOneSlot(t *testing.T) {
	members := backends(50, func(i int) uint32 { return uint32(max(1, 1_000_000_000*(1-i))) })
	for i, count := range slotsOf(mustRing(t, 65537, members), members)[1:] {
		if count != 1 {
			t.Errorf("%v has %d slots beside a member of weight 1000000000, want 1", members[i+1], count)
		}
	}
}

// moved counts, among the slots of before that keep accepts, those which another member answers after.
func moved(before, after []int32, keep func(member int32) bool) (moved, of int) {
	for slot, member := range before {
		if keep(member) {
			of++
			if after[slot] != member {
				moved++
			}
		}
	}
	return moved, of
}

// When one member leaves, its slots must move. Of the others' some move too, in Maglev's nature; they are to be few.
func TestBuildRingDisruption(t *testing.T) {
	const size = 65537
	t.Log("one member of so many leaves a ring of 65537: share of the remaining members' slots that changes hands")
	t.Log("weights  members    mean     most")
	for _, weights := range []struct {
		name  string
		of    func(int) uint32
		bound map[int]float64
	}{
		{"even  ", even, map[int]float64{3: 0.001, 10: 0.01, 100: 0.01, 1000: 0.01}},
		{"uneven", uneven, map[int]float64{3: 0.001, 10: 0.01, 100: 0.012, 1000: 0.015}},
	} {
		for _, count := range []int{3, 10, 100, 1000} {
			members := backends(count, weights.of)
			before := mustRing(t, size, members)
			sum, most, runs := 0.0, 0.0, min(count, 20)
			for run := range runs {
				gone := run * count / runs
				after := mustRing(t, size, without(members, gone))
				changed, of := moved(before, after, func(member int32) bool { return int(member) != gone })
				share := float64(changed) / float64(of)
				sum, most = sum+share, max(most, share)
			}
			t.Logf("%s   %7d  %5.2f %%  %5.2f %%", weights.name, count, 100*sum/float64(runs), 100*most)
			if bound := weights.bound[count]; most > bound {
				t.Errorf("%s, %d members: %.2f %% move, want at most %.2f %%", weights.name, count, 100*most, 100*bound)
			}
		}
	}
}

// When one member's weight changes, slots must move to or from it; between two others they are to move rarely.
func TestBuildRingWeightChange(t *testing.T) {
	const size = 65537
	t.Log("one member's weight changes in a ring of 65537: share of slots that must move, and that moves between others")
	t.Log("members  weight    must   others")
	for _, count := range []int{3, 10, 100, 1000} {
		for _, weight := range []uint32{99, 90, 50, 110, 200} {
			members := backends(count, func(int) uint32 { return 100 })
			before := mustRing(t, size, members)
			const changed = 1
			members[changed].Weight = weight
			after := mustRing(t, size, members)
			must, between := 0, 0
			for slot, member := range before {
				switch {
				case member == after[slot]:
				case member == changed || after[slot] == changed:
					must++
				default:
					between++
				}
			}
			t.Logf("%7d  100→%-3d  %5.2f %%  %5.2f %%", count, weight, 100*float64(must)/size, 100*float64(between)/size)
			if share := float64(between) / size; share > 0.01 {
				t.Errorf("%d members, weight 100 to %d: %.2f %% move between others", count, weight, 100*share)
			}
		}
	}
}

// The two experiments of the Maglev paper's section 5.3, with its 1000 backends and its two sizes, beside what its text
// says of them. Its figures 11 and 12 are drawn, without numbers for Maglev itself, so only their direction is compared.
func TestBuildRingBesidePaper(t *testing.T) {
	members := backends(1000, even)
	random := rand.New(rand.NewPCG(2016, 523))
	t.Log("paper, 5.3: Maglev balances almost perfectly at either size; to carry the imbalance of Karger's and of")
	t.Log("rendezvous hashing, backends need 29.7 % and 49.5 % more at 65537 slots, 10.3 % and 12.3 % more at 655373.")
	t.Log("paper, 5.3: more entries change the more backends fail at once, and fewer in a larger table.")
	t.Log("   size  failed  entries changed  of them unavoidable  of the remaining members'")
	last := make(map[int]float64)
	for _, table := range []struct {
		size uint32
		runs int
	}{{65537, 10}, {655373, 2}} {
		before := mustRing(t, table.size, members)
		slots := slotsOf(before, members)
		over := float64(slices.Max(slots))*float64(len(members))/float64(table.size) - 1
		t.Logf("%7d  fullest backend %.2f %% above the mean, emptiest and fullest differ by %d slot",
			table.size, 100*over, slices.Max(slots)-slices.Min(slots))
		if over > 0.01 {
			t.Errorf("%d slots: the fullest backend is %.2f %% above the mean", table.size, 100*over)
		}
		fewer := 0.0
		for _, failed := range []int{1, 5, 10, 20, 50} {
			all, unavoidable, remaining := 0.0, 0.0, 0.0
			for range table.runs {
				gone := random.Perm(len(members))[:failed]
				left := without(members, gone...)
				after := mustRing(t, table.size, left)
				changed, of := moved(before, after, func(member int32) bool { return left[member].Weight > 0 })
				lost := int(table.size) - of
				all += float64(changed+lost) / float64(table.size) / float64(table.runs)
				unavoidable += float64(lost) / float64(table.size) / float64(table.runs)
				remaining += float64(changed) / float64(of) / float64(table.runs)
			}
			t.Logf("%7d  %4.1f %%  %13.2f %%  %17.2f %%  %23.2f %%", table.size,
				100*float64(failed)/float64(len(members)), 100*all, 100*unavoidable, 100*remaining)
			if all < fewer {
				t.Errorf("%d slots: fewer entries change as %d backends fail than before", table.size, failed)
			}
			if bound := 0.01 + 2*float64(failed)/float64(len(members)); remaining > bound {
				t.Errorf("%d slots, %d failed: %.2f %% of the remaining members' slots move", table.size, failed, 100*remaining)
			}
			if smaller, ok := last[failed]; ok && remaining > smaller {
				t.Errorf("%d failed: more moves in the larger ring", failed)
			}
			fewer, last[failed] = all, remaining
		}
	}
}

func TestIsPrime(t *testing.T) {
	sieve := make([]bool, 100_000) // true: composite
	for n := uint32(2); n < uint32(len(sieve)); n++ {
		for multiple := 2 * n; multiple < uint32(len(sieve)); multiple += n {
			sieve[multiple] = true
		}
	}
	for n := range uint32(len(sieve)) {
		if want := n >= 2 && !sieve[n]; IsPrime(n) != want {
			t.Errorf("IsPrime(%d) is %v", n, !want)
		}
	}
	for n, want := range map[uint32]bool{
		655373: true, math.MaxInt32: true, 4294967291: true, math.MaxUint32: false, 65521 * 65521: false, 65536: false,
	} {
		if IsPrime(n) != want {
			t.Errorf("IsPrime(%d) is %v", n, !want)
		}
	}
}

func BenchmarkBuildRing(b *testing.B) {
	for _, count := range []int{3, 100, 1000} {
		for name, weight := range map[string]func(int) uint32{
			"even": even, "uneven": uneven, "all-different": func(i int) uint32 { return uint32(i + 1) },
		} {
			members := backends(count, weight)
			b.Run(fmt.Sprintf("%d-%s", count, name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					mustRing(b, 65537, members)
				}
			})
		}
	}
}
