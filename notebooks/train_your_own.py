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
# # A tokenizer trained on your pictures
#
# This notebook trains the quickstart's small tokenizer for 150 steps, which takes about a minute on a CPU. Set `ROOT`
# to a folder of pictures of yours, which are only read. Without one, 256 emoji are written to a temporary folder and used.

# %%
import csv
import json
import logging
import tempfile
from pathlib import Path

import torch
from IPython.display import display

import flextok
from flextok import viz
from flextok.config import load_experiment
from flextok.data.datasets import ImageFolder
from flextok.data.sets import take
from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.pipeline import reconstruct_prefixes
from flextok.training.run import train

ROOT = None  # the folder of your pictures, for example "~/pictures"

work = Path(tempfile.mkdtemp())  # all that is written goes here
if ROOT is None:
    root = work / "pictures"
    root.mkdir()
    emoji = take(Emoji("train"), 256)
    for number in range(len(emoji)):
        emoji[number]["image"].save(root / f"{number}.png")
else:
    root = Path(ROOT).expanduser()
pictures = ImageFolder(root)
print(len(pictures), "pictures")
images = torch.stack([ImageTransform(64)(item["image"]) for item in take(pictures, 8)])
display(viz.grid([images]))

# %% [markdown]
# ## Train
#
# A training run is a YAML file, and what you change of it. Every setting has a name, and a misspelt name is an error
# that lists the known ones. `flextok train --data FOLDER --size 64` writes such a file for a folder by itself.

# %%
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
data = json.dumps({"name": "folder", "root": str(root)})
experiment = load_experiment(
    Path("..", "configs", "quickstart_tokenizer.yaml"),
    [
        f"output_dir={work / 'run'}",
        f"data.train={data}",
        f"data.validation={data}",
        "trainer.max_steps=150",
        "trainer.log_every=10",
        "trainer.validate_every=150",
        "trainer.checkpoint_every=150",
    ],
)
folder = train(experiment)

# %% [markdown]
# ## The loss
#
# The run wrote its losses to a CSV file. TensorBoard reads the folder `logs` as well.

# %%
rows = list(csv.DictReader(next(folder.glob("logs/**/metrics.csv")).open()))
key = next(k for k in rows[0] if "loss" in k and "train" in k)
points = [(float(row["step"]), float(row[key])) for row in rows if row[key]]
display(viz.curves({"": {key: {"": points}}}, "step"))
assert points[-1][1] < points[0][1], "the loss did not fall"

# %% [markdown]
# ## The result
#
# After so few steps the images are blurred, and further tokens add little. The decoder of this config also returns
# the mean of all images that fit the tokens, which is a blur for few tokens however long it is trained.
# `configs/quickstart_drawer.yaml` continues from this run with a second decoder that makes sharp images.

# %%
tokenizer = flextok.load(folder)
lengths = [1, 4, 16]
display(viz.coarse_to_fine(images[:4], reconstruct_prefixes(tokenizer, images[:4], lengths)))
