package config

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

type node = ast.Node

const (
	maxNesting = 32      // of brackets, and of dashes in one line; the deepest field of ours stands 5 deep
	maxNodes   = 2 << 20 // keys and values read, aliases followed: 65535 backends with nine fields of health take 2.0 million
	maxMerges  = 8       // merges inside merges
)

// decoder reads a syntax tree into raw fields. It walks the tree itself, because the library's own decoding stops at
// the first error and forgets where values stood.
type decoder struct {
	source  source
	anchors map[string]*ast.AnchorNode
	places  map[string]place // where the fields that are there stand
	errs    Errors

	nodes    int    // keys and values read
	overflow *Error // set once nodes is maxNodes
}

// decode returns nil for a file that can't be read as a mapping at all; else what could be read of it, and the errors.
func decode(name string, data []byte) (*rawConfig, source, map[string]place, Errors) {
	d := &decoder{source: source{name: name}, anchors: map[string]*ast.AnchorNode{}, places: map[string]place{}}
	if len(data) > maxFileBytes {
		d.refuse(place{line: 1}, fmt.Sprintf("the file is over %d MiB", maxFileBytes>>20),
			"name the file that holds the configuration")
		return nil, d.source, nil, d.errs
	}
	// One kind of line end, so that the library's lines and ours are the same.
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	data = bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
	data = bytes.ReplaceAll(data, []byte("\r"), []byte("\n"))
	d.source.lines = strings.Split(string(data), "\n")
	if !d.legible() {
		return nil, d.source, nil, d.errs
	}
	root := d.parse(data)
	if root == nil {
		return nil, d.source, nil, d.errs
	}
	ast.Walk(d, root) // collects the anchors
	raw := new(rawConfig)
	raw.read(d, root, where(root, place{}))
	if d.overflow != nil { // what was read is a part: judging it would only bury the error
		return nil, d.source, nil, Errors{d.overflow}
	}
	return raw, d.source, d.places, d.errs
}

func (d *decoder) refuse(at place, problem, remedy string) {
	d.errs = append(d.errs, d.source.refuse(at, problem, remedy))
}

// legible refuses what YAML does not allow as a character at all (YAML 1.2.2, section 5.1).
func (d *decoder) legible() bool {
	for i, line := range d.source.lines {
		if !utf8.ValidString(line) {
			d.refuse(place{line: i + 1}, "the line is not UTF-8", "save the file as UTF-8")
			d.errs[len(d.errs)-1].Source = ""
			return false
		}
		at := strings.IndexFunc(line, func(r rune) bool { return r != '\t' && unicode.IsControl(r) || r == '\ufeff' })
		if at >= 0 {
			r, _ := utf8.DecodeRuneInString(line[at:])
			d.refuse(place{line: i + 1}, fmt.Sprintf("the line holds the control character %U", r), "take it out")
			d.errs[len(d.errs)-1].Source = ""
			return false
		}
	}
	return true
}

// parse returns the one document's root, or nil and an error told.
func (d *decoder) parse(data []byte) (root node) {
	// The parser is another's: what it might trip over is an error in the file, not the end of the daemon that reloads.
	defer func() {
		if cause := recover(); cause != nil {
			d.refuse(place{line: 1}, fmt.Sprintf("the YAML parser failed (%v)", cause), "write the file more simply")
			root = nil
		}
	}()
	tokens := lexer.Tokenize(string(data))
	if !d.shallow(tokens) {
		return nil
	}
	// Keys given twice are told by us, all of them.
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var syntax yaml.Error
		if !errors.As(err, &syntax) || syntax.GetToken() == nil {
			d.refuse(place{line: 1}, err.Error(), "correct the YAML")
			return nil
		}
		d.refuse(position(syntax.GetToken()), syntax.GetMessage(), syntaxRemedy(syntax.GetMessage()))
		return nil
	}
	for _, doc := range file.Docs {
		switch {
		case doc.Body == nil || doc.Body.Type() == ast.CommentType:
			continue
		case doc.Body.Type() == ast.DirectiveType:
			d.refuse(where(doc.Body, place{}), "YAML directives are not understood", "take it out")
			return nil
		case root != nil:
			d.refuse(where(doc.Body, place{}), "a second document begins in this file", "keep one document, without ---")
			return nil
		}
		root = doc.Body
	}
	if root == nil || root.Type() == ast.NullType {
		// Taken for a configuration, a file cut short while it was being written would end every service on reload.
		d.refuse(place{line: 1}, "the file holds nothing", "write the services, or services: [] for none")
		return nil
	}
	return root
}

// shallow refuses nesting that no configuration needs: the parser's work and stack grow with it.
func (d *decoder) shallow(tokens token.Tokens) bool {
	brackets, dashes, line := 0, 0, 0
	for _, t := range tokens {
		switch t.Type {
		case token.MappingStartType, token.SequenceStartType:
			brackets++
		case token.MappingEndType, token.SequenceEndType:
			brackets--
		case token.SequenceEntryType:
			if t.Position.Line != line {
				dashes, line = 0, t.Position.Line
			}
			dashes++
		}
		if max(brackets, dashes) > maxNesting {
			d.refuse(position(t), "values are nested too deep", "close the brackets before")
			return false
		}
	}
	return true
}

