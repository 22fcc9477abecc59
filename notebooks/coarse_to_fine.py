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
# # A picture, coarse to fine
#
# A FlexTok tokenizer encodes an image as a short sequence of tokens, the most important ones first
# ([FlexTok](https://arxiv.org/abs/2502.13967), section 3). Any first few of them decode to a whole picture.
# Set `PICTURE` to a file of yours; without one an emoji stands in.

# %%
import torch
from IPython.display import display

from flextok import FlexTok, viz
from flextok.data.pictures import load_picture
from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.evaluation.metrics import psnr, sharpness, ssim
from flextok.pipeline import decodable_lengths, reconstruct_prefixes

PICTURE = None  # "cat.jpg"

tokenizer = FlexTok.from_pretrained("emoji")  # comes with the package
picture = load_picture(PICTURE) if PICTURE else Emoji("validation")[5]["image"]
images = ImageTransform(tokenizer.image_size)(picture)[None]  # (1, 3, H, W) in [-1, 1]
indices = tokenizer.encode(images)  # (1, K)
print(f"{tokenizer.num_tokens} tokens of {tokenizer.vocab_size} kinds each:")
print(indices[0].tolist())

# %% [markdown]
# The same noise, more and more tokens:

# %%
lengths = decodable_lengths(tokenizer)
decoded = reconstruct_prefixes(tokenizer, images, lengths)
display(viz.coarse_to_fine(images, decoded))

# %% [markdown]
# Each of them has to be **plausible**, as sharp as a real picture (1); only all tokens can make it **faithful**,
# this very picture. From few tokens the highest PSNR is that of a blur.

# %%
print("tokens  plausible: sharpness  faithful: PSNR (dB), SSIM")
for k, made in decoded.items():
    ratio = (sharpness(made) / sharpness(images)).item()
    print(f"{k:6d}{ratio:22.2f}{psnr(made, images).item():21.1f}{ssim(made, images).item():7.2f}")

# %% [markdown]
# The decoder makes up what the tokens leave open: other noise, another image. With more tokens there is
# less left to make up. (One step of the decoder gives about the mean of what is possible; more steps draw a
# sample.)

# %%
seeds = [
    reconstruct_prefixes(tokenizer, images, lengths, seed=seed, decoding={"num_steps": 4})
    for seed in range(3)
]
rows = [torch.cat([by_length[k] for k in lengths]) for by_length in seeds]
labels = [f"{k}" for k in lengths]
display(viz.grid(rows, labels, [f"seed {seed}" for seed in range(3)], scale=2))

# %% [markdown]
# Tokens are just numbers. Put the first ones of one picture before the last ones of another:

# %%
other = ImageTransform(tokenizer.image_size)(Emoji("validation")[40]["image"])[None]
theirs = tokenizer.encode(other)
ours = [0, 4, 16, 64, 256]
mixed = torch.cat([torch.cat([indices[:, :k], theirs[:, k:]], dim=1) for k in ours])
pictures = tokenizer.decode(mixed, generator=torch.Generator().manual_seed(0))
display(viz.grid([pictures], [f"{k} ours" for k in ours], scale=2))
assert len(decoded) == len(lengths)
assert not torch.equal(decoded[1], decoded[lengths[-1]])
