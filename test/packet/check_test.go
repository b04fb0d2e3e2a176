package packet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"fairlead/bpf"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const (
	checkPort     = 61234 // that the daemon's checks come from
	checkFrameMax = int(bpf.FairleadLimitsCHECK_FRAME_MAX)
)

// taken is a frame that the daemon got.
type taken struct {
	Ifindex, Length uint32
	Data            []byte
}

// handed reads what the daemon would get, to the last.
func (p *dataplane) handed() (all []taken) {
	p.Helper()
	reader, err := ringbuf.NewReader(p.CheckFrames)
	p.must(err)
	defer reader.Close()
	reader.SetDeadline(time.Now().Add(-time.Second)) // what is there is there
	for {
		record, err := reader.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all
		}
		p.must(err)
		ifindex, length := binary.NativeEndian.Uint32(record.RawSample), binary.NativeEndian.Uint32(record.RawSample[4:])
		frame := record.RawSample[8:]
		if len(frame) < checkFrameMax {
			p.Fatalf("a record of %d bytes", len(record.RawSample))
		}
		all = append(all, taken{ifindex, length, bytes.Clone(frame[:min(int(length), checkFrameMax)])})
	}
}

// probe is a client's connection from an address of the edge's own, by a port of checks.
func (s *scene) probe() *conversation {
	s.Helper()
	s.flagPorts(bpf.FairleadPortFlagPORT_CHECK, checkPort, checkPort)
	s.flagAddress(s.family.source, bpf.FairleadAddressFlagADDRESS_CHECK)
	c := s.clientAt(netip.AddrPortFrom(s.family.source, checkPort))
	c.backend = 1
	return c
}

// direct is what a backend that holds the service's address sends a client itself.
func (c *conversation) direct(flags uint8, payload string) segment {
	return c.answer(flags, payload).between(c.scene.service.address, c.client)
}

// arrives gives a frame to the data plane, with a verdict that leaves it alone, and checks what the daemon gets.
func (c *conversation) arrives(frame []byte, from device, v verdict, want ...taken) {
	c.Helper()
	action, out := c.run(c.Fairlead, frame, from)
	c.check(frame, from, action, out, expectation{verdict: v, frame: frame})
	if diff := cmp.Diff(want, c.handed()); diff != "" {
		c.Errorf("frames that the daemon gets (-want +got):\n%s", diff)
	}
}

// What a backend answers to a check through its method comes whole to the daemon, and goes no further.
func TestCheckAnswers(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		eachProtocol(t, plan{twoArms: true}, func(t *testing.T, p plan) {
			s := newScene(t, f, method, p)
			c := s.probe()
			for i, v := range variants(f) {
				data := c.direct(ack, "alive")
				v.make(&data)
				data.tags = taggings[i%len(taggings)].in
				frame := data.bytes()
				for _, from := range []device{theKernel.front, theKernel.back} {
					c.arrives(frame, from, passCheck, taken{uint32(from.index), uint32(len(frame)), frame[:min(len(frame), checkFrameMax)]})
				}
			}
			for _, flags := range []uint8{syn | ack, rst, rst | ack, fin | ack, 0} {
				segment := c.direct(flags, "")
				if flags == 0 { // a check may ask another port of the service's address, by another protocol
					segment = segment.between(netip.AddrPortFrom(f.service.Addr(), f.service.Port()+1), c.client)
					segment.udp = !p.udp
				}
				frame := segment.bytes()
				c.arrives(frame, theKernel.back, passCheck, taken{uint32(theKernel.back.index), uint32(len(frame)), frame})
			}
			// As far as it goes: whether a frame is sound is for the daemon to judge.
			data := c.direct(ack, "alive")
			frame := data.bytes()[:data.transportOffset()+4]
			c.arrives(frame, theKernel.back, passCheck, taken{uint32(theKernel.back.index), uint32(len(frame)), frame})
			c.arrives(frame[:len(frame)-1], theKernel.back, passNotOurs)

			// Two wait for the daemon in their order.
			first, second := c.direct(ack, "one").bytes(), c.direct(ack, "one and two").bytes()
			s.run(s.Fairlead, first, theKernel.front)
			s.want.Verdicts[passCheck]++
			at := uint32(theKernel.front.index)
			c.arrives(second, theKernel.front, passCheck, taken{at, uint32(len(first)), first}, taken{at, uint32(len(second)), second})
		})
	})
}

// Of a frame longer than what the daemon has room for it gets the beginning, and how long it was; also of one that lies in
// several buffers.
func TestCheckLong(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, dsr, p)
			c := s.probe()
			data := c.direct(ack, "")
			for _, length := range []int{checkFrameMax - 1, checkFrameMax, checkFrameMax + 1, 2 * checkFrameMax, 2*checkFrameMax + 1, 9000} {
				frame := data.asLong(length - ethernetHeader).bytes()
				if len(frame) != length {
					t.Fatalf("a frame of %d bytes, want %d", len(frame), length)
				}
				c.arrives(frame, theKernel.front, passCheck,
					taken{uint32(theKernel.front.index), uint32(length), frame[:min(length, checkFrameMax)]})
			}
		})
	})
}

