package health

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"
)

// A reason names the same failure by the same text each time: no ports of ours, no times of day, no random keys. A new
// text is news.

// maxReason is the longest reason in bytes.
const maxReason = 127

// phaseError is an error and what was being done, as in "connect: connection refused".
type phaseError struct {
	doing string
	err   error
}

func (e *phaseError) Error() string { return e.doing + ": " + e.err.Error() }
func (e *phaseError) Unwrap() error { return e.err }

func during(doing string, err error) error { return &phaseError{doing, err} }

// wrong is what the other end did wrong, in words of our own.
type wrong string

func (w wrong) Error() string { return string(w) }

func wrongf(format string, args ...any) error { return wrong(fmt.Sprintf(format, args...)) }

// failed is the outcome of a check that ended with err.
func (p *peer) failed(err error) outcome {
	o := outcome{verdict: bad, timeout: timedOut(err)}
	text := ""
	if e, ok := errors.AsType[*phaseError](err); ok {
		text, err = e.doing+": ", e.err
	}
	if ours(err) {
		o.verdict, text = moot, "not checked: "+text
	}
	if o.timeout {
		text += "no answer within " + p.limit.String()
	} else {
		text += plain(err)
	}
	o.reason = oneLine(text)
	return o
}

func timedOut(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return true
	}
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

// ours reports whether an error is for want of something on this host, and so says nothing of a backend.
func ours(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return errors.Is(err, context.Canceled)
	}
	switch errno {
	case syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EAGAIN, syscall.EADDRNOTAVAIL:
		return true
	}
	return false
}

// plain returns an error's text without what Go puts around it.
func plain(err error) string {
	if e, ok := errors.AsType[wrong](err); ok {
		return string(e)
	}
	if e, ok := errors.AsType[x509.HostnameError](err); ok {
		return fmt.Sprintf("the certificate is not for %s", e.Host)
	}
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		if e.Reason == x509.Expired && e.Cert != nil {
			if time.Now().Before(e.Cert.NotBefore) {
				return "the certificate is valid only from " + e.Cert.NotBefore.UTC().Format(time.RFC3339)
			}
			return "the certificate has expired on " + e.Cert.NotAfter.UTC().Format(time.RFC3339)
		}
		return "the certificate is not valid: " + strings.TrimPrefix(e.Error(), "x509: ")
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "the certificate is signed by an unknown authority"
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "the answer is not TLS"
	}
	if e, ok := errors.AsType[syscall.Errno](err); ok {
		return e.Error()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "closed without an answer"
	}
	text := err.Error()
	for _, prefix := range []string{"tls: failed to verify certificate: ", "tls: ", "x509: ", "remote error: tls: "} {
		text = strings.TrimPrefix(text, prefix)
	}
	return text
}

// oneLine makes any text fit for a reason: printable, one line, bounded.
func oneLine(text string) string {
	text = strings.Join(strings.FieldsFunc(strings.ToValidUTF8(text, "?"), func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r)
	}), " ")
	if len(text) <= maxReason {
		return text
	}
	end := maxReason - len("…")
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "…"
}
