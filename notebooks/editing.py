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
# # Editing in token space
#
# Tokens are numbers, so tokens of two images, or of an image and a generator, can be put together and decoded. Each
# step below makes new tokens in one line and shows their images. Set `FIRST` and `SECOND` to files of yours; without
# them, two emoji are used that the models were not trained on.

# %%
import torch
from IPython.display import display

import flextok
from flextok import viz
from flextok.data.sets import take
from flextok.draws import NOISE, row_generators
from flextok.editing import interpolate, mix, prefix_distances, vary
from flextok.emoji.datasets import Emoji

FIRST, SECOND = None, None  # "cat.jpg", "dog.jpg"

tokenizer = flextok.load("emoji-few-step")
emoji = {record.name: number for number, record in enumerate(Emoji("validation").records)}
pictures = [
    path or Emoji("validation")[emoji[name]]["image"]
    for path, name in ((FIRST, "tangerine"), (SECOND, "desert island"))
]
images = torch.stack([tokenizer.transform(picture) for picture in pictures])  # (2, 3, H, W)
first, second = tokenizer.encode(images).split(1)  # (1, 256) each


def decode(indices):
    """Decodes every row from the same noise, so that only the tokens differ."""
    noise = row_generators(0, NOISE, [0] * len(indices))
    return tokenizer.decode(indices, generator=noise)


display(viz.grid([images], ["first", "second"], scale=2))

# %% [markdown]
# ## First tokens of one image, later tokens of another
#
# One would expect the first tokens to decide what is decoded. But the later tokens repeat much of what the first ones
# determine, and the decoder reads all of them. The image stays the second one until about a quarter of its tokens
# are replaced.

# %%
kept = [0, 1, 4, 16, 32, 64, 128, 256]
mixed = torch.cat([mix(first, second, k) for k in kept])
display(viz.grid([decode(mixed)], [f"{k} kept" for k in kept], scale=2))
assert torch.equal(mixed[-1:], first)

# %% [markdown]
# ## Between two images
#
# Each token stands for a code, which is a point in a space of four dimensions. The codes of both images are averaged,
# and each average is rounded to the nearest code. With 64 tokens or more, the averages decode to images that have
# something of both.

# %%
weights, lengths = [0, 0.2, 0.4, 0.6, 0.8, 1], [4, 16, 64, 256]
rows = [decode(interpolate(tokenizer, first[:, :k], second[:, :k], weights)) for k in lengths]
display(viz.grid(rows, [f"{w:.0%}" for w in weights], [f"{k} tokens" for k in lengths], scale=2))

# %% [markdown]
# ## Variations that keep the first tokens
#
# A generator continues the first tokens of an image, here without a class. From one token the variations have its
# colours and little else in common. From 16 tokens they also have its outline, and from 32 they hardly differ.

# %%
generator = flextok.load("emoji-class")  # generates 64 of the 256 tokens
few = [1, 4, 16, 32]
rows = [decode(vary(generator, "none", first[:, :k], 6)) for k in few]
display(viz.grid(rows, row_labels=[f"{k} kept" for k in few], scale=2))

# %% [markdown]
# ## The same first tokens, another class
#
# Both the tokens that are kept and the class restrict what is generated. From one token the class decides what is
# shown. From 16 tokens on, the image is that of the tokens, whatever the class.

# %%
classes = ["heart", "food-fruit", "face-smiling", "tool"]
rows = [torch.cat([decode(vary(generator, c, first[:, :k], 1)) for c in classes]) for k in few]
display(viz.grid(rows, classes, [f"{k} kept" for k in few], scale=2))

# %% [markdown]
# ## The nearest images
#
# The distance between the codes of two images' first tokens is small where the images are similar. One token finds
# images whose colours lie in about the same places, whatever they show; from 16 tokens the palm tree comes first. The
# first column is the image that the others are compared with.

# %%
gallery = take(Emoji("train"), 400)
others = torch.stack([tokenizer.transform(gallery[i]["image"]) for i in range(len(gallery))])
theirs = torch.cat([tokenizer.encode(batch) for batch in others.split(50)])
rows = []
for k in (1, 4, 16, 256):
    order = prefix_distances(tokenizer, second, theirs, k)[0].argsort()
    rows.append(torch.cat([images[1:], others[order[:7]]]))
display(viz.grid(rows, row_labels=["1 token", "4 tokens", "16 tokens", "256 tokens"], scale=2))
