# Two commands do everything on a fresh Debian 12 with Rust: `make demo` and `make test`.
# Both build with the same profile into the same folder, so that dependencies are compiled once.

export AFFERENT_CACHE ?= $(HOME)/.cache/afferent
export CARGO_TARGET_DIR ?= $(AFFERENT_CACHE)/target

.PHONY: demo test lint deny generated package

demo: ## Build, run the main job for about a minute, show SQL over its results
	scripts/setup build
	cargo build --locked
	$(CARGO_TARGET_DIR)/debug/afferent demo

test: ## Set up brokers and Python, build, run all tests
	scripts/setup test
	cargo test --locked --workspace

lint: ## Formatting and lints, as CI checks them
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

deny: ## Licences, sources and banned crates of all dependencies (installs cargo-deny)
	command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check bans licenses sources

generated: ## Write the committed schema and reference page anew
	cargo build --locked
	$(CARGO_TARGET_DIR)/debug/afferent schema > docs/pipeline.schema.json
	$(CARGO_TARGET_DIR)/debug/afferent schema --format reference > docs/reference.md

package: ## A release binary in dist/
	scripts/setup build
	cargo build --locked --release
	mkdir -p dist && cp $(CARGO_TARGET_DIR)/release/afferent dist/
