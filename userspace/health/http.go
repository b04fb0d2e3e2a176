package health

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"fairlead/userspace/config"
)

const (
	maxHeader = 64 << 10 // bytes of an answer before its body
	maxBody   = 64 << 10 // bytes of a body that are looked at
	maxInfos  = 5        // informational answers (1xx) before the real one
	userAgent = "fairlead-health"
)

// httpProbe asks for a path by HTTP/1.1. It speaks on a connection of its own without net/http's Transport: nothing is
// reused, redirected or sent through a proxy, and a check costs no goroutines.
type httpProbe struct {
	peer
	request     []byte
	status      []config.StatusRange
	drain       []config.StatusRange
	body        *regexp.Regexp
	stateHeader string
}

func newHTTPProbe(t Target) probe {
	p := &httpProbe{peer: newPeer(t), status: t.Check.Status, drain: t.Check.DrainStatus, body: t.Check.Body,
		stateHeader: t.Check.StateHeader}
	var err error
	p.request, err = request(t, "Accept: */*\r\nConnection: close\r\n")
	if err != nil {
		return unaskable(err)
	}
	return p.check
}

// unaskable is the probe of a check that can't be put into words.
func unaskable(err error) probe {
	return func(context.Context) outcome {
		return outcome{verdict: moot, reason: oneLine("not checked: " + err.Error())}
	}
}

// request writes a target's request, up to but without its last, empty line.
func request(t Target, fields string) ([]byte, error) {
	host := t.Check.Host
	if host == "" {
		a := asked(t) // with its port, as Go's client has it; a zone is nobody else's concern (RFC 6874, 4)
		host = net.JoinHostPort(a.Addr().WithZone("").String(), strconv.Itoa(int(a.Port())))
	}
	if strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return nil, fmt.Errorf("host %q is not fit for a Host header", host)
	}
	path := t.Check.Path
	if path == "" {
		path = "/"
	}
	u, err := url.ParseRequestURI(path)
	if err != nil {
		return nil, fmt.Errorf("path %q: %w", path, errors.Unwrap(err))
	}
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: %s\r\n%s", u.RequestURI(), host, userAgent,
		fields), nil
}

// readers are bufio.Readers that are not in use.
var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 4096) }}

// answer is an HTTP answer being read. Its header is bounded, and so, by allow, is what follows.
type answer struct {
	*http.Response
	reader  *bufio.Reader
	limited io.LimitedReader
	incoming
}

// incoming remembers how what came began, and how it ended.
type incoming struct {
	io.Reader
	first []byte // at most len(httpVersion) bytes
	err   error
}

const httpVersion = "HTTP/"

func (in *incoming) Read(b []byte) (int, error) {
	n, err := in.Reader.Read(b)
	in.first = append(in.first, b[:min(n, len(httpVersion)-len(in.first))]...)
	in.err = err
	return n, err
}

// exchange sends a request and reads the answer's header. The caller releases the answer when it has read what it wants.
func (c *connection) exchange(request []byte) (*answer, error) {
	// Who answers before the request is through, and closes, is heard all the same.
	_, sent := c.Write(request)
	a := &answer{incoming: incoming{Reader: c}, reader: readers.Get().(*bufio.Reader)}
	a.limited = io.LimitedReader{R: &a.incoming, N: maxHeader}
	a.reader.Reset(&a.limited)
	for range maxInfos + 1 {
		r, err := http.ReadResponse(a.reader, nil)
		if err != nil {
			err = a.explain(err, sent)
			a.release()
			return nil, err
		}
		a.Response = r
		if r.StatusCode >= 200 || r.StatusCode == http.StatusSwitchingProtocols {
			return a, nil
		}
	}
	a.release()
	return nil, wrongf("more than %d informational answers", maxInfos)
}

// explain returns why an answer could not be read, given what ReadResponse and sending said.
func (a *answer) explain(err, sent error) error {
	switch {
	case !strings.HasPrefix(httpVersion, string(a.first)):
		return wrong("the answer is not HTTP")
	case a.limited.N <= 0:
		return wrongf("the answer's header is longer than %d KiB", maxHeader>>10)
	case a.incoming.err == nil:
		return wrong("the answer's header is not HTTP")
	case sent != nil && !timedOut(a.incoming.err):
		return during("send", sent)
	case errors.Is(a.incoming.err, io.EOF) && len(a.first) > 0:
		return wrong("closed in the middle of the answer's header")
	}
	return a.incoming.err
}

