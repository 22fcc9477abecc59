"""Published FlexTok tokenizers, with their VAE (arXiv 2502.13967), in our terms, and back.

A published file carries its config in the safetensors metadata, a Python literal for each section
of a tree that names the classes to build. Here it is data: sizes come from the shapes of the
tensors, the tree is checked against them, and what is not in the shapes is read from it.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flextok.convert.rules import (
    Documents,
    Published,
    Rule,
    Section,
    State,
    agree,
    count,
    shape,
    translate,
    without_ones,
)

# the tree of d12-d12; those of the other sizes differ in numbers
TREE: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_ENCODER, _DECODER = "encoder.module_dict.", "decoder.module_dict."
_RULES = [
    Rule("vae.vae.*", r"vae.vae.\1"),
    Rule(_ENCODER + "enc_patch_emb.patch_proj.*", r"encoder.patch_embed.\1"),
    Rule(_ENCODER + "enc_posemb_module.posembs", "encoder.patch_pos"),
    Rule(_ENCODER + "enc_register_module.registers", "encoder.registers"),
    Rule(_ENCODER + "enc_transformer.blocks.*", r"encoder.blocks.\1"),
    Rule(_ENCODER + "enc_to_latents.proj.*", r"encoder.head.\1"),
    Rule(_DECODER + "dec_from_latents.proj.*", r"decoder.code_embed.\1"),
    Rule(  # (1, 1, D, K) -> (K, D)
        _DECODER + "dec_registers_posemb_module.posembs",
        "decoder.register_pos",
        lambda state, key: without_ones(leading=2)(state, key).T,
        lambda state, key: state[key].T[None, None],
    ),
    Rule(_DECODER + "dec_nested_dropout.dropout_mask_token", "decoder.mask_token"),
    Rule(_DECODER + "dec_latent_dropout.nullcond", "decoder.null_token"),
    Rule(_DECODER + "dec_noise_patch_emb.patch_proj.*", r"decoder.patch_embed.\1"),
    Rule(_DECODER + "dec_patches_posemb_module.posembs", "decoder.patch_pos"),
    Rule(_DECODER + "dec_time_embedder.mlp.0.*", r"decoder.time_embed.fc1.\1"),
    Rule(_DECODER + "dec_time_embedder.mlp.2.*", r"decoder.time_embed.fc2.\1"),
    Rule(
        _DECODER + "dec_transformer.blocks.#.adaLN_modulation.1.*",
        r"decoder.blocks.\1.modulation.linear.\2",
    ),
    Rule(_DECODER + "dec_transformer.blocks.*", r"decoder.blocks.\1"),
    Rule(_DECODER + "dec_to_patches.adaLN_modulation.1.*", r"decoder.modulation.linear.\1"),
    Rule(_DECODER + "dec_to_patches.proj.*", r"decoder.head.\1"),
]


def is_flextok(state: State) -> bool:
    return any(key.startswith((_ENCODER, _DECODER)) for key in state)


def convert_flextok(state: State, documents: Documents) -> Published:
    for document in documents:
        check_classes(document)
    config, open_points = flextok_config(state, find_tree(documents))
    provenance = {
        "layout": "FlexTok, published",
        "license": "research use only",
        "assumed": open_points,
    }
    return Published("flextok", config, flextok_state(state), provenance)


def flextok_state(published: State) -> dict[str, Tensor]:
    """A published FlexTok state dict (VAE or not) in our names and shapes; views. Raises ValueError
    for an unknown key."""
    return translate(published, _RULES)


def to_published(config: Section, state: State) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A FlexTok of ours, its config as saved, as a published file holds it: tensors, and the config
    tree as safetensors metadata. Raises ValueError for what published modules do not have."""
    fsq, vae = config["quantizer"], config["vae"]
    needed: dict[str, tuple[Any, Any]] = {
        "vae.name": (vae["name"], "kl"),
        "vae.latents_mean": (vae.get("latents_mean"), None),
        "vae.latents_std": (vae.get("latents_std"), None),
        "vae.norm_groups": (vae.get("norm_groups", 32), 32),
        "quantizer.name": (fsq["name"], "fsq"),
        "quantizer.eps": (fsq.get("eps", 1e-3), 1e-3),
        "quantizer.bound": (fsq.get("bound", "tanh"), "tanh"),
        "quantizer.gain": (fsq.get("gain", 1.0), 1.0),
        **{key: (config[key], None) for key in ("token_grid", "drawer")},
        "drop_mode": (config["drop_mode"], "mask"),
        "prediction": (config["prediction"], "velocity"),
        "ordered": (config["ordered"], True),
        "distilled": (config["distilled"], False),
        "shapes": (config["shapes"], []),
    }
    for key, (found, wanted) in needed.items():
        if found != wanted:
            raise ValueError(
                f"the published layout has no {key}={found!r}, only {wanted!r}: train a model with "
                "it, as configs/flextok_d12_d12_paper.yaml does"
            )
    published = translate(state, [rule.reversed() for rule in _RULES])
    tree = published_tree(config, published)
    return published, {"format": "pt", **{name: str(value) for name, value in tree.items()}}


