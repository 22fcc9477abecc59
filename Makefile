# `make quickstart` and `make test` set up a virtual environment by themselves, then run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs/quickstart
OUT_TEXT ?= outputs/quickstart_text
TITOK ?= outputs/quickstart_titok
SITE ?= outputs/site
# the quickstarts' length; CI runs a handful of steps
TOKENIZER_STEPS ?=
DRAWER_STEPS ?=
GENERATOR_STEPS ?=
PROBE_STEPS ?= 1000
NUM_SCENES ?= 16000
steps = $(if $(1),trainer.max_steps=$(1))
export OMP_WAIT_POLICY = PASSIVE

.PHONY: setup test quickstart quickstart-drawer quickstart-generator quickstart-text quickstart-titok paper compare gpu lint types notebooks docs package pictures gallery figures

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# a process for each core, and each of them one thread
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

notebooks: setup
	$(BIN)/python -m pytest --nbmake --nbmake-timeout 1200 notebooks

docs: setup
	$(BIN)/mkdocs build --strict --site-dir $(SITE)

# wheel and sdist; the wheel into an empty environment elsewhere, and at work there
package: setup
	scripts/check_package.sh $(BIN)/python

# the images of README and docs, from the models that come with the package
pictures: setup
	$(BIN)/python sample.py --limit 5 --num-tokens 1 4 16 64 256 \
	    --output docs/pictures/coarse_to_fine.png
	$(BIN)/python sample.py --limit 8 --num-tokens 1 --num-samples 4 \
	    --output docs/pictures/seeds.png
	$(BIN)/python sample.py --classes $(CLASSES) --num-samples 6 --num-tokens 64 \
	    --output docs/pictures/classes.png
	$(BIN)/python sample.py --prompt $(PROMPTS) --output outputs/pictures/prompts.png
	cp outputs/pictures/prompts.png docs/pictures/

CLASSES = heart food-fruit tool transport-ground face-smiling
PROMPTS = "a red heart" "a fish" "a strawberry on a cream background" \
    "a banana above an evergreen tree on a light blue background"

# the images of docs/gallery.md
gallery: setup
	$(BIN)/python scripts/gallery.py

# the figures of the models that come with the package, on what they were not trained on
figures: setup
	$(BIN)/python -m flextok.cli sweep emoji --data emoji:validation --reference emoji:train \
	    --dtype float32 --output outputs/figures/emoji --json benchmarks/results/emoji_model.json
	$(BIN)/python -m flextok.cli sweep emoji --data emoji_scenes:validation --limit 160 \
	    --reference "{name: emoji_scenes, split: train, length: 1414}" --dtype float32 \
	    --output outputs/figures/scenes --json benchmarks/results/emoji_model_scenes.json
	$(BIN)/python -m flextok.cli align emoji-text --data "$(HELD_OUT)" \
	    --json benchmarks/results/emoji_model_prompts.json

QUICKSTART_CLASSES = face-smiling face-affection heart flag food-fruit time

# models this small take 1.7 times as long a step with a second thread; a second core trains the
# generator, which needs the tokenizer's indices only, beside the drawer
quickstart: export OMP_NUM_THREADS = 1
quickstart: setup
	$(BIN)/python train.py configs/quickstart_tokenizer.yaml output_dir=$(OUT)/tokenizer \
	    $(call steps,$(TOKENIZER_STEPS))
	$(MAKE) --jobs 2 quickstart-drawer quickstart-generator
	$(BIN)/python sample.py $(OUT)/generator --tokenizer $(OUT)/drawer \
	    --classes $(QUICKSTART_CLASSES) --num-samples 6 --output $(OUT)/generated.png
	@echo "pictures: $(OUT)/coarse_to_fine.png and $(OUT)/generated.png"

quickstart-drawer:
	$(BIN)/python train.py configs/quickstart_drawer.yaml output_dir=$(OUT)/drawer \
	    start.weights=$(OUT)/tokenizer $(call steps,$(DRAWER_STEPS))
	$(BIN)/python sample.py $(OUT)/drawer --data emoji:validation --limit 8 \
	    --output $(OUT)/coarse_to_fine.png
	$(BIN)/python -m flextok.cli sweep $(OUT)/drawer --data emoji:validation \
	    --reference emoji:train --dtype float32 --output $(OUT)/sweep

quickstart-generator:
	$(BIN)/python train.py configs/quickstart_generator.yaml output_dir=$(OUT)/generator \
	    tokenizer=$(OUT)/tokenizer $(call steps,$(GENERATOR_STEPS))

# the scenes of configs/quickstart_text.yaml; captions say left and right, so nothing is mirrored
SCENES = name: emoji_scenes, max_objects: 2, vocabulary: basic
HELD_OUT = {$(SCENES), prompts: held_out, length: 400}

quickstart-text: setup
	$(BIN)/python train.py configs/quickstart_tokenizer.yaml output_dir=$(OUT_TEXT)/tokenizer \
	    "data.train={$(SCENES), prompts: train, length: $(NUM_SCENES)}" "data.validation=$(HELD_OUT)" \
	    data.shift=0 model.image_size=32 \
	    "model.vae={name: identity, shift: 0.09, scale: 1.69}" \
	    $(call steps,$(or $(TOKENIZER_STEPS),2800))
	$(BIN)/python train.py configs/quickstart_text.yaml output_dir=$(OUT_TEXT)/generator \
	    tokenizer=$(OUT_TEXT)/tokenizer data.train.length=$(NUM_SCENES) \
	    $(call steps,$(GENERATOR_STEPS))
	$(BIN)/python sample.py $(OUT_TEXT)/generator --data "$(HELD_OUT)" --limit 12 \
	    --output $(OUT_TEXT)/prompts.png
	$(BIN)/python -m flextok.cli align $(OUT_TEXT)/generator --data "$(HELD_OUT)" \
	    --probe $(OUT_TEXT)/probe.safetensors --probe-steps $(PROBE_STEPS) --json $(OUT_TEXT)/align.json
	@echo "pictures of held-out prompts: $(OUT_TEXT)/prompts.png"

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

# for a machine with a GPU; without one, a dry run on fake CUDA tensors
gpu: setup
	$(BIN)/python benchmarks/gpu.py

# FlexTok, TiTok, TiTok with tail drop and a 2D grid on one budget
compare: setup
	$(BIN)/python benchmarks/compare_tokenizers.py --json benchmarks/results/compare.json

# docs/paper.md: every model that it speaks of trained, measured, and its tables and figures written
BUDGET ?= full
JOBS ?= 1
DATA ?= data
PAPER ?= outputs/paper
ACCELERATOR ?= cpu
paper: setup
	$(BIN)/python experiments/paper.py --budget $(BUDGET) --jobs $(JOBS) --root $(DATA) \
	    --accelerator $(ACCELERATOR) --output $(PAPER) $(if $(filter full,$(BUDGET)),--publish)