// allow bounds what may still be read.
func (a *answer) allow(bytes int64) { a.limited.N = bytes }

func (a *answer) release() {
	a.reader.Reset(nil)
	readers.Put(a.reader)
}

func (p *httpProbe) check(ctx context.Context) outcome {
	begun := time.Now()
	c, err := p.connect(ctx)
	if err != nil {
		return p.failed(err)
	}
	a, err := c.exchange(append(bytes.Clone(p.request), "\r\n"...))
	if err != nil {
		c.abort()
		return p.failed(err)
	}
	defer c.leave()
	defer a.release()

	said := stateIn(a.Header, p.stateHeader)
	draining := within(p.drain, a.StatusCode)
	switch {
	case said.maint:
		return outcome{verdict: maint, reason: oneLine(p.stateHeader + " says maint"), words: said.unknown}
	case !draining && !within(p.status, a.StatusCode):
		return outcome{verdict: bad, words: said.unknown,
			reason: oneLine(fmt.Sprintf("status %d, wanted %s", a.StatusCode, spelled(p.status)))}
	case said.down:
		return outcome{verdict: bad, reason: oneLine(p.stateHeader + " says down"), words: said.unknown}
	}
	// A status that says draining is the whole answer: its page is another than that of a ready backend.
	if p.body != nil && !draining {
		if err := p.readBody(a); err != nil {
			o := p.failed(err)
			o.words = said.unknown
			return o
		}
	}
	o := succeeded(begun)
	o.draining, o.percent, o.words = draining || said.drain, said.percent, said.unknown
	return o
}

// readBody reads the body's beginning and compares it.
func (p *httpProbe) readBody(a *answer) error {
	a.allow(16 * maxBody) // chunks of a byte take six
	body, err := io.ReadAll(io.LimitReader(a.Body, maxBody))
	switch {
	case err != nil && timedOut(err):
		return during("body", err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return wrong("body: cut short")
	case err != nil:
		return during("body", err)
	case !p.body.Match(body):
		return wrongf("the body does not match %s", p.body)
	}
	return nil
}

func within(ranges []config.StatusRange, status int) bool {
	return slices.ContainsFunc(ranges, func(r config.StatusRange) bool { return r.Contains(status) })
}

// spelled writes status ranges as the configuration has them.
func spelled(ranges []config.StatusRange) string {
	texts := make([]string, 0, len(ranges))
	for _, r := range ranges {
		texts = append(texts, r.String())
	}
	return strings.Join(texts, ", ")
}

// said is what an answer's state header says.
type said struct {
	maint, down, drain bool
	percent            uint32   // 100 where it names none
	unknown            []string // at most maxWords
}

// stateIn reads an answer's state header, by the field's name; "": it is not looked at. Each answer counts by itself:
// what it does not say again holds no longer.
func stateIn(header http.Header, name string) said {
	if name == "" {
		return said{percent: 100}
	}
	return parseState(header.Values(name))
}

// parseState reads the words of a state header: ready, up, drain, maint, down, or a percentage from 0 to 100. Of several
// that contradict each other the graver counts, and the last percentage.
func parseState(values []string) said {
	s := said{percent: 100}
	for _, value := range values {
		for word := range strings.FieldsFuncSeq(value, func(r rune) bool { return r == ' ' || r == '\t' || r == ',' }) {
			switch strings.ToLower(word) {
			case "ready", "up":
			case "drain":
				s.drain = true
			case "maint":
				s.maint = true
			case "down":
				s.down = true
			default:
				if p, ok := percentage(word); ok {
					s.percent = p
				} else if len(s.unknown) < maxWords {
					s.unknown = append(s.unknown, oneLine(word))
				}
			}
		}
	}
	return s
}

// percentage reads NN%, from 0% to 100%.
func percentage(word string) (uint32, bool) {
	digits, ok := strings.CutSuffix(word, "%")
	if !ok || digits == "" || strings.Trim(digits, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 32)
	return uint32(n), err == nil && n <= 100
}
