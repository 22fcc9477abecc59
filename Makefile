# `make quickstart` and `make test` set up a virtual environment by themselves, then run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs/quickstart
# the quickstart's length; CI runs a handful of steps
TOKENIZER_STEPS ?=
GENERATOR_STEPS ?=
export OMP_WAIT_POLICY = PASSIVE

.PHONY: setup test quickstart lint types

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

quickstart: setup
	$(BIN)/python train.py configs/quickstart_tokenizer.yaml output_dir=$(OUT)/tokenizer \
	    $(if $(TOKENIZER_STEPS),trainer.max_steps=$(TOKENIZER_STEPS))
	$(BIN)/python sample.py $(OUT)/tokenizer --data emoji:validation --limit 8 \
	    --output $(OUT)/coarse_to_fine.png
	$(BIN)/python -m flextok.cli sweep $(OUT)/tokenizer --data emoji:validation \
	    --dtype float32 --output $(OUT)/sweep
	$(BIN)/python train.py configs/quickstart_generator.yaml output_dir=$(OUT)/generator \
	    tokenizer=$(OUT)/tokenizer $(if $(GENERATOR_STEPS),trainer.max_steps=$(GENERATOR_STEPS))
	$(BIN)/python sample.py $(OUT)/generator --num-samples 1 --output $(OUT)/generated.png
	@echo "pictures: $(OUT)/coarse_to_fine.png and $(OUT)/generated.png"
