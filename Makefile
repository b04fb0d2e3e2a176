# Fairlead. `make demo` shows it, `make test` tests it; `make help` lists the rest.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

# sudo's path lacks the place where Go's own archive puts it.
export PATH := $(PATH):/usr/local/go/bin
export CGO_ENABLED := 0
# Where git can't or won't tell (no repository, another's), no revision is built in.
ifeq ($(shell git rev-parse HEAD 2>/dev/null),)
export GOFLAGS := $(GOFLAGS) -buildvcs=false
endif

GO       ?= go
ROOMS    := bpf loader maps userspace cmd test
VERSION  ?= $(shell git describe --tags --dirty 2>/dev/null)
LDFLAGS  := $(if $(VERSION),-X main.version=$(VERSION))
OBJECTS  := $(wildcard bpf/*_bpfel.* test/*/*_bpfel.*)
C_FILES  := $(wildcard bpf/*.[ch] test/*/*.[ch])
PEERS    := test/e2e/peers
DEMO     ?=
FUZZTIME ?= 20s

# Debian packages by what takes them. Node comes from wherever the machine has it.
GENERATE_PACKAGES := clang-19 llvm-19 libbpf-dev linux-libc-dev
LINT_PACKAGES     := clang-format-19
DEMO_PACKAGES     := util-linux
TEST_PACKAGES     := bind9-dnsutils curl dnsmasq-base haproxy iperf3 iproute2 nftables nginx-light procps python3-websockets util-linux wrk
TEST_PROGRAMS     := node:nodejs npm:npm
KERNEL_PACKAGES   := debian-archive-keyring qemu-system-x86 xz-utils

# install: the packages of $(1), and those of $(2), PROGRAM:PACKAGE, whose program is missing.
define install
missing=(); \
for package in $(1); do \
	[[ $$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null) == installed ]] || missing+=($$package); \
