package maps

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"
)

// Member is one backend as the ring sees it. Its name alone chooses its preferences among the slots, its weight how many
// slots it gets; a member of weight 0 gets none.
type Member struct {
	Name   string
	Weight uint32
}

// BuildRing makes a service's ring: for each of size slots the index into members of the backend that answers it, or -1
// in every slot when no member has weight.
//
// The ring is Maglev's (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section
// 3.4): each member has its own permutation of the slots, and the members take turns, each taking the first slot of its
// permutation that is still free. It follows from names and weights alone, not from the members' order, their addresses
// or the host, so every edge host builds the same ring.
//
// Turns are ordered by a time which depends on nothing but the member whose turn it is: all have their first turn at 0,
// and turn k after it is at (k + phase) / weight, with a phase in [0, 1) from the name. Thus
//   - each member with weight has at least one slot, and otherwise its share of them within about one;
//   - members of equal weight differ by at most one slot;
//   - multiplying all weights by the same factor changes nothing;
//   - when a member comes, goes or changes weight, the turns of the others keep their order, so few other slots move.
//
// It fails if size is not a prime below 2^31, if two members have the same name, or if more members have weight than
// there are slots.
func BuildRing(size uint32, members []Member) ([]int32, error) {
	if size > math.MaxInt32 || !IsPrime(size) {
		return nil, fmt.Errorf("build ring: size %d is not a prime below 2^31; use a prime such as 65537", size)
	}
	walks, err := startWalks(size, members)
	if err != nil {
		return nil, fmt.Errorf("build ring: %w", err)
	}
	ring := ring{slots: make([]int32, size), taken: make([]uint64, size/64+1)}
	if len(walks) == 0 {
		for slot := range ring.slots {
			ring.slots[slot] = -1
		}
		return ring.slots, nil
	}

	free := int(size) - len(walks)
	for i := range walks {
		ring.take(&walks[i])
	}
	for turns := newTurns(walks); free > 0; free-- {
		ring.take(turns.next())
	}
	return ring.slots, nil
}

// IsPrime reports whether n is a prime, as the size of a ring must be: then every skip visits every slot.
func IsPrime(n uint32) bool {
	if n < 4 || n%2 == 0 {
		return n == 2 || n == 3
	}
	for divisor := uint64(3); divisor*divisor <= uint64(n); divisor += 2 {
		if uint64(n)%divisor == 0 {
			return false
		}
	}
	return true
}

// A walk is one member on its way through its permutation of the slots.
type walk struct {
	member int32
	weight uint32
	slot   uint32 // the next it would take
	skip   uint32 // from one to the next, in [1, size)
	phase  uint32 // in units of 2^-32
}

// Seeds of the three hashes of a name: the first 64 bits of the fractions of the square roots of 2, 3 and 5.
const (
	offsetSeed = 0x6a09e667f3bcc908
	skipSeed   = 0xbb67ae8584caa73b
	phaseSeed  = 0x3c6ef372fe94f82b
)

// startWalks puts the members that have weight at the start of their permutations, in the order of their phases. Offset,
// skip and phase are three hashes of the name: FNV-1a, 64 bits, xor a seed, finished by MurmurHash3's fmix64.
func startWalks(size uint32, members []Member) ([]walk, error) {
	names := make(map[string]struct{}, len(members))
	walks := make([]walk, 0, len(members))
	for i, member := range members {
		if _, twice := names[member.Name]; twice {
			return nil, fmt.Errorf("two members are named %q; give each its own name", member.Name)
		}
		names[member.Name] = struct{}{}
		if member.Weight == 0 {
			continue
		}
		name := fnv1a(member.Name)
		walks = append(walks, walk{
			member: int32(i),
			weight: member.Weight,
			slot:   uint32(finish(name^offsetSeed) % uint64(size)),
			skip:   uint32(finish(name^skipSeed)%uint64(size-1)) + 1,
			phase:  uint32(finish(name^phaseSeed) >> 32),
		})
	}
	if len(walks) > int(size) {
		return nil, fmt.Errorf("%d members with weight are more than the %d slots; use a larger ring", len(walks), size)
	}
	slices.SortFunc(walks, func(a, b walk) int {
		return cmp.Or(cmp.Compare(a.phase, b.phase), cmp.Compare(members[a.member].Name, members[b.member].Name))
	})
	return walks, nil
}

func fnv1a(name string) uint64 {
	hash := uint64(0xcbf29ce484222325)
	for i := range len(name) {
		hash = (hash ^ uint64(name[i])) * 0x100000001b3
	}
	return hash
}

// A ring being filled. What is taken is noted in bits, which stay in the nearest cache through the many looks at it.
type ring struct {
	slots []int32
	taken []uint64
}

// take gives the walk's member the first free slot on its way. There must be one.
func (r *ring) take(w *walk) {
	size, slot, skip := uint32(len(r.slots)), w.slot, w.skip
	for r.taken[slot/64]>>(slot%64)&1 != 0 {
		if slot += skip; slot >= size {
			slot -= size
		}
	}
	r.taken[slot/64] |= 1 << (slot % 64)
	r.slots[slot] = w.member
	w.slot = slot
}

// turns is the order of all turns but the first of each member: a heap of groups, that with the earliest turn on top.
type turns []group

// A group is members of the same weight, in the order of their phases: they take turns in rounds.
type group struct {
	walks []walk
	at    int    // whose turn is next
	round uint64 // 1 or more
}

func newTurns(walks []walk) turns {
	slices.SortStableFunc(walks, func(a, b walk) int { return cmp.Compare(b.weight, a.weight) })
	var heap turns
	for start, end := 0, 1; end <= len(walks); end++ {
		if end == len(walks) || walks[end].weight != walks[start].weight {
			heap = append(heap, group{walks: walks[start:end], round: 1})
			start = end
		}
	}
	for i := len(heap) / 2; i >= 0; i-- {
		heap.sift(i)
	}
	return heap
}

// next returns who has the next turn and moves its group on.
func (t turns) next() *walk {
	top := &t[0]
	w := &top.walks[top.at]
	if top.at++; top.at == len(top.walks) {
		top.at = 0
		top.round++
	}
	t.sift(0)
	return w
}

func (t turns) sift(i int) {
	for {
		first := i
		for child := 2*i + 1; child <= 2*i+2 && child < len(t); child++ {
			if t[child].before(&t[first]) {
				first = child
			}
		}
		if first == i {
			return
		}
		t[i], t[first] = t[first], t[i]
		i = first
	}
}

// before reports whether g's next turn, at (round + phase) / weight, is before h's. It compares exactly, in 128 bits, so
// that hosts cannot differ by a rounding; of two turns at the same time that of the greater weight is first.
func (g *group) before(h *group) bool {
	a, b := &g.walks[g.at], &h.walks[h.at]
	highA, lowA := bits.Mul64(g.round<<32|uint64(a.phase), uint64(b.weight))
	highB, lowB := bits.Mul64(h.round<<32|uint64(b.phase), uint64(a.weight))
	if highA != highB {
		return highA < highB
	}
	if lowA != lowB {
		return lowA < lowB
	}
	return a.weight > b.weight
}
