# make test        everything, against real servers (see dev/servers)
# make demo        a thousand mails through release binaries, accounted for; KEEP=1 leaves it running
# make lint        formatting, clippy, documentation
# make fuzz        each fuzz target for a while (TARGET, SECONDS); needs nightly and cargo-fuzz
# make servers     RabbitMQ and Postgres for development; prints their variables. make servers-down stops them

SHELL = /bin/bash
CARGO ?= cargo
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

.PHONY: test demo lint fuzz servers servers-down

# Arguments for the runner: make test ARGS='broker'
ifeq ($(NEXTEST),yes)
RUN_TESTS = $(CARGO) nextest run --workspace --locked $(ARGS)
BUILD_TESTS = $(CARGO) nextest run --workspace --locked --no-run
else
RUN_TESTS = $(CARGO) test --workspace --locked -- $(ARGS)
BUILD_TESTS = $(CARGO) test --workspace --locked --no-run
endif

# Built before servers come up: a compile error costs nothing else.
test:
	$(BUILD_TESTS)
	KEEP='$(KEEP)' dev/run-with-servers $(RUN_TESTS)

demo:
	$(CARGO) build --release --locked --bin postroom --example demo
	KEEP='$(KEEP)' dev/run-with-servers target/release/examples/demo

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items --locked

TARGET ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
SECONDS ?= 60

fuzz:
	set -e; for target in $(TARGET); do \
	  mkdir -p fuzz/target/found/$$target; \
	  $(CARGO) +nightly fuzz run -s none $$target fuzz/target/found/$$target fuzz/corpus/$$target -- \
	    -max_total_time=$(SECONDS) -max_len=65536 -timeout=20 -rss_limit_mb=2048; \
	done

servers:
	@dev/servers up

servers-down:
	@dev/servers down
