package health

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fairlead/userspace/config"
)

// probe makes one check. It returns soon after ctx ends, and leaves nothing open.
type probe func(ctx context.Context) outcome

func newProbe(t Target) probe {
	switch t.Check.Type {
	case config.HealthTCP:
		return newTCPProbe(t)
	case config.HealthHTTP, config.HealthHTTPS:
		return newHTTPProbe(t)
	case config.HealthWebSocket, config.HealthWSS:
		return newWebSocketProbe(t)
	case config.HealthExec:
		return newExecProbe(t)
	}
	return func(context.Context) outcome {
		return outcome{verdict: moot, reason: fmt.Sprintf("not checked: type %q is not known", t.Check.Type)}
	}
}

// succeeded is the outcome of a check that began at begun and has just turned out good.
func succeeded(begun time.Time) outcome {
	return outcome{verdict: good, percent: 100, latency: time.Since(begun)}
}

// peer is the other end of a target's checks.
type peer struct {
	address string
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	tls     *tls.Config // nil: without
	limit   time.Duration
}

func newPeer(t Target) peer {
	p := peer{address: asked(t).String(), dial: t.Dial, limit: t.Check.Timeout}
	if p.dial == nil {
		// No keep-alives and no second address: a check's connection is short, and of one kind.
		p.dial = (&net.Dialer{KeepAlive: -1}).DialContext
	}
	switch t.Check.Type {
	case config.HealthHTTPS, config.HealthWSS:
		p.tls = tlsConfig(t)
	}
	return p
}

// asked is the address that a target's checks connect to.
func asked(t Target) netip.AddrPort {
	if t.Via.IsValid() {
		return t.Via
	}
	return t.Address
}

// connection is the connection of one check. It ends with the check's context.
type connection struct {
	net.Conn          // what is spoken over: raw, or TLS above it
	raw      net.Conn // as it was dialled
	stop     func() bool
	ctx      context.Context
}

// connect opens a new connection. The caller closes it, by leave or abort.
func (p *peer) connect(ctx context.Context) (*connection, error) {
	raw, err := p.dial(ctx, "tcp", p.address)
	if err != nil {
		return nil, during("connect", err)
	}
	c := &connection{Conn: raw, raw: raw, ctx: ctx}
	// One timer a check, the context's, and no goroutine: what is read or written ends by a deadline in the past.
	c.stop = context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	if p.tls == nil {
		return c, nil
	}
	t := tls.Client(raw, p.tls)
	if err := t.Handshake(); err != nil {
		c.abort()
		return nil, during("tls", err)
	}
	c.Conn = t
	return c, nil
}

// abort closes the connection by RST: nothing of it is left on either side.
func (c *connection) abort() {
	c.stop()
	abort(c.raw)
}

func abort(raw net.Conn) {
	if l, ok := raw.(interface{ SetLinger(int) error }); ok {
		l.SetLinger(0)
	}
	raw.Close()
}

const (
	// How long, and over how many bytes, the other end is waited for to close first.
	lingerTime  = 100 * time.Millisecond
	lingerBytes = 64 << 10
)

// leave closes a connection on which all is said. TIME_WAIT, a minute long, is with the end that closes first: it is
// left to the backend, which was asked to close and has one such connection an interval, not one for every backend. One
// that doesn't close soon gets RST.
func (c *connection) leave() {
	if t, ok := c.Conn.(*tls.Conn); ok {
		t.CloseWrite() // says goodbye; fails where the other end was faster
	}
	c.stop() // from here on a deadline of our own
	deadline := time.Now().Add(lingerTime)
	if d, ok := c.ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	c.raw.SetDeadline(deadline)
	if c.ctx.Err() == nil {
		if _, err := io.CopyN(io.Discard, onlyReader{c.raw}, lingerBytes); errors.Is(err, io.EOF) {
			c.raw.Close()
			return
		}
	}
	abort(c.raw)
}

// onlyReader hides what else a connection can do: io.Discard would otherwise be asked to read by splice.
type onlyReader struct{ io.Reader }

// newTCPProbe returns a check that a connection can be opened. That is what the backend's kernel does, and nothing more
// is seen: a program that accepts no connections passes until its backlog is full.
//
// The kindest end to it is one that the backend's program never hears of. With TCP_QUICKACK off before connect, Linux
// keeps back the handshake's last ACK; the RST that follows at once then ends a connection that has not been accepted
// yet. So accept returns nothing, nobody logs a client that says nothing, and neither end keeps TIME_WAIT. An ordinary
// close would have the program accept, read an end of file, and log it; and would leave us a minute of TIME_WAIT.
func newTCPProbe(t Target) probe {
	p := newPeer(t)
	if t.Dial == nil {
		p.dial = (&net.Dialer{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
			// Where it can't be had, the backend sees a connection that is reset.
			return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) })
		}}).DialContext
	}
	return func(ctx context.Context) outcome {
		begun := time.Now()
		c, err := p.connect(ctx)
		if err != nil {
			return p.failed(err)
		}
		c.abort()
		return succeeded(begun)
	}
}
