package health

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strings"
	"time"
)

// The WebSocket protocol as a client needs it for one ping: RFC 6455, sections 4.1 and 5. It is spoken here and not by
// a library, because a check wants what libraries hide: which rule the other end broke, in words that are the same each
// time; data frames skipped unread; no goroutines.

const (
	acceptGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11" // RFC 6455, 1.3

	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xa

	maxControl  = 125 // bytes of a control frame's payload
	closeNormal = 1000
	// How long the other end's close frame is waited for. The verdict doesn't depend on it.
	closeTime = 250 * time.Millisecond
)

type webSocketProbe struct {
	peer
	request     []byte
	stateHeader string
}

func newWebSocketProbe(t Target) probe {
	p := &webSocketProbe{peer: newPeer(t), stateHeader: t.Check.StateHeader}
	var err error
	p.request, err = request(t, "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ")
	if err != nil {
		return unaskable(err)
	}
	return p.check
}

func (p *webSocketProbe) check(ctx context.Context) outcome {
	begun := time.Now()
	c, err := p.connect(ctx)
	if err != nil {
		return p.failed(err)
	}
	key, payload := newKey(), rand.Text()
	a, err := c.exchange(fmt.Appendf(nil, "%s%s\r\n\r\n", p.request, key))
	if err != nil {
		c.abort()
		return p.failed(err)
	}
	defer a.release()
	said := stateIn(a.Header, p.stateHeader)
	o := p.judge(a, key, said)
	if o.reason != "" {
		o.words = said.unknown
		c.leave()
		return o
	}

	a.allow(math.MaxInt64) // the deadline bounds what is skipped
	frames := frameReader{r: a.reader}
	err = writeFrame(c, opPing, []byte(payload))
	if err == nil {
		err = frames.awaitPong(c, payload)
	}
	if err != nil {
		c.abort()
		o = p.failed(err)
		o.words = said.unknown
		return o
	}
	o = succeeded(begun)
	o.draining, o.percent, o.words = said.drain, said.percent, said.unknown
	frames.close(c)
	return o
}

// judge looks at the answer to the handshake (RFC 6455, 4.1). Its outcome has a reason where the check ends here.
func (p *webSocketProbe) judge(a *answer, key string, said said) outcome {
	h, no := a.Header, ""
	switch {
	case said.maint:
		return outcome{verdict: maint, reason: oneLine(p.stateHeader + " says maint")}
	case a.StatusCode != http.StatusSwitchingProtocols:
		no = fmt.Sprintf("status %d, wanted 101", a.StatusCode)
	case !hasToken(h, "Upgrade", "websocket"):
		no = "the Upgrade header does not say websocket"
	case !hasToken(h, "Connection", "upgrade"):
		no = "the Connection header does not say upgrade"
	case h.Get("Sec-WebSocket-Accept") == "":
		no = "there is no Sec-WebSocket-Accept header"
	case h.Get("Sec-WebSocket-Accept") != acceptFor(key):
		no = "the Sec-WebSocket-Accept header is not that of the key"
	case h.Get("Sec-WebSocket-Extensions") != "":
		no = "the Sec-WebSocket-Extensions header names what was not asked for"
	case h.Get("Sec-WebSocket-Protocol") != "":
		no = "the Sec-WebSocket-Protocol header names what was not asked for"
	case said.down:
		no = p.stateHeader + " says down"
	}
	return outcome{verdict: bad, reason: oneLine(no)}
}

// newKey returns a Sec-WebSocket-Key: 16 random bytes.
func newKey() string {
	var b [16]byte
	rand.Read(b[:])
	return base64.StdEncoding.EncodeToString(b[:])
}

