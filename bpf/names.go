package bpf

import (
	"fmt"
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"
)

// The names of verdicts and events are read from the object's own type information: the C's enums are their one source.
var enumNames = sync.OnceValues(func() (map[string][]string, error) {
	spec, err := LoadFairlead()
	if err != nil {
		return nil, err
	}
	names := make(map[string][]string)
	for _, enum := range []string{"verdict", "event"} {
		var t *btf.Enum
		if err := spec.Types.TypeByName(enum, &t); err != nil {
			return nil, fmt.Errorf("find enum %s in the object: %w", enum, err)
		}
		for _, v := range t.Values {
			if strings.HasSuffix(v.Name, "_COUNT") {
				continue
			}
			names[enum] = append(names[enum], strings.ToLower(strings.TrimPrefix(v.Name, "EVENT_")))
		}
	}
	return names, nil
})

func names(enum string) []string {
	all, err := enumNames()
	if err != nil {
		// The object is part of this binary: it can only be wrong in every run, and tests run it.
		panic(err)
	}
	return all[enum]
}

// VerdictNames are the names of all verdicts by number: `forward_ring`, `drop_ttl` and so on.
func VerdictNames() []string { return names("verdict") }

// EventNames are the names of all events by number: `confirmed`, `port_stolen` and so on.
func EventNames() []string { return names("event") }
