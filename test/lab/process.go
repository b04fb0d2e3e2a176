package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// gracePeriod is how long a process may take to end after SIGTERM.
	gracePeriod = 5 * time.Second
	// killPeriod is how long the kernel may take to end it after SIGKILL.
	killPeriod = 10 * time.Second
	pollPeriod = 5 * time.Millisecond
)

// Process is a program that runs in a node's namespace and leads a process group of its own; it is on record, so that
// it ends with the lab even if this process is killed.
type Process struct {
	cmd    *exec.Cmd
	name   string
	log    string
	record string
	done   chan struct{}
	err    error // of Wait; to be read after done
}

// Command prepares a program to run in the node's namespace, with the file systems of the caller (`ip netns exec`
// would hide /sys/fs/bpf). Give it to Start, so that it ends with the lab, or run it as any other.
func (n *Node) Command(ctx context.Context, argv ...string) *exec.Cmd {
	enter := []string{"--net=" + filepath.Join(namespaceRoot, n.namespace), "--"}
	return exec.CommandContext(ctx, "nsenter", append(enter, argv...)...)
}

// Start starts a command made by Command and puts it on record. Where the command names no output, both its outputs go
// to a log file, see Process.Log.
func (n *Node) Start(cmd *exec.Cmd) (*Process, error) {
	name := n.name
	if len(cmd.Args) > 3 { // nsenter --net=… -- program
		name += "-" + filepath.Base(cmd.Args[3])
	}
	return n.start(name, cmd)
}

func (n *Node) start(name string, cmd *exec.Cmd) (*Process, error) {
	l := n.lab
	p := &Process{cmd: cmd, name: name, done: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock() // over the start: no process begins once Close has begun to end them
	if l.closed {
		return nil, fmt.Errorf("start %s: the lab is closed", name)
	}
	if cmd.Stderr == nil {
		p.log = l.path("logs", fmt.Sprintf("%s-%d.log", name, len(l.processes)))
		log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
		defer log.Close()
		cmd.Stderr = log
		if cmd.Stdout == nil {
			cmd.Stdout = log
		}
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// A group of its own: a Ctrl-C at the terminal reaches the one who tells the story, who then closes the lab.
	cmd.SysProcAttr.Setpgid = true
	if cmd.WaitDelay == 0 {
		cmd.WaitDelay = time.Second // for children that hold on to an output of the one that ended
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p.record = l.path("processes", strconv.Itoa(p.PID()))
	start, err := startTime(p.PID())
	if err == nil {
		err = os.WriteFile(p.record, fmt.Appendf(nil, "%d %s\n", start, name), 0o644)
	}
	l.processes = append(l.processes, p)
	go p.wait()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("put %s on record: %w", name, err), p.Kill())
	}
	return p, nil
}

func (p *Process) wait() {
	p.err = p.cmd.Wait()
	// Children that outlive the leader still belong to its group, and stay on record.
	if unix.Kill(-p.PID(), 0) == unix.ESRCH {
		os.Remove(p.record)
	}
	close(p.done)
}

// PID is the process's id, which is its group's too.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Log is the path of the file that takes the process's output; empty where the command named outputs of its own. It
// goes with the lab.
func (p *Process) Log() string { return p.log }

// Done is closed once the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end of the process and returns what exec.Cmd.Wait does.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Signal sends a signal to the process alone; os.ErrProcessDone once it has ended.
func (p *Process) Signal(signal os.Signal) error { return p.cmd.Process.Signal(signal) }

// Kill ends the process's whole group by SIGKILL, as a crash would, and waits for the process's end.
func (p *Process) Kill() error { return p.endBy(unix.SIGKILL, killPeriod) }

// Stop asks the process's group to end by SIGTERM, and kills what has not ended after five seconds.
func (p *Process) Stop() error {
	if p.endBy(unix.SIGTERM, gracePeriod) == nil {
		return nil
	}
	return p.Kill()
}

func (p *Process) endBy(signal unix.Signal, patience time.Duration) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := unix.Kill(-p.PID(), signal); err != nil && err != unix.ESRCH {
		return fmt.Errorf("end %s (pid %d): %w", p.name, p.PID(), err)
	}
	unix.Kill(-p.PID(), unix.SIGCONT) // a stopped process takes no SIGTERM
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("end %s (pid %d): still there %v after %v", p.name, p.PID(), patience, signal)
	}
}

