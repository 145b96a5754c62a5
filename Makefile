# One word per chore; `make chat` and `make test` need nothing typed before them.
# Chores print what they do on stderr: stdout carries only what was asked for.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
MODEL  := build/tiny-relu-llama.gguf
NATIVE := $(wildcard runtime/native/*)

# As in pyproject.toml. Installed before the package, so that its wheel (about 6 minutes on two cores) is built once and then comes from pip's cache.
LLAMA_CPP := $(shell sed -n 's/^requires = .*"\(llama-cpp-python==[0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: chat serve setup test test-kernels test-kill test-vulkan sanitize fuzz fuzz-sanitized soak outside check check-ports docs bench bench-avx2 bench-serve clean

chat: $(MODEL)
	@$(PY) -m runtime chat $(MODEL)

# The same for other programs, and a page, at http://127.0.0.1:8080. SERVE: options, e.g. SERVE="--port 8000 --parallel 8".
SERVE ?=
serve: $(MODEL) $(VENV)/.server
	@$(PY) -m runtime serve $(MODEL) $(SERVE)

$(VENV)/.server: $(VENV)/.setup
	@$(PIP) install --quiet --no-build-isolation --editable ".[server]" >&2
	@touch $@

setup: $(VENV)/.setup

$(VENV)/.setup: pyproject.toml $(NATIVE)
	@test -x $(PY) || echo "setting up $(VENV): where pip has no $(LLAMA_CPP) yet, compiling it takes some minutes" >&2
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) >&2
	@$(PIP) install --quiet "$(LLAMA_CPP)" "scikit-build-core>=0.11" ninja >&2
	@$(PIP) install --quiet --no-build-isolation --editable . >&2
	@touch $@

$(VENV)/.test: $(VENV)/.setup
	@$(PIP) install --quiet --no-build-isolation --editable ".[test]" >&2
	@touch $@

$(VENV)/.check: $(VENV)/.test
	@$(PIP) install --quiet --no-build-isolation --editable ".[check]" >&2
	@touch $@

$(MODEL): $(VENV)/.setup $(wildcard examples/tiny-relu-llama/* convert/*.py convert/*/*.py runtime/model_file/structure.py)
	@mkdir -p $(dir $@)
	@$(PY) -m convert examples/tiny-relu-llama $@ --force >&2

# A worker per processor, up to four: each takes about 1 GB. One file, or with output: see CONTRIBUTING.md.
test: $(VENV)/.test
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The numeric tests with each variant of the kernels that this CPU has, or with those that KERNELS names.
test-kernels: $(VENV)/.test
	@set -e; for kernels in $${KERNELS:-$$($(PY) -c 'from runtime.bindings import sparse_ffn; print(*sparse_ffn.variants())')}; do \
		echo "kernels: $$kernels" >&2; \
		LAZYNEURON_KERNELS=$$kernels $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m numeric; \
	done

# Commands that write, killed and stopped at 50 random moments each; `make test` tries a few.
test-kill: $(VENV)/.test
	LAZYNEURON_MOMENTS=50 $(PY) -m pytest --numprocesses 2 --dist worksteal tests/test_disturbed.py -k any_moment

# The tests on a device, without a GPU: see the script. The first call compiles ggml for Vulkan.
test-vulkan: $(VENV)/.test
	@PYTHON="$(PYTHON)" MODELS_PYTHON="$(PY)" LLAMA_CPP="$(LLAMA_CPP)" tests/vulkan.sh

# The native tests on a library that stops at the first bad address or undefined operation. With gcc on Linux: its runtimes must be loaded before Python is.
SANITIZED  := build/sanitize/liblazyneuron.so
SANITIZERS  = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 LAZYNEURON_LIBRARY=$(CURDIR)/$(SANITIZED)

