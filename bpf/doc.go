// Package bpf is the data plane: the C of the XDP program and, beside it, the Go and the object that bpf2go makes of it.
// The layouts of all maps come from types.h and are generated into Go.
package bpf
