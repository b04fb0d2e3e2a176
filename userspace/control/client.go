package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotRunning is matched by a Client's errors where there is no socket, or nobody listens at it.
var ErrNotRunning = errors.New("the daemon is not running")

// Client asks the daemon at a socket. It is a Handler: what one of its methods answers is what the daemon's did.
type Client struct {
	path string
	http *http.Client
}

var _ Handler = (*Client)(nil)

// Dial is a Client of the socket at path. Nothing is opened before something is asked.
func Dial(path string) *Client {
	c := &Client{path: path}
	c.http = &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}}
	return c
}

// Reload is Handler's. Its error holds every line of the daemon's, as all of Client's do.
func (c *Client) Reload(ctx context.Context) (changes []string, err error) {
	err = c.ask(ctx, http.MethodPost, pathReload, nothing{}, &changes)
	return changes, err
}

// Drain is Handler's.
func (c *Client) Drain(ctx context.Context, r DrainRequest) error {
	return c.ask(ctx, http.MethodPost, pathDrain, r, new(nothing))
}

// Resume is Handler's.
func (c *Client) Resume(ctx context.Context, backend string) error {
	return c.ask(ctx, http.MethodPost, pathResume, resumeRequest{backend}, new(nothing))
}

// Weight is Handler's.
func (c *Client) Weight(ctx context.Context, backend string, weight *uint32) error {
	return c.ask(ctx, http.MethodPost, pathWeight, weightRequest{backend, weight}, new(nothing))
}

// Drains is Handler's.
func (c *Client) Drains(ctx context.Context) (drains []Drain, err error) {
	err = c.ask(ctx, http.MethodGet, pathDrains, nothing{}, &drains)
	return drains, err
}

// Close is Handler's.
func (c *Client) Close(ctx context.Context, r CloseRequest) (done string, err error) {
	err = c.ask(ctx, http.MethodPost, pathClose, r, &done)
	return done, err
}

// ask sends a request and decodes the answer.
func (c *Client) ask(ctx context.Context, method, path string, asked request, answer any) error {
	if err := asked.check(); err != nil {
		return err
	}
	body, err := json.Marshal(asked)
	if err != nil {
		return fmt.Errorf("write the request: %w", err)
	}
	if method == http.MethodGet {
		body = nil
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://fairlead"+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	r.Header.Set("Content-Type", typeJSON)
	response, err := c.http.Do(r)
	if err != nil {
		return c.unanswered(ctx, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return c.unanswered(ctx, err)
	}
	if response.StatusCode != http.StatusOK {
		if len(text) == 0 {
			return fmt.Errorf("the daemon at %s answered %s", c.path, response.Status)
		}
		return errors.New(strings.TrimRight(string(text), "\n"))
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return nil
}

// unanswered says why there was no answer.
func (c *Client) unanswered(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var op *net.OpError
	opening := errors.As(err, &op) && op.Op == "dial"
	switch {
	case opening && errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: there is no socket at %s", ErrNotRunning, c.path)
	case opening && errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w: nobody listens at %s", ErrNotRunning, c.path)
	case opening && errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("open %s: permission denied: %s", c.path, whoMay(c.path))
	case opening:
		return fmt.Errorf("open %s: %w", c.path, op.Err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return fmt.Errorf("the daemon at %s went away before it had answered: its log says why, "+
			"and whether the request was carried out", c.path)
	}
	return fmt.Errorf("ask the daemon at %s: %w", c.path, err)
}

// whoMay says who may open a socket.
func whoMay(path string) string {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Sprintf("only who may look into %s may open it: try as root", filepath.Dir(path))
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "try as root"
	}
	owner, group := strconv.Itoa(int(stat.Uid)), strconv.Itoa(int(stat.Gid))
	if u, err := user.LookupId(owner); err == nil {
		owner = u.Username
	}
	if g, err := user.LookupGroupId(group); err == nil {
		group = g.Name
	}
	text := fmt.Sprintf("user %s may open it", owner)
	if info.Mode().Perm()&0o020 != 0 {
		text = fmt.Sprintf("user %s and members of group %s may open it", owner, group)
	}
	if stat.Uid != 0 {
		text += ", and root"
	}
	return text
}
