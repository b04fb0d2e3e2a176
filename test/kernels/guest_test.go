package kernels

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Where a machine's initramfs has what it needs.
const (
	initPath   = "/init" // this test binary
	stepsPath  = "/steps.json"
	modulesDir = "/modules"
)

// A machine has two serial ports: the kernel's console, and the tests'.
const testsPort = "/dev/ttyS1"

// What init writes to the tests' port around the output of a step.
const (
	beginsMark = "@@@ begins "
	endsMark   = "@@@ ends "
	bootedMark = "@@@ booted "
	brokenMark = "@@@ broken "
)

// succeeded is a step's verdict if it is not an error.
const succeeded = "ok"

// powerOffMargin is left of a machine's time when its tests are told to give up: they say then where they stand.
const powerOffMargin = 20 * time.Second

// step is a test binary to run, with its arguments.
type step struct {
	Name string
	Args []string
}

// beInit is this binary as the first process of a machine. It runs the steps, one after the other, up to the first that
// fails, and ends the machine. What was printed says how it went.
func beInit() {
	err := runSteps()
	if err != nil {
		fmt.Printf("%s%v\n", brokenMark, err) // on the console: the tests' port may be what is broken
	}
	err = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	panic(fmt.Sprintf("power off: %v", err))
}

func runSteps() error {
	for _, m := range []struct{ kind, path string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"bpf", "/sys/fs/bpf"}, {"tmpfs", "/tmp"},
	} {
		if err := os.MkdirAll(m.path, 0o755); err != nil {
			return err
		}
		// Some kernels mount devtmpfs themselves.
		if err := unix.Mount(m.kind, m.path, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.path, err)
		}
	}
	port, err := os.OpenFile(testsPort, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer unix.IoctlSetInt(int(port.Fd()), unix.TCSBRK, 1) // what was written has gone out
	modules, err := os.ReadDir(modulesDir)
	if err != nil {
		return err
	}
	for _, entry := range modules {
		if err := insert(modulesDir + "/" + entry.Name()); err != nil {
			return fmt.Errorf("insert module %s: %w", entry.Name(), err)
		}
	}
	text, err := os.ReadFile(stepsPath)
	if err != nil {
		return err
	}
	var steps []step
	if err := json.Unmarshal(text, &steps); err != nil {
		return fmt.Errorf("read %s: %w", stepsPath, err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	fmt.Fprintf(port, "%s%s %s\n", bootedMark, unix.ByteSliceToString(name.Release[:]), sinceBoot().Round(time.Second))
	for _, s := range steps {
		left := *timeout - sinceBoot() - powerOffMargin
		if left < time.Second {
			return fmt.Errorf("no time is left for %s: raise -kernels.timeout", s.Name)
		}
		fmt.Fprintf(port, "%s%s\n", beginsMark, s.Name)
		began := time.Now()
		command := exec.Command(s.Args[0], append(s.Args[1:], "-test.timeout="+left.String())...)
		command.Dir = "/tmp"
		command.Env = []string{"HOME=/tmp", "PATH=/bin"}
		command.Stdout, command.Stderr = port, port
		verdict := succeeded
		if err := command.Run(); err != nil {
			verdict = strings.ReplaceAll(err.Error(), "\n", " ")
		}
		fmt.Fprintf(port, "\n%s%s %s %s\n", endsMark, s.Name, time.Since(began).Round(time.Second), verdict)
		if verdict != succeeded {
			return nil // what does not load would only fail again, test by test
		}
	}
	return nil
}

func insert(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FinitModule(int(file.Fd()), "", 0)
}

func sinceBoot() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		panic(err)
	}
	return time.Duration(now.Nano())
}