// acceptFor returns the Sec-WebSocket-Accept that answers a key.
func acceptFor(key string) string {
	sum := sha1.Sum([]byte(key + acceptGUID))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// hasToken reports whether a header's comma-separated list has a token, in whatever case.
func hasToken(h http.Header, name, token string) bool {
	for _, value := range h.Values(name) {
		for part := range strings.SplitSeq(value, ",") {
			if strings.EqualFold(strings.TrimSpace(part), token) {
				return true
			}
		}
	}
	return false
}

// writeFrame sends a client's control frame: whole, and masked by a new random key (RFC 6455, 5.3).
func writeFrame(w io.Writer, opcode byte, payload []byte) error {
	frame := make([]byte, 6, 6+maxControl)
	frame[0], frame[1] = 0x80|opcode, 0x80|byte(len(payload))
	rand.Read(frame[2:6])
	for i, b := range payload {
		frame = append(frame, b^frame[2+i%4])
	}
	_, err := w.Write(frame)
	return err
}

// frame is a frame's beginning. Only control frames have their payload here.
type frame struct {
	final   bool
	opcode  byte
	length  uint64
	payload []byte
}

func (f *frame) control() bool { return f.opcode&0x8 != 0 }

// readFrame reads a server's frame up to its payload, and a control frame's payload as well (RFC 6455, 5.2).
func readFrame(r *bufio.Reader) (frame, error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:2]); err != nil {
		return frame{}, err
	}
	f := frame{final: head[0]&0x80 != 0, opcode: head[0] & 0xf, length: uint64(head[1] & 0x7f)}
	reserved, masked := head[0]&0x70 != 0, head[1]&0x80 != 0
	switch {
	case reserved:
		return f, wrong("a frame has reserved bits set")
	case f.opcode > opBinary && f.opcode < opClose, f.opcode > opPong:
		return f, wrongf("a frame has the reserved opcode %#x", f.opcode)
	case masked:
		return f, wrong("a frame of the server is masked")
	case f.control() && !f.final:
		return f, wrong("a control frame is fragmented")
	case f.control() && f.length > maxControl:
		return f, wrongf("a control frame is longer than %d bytes", maxControl)
	}
	switch f.length {
	case 126:
		if _, err := io.ReadFull(r, head[:2]); err != nil {
			return f, err
		}
		f.length = uint64(binary.BigEndian.Uint16(head[:2]))
		if f.length < 126 {
			return f, wrong("a frame's length is written longer than it needs to be")
		}
	case 127:
		if _, err := io.ReadFull(r, head[:8]); err != nil {
			return f, err
		}
		f.length = binary.BigEndian.Uint64(head[:8])
		if f.length>>63 != 0 {
			return f, wrong("a frame's length has its highest bit set")
		}
		if f.length <= math.MaxUint16 {
			return f, wrong("a frame's length is written longer than it needs to be")
		}
	}
	if f.control() {
		f.payload = make([]byte, f.length)
		if _, err := io.ReadFull(r, f.payload); err != nil {
			return f, err
		}
	}
	return f, nil
}

// frameReader reads a server's frames, and skips data.
type frameReader struct {
	r          *bufio.Reader
	fragmented bool // a message has begun and not ended
}

// next returns the next control frame. Data frames before it are read over.
func (f *frameReader) next() (frame, error) {
	for {
		h, err := readFrame(f.r)
		if err != nil || h.control() {
			return h, err
		}
		switch {
		case h.opcode == opContinuation && !f.fragmented:
			return h, wrong("a message begins with a continuation")
		case h.opcode != opContinuation && f.fragmented:
			return h, wrong("a message begins within another")
		}
		f.fragmented = !h.final
		if _, err := io.CopyN(io.Discard, f.r, int64(h.length)); err != nil {
			return h, err
		}
	}
}

// awaitPong reads until the pong that answers the ping has come.
func (f *frameReader) awaitPong(w io.Writer, payload string) error {
	strange := false
	for {
		h, err := f.next()
		switch {
		case err != nil && timedOut(err) && strange:
			return wrong("ping: the pong is not that of the ping")
		case err != nil && (timedOut(err) || !isWrong(err)):
			return during("ping", err)
		case err != nil:
			return err
		}
		switch h.opcode {
		case opPong:
			if string(h.payload) == payload {
				return nil
			}
			strange = true // may be one that nobody asked for (RFC 6455, 5.5.3)
		case opPing:
			if err := writeFrame(w, opPong, h.payload); err != nil {
				return during("ping", err)
			}
		case opClose:
			if len(h.payload) < 2 {
				return wrong("ping: answered by a close frame")
			}
			return wrongf("ping: answered by a close frame, %d", binary.BigEndian.Uint16(h.payload))
		}
	}
}

func isWrong(err error) bool {
	_, ok := errors.AsType[wrong](err)
	return ok
}

// close ends the connection as RFC 6455, 7.1 wants it: a close frame there and one back, then the server closes TCP. The
// backend has shown by now that it serves; one that ends its connections in another way is not down for it.
func (f *frameReader) close(c *connection) {
	deadline := time.Now().Add(closeTime)
	if d, ok := c.ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	c.raw.SetReadDeadline(deadline)
	err := writeFrame(c, opClose, binary.BigEndian.AppendUint16(nil, closeNormal))
	for err == nil {
		var h frame
		if h, err = f.next(); h.opcode == opClose && err == nil {
			break
		}
	}
	c.leave()
}
