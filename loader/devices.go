package loader

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// card is what can be known of a device, and of those below it: what XDP on a real card depends on and veth forgives.
type card struct {
	netlink.Link
	name       string
	driver     string // as ethtool names it; empty: it does not tell
	offloads   map[string]offload
	unreadable error // why offloads is nil
	channels   channels
	xdp        xdpSupport
	virtio     string // of a virtio device, the features agreed on with the host: '1' or '0' each
	receiving  int    // of a virtio device, its receive queues, those that only XDP sends by included
	sending    int    // of a virtio device, its transmit queues without those
	peer       *peer  // of a veth; nil: gone, or not to be seen
	below      []*card
	vlans      []string // numbers of the VLAN devices on it
}

// peer is the other end of a veth.
type peer struct {
	name     string
	here     bool // in this network namespace
	program  bool // an XDP program is on it
	channels channels
	offloads map[string]offload // nil, where it is elsewhere
}

// xdpSupport are the features of a driver: enum netdev_xdp_act, linux/netdev.h. Before Linux 6.3 no driver tells.
type xdpSupport struct {
	known bool
	flags uint64
}

const (
	xdpBasic       = 1
	xdpRedirect    = 2
	xdpTarget      = 4 // NDO_XMIT: takes frames redirected to it
	xdpFrags       = 32
	xdpTargetFrags = 64
)

func (x xdpSupport) lacks(flag uint64) bool { return x.known && x.flags&flag == 0 }

// driver is what is known of a driver beyond what kernels tell, from the sources of Linux 6.1 and 6.12.
type driver struct {
	// linear is the highest MTU whose frames fit one of its buffers, with pages of 4096 bytes. 0: a page's.
	linear int
	frags  bool // takes frames of several buffers, in Linux 6.1 already
	target target
	// queueOfCPU: a redirected frame leaves by the queue that has the CPU's number, and is lost where there is none.
	queueOfCPU bool
	// half: XDP takes queues of its own, so that at most half of those that there are may be in use.
	half bool
}

// target says whether a driver takes redirected frames, where the kernel does not.
type target int

const (
	targetUnknown target = iota
	targetAlways
	targetWithProgram // only while an XDP program is on the device itself
	targetNever
)

var drivers = map[string]driver{
	"atlantic":   {frags: true, target: targetAlways},
	"bnxt_en":    {frags: true, target: targetWithProgram},
	"ena":        {linear: 3498, target: targetWithProgram, half: true},
	"funeth":     {target: targetWithProgram},
	"gve":        {linear: 2032, target: targetWithProgram, half: true},
	"i40e":       {linear: 3050, target: targetWithProgram, queueOfCPU: true},
	"ice":        {linear: 3046, target: targetWithProgram},
	"igb":        {linear: 3046, target: targetWithProgram},
	"igc":        {linear: 1500, target: targetAlways},
	"ixgbe":      {linear: 3050, target: targetWithProgram},
	"ixgbevf":    {target: targetNever},
	"mlx4_en":    {linear: 3498, target: targetNever},
	"mlx5_core":  {frags: true, target: targetAlways, queueOfCPU: true},
	"mvneta":     {frags: true, target: targetAlways},
	"nfp":        {target: targetNever},
	"nicvf":      {linear: 1508, target: targetNever},
	"qede":       {target: targetAlways},
	"rvu_nicpf":  {linear: 1508, target: targetWithProgram},
	"sfc":        {target: targetAlways},
	"tun":        {target: targetAlways},
	"veth":       {frags: true},
	"virtio_net": {linear: 3506, target: targetWithProgram},
	"vmxnet3":    {linear: 3494, target: targetWithProgram},
}

// linearMTU is what a page leaves for a frame: headroom before it, struct skb_shared_info behind it.
var linearMTU = os.Getpagesize() - 256 - 320 - 14

// linear is the highest MTU that the driver takes without fragments.
func (c *card) linear() int {
	if known := drivers[c.driver].linear; known != 0 && os.Getpagesize() == 4096 {
		return known
	}
	return linearMTU
}

// levels is how deep devices lie above each other at most: a bridge of VLAN devices on a bond has three below it.
const levels = 4

func readCard(device netlink.Link) (*card, error) { return readCardAt(device, levels) }

