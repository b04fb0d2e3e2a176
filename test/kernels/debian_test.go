package kernels

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// keyring verifies every suite of Debian's archive. Package debian-archive-keyring brings it.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// suite is a suite of Debian's archive, whose kernel is tried.
type suite struct {
	name     string
	security bool // it has a sibling in the security archive
}

// modules are those that the tests need and no Debian kernel has built in. None of them depends on another.
var modules = []string{"veth"}

// Where packages keep what is taken out of them. Newer ones have usr/lib for lib, and the kernel among its modules.
var (
	kernelFile = regexp.MustCompile(`(^|/)(boot/vmlinuz-[^/]+|lib/modules/[^/]+/vmlinuz)$`)
	moduleFile = regexp.MustCompile(`(^|/)lib/modules/[^/]+/kernel/.*/([^/]+)\.ko(\.xz)?$`)
)

// packagePattern is the name of a package that holds a kernel or its modules: in one, or (newer ones) in two.
var packagePattern = regexp.MustCompile(`^linux-(image|binary|modules)-[0-9]`)

// kernelFiles are a kernel unpacked.
type kernelFiles struct {
	image   string
	modules map[string]string // by name, decompressed
}

// present says what folder holds, if it is all that is needed.
func present(folder string, needed []string) (kernelFiles, bool) {
	files := kernelFiles{filepath.Join(folder, "vmlinuz"), make(map[string]string)}
	all := []string{files.image}
	for _, name := range needed {
		files.modules[name] = filepath.Join(folder, name+".ko")
		all = append(all, files.modules[name])
	}
	for _, file := range all {
		if _, err := os.Stat(file); err != nil {
			return kernelFiles{}, false
		}
	}
	return files, true
}

// fetch gives the suite's kernel with these modules from the cache or, where that lacks any, from Debian.
func (s suite) fetch(ctx context.Context, cache string, needed []string) (kernelFiles, error) {
	folder := filepath.Join(cache, s.name)
	if files, ok := present(folder, needed); ok {
		return files, nil
	}
	aside := filepath.Join(cache, ".fetch") // a killed run may have left one
	if err := errors.Join(os.RemoveAll(folder), os.RemoveAll(aside), os.Mkdir(aside, 0o755)); err != nil {
		return kernelFiles{}, err
	}
	defer os.RemoveAll(aside)
	config, err := s.configureAPT(ctx, filepath.Join(aside, "apt"))
	if err != nil {
		return kernelFiles{}, err
	}
	if _, err := run(ctx, aside, "apt-get", "-c", config, "-qq", "update"); err != nil {
		return kernelFiles{}, err
	}
	names, err := kernelPackages(ctx, config)
	if err != nil {
		return kernelFiles{}, err
	}
	if _, err := run(ctx, aside, "apt-get", append([]string{"-c", config, "-qq", "download"}, names...)...); err != nil {
		return kernelFiles{}, err
	}
	packages, err := filepath.Glob(filepath.Join(aside, "*.deb"))
	if err != nil {
		return kernelFiles{}, err
	}
	unpacked := filepath.Join(aside, "unpacked")
	if err := os.Mkdir(unpacked, 0o755); err != nil {
		return kernelFiles{}, err
	}
	for _, file := range packages {
		if err := unpack(ctx, file, unpacked); err != nil {
			return kernelFiles{}, fmt.Errorf("unpack %s: %w", filepath.Base(file), err)
		}
	}
	if _, ok := present(unpacked, needed); !ok {
		return kernelFiles{}, fmt.Errorf("%s lack the kernel or its modules %s",
			strings.Join(names, ", "), strings.Join(needed, ", "))
	}
	if err := os.Rename(unpacked, folder); err != nil {
		return kernelFiles{}, err
	}
	files, _ := present(folder, needed)
	return files, nil
}

// configureAPT writes a configuration under which apt knows this suite alone and keeps everything in folder: the
// system's own lists, packages and hooks stay as they are. What the system has on how to reach its mirror holds.
func (s suite) configureAPT(ctx context.Context, folder string) (string, error) {
	archive, security, err := mirrors(ctx)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(keyring); err != nil {
		return "", fmt.Errorf("install debian-archive-keyring: %w", err)
	}
	for _, part := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(folder, part), 0o755); err != nil {
			return "", err
		}
	}
	const line = "deb [arch=amd64 lang=none target=Packages signed-by=%s] %s %s main\n"
	sources := fmt.Sprintf(line, keyring, archive, s.name)
	if s.security {
		sources += fmt.Sprintf(line, keyring, security, s.name+"-security")
	}
	config := fmt.Sprintf(`Dir::State "%[1]s";
Dir::State::lists "%[1]s/lists";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s/cache";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-";
Dir::Etc::preferencesparts "-";
APT::Architecture "amd64";
#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
`, folder)
	for name, text := range map[string]string{"status": "", "sources.list": sources, "apt.conf": config} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	return filepath.Join(folder, "apt.conf"), nil
}

// mirrors are where this system has Debian's archive and Debian's security archive from.
func mirrors(ctx context.Context) (archive, security string, err error) {
	// These are only printed, not fetched.
	output, err := run(ctx, "", "apt-get", "update", "--print-uris")
	if err != nil {
		return "", "", err
	}
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", "", err
	}
	return mirrorsIn(output, string(release))
}

// releaseURI is the address of a suite's index as `apt-get update --print-uris` quotes it.
var releaseURI = regexp.MustCompile(`(?m)^'([^']+)/dists/([^/']+)/InRelease'`)

var codename = regexp.MustCompile(`(?m)^VERSION_CODENAME="?([a-z]+)"?$`)