$(SANITIZED): $(VENV)/.test $(NATIVE)
	cmake -S runtime/native -B build/sanitize -DLZN_SANITIZE=ON -DLZN_EMULATE_AVXVNNI=ON -DCMAKE_CXX_COMPILER=$(CXX) -DPython_EXECUTABLE=$(CURDIR)/$(PY) >&2
	cmake --build build/sanitize --parallel 2 --target lazyneuron row_kernels_test tiles_test >&2
	@touch $@

sanitize: $(SANITIZED)
	build/sanitize/row_kernels_test
	build/sanitize/tiles_test
	$(SANITIZERS) $(PY) -m pytest --capture=sys -m native tests/test_kernels.py tests/test_kernel_order.py tests/test_kernel_ranges.py tests/test_product.py tests/test_tiles.py tests/test_counting.py tests/test_predictors_kinds.py tests/test_grammar.py tests/test_paging.py

# Damaged input for every reader, for FUZZ_S seconds; FUZZ_SEED chooses which, FUZZ_TARGETS whose (docs/fuzzing.md). What fails is put into tests/fuzz/corpus.
FUZZ_S       ?= 60
FUZZ_SEED    ?= 0
FUZZ_TARGETS ?=
FUZZ         := PYTHONPATH=tests $(PY) -m fuzz --seconds $(FUZZ_S) --seed $(FUZZ_SEED) $(FUZZ_TARGETS:%=--target %)
fuzz: $(VENV)/.test
	$(FUZZ)

fuzz-sanitized: $(SANITIZED)
	$(SANITIZERS) $(FUZZ)

# Many clients of the server at once for SOAK_S seconds, some of them bad: right answers, steady memory, no slot lost (tests/serve_soak.py).
SOAK_S       ?= 300
SOAK_CLIENTS ?= 64
soak: $(MODEL) $(VENV)/.test
	$(PY) tests/serve_soak.py $(MODEL) --seconds $(SOAK_S) --clients $(SOAK_CLIENTS)

# llama.cpp's own server tests against our server (tests/outside/README.md). LLAMA_TESTS: their folder in llama.cpp's sources.
LLAMA_TESTS ?= vendor/llama.cpp/tools/server/tests
OUTSIDE     := build/outside
outside: $(MODEL) $(VENV)/.server $(OUTSIDE)/.ready
	$(PY) tests/outside/run_llama_cpp.py $(LLAMA_TESTS) --python $(OUTSIDE)/bin/python

$(OUTSIDE)/.ready:
	$(PYTHON) -m venv $(OUTSIDE)
	$(OUTSIDE)/bin/pip install --quiet pytest pytest-timeout filelock numpy openai prometheus-client requests wget aiohttp >&2
	@touch $@

check: $(VENV)/.check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The native library compiled for Windows, macOS, Arm and musl, without any of them: see the script. PORTS names some of them; LINK=no compiles only, which takes a minute.
check-ports: $(VENV)/.setup
	@PYTHON="$(PY)" tests/ports.sh $(PORTS)

# The `--help` that pages of docs/commands embed, and nothing else there.
docs: $(VENV)/.setup
	$(PY) tests/documents.py

# BENCH: another model or a shape, and options.
BENCH ?= $(MODEL)
bench: $(MODEL)
	$(PY) -m bench.decode $(BENCH)

# The same as a CPU runs it that has AVX2 and nothing newer. The first call compiles llama.cpp for it: some 10 minutes.
bench-avx2: $(MODEL)
	@PYTHON="$(PY)" LLAMA_CPP="$(LLAMA_CPP)" bench/avx2.sh bench.decode $(BENCH)

# Many clients at once, beside llama.cpp's server. The first call compiles that one: some 10 minutes. BENCH_SERVE: another shape, and options.
BENCH_SERVE ?= --shape mistral-7b --layers 8 --clients 1,8 --tokens 96
bench-serve: $(VENV)/.server
	$(PY) -m bench.serve $(BENCH_SERVE)

clean:
	rm -rf $(VENV) build
