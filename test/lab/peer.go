package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// peerVariable is set in the environment of processes that are peers, to the kind of peer.
const peerVariable = "FAIRLEAD_LAB_PEER"

// startPeriod is how long a peer may take until it can be talked to.
const startPeriod = 30 * time.Second

var peerMainCalled bool

// PeerMain makes this process a peer and never returns, if a lab started it to be one; otherwise it returns
// at once. Peers are processes, made of the program that starts them, because each process has its own descriptors and
// its own crash. Call it first in main or TestMain.
func PeerMain() {
	peerMainCalled = true
	var role role
	switch kind := os.Getenv(peerVariable); kind {
	case "":
		return
	case "server":
		role = newServerRole()
	case "clients":
		role = newClientsRole()
	case "idle-clients":
		role = newIdleRole()
	case "bulk-clients":
		role = &bulkRole{}
	case "flow-server":
		role = newFlowServerRole()
	case "flows":
		role = newFlowsRole()
	default:
		fmt.Fprintf(os.Stderr, "%s=%q: no such kind of peer\n", peerVariable, kind)
		os.Exit(2)
	}
	// A kept lab outlives the one that reads our output.
	signal.Ignore(syscall.SIGPIPE)
	servePeer(role, os.Stdin, os.Stdout)
	os.Exit(0)
}

// role is what a peer does with commands. It is called concurrently.
type role interface {
	do(ctx context.Context, command string, body json.RawMessage) (answer any, err error)
}

// A request is a line to the peer, a reply a line back. Replies come in any order; the command "cancel" ends the
// context of the request of the same id, "detach" lets the peer live on after its input ends, "exit" ends it.
type request struct {
	ID      uint64          `json:"id"`
	Command string          `json:"command"`
	Body    json.RawMessage `json:"body,omitempty"`
}

