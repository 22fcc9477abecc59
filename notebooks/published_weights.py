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
# # Published weights, and publishing yours
#
# Models that others released load by their hub id, a folder or a file. Nothing in such a file is run as code, and a
# missing or surplus tensor is an error. This notebook stays offline: the first cell therefore prints what to do
# where a model is not on this machine yet.

# %%
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # leave this line out to download

from IPython.display import display

import flextok
from flextok import viz
from flextok.card import model_facts, summary
from flextok.emoji.datasets import Emoji
from flextok.pipeline import reconstruct_prefixes
from flextok.storage import CheckpointError

HUB_ID = "EPFL-VILAB/flextok_d12_d12_in1k"
try:
    tokenizer = flextok.load(HUB_ID)
except CheckpointError as error:
    print(error)
    print("\nThe cells below use the package's own emoji model.")
    tokenizer = flextok.load("emoji")

# %% [markdown]
# ## The same lines for every model
#
# Whoever published a tokenizer, it encodes and decodes in the same way.

# %%
images = tokenizer.transform(Emoji("validation")[33]["image"])[None]
display(viz.coarse_to_fine(images, reconstruct_prefixes(tokenizer, images, [1, 4, 16, 64, 256])))

# %% [markdown]
# ## What a model is
#
# These are the facts that `flextok info` prints. What a published file left open, and the loader had to assume, is
# listed as *assumed*.

# %%
facts = summary(model_facts(tokenizer))
for label, value in facts.items():
    print(f"{label:<{max(map(len, facts))}}  {value}")

# %% [markdown]
# ## Save and publish
#
# `overrides` changes fields of the config while loading, here the number of decoding steps. `save_pretrained` writes
# the weights as safetensors, `config.json` and a model card. `tokenizer.push_to_hub("you/model")` publishes the same three.

# %%
folder = tempfile.mkdtemp()
changed = flextok.load("emoji", overrides={"decode.num_steps": 4})
changed.metadata["note"] = "decodes in four steps"
changed.save_pretrained(folder)
again = flextok.load(folder)
assert again.config.decode.num_steps == 4
print(Path(folder, "README.md").read_text("utf-8")[:600])
