# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages.
TORCH  := $(shell grep '^torch==' constraints.txt)

.PHONY: venv demo test test-slow test-faults coverage lint bench bench-memory clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: venv
	$(BIN)/python -m longvid.demo

# One thread of torch for each of them: models here are small.
WORKERS ?= 2

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# The same tests; prints the statements of longvid/ that they run, and fails below the share in pyproject.toml.
coverage: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --cov --cov-report=term

test-slow: venv
	$(BIN)/python -m pytest -m slow --timeout=1800 $(TESTS)

LEDGER      ?= benchmarks/results/faults.json
FAULT_TESTS ?= tests/faults $(addprefix tests/media/test_,bad_files.py fuzz.py refused.py seek_resume.py)

# Every fault there is, and the table of what became of them; `make test` takes a sample.
test-faults: venv
	$(BIN)/python -m pytest -m "slow or not slow" --timeout=3600 --all-faults --ledger $(LEDGER) $(FAULT_TESTS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/peers_memory.py --out benchmarks/results/peers_memory.json \
		--plot benchmarks/results/peers_memory.png docs/images/peers-memory.png
	$(BIN)/python benchmarks/speed.py --out benchmarks/results/speed.json --plot docs/images/speed.png
	$(BIN)/python benchmarks/peers_memory.py --processes --out benchmarks/results/peers_memory-processes.json
	$(BIN)/python benchmarks/pipeline.py --out benchmarks/results/pipeline.json
	$(BIN)/python benchmarks/flat.py --out benchmarks/results/flat.json

# Fails if anything needs more memory than benchmarks/results/memory_baseline.json says.
bench-memory: venv
	$(BIN)/python benchmarks/bench_memory.py --rss

clean:
	rm -rf $(VENV) demo-out .mypy_cache .ruff_cache