// What the daemon has no room for is lost, as on a wire; once there is room again, frames come again.
func TestCheckFull(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, ipip, plan{})
		c := s.probe()
		const record = 8 + 8 + int(bpf.FairleadLimitsCHECK_FRAME_MAX) // the kernel's header, ours
		room := (int(bpf.FairleadLimitsCHECK_RING_BYTES) - 1) / record
		if room < 100 {
			t.Fatalf("room for %d frames", room)
		}
		var sent []taken
		for range room + 20 {
			frame := c.direct(ack, "alive").bytes()
			action, _ := s.run(s.Fairlead, frame, c.from)
			if action != xdpDrop {
				t.Fatalf("frame %d: action %d, want %d", len(sent), action, xdpDrop)
			}
			s.want.Verdicts[passCheck]++
			sent = append(sent, taken{uint32(c.from.index), uint32(len(frame)), frame})
		}
		s.checkCounters("a full ring")
		if diff := cmp.Diff(sent[:room], s.handed()); diff != "" {
			t.Errorf("frames that the daemon gets (-want +got):\n%s", diff)
		}
		frame := c.direct(ack, "alive").bytes()
		c.arrives(frame, c.from, passCheck, taken{uint32(c.from.index), uint32(len(frame)), frame})
	})
}

// Anyone else's packets to such a port go their way: from another address than a service's, to another port, and to
// clients, whose ports are their own choice.
func TestCheckStrangers(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, method, p)
			c := s.probe()
			data := c.direct(ack, "what?")
			for name, frame := range map[string]segment{
				"another address":      data.between(netip.AddrPortFrom(plus(f.service.Addr(), 1), f.service.Port()), c.client),
				"to another port":      data.between(f.service, netip.AddrPortFrom(c.client.Addr(), checkPort+1)),
				"to a client":          data.between(f.service, netip.AddrPortFrom(f.client, checkPort)),
				"from the port itself": data.between(c.client, f.service).between(netip.AddrPortFrom(f.client, checkPort), c.client),
			} {
				t.Run(name, func(t *testing.T) {
					s.in(t)
					c.arrives(frame.bytes(), theKernel.front, passNotOurs)
				})
				s.in(t)
			}
			later := data
			later.offset, later.df = 3, false
			if f.name == "ipv6" {
				later.extensions = []extension{{unix.IPPROTO_FRAGMENT, []byte{0, 0, 8, 0, 0, 0, 1}}}
			}
			c.arrives(later.bytes(), theKernel.front, bpf.FairleadVerdictPASS_FRAGMENT)

			// To a service's port a client's packet is a client's, whatever else that port is for.
			s.flagPorts(bpf.FairleadPortFlagPORT_CHECK, f.service.Port(), f.service.Port())
			d := s.clientAt(netip.AddrPortFrom(f.client, checkPort)).open()
			self := s.clientAt(f.service)
			self.send(self.segment(syn, ""), forwardNew)
			if got := s.handed(); got != nil {
				t.Errorf("the daemon gets %v", got)
			}
			if rewrites(method) {
				// And what backends send of connections comes to their clients, be it from a port of the same number.
				s.flagPorts(bpf.FairleadPortFlagPORT_CHECK, d.source.Port(), d.source.Port())
				d.reply(d.answer(ack, "data"), replyTable)
				if got := s.handed(); got != nil {
					t.Errorf("the daemon gets %v", got)
				}
			}
		})
	})
}

// Where no check goes through its method, its code is not there.
func TestChecksOff(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		s := newScene(t, f, dsr, plan{settings: []setting{constant("use_checks", uint8(0))}})
		c := s.probe()
		c.arrives(c.direct(ack, "alive").bytes(), theKernel.back, passNotOurs)
		with := newScene(t, f, dsr, plan{})
		if off, on := length(t, s.Fairlead), length(t, with.Fairlead); off >= on {
			t.Errorf("the program has %d bytes without checks, %d with them", off, on)
		}
		// At an address of a fullnat source, and by nat, replies find their way as ever.
		for _, method := range []bpf.FairleadMethod{fullnat, nat} {
			s := newScene(t, f, method, plan{settings: []setting{constant("use_checks", uint8(0))}})
			s.probe()
			c := s.newClient().open()
			c.reply(c.answer(ack, "data"), replyTable)
		}
	})
}

// length is a program's as the kernel runs it, what can't be reached cut out.
func length(t *testing.T, program *ebpf.Program) int {
	t.Helper()
	info, err := program.Info()
	if err != nil {
		t.Fatal(err)
	}
	size, err := info.TranslatedSize()
	if err != nil {
		t.Fatal(err)
	}
	return size
}
