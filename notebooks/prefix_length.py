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
# # How many tokens?
#
# How good pictures are by the number of tokens, what stays open at each length, and the length that each
# picture needs. The same as `flextok sweep` and `flextok adaptive`, on few pictures.
#
# Two questions, which few tokens set against each other. **Plausible**: does it look like an emoji, whichever?
# Sharpness is 1 for real ones, below 1 for blurred ones; the kernel distance compares the set with training
# emoji, and is about 0 for real ones. **Faithful**: does it look like this emoji? One token leaves much open, and the most
# faithful picture of it is the mean of all that it may be, a blur. So compare decoders by the first at every
# length, and by the second at all tokens.

# %%
import tempfile
from pathlib import Path

from IPython.display import Image, display

from flextok import FlexTok, viz
from flextok.data.sets import take
from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.evaluation import Options, adaptive
from flextok.evaluation.sweep import format_table, offline_network, sweep

tokenizer = FlexTok.from_pretrained("emoji")  # comes with the package
pictures = take(Emoji("validation"), 24)  # evenly spread over the set
networks = offline_network(len(pictures))  # pip install 'flextok[evaluation]' for distances
reference = take(Emoji("train"), 200) if networks else None
output = Path(tempfile.mkdtemp())

# %%
options = Options(networks=networks, reference=reference)
names = {"reference": "200 training emoji"}
report = sweep(tokenizer, pictures, options, output, num_pictures=3, num_draws=4, names=names)
print(format_table(report))
display(Image(output / "tokens.png", width=900))
scores = {row["num_tokens"]: row["faithful"]["psnr"] for row in report["results"]}
assert scores[256] > scores[1], "all tokens must be more faithful than the first"

# %% [markdown]
# Where decodes of one prefix differ (bright), the tokens have not decided yet:

# %%
display(Image(output / "variance.png", width=700))

# %% [markdown]
# **Adaptive length.** The shortest prefix that is faithful enough, picture by picture: plain shapes need few
# tokens, fine ones more. The target is what half of the tokens reach on average.

# %%
import torch

transform = ImageTransform(tokenizer.image_size)
images = torch.stack([transform(pictures[i]["image"]) for i in range(8)])
target = round(scores[128], 1)
found = adaptive.encode(tokenizer, images, f"psnr={target}")
for keep, reason in zip(found.keep.tolist(), found.reason, strict=True):
    print(f"{keep:3d} tokens: {reason}")

# %%
decoded = tokenizer.decode(
    found.indices, keep=found.keep, noise=torch.zeros(8, *tokenizer.noise_shape)
)
names = [f"{k}" for k in found.keep.tolist()]
display(viz.grid([images, decoded], names, ["original", f"{target} dB or all"], scale=2))
assert bool((found.value[found.met] >= target).all())