done; \
for pair in $(2); do \
	command -v $${pair%%:*} >/dev/null || missing+=($${pair#*:}); \
done; \
if (( $${#missing[@]} )); then \
	if (( EUID )); then echo "make: missing: $${missing[*]}: install them, or run make as root" >&2; exit 1; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "make: missing: $${missing[*]} (names of Debian 12): install what this system has of the kind" >&2; exit 1; fi; \
	echo "installing $${missing[*]}"; \
	export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
	apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null; \
	apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install --no-install-recommends "$${missing[@]}" \
		</dev/null >/dev/null; \
fi
endef

define need_root
if (( EUID )); then echo "make: network namespaces and XDP take root: sudo make $(MAKECMDGOALS)" >&2; exit 1; fi
endef

# bpffs: /sys/fs/bpf is mounted for what follows in the same shell; if that was our doing and nothing is left in it (the
# kernel's own two files aside), it is unmounted at the end.
define bpffs
if ! mountpoint -q /sys/fs/bpf; then \
	mount -t bpf bpf /sys/fs/bpf; \
	trap '[[ -n $$(ls -A -I maps.debug -I progs.debug /sys/fs/bpf) ]] || umount /sys/fs/bpf' EXIT; \
fi
endef

go_test = $(GO) test -count=1 -p 1 -json

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

.PHONY: build
build: ## bin/fairlead
	@command -v $(GO) >/dev/null || { echo "make: no go: see https://go.dev/doc/install" >&2; exit 1; }
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/fairlead ./cmd/fairlead

.PHONY: demo
demo: demo-needs build ## the whole thing on this machine alone; DEMO="--method dsr --ipv6" passes flags on
	@$(bpffs); bin/fairlead demo $(DEMO)

.PHONY: demo-needs
demo-needs:
	@$(need_root)
	@$(call install,$(DEMO_PACKAGES))

BENCH ?=

.PHONY: bench
bench: build ## nanoseconds a packet, by method, family and connections; BENCH=--quick is short
	@$(need_root)
	@bin/fairlead bench $(BENCH)

.PHONY: test
test: test-needs check-generate lint peers ## everything: generated code, lint, all tests
	@$(bpffs); $(go_test) -p 2 -timeout 15m ./... | $(GO) run ./test/summary

.PHONY: test-needs
test-needs:
	@$(need_root)
	@$(call install,$(TEST_PACKAGES),$(TEST_PROGRAMS))

.PHONY: peers
peers: $(PEERS)/node_modules/.package-lock.json

$(PEERS)/node_modules/.package-lock.json: $(PEERS)/package-lock.json | test-needs
	cd $(PEERS) && npm ci --ignore-scripts --no-audit --no-fund </dev/null
	touch $@

.PHONY: generate
generate: ## compile the data plane, and what benchmarks it: *.bpf.c into *_bpfel.{go,o}
	@$(call install,$(GENERATE_PACKAGES))
	$(GO) generate ./...

.PHONY: check-generate
check-generate: ## fail where the committed objects are not what their source gives, byte for byte
	@$(call install,$(GENERATE_PACKAGES))
	@before=$$(sha256sum $(OBJECTS)); \
	$(GO) generate ./...; \
	if [[ $$(sha256sum $(OBJECTS)) != "$$before" ]]; then \
		echo "make: generated anew, these are others than before: commit them" >&2; \
		sha256sum --check --quiet <<<"$$before" >&2 || true; \
		exit 1; \
	fi

.PHONY: lint
lint: ## gofmt, go vet, staticcheck, clang-format
	@$(call install,$(LINT_PACKAGES))
	@unformatted=$$(gofmt -l $(ROOMS)); \
	if [[ -n $$unformatted ]]; then printf 'make: not as gofmt writes it:\n%s\n' "$$unformatted" >&2; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	clang-format-19 --dry-run -Werror $(C_FILES)

.PHONY: test-long
test-long: peers ## the long forms: 3,000 WebSockets by each method, 1,000,000 tuples and packets, 100,000 pinned connections, floods of 10,000,000, 1 GiB each way
	@$(bpffs); { \
		$(go_test) -timeout 60m ./test/e2e -connections=3000 -flows=3000 -deaths=15000 -bulk=1073741824 \
			-path-bulk=1073741824 -source-ports=31744 -reboots=3000 || true; \
		$(go_test) -timeout 10m ./test/e2e -run '^TestDrain$$' -drains=5000 || true; \
		$(go_test) -timeout 20m ./test/e2e -run '^Test(Flapping|Reloads)$$' -flapping=5m -reloads=200 || true; \
		$(go_test) -timeout 40m ./test/e2e -run '^Test(Killed|Upgrades)$$' -kills=100 -upgrades=50 -witnesses=10000 || true; \
		$(go_test) -timeout 60m ./test/agreement -agreement.tuples=1000000 || true; \
		$(go_test) -timeout 60m ./test/pinning -pinning.long || true; \
		$(go_test) -timeout 60m ./test/model -model.packets=1000000 || true; \
		$(go_test) -timeout 20m ./maps/journal -journal.corruptions=10000 -journal.rate=1m -journal.many || true; \
		$(go_test) -timeout 10m ./userspace/health -health.crowd=60s || true; \
		$(go_test) -timeout 20m ./test/flood -run '^(TestFlood|TestLRU)$$' -flood.connections=100000 \
			-flood.packets=10000000 || true; \
	} | $(GO) run ./test/summary

.PHONY: test-kernels
test-kernels: ## boot other kernels in virtual machines (6.1 is the oldest) and test the data plane in them, on virtio-net as well
	@$(need_root)
	@$(call install,$(KERNEL_PACKAGES))
	$(GO) test -count=1 -v -timeout 60m -run '^TestKernels$$' ./test/kernels -kernels
	$(GO) test -count=1 -v -timeout 20m -run '^TestVirtio$$' ./test/kernels -kernels.virtio=bookworm,trixie

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME, 20s
	@for package in $$($(GO) list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep ^Fuzz || true); do \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done

.PHONY: clean
clean: ## remove what was built and fetched here
	rm -rf bin $(PEERS)/node_modules
