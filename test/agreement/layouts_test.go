package agreement

import (
	"encoding/binary"
	"go/ast"
	"go/parser"
	"go/token"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"fairlead/bpf"
)

const generated = "../../bpf/fairlead_bpfel.go"

// layouts are all structs that Go and the data plane share, as Go has them.
var layouts = []any{
	bpf.FairleadAddress6{}, bpf.FairleadBackend{}, bpf.FairleadBackendLabel{}, bpf.FairleadBitmapSet{},
	bpf.FairleadBudget{}, bpf.FairleadClock{}, bpf.FairleadConnection{}, bpf.FairleadControlBlock{}, bpf.FairleadCounterSet{},
	bpf.FairleadCheckFrame{}, bpf.FairleadDevice{}, bpf.FairleadFillRequest{}, bpf.FairleadFragment{}, bpf.FairleadFragmentKey{},
	bpf.FairleadHalfOpen{}, bpf.FairleadHop{}, bpf.FairleadJournalEvent{}, bpf.FairleadPath{}, bpf.FairleadPathKey{}, bpf.FairleadPool{},
	bpf.FairleadPortSet{}, bpf.FairleadReply4{}, bpf.FairleadReply6{}, bpf.FairleadScratch{}, bpf.FairleadService{},
	bpf.FairleadServiceKey4{}, bpf.FairleadServiceKey6{}, bpf.FairleadServiceLabel{}, bpf.FairleadSource{},
	bpf.FairleadTendRecord{}, bpf.FairleadTendRequest{}, bpf.FairleadTraffic{}, bpf.FairleadTuple4{},
	bpf.FairleadTuple6{}, bpf.FairleadWayBack{},
}

// Every struct that Go shares with the data plane has the layout that the compiled object's type information tells,
// both in memory (mapped maps) and as package binary writes it (requests).
func TestLayouts(t *testing.T) {
	spec, err := bpf.LoadFairlead()
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, layout := range layouts {
		g := reflect.TypeOf(layout)
		have = append(have, g.Name())
		name := snake(strings.TrimPrefix(g.Name(), "Fairlead"))
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Errorf("find struct %s in the object: %v", name, err)
			continue
		}
		compare(t, name, c, g)
		if written := binary.Size(reflect.Zero(g).Interface()); written != int(c.Size) {
			t.Errorf("struct %s is written as %d bytes, in C it has %d", name, written, c.Size)
		}
	}
	slices.Sort(have)
	if all := sharedStructs(t); !slices.Equal(have, all) {
		t.Errorf("structs compared: %v\nstructs generated into %s: %v", have, generated, all)
	}
}

// compare goes through a C type and the Go type made of it.
func compare(t *testing.T, path string, c btf.Type, g reflect.Type) {
	t.Helper()
	size, err := btf.Sizeof(c)
	if err != nil {
		t.Fatalf("size of %s: %v", path, err)
	}
	if size != int(g.Size()) {
		t.Errorf("%s has %d bytes in C, %d in Go", path, size, g.Size())
	}
	switch c := btf.UnderlyingType(c).(type) {
	case *btf.Struct:
		compareMembers(t, path, c.Members, g)
	case *btf.Union:
		// Go has the first way of reading it alone.
		compareMembers(t, path, c.Members[:1], g)
	case *btf.Array:
		if g.Kind() != reflect.Array || g.Len() != int(c.Nelems) {
			t.Errorf("%s is an array of %d in C, %v in Go", path, c.Nelems, g)
			return
		}
		compare(t, path+"[]", c.Type, g.Elem())
	case *btf.Int:
		zero, signed := reflect.Zero(g), c.Encoding == btf.Signed
		if zero.CanInt() != signed || zero.CanUint() == signed {
			t.Errorf("%s is %v in C, %v in Go", path, c, g)
		}
	default:
		t.Errorf("%s is %v in C: this comparison doesn't know how that lies in Go", path, c)
	}
}

func compareMembers(t *testing.T, path string, members []btf.Member, g reflect.Type) {
	t.Helper()
	if g.Kind() != reflect.Struct {
		t.Errorf("%s is a struct in C, %v in Go", path, g)
		return
	}
	var names []string
	for _, member := range members {
		field, ok := g.FieldByName(camel(member.Name))
		if !ok {
			t.Errorf("%s.%s is not in Go", path, member.Name)
			continue
		}
		names = append(names, field.Name)
		if member.Offset.Bytes() != uint32(field.Offset) || member.BitfieldSize != 0 {
			t.Errorf("%s.%s stands at byte %d in C, %d in Go", path, member.Name, member.Offset.Bytes(), field.Offset)
		}
		compare(t, path+"."+member.Name, member.Type, field.Type)
	}
	for i := range g.NumField() {
		if name := g.Field(i).Name; name != "_" && !slices.Contains(names, name) {
			t.Errorf("%s.%s is in Go alone", path, name)
		}
	}
}

// Keys of hash tables are compared byte by byte: padding that has no name, and so no value, would make two of one.
func TestKeysHaveNoHoles(t *testing.T) {
	spec, err := bpf.LoadFairlead()
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range spec.Maps {
		if m.Type != ebpf.Hash && m.Type != ebpf.LRUHash {
			continue
		}
		key, ok := btf.UnderlyingType(m.Key).(*btf.Struct)
		if !ok {
			continue
		}
		end := uint32(0)
		for _, member := range key.Members {
			if member.Offset.Bytes() != end {
				t.Errorf("key of %s: a hole before %s, at byte %d", name, member.Name, end)
			}
			size, err := btf.Sizeof(member.Type)
			if err != nil {
				t.Fatal(err)
			}
			end = member.Offset.Bytes() + uint32(size)
		}
		if end != key.Size {
			t.Errorf("key of %s: a hole at its end, at byte %d", name, end)
		}
	}
}

// sharedStructs are the names of the structs that bpf2go has generated with the host's layout.
func sharedStructs(t *testing.T) (names []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), generated, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	for _, declaration := range file.Decls {
		types, ok := declaration.(*ast.GenDecl)
		if !ok || types.Tok != token.TYPE {
			continue
		}
		for _, spec := range types.Specs {
			named := spec.(*ast.TypeSpec)
			layout, ok := named.Type.(*ast.StructType)
			if !ok || len(layout.Fields.List) == 0 {
				continue
			}
			mark, ok := layout.Fields.List[0].Type.(*ast.SelectorExpr)
			if ok && mark.Sel.Name == "HostLayout" {
				names = append(names, named.Name.Name)
			}
		}
	}
	slices.Sort(names)
	return names
}

// snake is the C name of what bpf2go names in Go; camel is the way back.
func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

func camel(name string) string {
	var b strings.Builder
	for part := range strings.SplitSeq(name, "_") {
		b.WriteString(strings.ToUpper(part[:1]) + part[1:])
	}
	return b.String()
}