func syntaxRemedy(message string) string {
	switch {
	case strings.Contains(message, "mapping value is not allowed"):
		return "correct the indentation, or quote a value that holds \": \" or ends in \":\""
	case strings.Contains(message, "cannot start any token"):
		return "indent with spaces and quote values that begin with a special character"
	case strings.Contains(message, "must be specified"), strings.Contains(message, "not found"):
		return "close the bracket or quote"
	}
	return "correct the indentation or quotes here"
}

// Visit implements ast.Visitor: it collects anchors.
func (d *decoder) Visit(n ast.Node) ast.Visitor {
	anchor, ok := n.(*ast.AnchorNode)
	if !ok {
		return d
	}
	name := anchor.Name.GetToken().Value
	if first, twice := d.anchors[name]; twice {
		d.refuse(position(anchor.GetToken()), fmt.Sprintf("anchor %q is defined in line %d already", name,
			first.GetToken().Position.Line), "give each anchor its own name")
		return d
	}
	d.anchors[name] = anchor
	return d
}

// resolve takes off anchors and follows aliases. It returns nil, and an error told, where that leads nowhere.
func (d *decoder) resolve(n node, at place) node {
	for range maxNesting {
		switch v := n.(type) {
		case nil:
			return ast.Null(token.New("null", "null", &token.Position{Line: at.line, Column: at.column}))
		case *ast.AnchorNode:
			n = v.Value
		case *ast.MappingKeyNode: // "? key"
			n = v.Value
		case *ast.AliasNode:
			name := v.Value.GetToken().Value
			anchor := d.anchors[name]
			if anchor == nil || anchor.GetToken().Position.Offset > v.GetToken().Position.Offset {
				d.refuse(at, fmt.Sprintf("alias *%s has no anchor before it", name), "define &"+name+" above")
				return nil
			}
			n = anchor.Value
		case *ast.TagNode:
			d.refuse(at, fmt.Sprintf("tag %s is not understood", v.GetToken().Value), "take it out")
			return nil
		default:
			return n
		}
	}
	d.refuse(at, "alias leads back to itself", "write the value out")
	return nil
}

// room reports whether one value more may be read; aliases of aliases could ask for any number.
func (d *decoder) room(at place) bool {
	d.nodes++
	if d.nodes == maxNodes {
		d.overflow = d.source.refuse(at, "the file holds too many values, aliases counted each time",
			"divide it or use fewer aliases")
	}
	return d.overflow == nil
}

func (d *decoder) enter(n node, at place) node {
	if !d.room(at) {
		return nil
	}
	d.places[at.field] = at
	return d.resolve(n, at)
}

func position(t *token.Token) place { return place{line: t.Position.Line, column: t.Position.Column} }

// where returns the place of n's first character under at's field; a value that isn't there stands where at says.
func where(n node, at place) place {
	var t *token.Token
	switch v := n.(type) {
	case nil, *ast.NullNode:
		return at
	case *ast.MappingNode:
		t = v.GetToken()
		if !v.IsFlowStyle && len(v.Values) > 0 { // the token of a block mapping is its first colon
			t = v.Values[0].Key.GetToken()
		}
	case *ast.MappingValueNode:
		t = v.Key.GetToken()
	default:
		t = n.GetToken()
	}
	if t == nil || t.Position == nil {
		return at
	}
	p := position(t)
	p.field = at.field
	return p
}

// entry is a key of a mapping with its value.
type entry struct {
	key    node
	value  node
	merged bool // comes by a merge key: an entry of the mapping itself goes before it
}

// entries returns a mapping's entries in the file's order, then those that merge keys bring in.
func (d *decoder) entries(n node, at place, depth int) []entry {
	var values []*ast.MappingValueNode
	switch v := n.(type) {
	case *ast.MappingNode:
		values = v.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{v}
	}
	var own, merged []entry
	for _, v := range values {
		if !d.room(at) {
			break
		}
		if !v.Key.IsMergeKey() {
			own = append(own, entry{key: v.Key, value: v.Value})
			continue
		}
		here := where(v.Key, at)
		if depth == maxMerges {
			d.refuse(here, "merges are nested too deep", "write the fields out")
			return own
		}
		sources := []node{d.resolve(v.Value, here)}
		if seq, ok := sources[0].(*ast.SequenceNode); ok {
			sources = seq.Values
		}
		for _, src := range sources {
			src = d.resolve(src, here)
			if !isMapping(src) {
				if src != nil {
					d.refuse(here, "only mappings can be merged", "name the anchor of a mapping")
				}
				continue
			}
			merged = append(merged, d.entries(src, here, depth+1)...)
		}
	}
	for _, e := range merged {
		e.merged = true
		own = append(own, e)
	}
	return own
}

