package test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "fairlead"

// mayImport is which rooms a room may import: arrows run one way. "*" is all of them.
var mayImport = map[string][]string{
	"bpf":       nil,
	"maps":      {"bpf"},
	"loader":    {"bpf", "maps"},
	"userspace": {"loader", "maps"},
	"cmd":       {"*"},
	"test":      {"*"},
}

// goPackage is what `go list -json` tells of a package.
type goPackage struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

// TestRooms holds the house together: no room imports one that it may not, in its tests neither, packages of userspace
// meet in its daemon alone (all may take the configuration's checked values), and the lab knows nothing of Fairlead.
func TestRooms(t *testing.T) {
	listed := 0
	for _, p := range mustList(t) {
		listed++
		path, ok := strings.CutPrefix(p.ImportPath, module+"/")
		if !ok {
			t.Errorf("%s is outside of all rooms", p.ImportPath)
			continue
		}
		room, _, _ := strings.Cut(path, "/")
		allowed, ok := mayImport[room]
		if !ok {
			t.Errorf("%s: there is no room %s", p.ImportPath, room)
			continue
		}
		for _, imported := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			target, ours := strings.CutPrefix(imported, module+"/")
			if !ours || target == path {
				continue
			}
			if !importAllowed(path, room, target, allowed) {
				t.Errorf("%s imports %s, which it may not", path, target)
			}
		}
	}
	if listed < len(mayImport) {
		t.Errorf("%d packages are listed: that can't be all", listed)
	}
}

func importAllowed(path, room, target string, allowed []string) bool {
	targetRoom, _, _ := strings.Cut(target, "/")
	switch {
	case path == "test/lab":
		return false
	case room == "userspace" && targetRoom == room:
		return path == "userspace/daemon" || target == "userspace/config" // its checked values are for all
	case targetRoom == room:
		return true
	}
	return slices.Contains(allowed, "*") || slices.Contains(allowed, targetRoom)
}

func mustList(t *testing.T) (packages []goPackage) {
	t.Helper()
	command := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	command.Dir = ".."
	output, err := command.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v: %s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	for decoder := json.NewDecoder(strings.NewReader(string(output))); ; {
		var p goPackage
		if err := decoder.Decode(&p); err == io.EOF {
			return packages
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		packages = append(packages, p)
	}
}
