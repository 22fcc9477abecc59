"""Conditions of a generator behind one small interface: conditioner(cond, drop) -> Condition.

A class adds its embedding to the start token (as the published FlexTok AR models do); a text is
read by cross-attention in every block. The null condition of a class is zero, or an embedding of
its own (as in the published MaskGIT models); that of a text is "".

    cond = conditioner.prepare(raw, device)  # labels or prompts, as a user or a batch gives them
    condition = conditioner(cond, drop)      # what the transformer reads
    null = conditioner.null_like(cond)       # for guidance
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flextok.generators.text import ByteEncoder, PretrainedEncoder, Text, check_prompts
from flextok.generators.words import WordEncoder
from flextok.nn.devices import span, to_device
from flextok.schema import ConfigError, Many, Size, build, find_class, whole_number

Cond = Tensor | Sequence[str] | Text  # (B,) labels, B prompts, or what `prepare` made of them
NULL_CLASS = -1  # as a label: no condition
TEXT_ENCODERS = {"bytes": ByteEncoder, "words": WordEncoder, "pretrained": PretrainedEncoder}


class Condition(NamedTuple):
    """What a transformer needs of a condition."""

    start: Tensor  # (B, D), added to the start token
    context: Text | None = None  # values (B, L, D), read by cross-attention

    def join(self, other: "Condition") -> "Condition":
        """Both batches, one after the other."""
        start = torch.cat([self.start, other.start])
        if self.context is None or other.context is None:
            return Condition(start)
        return Condition(start, self.context.join(other.context))


class Conditioner(nn.Module):
    """What every conditioner has."""

    cross_attention = False  # whether the transformer reads a context
    num_classes = 0  # labels that it takes; 0 = none

    def prepare(self, cond: Cond, device: torch.device) -> Any:
        """Labels or prompts checked and on `device`, as forward takes them; again, if prepared."""
        raise NotImplementedError

    def null_like(self, cond: Any) -> Any:
        """As many null conditions as `cond`, of `prepare`, has rows."""
        raise NotImplementedError


class NoConditioner(Conditioner):
    """Unconditional generation; cond only gives their number: (B,) of anything."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def prepare(self, cond: Cond, device: torch.device) -> Tensor:
        if not isinstance(cond, Tensor):
            if isinstance(cond, Text) or any(c not in ("none", "", NULL_CLASS) for c in cond):
                raise ValueError(
                    f"this generator takes no condition, not {cond!r}: give a (B,) tensor, or "
                    '"none" for each image'
                )
            cond = torch.full((len(cond),), NULL_CLASS)
        return to_device(cond, device)

    def forward(self, cond: Tensor, drop: Tensor | None = None) -> Condition:
        return Condition(torch.zeros(len(cond), self.dim, device=cond.device))

    def null_like(self, cond: Tensor) -> Tensor:
        return cond


class ClassConditioner(Conditioner):
    """Labels (B,) long in [0, num_classes), or -1 for the null condition."""

    def __init__(self, dim: int, num_classes: Many, learned_null: bool = False):
        """learned_null: the null condition is one more embedding, the last, instead of zero."""
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.num_classes, self.learned_null = num_classes, learned_null
        self.embedding = nn.Embedding(num_classes + learned_null, dim)

    def prepare(self, cond: Cond, device: torch.device) -> Tensor:
        if not isinstance(cond, Tensor):
            raise ValueError(f"this generator takes class labels, a (B,) tensor, not {cond!r}")
        self._check(cond)
        return to_device(cond.long(), device)

    def forward(self, cond: Tensor, drop: Tensor | None = None) -> Condition:
        """cond: (B,) labels of `prepare`; drop: (B,) bool, True = null condition. Returns
        Condition."""
        null = cond == NULL_CLASS if drop is None else drop | (cond == NULL_CLASS)
        if self.learned_null:
            return Condition(self.embedding(cond.masked_fill(null, self.num_classes)))
        start = self.embedding(cond.clamp_min(0))
        return Condition(start.masked_fill(null[:, None], 0.0))

    def null_like(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, NULL_CLASS)

    def _check(self, cond: Tensor) -> None:
        if cond.ndim != 1 or cond.is_floating_point():
            raise ValueError(f"class labels must be (B,) integers, got {cond.dtype} {cond.shape}")
        if self.training and cond.device.type != "cpu":
            return  # as in check_indices
        low, high = span(cond)
        if low < NULL_CLASS or high >= self.num_classes:
            raise ValueError(
                f"class labels span [{low}, {high}], expected [0, {self.num_classes - 1}] or "
                f"{NULL_CLASS} for no class"
            )


