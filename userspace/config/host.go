package config

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// host is what a configuration asks of the machine that it is read on.
type host struct {
	name    func() (string, error)
	file    func(path string) ([]byte, error) // up to maxAuthorities and one byte
	program func(path string) error           // nil for what can be executed
}

var thisHost = host{name: os.Hostname, file: readFile, program: findProgram}

// errNotFile is told of what stands where a file belongs.
var errNotFile = errors.New("it is not a file")

// errNotExecutable is told of a file that nobody may execute.
var errNotExecutable = errors.New("it is not executable")

// regular asks before it opens: to open a device or a pipe may do something, or wait for ever.
func regular(path string) (fs.FileInfo, error) {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = errNotFile
	}
	return info, err
}

func readFile(path string) ([]byte, error) {
	if _, err := regular(path); err != nil {
		return nil, err
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, maxAuthorities+1))
}

func findProgram(path string) error {
	info, err := regular(path)
	if err == nil && info.Mode()&0o111 == 0 {
		err = errNotExecutable
	}
	return err
}

// cause returns an error of the file system without the path that the message names already.
func cause(err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		return at.Err
	}
	return err
}

// authority is what was made of a file of certificates.
type authority struct {
	roots *x509.CertPool
	bad   *complaint
}

// authority reads ca into h.
func (c *checker) authority(raw text, h *Health) {
	if raw.state == absent {
		return
	}
	h.CA = scalar(c, raw, "", parsePath)
	if h.CA == "" {
		h.Roots = nil
		return
	}
	a, known := c.authorities[h.CA]
	if !known {
		a.roots, a.bad = c.roots(h.CA)
		c.authorities[h.CA] = a
	}
	if h.Roots = a.roots; a.bad != nil {
		c.refuse(raw.place, a.bad.problem, a.bad.remedy)
	}
}

func (c *checker) roots(path string) (*x509.CertPool, *complaint) {
	const remedy = "name a file of certificates in PEM, which this machine must have as well"
	data, err := c.host.file(path)
	if err != nil {
		return nil, complain(remedy, "%s can't be read (%v)", path, cause(err))
	}
	if len(data) > maxAuthorities {
		return nil, complain(remedy, "%s is over %d MiB", path, maxAuthorities>>20)
	}
	roots, count, kinds := x509.NewCertPool(), 0, []string{}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			kinds = append(kinds, block.Type)
			continue
		}
		count++
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, complain("take it out of the file, or put it right", "certificate %d in %s can't be read (%s)", count, path,
				strings.TrimPrefix(err.Error(), "x509: "))
		}
		roots.AddCert(certificate)
	}
	switch {
	case count == 0 && len(kinds) > 0:
		return nil, complain(remedy, "%s holds no certificate, but a %s", path, strings.ToLower(kinds[0]))
	case count == 0:
		return nil, complain(remedy, "%s holds no certificate in PEM", path)
	}
	return roots, nil
}

// program reads the path of a command.
func (c *checker) program(s string) (string, *complaint) {
	path, bad := parsePath(s)
	if bad != nil {
		return "", bad
	}
	if path != s {
		return "", complain("write "+path, "%q names a directory, not a command", s)
	}
	remedy := "install it on this machine as well"
	switch err := c.host.program(path); {
	case err == nil:
		return path, nil
	case errors.Is(err, errNotExecutable):
		return "", complain(fmt.Sprintf("chmod +x %s", path), "%s is not executable", path)
	case errors.Is(err, errNotFile):
		return "", complain("name the command itself", "%s is not a file", path)
	case strings.Contains(path, " "):
		remedy = fmt.Sprintf("write its arguments as items of their own, as in [%s], or %s",
			strings.Join(strings.Fields(path), ", "), remedy)
		fallthrough
	default:
		return "", complain(remedy, "%s can't be found (%v)", path, cause(err))
	}
}
