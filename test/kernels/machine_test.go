package kernels

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// consoleLines is how much of a console is shown.
const consoleLines = 40

// machine is a virtual machine: two CPUs and 1 GiB, emulated in software, so that what it does depends on no host's
// processor. Its two serial ports are files in folder.
type machine struct {
	kernel, initramfs string
	folder            string
	devices           []string   // further arguments of qemu
	files             []*os.File // that they name, from descriptor 3 on
}

func (m machine) consolePath() string { return filepath.Join(m.folder, "console.log") }
func (m machine) testsPath() string   { return filepath.Join(m.folder, "tests.log") }

// boot runs the machine until it powers off.
func (m machine) boot(ctx context.Context) error {
	for _, path := range []string{m.consolePath(), m.testsPath()} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	// The kernel gives what stands behind "--" to init, panics reboot, and a reboot ends the machine.
	arguments := fmt.Sprintf("console=ttyS0 loglevel=4 panic=-1 rdinit=%s -- -kernels.init -kernels.timeout=%s",
		initPath, *timeout)
	command := exec.CommandContext(ctx, "qemu-system-x86_64", append([]string{"-accel", "tcg", "-cpu", "max", "-smp", "2",
		"-m", "3072", "-nodefaults", "-no-reboot", "-display", "none",
		"-serial", "file:" + m.consolePath(), "-serial", "file:" + m.testsPath(),
		"-kernel", m.kernel, "-initrd", m.initramfs, "-append", arguments}, m.devices...)...)
	command.ExtraFiles = m.files
	var complaints bytes.Buffer
	command.Stderr = &complaints
	// The machine ends with the thread that started it, so that a run which is killed leaves none behind.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := command.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("install qemu-system-x86: %w", err)
	case ctx.Err() != nil:
		return fmt.Errorf("ended by force: %w (-kernels.timeout is %s)", ctx.Err(), *timeout)
	case err != nil:
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(complaints.String()))
	}
	return nil
}

// testsOutput is what came out of the tests' port.
func (m machine) testsOutput() string { return readPort(m.testsPath()) }

// consoleEnd is the end of the kernel's console.
func (m machine) consoleEnd() string {
	lines := strings.Split(strings.TrimSpace(readPort(m.consolePath())), "\n")
	return strings.Join(lines[max(0, len(lines)-consoleLines):], "\n")
}

// readPort reads what a serial port put out; a port that was never opened has put out nothing.
func readPort(path string) string {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return strings.ReplaceAll(string(text), "\r\n", "\n")
}
