# make demo   a trained pipeline, quantized, saved, reloaded and compared: out/demo.png and a table
# make eval   pipelines x recipes, metrics and a report: out/eval/tiny/report.html      make app   the page of the demo
# make test   install, and all tests but the slow ones      make test-all   those, too      make lint   style
# make table  tables and plots of README and docs from eval/results
# make docs   the pages: out/site/index.html
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.installed .venv/.native
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all lint types table eval app gpu docs

demo: $(READY)
	$(PY) -m pipelines.first_pictures

# one thread a worker: the models in the tests are too small to share between cores
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m basedpyright --baselinemode discard

# two processes of one thread each share the pictures
eval: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --nproc-per-node 2 -m eval run eval/suites/tiny.yaml --out out/eval/tiny

app: $(READY)
	$(PY) app.py

table: $(READY)
	$(PY) -m eval.experiments.tables --write
	$(PY) -m eval.experiments.plots

# on a machine with a card: checks, tiles, times, what others do; eval/gpu/README.md
gpu: $(READY)
	$(PY) -m eval.gpu.visit

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# torch alone comes first, pinned, so that pip settles on the build its configuration offers before anything needs it
.venv/.installed: pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dq needs Python 3.11 or newer; make PYTHON=python3.12 " + "names another one")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

.venv/.docs: .venv/.installed
	$(PY) -m pip install -q -c constraints.txt -e ".[docs]"
	@touch $@

# after a change to the sources; without a compiler dq runs on torch's own ops
.venv/.native: .venv/.installed $(wildcard dq/kernels/cpu/native/*)
	-$(PY) dq/kernels/cpu/compile.py
	@touch $@