def published_tree(config: Section, published: State) -> dict[str, Any]:
    """The tree of a config and of its published state dict: TREE with other numbers."""
    encoder_dim, patch_dim = shape(published, _ENCODER + "enc_patch_emb.patch_proj.weight", 2)
    code_dim = shape(published, _ENCODER + "enc_to_latents.proj.weight", 2)[0]
    decoder_dim = shape(published, _DECODER + "dec_from_latents.proj.weight", 2)[0]
    grid = shape(published, _ENCODER + "enc_posemb_module.posembs", 4)[2]
    patch, registers = config["patch_size"], config["num_registers"]
    channels = patch_dim // patch**2
    tree = copy.deepcopy(TREE)
    for part, dim in (("encoder", encoder_dim), ("decoder", decoder_dim)):
        sizes = {"dim": dim, "depth": config[f"{part}_depth"], "head_dim": config["head_dim"]}
        sizes |= {"n_min": registers, "n_max": registers, "patch_sizes": [patch, patch]}
        sizes |= {"channels_in": channels, "channels_out": channels}
        sizes |= {"dim_in": code_dim, "dim_out": code_dim}
        sizes |= {"max_timestep": config["max_timestep"]}
        for section in tree[part]["module_dict"].values():
            section |= {key: value for key, value in sizes.items() if key in section}
            if "max_sizes" in section:
                is_line = len(section["max_sizes"]) == 1
                section["max_sizes"] = [registers] if is_line else [grid, grid]
    tree["regularizer"]["levels"] = list(config["quantizer"]["levels"])
    tree["pipeline"]["out_channels"] = channels
    tree["vae"] |= {"latent_channels": channels}
    tree["vae"] |= {"scaling_factor": config["vae"].get("scaling_factor", 1.0)}
    return tree


