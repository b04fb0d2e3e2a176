package health

import (
	"crypto/tls"
	"net"
	"net/netip"
)

// tlsConfig says how a target is spoken to by TLS. Nothing is resumed: each check sees the certificate.
func tlsConfig(t Target) *tls.Config {
	name := t.Check.SNI
	if name == "" {
		name = hostName(t.Check.Host)
	}
	if name == "" {
		// The certificate is then to be for the address; none is sent as a name (RFC 6066, 3).
		name = asked(t).Addr().WithZone("").Unmap().String()
	}
	return &tls.Config{ServerName: name, RootCAs: t.Check.Roots, InsecureSkipVerify: !t.Check.Verify,
		NextProtos: []string{"http/1.1"}}
}

// hostName returns the name in a Host header, without port; "" where it is an address or nothing.
func hostName(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if len(host) > 1 && host[0] == '[' && host[len(host)-1] == ']' {
		host = host[1 : len(host)-1]
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return ""
	}
	return host
}
