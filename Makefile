# `make quickstart` and `make test` set up a virtual environment by themselves, then run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs/quickstart
TITOK ?= outputs/quickstart_titok
# the quickstarts' length; CI runs a handful of steps
TOKENIZER_STEPS ?=
GENERATOR_STEPS ?=
# of trainings that take as many steps as asked for
steps = $(if $(1),trainer.max_steps=$(1))
export OMP_WAIT_POLICY = PASSIVE

.PHONY: setup test quickstart quickstart-titok compare lint types

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
	$(BIN)/python -m flextok.cli sweep $(OUT)/tokenizer --data emoji:validation --json $(OUT)/psnr.json
	$(BIN)/python train.py configs/quickstart_generator.yaml output_dir=$(OUT)/generator \
	    tokenizer=$(OUT)/tokenizer $(if $(GENERATOR_STEPS),trainer.max_steps=$(GENERATOR_STEPS))
	$(BIN)/python sample.py $(OUT)/generator --num-samples 1 --output $(OUT)/generated.png
	@echo "pictures: $(OUT)/coarse_to_fine.png and $(OUT)/generated.png"

quickstart-titok: setup
	$(BIN)/python train.py configs/quickstart_titok_vqgan.yaml output_dir=$(TITOK)/vqgan \
	    $(call steps,$(TOKENIZER_STEPS))
	$(BIN)/python train.py configs/quickstart_titok_stage1.yaml output_dir=$(TITOK)/stage1 \
	    start.proxy=$(TITOK)/vqgan $(call steps,$(TOKENIZER_STEPS))
	$(BIN)/python train.py configs/quickstart_titok_stage2.yaml output_dir=$(TITOK)/stage2 \
	    start.proxy=$(TITOK)/vqgan start.first=$(TITOK)/stage1 $(call steps,$(TOKENIZER_STEPS))
	$(BIN)/python sample.py $(TITOK)/stage2 --data emoji:validation --limit 8 \
	    --output $(TITOK)/reconstructed.png
	$(BIN)/python train.py configs/quickstart_titok_generator.yaml output_dir=$(TITOK)/generator \
	    tokenizer=$(TITOK)/stage2 $(call steps,$(GENERATOR_STEPS))
	$(BIN)/python sample.py $(TITOK)/generator --num-samples 6 --output $(TITOK)/generated.png
	@echo "pictures: $(TITOK)/reconstructed.png and $(TITOK)/generated.png"

# FlexTok, TiTok, TiTok with tail drop and a 2D grid on one budget
compare: setup
	$(BIN)/python benchmarks/compare_tokenizers.py --json benchmarks/results/compare.json
