package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v2"

	"fairlead/bpf"
)

// version is set by the linker where a release is built: -X main.version=1.2.3.
var version = ""

type versionInfo struct {
	Version  string `json:"version"`
	Revision string `json:"revision"`
	Modified bool   `json:"modified"` // built from files that are not what the revision has
	Schema   uint32 `json:"schema"`   // of the pinned maps
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "say which fairlead this is",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			if _, err := words(c, 0, 0); err != nil {
				return err
			}
			v := versionOf()
			if isJSON(c) {
				return object(c, v)
			}
			revision := v.Revision[:min(12, len(v.Revision))]
			if v.Modified {
				revision += " (modified)"
			}
			if revision != "" {
				revision = ", revision " + revision
			}
			_, err := fmt.Fprintf(c.App.Writer, "fairlead %s%s, schema version %d, %s %s\n", v.Version, revision, v.Schema,
				v.Go, v.Platform)
			return err
		},
	}
}

func versionOf() versionInfo {
	v := versionInfo{Version: version, Schema: uint32(bpf.FairleadSchemaSCHEMA_VERSION), Go: runtime.Version(),
		Platform: runtime.GOOS + "/" + runtime.GOARCH}
	build, ok := debug.ReadBuildInfo()
	if ok {
		for _, s := range build.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Revision = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
	}
	if v.Version == "" && ok && build.Main.Version != "" {
		v.Version = build.Main.Version
	}
	if v.Version == "" || v.Version == "(devel)" {
		v.Version = "development"
	}
	return v
}
