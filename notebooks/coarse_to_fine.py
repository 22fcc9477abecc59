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
# # An image, coarse to fine
#
# A FlexTok tokenizer encodes an image as a sequence of tokens, the most important ones first
# ([FlexTok](https://arxiv.org/abs/2502.13967), section 3). The model used here comes with the package and was
# trained on emoji. Set `PICTURE` to a file of yours; without one, an emoji that the model was not trained on is encoded.

# %%
import torch
from IPython.display import display

import flextok
from flextok import viz
from flextok.emoji.datasets import Emoji
from flextok.pipeline import decodable_lengths, reconstruct_prefixes

PICTURE = None  # "cat.jpg"

tokenizer = flextok.load("emoji")
images = tokenizer.transform(PICTURE or Emoji("validation")[103]["image"])[None]  # (1, 3, H, W)
indices = tokenizer.encode(images)  # (1, K)
print(f"{tokenizer.num_tokens} tokens, each one of {tokenizer.vocab_size} values. The first 16:")
print(indices[0, :16].tolist())
display(viz.grid([images], scale=2))

# %% [markdown]
# ## The first tokens alone decode to a whole image
#
# Each column decodes the first 1, 2, 4, ... of these tokens, and leaves out the rest. A few tokens fix the
# colours and the rough outline. Each further token adds detail.

# %%
lengths = decodable_lengths(tokenizer)
decoded = reconstruct_prefixes(tokenizer, images, lengths)
display(viz.coarse_to_fine(images, decoded))

# %% [markdown]
# ## The decoder makes up the rest
#
# The decoder starts from noise, and the seed decides which noise. What is alike in a column is fixed by the
# tokens. What differs was made up, and more tokens leave less to make up.

# %%
seeds = range(4)
by_seed = [reconstruct_prefixes(tokenizer, images, lengths, seed=seed) for seed in seeds]
rows = [torch.cat([by_length[k] for k in lengths]) for by_length in by_seed]
display(viz.grid(rows, [f"{k}" for k in lengths], [f"seed {seed}" for seed in seeds], scale=2))
assert not torch.equal(by_seed[0][1], by_seed[1][1]), "another seed must give another image"
