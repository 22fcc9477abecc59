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
# # The paper's figures, on Fashion-MNIST
#
# The FlexTok paper ([arXiv 2502.13967](https://arxiv.org/abs/2502.13967)) shows with ImageNet what ordered tokens do.
# This notebook draws figures like its own for images of clothes, 28 pixels wide. `make paper` trains the models for
# them. Where its models or the data set are not on this machine, stored results are shown, and the images of one run
# (2.7M parameters, 9,000 steps of 16 images).

# %%
import json
from pathlib import Path

import torch
from IPython.display import display
from PIL import Image

import flextok
from flextok import viz
from flextok.data.fashion_mnist import FashionMNIST, stored_folder
from flextok.pipeline import generate_images, reconstruct_prefixes

ROOT = "../data"  # the folder with Fashion-MNIST
RUNS = Path("../outputs/paper/full")  # where make paper puts its models
STORED = Path("../docs/pictures/paper")
RESULTS = Path("../experiments/fashion_mnist/results/full")
LENGTHS = [1, 2, 4, 8, 16, 32]
RECIPE = "flextok"  # the tokenizer

classes = list(FashionMNIST.class_names)
ready = (RUNS / RECIPE / "seed-0/model.safetensors").exists()
if stored_folder(ROOT, "test") is None:
    ready = False
    print(
        f"Fashion-MNIST is neither in {ROOT} nor installed as Debian's package dataset-fashion-mnist, so the stored "
        f"figures are shown. flextok.data.fashion_mnist.FashionMNIST({ROOT!r}) downloads it, 30 MB."
    )
elif not ready:
    print(f"There is no model in {RUNS}, so the stored figures are shown: `make paper` trains it.")
if ready:
    tokenizer = flextok.load(RUNS / RECIPE / "seed-0")
    test = FashionMNIST(ROOT, "test", limit=2000)
    images = torch.stack([tokenizer.transform(item["image"]) for item in test])

# %% [markdown]
# ## Reconstruction by the number of tokens
#
# One test image of each class is decoded from its first 1, 2, 4, ... of 32 tokens. The paper finds that few tokens fix
# what is shown, and more tokens how exactly it looks.

# %%
if ready:
    shown = images[[test.labels.index(label) for label in range(10)]]
    display(viz.coarse_to_fine(shown, reconstruct_prefixes(tokenizer, shown, LENGTHS), classes))
else:
    display(Image.open(STORED / f"strips_{RECIPE}.png"))

# %% [markdown]
# ## The same in numbers
#
# `make paper` measures every recipe that it compares. The Fréchet distance asks how plausible the images are as a set
# (lower is better), and "class kept" is the share of images of which a classifier still finds the class.
# [The study's page](../docs/paper.md) states how long the models of these stored results were trained.

# %%
stored = {
    path.parent.name: json.loads(path.read_text("utf-8"))
    for path in sorted(RESULTS.glob("*/seed-0.json"))
}
tokenizers = {recipe: result for recipe, result in stored.items() if "probe" in result}
panels = {
    title: {
        recipe: [(row["num_tokens"], row["scores"][score]) for row in result["report"]["results"]]
        for recipe, result in tokenizers.items()
    }
    for score, title in {
        "frechet_classifier": "Fréchet distance",
        "class_kept": "class kept",
    }.items()
}
display(viz.curves({"stored results": panels}, "tokens", logarithmic=True))

# %% [markdown]
# ## Images that share their first token
#
# Each row is one value of the first token: what this token alone decodes to, and test images that have it. They are alike
# in kind and outline, since the first token holds what matters most. Shown are the values that are most frequent in each class.

# %%
if ready:
    first = torch.cat([tokenizer.encode(some)[:, 0] for some in images.split(100)])
    labels = torch.tensor(test.labels)
    frequent = torch.stack([first[labels == label].mode().values for label in range(10)]).unique()
    decoded = tokenizer.decode(frequent[:, None], generator=torch.Generator().manual_seed(0))
    groups = [
        torch.cat([image[None], images[first == value][:8]])
        for image, value in zip(decoded, frequent, strict=True)
    ]
    names = [f"token {int(value)}" for value in frequent]
    display(viz.grid(groups, ["decoded"], names, scale=2))
else:
    display(Image.open(STORED / "first_token.png"))

# %% [markdown]
# ## The class is in the first tokens
#
# A linear classifier is trained to find the class from the first 1, 2, 4, ... tokens of an image. Most of the accuracy that
# all 32 tokens allow is there after the first few. With shuffled labels it stays near chance, which is a tenth.

# %%
probe = stored[RECIPE]["probe"]["results"]
lines = {
    name: [(row["num_tokens"], row[key]) for row in probe]
    for name, key in {"classes": "accuracy", "shuffled classes": "shuffled_accuracy"}.items()
}
display(viz.curves({"stored results": {"accuracy": lines}}, "tokens", True))
assert probe[-1]["accuracy"] > probe[-1]["shuffled_accuracy"]

# %% [markdown]
# ## Generation by the number of tokens
#
# A generator predicts 32 tokens for each class, and each column decodes the first ones of them. A class is a simple
# condition, so the paper finds that few tokens suffice for it.

# %%
if ready and (RUNS / "gpt_class/seed-0/model.safetensors").exists():
    generator = flextok.load(RUNS / "gpt_class/seed-0")
    generated = generate_images(
        generator, tokenizer, classes, LENGTHS, sampling={"guidance_scale": 1.5}
    )
    display(viz.coarse_to_fine(None, generated, classes))
else:
    display(Image.open(STORED / "generated.png"))

# %%
scores = stored["gpt_class"]["report"]["results"]
curve = [(row["num_tokens"], row["scores"]["frechet_classifier"]) for row in scores]
panel = {"Fréchet distance": {"generator by class": curve}}
display(viz.curves({"stored results": panel}, "tokens", logarithmic=True))
