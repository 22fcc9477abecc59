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
# # An image grows, token by token
#
# A generator is a GPT that predicts the tokens one after the other, coarse to fine, from a class or a prompt.
# It may stop at any length, because a tokenizer of ordered tokens decodes any number of them. The models used here
# come with the package and were trained on emoji.

# %%
import torch
from IPython.display import display

import flextok
from flextok import viz
from flextok.pipeline import generate_images, grow_images

generator = flextok.load("emoji-class")
tokenizer = flextok.load_tokenizer_of(generator)
print(f"{len(generator.class_names)} classes, among them", ", ".join(generator.class_names[::12]))
lengths = [1, 2, 4, 8, 16, 32, generator.num_tokens]
growing = grow_images(generator, tokenizer, "heart", lengths)  # yields while it generates
frames = dict(growing)
display(viz.coarse_to_fine(None, frames, ["heart"]))

# %% [markdown]
# ## Several classes, several seeds
#
# Each row is a class, and each image in it has its own random draws. `guidance_scale` strengthens the influence of
# the class: a higher one makes images that fit their class better and differ less.

# %%
classes = ["heart", "face-smiling", "food-fruit", "flag"]
labels = [name for name in classes for _ in range(6)]
by_length = generate_images(generator, tokenizer, labels, [64], sampling={"guidance_scale": 2.0})
display(viz.samples(by_length[64], labels, per_row=6))

# %% [markdown]
# ## From a prompt
#
# `emoji-text` was trained on the names of emoji and on descriptions of scenes of one or two of them. The names
# give recognisable emoji. Of the scenes it shows the colours, mostly at the right places, and rough shapes.

# %%
generator = flextok.load("emoji-text")
tokenizer = flextok.load_tokenizer_of(generator)
prompts = ["a red heart", "a fish", "a strawberry on a cream background"]
prompts += ["a red heart left of a bomb on a blue background"]
by_length = generate_images(generator, tokenizer, prompts, lengths)
display(viz.coarse_to_fine(None, by_length, prompts))

# %% [markdown]
# ## Repeatable
#
# The same seed gives the same tokens and the same images, whether they are generated in one go or as they grow.

# %%
again = dict(grow_images(generator, tokenizer, prompts, [16]))
display(viz.grid([by_length[16], again[16]], row_labels=["in one go", "growing"], scale=2))
assert torch.allclose(again[16], by_length[16], atol=1e-4)