// record is what a lab remembers of a process: a pid alone may since have passed to a stranger.
type record struct {
	pid   int
	start uint64 // clock ticks after boot
	name  string
}

// endRecorded ends every recorded process that is still the one recorded, with its group, and what a leader that ended
// before left of its group in one of the given namespaces.
func endRecorded(dir string, namespaces []string) error {
	records, err := readRecords(dir)
	if err != nil {
		return err
	}
	living := func() []record {
		return slices.DeleteFunc(slices.Clone(records), func(r record) bool { return !alive(r.pid, r.start) })
	}
	for _, step := range []struct {
		signal   unix.Signal
		patience time.Duration
	}{{unix.SIGTERM, gracePeriod}, {unix.SIGKILL, killPeriod}} {
		for _, r := range living() {
			// ESRCH: it ended meanwhile.
			if err := unix.Kill(-r.pid, step.signal); err != nil && err != unix.ESRCH {
				return fmt.Errorf("end %s (pid %d): %w", r.name, r.pid, err)
			}
			unix.Kill(-r.pid, unix.SIGCONT) // a stopped process takes no SIGTERM
		}
		for deadline := time.Now().Add(step.patience); len(living()) > 0 && time.Now().Before(deadline); {
			time.Sleep(pollPeriod)
		}
	}
	if rest := living(); len(rest) > 0 {
		return fmt.Errorf("end %s (pid %d): still there after SIGKILL", rest[0].name, rest[0].pid)
	}
	return endStragglers(records, namespaces)
}

func endStragglers(records []record, namespaces []string) error {
	if len(records) == 0 {
		return nil
	}
	ours := map[uint64]bool{} // inodes of the lab's namespaces
	for _, name := range namespaces {
		var stat unix.Stat_t
		if unix.Stat(filepath.Join(namespaceRoot, name), &stat) == nil {
			ours[stat.Ino] = true
		}
	}
	var stragglers []record
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		fields, err := statFields(pid)
		if err != nil {
			continue // ended meanwhile
		}
		group, _ := strconv.Atoi(fields[2])
		start, _ := strconv.ParseUint(fields[19], 10, 64)
		for _, r := range records {
			var stat unix.Stat_t
			if group == r.pid && start >= r.start && pid != os.Getpid() &&
				unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &stat) == nil && ours[stat.Ino] {
				stragglers = append(stragglers, record{pid: pid, start: start, name: "child of " + r.name})
			}
		}
	}
	deadline := time.Now().Add(killPeriod)
	for _, r := range stragglers {
		if err := unix.Kill(r.pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			return fmt.Errorf("end %s (pid %d): %w", r.name, r.pid, err)
		}
		for alive(r.pid, r.start) {
			if time.Now().After(deadline) {
				return fmt.Errorf("end %s (pid %d): still there after SIGKILL", r.name, r.pid)
			}
			time.Sleep(pollPeriod)
		}
	}
	return nil
}

func readRecords(dir string) ([]record, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var records []record
	for _, entry := range entries {
		text, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the process ended meanwhile, and its record with it
		}
		if err != nil {
			return nil, err
		}
		var r record
		if r.pid, err = strconv.Atoi(entry.Name()); err != nil || r.pid <= 1 {
			continue // not written by a lab
		}
		if _, err := fmt.Sscan(string(text), &r.start, &r.name); err != nil {
			continue // torn by a kill while it was written: without its start time nothing is safe to end
		}
		records = append(records, r)
	}
	return records, nil
}

// alive tells whether a process is still the one that started then, and not a zombie waiting for its parent.
func alive(pid int, start uint64) bool {
	fields, err := statFields(pid)
	return err == nil && fields[19] == strconv.FormatUint(start, 10) && fields[0] != "Z" && fields[0] != "X"
}

// startTime is when a process started, in clock ticks after boot: proc_pid_stat(5), field 22.
func startTime(pid int) (uint64, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// statFields returns the fields of /proc/PID/stat from the third (the state) on.
func statFields(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// The second field is the program's name in parentheses, and may hold spaces and parentheses itself.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("read /proc/%d/stat: %q is too short", pid, text)
	}
	return fields, nil
}
