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
# # Your own tokenizer, from a folder of pictures
#
# A run is one YAML file and what you change of it. Here: the quickstart's, for 150 steps, on a folder of 256
# pictures written for the purpose. Point `ROOT` at yours, which are only read; longer training makes it sharper.

# %%
import csv
import json
import logging
import tempfile
from pathlib import Path

from IPython.display import display

from flextok import FlexTok, viz
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

# %% [markdown]
# Every setting has a name; a misspelt one is an error that lists the known ones.

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
# The loss, from the run's own log:

# %%
rows = list(csv.DictReader(next(folder.glob("logs/**/metrics.csv")).open()))
key = next(k for k in rows[0] if "loss" in k and "train" in k)
points = [(float(row["step"]), float(row[key])) for row in rows if row[key]]
display(viz.curves({"": {key: {"": points}}}, "step"))

# %%
tokenizer = FlexTok.from_pretrained(folder)
transform = ImageTransform(tokenizer.image_size)
images = transform(pictures[0]["image"])[None]
display(viz.coarse_to_fine(images, reconstruct_prefixes(tokenizer, images, [1, 4, 16])))
assert points[-1][1] < points[0][1], "it learned nothing"
