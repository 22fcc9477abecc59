"""Prompts for cross-attention: frozen encoders of the Hugging Face library, as FlexTok's
text-conditional models use (arXiv 2502.13967, section 3.3), and a small one over bytes that is
trained along with the generator and needs no download. words.py has one over words.

An encoder works in two halves: `rows` turns prompts into tensors of their own length, outside the
graph and good for caching; `forward` turns padded rows into embeddings, and may be trained.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flextok.places import hub_folder, is_path
from flextok.schema import Depth, Share, Size
from flextok.storage import CheckpointError, read_json

log = logging.getLogger(__name__)
_WEIGHTS, _OLD_WEIGHTS = "*.safetensors", "*.bin"
_FILES = ("*.json", "*.txt", "*.model")
_BATCH = 32  # prompts that a frozen encoder reads at once


@dataclass
class Text:
    """A batch of prompts. values: (B, L) long for an encoder that is trained, else (B, L, E) float
    embeddings; mask: (B, L) bool, True = a token, False = padding."""

    values: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, rows: Sequence[Tensor]) -> "Text":
        """rows: one (L,) or (L, E) a prompt, padded to the longest."""
        real = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return cls(*(pad_sequence(some, batch_first=True) for some in (list(rows), real)))

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, some: slice) -> "Text":
        return Text(self.values[some], self.mask[some])

    def to(self, device: torch.device | str, **options: Any) -> "Text":
        return Text(self.values.to(device, **options), self.mask.to(device, **options))

    def pin_memory(self) -> "Text":
        return Text(self.values.pin_memory(), self.mask.pin_memory())

    def pad_to(self, length: int) -> "Text":
        more = length - self.mask.shape[1]
        ends = (0, 0) * (self.values.ndim - 2) + (0, more)
        return Text(F.pad(self.values, ends), F.pad(self.mask, (0, more)))

    def join(self, other: "Text") -> "Text":
        """Both batches, one after the other."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        a, b = self.pad_to(length), other.pad_to(length)
        return Text(torch.cat([a.values, b.values]), torch.cat([a.mask, b.mask]))

    def replace(self, where: Tensor, row: Tensor) -> "Text":
        """where: (B,) bool, True = the prompt becomes `row`, (L,) or (L, E)."""
        length = max(self.mask.shape[1], len(row))
        one, mine = Text.pad([row]).pad_to(length), self.pad_to(length)
        where = where.view(-1, *(1 for _ in mine.values.shape[1:]))
        values = torch.where(where, one.values, mine.values)
        return Text(values, torch.where(where.view(-1, 1), one.mask, mine.mask))


