"""Generators: conditions -> indices. What training and sampling ask of each:

loss(indices, cond, generator=)                       a dict of scalars, "loss" the total
generate(cond, num_tokens=, generator=, progress=)    -> indices (B, num_tokens); its other
                                                      parameters are the generator's own options
generate_options(asked)                               checks these and adds the defaults
num_tokens, config.vocab_size
"""

from flextok.generators.ar import GPT, GPTConfig
from flextok.generators.maskgit import MaskGIT, MaskGITConfig

GENERATORS = {"gpt": GPT, "maskgit": MaskGIT}

__all__ = ["GENERATORS", "GPT", "GPTConfig", "MaskGIT", "MaskGITConfig"]
