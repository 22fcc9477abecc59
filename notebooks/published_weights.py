# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Published weights, and passing yours on
#
# Weights that others released load by their hub id, a folder or a file, without their code: nothing in a file
# is run, and a missing or surplus tensor is an error. Here without a network: then the loader says what to do.

# %%
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # leave it out to download

from IPython.display import display

from flextok import FlexTok, viz
from flextok.card import model_facts, summary
from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.pipeline import load, reconstruct_prefixes
from flextok.storage import CheckpointError

HUB_ID = "EPFL-VILAB/flextok_d12_d12_in1k"
try:
    published = load(HUB_ID)
except CheckpointError as error:
    published = None
    print(error)

# %% [markdown]
# With or without it, the same lines. `model_facts` is what `flextok info` prints, with all that a published
# file left open under *assumed*:

# %%
tokenizer = published or FlexTok.from_pretrained("emoji")
for label, value in summary(model_facts(tokenizer)).items():
    print(f"{label:<18}{value}")

# %%
images = ImageTransform(tokenizer.image_size)(Emoji("validation")[7]["image"])[None]
display(viz.coarse_to_fine(images, reconstruct_prefixes(tokenizer, images, [1, 16, 256])))

# %% [markdown]
# Fields of the config can be changed while loading, dots descend. Saved, it is our layout: safetensors, a
# `config.json` and a model card; `push_to_hub("you/model")` publishes the same.

# %%
folder = tempfile.mkdtemp()
changed = FlexTok.from_pretrained("emoji", overrides={"decode.num_steps": 4})
changed.metadata["note"] = "decodes in four steps"
changed.save_pretrained(folder)
again = load(folder)
assert again.config.decode.num_steps == 4
print(Path(folder, "README.md").read_text()[:600])
