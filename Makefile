# make test        everything, against real servers (see dev/servers)
# make test-trixie the same against Debian trixie's RabbitMQ 4.0 and Postgres 17; as root (see dev/servers)
# make demo        a thousand mails through release binaries, accounted for; KEEP=1 leaves it running
# make chaos       the fault campaign with release binaries; SEED=1 JOBS=20000 FAULTS=60 SPAN=240 (seconds) change it
# make bench       the product beside plain programs, about ten minutes; FULL=1 all loads, ONLY=ab some, ROUNDS=5
# make lint        formatting, clippy, documentation
# make fuzz        each fuzz target for a while (TARGET, SECONDS); needs nightly and cargo-fuzz
# make chart       what is generated for helm/postroom, and its checks
# make servers     RabbitMQ and Postgres for development; prints their variables. make servers-down stops them

SHELL = /bin/bash
CARGO ?= cargo
export POSTROOM_DEV_SERVERS
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

.PHONY: test test-trixie demo chaos bench lint fuzz chart servers servers-down

# The tests kill and stop the binary at named places (src/fail_point.rs), which a release does not have.
TESTED = --workspace --locked --features fail-points
# Arguments for the runner: make test ARGS='broker'
ifeq ($(NEXTEST),yes)
RUN_TESTS = $(CARGO) nextest run $(TESTED) $(ARGS)
BUILD_TESTS = $(CARGO) nextest run $(TESTED) --no-run
else
RUN_TESTS = $(CARGO) test $(TESTED) -- $(ARGS)
BUILD_TESTS = $(CARGO) test $(TESTED) --no-run
endif

# Built before servers come up: a compile error costs nothing else.
test:
	$(BUILD_TESTS)
	KEEP='$(KEEP)' dev/run-with-servers $(RUN_TESTS)

test-trixie:
	$(MAKE) test POSTROOM_DEV_SERVERS=trixie

demo:
	$(CARGO) build --release --locked --bin postroom --example demo
	KEEP='$(KEEP)' dev/run-with-servers target/release/examples/demo

# It has servers of its own, which it kills and starts again.
chaos:
	$(CARGO) build --release --locked --bin postroom --example chaos
	SEED='$(SEED)' JOBS='$(JOBS)' FAULTS='$(FAULTS)' SPAN='$(SPAN)' target/release/examples/chaos

# Two builds: what is compared must not change how the product is built.
bench:
	$(CARGO) build --release --locked --bin postroom
	$(CARGO) build --release --locked --package postroom-bench
	dev/run-with-servers target/release/postroom-bench run $(if $(FULL),--full) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(ROUNDS),--rounds $(ROUNDS))

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked --features fail-points -- -D warnings
	$(CARGO) clippy --workspace --lib --bins --examples --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items --locked

TARGET ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
SECONDS ?= 60

fuzz:
	set -e; for target in $(TARGET); do \
	  mkdir -p fuzz/target/found/$$target; \
	  $(CARGO) +nightly fuzz run -s none $$target fuzz/target/found/$$target fuzz/corpus/$$target -- \
	    -max_total_time=$(SECONDS) -max_len=65536 -timeout=20 -rss_limit_mb=2048; \
	done

chart:
	$(CARGO) build --locked --bin postroom
	tests/helm/run --update

servers:
	@dev/servers up

servers-down:
	@dev/servers down
