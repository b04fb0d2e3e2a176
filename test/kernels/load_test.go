package kernels

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"fairlead/bpf"

	"github.com/cilium/ebpf"
)

const (
	// tableSize stands in for the sizes that a configuration sets: the verifier does not ask for them.
	tableSize = 4096
	// refusalLines is how much of a refusing verifier's log is shown: its end says where and why.
	refusalLines = 60
	// verifierLog is room for the whole log of a refusal, in bytes, so that the kernel is asked for it once.
	verifierLog = 64 << 20
)

// TestLoad: the kernel that runs here takes every program, with everything compiled in and with each part alone: what a
// configuration does not use is cut out as dead code, which the verifier sees as another program.
func TestLoad(t *testing.T) {
	type part struct {
		name    string
		without []string
	}
	parts := []part{{"everything", nil}, {"everything but udp", []string{bpf.FairleadVarUseUdp}}}
	methods := []string{bpf.FairleadVarUseFullnat, bpf.FairleadVarUseNat, bpf.FairleadVarUseDsr, bpf.FairleadVarUseTunnel}
	families := []string{bpf.FairleadVarUseIpv4, bpf.FairleadVarUseIpv6}
	for _, method := range methods {
		for _, family := range families {
			others := func(name string) bool { return name == method || name == family }
			without := slices.DeleteFunc(slices.Concat(methods, families), others)
			parts = append(parts, part{
				name: strings.TrimPrefix(method, "use_") + " over " + strings.TrimPrefix(family, "use_"),
				// The one combination of the rest that most configurations have.
				without: append(without, bpf.FairleadVarUseUdp, bpf.FairleadVarUseAffinityClient),
			})
		}
	}
	for _, part := range parts {
		t.Run(part.name, func(t *testing.T) {
			spec, err := bpf.LoadFairlead()
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range part.without {
				if err := spec.Variables[name].Set(uint8(0)); err != nil {
					t.Fatalf("set constant %s: %v", name, err)
				}
			}
			for _, m := range spec.Maps {
				m.Pinning = ebpf.PinNone
				m.MaxEntries = min(m.MaxEntries, tableSize)
			}
			var verified []string
			for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
				instructions, err := load(spec, name)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					continue
				}
				verified = append(verified, fmt.Sprintf("%s %d", name, instructions))
			}
			t.Logf("%s%s", verifiedPrefix, strings.Join(verified, ", "))
		})
	}
}

// TestLoadDecap is the same for the backends' program.
func TestLoadDecap(t *testing.T) {
	for sources := range uint8(2) {
		t.Run(fmt.Sprintf("sources %d", sources), func(t *testing.T) {
			spec, err := bpf.LoadDecap()
			if err != nil {
				t.Fatal(err)
			}
			if err := spec.Variables[bpf.DecapVarUseSources].Set(sources); err != nil {
				t.Fatal(err)
			}
			for _, m := range spec.Maps {
				m.Pinning = ebpf.PinNone
			}
			instructions, err := load(spec, bpf.DecapProgFairleadDecap)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s%s %d", verifiedPrefix, bpf.DecapProgFairleadDecap, instructions)
		})
	}
}

// TestLoadHold is the same for the program that stands in for the data plane until that is attached.
func TestLoadHold(t *testing.T) {
	spec, err := bpf.LoadHold()
	if err != nil {
		t.Fatal(err)
	}
	instructions, err := load(spec, bpf.HoldProgFairleadHold)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s%s %d", verifiedPrefix, bpf.HoldProgFairleadHold, instructions)
}

// load loads one program alone, and says how many instructions the verifier walked through. Of a refusal, the error
// holds the end of the verifier's log.
func load(spec *ebpf.CollectionSpec, name string) (uint32, error) {
	spec = spec.Copy()
	maps.DeleteFunc(spec.Programs, func(other string, _ *ebpf.ProgramSpec) bool { return other != name })
	collection, err := ebpf.NewCollectionWithOptions(spec,
		ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogSizeStart: verifierLog}})
	var refusal *ebpf.VerifierError
	if errors.As(err, &refusal) {
		end := refusal.Log[max(0, len(refusal.Log)-refusalLines):]
		return 0, fmt.Errorf("refused: %w; the end of %d lines of the verifier's log:\n%s",
			refusal.Cause, len(refusal.Log), strings.Join(end, "\n"))
	}
	if err != nil {
		return 0, err
	}
	defer collection.Close()
	info, err := collection.Programs[name].Info()
	if err != nil {
		return 0, fmt.Errorf("read what the kernel says of it: %w", err)
	}
	instructions, ok := info.VerifiedInstructions()
	if !ok {
		return 0, errors.New("the kernel does not tell how many instructions it verified: 5.16 and newer do")
	}
	return instructions, nil
}
