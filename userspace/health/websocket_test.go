package health

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"fairlead/userspace/config"
)

// serverEnd is the server's end of a WebSocket, spoken byte by byte.
type serverEnd struct {
	net.Conn
	r    *bufio.Reader
	key  string
	mask []byte // of the last frame read
}

// upgrading answers a handshake, its fields changed where a test wants that, and then speaks.
func upgrading(change map[string]string, speak func(*serverEnd)) func(net.Conn) {
	return func(conn net.Conn) {
		c := &serverEnd{Conn: conn, r: bufio.NewReader(conn)}
		r, err := http.ReadRequest(c.r)
		if err != nil {
			return
		}
		c.key = r.Header.Get("Sec-WebSocket-Key")
		fields := map[string]string{"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": acceptFor(c.key)}
		for name, value := range change {
			fields[name] = value
		}
		answer := "HTTP/1.1 101 Switching Protocols\r\n"
		for name, value := range fields {
			if value != "" {
				answer += name + ": " + value + "\r\n"
			}
		}
		io.WriteString(c, answer+"\r\n")
		speak(c)
	}
}

// read reads a client's control frame.
func (c *serverEnd) read() (opcode byte, payload []byte, err error) {
	head := make([]byte, 6)
	if _, err := io.ReadFull(c.r, head); err != nil {
		return 0, nil, err
	}
	if head[0]&0xf0 != 0x80 || head[1]&0x80 == 0 || head[1]&0x7f > maxControl {
		return 0, nil, fmt.Errorf("a frame of the client begins with % x", head)
	}
	c.mask = head[2:6]
	payload = make([]byte, head[1]&0x7f)
	_, err = io.ReadFull(c.r, payload)
	for i := range payload {
		payload[i] ^= head[2+i%4]
	}
	return head[0] & 0xf, payload, err
}

// pong answers a ping.
func (c *serverEnd) pong() error {
	opcode, payload, err := c.read()
	if err == nil && opcode != opPing {
		err = fmt.Errorf("opcode %#x is not a ping", opcode)
	}
	c.send(append([]byte{0x8a, byte(len(payload))}, payload...)...)
	return err
}

func (c *serverEnd) send(b ...byte) { c.Write(b) }

// TestWebSocket checks a server of another make, which sends data of all lengths before it answers, and asks that server
// how the connection ended.
func TestWebSocket(t *testing.T) {
	a := mustAuthority(t)
	for _, kind := range []config.HealthType{config.HealthWebSocket, config.HealthWSS} {
		t.Run(kind.String(), func(t *testing.T) {
			ended := make(chan error, 1)
			check := checkOf(kind)
			check.Roots = a.roots
			secure := a.mustServe(t, "127.0.0.1")
			if kind == config.HealthWebSocket {
				secure = nil
			}
			wantGood(t, once(t, check, serveHTTP(t, secure, echoWebSocket(6, ended))))
			if err := <-ended; websocket.CloseStatus(err) != websocket.StatusNormalClosure {
				t.Errorf("the server saw the connection end with %v", err)
			}
		})
	}
}

// TestWebSocketFrames looks at each byte of a check: the key, the mask, the ping, the close; and has the server ping too.
func TestWebSocketFrames(t *testing.T) {
	keys, masks := []string{}, [][]byte{}
	said := make(chan error, 1)
	address := serve(t, nil, upgrading(map[string]string{"Upgrade": "WebSocket", "Connection": "keep-alive, upgrade",
		"X-State": "drain 20% odd"}, func(c *serverEnd) {
		said <- func() error {
			keys = append(keys, c.key)
			opcode, payload, err := c.read()
			if err != nil || opcode != opPing || len(payload) < 8 {
				return fmt.Errorf("first frame: opcode %#x, payload %q, %v", opcode, payload, err)
			}
			masks = append(masks, c.mask)
			c.send(0x89, 2, 'h', 'i') // a ping
			c.send(0x8a, 0)           // a pong nobody asked for
			c.send(0x01, 1, 'a')      // a message in three parts
			c.send(0x00, 0)           //
			c.send(0x8a, 1, 'x')      // another pong within it
			c.send(append([]byte{0x80, 126, 0, 200}, make([]byte, 200)...)...)
			c.send(append([]byte{0x8a, byte(len(payload))}, payload...)...)
			if opcode, payload, err := c.read(); err != nil || opcode != opPong || string(payload) != "hi" {
				return fmt.Errorf("the ping was answered by opcode %#x, payload %q, %v", opcode, payload, err)
			}
			masks = append(masks, c.mask)
			opcode, payload, err = c.read()
			if err != nil || opcode != opClose || len(payload) != 2 || binary.BigEndian.Uint16(payload) != 1000 {
				return fmt.Errorf("last frame: opcode %#x, payload %q, %v", opcode, payload, err)
			}
			masks = append(masks, c.mask)
			c.send(0x82, 3, 1, 2, 3) // on its way already
			c.send(0x88, 2, 0x03, 0xe8)
			c.Conn.(*net.TCPConn).CloseWrite()
			if n, err := io.Copy(io.Discard, c.r); n != 0 || err != nil {
				return fmt.Errorf("after the close: %d bytes, %v", n, err)
			}
			return nil
		}()
	}))
	check := checkOf(config.HealthWebSocket)
	check.StateHeader = "X-State"
	for range 2 {
		o := once(t, check, address)
		if err := <-said; err != nil {
			t.Error(err)
		}
		if o.verdict != good || !o.draining || o.percent != 20 || !slices.Equal(o.words, []string{"odd"}) {
			t.Errorf("outcome %+v", o)
		}
	}
	if keys[0] == keys[1] {
		t.Error("two checks used one key")
	}
	for i, m := range masks {
		if slices.ContainsFunc(masks[:i], func(other []byte) bool { return bytes.Equal(m, other) }) {
			t.Errorf("mask % x was used twice", m)
		}
	}
}