def find_values(document: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, at any depth of mappings."""
    if isinstance(document, Mapping):
        if key in document:
            yield document[key]
        for value in document.values():
            yield from find_values(value, key)


KNOWN_CLASSES = frozenset(find_values(TREE, "_target_"))


def check_classes(document: Any, place: str = "") -> None:
    """Raise ValueError when a section names a class that FlexTok's published configs do not."""
    if isinstance(document, Mapping):
        name = document.get("_target_")
        if name is not None and (not isinstance(name, str) or name not in KNOWN_CLASSES):
            raise ValueError(
                f"the config names {name!r} ({place or 'at its top'}), which is no class of a "
                "published FlexTok: refused. Nothing was imported or run"
            )
        for key, value in document.items():
            check_classes(value, f"{place}.{key}".lstrip("."))
    elif isinstance(document, list | tuple):
        for i, value in enumerate(document):
            check_classes(value, f"{place}[{i}]")


def find_tree(documents: Documents) -> Section:
    """The first config tree among documents or one level down in them; empty if there is none."""
    for document in documents:
        for tree in (document, *document.values()):
            if isinstance(tree, Mapping) and _sections(tree):
                return tree
    return {}


def _sections(tree: Section) -> dict[str, Section]:
    """The sections of encoder and decoder by name; those names do not overlap."""
    sections: dict[str, Section] = {}
    for part in ("encoder", "decoder"):
        inner = _mapping(_mapping(tree.get(part)).get("module_dict"))
        sections |= {name: v for name, v in inner.items() if isinstance(v, Mapping)}
    return sections


def flextok_config(state: State, tree: Section | None = None) -> tuple[dict[str, Any], list[str]]:
    """Our config of a published state dict and its config tree (meta tensors will do), and one
    line for each point that the tree leaves open. Raises ValueError when the two disagree."""
    tree = tree or {}
    sections = _sections(tree)
    open_points: list[str] = []

    def read(key: str, section: Any, default: Any, why: str) -> Any:
        for value in find_values(section, key.rpartition(".")[2]):
            if value is not None:
                return value
        open_points.append(f"{key} = {default} ({why})")
        return default

    encoder_dim, patch_dim = shape(state, _ENCODER + "enc_patch_emb.patch_proj.weight", 2)
    code_dim = shape(state, _ENCODER + "enc_to_latents.proj.weight", 2)[0]
    grid = shape(state, _ENCODER + "enc_posemb_module.posembs", 4)[2]
    num_registers = shape(state, _ENCODER + "enc_register_module.registers", 2)[0]
    decoder_dim = shape(state, _DECODER + "dec_from_latents.proj.weight", 2)[0]
    encoder_depth = count(state, _ENCODER + "enc_transformer.blocks.")
    decoder_depth = count(state, _DECODER + "dec_transformer.blocks.")
    head_dim = sections.get("enc_transformer", {}).get("head_dim", 64)
    vae = vae_config(state)
    patch_size = round((patch_dim / vae["channels"]) ** 0.5)
    expected = {
        "enc_patch_emb": {"channels_in": vae["channels"], "dim": encoder_dim},
        "enc_posemb_module": {"posemb_type": "sincos", "posemb_scaling": "absolute"},
        "enc_register_module": {"n_max": num_registers, "ordering_mode": "nested"},
        "enc_seq_packer": {"mask_mode": "causal_last"},
        "enc_transformer": {"dim": encoder_dim, "depth": encoder_depth},
        "enc_to_latents": {"dim_out": code_dim},
        "dec_from_latents": {"dim_in": code_dim, "dim": decoder_dim},
        "dec_registers_posemb_module": {"posemb_type": "learnable_sum"},
        "dec_noise_patch_emb": {"patch_sizes": [patch_size, patch_size]},
        "dec_patches_posemb_module": {"posemb_type": "sincos", "max_sizes": [grid, grid]},
        "dec_seq_packer": {"mask_mode": "full"},
        "dec_transformer": {
            "dim": decoder_dim,
            "depth": decoder_depth,
            "head_dim": head_dim,
            "adaLN_expansion": 2,
        },
    }
    for name, values in expected.items():
        agree(sections.get(name, {}), values, name, "the weights, or what is implemented here,")
    if any(find_values(tree.get("vae"), "shift_factor")):
        raise ValueError("the config shifts the VAE's latents: that is not supported")
    scaling = read("vae.scaling_factor", tree.get("vae"), 1.0, "the file names none")
    fsq = tree.get("regularizer")
    levels = read("quantizer.levels", fsq, [8, 8, 8, 5, 5, 5], "those of all releases")
    times = sections.get("dec_time_embedder")
    max_timestep = read("max_timestep", times, 1000.0, "the published class's default")
    return {
        "image_size": grid * patch_size * 2 ** (len(vae["block_channels"]) - 1),
        "patch_size": patch_size,
        "num_registers": num_registers,
        "head_dim": head_dim,
        "encoder_depth": encoder_depth,
        "encoder_dim": encoder_dim,
        "decoder_depth": decoder_depth,
        "decoder_dim": decoder_dim,
        "vae": {**vae, "scaling_factor": _number("vae.scaling_factor", scaling)},
        "quantizer": {"name": "fsq", "levels": levels},
        "max_timestep": _number("max_timestep", max_timestep),
    }, open_points


def vae_config(state: State) -> dict[str, Any]:
    """The VAE that a published state dict holds under vae.vae., by its shapes."""
    blocks = count(state, "vae.vae.encoder.down_blocks.")
    if not blocks:
        raise ValueError("the weights hold no VAE (vae.vae.encoder...): is the file complete?")
    first = "vae.vae.encoder.down_blocks.{}.resnets.0.conv1.weight"
    return {
        "name": "kl",
        "channels": shape(state, "vae.vae.decoder.conv_in.weight", 4)[1],
        "block_channels": [shape(state, first.format(i), 4)[0] for i in range(blocks)],
        "layers_per_block": count(state, "vae.vae.encoder.down_blocks.0.resnets."),
    }


def _mapping(value: Any) -> Section:
    return value if isinstance(value, Mapping) else {}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"the config has {name} = {value!r}, expected a positive number")
    return float(value)