// mirrorsIn finds the mirrors in what apt prints: they are those that serve the system's own release. Other sources
// have suites of other names.
func mirrorsIn(uris, osRelease string) (archive, security string, err error) {
	own := []string{"stable", "testing", "unstable", "sid"}
	if match := codename.FindStringSubmatch(osRelease); match != nil {
		own = append(own, match[1])
	}
	for _, match := range releaseURI.FindAllStringSubmatch(uris, -1) {
		name, isSecurity := strings.CutSuffix(match[2], "-security")
		switch {
		case !slices.Contains(own, name):
		case isSecurity && security == "":
			security = match[1]
		case !isSecurity && archive == "":
			archive = match[1]
		}
	}
	if archive == "" || security == "" {
		return "", "", fmt.Errorf("find Debian's mirrors: apt's sources name no archive and security archive of %s: "+
			"kernels can only be fetched on Debian; elsewhere bring a cache that has them", strings.Join(own, ", "))
	}
	return archive, security, nil
}

// kernelPackages names the packages that make up the suite's newest kernel.
func kernelPackages(ctx context.Context, config string) ([]string, error) {
	const all = "linux-image-amd64"
	policy, err := run(ctx, "", "apt-cache", "-c", config, "policy", all)
	if err != nil {
		return nil, err
	}
	match := regexp.MustCompile(`Candidate: (\S+)`).FindStringSubmatch(policy)
	if match == nil {
		return nil, fmt.Errorf("apt knows no %s", all)
	}
	// Of several versions `depends` tells of one only: fetch this one's record, then what hangs on it.
	record, err := run(ctx, "", "apt-cache", "-c", config, "show", all+"="+match[1])
	if err != nil {
		return nil, err
	}
	depends := regexp.MustCompile(`(?m)^Depends: (.*)$`).FindStringSubmatch(record)
	if depends == nil {
		return nil, fmt.Errorf("%s %s depends on nothing", all, match[1])
	}
	arguments := []string{"-c", config, "depends", "--recurse", "--important"}
	for _, dependency := range strings.Split(depends[1], ", ") {
		name, _, _ := strings.Cut(dependency, " ")
		arguments = append(arguments, name)
	}
	tree, err := run(ctx, "", "apt-cache", arguments...)
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(tree) {
		if name := strings.TrimRight(line, "\n"); packagePattern.MatchString(name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s %s leads to no kernel", all, match[1])
	}
	return names, nil
}

// unpack puts the kernel and the modules that a package has into folder.
func unpack(ctx context.Context, file, folder string) (err error) {
	command := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", file)
	var complaints bytes.Buffer
	command.Stderr = &complaints
	output, err := command.StdoutPipe()
	if err != nil {
		return err
	}
	if err := command.Start(); err != nil {
		return err
	}
	files := tar.NewReader(bufio.NewReaderSize(output, 1<<20))
	for err == nil {
		var header *tar.Header
		if header, err = files.Next(); err == nil && header.Typeflag == tar.TypeReg {
			err = keep(ctx, path.Clean(header.Name), files, folder)
		}
	}
	if err == io.EOF {
		_, err = io.Copy(io.Discard, output) // padding
	} else {
		command.Process.Kill()
	}
	if waitErr := command.Wait(); err == nil && waitErr != nil {
		err = fmt.Errorf("%w: %s", waitErr, &complaints)
	}
	return err
}

// keep writes one file of a package to folder, if it is one of those that are needed.
func keep(ctx context.Context, name string, content io.Reader, folder string) error {
	if kernelFile.MatchString(name) {
		return write(filepath.Join(folder, "vmlinuz"), content)
	}
	match := moduleFile.FindStringSubmatch(name)
	if match == nil || !slices.Contains(modules, match[2]) && !slices.Contains(virtioModules, match[2]) {
		return nil
	}
	if match[3] != "" {
		command := exec.CommandContext(ctx, "xz", "-dc")
		var plain, complaints bytes.Buffer
		command.Stdin, command.Stdout, command.Stderr = content, &plain, &complaints
		if err := command.Run(); err != nil {
			return fmt.Errorf("decompress %s: %w: %s", name, err, &complaints)
		}
		content = &plain
	}
	return write(filepath.Join(folder, match[2]+".ko"), content)
}

func write(path string, content io.Reader) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	return errors.Join(err, file.Close())
}

// run runs a command to its end and gives its output; the error has what it complained of.
func run(ctx context.Context, folder, name string, arguments ...string) (string, error) {
	command := exec.CommandContext(ctx, name, arguments...)
	var output, complaints bytes.Buffer
	command.Dir, command.Stdout, command.Stderr = folder, &output, &complaints
	command.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	if err := command.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(arguments, " "), err,
			strings.TrimSpace(complaints.String()))
	}
	return output.String(), nil
}

// TestMirrors: the system's own release tells Debian's mirrors from other sources.
func TestMirrors(t *testing.T) {
	const uris = `'http://vendor.example/dists/vendor-bookworm/InRelease' vendor 0 
'http://mirror.example/debian/dists/bookworm/InRelease' a 0 
'http://mirror.example/debian/dists/bookworm-updates/InRelease' b 0 
'http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' c 0 
'http://mirror.example/debian-security/dists/bookworm-security/InRelease' d 0 
`
	archive, security, err := mirrorsIn(uris, "ID=debian\nVERSION_CODENAME=bookworm\n")
	must(t, err)
	if archive != "http://mirror.example/debian" || security != "http://mirror.example/debian-security" {
		t.Errorf("archive %s, security %s", archive, security)
	}
	if archive, _, err := mirrorsIn(uris, "ID=other\nVERSION_CODENAME=other\n"); err == nil {
		t.Errorf("another system's archive is %s", archive)
	}
}