type reply struct {
	ID    uint64          `json:"id"`
	Error string          `json:"error,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
}

// servePeer carries out commands until "exit", or the end of the input unless detached.
func servePeer(role role, input io.Reader, output io.Writer) {
	var (
		mu      sync.Mutex
		cancels = map[uint64]context.CancelFunc{}
		encoder = json.NewEncoder(output)
	)
	send := func(r reply) {
		mu.Lock()
		defer mu.Unlock()
		encoder.Encode(r) // fails only where nobody reads any more
	}
	detached := false
	for decoder := json.NewDecoder(bufio.NewReader(input)); ; {
		var req request
		if decoder.Decode(&req) != nil {
			if detached {
				select {}
			}
			return
		}
		switch req.Command {
		case "cancel":
			mu.Lock()
			if cancel := cancels[req.ID]; cancel != nil {
				cancel()
			}
			mu.Unlock()
			continue
		case "exit":
			send(reply{ID: req.ID})
			return
		case "detach":
			detached = true
			send(reply{ID: req.ID})
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		mu.Lock()
		cancels[req.ID] = cancel
		mu.Unlock()
		go func() {
			r := reply{ID: req.ID}
			answer, err := role.do(ctx, req.Command, req.Body)
			if err == nil {
				r.Body, err = json.Marshal(answer)
			}
			if err != nil {
				r.Error = err.Error()
			}
			mu.Lock()
			delete(cancels, req.ID)
			mu.Unlock()
			cancel()
			send(r)
		}()
	}
}

// decode reads a command's body.
func decode[T any](body json.RawMessage) (value T, err error) {
	if err = json.Unmarshal(body, &value); err != nil {
		err = fmt.Errorf("decode %T: %w", value, err)
	}
	return value, err
}

// peer is the parent's end of a peer.
type peer struct {
	*Process
	input *os.File

	mu      sync.Mutex
	ids     uint64
	waiting map[uint64]chan reply
}

// startPeer starts this program again as a peer in the node's namespace.
func (n *Node) startPeer(kind, name string) (*peer, error) {
	if !peerMainCalled {
		return nil, fmt.Errorf("start %s: peers are this program, started again: call lab.PeerMain first in main or TestMain",
			name)
	}
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start %s: find this program: %w", name, err)
	}
	theirInput, input, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer theirInput.Close()
	output, theirOutput, err := os.Pipe()
	if err != nil {
		input.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer theirOutput.Close()
	cmd := n.Command(context.Background(), program)
	cmd.Env = append(os.Environ(), peerVariable+"="+kind)
	cmd.Stdin, cmd.Stdout = theirInput, theirOutput
	process, err := n.start(name, cmd)
	if err != nil {
		input.Close()
		output.Close()
		return nil, err
	}
	p := &peer{Process: process, input: input, waiting: map[uint64]chan reply{}}
	go p.read(output)
	n.lab.mu.Lock()
	n.lab.peers = append(n.lab.peers, p)
	n.lab.mu.Unlock()
	return p, nil
}

func (p *peer) read(output *os.File) {
	defer output.Close()
	for decoder := json.NewDecoder(bufio.NewReader(output)); ; {
		var r reply
		if decoder.Decode(&r) != nil {
			break
		}
		p.mu.Lock()
		if answer := p.waiting[r.ID]; answer != nil {
			answer <- r // of capacity 1, and the only one
			delete(p.waiting, r.ID)
		}
		p.mu.Unlock()
	}
	// Nothing more is going to be answered.
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, answer := range p.waiting {
		close(answer)
	}
	p.waiting = nil
	p.input.Close()
}

// call has the peer do something and decodes its answer into answer, unless that is nil.
func (p *peer) call(ctx context.Context, command string, body, answer any) error {
	fail := func(err error) error { return fmt.Errorf("%s %s: %w", p.name, command, err) }
	encoded, err := json.Marshal(body)
	if err != nil {
		return fail(err)
	}
	replies := make(chan reply, 1)
	p.mu.Lock()
	if p.waiting == nil {
		p.mu.Unlock()
		return fail(p.ended())
	}
	p.ids++
	id := p.ids
	p.waiting[id] = replies
	err = p.send(request{ID: id, Command: command, Body: encoded})
	p.mu.Unlock()
	if err != nil && !errors.Is(err, syscall.EPIPE) { // EPIPE: the end is on its way to us
		return fail(err)
	}
	select {
	case r, ok := <-replies:
		switch {
		case !ok:
			return fail(p.ended())
		case r.Error != "":
			return fail(errors.New(r.Error))
		case answer == nil:
			return nil
		}
		if err := json.Unmarshal(r.Body, answer); err != nil {
			return fail(err)
		}
		return nil
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.waiting, id)
		if p.waiting != nil {
			p.send(request{ID: id, Command: "cancel"})
		}
		return fail(ctx.Err())
	}
}

// send writes a line; the caller holds the mutex.
func (p *peer) send(r request) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = p.input.Write(append(line, '\n'))
	return err
}

// ended says how the process ended, and its last words.
func (p *peer) ended() error {
	text, _ := os.ReadFile(p.log)
	if last := bytes.TrimSpace(text[max(0, len(text)-2000):]); len(last) > 0 {
		return fmt.Errorf("the process has ended: %v: %s", p.Wait(), last)
	}
	return fmt.Errorf("the process has ended: %v", p.Wait())
}

// exit ends the peer in an orderly way.
func (p *peer) exit(ctx context.Context) error {
	if err := p.call(ctx, "exit", nil, nil); err != nil {
		return errors.Join(err, p.Kill())
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return errors.Join(ctx.Err(), p.Kill())
	}
}

func (p *peer) detach() error {
	select {
	case <-p.done:
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), startPeriod)
	defer cancel()
	return p.call(ctx, "detach", nil, nil)
}

// samplesKept is how many failures of a kind are kept word for word.
const samplesKept = 10

// reason shortens an error of the WebSocket library to what happened on the connection.
func reason(err error) string {
	text := err.Error()
	for _, noise := range []string{"failed to get reader: ", "failed to read frame header: ", "failed to write msg: "} {
		text = strings.ReplaceAll(text, noise, "")
	}
	return text
}
