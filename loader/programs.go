package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead/bpf"
)

// Maps whose size the configuration sets.
var (
	connectionMaps = []string{bpf.FairleadMapConnections4, bpf.FairleadMapConnections6,
		bpf.FairleadMapReplies4, bpf.FairleadMapReplies6}
	halfOpenMaps = []string{bpf.FairleadMapHalfOpen4, bpf.FairleadMapHalfOpen6,
		bpf.FairleadMapHalfReplies4, bpf.FairleadMapHalfReplies6}
)

// pinsByName says whether a map of the collection is pinned: all but the sections of constants, which have a dot.
func pinsByName(name string) bool { return !strings.HasPrefix(name, ".") }

// load loads the collection with these constants on top of the maps that are there. It returns the settings in force:
// those wanted, with the sizes of the maps that were adopted.
func load(s Settings, present map[string]*ebpf.Map, log *slog.Logger) (*ebpf.Collection, Settings, error) {
	spec, err := bpf.LoadFairlead()
	if err != nil {
		return nil, s, fmt.Errorf("read the compiled programs: %w", err)
	}
	s.Connections = size(spec, connectionMaps, s.Connections, present, log)
	s.HalfOpen = size(spec, halfOpenMaps, s.HalfOpen, present, log)
	for name, m := range spec.Maps {
		// Pins are made by Attach, once everything else has succeeded.
		m.Pinning = ebpf.PinNone
		if there := present[name]; there != nil {
			if err := m.Compatible(there); err != nil {
				return nil, s, &SchemaError{What: fmt.Sprintf("map %s: %s", name, err)}
			}
		}
	}
	for name, value := range map[string]any{
		bpf.FairleadVarUseIpv4:            truth(s.IPv4),
		bpf.FairleadVarUseIpv6:            truth(s.IPv6),
		bpf.FairleadVarUseFullnat:         truth(s.FullNAT),
		bpf.FairleadVarUseNat:             truth(s.NAT),
		bpf.FairleadVarUseDsr:             truth(s.DSR),
		bpf.FairleadVarUseTunnel:          truth(s.Tunnel),
		bpf.FairleadVarUseTcp:             truth(s.TCP),
		bpf.FairleadVarUseUdp:             truth(s.UDP),
		bpf.FairleadVarUseAffinityClient:  truth(s.AffinityClient),
		bpf.FairleadVarUseChecks:          truth(s.Checks),
		bpf.FairleadVarUseJournal:         truth(s.Journal),
		bpf.FairleadVarConnectionCapacity: s.Connections,
		// As many may be young as a flood may take, without displacing what is proven alive.
		bpf.FairleadVarYoungBudget: max(s.Connections/8, 1),
	} {
		variable := spec.Variables[name]
		if variable == nil {
			return nil, s, fmt.Errorf("the compiled programs have no constant %s", name)
		}
		if err := variable.Set(value); err != nil {
			return nil, s, fmt.Errorf("set constant %s: %w", name, err)
		}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: present})
	if err != nil {
		return nil, s, &loadError{err, missingCapabilities()}
	}
	return collection, s, nil
}

// size sets the sizes of these tables: of one that is there, its own; else the wanted one; else what was compiled in.
// It returns the size that all of them have room for.
func size(spec *ebpf.CollectionSpec, names []string, want uint32, present map[string]*ebpf.Map,
	log *slog.Logger) uint32 {
	var kept []string
	room := uint32(0)
	for _, name := range names {
		m := spec.Maps[name]
		if want != 0 {
			m.MaxEntries = want
		}
		if there := present[name]; there != nil && there.MaxEntries() != m.MaxEntries {
			kept = append(kept, name)
			m.MaxEntries = there.MaxEntries()
		}
		if room == 0 || m.MaxEntries < room {
			room = m.MaxEntries
		}
	}
	if len(kept) > 0 && want != 0 {
		slices.Sort(kept)
		log.Warn("the pinned tables keep their size; to change it, unload and start again: connections come back from the state directory",
			"maps", strings.Join(kept, " "), "size", room, "wanted", want)
	}
	return room
}

func truth(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// loadError tells a failed load whole: a refusal by the verifier with its log, and which capabilities are missing. Their
// lack shows in many ways (without CAP_PERFMON the verifier takes offence at harmless instructions).
type loadError struct {
	cause   error
	missing []string
}

func (e *loadError) Unwrap() error { return e.cause }

func (e *loadError) Error() string {
	text := e.cause.Error()
	var verifier *ebpf.VerifierError
	if errors.As(e.cause, &verifier) {
		text = fmt.Sprintf("%s%+v", strings.TrimSuffix(text, verifier.Error()), verifier)
	}
	switch {
	case len(e.missing) > 0:
		text = fmt.Sprintf("%s missing: %s: %s", strings.Join(e.missing, ", "), privilegeAdvice, text)
	case errors.Is(e.cause, unix.EPERM):
		text += ": " + forbiddenAdvice
	}
	return "load the programs: " + text
}

// ErrSchema is matched by the errors that say that pinned state was made by another version of Fairlead.
var ErrSchema = errors.New("pinned state of another version")

// SchemaError says what of the pinned state this version can't adopt. It matches ErrSchema.
type SchemaError struct{ What string }

func (e *SchemaError) Is(target error) bool { return target == ErrSchema }

func (e *SchemaError) Error() string {
	return fmt.Sprintf("adopt pinned state: %s: another version of fairlead made it: run that one, or `fairlead unload` "+
		"first, which forgets the connections noted there", e.What)
}
