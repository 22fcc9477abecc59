"""What each command takes, a dataclass each. Its docstring is the command's --help: what it does,
more about it, examples. Keyword-only fields are options, the others positional arguments."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from flextok.cli.measure_arguments import Adaptive, Align, Bench, Evaluate, Probe, Sweep
from flextok.cli.options import (
    BY_CLASS,
    BY_PROMPT,
    SETS,
    TOKENIZER,
    Commands,
    Count,
    Data,
    Decoding,
    Device,
    ItsTokenizer,
    Json,
    Lengths,
    Limit,
    Loading,
    Sampling,
    Seed,
    add_command,
)
from flextok.schema import Bounds

MOST_CLASSES = 16  # in a grid whose classes nobody named
RECONSTRUCTED = "outputs/reconstructed"


def add_commands(commands: Commands) -> None:
    for name, (kind, work) in COMMANDS.items():
        add_command(commands, name, kind, work)


@dataclass
class Train:
    """train a tokenizer or a generator from a config

    One YAML file states everything about a run; key=value changes it. The output folder gets
    checkpoints, logs, images and the model. An interrupted run continues when started again by
    the same command.

    flextok train configs/quickstart_tokenizer.yaml
    flextok train configs/quickstart_tokenizer.yaml output_dir=outputs/mine optim.lr=1e-3 \\
        "data.train={name: folder, root: pictures}"
    """

    arguments: Annotated[
        list[str],
        "a YAML file, see configs/, and what to change in it, e.g. optim.lr=1e-4; several files, "
        "which take no changes, are trained one after the other",
        {"metavar": "CONFIG [key=value ...]"},
    ]


@dataclass
class Tokenize(Loading, Seed, Device, Json):
    """encode a data set once, for generators to train on

    Writes shards of indices, labels and captions. Run it again to continue; torchrun or srun share
    the work. A generator reads the result by data.train={name: tokens, path: <output>}.

    flextok tokenize emoji emoji:train outputs/tokens --variants 4
    torchrun --nproc-per-node=8 -m flextok.cli tokenize MODEL 'shards-{000..999}.tar' tokens
    """

    model: Annotated[str, "folder or hub id of a tokenizer"]
    data: Annotated[str, SETS]
    output: Annotated[str, "the folder to write"]
    _: KW_ONLY
    variants: Annotated[Count, "encodings of each image"] = 1
    crop: Literal["center", "random"] = "center"
    flip: Annotated[bool, "mirror half of the variants"] = False
    shift: Annotated[float, "as data.shift in configs"] = 0.0
    part_size: Annotated[Count, "encodings a shard"] = 16_384
    bf16: Annotated[bool, "encode in bf16: GPUs only"] = False
    verify: Annotated[bool, "then check all checksums"] = False


@dataclass
class Plan(Json):
    """a run's memory, arithmetic, data rate and cost, before it runs

    From the config's sizes and stated assumptions; docs/scale.md has how they were checked.

    flextok plan configs/flextok_d18_d28.yaml --gpus 128
    flextok plan configs/ar_class_1.33B.yaml --gpus 8 --gpu a100 --json plan.json
    flextok plan configs/flextok_d12_d12.yaml --gpus 1 --gpu rtx4090 data.batch_size=8
    """

    config: Annotated[str, "a YAML file, see configs/"]
    overrides: Annotated[list[str], {"metavar": "key=value"}] = field(default_factory=list)
    _: KW_ONLY
    gpus: Annotated[int, "how many, over all nodes"]
    gpu: Annotated[str, "a100, h100, h200, rtx3090, ..."] = "h100"
    utilisation: Annotated[float, "of peak arithmetic"] = 0.35
    price: Annotated[float | None, "dollars a GPU hour, 2.5 for rented ones"] = None
    picture_kb: Annotated[float, "an image file's size"] = 110.0


@dataclass
class Index(Json):
    """count the samples of WebDataset shards, for streaming them

    The file that it writes is what a webdataset_stream takes as urls: it states each shard's number
    of samples, hence an epoch's length.

    flextok index 'shards-{000..999}.tar' shards.json
    flextok index 's3://bucket/{000..999}.tar' shards.json --fetch 'aws s3 cp {url} -'
    """

    urls: Annotated[list[str], "paths or URLs, with {000..012} or *"]
    output: Annotated[str, "the .json to write"]
    _: KW_ONLY
    fetch: Annotated[str | None, "a command that writes the shard {url} to standard output"] = None


@dataclass
class Sample(Decoding, Sampling, Seed, Device, Json):
    """reconstruct pictures, or generate by class or prompt, as a coarse-to-fine grid

    With a tokenizer: reconstruct --images or --data at each of --num-tokens. With a generator:
    generate --classes, or --prompt, --prompts-file or the captions of --data; prompts also get
    their last images as files beside the grid. Without a model: the one for the purpose of those
    that come with the package.

    flextok sample
    flextok sample --images cat.jpg --num-tokens 1 16 256
    flextok sample --classes food-fruit heart none --num-samples 4
    flextok sample --prompt "a red heart left of a bomb" --output heart.png
    flextok sample outputs/quickstart/generator
    """

    model: Annotated[
        str,
        "folder, name or hub id of a tokenizer or a generator; "
        f"default {TOKENIZER}, {BY_CLASS} or {BY_PROMPT}",
    ] = ""
    _: KW_ONLY
    images: Annotated[list[str] | None, "picture files or folders"] = None
    classes: Annotated[
        list[str] | None,
        "names, else numbers, else 'none' (or ''), for no class; alone: all, or "
        f"{MOST_CLASSES} of them",
        {"nargs": "*"},
    ] = None
    prompt: Annotated[list[str] | None, "texts; '' = none"] = None
    prompts_file: Annotated[str | None, "one prompt a line"] = None
    data: Data = None
    limit: Limit = None
    num_tokens: Lengths = None
    num_samples: Annotated[int, Bounds(1, 1_000_000), "images a class or prompt"] = 1
    tokenizer: ItsTokenizer = None
    output: Annotated[str, "the PNG to write"] = "outputs/sample.png"


@dataclass
class Reconstruct(Decoding, Seed, Device, Json):
    """encode pictures and decode their first tokens, one PNG each

    Crops each picture to a square of the model's size, encodes it and decodes it from all tokens,
    or from the first few. Several pictures or lengths go to a folder, as <picture>-<tokens>.png. A
    picture named - is read from standard input, and its reconstruction goes to standard output.
    Unreadable pictures are skipped, and the exit code is 1 then.

    flextok reconstruct cat.jpg
    flextok reconstruct holiday/ --num-tokens 1 4 16 --output outputs/holiday --json
    flextok reconstruct - --num-tokens 4 < cat.jpg > cat-4.png
    """

    pictures: Annotated[list[str], "files, folders or -"]
    _: KW_ONLY
    model: Annotated[str, "a tokenizer's folder, name or hub id"] = TOKENIZER
    num_tokens: Annotated[list[int] | None, "default: all"] = None
    output: Annotated[str | None, f"folder, file.png or - (stdout); {RECONSTRUCTED}"] = None


@dataclass
class Demo(Device):
    """a web page to take pictures apart and generate images, on this machine

    Drop a picture and slide its number of tokens; with a generator, watch an image of a class or a
    prompt grow token by token. The page is served to this machine only, works offline, keeps no
    files, and stops with Ctrl-C. Needs pip install 'flextok[demo]'.

    flextok demo
    flextok demo outputs/quickstart/tokenizer outputs/quickstart/generator --port 8000
    """

    models: Annotated[
        list[str],
        "folders, names or hub ids: a tokenizer to reconstruct with, generators with theirs; "
        "default: those that come with the package",
    ] = field(default_factory=lambda: [TOKENIZER, BY_CLASS, BY_PROMPT])
    _: KW_ONLY
    host: Annotated[str, "0.0.0.0 shows it to your network"] = "127.0.0.1"
    allow_host: Annotated[
        list[str],
        "names in a browser's address bar that the page answers to, beside this machine's own",
    ] = field(default_factory=list)
    port: Annotated[int | None, "by default the first free one from 7860"] = None
    max_megabytes: Annotated[float, "of one upload"] = 10
    max_megapixels: Annotated[float, "of one upload"] = 40
    queue: Annotated[Count, "how many clicks may wait"] = 16


@dataclass
class Info(Json):
    """a model's config, sizes, vocabulary, bits per image and provenance

    Reads the header of the weight file only, so it is quick for the largest models too. What a
    published file left open is listed as assumed.

    flextok info emoji-class
    flextok info EPFL-VILAB/flextok_d12_d12_in1k --json | jq .parameters.total
    """

    model: Annotated[str, "folder, weight file, name or hub id, published ones too"] = TOKENIZER


@dataclass
class Models(Json):
    """the models that come with the package

    Lists tokenizers and generators. Their names serve wherever a command takes a model.

    flextok models
    flextok info emoji-class
    """


@dataclass
class Convert(Json):
    """write a published model in our layout

    Checks that every tensor is used and none is missing, then writes model.safetensors, config.json
    and a model card.

    flextok convert EPFL-VILAB/flextok_d12_d12_in1k outputs/flextok_d12
    flextok convert weights.safetensors outputs/mine max_timestep=1.0 vae.scaling_factor=0.5
    """

    input: Annotated[str, "folder, weight file, hub id, or owner/name/file.bin"]
    output: Annotated[str, "the folder to write"]
    overrides: Annotated[
        list[str],
        "config fields to change, e.g. max_timestep=1.0 or vae.scaling_factor=0.5",
        {"metavar": "key=value"},
    ] = field(default_factory=list)


COMMANDS: dict[str, tuple[type, str]] = {
    "train": (Train, "training.run_train"),
    "tokenize": (Tokenize, "training.run_tokenize"),
    "plan": (Plan, "training.run_plan"),
    "index": (Index, "training.run_index"),
    "sample": (Sample, "sample.run_sample"),
    "reconstruct": (Reconstruct, "reconstruct.run_reconstruct"),
    "evaluate": (Evaluate, "measure.run_evaluate"),
    "sweep": (Sweep, "measure.run_sweep"),
    "adaptive": (Adaptive, "measure.run_adaptive"),
    "probe": (Probe, "measure.run_probe"),
    "align": (Align, "align.run_align"),
    "bench": (Bench, "bench.run_bench"),
    "demo": (Demo, "demo.run_demo"),
    "info": (Info, "models.run_info"),
    "models": (Models, "models.run_models"),
    "convert": (Convert, "models.run_convert"),
}
