package bench

// The harness's C becomes Go and an object here; both are committed, so that building needs no clang.
//go:generate go tool bpf2go -output-stem harness -go-package bench -cc clang-19 -strip llvm-strip-19 -target bpfel -type ends -type turn -type piece harness bench.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu
