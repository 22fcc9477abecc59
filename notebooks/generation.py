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
# # Growing pictures, token by token
#
# A GPT writes the tokens one after the other, coarse to fine, from a class or a prompt. It may stop at any
# length: what is there already is a picture.

# %%
import models
import torch
from IPython.display import display

from flextok import GPT, viz
from flextok.pipeline import generate_images, grow_images, load_tokenizer_of

folder = models.class_generator()
generator = GPT.from_pretrained(folder)
tokenizer = load_tokenizer_of(generator, folder)
names = generator.metadata["class_names"]
print("classes:", ", ".join(names))

# %% [markdown]
# One picture, as it grows. `grow_images` hands out a picture as soon as its tokens are there:

# %%
label = torch.tensor([names.index("Food & Drink")])
frames = dict(grow_images(generator, tokenizer, label, list(range(1, 17)), seed=1))
display(viz.grid([torch.cat(list(frames.values()))], [f"{k}" for k in frames]))

# %% [markdown]
# Several classes and seeds; guidance pushes towards the class:

# %%
labels = torch.arange(4).repeat_interleave(6)
pictures = generate_images(generator, tokenizer, labels, sampling={"guidance_scale": 2.0})[16]
display(viz.grid(list(pictures.split(6)), row_labels=names[:4], scale=2))

# %% [markdown]
# **From a prompt.** The quickstart's text model knows scenes of two emoji, and mostly their backgrounds:

# %%
folder = models.text_generator()
generator = GPT.from_pretrained(folder)
tokenizer = load_tokenizer_of(generator, folder)
prompts = ["a red heart left of a bomb on a blue background", "a key on a yellow background"]
by_length = generate_images(generator, tokenizer, prompts, [1, 2, 4, 8, 16], seed=3)
display(viz.coarse_to_fine(None, by_length, prompts))

# %% [markdown]
# The same tokens again, from the same seed: a result is reproducible.

# %%
again = dict(grow_images(generator, tokenizer, prompts, [4, 16], seed=3))
assert torch.allclose(again[16], by_length[16], atol=1e-4)