func readCardAt(device netlink.Link, depth int) (*card, error) {
	name, index := device.Attrs().Name, device.Attrs().Index
	c := &card{Link: device, name: name, xdp: readXDPFeatures(index)}
	c.driver, _ = ethtoolDriver(name)
	c.offloads, c.unreadable = ethtoolOffloads(name)
	c.channels, _ = ethtoolChannels(name)
	if c.driver == "virtio_net" {
		c.readVirtio("/sys/class/net/" + name)
	}
	if device.Type() == "veth" {
		c.peer = readPeer(device)
	}
	if depth == 0 {
		return c, nil
	}
	all, err := listDevices()
	if err != nil {
		return nil, err
	}
	for _, other := range all {
		if vlan, ok := other.(*netlink.Vlan); ok && vlan.ParentIndex == index && vlan.NetNsID == -1 {
			c.vlans = append(c.vlans, strconv.Itoa(vlan.VlanId))
		}
		if !c.isAbove(other) {
			continue
		}
		lower, err := readCardAt(other, depth-1)
		if err != nil {
			return nil, err
		}
		c.below = append(c.below, lower)
	}
	return c, nil
}

// listDevices lists what there is, anew where devices come and go meanwhile.
func listDevices() (all []netlink.Link, err error) {
	for range 10 {
		if all, err = netlink.LinkList(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	return all, nil // of such a crowd, what was seen of it
}

// readVirtio reads what only sysfs tells, if that is of this network namespace: it shows the one it was mounted in.
func (c *card) readVirtio(sysfs string) {
	read := func(file string) string {
		text, _ := os.ReadFile(sysfs + "/" + file)
		return strings.TrimSpace(string(text))
	}
	if read("ifindex") != strconv.Itoa(c.Attrs().Index) || read("address") != c.Attrs().HardwareAddr.String() {
		return
	}
	c.virtio = read("device/features")
	queues, _ := os.ReadDir(sysfs + "/queues")
	for _, q := range queues {
		if strings.HasPrefix(q.Name(), "rx-") {
			c.receiving++
		} else {
			c.sending++
		}
	}
}

// isAbove says whether a device receives by another one.
func (c *card) isAbove(other netlink.Link) bool {
	switch c.Type() {
	case "bond", "bridge", "team":
		return other.Attrs().MasterIndex == c.Attrs().Index
	case "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap":
		return c.Attrs().NetNsID == -1 && other.Attrs().Index == c.Attrs().ParentIndex
	}
	return false
}

// receivers are the devices that packets come in by: the device, or those at the bottom of what lies below it.
func (c *card) receivers() []*card {
	if len(c.below) == 0 {
		return []*card{c}
	}
	var all []*card
	for _, lower := range c.below {
		all = append(all, lower.receivers()...)
	}
	return all
}

func names(cards []*card) string {
	var all []string
	for _, c := range cards {
		all = append(all, c.name)
	}
	return strings.Join(all, ", ")
}

// readPeer looks at the other end of a veth, which may be in another network namespace. It can be asked for its offloads
// only in its own.
func readPeer(device netlink.Link) *peer {
	attrs := device.Attrs()
	far, err := linkIn(attrs.NetNsID, attrs.ParentIndex)
	if err != nil || far.Type() != "veth" || far.Attrs().ParentIndex != attrs.Index {
		return nil
	}
	xdp := far.Attrs().Xdp
	p := &peer{name: far.Attrs().Name, here: attrs.NetNsID == -1, program: xdp != nil && xdp.Attached}
	if p.here {
		p.channels, _ = ethtoolChannels(p.name)
		p.offloads, _ = ethtoolOffloads(p.name)
	}
	return p
}

// linkIn finds a device of another network namespace by the number that this one has for it; -1 is this one.
func linkIn(namespace, index int) (netlink.Link, error) {
	if namespace == -1 {
		return netlink.LinkByIndex(index)
	}
	const targetNamespace = 46 // IFLA_TARGET_NETNSID of linux/if_link.h
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = int32(index)
	request.AddData(message)
	request.AddData(nl.NewRtAttr(targetNamespace, nl.Uint32Attr(uint32(namespace))))
	answers, err := request.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil || len(answers) != 1 {
		return nil, errors.Join(err, errors.New("find a device of another network namespace"))
	}
	return netlink.LinkDeserialize(nil, answers[0])
}

// readXDPFeatures asks the kernel what a device's driver does. Numbers: linux/netdev.h.
func readXDPFeatures(index int) xdpSupport {
	const (
		attrIfindex  = 1
		attrFeatures = 3
	)
	family, err := netlink.GenlFamilyGet("netdev")
	if err != nil {
		return xdpSupport{}
	}
	request := nl.NewNetlinkRequest(int(family.ID), 0)
	request.AddData(genericHeader{1 /* NETDEV_CMD_DEV_GET */, 1 /* version */})
	request.AddData(nl.NewRtAttr(attrIfindex, nl.Uint32Attr(uint32(index))))
	answers, err := request.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil || len(answers) == 0 || len(answers[0]) < nl.SizeofGenlmsg {
		return xdpSupport{}
	}
	attrs, err := nl.ParseRouteAttr(answers[0][nl.SizeofGenlmsg:])
	if err != nil {
		return xdpSupport{}
	}
	for _, attr := range attrs {
		if attr.Attr.Type == attrFeatures && len(attr.Value) >= 8 {
			return xdpSupport{true, nl.NativeEndian().Uint64(attr.Value)}
		}
	}
	return xdpSupport{}
}

// genericHeader is struct genlmsghdr of linux/genetlink.h. (The library's leaves the reserved half of it to chance, and the
// kernel refuses what isn't zero there.)
type genericHeader [4]byte

func (h genericHeader) Len() int          { return len(h) }
func (h genericHeader) Serialize() []byte { return h[:] }

// cpus is one more than the highest CPU of a list such as 0-3,8 in sysfs; 0: it can't be read.
func cpus(list string) int {
	text, err := os.ReadFile("/sys/devices/system/cpu/" + list)
	if err != nil {
		return 0
	}
	numbers := strings.FieldsFunc(string(text), func(r rune) bool { return r < '0' || r > '9' })
	if len(numbers) == 0 {
		return 0
	}
	last, err := strconv.Atoi(numbers[len(numbers)-1])
	if err != nil {
		return 0
	}
	return last + 1
}

func (c *card) takesFrags() bool {
	if c.xdp.known {
		return !c.xdp.lacks(xdpFrags)
	}
	return drivers[c.driver].frags
}

func (c *card) fragsUnknown() bool {
	_, known := drivers[c.driver]
	return !c.xdp.known && !known
}

// agreed says whether a virtio device and its host agreed on a feature (linux/virtio_net.h).
func (c *card) agreed(feature int) bool { return len(c.virtio) > feature && c.virtio[feature] == '1' }

// obstacle is why a driver will refuse native XDP.
type obstacle struct{ what, advice string }

// obstacles are the reasons why attaching native XDP will fail, as far as they can be known before. frags: the program
// takes frames of several buffers.
func (c *card) obstacles(frags bool) []obstacle {
	var all []obstacle
	add := func(advice, what string, args ...any) {
		all = append(all, obstacle{fmt.Sprintf(what, args...), advice})
	}

	if upper := c.upper(); upper != "" {
		add(c.lowerAdvice(), "is a %s, without native xdp", upper)
		return all
	}
	if c.Type() == "bond" {
		return c.bondObstacles(frags)
	}

	known, queues := drivers[c.driver], c.channels.rx+c.channels.combined
	most := c.channels.maxTx + c.channels.maxCombined
	switch {
	case c.driver == "veth" && c.peer != nil && c.peer.channels.tx > c.channels.rx:
		add(fmt.Sprintf("ethtool -L %s rx %d", c.name, c.peer.channels.tx),
			"has %d receive queues, fewer than the %d transmit queues of its peer %s, and veth has no native xdp then",
			c.channels.rx, c.peer.channels.tx, c.peer.name)
	case c.driver == "veth" && c.xdp.lacks(xdpBasic):
		add(fmt.Sprintf("ethtool -L %s rx N, N as many as its peer has for tx", c.name),
			"has fewer receive queues than its peer has transmit queues, and veth has no native xdp then")
	case known.half && queues > 0 && 2*queues > most:
		add(fmt.Sprintf("ethtool -L %s %s", c.name, c.halfOf(most)),
			"uses %d of %d queues, and %s keeps half of them for xdp", queues, most, c.driver)
	case c.xdp.lacks(xdpBasic):
		add("a card whose driver has it is faster", "the driver has no native xdp")
	}
	if most := c.linear(); c.Attrs().MTU > most && !(frags && (c.takesFrags() || c.fragsUnknown())) {
		add(fmt.Sprintf("ip link set dev %s mtu %d", c.name, most),
			"mtu %d is more than native xdp takes without fragments (%d)", c.Attrs().MTU, most)
	}
	const (
		checksums, control, merged, anyLayout, modern = 1, 2, 15, 27, 32
	)
	joins := slices.ContainsFunc([]int{checksums, 7, 8, 9, 10, 54, 55}, c.agreed) // segments of all kinds
	switch {
	case joins && !c.agreed(control):
		add("let the host offer ctrl_guest_offloads, or turn off guest_csum, guest_tso4, guest_tso6, guest_ecn and guest_ufo",
			"the host joins packets and leaves out checksums for this virtio device, and lets nobody turn that off")
	case c.agreed(merged) && !c.agreed(anyLayout) && !c.agreed(modern):
		add("let the host offer a virtio 1.0 device", "is a virtio device of before 1.0, whose headers are in the way of xdp")
	}
	return all
}

// upper says what a device is that only hands on what others receive; empty: none of these. A bond is more than that.
func (c *card) upper() string {
	below := names(c.below)
	if below == "" {
		below = "devices that can't be seen from here"
	}
	switch kind := c.Type(); kind {
	case "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap":
		return kind + " device on " + below
	case "bridge", "team":
		return kind + " of " + below
	}
	return ""
}

// lowerAdvice names the devices to attach to instead.
func (c *card) lowerAdvice() string {
	if len(c.below) == 0 {
		return "attach to the device below it"
	}
	return fmt.Sprintf("attach to what it receives by instead: interfaces: [%s]", names(c.below))
}

func (c *card) halfOf(most uint32) string {
	if c.channels.combined > 0 {
		return fmt.Sprintf("combined %d", most/2)
	}
	return fmt.Sprintf("rx %d tx %d", most/2, most/2)
}

// bondObstacles: a bond passes its program on to its ports, in the modes that it can send redirected frames in.
func (c *card) bondObstacles(frags bool) []obstacle {
	if bond, ok := c.Link.(*netlink.Bond); ok {
		hashes := bond.Mode == netlink.BOND_MODE_802_3AD || bond.Mode == netlink.BOND_MODE_BALANCE_XOR
		switch {
		case bond.Mode == netlink.BOND_MODE_ACTIVE_BACKUP || bond.Mode == netlink.BOND_MODE_BALANCE_RR:
		case !hashes:
			return []obstacle{{fmt.Sprintf("is a bond of mode %s, which has no native xdp", bond.Mode),
				"choose active-backup, balance-rr, balance-xor or 802.3ad, or attach to its ports: " + names(c.below)}}
		case bond.XmitHashPolicy == netlink.BOND_XMIT_HASH_POLICY_VLAN_SRCMAC:
			return []obstacle{{"is a bond that chooses ports by vlan+srcmac, which has no native xdp",
				fmt.Sprintf("ip link set dev %s type bond xmit_hash_policy layer3+4", c.name)}}
		}
	}
	var all []obstacle
	for _, port := range c.below {
		if xdp := port.Attrs().Xdp; xdp != nil && xdp.Attached {
			all = append(all, obstacle{fmt.Sprintf("its port %s has xdp program %d of its own", port.name, xdp.ProgId),
				fmt.Sprintf("attach to the ports instead of the bond, or take that program off: ip link set dev %s xdp off", port.name)})
		}
		if drivers[port.driver].target == targetNever {
			all = append(all, obstacle{fmt.Sprintf("the driver %s of its port %s takes no redirected frames, which a bond needs",
				port.driver, port.name), "attach to the ports instead of the bond: " + names(c.below)})
		}
		for _, o := range port.obstacles(frags) {
			all = append(all, obstacle{"its port " + port.name + ": " + o.what, o.advice})
		}
	}
	return all
}

// unwanted is an offload that is on and keeps packets from XDP as they are on the wire.
type unwanted struct {
	device string
	name   string
	fixed  bool
	why    string
}

// tagFilters let frames with VLAN tags through only where a VLAN device has the tag's number.
var tagFilters = []string{"rx-vlan-filter", "rx-vlan-stag-filter"}

// unwanted are the offloads to be turned off before a program is attached in a mode. tags: VLAN tags are in use.
//
// The kernel itself leaves GRO out on a device that has a generic program, but not on those below it; native programs
// run before GRO.
func (c *card) unwanted(mode XDPMode, tags bool) []unwanted {
	var all []unwanted
	for _, r := range c.receivers() {
		add := func(why string, offloads ...string) {
			for _, name := range offloads {
				if o := r.offloads[name]; o.on {
					all = append(all, unwanted{r.name, name, o.fixed, why})
				}
			}
		}
		const joins = "it joins packets before xdp sees them"
		add(joins, "rx-lro")
		if mode == ModeGeneric {
			add(joins, "rx-gro-hw") // native drivers see to it themselves, or refuse
			if r != c {
				add(fmt.Sprintf("it joins packets before xdp on %s sees them", c.name), "rx-gro", "rx-gro-list",
					"rx-udp-gro-forwarding")
			}
		}
		if tags {
			add("it takes VLAN tags off before xdp sees them", "rx-vlan-hw-parse", "rx-vlan-stag-hw-parse")
			for _, filter := range tagFilters {
				if o := r.offloads[filter]; !o.fixed || len(r.vlans)+len(c.vlans) == 0 {
					add("it drops frames of VLANs that have no VLAN device here", filter)
				}
			}
		}
	}
	return all
}

// advice is what to do where it can't be turned off.
func (u unwanted) advice() string {
	if slices.Contains(tagFilters, u.name) {
		return fmt.Sprintf("add a VLAN device for each tag (ip link add link %s name %s.N type vlan id N), or use another "+
			"interface", u.device, u.device)
	}
	return "use an interface whose driver can turn it off"
}

func (u unwanted) finding(attached bool) Finding {
	switch {
	case u.fixed:
		return Finding{LevelFail, u.device, u.name + " is on and can't be turned off: " + u.why, u.advice()}
	case attached:
		return Finding{LevelWarn, u.device, fmt.Sprintf("%s is on, though a program is attached: %s", u.name, u.why),
			fmt.Sprintf("ethtool -K %s %s off", u.device, u.name)}
	}
	return Finding{LevelOK, u.device, fmt.Sprintf("%s is on and will be turned off: %s", u.name, u.why), ""}
}

// switches read a device's offloads and turn them on and off.
type switches struct {
	read func(device string) (map[string]offload, error)
	turn func(device string, wanted map[string]bool) error
}

// turnOff turns off what is unwanted, reads it back, and refuses by name what stays on. undo puts back what it changed,
// also where it ends with an error.
func turnOff(all []unwanted, s switches) (undo []func() error, err error) {
	byDevice := make(map[string]map[string]bool)
	for _, u := range all {
		if u.fixed {
			return nil, fmt.Errorf("%s of %s is on and can't be turned off: %s: %s", u.name, u.device, u.why, u.advice())
		}
		if byDevice[u.device] == nil {
			byDevice[u.device] = make(map[string]bool)
		}
		byDevice[u.device][u.name] = false
	}
	for _, device := range slices.Sorted(maps.Keys(byDevice)) {
		off, on := byDevice[device], make(map[string]bool)
		for name := range off {
			on[name] = true
		}
		undo = append(undo, func() error { return s.turn(device, on) })
		if err := s.turn(device, off); err != nil {
			return undo, fmt.Errorf("turn off %s: %w", list(off), advised(err))
		}
		now, err := s.read(device)
		if err != nil {
			return undo, fmt.Errorf("read back whether %s are off: %w", list(off), err)
		}
		for _, u := range all {
			if u.device == device && now[u.name].on {
				return undo, fmt.Errorf("%s of %s stays on: the driver doesn't turn it off: %s: %s", u.name, device, u.why,
					u.advice())
			}
		}
	}
	return undo, nil
}

func list(names map[string]bool) string { return strings.Join(slices.Sorted(maps.Keys(names)), ", ") }

// prepare makes a device hand packets to XDP as they are on the wire, before a program is attached in a mode: it turns
// offloads off, and says so. It refuses by name what can't be turned off. They are put back if attaching fails, not when
// the program is detached: others may have relied on it since.
func (l *Loader) prepare(device netlink.Link, mode XDPMode, taken *undo) error {
	c, err := readCard(device)
	if err != nil {
		return err
	}
	for _, r := range c.receivers() {
		if r.unreadable != nil {
			return fmt.Errorf("read the offloads of %s: %w", r.name, r.unreadable)
		}
	}
	all := c.unwanted(mode, l.vlan)
	undo, err := turnOff(all, switches{ethtoolOffloads, ethtoolSwitch})
	for _, step := range undo {
		taken.add(step)
	}
	if err != nil {
		return err
	}
	for _, u := range all {
		l.log.Info("turned an offload off", "interface", u.device, "offload", u.name, "because", u.why,
			"back on", fmt.Sprintf("ethtool -K %s %s on", u.device, u.name))
	}
	return nil
}

// cautions are what works, but loses packets or time, of a device that packets come in by and leave again.
func (c *card) cautions(mode XDPMode, tags, attached bool) []Finding {
	var all []Finding
	warn := func(advice, what string, args ...any) {
		all = append(all, Finding{LevelWarn, c.name, fmt.Sprintf(what, args...), advice})
	}
	for _, filter := range tagFilters {
		if o := c.offloads[filter]; tags && o.on && o.fixed && len(c.vlans) > 0 {
			warn("add a VLAN device for each other tag that is to be taken",
				"%s is on and can't be turned off: frames of other VLANs than %s are dropped", filter, strings.Join(c.vlans, ", "))
		}
	}
	if c.driver == "virtio_net" {
		if what, advice := c.virtioQueues(mode, attached, cpus("possible")); what != "" {
			warn(advice, "%s", what)
		}
		if mode == ModeGeneric && c.agreed(1) {
			warn("let it be native", "the host leaves checksums of its own packets out for this virtio device: generic xdp forwards "+
				"them as they are, and their receivers drop them")
		}
	}
	if p := c.peer; p != nil {
		if mode == ModeNative && !p.program {
			warn("attach an XDP program to "+p.name+" too: one that passes everything will do",
				"its peer %s has no xdp program: frames that leave by the veth they came by are lost", p.name)
		}
		const inPlace = "ethtool -K %s %s off, where it is"
		if p.offloads["tx-checksum-ip-generic"].on {
			warn(fmt.Sprintf(inPlace, p.name, "tx"), "its peer %s leaves checksums out of packets of its own: xdp forwards them as "+
				"they are, and their receivers drop them", p.name)
		}
		if mode == ModeGeneric && p.offloads["tx-tcp-segmentation"].on {
			warn(fmt.Sprintf(inPlace, p.name, "tso"), "its peer %s hands over segments of up to 64 KiB: generic xdp can't redirect "+
				"them", p.name)
		}
		if tags && p.offloads["tx-vlan-hw-insert"].on {
			warn(fmt.Sprintf(inPlace, p.name, "txvlan"), "its peer %s sends VLAN tags beside the frame: xdp doesn't see them", p.name)
		}
	}
	return all
}

// portFindings: who attaches to a port of a bond takes only what comes by that port.
func (c *card) portFindings(interfaces []string) []Finding {
	upper, err := netlink.LinkByIndex(c.Attrs().MasterIndex)
	if err != nil || upper.Type() != "bond" && upper.Type() != "team" {
		return nil
	}
	bond, err := readCard(upper)
	if err != nil || !slices.ContainsFunc(bond.below, func(port *card) bool { return !slices.Contains(interfaces, port.name) }) {
		return nil
	}
	advice := "attach to all of its ports: " + names(bond.below)
	if upper.Type() == "bond" {
		advice = fmt.Sprintf("attach to %s, or to all of its ports: %s", bond.name, names(bond.below))
	}
	return []Finding{{LevelWarn, c.name, fmt.Sprintf("is a port of the %s %s: what comes by its other ports passes by", upper.Type(),
		bond.name), advice}}
}

// virtioQueues: virtio_net sends what XDP sends by queues of its own, one for each CPU that there may be, if the host gave
// that many and the rest of the system leaves them free; else all share those in use, behind locks.
func (c *card) virtioQueues(mode XDPMode, attached bool, cpus int) (what, advice string) {
	in, most := int(c.channels.combined), int(c.channels.maxCombined)
	switch {
	case mode != ModeNative || most == 0 || cpus == 0:
		return "", ""
	case attached && c.receiving-c.sending >= cpus: // the queues of its own are counted there
		return "", ""
	case in+cpus <= most:
		return "", ""
	}
	what = fmt.Sprintf("%d of %d queues are in use, and xdp would take %d more, one a CPU: it shares them, behind locks, which is "+
		"slower", in, most, cpus)
	if most <= cpus {
		return what, fmt.Sprintf("let the host give this device at least %d queues", cpus+1)
	}
	advice = fmt.Sprintf("ethtool -L %s combined %d", c.name, most-cpus)
	if attached {
		advice += ", after `fairlead unload`: they can't be changed under a program"
	}
	return what, advice
}

// egress is a device that frames leave by.
type egress struct {
	*card
	mode     XDPMode // in which a program is on it, or will be; "": none
	attached bool    // it is there
}

// targetFindings say which devices lose frames that XDP redirects to them. Only native XDP asks the device for that.
func targetFindings(devices []egress, cpus int) []Finding {
	var all []Finding
	for _, to := range devices {
		from := slices.ContainsFunc(devices, func(e egress) bool {
			return e.mode == ModeNative && e.Attrs().Index != to.Attrs().Index
		})
		if !from {
			continue
		}
		jumbo := slices.ContainsFunc(devices, func(e egress) bool { return e.Attrs().MTU > linearMTU })
		for _, port := range to.senders() {
			all = append(all, to.finding(port, jumbo, cpus)...)
		}
	}
	return all
}

// senders are the devices that frames redirected to this one leave by.
func (c *card) senders() []*card {
	if c.Type() == "bond" {
		return c.receivers()
	}
	return []*card{c}
}

func (e egress) finding(c *card, jumbo bool, cpus int) []Finding {
	const lost = "takes no redirected frames: what is to leave by it is lost"
	add := func(level Level, what, advice string) []Finding { return []Finding{{level, c.name, what, advice}} }
	known := drivers[c.driver]
	native := e.mode == ModeNative
	attach := fmt.Sprintf("attach to %s too: name it in dataplane.interfaces", e.name)
	switch {
	case c.upper() != "":
		return add(LevelWarn, "is a "+c.upper()+", to which xdp can't redirect: what is to leave by it is lost",
			"let next hops be reached by the device below it")
	case c.Type() == "veth":
		return e.vethFinding(c)
	case c.xdp.known && !c.xdp.lacks(xdpTarget):
	case known.target == targetNever, c.xdp.known && native && e.attached:
		return add(LevelWarn, fmt.Sprintf("its driver %s %s", c.driver, lost), "route by another interface, or set xdp to generic")
	case c.xdp.known && native:
		// Many drivers take frames as soon as the program is there.
	case c.xdp.known:
		return add(LevelWarn, "without a native xdp program of its own, "+lost, attach)
	case known.target == targetAlways, known.target == targetWithProgram && native:
	case known.target == targetWithProgram:
		return add(LevelWarn, fmt.Sprintf("its driver %s takes redirected frames only while a native xdp program is on it: what is "+
			"to leave by it is lost", c.driver), attach)
	default:
		return add(LevelOK, "whether its driver takes redirected frames can't be told (the kernel tells since 6.3)", "")
	}

	var all []Finding
	if n := int(c.channels.combined); known.queueOfCPU && n > 0 && n < cpus {
		advice := fmt.Sprintf("ethtool -L %s combined %d", c.name, cpus)
		if int(c.channels.maxCombined) < cpus {
			advice = fmt.Sprintf("keep the interrupts of the other interfaces on CPUs 0 to %d", n-1)
		}
		all = add(LevelWarn, fmt.Sprintf("has %d queues, fewer than there are CPUs (%d): what CPUs from %d on redirect to it is lost",
			n, cpus, n), advice)
	}
	if jumbo && c.Attrs().MTU > linearMTU && c.xdp.known && !c.xdp.lacks(xdpTarget) && c.xdp.lacks(xdpTargetFrags) {
		all = append(all, add(LevelWarn, fmt.Sprintf("takes no redirected frames of several buffers: those past %d bytes are lost",
			linearMTU), fmt.Sprintf("ip link set dev %s mtu %d", c.name, linearMTU))...)
	}
	return all
}

// vethFinding: a veth takes redirected frames while its peer polls for them: with an XDP program, or with GRO on.
func (e egress) vethFinding(c *card) []Finding {
	name := "its peer"
	if c.peer != nil {
		name = "its peer " + c.peer.name
	}
	advice := fmt.Sprintf("ethtool -K PEER gro on, for %s where that is, or attach an XDP program there", name)
	deaf := Finding{LevelWarn, c.name, "takes no redirected frames, and what is to leave by it is lost, while " + name +
		" has neither an xdp program nor GRO", advice}
	switch p := c.peer; {
	case c.xdp.known && c.xdp.lacks(xdpTarget):
		return []Finding{deaf}
	case c.xdp.known, p != nil && (p.program || p.offloads["rx-gro"].on):
		return nil
	case p != nil && p.offloads != nil:
		return []Finding{deaf}
	}
	return []Finding{{LevelOK, c.name, fmt.Sprintf("whether it takes redirected frames can't be told (the kernel tells since 6.3): "+
		"%s needs an xdp program, or GRO", name), advice}}
}

// SetNeeds says what a new configuration needs of devices: whether VLAN tags are in use, and which devices packets leave
// by. Call it before Replace, where that has changed.
func (l *Loader) SetNeeds(vlan bool, targets []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.vlan, l.targets = vlan, targets
}

// reviewTargets warns of devices that take no redirected frames now that the programs are there: many drivers do only
// since then.
func (l *Loader) reviewTargets(attached []netlink.Link) {
	var devices []egress
	for _, device := range attached {
		now, err := netlink.LinkByIndex(device.Attrs().Index)
		if err != nil {
			continue // it is just going
		}
		if c, err := readCard(now); err == nil {
			devices = append(devices, egress{c, modeOf(now), true})
		}
	}
	for _, name := range l.targets {
		c, err := findCard(name)
		if err == nil && !slices.ContainsFunc(devices, func(e egress) bool { return e.Attrs().Index == c.Attrs().Index }) {
			devices = append(devices, egress{card: c})
		}
	}
	for _, f := range targetFindings(devices, cpus("online")) {
		if f.Level != LevelOK {
			l.log.Warn(f.What, "interface", f.Subject, "advice", f.Advice)
		}
	}
}

// DeviceDrops are a device's own counts of what was lost between XDP and the wire, which no program sees: the kernel's
// rx_dropped and tx_dropped, and those of the driver's that tell of XDP and of drops or errors, by ethtool's names, those of
// several queues added up under one name with * for the queue's number. Some drivers count XDP_DROP there as well, that is
// what the program itself dropped.
func DeviceDrops(device string) (map[string]uint64, error) {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return nil, fmt.Errorf("read the drops of %s: %w", device, err)
	}
	own, err := ethtoolStatistics(device)
	if err != nil {
		return nil, fmt.Errorf("read the drops of %s: %w", device, err)
	}
	drops := dropsOf(own)
	if s := link.Attrs().Statistics; s != nil {
		drops["rx_dropped"], drops["tx_dropped"] = s.RxDropped, s.TxDropped
	}
	return drops, nil
}

var (
	aboutDrops  = regexp.MustCompile(`drop|err|full|abort|invalid|discard`)
	queueNumber = regexp.MustCompile(`[0-9]+`)
)

func dropsOf(statistics map[string]uint64) map[string]uint64 {
	drops := make(map[string]uint64)
	for name, value := range statistics {
		if strings.Contains(name, "xdp") && aboutDrops.MatchString(name) {
			drops[queueNumber.ReplaceAllString(name, "*")] += value
		}
	}
	return drops
}
