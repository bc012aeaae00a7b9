# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages.
TORCH  := $(shell grep '^torch==' constraints.txt)

.PHONY: venv demo test test-slow test-faults lint bench bench-memory clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-slow: venv
	$(BIN)/python -m pytest -m slow --timeout=1800

# Every fault there is, and the table of what became of them; `make test` takes a sample.
test-faults: venv
	$(BIN)/python -m pytest -m "slow or not slow" --timeout=3600 --all-faults \
		--ledger benchmarks/results/faults.json tests/faults tests/media/test_bad_files.py tests/media/test_fuzz.py tests/media/test_refused.py tests/media/test_seek_resume.py

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
