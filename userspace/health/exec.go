package health

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// A command gets no environment of ours but this and what names the backend.
	commandPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// Bytes kept of a command's output, which may be of any length.
	maxOutput = 4 << 10
	// How long a pipe is read that a process outside of the command's group still holds.
	outputTime = 100 * time.Millisecond
)

// execProbe runs a command, with the privileges of this process: exit status 0 is good. It and what it started run in a process group of their own, of which
// nothing is left afterwards: all are killed at the timeout, and what is left when the command itself has ended.
type execProbe struct {
	peer
	command     []string
	environment []string
}

func newExecProbe(t Target) probe {
	p := &execProbe{peer: peer{limit: t.Check.Timeout}, command: t.Check.Command, environment: []string{commandPath,
		"FAIRLEAD_SERVICE=" + t.Service, "FAIRLEAD_BACKEND=" + t.Backend, "FAIRLEAD_ADDRESS=" + t.Address.Addr().String(),
		fmt.Sprintf("FAIRLEAD_PORT=%d", t.Address.Port())}}
	if len(p.command) == 0 {
		return unaskable(errors.New("no command"))
	}
	return p.check
}

func (p *execProbe) check(ctx context.Context) outcome {
	begun := time.Now()
	output, theirs, err := os.Pipe()
	if err != nil {
		return p.mootly(err)
	}
	defer output.Close()
	cmd := exec.Cmd{Path: p.command[0], Args: p.command, Env: p.environment, Dir: "/", Stdout: theirs, Stderr: theirs,
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true}}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return p.mootly(err)
	}
	var reader sync.WaitGroup
	var last string
	reader.Go(func() { last = lastLine(output) })

	// The group is killed only while its leader, dead or alive, is not reaped: until then its number is nobody else's.
	var mu sync.Mutex
	reaped, killed := false, false
	stop := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if !reaped {
			killed = true
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
	})
	for {
		err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	took := time.Since(begun)
	mu.Lock()
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	err = cmd.Wait()
	reaped = true
	mu.Unlock()
	stop()
	output.SetReadDeadline(time.Now().Add(outputTime))
	reader.Wait()

	switch {
	case err == nil:
		return outcome{verdict: good, percent: 100, latency: took}
	case killed:
		return p.failed(ctx.Err())
	case last != "":
		return outcome{verdict: bad, reason: last}
	}
	return outcome{verdict: bad, reason: oneLine(err.Error())}
}

// mootly is the outcome of a command that could not be run: that says nothing of the backend.
func (p *execProbe) mootly(err error) outcome {
	return outcome{verdict: moot, reason: oneLine(fmt.Sprintf("not checked: run %s: %s", p.command[0], plain(err)))}
}

// lastLine reads to the end and returns the last line that isn't empty, as a reason.
func lastLine(output *os.File) string {
	var tail []byte
	buffer := make([]byte, maxOutput)
	for {
		n, err := output.Read(buffer)
		tail = append(tail, buffer[:n]...)
		tail = tail[max(0, len(tail)-maxOutput):]
		if err != nil {
			break
		}
	}
	for len(tail) > 0 {
		tail = bytes.TrimRight(tail, "\r\n")
		start := bytes.LastIndexAny(tail, "\r\n") + 1
		if line := oneLine(string(tail[start:])); line != "" {
			return line
		}
		tail = tail[:start]
	}
	return ""
}
