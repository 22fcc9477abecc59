"""Where the notebooks find their models: what the quickstarts trained, or, where they have not run,
something trained here for a minute that shows the way and little else.

FLEXTOK_QUICKSTART and FLEXTOK_QUICKSTART_TEXT name the quickstarts' folders; by default
outputs/quickstart and outputs/quickstart_text of this repository.
"""

import logging
import os
from pathlib import Path

from flextok.config import load_experiment
from flextok.training.run import train

ROOT = Path(__file__).resolve().parent.parent
SCENES = "{name: emoji_scenes, max_objects: 2, vocabulary: basic, prompts: train, length: 200}"
BRIEFLY = ["trainer.validate_every=40", "trainer.checkpoint_every=40", "trainer.log_every=20"]


def tokenizer() -> Path:
    """The folder of a tokenizer of emoji, 32 px, 16 tokens."""
    return find("FLEXTOK_QUICKSTART", "quickstart", "tokenizer", "quickstart_tokenizer", [])


def class_generator() -> Path:
    """The folder of a GPT that writes emoji by class."""
    speaks = [f"tokenizer={tokenizer()}", "data.token_variants=1"]
    return find("FLEXTOK_QUICKSTART", "quickstart", "generator", "quickstart_generator", speaks)


def text_generator() -> Path:
    """The folder of a GPT that writes scenes of two emoji from a prompt."""
    place, data = ("FLEXTOK_QUICKSTART_TEXT", "quickstart_text"), [f"data.train={SCENES}"]
    data.append("data.validation=" + SCENES.replace("train, length: 200", "held_out, length: 16"))
    speaks = find(*place, "tokenizer", "quickstart_tokenizer", [*data, "data.shift=0"])
    return find(*place, "generator", "quickstart_text", [*data, f"tokenizer={speaks}"])


def find(variable: str, quickstart: str, part: str, config: str, changes: list[str]) -> Path:
    """The quickstart's model, else one trained for 40 steps."""
    there = Path(os.environ.get(variable, ROOT / "outputs" / quickstart)).resolve() / part
    if (there / "model.safetensors").is_file():
        return there
    if variable in os.environ:
        raise FileNotFoundError(f"{variable}={os.environ[variable]} has no {part}: train it first")
    brief = ROOT / "outputs" / "notebooks" / quickstart / part
    if not (brief / "model.safetensors").is_file():
        print(f"no model in {there}: training one for 40 steps; the quickstart makes a better one")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        where = [f"output_dir={brief}", "trainer.max_steps=40"]
        train(load_experiment(ROOT / "configs" / f"{config}.yaml", [*where, *BRIEFLY, *changes]))
    return brief
