package packet

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"fairlead/bpf"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Frames of 9000 bytes lie in several buffers, of which a program has but the first at hand. What the kernel's test run is
// given beyond a page it puts into such ones.

// runSplit runs the program on a frame of which so many bytes stand in the first buffer. False: the kernel's test run
// can't do that.
func (s *scene) runSplit(frame []byte, first int, from device) (action uint32, out []byte, ok bool) {
	s.Helper()
	options := &ebpf.RunOptions{
		Data: frame, DataOut: make([]byte, len(frame)+256),
		Context: xdpMD{DataEnd: uint32(first), IngressIfindex: uint32(from.index)},
	}
	err := theKernel.do(s.cpu, func() (err error) {
		action, err = s.Fairlead.Run(options)
		return err
	})
	if errors.Is(err, unix.EINVAL) {
		return 0, nil, false
	}
	s.must(err)
	return action, options.DataOut, true
}

// jumbo is the IP length of a 9000-byte frame's packet, and then some.
var jumbo = []int{4000, 8000, 8986, 9000}

// What a page holds no longer is forwarded there and back like any other.
func TestBuffers(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			p.mtu, p.twoArms = 9216, true
			s := newScene(t, f, w.method, p)
			s.must(s.Devices.Put(uint32(theKernel.front.index), bpf.FairleadDevice{Mtu: 9000, Mac: edgeMAC}))
			c := s.newClient()
			if p.udp {
				first := c.datagram("").asLong(9000)
				c.send(first, forwardNew)
				c.finishOpening()
			} else {
				c.open()
			}
			s.rebuildExceptions()
			for _, in := range taggings {
				c.tagged(in)
				for _, length := range jumbo {
					c.send(c.long(length), c.settledVerdict())
					if rewrites(w.method) {
						c.reply(c.longAnswer(length), replyTable)
					}
				}
			}
			for _, v := range variants(f) {
				data := c.segment(ack, "")
				v.make(&data)
				data.flags, data.padding = ack, nil
				data = data.asLong(6000)
				if !p.udp {
					c.seq = data.end()
				}
				c.send(data, c.settledVerdict())
			}
			// What pads it stands in the last buffer.
			data := c.long(5000)
			data.padding = []byte("\xff\xfe\xfd")
			c.send(data, c.settledVerdict())
		})
	})
}

// Our own answers cut it short, whatever buffers that takes away: a RST, port unreachable, too big.
func TestBuffersAnswered(t *testing.T) {
	each(t, func(t *testing.T, f family) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, fullnat, plan{udp: p.udp, mtu: 1500, flags: bpf.FairleadServiceFlagSERVICE_LEAVING,
				settings: []setting{constant("answers_a_tick", uint32(1000))}})
			s.service.flags = 0
			s.setService(s.service)
			open := s.newClient().open()
			s.service.flags = bpf.FairleadServiceFlagSERVICE_LEAVING
			s.setService(s.service)
			open.tooBigFor = 1500
			for _, in := range taggings {
				for _, length := range jumbo {
					open.tagged(in)
					open.send(open.long(length), answerTooBig)
					c := s.newClient().tagged(in)
					c.send(c.segment(syn, "").asLong(length), resetLeaving)
					if p.udp {
						continue
					}
					c.send(c.segment(ack, "").asLong(length), resetUnknown)
				}
			}
		})
	})
}

// A frame in several buffers that is shorter than its headers say is truncated as any other.
func TestBuffersTruncated(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, method, plan{udp: p.udp, mtu: 9216})
			c := s.newClient().open()
			s.rebuildExceptions()
			data := c.long(9000)
			frame := data.bytes()
			for _, n := range []int{len(frame) - 1, 8192, 4096, 4000, 3600, 200} {
				c.sendRaw(data, frame[:n], dropTruncated)
			}
			c.send(data, c.settledVerdict())
		})
	})
}

// Wherever the first buffer ends, whole headers in it are enough; with less than that, nothing is forwarded.
func TestBuffersSplit(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		eachProtocol(t, plan{}, func(t *testing.T, p plan) {
			s := newScene(t, f, method, plan{udp: p.udp})
			c := s.newClient().open()
			s.rebuildExceptions()
			data := c.long(2000)
			frame := data.bytes()
			header := 20
			if p.udp {
				header = 8
			}
			for first := ethernetHeader; first < 120; first++ {
				v := c.settledVerdict()
				switch at := data.transportOffset(); {
				case first < at+4:
					v = passNotOurs
				case first < at+header:
					v = dropTruncated
				}
				identification := c.control().Identifications
				action, out, ok := s.runSplit(frame, first, c.from)
				if !ok {
					version, err := features.LinuxVersionCode()
					if s.must(err); version >= 6<<16|18<<8 {
						t.Fatal("the kernel's test run did not split a frame where it was told to")
					}
					t.Skip("before Linux 6.18, the kernel's test run does not split a frame where it is told to")
				}
				want := expectation{verdict: v, service: 1}
				switch v {
				case passNotOurs:
					want.frame, want.service = frame, 0
				case dropTruncated:
				default:
					want.frame, want.backend, want.to = c.forwarded(data, identification).bytes(), c.backend, c.its().ifindex
				}
				t.Run(fmt.Sprintf("udp=%t, %d bytes", p.udp, first), func(t *testing.T) {
					s.in(t)
					s.check(frame, c.from, action, out, want)
				})
				s.in(t)
			}
		})
	})
}

// Bytes are counted by the frame, however short the IP packet in it: in one buffer, about the length that is in one at all
// times, and in several.
func TestBuffersCounted(t *testing.T) {
	eachWay(t, nil, func(t *testing.T, f family, w way, p plan) {
		eachProtocol(t, p, func(t *testing.T, p plan) {
			p.twoArms = true
			s := newScene(t, f, w.method, p)
			c := s.newClient().open()
			s.rebuildExceptions()
			const plain = 1522 // the longest of an MTU of 1500, with two tags
			for _, length := range []int{plain - 1, plain, plain + 1, 3000, 4000, 5000, 9000, 9014} {
				padded := func(s segment) segment {
					s.padding = bytes.Repeat([]byte("\xa5"), length-int(s.length()))
					return s
				}
				before := s.counted()
				c.send(padded(c.segment(ack, "short")), c.settledVerdict())
				if rewrites(w.method) {
					c.reply(padded(c.answer(ack, "and good")), replyTable)
				}
				after := s.counted()
				for _, counted := range [][2]bpf.FairleadTraffic{
					{before.Services[1], after.Services[1]}, {before.Backends[1], after.Backends[1]},
				} {
					if bytes := counted[1].Bytes - counted[0].Bytes; bytes != uint64(length) {
						t.Errorf("%d bytes counted of a frame of %d", bytes, length)
					}
					if bytes := counted[1].ReplyBytes - counted[0].ReplyBytes; rewrites(w.method) && bytes != uint64(length) {
						t.Errorf("%d bytes counted of a reply of %d", bytes, length)
					}
				}
				if !p.udp {
					// As a RST, it is counted as it came.
					d := s.newClient().open().condemn()
					d.send(padded(d.segment(ack, "short")), forwardReset)
				}
			}
		})
	})
}