func isMapping(n node) bool {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return true
	}
	return false
}

// mapping reads n into fields. It returns broken where n is not a mapping.
func (d *decoder) mapping(n node, at place, fields []field) state {
	byName := make(map[string]target, len(fields))
	for _, f := range fields {
		f.to.locate(at.in(f.name))
		byName[f.name] = f.to
	}
	n = d.enter(n, at)
	switch {
	case n == nil:
		return broken
	case n.Type() == ast.NullType:
		return empty
	case !isMapping(n):
		d.refuse(at, fmt.Sprintf("is %s where fields belong", shape(n)), fmt.Sprintf("write %s: and its like below it",
			fields[0].name))
		return broken
	}
	seen := map[string]place{}
	for _, e := range d.entries(n, at, 0) {
		key := d.resolve(e.key, where(e.key, at))
		if key == nil {
			continue
		}
		name, ok := scalarText(key)
		here := where(key, at)
		if !ok {
			d.refuse(here, "a field's name is "+shape(key), "write a plain name")
			continue
		}
		here.field = join(at.field, name)
		if first, twice := seen[name]; twice {
			if !e.merged {
				d.refuse(here, fmt.Sprintf("is given in line %d already", first.line), "keep one of the two")
			}
			continue
		}
		seen[name] = here
		to := byName[name]
		if to == nil {
			d.unknown(here, name, fields)
			continue
		}
		to.read(d, e.value, where(e.value, here))
	}
	return given
}

func (d *decoder) unknown(at place, name string, fields []field) {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	remedy := "take one of " + strings.Join(names, ", ")
	if near := nearest(name, names); near != "" {
		remedy = "did you mean " + near + "?"
	}
	d.refuse(at, "unknown field", remedy)
}

// shape names what a node is, for messages.
func shape(n node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	case *ast.SequenceNode:
		return "a list"
	}
	return "a single value"
}

// scalarText returns a scalar as it was written, quotes and escapes taken off.
func scalarText(n node) (string, bool) {
	switch v := n.(type) {
	case *ast.StringNode:
		return v.Value, true
	case *ast.LiteralNode:
		return v.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode, *ast.NullNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func (t *text) read(d *decoder, n node, at place) {
	t.place, t.state = at, broken
	if n = d.enter(n, at); n == nil {
		return
	}
	if n.Type() == ast.NullType {
		t.state = empty
		return
	}
	value, ok := scalarText(n)
	if !ok {
		d.refuse(at, fmt.Sprintf("is %s where one value belongs", shape(n)), "write one value")
		return
	}
	t.value, t.state = value, given
}

func (l *list[T, PT]) read(d *decoder, n node, at place) {
	l.place, l.state = at, broken
	if n = d.enter(n, at); n == nil {
		return
	}
	if n.Type() == ast.NullType {
		l.state = empty
		return
	}
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		d.refuse(at, fmt.Sprintf("is %s where a list belongs", shape(n)), "write it in [ ], or each item after a dash")
		return
	}
	l.state = given
	for i, value := range seq.Values {
		here := place{field: fmt.Sprintf("%s[%d]", at.field, i), line: at.line, column: at.column}
		if i < len(seq.Entries) && seq.Entries[i].Start != nil { // an empty item stands at its dash
			dash := position(seq.Entries[i].Start)
			here.line, here.column = dash.line, dash.column
		}
		var item T
		PT(&item).read(d, value, where(value, here))
		l.items = append(l.items, item)
		if d.overflow != nil {
			return
		}
	}
}

func (l *oneOrMore) read(d *decoder, n node, at place) {
	l.place, l.state = at, broken
	switch value := d.resolve(n, at).(type) {
	case nil:
	case *ast.SequenceNode:
		l.texts.read(d, n, at)
	default:
		var item text
		item.read(d, value, at)
		if l.state = item.state; l.state == given {
			l.items = []text{item}
		}
	}
}

func (r *rawConfig) read(d *decoder, n node, at place) {
	r.place = at
	d.mapping(n, at, r.fields())
}

func (r *rawDataplane) read(d *decoder, n node, at place) {
	r.place = at
	d.mapping(n, at, r.fields())
}

func (r *rawControl) read(d *decoder, n node, at place) {
	r.place = at
	d.mapping(n, at, r.fields())
}

func (r *rawBalance) read(d *decoder, n node, at place) {
	r.place = at
	d.mapping(n, at, r.fields())
}

func (r *rawService) read(d *decoder, n node, at place) {
	r.place, r.state = at, d.mapping(n, at, r.fields())
}

func (r *rawHealth) read(d *decoder, n node, at place) {
	r.place, r.state = at, d.mapping(n, at, r.fields())
}

func (r *rawOverride) read(d *decoder, n node, at place) {
	r.rawHealth = new(rawHealth)
	r.rawHealth.read(d, n, at)
}

func (r *rawBackend) read(d *decoder, n node, at place) {
	r.place, r.state = at, d.mapping(n, at, r.fields())
}
