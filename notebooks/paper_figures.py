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
# This notebook draws four figures like its own for images of clothes, 28 pixels wide. Models that `make paper` has trained
# are used where they are there. Otherwise two small ones are trained here, in about two minutes on a CPU.

# %%
import json
import tempfile
from pathlib import Path

import torch
from IPython.display import display

import flextok
from flextok import viz
from flextok.config import load_experiment
from flextok.data.fashion_mnist import FashionMNIST, stored_folder
from flextok.evaluation import Options
from flextok.evaluation.probe import linear_probe
from flextok.pipeline import generate_images, reconstruct_prefixes
from flextok.training.run import train

ROOT = "../data"  # the folder with Fashion-MNIST
RUNS = Path("../outputs/paper/full")  # where make paper puts its models
STEPS = 600  # of each training, where those are not there
STUDY = Path("../experiments/fashion_mnist")
LENGTHS = [1, 2, 4, 8, 16, 32]

here = stored_folder(ROOT) is not None
if not here:
    print(
        f"Fashion-MNIST is neither in {ROOT} nor installed as Debian's package dataset-fashion-mnist: the cells "
        "that need its images are skipped, and only the stored results are drawn. "
        f"flextok.data.fashion_mnist.FashionMNIST({ROOT!r}) downloads it, 30 MB."
    )

# %% [markdown]
# ## The models
#
# The tokenizer has 32 tokens of 4,096 values. The generator is a GPT that predicts these tokens for one of the ten
# classes. The small tokenizer that is trained here decodes in one step to the mean image, so its images are blurred.


# %%
def train_briefly(recipe: str, *changes: str) -> Path:
    """Train a recipe of the study for STEPS steps, and return the folder of its model."""
    settings = [f"output_dir={work / recipe}", f"trainer.max_steps={STEPS}", *changes]
    settings += [f"data.{part}.root={ROOT}" for part in ("train", "validation")]
    settings += ["data.train.limit=20000", "data.validation.limit=100"]
    return train(load_experiment(STUDY / f"recipes/{recipe}.yaml", settings))


if here:
    work = Path(tempfile.mkdtemp())
    tokenizer_folder = RUNS / "flextok/seed-0"
    if not (tokenizer_folder / "model.safetensors").exists():
        sizes = ["encoder_depth=2", "encoder_dim=96", "decoder_depth=3", "decoder_dim=96"]
        tokenizer_folder = train_briefly("tokens", *(f"model.{size}" for size in sizes))
    generator_folder = RUNS / "gpt_class/seed-0"
    if not (generator_folder / "model.safetensors").exists():
        sizes = ["model.depth=3", "model.dim=96", "model.num_heads=3", "data.batch_size=32"]
        generator_folder = train_briefly("gpt_class", f"tokenizer={tokenizer_folder}", *sizes)
    tokenizer, generator = flextok.load(tokenizer_folder), flextok.load(generator_folder)
    test = FashionMNIST(ROOT, "test", limit=2000)
    images = torch.stack([tokenizer.transform(item["image"]) for item in test])
    display(viz.grid(list(images[:20].split(10)), scale=2))

# %% [markdown]
# ## Reconstruction by the number of tokens
#
# One test image of each class is decoded from its first 1, 2, 4, ... tokens. The paper finds that few tokens fix what
# is shown, and more tokens how exactly it looks.

# %%
if here:
    shown = images[[test.labels.index(label) for label in range(10)]]
    strips = reconstruct_prefixes(tokenizer, shown, LENGTHS)
    display(viz.coarse_to_fine(shown, strips, list(test.class_names)))

# %% [markdown]
# The same in numbers, as `make paper` measured and stored them, for each recipe that it compares. The Fréchet distance
# asks how plausible the images are as a set, and lower is better. "Class kept" is the share of images of which a
# classifier still finds the class. [The study's page](../docs/paper.md) states how long these models were trained.

# %%
budget = "full" if (STUDY / "results/full").is_dir() else "small"
panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
for path in sorted((STUDY / "results" / budget).glob("*/seed-0.json")):
    rows = json.loads(path.read_text("utf-8"))["report"]["results"]
    for score, title in {
        "frechet_classifier": "Fréchet distance",
        "class_kept": "class kept",
    }.items():
        points = [(row["num_tokens"], row["scores"][score]) for row in rows]
        panels.setdefault(title, {})[path.parent.name] = points
display(viz.curves({f"stored results, budget {budget}": panels}, "tokens", logarithmic=True))

# %% [markdown]
# ## Images that share their first token
#
# Each row is one value of the first token: what this token alone decodes to, and test images that have it. They are alike
# in kind and outline, since the first token holds what matters most. Shown are the values that are most frequent in each class.

# %%
if here:
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

# %% [markdown]
# ## The class is in the first tokens
#
# A linear classifier is trained to find the class from the first 1, 2, 4, ... tokens of an image. Most of the accuracy that
# all 32 tokens allow is there after the first few. With shuffled labels it stays near chance, which is a tenth.

# %%
if here:
    probe = linear_probe(tokenizer, FashionMNIST(ROOT, limit=4000), test, Options(), LENGTHS)
    lines = {
        name: [(row["num_tokens"], row[key]) for row in probe["results"]]
        for name, key in {"classes": "accuracy", "shuffled classes": "shuffled_accuracy"}.items()
    }
    display(viz.curves({"": {"accuracy": lines}}, "tokens", logarithmic=True))
    assert probe["results"][-1]["accuracy"] > probe["results"][-1]["shuffled_accuracy"]

# %% [markdown]
# ## Generation by the number of tokens
#
# The generator predicts 32 tokens for each class, and each column decodes the first ones of them. A class is a simple
# condition, so few tokens suffice to show it. After the short training above the shapes are rough.

# %%
if here:
    names = list(test.class_names)
    generated = generate_images(generator, tokenizer, names, LENGTHS)
    display(viz.coarse_to_fine(None, generated, names))
