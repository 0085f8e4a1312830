# One line a target; `make` alone lists them. The work is done in scripts/.
.DEFAULT_GOAL := help
.PHONY: help demo test check bench install uninstall clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: ## install what is missing, build, run one program here and in a microVM
	@scripts/demo

test: ## install what the tests need, run every test
	@scripts/test

check: ## format, lints, documents, fuzzing, dependencies: what CI runs besides the tests
	@scripts/check

bench: ## measure, beside Docker and Podman on the same machine (as root)
	@scripts/install-packages demo bench
	@cargo build --release --locked --quiet -p agentkernel
	@python3 bench/bench.py

install: ## put agentkernel on the PATH (~/.cargo/bin)
	@scripts/require-rust
	@scripts/install-packages demo
	@cargo install --path crates/cli --locked

uninstall: ## remove the program and its state directory
	@scripts/uninstall

clean: ## remove what was built
	@cargo clean
	@rm -rf fuzz/target fuzz/artifacts fuzz/corpus-run bench-results