class TextConditioner(Conditioner):
    """Prompts through a text encoder and an MLP (tanh-GELU) to the model's width (FlexTok, section
    3.3: flan-t5-xl, 2048 -> 2048 -> D). The null condition is the text ""."""

    cross_attention = True

    def __init__(
        self,
        dim: int,
        encoder: Mapping[str, Any] | str = "bytes",
        hidden_dim: Size | None = None,  # of the MLP, the encoder's width
        project: bool = True,  # False: no MLP, embeddings have the model's width already
    ):
        super().__init__()
        self.dim = dim
        self.encoder = build(TEXT_ENCODERS, encoder, "text encoder")
        width = self.encoder.dim
        if not project and width != dim:
            raise ValueError(f"project=False needs embeddings of the model's width {dim}: {width}")
        hidden = hidden_dim or width
        self.project: nn.Module = nn.Identity()
        if project:
            gelu = nn.GELU(approximate="tanh")
            self.project = nn.Sequential(nn.Linear(width, hidden), gelu, nn.Linear(hidden, dim))
        self.null_row: Tensor | None = None  # "" as the encoder's rows give it, once known

    def pinned(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """A config of this conditioner with what a frozen encoder was found to be written out, so
        that a saved generator gets the same one."""
        encoder = spec.get("encoder", "bytes")
        encoder = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
        if self.encoder.frozen:
            encoder |= {"dim": self.encoder.dim, "revision": self.encoder.identity()["revision"]}
        return {**spec, "encoder": encoder}

    def rows(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> list[Tensor]:
        """The encoder's rows, each different prompt encoded once."""
        check_prompts(prompts)
        different = list(dict.fromkeys(prompts))
        by_prompt = dict(zip(different, self.encoder.rows(different, device), strict=True))
        return [by_prompt[prompt] for prompt in prompts]

    def prepare(self, cond: Cond, device: torch.device) -> Text:
        """cond: prompts, "" = the null text, or what this method returned for some. Returns them
        as a batch on `device`, padded. Raises ValueError for anything else."""
        if isinstance(cond, Tensor):
            raise ValueError("this generator takes prompts, a list of texts, not class labels")
        if not isinstance(cond, Text):
            cond = Text.pad(self.rows(cond, device))
        return Text(to_device(cond.values, device), to_device(cond.mask, device))

    def forward(self, cond: Text, drop: Tensor | None = None) -> Condition:
        """cond: of `prepare`; drop: (B,) bool, True = null text. Returns Condition."""
        if drop is not None:
            cond = cond.replace(drop, self.null(cond.values))
        context = self.encoder(cond)
        if isinstance(self.project, nn.Sequential):  # cached embeddings are in half precision
            context = self.project(context.to(self.project[0].weight.dtype))
        return Condition(context.new_zeros(len(cond), self.dim), Text(context, cond.mask))

    def null_like(self, cond: Text) -> Text:
        return Text.pad([self.null(cond.values)] * len(cond))

    def null(self, like: Tensor) -> Tensor:
        """The row of "", on like's device and of its dtype."""
        if self.null_row is None:
            self.null_row = self.rows([""], like.device)[0]
        self.null_row = to_device(self.null_row, like.device)  # once
        return self.null_row.to(like.dtype)


def class_label(entry: object, names: Sequence[str]) -> int:
    """The label of a class among `names`: an entry is a label, or else the class's name, its number
    or "none" or "", for no class. Raises ValueError."""
    if isinstance(entry, str) and entry in ("none", "") and entry not in names:
        return NULL_CLASS
    if (label := whole_number(entry)) is not None:
        if label == NULL_CLASS:
            return NULL_CLASS
        number = label if 0 <= label < len(names) else None
    else:
        number = find_class({name: label for label, name in enumerate(names)}, str(entry))
    if number is not None:
        return number
    some = ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
    near = difflib.get_close_matches(str(entry), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown class {entry!r}; known: {some}, or 0 to {len(names) - 1}{hint}")


def make_conditioner(spec: Mapping[str, Any], dim: int) -> Conditioner:
    """The conditioner of a generator of width dim. Raises ConfigError, also for another dim."""
    if spec.get("dim", dim) != dim:
        raise ConfigError(f"conditioner.dim={spec['dim']!r} must be left out: it is dim={dim}.")
    return build(CONDITIONERS, {**spec, "dim": dim}, "conditioner")


CONDITIONERS = {"none": NoConditioner, "class": ClassConditioner, "text": TextConditioner}
