package kernels

import (
	"fmt"
	"os"
	"strings"
)

// initramfs is an archive in cpio's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst of the
// kernel's source), uncompressed: under emulation unpacking costs more than reading.
type initramfs struct {
	content strings.Builder
	entries int
}

// Modes of entries, as stat(2) has them.
const (
	modeDirectory = 0o040755
	modeFile      = 0o100755
)

// trailer is the name of an archive's last entry.
const trailer = "TRAILER!!!"

func (a *initramfs) directory(path string) { a.entry(path, modeDirectory, nil) }

func (a *initramfs) file(path string, content []byte) { a.entry(path, modeFile, content) }

// copyFile puts the file at from to path.
func (a *initramfs) copyFile(path, from string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.file(path, content)
	return nil
}

func (a *initramfs) entry(path string, mode uint32, content []byte) {
	name := strings.TrimPrefix(path, "/")
	a.entries++
	links := 1
	a.content.WriteString("070701")
	for _, field := range []uint32{
		uint32(a.entries), // inode
		mode,
		0, 0, // owner, group
		uint32(links),
		0, // modified
		uint32(len(content)),
		0, 0, 0, 0, // device the file is on, device the file is
		uint32(len(name) + 1),
		0, // checksum: none in this format
	} {
		fmt.Fprintf(&a.content, "%08x", field)
	}
	a.content.WriteString(name)
	a.content.WriteByte(0)
	a.pad()
	a.content.Write(content)
	a.pad()
}

// pad fills up to the next multiple of 4 bytes, where names' and contents' ends have to be.
func (a *initramfs) pad() {
	for a.content.Len()%4 != 0 {
		a.content.WriteByte(0)
	}
}

// write ends the archive and writes it to path.
func (a *initramfs) write(path string) error {
	a.entry(trailer, 0, nil)
	return os.WriteFile(path, []byte(a.content.String()), 0o644)
}
