package maps

import (
	"fmt"
	"strings"

	"fairlead/bpf"
)

// Health is what checks say of a backend, numbered as in the data plane's maps.
type Health uint8

// What checks say. HealthHeld is down, and held there because it has flapped.
const (
	HealthNone    = Health(bpf.FairleadHealthHEALTH_NONE) // not checked
	HealthUnknown = Health(bpf.FairleadHealthHEALTH_UNKNOWN)
	HealthUp      = Health(bpf.FairleadHealthHEALTH_UP)
	HealthDown    = Health(bpf.FairleadHealthHEALTH_DOWN)
	HealthHeld    = Health(bpf.FairleadHealthHEALTH_HELD)
)

func (h Health) String() string {
	names := [...]string{"none", "unknown", "up", "down", "held"}
	if int(h) < len(names) {
		return names[h]
	}
	return fmt.Sprintf("health %d", uint8(h))
}

// Orders say why a backend has not the weight, or not the connections, that the configuration and its checks alone
// would give it: bits of bpf's order.
type Orders uint32

// The bits of Orders.
const (
	OrderDrain       = Orders(bpf.FairleadOrderORDER_DRAIN)        // by command
	OrderWeight      = Orders(bpf.FairleadOrderORDER_WEIGHT)       // by command
	OrderDisabled    = Orders(bpf.FairleadOrderORDER_DISABLED)     // by configuration
	OrderCheckDrain  = Orders(bpf.FairleadOrderORDER_CHECK_DRAIN)  // by its check's answer
	OrderCheckMaint  = Orders(bpf.FairleadOrderORDER_CHECK_MAINT)  // by its check's answer
	OrderCheckWeight = Orders(bpf.FairleadOrderORDER_CHECK_WEIGHT) // by its check's answer
	OrderSlowStart   = Orders(bpf.FairleadOrderORDER_SLOW_START)
)

// Names are the names of the bits that are set.
func (o Orders) Names() []string {
	return flagNames(uint32(o), "drain", "weight", "disabled", "check_drain", "check_maint", "check_weight", "slow_start")
}

// Standing is what a service makes of its backends' checks: bits of bpf's standing.
type Standing uint32

// The bits of a Standing.
const (
	StandingAllDown = Standing(bpf.FairleadStandingSTANDING_ALL_DOWN) // all are down
	StandingPanic   = Standing(bpf.FairleadStandingSTANDING_PANIC)    // so few are up that the checks' verdict is off
)

func (s Standing) String() string {
	return strings.Join(flagNames(uint32(s), "all_down", "panic"), ", ")
}

// sentence tells people what holds now.
func (s Standing) sentence() string {
	switch {
	case s&StandingPanic != 0:
		return "panic: too few backends are up, so the checks' verdict is off"
	case s&StandingAllDown != 0:
		return "all backends are down"
	}
	return "enough backends are up"
}
