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
# # How many tokens does an image need?
#
# That depends on what is wanted. A *plausible* image looks like an emoji, whichever it is. A *faithful* image looks
# like the very one that was encoded.

# %%
import json
import tempfile
from pathlib import Path

import torch
from IPython.display import Image, display

import flextok
from flextok import viz
from flextok.data.sets import take
from flextok.emoji.datasets import Emoji
from flextok.evaluation import Options, adaptive
from flextok.evaluation.sweep import sweep

tokenizer = flextok.load("emoji")  # comes with the package
examples = take(Emoji("validation"), 8)  # spread evenly over what it was not trained on

# %% [markdown]
# ## What the tokens leave open
#
# Every length of three emoji is decoded four times, from other noise. The maps below the images show how far
# these four differ at each pixel: what is dark is fixed by the tokens, what is bright is made up by the decoder.
# `flextok sweep` does the same from the command line.

# %%
output = Path(tempfile.mkdtemp())
sweep(tokenizer, take(examples, 3), Options(networks=()), output, num_pictures=3, num_draws=4)
display(Image(output / "variance.png", width=900))

# %% [markdown]
# ## Plausible and faithful, measured
#
# The repository holds these scores of all 154 validation emoji. The kernel distance compares the decoded images, as a set,
# with training emoji (0 is right), and sharpness is relative to the originals' (1 is right). Images are nearly as sharp as
# the originals from the first token on, but only many tokens make them faithful.

# %%
report = json.loads(Path("../benchmarks/results/emoji_model.json").read_text("utf-8"))
titles = {
    "kernel_to_reference_efficientnet_lite0_native": "plausible: kernel distance",
    "sharpness": "plausible: sharpness",
    "psnr": "faithful: PSNR (dB)",
}
panels = {
    title: {"": [(row["num_tokens"], row["scores"][score]) for row in report["results"]]}
    for score, title in titles.items()
}
display(viz.curves({"": panels}, "tokens", logarithmic=True))

# %% [markdown]
# ## The shortest prefix that is faithful enough
#
# For each emoji, the fewest tokens are searched that reach a PSNR of 20 dB. Plain shapes need few tokens and detailed
# ones need many. `flextok adaptive` does the same from the command line.

# %%
images = torch.stack([tokenizer.transform(item["image"]) for item in examples])
found = adaptive.encode(tokenizer, images, "psnr=20")
for keep, reason in zip(found.keep.tolist(), found.reason, strict=True):
    print(f"{keep:3d} tokens: {reason}")
decoded = tokenizer.decode(
    found.indices, keep=found.keep, noise=torch.zeros(len(images), *tokenizer.noise_shape)
)
lengths = [f"{k}" for k in found.keep.tolist()]
display(viz.grid([images, decoded], lengths, ["original", "20 dB, or all tokens"], scale=2))
assert bool((found.value[found.met] >= 20).all())
