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
import torch
from IPython.display import display

from flextok import GPT, viz
from flextok.pipeline import decodable_lengths, generate_images, grow_images, load_tokenizer_of

generator = GPT.from_pretrained("emoji-class")  # comes with the package
tokenizer = load_tokenizer_of(generator, "emoji-class")
names = generator.metadata["class_names"]
print("classes:", ", ".join(names))

# %% [markdown]
# One picture, as it grows. `grow_images` hands out a picture as soon as its tokens are there:

# %%
label = torch.tensor([names.index("heart")])
frames = dict(
    grow_images(generator, tokenizer, label, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], seed=1)
)
display(viz.grid([torch.cat(list(frames.values()))], [f"{k}" for k in frames]))

# %% [markdown]
# Several classes and seeds; guidance pushes towards the class:

# %%
chosen = ["heart", "food-fruit", "animal-mammal", "face-smiling"]
labels = torch.tensor([names.index(name) for name in chosen]).repeat_interleave(6)
pictures = generate_images(generator, tokenizer, labels, [64], sampling={"guidance_scale": 2.0})[64]
display(viz.grid(list(pictures.split(6)), row_labels=chosen))

# %% [markdown]
# **From a prompt.** The text model was trained on the names of emoji, and on scenes of one or two well-known ones:

# %%
generator = GPT.from_pretrained("emoji-text")
tokenizer = load_tokenizer_of(generator, "emoji-text")
prompts = ["a red heart left of a bomb on a blue background", "a key on a yellow background"]
lengths = decodable_lengths(tokenizer, generator.num_tokens)
by_length = generate_images(generator, tokenizer, prompts, lengths, seed=3)
display(viz.coarse_to_fine(None, by_length, prompts))

# %% [markdown]
# The same tokens again, from the same seed: a result is reproducible.

# %%
again = dict(grow_images(generator, tokenizer, prompts, [4, 16], seed=3))
assert torch.allclose(again[16], by_length[16], atol=1e-4)
