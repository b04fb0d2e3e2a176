// Package flood holds what makes the floods of its tests.
package flood

// The driver's C becomes Go and an object here; both are committed, so that testing needs no clang.
//go:generate go tool bpf2go -output-stem flood -go-package flood -cc clang-19 -strip llvm-strip-19 -target bpfel -type step flood flood.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu
