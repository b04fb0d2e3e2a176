// Package probe tells clients that send nothing: a TCP keep-alive from the service's address obliges a client to answer
// with an ACK, and that answer meets the data plane, which knows by it the exact number and answers RST where the
// connection's backend is down or the connection was condemned. The same keep-alive asks whether an entry of the
// connection table is alive at all.
//
// [AppendFrame] writes the keep-alive, a [Socket] sends it, and a [Teller] knows whom to send it to, how fast and how
// often.
package probe

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"fairlead/maps"
)

const (
	ethernetLength  = 14
	ipv4Length      = 20
	ipv6Length      = 40
	tcpLength       = 20
	timestampLength = 12 // two of padding, kind 8, length 10, two numbers

	tagID = 0x0fff

	hops    = 64
	flagACK = 0x10
	garbage = 1 // octets
	// A client does not look at the window of a segment outside of its own. A router in between does: it takes it for
	// what the service would take, and a smaller one than the service's last takes nothing back there.
	window = 1024
)

// AppendFrame appends the Ethernet frame of a keep-alive for a connection's client (RFC 9293, section 3.8.4): an ACK
// with one octet of garbage that the client has had already, from the service, by the hop that the client's packets come
// from. A connection that is not TCP's has none.
//
// Its numbers are of the client's last packet that was looked at, and so none is ahead of the truth:
//   - its sequence number is the one before what the client has acknowledged. The client has had that octet: so the
//     segment is outside of its window, is not believed, and must be answered with an ACK (RFC 9293, section 3.10.7.4).
//     What the client has received since only moves the window further away;
//   - it acknowledges what the client has sent, no more: the client, and every router that has seen its packet on its way
//     here, knows of that. A router that tracks connections lets acknowledgements pass that are old, and none of what
//     nobody has sent;
//   - where the client's packets have timestamps, so have all segments to it (RFC 7323, section 3.2). Its value is what
//     the client echoed last: the newest that it had from the service by then, and none that the service never had. So
//     where nothing has come since, the check for wrapped numbers (section 5.3, R1: a value less than TS.Recent) lets
//     the segment pass, and its number is looked at. Where something has, if only the service's last bare ACK, or where
//     the value has outlived 24 days of silence (section 5.5), R1 drops it, and obliges the client to the same ACK. As
//     the segment is outside of the window, TS.Recent does not move by it. Its echo is the client's own last value.
//
// The octet is for that second case. A bare ACK whose number and timestamp are both old is what reordering makes, and
// Linux drops it in silence (6.18 does, and counts it as PAWSOldAck); a segment with data it answers, and doesn't count it
// among the two answers a second that a socket has for others.
func AppendFrame(b []byte, c *maps.Connection) []byte {
	if c.Tuple.Protocol != unix.IPPROTO_TCP {
		return b
	}
	from, to := c.Tuple.Destination, c.Tuple.Source
	header := tcpLength
	if c.Timestamp != 0 || c.TimestampEcho != 0 {
		header += timestampLength
	}
	length := header + garbage
	kind := uint16(unix.ETH_P_IP)
	if from.Addr().Is6() {
		kind = unix.ETH_P_IPV6
	}
	b = appendLink(b, &c.Hop, kind)
	// A checksum over the addresses as they stand in the IP header.
	var sum uint32
	if kind == unix.ETH_P_IP {
		ip := len(b)
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(ipv4Length+length))
		// Never fragmented, so that an ID of zero is right (RFC 6864, section 4.1).
		b = append(b, 0, 0, 0x40, 0, hops, unix.IPPROTO_TCP, 0, 0)
		source, destination := from.Addr().As4(), to.Addr().As4()
		b = append(append(b, source[:]...), destination[:]...)
		binary.BigEndian.PutUint16(b[ip+10:], folded(summed(0, b[ip:])))
		sum = summed(0, b[ip+12:])
	} else {
		ip := len(b)
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(length))
		b = append(b, unix.IPPROTO_TCP, hops)
		source, destination := from.Addr().As16(), to.Addr().As16()
		b = append(append(b, source[:]...), destination[:]...)
		sum = summed(0, b[ip+8:])
	}

	tcp := len(b)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint32(b, c.Acknowledgement-1)
	b = binary.BigEndian.AppendUint32(b, c.SequenceEnd)
	b = append(b, uint8(header/4)<<4, flagACK)
	b = binary.BigEndian.AppendUint16(b, window)
	b = append(b, 0, 0, 0, 0)
	if header > tcpLength {
		b = append(b, 1, 1, 8, 10) // as RFC 7323, appendix A, lays it out
		b = binary.BigEndian.AppendUint32(b, c.TimestampEcho)
		b = binary.BigEndian.AppendUint32(b, c.Timestamp)
	}
	b = append(b, 0)
	sum = summed(sum+unix.IPPROTO_TCP+uint32(length), b[tcp:])
	binary.BigEndian.PutUint16(b[tcp+16:], folded(sum))
	return b
}

// Frame is a frame of its own; nil for a connection that is not TCP's.
func Frame(c *maps.Connection) []byte {
	return AppendFrame(nil, c)
}

// appendLink appends Ethernet addresses, tags and the type of what follows.
func appendLink(b []byte, hop *maps.Hop, kind uint16) []byte {
	b = append(append(b, hop.MAC[:]...), hop.SourceMAC[:]...)
	for _, tag := range hop.VLAN {
		if tag == 0 {
			break
		}
		tagType := uint16(unix.ETH_P_8021Q)
		if tag&maps.Tag8021AD != 0 {
			tagType = unix.ETH_P_8021AD
		}
		b = binary.BigEndian.AppendUint16(b, tagType)
		b = binary.BigEndian.AppendUint16(b, tag&tagID)
	}
	return binary.BigEndian.AppendUint16(b, kind)
}

// summed adds the 16-bit words of b for an Internet checksum.
func summed(sum uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

func folded(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
