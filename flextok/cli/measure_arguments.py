"""What the commands take that measure models: as in arguments.py."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, ClassVar, Literal

from flextok.cli.options import (
    SETS,
    Count,
    Data,
    Decoding,
    Device,
    ItsTokenizer,
    Json,
    Lengths,
    Limit,
    Loading,
    OwnData,
    Seed,
    Solving,
)
from flextok.schema import Bounds


@dataclass(kw_only=True)
class Networks:
    networks: Annotated[
        list[str] | None,
        "inception (FID), efficientnet_lite0 (offline, no FID), lpips; default: inception and "
        "lpips, or what is at hand",
        {"nargs": "*"},
    ] = None
    inception_weights: Annotated[str | None, "default: torch's cache"] = None


@dataclass(kw_only=True)
class Measuring(Seed, Loading, Device, Json):
    folder: ClassVar[str]  # in outputs/, for what the command writes by default
    model: str
    limit: Limit = None
    output: Annotated[str | None, "folder to write; default: outputs/, command, model"] = None
    dtype: Annotated[
        Literal["float64", "float32"] | None,
        "float64 gives the same numbers for any batch size: the default on a CPU; on a GPU float32",
    ] = None


@dataclass
class Evaluate(Networks, Decoding, Measuring):
    """FID, inception score, KID, precision, PSNR, SSIM, LPIPS, sharpness, code usage

    A tokenizer reconstructs DATA; a generator is compared with DATA. Writes report.json. Several
    processes: torchrun --nproc-per-node=N -m flextok.cli evaluate ...

    flextok evaluate emoji emoji:validation
    flextok evaluate emoji-class emoji:train --num-samples 960
    """

    model: Annotated[str, "folder or hub id of a tokenizer or a generator"]
    data: Annotated[str, f"{SETS}; for a generator also an ADM reference .npz"]
    _: KW_ONLY
    folder = "evaluation"
    tokenizer: ItsTokenizer = None
    num_tokens: Annotated[list[int] | None, "default: all"] = None
    num_samples: Annotated[Count | None, "generator: how many images"] = None
    labels: Annotated[
        Literal["balanced", "data"], "generator: all classes alike, or as often as in DATA"
    ] = "balanced"
    reference: Annotated[str | None, "tokenizer: also compare with this .npz"] = None
    save_reference: Annotated[str | None, "write DATA's statistics to this .npz"] = None


@dataclass
class Sweep(Networks, Solving, Measuring):
    """reconstruction quality against the number of tokens, steps and guidance

    Prints a table and writes report.json, sweep.csv, tokens.png, bits.png, time.png, strips.png and
    variance.png.

    flextok sweep emoji --data emoji:validation --steps 1 4
    """

    model: Annotated[str, "folder or hub id of a tokenizer"]
    _: KW_ONLY
    folder = "sweep"
    data: OwnData = None
    num_tokens: Lengths = None
    num_pictures: Annotated[int, "in the strips and the map"] = 6
    steps: Annotated[list[int] | None, "decoder steps"] = None
    guidance_scale: Annotated[list[float] | None, "decoder guidance, 1 = none"] = None
    networks: Annotated[list[str], "as for evaluate; default: none", {"nargs": "*"}] = field(
        default_factory=list
    )


@dataclass
class Adaptive(Decoding, Measuring):
    """how many tokens each image needs to meet a target, and whether complexity shows

    Finds the shortest prefix that meets the target, image by image, and tests by rank
    correlation whether images of more objects need more, where labels count them.

    flextok adaptive emoji --target psnr=18 --limit 64
    """

    model: Annotated[str, "folder or hub id of a tokenizer that decodes prefixes"]
    _: KW_ONLY
    folder = "adaptive"
    target: Annotated[str, "psnr=20, ssim=, lpips=0.3, ..."]
    data: OwnData = None


@dataclass
class Probe(Measuring):
    """class accuracy of a linear probe on the first 1, 2, 4, ... codes

    Trains a linear classifier on the codes of labelled images and tests it on others: how well the
    first codes predict the class.

    flextok probe emoji --train emoji:train --data emoji:validation
    """

    model: Annotated[str, "folder or hub id of a tokenizer"]
    _: KW_ONLY
    folder = "probe"
    train: Annotated[str | None, "labelled images; default: those it was trained on"] = None
    data: OwnData = None
    num_tokens: Lengths = None


@dataclass
class Align(Decoding, Seed, Device, Json):
    """how well generated emoji scenes show their prompts, against the number of tokens

    A small classifier, trained on real scenes, reads generated ones; the same images scored
    against shuffled prompts are the control.

    flextok align emoji-text --limit 64 --json align.json \\
        --data "{name: emoji_scenes, max_objects: 2, vocabulary: basic, prompts: held_out}"
    """

    model: Annotated[str, "folder or hub id of a generator"]
    _: KW_ONLY
    tokenizer: ItsTokenizer = None
    data: Data = None
    limit: Limit = None
    num_tokens: Lengths = None
    probe: Annotated[str | None, "a file to keep the classifier in, or take it from"] = None
    probe_steps: Annotated[int, Bounds(1, 1_000_000), "its training, if needed"] = 1500


@dataclass
class Bench(Device, Json):
    """seconds, FLOP/s, memory of encoding, decoding, generating and a training step

    Random weights at named sizes, beside the machine's own best rates; on a CPU, compare CPU
    seconds with --threads 1.

    flextok bench quickstart
    flextok bench d12-d12 ar-49M --threads 1 --json bench.json
    """

    sizes: Annotated[list[str], "names, all, or config files"] = field(default_factory=list)
    _: KW_ONLY
    only: Annotated[str, "rows whose name holds this"] = ""
    batch: Annotated[list[int] | None, "in place of a size's own"] = None
    steps: Annotated[int, "of FlexTok's decoder"] = 4
    repeats: Annotated[Count, "the best of these counts"] = 3
    compare_mkl: Annotated[bool, "also without oneDNN, on a CPU"] = False
    threads: Annotated[Count | None, "of the CPU"] = None
    dtype: Literal["float32", "bfloat16"] = "float32"