// TestAccept takes its values from RFC 6455, 1.3.
func TestAccept(t *testing.T) {
	if got, want := acceptFor("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="; got != want {
		t.Errorf("accept %q, want %q", got, want)
	}
}

// TestWrongWebSockets checks servers that break one rule each.
func TestWrongWebSockets(t *testing.T) {
	pong := func(c *serverEnd) { c.pong() }
	after := func(b ...byte) func(*serverEnd) {
		return func(c *serverEnd) {
			c.send(b...)
			c.pong()
			io.Copy(io.Discard, c)
		}
	}
	const timeout = 300 * time.Millisecond
	for _, c := range []struct {
		name   string
		change map[string]string
		speak  func(*serverEnd)
		want   string
	}{
		{"no upgrade", map[string]string{"Upgrade": ""}, pong, "the Upgrade header does not say websocket"},
		{"other upgrade", map[string]string{"Upgrade": "h2c"}, pong, "the Upgrade header does not say websocket"},
		{"no connection", map[string]string{"Connection": "keep-alive"}, pong, "the Connection header does not say upgrade"},
		{"no accept", map[string]string{"Sec-WebSocket-Accept": ""}, pong, "there is no Sec-WebSocket-Accept header"},
		{"wrong accept", map[string]string{"Sec-WebSocket-Accept": acceptFor("other")}, pong,
			"the Sec-WebSocket-Accept header is not that of the key"},
		{"extension", map[string]string{"Sec-WebSocket-Extensions": "permessage-deflate"}, pong,
			"the Sec-WebSocket-Extensions header names what was not asked for"},
		{"protocol", map[string]string{"Sec-WebSocket-Protocol": "chat"}, pong,
			"the Sec-WebSocket-Protocol header names what was not asked for"},
		{"says down", map[string]string{"X-State": "down"}, pong, "X-State says down"},
		{"silent", nil, func(c *serverEnd) { io.Copy(io.Discard, c) }, "ping: no answer within 300ms"},
		{"closing", nil, func(c *serverEnd) { c.read() }, "ping: closed without an answer"},
		{"half a frame", nil, func(c *serverEnd) { c.read(); c.send(0x8a, 20, 1) }, "ping: closed without an answer"},
		{"half a data frame", nil, func(c *serverEnd) { c.read(); c.send(0x82, 20, 1) }, "ping: closed without an answer"},
		{"wrong pong", nil, func(c *serverEnd) { c.read(); c.send(0x8a, 1, 'x'); io.Copy(io.Discard, c) },
			"ping: the pong is not that of the ping"},
		{"echoing bytes", nil, func(c *serverEnd) { io.Copy(c, c.r) }, "a frame of the server is masked"},
		{"data without end", nil, func(c *serverEnd) {
			c.send(0x82, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
			for {
				if _, err := c.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}, "ping: no answer within 300ms"},
		{"close", nil, after(0x88, 0), "ping: answered by a close frame"},
		{"close with status", nil, after(0x88, 2, 0x03, 0xe9), "ping: answered by a close frame, 1001"},
		{"reserved bits", nil, after(0xc1, 0), "a frame has reserved bits set"},
		{"reserved opcode", nil, after(0x83, 0), "a frame has the reserved opcode 0x3"},
		{"reserved control", nil, after(0x8b, 0), "a frame has the reserved opcode 0xb"},
		{"masked", nil, after(0x82, 0x80, 0, 0, 0, 0), "a frame of the server is masked"},
		{"fragmented ping", nil, after(0x09, 0), "a control frame is fragmented"},
		{"long pong", nil, after(0x8a, 126, 0, 126), "a control frame is longer than 125 bytes"},
		{"long 16 bits", nil, after(0x82, 126, 0, 125), "a frame's length is written longer than it needs to be"},
		{"long 64 bits", nil, after(0x82, 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff), "a frame's length is written longer than it needs to be"},
		{"highest bit", nil, after(0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0), "a frame's length has its highest bit set"},
		{"begins with continuation", nil, after(0x80, 0), "a message begins with a continuation"},
		{"message within another", nil, after(0x01, 0, 0x82, 0), "a message begins within another"},
		{"text", nil, func(c *serverEnd) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n"); io.Copy(io.Discard, c) },
			"a frame has reserved bits set"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			check := checkOf(config.HealthWebSocket)
			check.StateHeader = "X-State"
			if strings.Contains(c.want, "within") || c.name == "wrong pong" {
				check.Timeout = timeout
			}
			wantReason(t, once(t, check, serve(t, nil, upgrading(c.change, c.speak))), c.want)
		})
	}
	check := checkOf(config.HealthWebSocket)
	check.StateHeader = "X-State"
	wantReason(t, once(t, check, serveHTTP(t, nil, http.NotFoundHandler())), "status 404, wanted 101")
	wantReason(t, once(t, check, serve(t, nil, answering("HTTP/1.1 200 OK\r\n\r\n"))), "status 200, wanted 101")
	if o := once(t, check, serve(t, nil, answering("HTTP/1.1 503 No\r\nX-State: maint\r\n\r\n"))); o.verdict != maint {
		t.Errorf("outcome %+v", o)
	}
}

// TestRudeClose wants a server that ends its connections in its own way to be good: it has served.
func TestRudeClose(t *testing.T) {
	for name, speak := range map[string]func(*serverEnd){
		"by end of file": func(c *serverEnd) { c.pong() },
		"by reset":       func(c *serverEnd) { c.pong(); c.read(); c.Conn.(*net.TCPConn).SetLinger(0) },
		"not at all":     func(c *serverEnd) { c.pong(); io.Copy(io.Discard, c) },
		"by garbage":     func(c *serverEnd) { c.pong(); c.send(0xff, 0xff, 0xff); io.Copy(io.Discard, c) },
	} {
		t.Run(name, func(t *testing.T) {
			wantGood(t, once(t, checkOf(config.HealthWebSocket), serve(t, nil, upgrading(nil, speak))))
		})
	}
}

// FuzzFrames reads any bytes as a server's frames: what is accepted keeps the rules, and is written in the one way that
// there is.
func FuzzFrames(f *testing.F) {
	for _, seed := range [][]byte{{}, {0x8a, 0}, {0x8a, 2, 1, 2}, {0x82, 126, 0, 126}, {0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0},
		{0x01, 1, 'a', 0x89, 0, 0x80, 0, 0x8a, 1, 'b'}, {0x88, 2, 3, 0xe8}, {0xc1, 0}, {0x0a, 0}, {0x8a, 126, 0, 126},
		append([]byte{0x82, 126, 0, 200}, make([]byte, 250)...)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bufio.NewReader(bytes.NewReader(data))
		h, err := readFrame(r)
		if err == nil {
			head := []byte{h.opcode, 0}
			if h.final {
				head[0] |= 0x80
			}
			switch {
			case h.length < 126:
				head[1] = byte(h.length)
			case h.length <= 0xffff:
				head = binary.BigEndian.AppendUint16(head[:1:1], uint16(h.length))
				head = slices.Insert(head, 1, 126)
			default:
				head = binary.BigEndian.AppendUint64(head[:1:1], h.length)
				head = slices.Insert(head, 1, 127)
			}
			if !bytes.HasPrefix(data, append(head, h.payload...)) {
				t.Errorf("% x was read as %+v", data, h)
			}
			if h.control() && (!h.final || uint64(len(h.payload)) != h.length || h.length > maxControl) {
				t.Errorf("control frame %+v", h)
			}
		} else if !isWrong(err) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("error %v", err)
		}
		// To the end: only control frames come out, and the end comes.
		frames := frameReader{r: bufio.NewReader(bytes.NewReader(data))}
		for range len(data) + 1 {
			h, err := frames.next()
			if err != nil {
				return
			}
			if !h.control() {
				t.Fatalf("data came out: %+v", h)
			}
		}
		t.Errorf("% x has more frames than bytes", data)
	})
}

// FuzzHandshake reads any bytes as an answer, by both kinds of check that read one. The other end says nothing more.
func FuzzHandshake(f *testing.F) {
	for _, seed := range []string{"", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 x\r\nX-S: maint\r\n\r\n", "\x16\x03\x01"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		here, there := net.Pipe()
		go func() {
			there.Write(data)
			there.Close()
		}()
		go io.Copy(io.Discard, there)
		c := &connection{Conn: here, raw: here, stop: func() bool { return true }, ctx: t.Context()}
		defer here.Close()
		a, err := c.exchange([]byte("GET / HTTP/1.1\r\n\r\n"))
		if err != nil {
			if o := (&peer{limit: time.Second}).failed(err); o.reason == "" || o.reason != oneLine(o.reason) || o.verdict != bad {
				t.Errorf("%q: %+v", data, o)
			}
			return
		}
		defer a.release()
		if !bytes.HasPrefix(data, []byte("HTTP/")) {
			t.Errorf("%q was taken for HTTP", data)
		}
		p := &webSocketProbe{stateHeader: "X-S"}
		if o := p.judge(a, newKey(), stateIn(a.Header, "X-S")); o.reason == "" {
			t.Errorf("%q was taken for the answer to a random key", data)
		}
	})
}
