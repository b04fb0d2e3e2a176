package packet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"fairlead/bpf"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// liveFrames has the kernel carry out what the program decides (BPF_F_TEST_XDP_LIVE_FRAMES).
const liveFrames = 1 << 1

// wire listens at the far end of a device.
type wire struct {
	*testing.T
	socket int
}

func listen(t *testing.T, d device) *wire {
	t.Helper()
	w := &wire{T: t}
	err := theKernel.do(0, func() (err error) {
		w.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		everything := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		return unix.Bind(w.socket, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: d.peer})
	})
	if err != nil {
		t.Fatalf("listen on the wire: %v", err)
	}
	t.Cleanup(func() { unix.Close(w.socket) })
	return w
}

// next is the next frame to an Ethernet address, nil if there is none by the deadline.
func (w *wire) next(to [6]byte, wait time.Duration) []byte {
	w.Helper()
	frame := make([]byte, 4096)
	for deadline := time.Now().Add(wait); ; {
		n, _, err := unix.Recvfrom(w.socket, frame, 0)
		switch {
		case err == nil && bytes.HasPrefix(frame[:n], to[:]):
			return frame[:n]
		case err == nil:
		case !errors.Is(err, unix.EAGAIN):
			w.Fatalf("receive: %v", err)
		case time.Now().After(deadline):
			return nil
		default:
			time.Sleep(time.Millisecond)
		}
	}
}

// live gives the program a frame whose verdict the kernel carries out.
func (s *scene) live(frame []byte, from device) {
	s.Helper()
	s.must(theKernel.do(s.cpu, func() error {
		_, err := s.Fairlead.Run(&ebpf.RunOptions{
			Data: frame, Flags: liveFrames, Repeat: 1,
			Context: xdpMD{DataEnd: uint32(len(frame)), IngressIfindex: uint32(from.index)},
		})
		return err
	}))
	s.want = s.counted()
}

// Frames leave by the device that their next hop names, and by no other.
func TestRedirect(t *testing.T) {
	eachMethod(t, func(t *testing.T, f family, method bpf.FairleadMethod) {
		for _, twoArms := range []bool{false, true} {
			front, back := listen(t, theKernel.front), listen(t, theKernel.back)
			s := newScene(t, f, method, plan{twoArms: twoArms})
			s.backends[0].mac = mac(map[bool]string{false: "02:00:00:00:02:01", true: "02:00:00:00:02:02"}[twoArms])
			s.backends[0].mac[3], s.backends[0].mac[4] = byte(method), f.client.AsSlice()[0] // no other test's
			s.setBackend(s.backends[0])
			c := s.newClient().open()
			s.rebuildExceptions()
			c.router = s.backends[0].mac
			c.router[0] = 6
			c.send(c.segment(ack, ""), c.settledVerdict())

			data := c.segment(ack|psh, "by which way?")
			b := s.backends[0]
			want := c.forwarded(data, 0)
			s.live(data.bytes(), theKernel.front)
			near, far := front, back
			if twoArms {
				near, far = back, front
			}
			if got := near.next(b.mac, 5*time.Second); !bytes.Equal(got, want.bytes()) {
				t.Errorf("on the backends' wire %x\nwant %x", got, want.bytes())
			}
			if got := far.next(b.mac, 0); got != nil {
				t.Errorf("on the other wire %x", got)
			}
			if rewrites(method) {
				data = c.answer(ack|psh, "this way")
				from := theKernel.front
				if twoArms {
					from = theKernel.back
				}
				want = c.replied(data, 0)
				s.live(data.bytes(), from)
				if got := front.next(c.router, 5*time.Second); !bytes.Equal(got, want.bytes()) {
					t.Errorf("on the clients' wire %x\nwant %x", got, want.bytes())
				}
			}

			// So does an answer of our own.
			lost := s.newClient()
			lost.router = c.router
			lost.router[1] = 1
			if rewrites(method) {
				packet := lost.segment(ack, "who am I?")
				s.live(packet.bytes(), theKernel.front)
				if got := front.next(lost.router, 5*time.Second); !bytes.Equal(got, packet.reset().bytes()) {
					t.Errorf("RST %x\nwant %x", got, packet.reset().bytes())
				}
			}
		}
	})
}