class TextEncoder(nn.Module):
    """What the two encoders share: lengths are checked, prompts are cut with a warning."""

    frozen: bool  # rows are finished embeddings, and can be cached
    dim: int  # E, of the embeddings
    max_length: int  # tokens of a prompt, its end mark included

    def rows(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> list[Tensor]:
        """One (L,) or (L, E) tensor a prompt, on device, 1 <= L <= max_length. "" is the null
        text."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What embeddings made by this encoder depend on, as plain data."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        """Indices into a tokenizer's vocabulary. A prompt over max_length tokens is cut, with one
        warning for the whole call, with the excess."""
        check_prompts(prompts)
        limit = min(self.max_length, tokenizer.model_max_length)
        indices = tokenizer(list(prompts), verbose=False)["input_ids"]
        if long := self.warn_of_cuts(prompts, [len(ids) for ids in indices], limit):
            cut = tokenizer([prompts[i] for i in long], truncation=True, max_length=limit)
            for i, ids in zip(long, cut["input_ids"], strict=True):
                indices[i] = ids
        return indices

    def warn_of_cuts(self, prompts: Sequence[str], lengths: Sequence[int], limit: int) -> list[int]:
        """Which prompts are longer than `limit` tokens; one warning for them all."""
        long = [i for i, length in enumerate(lengths) if length > limit]
        if long:
            worst = max(long, key=lengths.__getitem__)
            excess = lengths[worst] - limit
            log.warning(
                "%d of %d prompts are longer than max_length=%d tokens and are cut, %r by %d",
                *(len(long), len(prompts), limit, shorten(prompts[worst]), excess),
            )
        return long


class TrainedEncoder(TextEncoder):
    """A small T5 encoder over indices, trained along with the generator."""

    frozen = False

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        hidden_dim: int | None,
        max_length: int,
        dropout: float,
    ):
        """Raises ValueError for sizes that do not fit together."""
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        if min(dim, depth, num_heads) < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        check_max_length(max_length)
        config = T5Config(
            vocab_size=vocab_size,
            d_model=dim,
            d_kv=dim // num_heads,
            d_ff=hidden_dim or 2 * dim,
            num_layers=depth,
            num_heads=num_heads,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
        )
        # its stack alone: the model around it lists the embedding a second time
        self.stack: Any = T5EncoderModel(config).encoder
        self.dim, self.max_length = dim, max_length

    def indices(self, prompts: Sequence[str]) -> Sequence[Sequence[Any]]:
        """Of each prompt, its tokens' indices, or several of them a token."""
        raise NotImplementedError

    def rows(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> list[Tensor]:
        return [torch.tensor(indices, device=device) for indices in self.indices(prompts)]


class ByteEncoder(TrainedEncoder):
    """UTF-8 bytes, by ByT5's tokenizer (arXiv 2105.13626)."""

    def __init__(
        self,
        dim: Size = 128,
        depth: Depth = 2,
        num_heads: Size = 4,
        hidden_dim: Size | None = None,  # of the MLPs, 2 dim
        max_length: Size = 256,
        dropout: Share = 0.0,
    ):
        # ByT5's vocabulary: 256 bytes, 3 marks, 125 sentinels
        super().__init__(384, dim, depth, num_heads, hidden_dim, max_length, dropout)

    def indices(self, prompts: Sequence[str]) -> Sequence[Sequence[int]]:
        return self.tokenize(prompts, byte_tokenizer())

    def identity(self) -> dict[str, Any]:
        return {"encoder": "bytes", "max_length": self.max_length}

    def forward(self, text: Text) -> Tensor:
        """text.values: (B, L) long. Returns (B, L, E)."""
        return self.stack(input_ids=text.values, attention_mask=text.mask.long()).last_hidden_state


class PretrainedEncoder(TextEncoder):
    """Any text encoder that the transformers library loads by name, frozen; for T5 the encoder half
    alone. It holds no parameters: the weights stay outside the generator and its checkpoints, and
    load when a prompt first needs them."""

    frozen = True

    def __init__(
        self,
        model: str = "google/flan-t5-xl",
        revision: str | None = None,
        dim: Size | None = None,
        max_length: Size = 128,
    ):
        """model: a hub id or a folder. revision: of a hub id, its commit, branch or tag; of a
        folder, the hash of its files, which must then be this one. dim: width of the embeddings,
        None = read from the model's config."""
        super().__init__()
        check_max_length(max_length)
        self.model, self.revision, self.max_length = model, revision, max_length
        self.dim = dim or hidden_size(model, revision)

    def identity(self) -> dict[str, Any]:
        folder = encoder_folder(self.model, self.revision, config_only=True)
        revision = resolved_revision(folder)
        # a folder is the same one however its path is written
        name = os.path.realpath(self.model) if os.path.isdir(self.model) else self.model
        return {"encoder": name, "revision": revision, "max_length": self.max_length}

    @torch.no_grad()
    def rows(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> list[Tensor]:
        network, tokenizer = load_encoder(self.model, self.revision)
        network.to(device)
        found: list[Tensor] = []
        indices = self.tokenize(prompts, tokenizer)
        for start in range(0, len(indices), _BATCH):
            some = indices[start : start + _BATCH]
            # an encoder without marks of its own makes nothing of "": one padding token stands in
            some = [ids or [tokenizer.pad_token_id] for ids in some]
            batch = tokenizer.pad({"input_ids": some}, return_tensors="pt").to(device)
            hidden = network(**batch).last_hidden_state.float()
            found += [h[m.bool()] for h, m in zip(hidden, batch["attention_mask"], strict=True)]
        if found[0].shape[-1] != self.dim:
            raise CheckpointError(
                f"text encoder {self.model!r} gives embeddings of width {found[0].shape[-1]}, the "
                f"config has dim={self.dim}"
            )
        return found

    def forward(self, text: Text) -> Tensor:
        """text.values: (B, L, E) float. Returns them."""
        return text.values


@lru_cache(maxsize=1)
def byte_tokenizer() -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@lru_cache(maxsize=1)  # one at a time: they are large
def load_encoder(model: str, revision: str | None) -> tuple[Any, Any]:
    """The network, frozen, in fp32, and its tokenizer. Raises CheckpointError."""
    from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    folder = encoder_folder(model, revision)
    try:
        config = read_config(folder)
        known = config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        network, report = (AutoModelForTextEncoding if known else AutoModel).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder} gives no text encoder: {reason}. It must hold config, weights and tokenizer "
            "as transformers saves them"
        ) from error
    # what only pools plays no part in the embeddings
    if missing := sorted(key for key in report["missing_keys"] if "pool" not in key):
        raise CheckpointError(f"{folder} lacks weights of its text encoder: {missing[0]!r} for one")
    check_vocabulary(tokenizer, folder)
    if config.is_encoder_decoder and not known:
        network = network.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return network.eval().requires_grad_(False), tokenizer


def check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Raise CheckpointError where the tokenizer's files are not in the folder that it was loaded
    from: transformers makes one without words, to which all texts are unknown."""
    names = dict.fromkeys(tokenizer.vocab_files_names.values())  # none of a tokenizer of bytes
    if names and not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"{folder} has no vocabulary ({' or '.join(names)}): put the tokenizer's files there, "
            "as its save_pretrained writes them"
        )


def encoder_folder(model: str, revision: str | None = None, config_only: bool = False) -> Path:
    """Where an encoder's files lie: a folder of the user's, or the hub's snapshot, of which
    config_only spares the weights. Raises CheckpointError, also when a folder is not of the
    revision."""
    place = Path(model).expanduser()
    if place.is_dir():
        if revision is not None and (found := resolved_revision(place)) != revision:
            raise CheckpointError(
                f"the text encoder in {model} (files {found}) is not the one of revision "
                f"{revision}: the generator was trained on the embeddings of another one"
            )
        return place
    if is_path(model):
        raise CheckpointError(f"text encoder: there is no folder {model!r}: name one, or a hub id")
    try:
        if config_only:
            return hub_folder(model, "config.json", revision=revision)
        return transformers_snapshot(model, revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"text encoder: {error}. Without any download works "
            "model.conditioner.encoder={name: bytes}, which is trained along"
        ) from error


def transformers_snapshot(model: str, revision: str | None = None) -> Path:
    """The hub's snapshot of a model of the transformers library. Raises CheckpointError."""
    folder = hub_folder(model, *_FILES, _WEIGHTS, revision=revision)
    if list(folder.glob(_WEIGHTS)):
        return folder
    return hub_folder(model, *_FILES, _OLD_WEIGHTS, revision=revision)


def read_config(folder: Path) -> Any:
    """An encoder's own config; of a model of images and texts (CLIP), its text half's."""
    from transformers import AutoConfig

    refuse_code(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return getattr(config, "text_config", None) or config


def refuse_code(folder: Path) -> None:
    """Raise CheckpointError when a file in the folder asks for code of its own (auto_map), which
    transformers would offer to run."""
    for path in sorted(folder.glob("*config*.json")):
        if found := read_json(path).get("auto_map"):
            raise CheckpointError(
                f"{path} asks to run code of its own (auto_map: {found!r}): refused. Nothing was "
                "run; take a model that transformers itself implements"
            )


def hidden_size(model: str, revision: str | None) -> int:
    """The width of an encoder's embeddings, from its config alone."""
    folder = encoder_folder(model, revision, config_only=True)
    try:
        return int(read_config(folder).hidden_size)
    except CheckpointError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} does not state the width of its embeddings ({error}): give dim"
        ) from error


def resolved_revision(folder: Path) -> str:
    """A hub snapshot's commit, which names its folder; else a hash of the folder's files."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(p for glob in (*_FILES, _WEIGHTS, _OLD_WEIGHTS) for p in folder.glob(glob)):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts, got one text: pass [{prompts!r}]")
    if not prompts:
        raise ValueError('no prompts: give at least one ("" is the null text)')
    if bad := [p for p in prompts if not isinstance(p, str)]:
        raise ValueError(f"prompts must be texts, got {bad[0]!r}")


def check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length={max_length} must be at least 2: a token and the end mark")


def shorten(prompt: str, length: int = 60) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 1] + "…"
