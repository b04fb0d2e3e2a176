package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"fairlead/maps"
)

func mapsCommand() *cli.Command {
	return &cli.Command{
		Name:  "maps",
		Usage: "the raw maps, decoded",
		Subcommands: []*cli.Command{
			{
				Name: "list", Usage: "list the maps: what each holds, its sizes and memory",
				Flags: []cli.Flag{outputFlag(), pinPathFlag()}, Action: listMaps,
			},
			{
				Name: "dump", Usage: "print the entries of a map", ArgsUsage: "MAP",
				Description: "MAP is one of " + strings.Join(maps.TableNames(), ", ") + ".\nNumbers are exact, ages are how long ago.",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "service", Usage: "of rings: that of `SERVICE` alone, its name or address:port"},
					outputFlag(), pinPathFlag(),
				},
				Action: dumpMap,
			},
		},
	}
}

// mapItem is a map as it is listed.
type mapItem struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	KeySize    uint32 `json:"key_size"`
	ValueSize  uint32 `json:"value_size"`
	MaxEntries uint32 `json:"max_entries"`
	Memory     uint64 `json:"memory_bytes"` // with the maps inside it
	Inside     int    `json:"maps_inside"`
	Purpose    string `json:"purpose"`
}

func listMaps(c *cli.Context) (err error) {
	if _, err := words(c, 0, 0); err != nil {
		return err
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	tables, err := v.set.Tables()
	if err != nil {
		return err
	}
	type item = mapItem
	l := newList(c.App.Writer, formatOf(c),
		column[item]{title: "NAME", text: func(i *item) string { return i.Name }},
		column[item]{title: "TYPE", text: func(i *item) string { return i.Type }},
		column[item]{title: "KEY", right: true, text: func(i *item) string { return size(uint64(i.KeySize)) }},
		column[item]{title: "VALUE", right: true, text: func(i *item) string { return size(uint64(i.ValueSize)) }},
		column[item]{title: "ENTRIES", right: true, text: func(i *item) string { return count(i.MaxEntries) }},
		column[item]{title: "MEMORY", right: true, text: func(i *item) string { return size(i.Memory) }},
		column[item]{title: "INSIDE", right: true, wide: true, text: func(i *item) string { return fmt.Sprint(i.Inside) }},
		column[item]{title: "PURPOSE", text: func(i *item) string { return i.Purpose }},
	)
	for _, t := range tables {
		if err := l.add(mapItem(t)); err != nil {
			return err
		}
	}
	return l.end()
}

func dumpMap(c *cli.Context) (err error) {
	args, err := words(c, 1, 1)
	if err != nil {
		return err
	}
	name, word := args[0], c.String("service")
	if word != "" && name != "rings" {
		return wrongUsage("--service goes with the map rings alone")
	}
	v, err := openView(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	var service *maps.Service
	if word != "" {
		s, err := v.oneService(word)
		if err != nil {
			return err
		}
		service = &s
	}
	l := newList[record](c.App.Writer, formatOf(c))
	err = v.set.Dump(v.inv, name, service, func(r maps.Record) error {
		if l.items == 0 {
			l.columns = recordColumns(r)
		}
		return l.add(record(r))
	})
	if errors.Is(err, maps.ErrNoMap) {
		return unknown("map", name, maps.TableNames())
	}
	if err != nil {
		return err
	}
	return l.end()
}

// record is a map's entry on its way out.
type record maps.Record

func recordColumns(r maps.Record) (columns []column[record]) {
	for i, f := range r {
		kind := reflect.TypeOf(f.Value).Kind()
		_, isSpan := f.Value.(time.Duration)
		columns = append(columns, column[record]{
			title: strings.ToUpper(strings.ReplaceAll(f.Name, "_", "-")),
			right: isSpan || kind >= reflect.Int && kind <= reflect.Uint64,
			text:  func(r *record) string { return fieldText((*r)[i].Value) },
		})
	}
	return columns
}

func fieldText(value any) string {
	switch value := value.(type) {
	case time.Duration:
		return span(value)
	case bool:
		return yes(value)
	case []string:
		if len(value) == 0 {
			return "-"
		}
		return strings.Join(value, ",")
	case netip.Addr:
		if !value.IsValid() {
			return "-"
		}
	case netip.AddrPort:
		if !value.IsValid() {
			return "-"
		}
	case string:
		if value == "" {
			return "-"
		}
	}
	return fmt.Sprint(value)
}

// MarshalJSON writes an object with the fields in their order; a duration is a number of seconds and says so in its name,
// an address that is not there is null.
func (r record) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	for i, f := range r {
		name, value := f.Name, f.Value
		switch v := value.(type) {
		case time.Duration:
			name, value = name+"_seconds", seconds(v)
		case netip.Addr:
			if !v.IsValid() {
				value = nil
			}
		case netip.AddrPort:
			if !v.IsValid() {
				value = nil
			}
		}
		text, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%s%q:%s", map[bool]string{true: "{", false: ","}[i == 0], name, text)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}
