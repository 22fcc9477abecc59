"""What each command takes, a dataclass each. Its docstring is the command's --help: what it does,
more about it, examples. Keyword-only fields are options, the others positional arguments."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, ClassVar, Literal

from flextok.cli.options import (
    BY_CLASS,
    BY_PROMPT,
    FEW_STEP,
    SETS,
    TOKENIZER,
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
    Sampling,
    Seed,
    Shape,
    Solving,
)
from flextok.data.augmentation import Augmentation
from flextok.schema import Bounds

MOST_CLASSES = 16  # in a grid whose classes nobody named
RECONSTRUCTED = "outputs/reconstructed"
PROBE_STEPS = 1500
# scenes of the emoji that `emoji-text` generates best
WELL_KNOWN = "{name: emoji_scenes, max_objects: 2, vocabulary: basic}"


@dataclass
class Train:
    """train a tokenizer or a generator from a config, or both from a folder of pictures

    One YAML file states everything about a run; key=value changes it. The output folder gets
    checkpoints, logs, images and the model. An interrupted run continues when started again by
    the same command. With --data, configs that fit the memory are written and trained.

    flextok train --data photos/ --size 64
    flextok train configs/quickstart_tokenizer.yaml
    flextok train configs/quickstart_tokenizer.yaml output_dir=outputs/mine optim.lr=1e-3 \\
        "data.train={name: folder, root: pictures}"
    flextok train configs/emoji_32px.yaml configs/emoji.yaml trainer.accelerator=cpu
    """

    arguments: Annotated[
        list[str],
        "a YAML file, see configs/, and the keys to change in it, e.g. optim.lr=1e-4; several "
        "files are trained one after the other, all with these changes",
        {"metavar": "CONFIG [key=value ...]"},
    ] = field(default_factory=list)
    _: KW_ONLY
    data: Annotated[str | None, "a folder of pictures, in place of a config"] = None
    size: Annotated[int | None, "of the images of --data, in pixels; default 64"] = None
    gpu_memory: Annotated[float | None, "GB of the GPU to fill; default: that of the GPU here"] = (
        None
    )
    output: Annotated[str | None, "for --data; default: outputs/ and the folder's name"] = None
    only_caches: Annotated[
        bool,
        "only write the caches of tokens, captions or latents; torchrun or srun share the work",
    ] = False


@dataclass
class Tokenize(Augmentation, Loading, Seed, Device, Json):
    """encode a data set once, for generators to train on

    Writes shards of indices, labels and captions. The same command continues an interrupted run,
    and torchrun or srun share the work. A generator reads the result by
    data.train={name: tokens, path: <output>}.

    flextok tokenize emoji emoji:train outputs/tokens --variants 4
    torchrun --nproc-per-node=8 -m flextok.cli tokenize MODEL 'shards-{000..999}.tar' tokens
    """

    model: Annotated[str, "folder, name or hub id of a tokenizer"]
    data: Annotated[str, SETS]
    output: Annotated[str, "the folder to write"]
    _: KW_ONLY
    variants: Annotated[Count, "encodings of each image"] = 1
    part_size: Annotated[Count, "encodings a shard"] = 16_384
    bf16: Annotated[bool, "encode in bf16: GPUs only"] = False
    verify: Annotated[bool, "check all checksums at the end"] = False


@dataclass
class Plan(Json):
    """estimate a run's memory, arithmetic, data rate and cost before it starts

    Computes them from the config's sizes and from assumptions that it prints; docs/scale.md
    describes how they were checked.

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
    price: Annotated[
        float | None, "dollars per GPU hour; default 2.5, for cards that can be rented"
    ] = None
    picture_kb: Annotated[float, "an image file's size"] = 110.0


@dataclass
class Index(Json):
    """count the samples of WebDataset shards, for streaming them

    A webdataset_stream takes the written file as its urls. The file states each shard's number of
    samples, and thus an epoch's length.

    flextok index 'shards-{000..999}.tar' shards.json
    flextok index 's3://bucket/{000..999}.tar' shards.json --fetch 'aws s3 cp {url} -'
    """

    urls: Annotated[list[str], "paths or URLs, with {000..012} or *"]
    output: Annotated[str, "the .json to write, or - for standard output"]
    _: KW_ONLY
    fetch: Annotated[str | None, "a command that writes the shard {url} to standard output"] = None


@dataclass
class Sample(Decoding, Shape, Sampling, Seed, Device, Json):
    """reconstruct pictures, or generate by class or prompt, as a coarse-to-fine grid

    With a tokenizer: reconstruct --images or --data at each of --num-tokens. With a generator:
    generate --classes, or --prompt, --prompts-file or the captions of --data. Images of prompts are
    also written as files beside the grid, one each. Without MODEL the command takes the package's
    model for the purpose.

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
    images: Annotated[list[str] | None, "files or folders of pictures"] = None
    classes: Annotated[
        list[str] | None,
        "names or numbers of classes, or 'none' (or '') for no class; --classes alone: all of "
        f"them, at most {MOST_CLASSES}",
        {"nargs": "*"},
    ] = None
    prompt: Annotated[list[str] | None, "texts; '' is no prompt"] = None
    prompts_file: Annotated[str | None, "one prompt a line"] = None
    data: Data = None
    limit: Limit = None
    num_tokens: Lengths = None
    num_samples: Annotated[
        int,
        Bounds(1, 1_000_000),
        "images of each class or prompt, or decoded from each picture's tokens",
    ] = 1
    tokenizer: ItsTokenizer = None
    output: Annotated[str, "the PNG to write; default outputs/sample.png"] = "outputs/sample.png"


@dataclass
class Search(Decoding, Sampling, Seed, Device, Json):
    """search for the tokens whose image fits a class or a prompt best

    Decodes and scores candidates at each of --num-tokens and continues the best of them, beam
    search; one number of tokens makes it best-of-N. With a tokenizer for MODEL, every token is
    drawn with equal probability. Writes for each class or prompt the image found and the tree of
    all candidates. The scenes' verifier is a small classifier of facts, trained on real scenes.

    flextok search --prompt "a red heart left of a bomb" --tokenizer emoji-one-step
    flextok search emoji-class --classes heart --verifier likelihood --num-tokens 64 --budget 8
    flextok search emoji-one-step --prompt "a red heart" --num-tokens 1 2 4 8 --budget 128
    """

    model: Annotated[str, "folder, name or hub id of a generator or a tokenizer"] = BY_PROMPT
    _: KW_ONLY
    prompt: Annotated[list[str] | None, "texts"] = None
    classes: Annotated[list[str] | None, "names or numbers of classes"] = None
    verifier: Annotated[
        str,
        "scenes, likelihood, or the folder or hub id of an image-text model of transformers",
    ] = "scenes"
    num_tokens: Annotated[
        list[int] | None,
        "where candidates are scored; default: all, or without a generator 1 4 16 ... and all",
    ] = None
    budget: Annotated[Count, "decodes for each class or prompt"] = 16
    beams: Annotated[Count, "candidates that are continued"] = 2
    lookahead: Annotated[
        int, Bounds(0, 64), "score a candidate by its continuation so many lengths further on"
    ] = 0
    tokenizer: ItsTokenizer = None
    data: Annotated[
        str | None, f"the scenes that the scenes' verifier is trained on; default: {WELL_KNOWN}"
    ] = None
    probe: Annotated[
        str | None,
        "a file to keep the classifier in, or take it from; default: the package's, where it fits",
    ] = None
    probe_steps: Annotated[
        int | None,
        Bounds(1, 1_000_000),
        f"of the classifier's training, where there is none yet; default {PROBE_STEPS}",
    ] = None
    output: Annotated[str, "the folder to write; default outputs/search"] = "outputs/search"


@dataclass
class Reconstruct(Decoding, Shape, Seed, Device, Json):
    """encode pictures and decode their first tokens, one PNG each

    Crops each picture to a square of the model's size, or to --height and --width, encodes it and
    decodes it from all tokens, or from the first few. Several pictures or lengths go to a folder,
    as <picture>-<tokens>.png. A picture named - is read from standard input, and its image goes to
    standard output. Unreadable pictures are skipped, and the command then exits with code 1.

    flextok reconstruct cat.jpg
    flextok reconstruct holiday/ --num-tokens 1 4 16 --output outputs/holiday --json
    flextok reconstruct - --num-tokens 4 < cat.jpg > cat-4.png
    """

    pictures: Annotated[list[str], "files, folders or -"]
    _: KW_ONLY
    model: Annotated[str, f"a tokenizer's folder, name or hub id; default: {TOKENIZER}"] = TOKENIZER
    num_tokens: Annotated[
        list[int] | None, "how many first tokens to decode, one number or several; default: all"
    ] = None
    output: Annotated[
        str | None, f"folder, file.png or - (standard output); default {RECONSTRUCTED}"
    ] = None


Compared = Annotated[
    str | None,
    "tokenizer: compare with this set too, given as DATA is, or with the statistics of an .npz",
]


@dataclass(kw_only=True)
class Networks:
    networks: Annotated[
        list[str] | None,
        "inception (FID), dinov2 (FD-DINOv2), clip (of captions), each also as name:PLACE; "
        "efficientnet_lite0 or efficientnet_lite0_native (offline, no FID; the second for small "
        "images), lpips; default: inception and lpips, or those installed",
        {"nargs": "*"},
    ] = None
    inception_weights: Annotated[str | None, "a file; default: the one in torch's cache"] = None


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
    """measure how plausible images are, how faithful reconstructions are, and the code usage

    Plausible: FID, KID, precision, recall, sharpness. Faithful: PSNR, SSIM, LPIPS. A tokenizer
    reconstructs DATA; images of a generator are compared with DATA. Writes report.json. Several
    processes: torchrun --nproc-per-node=N -m flextok.cli evaluate ...

    flextok evaluate emoji emoji:validation
    flextok evaluate emoji-class emoji:train --num-samples 960
    """

    model: Annotated[str, "folder, name or hub id of a tokenizer or a generator"]
    data: Annotated[str, f"{SETS}; for a generator also an ADM reference .npz"]
    _: KW_ONLY
    folder = "evaluation"
    tokenizer: ItsTokenizer = None
    num_tokens: Annotated[
        list[int] | None, "how many first tokens to decode, one number or several; default: all"
    ] = None
    num_samples: Annotated[Count | None, "generator: how many images"] = None
    labels: Annotated[
        Literal["balanced", "data"] | None,
        "generator: all classes equally often, the default, or as often as in DATA",
    ] = None
    reference: Compared = None
    save_reference: Annotated[str | None, "write DATA's statistics to this .npz"] = None


@dataclass
class Sweep(Networks, Solving, Measuring):
    """measure reconstructions by number of tokens, steps and guidance

    Prints a table of how plausible and how faithful they are, and writes report.json,
    sweep.csv, tokens.png, bits.png, time.png, strips.png and variance.png.

    flextok sweep emoji --data emoji:validation --reference emoji:train --steps 1 4
    """

    model: Annotated[str, "folder, name or hub id of a tokenizer"]
    _: KW_ONLY
    folder = "sweep"
    data: OwnData = None
    num_tokens: Lengths = None
    num_pictures: Annotated[int, Bounds(0, 1000), "in the strips and the map; 0: neither"] = 6
    steps: Annotated[list[int] | None, "decoder steps"] = None
    guidance_scale: Annotated[list[float] | None, "decoder guidance, 1 = none"] = None
    networks: Annotated[
        list[str] | None,
        "as for evaluate; default: efficientnet_lite0_native, where it is installed",
        {"nargs": "*"},
    ] = None
    reference: Compared = None


@dataclass
class Adaptive(Decoding, Measuring):
    """find how many tokens each image needs to meet a target

    Finds the shortest prefix that meets the target, image by image. Where labels count objects, a
    rank correlation tests whether images of more objects need more tokens. With --train, every
    prefix of the training images is measured, and a length head learns to predict the length
    without decoding; the output folder's tokenizer/ has it. The command then compares both.

    flextok adaptive emoji --target psnr=18 --limit 64
    flextok adaptive emoji --target psnr=18 --train emoji:train --data emoji:validation
    """

    model: Annotated[str, "folder, name or hub id of a tokenizer that decodes prefixes"]
    _: KW_ONLY
    folder = "adaptive"
    target: Annotated[str, "psnr=20, ssim=0.8, lpips=0.3 or efficientnet_lite0=0.1"]
    train: Annotated[str | None, "fit a length head to these images, at most 4096"] = None
    data: OwnData = None


@dataclass
class Probe(Measuring):
    """measure how well the first 1, 2, 4, ... codes predict the class

    Trains a linear classifier on the codes of labelled images and tests it on others.

    flextok probe emoji --train emoji:train --data emoji:validation
    """

    model: Annotated[str, "folder, name or hub id of a tokenizer"]
    _: KW_ONLY
    folder = "probe"
    train: Annotated[str | None, "labelled images; default: those it was trained on"] = None
    data: OwnData = None
    num_tokens: Lengths = None


@dataclass
class Align(Decoding, Seed, Device, Json):
    """measure how well generated emoji scenes show their prompts, by number of tokens

    A small classifier, trained on real scenes, recognises the facts of generated ones. The same
    images, scored against shuffled prompts, are the control.

    flextok align emoji-text --limit 64 --json align.json \\
        --data "{name: emoji_scenes, max_objects: 2, vocabulary: basic, prompts: held_out}"
    """

    model: Annotated[str, "folder, name or hub id of a generator"]
    _: KW_ONLY
    tokenizer: ItsTokenizer = None
    data: Data = None
    limit: Limit = None
    num_tokens: Lengths = None
    probe: Annotated[str | None, "a file to keep the classifier in, or take it from"] = None
    probe_steps: Annotated[
        int, Bounds(1, 1_000_000), "of the classifier's training, where there is none yet"
    ] = PROBE_STEPS


@dataclass
class Bench(Device, Json):
    """measure time, FLOP/s and memory of encoding, decoding, generating and a training step

    Builds models of named sizes with random weights, and measures the machine's own best rates
    too. On a CPU, compare CPU seconds with --threads 1.

    flextok bench quickstart
    flextok bench d12-d12 ar-49M --threads 1 --json bench.json
    """

    sizes: Annotated[list[str], "names, all, or config files"] = field(default_factory=list)
    _: KW_ONLY
    only: Annotated[str, "only rows whose name contains this"] = ""
    batch: Annotated[list[int] | None, "in place of a size's own"] = None
    steps: Annotated[int, "of FlexTok's decoder"] = 4
    repeats: Annotated[Count, "measure so often and keep the best"] = 3
    compare_mkl: Annotated[bool, "also without oneDNN, on a CPU"] = False
    threads: Annotated[Count | None, "of the CPU"] = None
    dtype: Annotated[Literal["float32", "bfloat16"], "of weights and products"] = "float32"


@dataclass
class Demo(Device):
    """serve a web page on this machine that reconstructs pictures and generates images

    A slider sets the number of tokens of an image; the page shows the tokens and what they leave
    open. With a generator, it shows an image of a class or a prompt while its tokens are generated.
    The page is served to this machine only, works offline, keeps no files, and stops with Ctrl-C.
    Needs pip install 'flextok[demo]'.

    flextok demo
    flextok demo outputs/quickstart/drawer outputs/quickstart/generator --port 8000
    """

    models: Annotated[
        list[str],
        "folders, names or hub ids: a tokenizer to reconstruct with, generators with theirs; "
        "default: those that come with the package",
    ] = field(default_factory=lambda: [FEW_STEP, BY_CLASS, BY_PROMPT])
    _: KW_ONLY
    host: Annotated[str, "0.0.0.0 shows it to your network"] = "127.0.0.1"
    allow_host: Annotated[
        list[str],
        "host names to serve the page under, beside this machine's own",
    ] = field(default_factory=list)
    port: Annotated[int | None, "by default the first free one from 7860"] = None
    max_megabytes: Annotated[float, "of one upload"] = 10
    max_megapixels: Annotated[float, "of one upload"] = 40
    queue: Annotated[Count, "how many requests may wait"] = 16


@dataclass
class Info(Json):
    """print a model's config, sizes, vocabulary, bits per image and provenance

    Reads only the header of the weight file, so it is quick for the largest models too. Settings
    that a published file does not state are listed as assumed.

    flextok info emoji-class
    flextok info EPFL-VILAB/flextok_d12_d12_in1k --json | jq .parameters.total
    """

    model: Annotated[str, "folder, weight file, name or hub id, published ones too"] = TOKENIZER


@dataclass
class Models(Json):
    """list the models that come with the package

    Prints the tokenizers and generators. Every command that takes a model accepts their names.

    flextok models
    flextok info emoji-class
    """


@dataclass
class Convert(Json):
    """write a published model in our layout, or one of ours in another

    Checks that every tensor is used and none is missing, then writes model.safetensors, config.json
    and a model card. --to diffusers: a tokenizer as AutoencoderFlexTok, a generator with its
    tokenizer as FlexTokPipeline (flextok.integrations.diffusers). --to published: a FlexTok as the
    published code reads it.

    flextok convert EPFL-VILAB/flextok_d12_d12_in1k outputs/flextok_d12
    flextok convert weights.safetensors outputs/mine max_timestep=1.0 vae.scaling_factor=0.5
    flextok convert emoji-class outputs/emoji_diffusers --to diffusers
    """

    input: Annotated[str, "folder, weight file, hub id, or owner/name/file.bin"]
    output: Annotated[str, "the folder to write"]
    overrides: Annotated[
        list[str],
        "config fields to change, e.g. max_timestep=1.0 or vae.scaling_factor=0.5",
        {"metavar": "key=value"},
    ] = field(default_factory=list)
    _: KW_ONLY
    to: Annotated[Literal["flextok", "diffusers", "published"], "the layout"] = "flextok"


COMMANDS: dict[str, tuple[type, str]] = {
    "train": (Train, "training.run_train"),
    "tokenize": (Tokenize, "training.run_tokenize"),
    "plan": (Plan, "training.run_plan"),
    "index": (Index, "training.run_index"),
    "sample": (Sample, "sample.run_sample"),
    "search": (Search, "search.run_search"),
    "reconstruct": (Reconstruct, "reconstruct.run_reconstruct"),
    "evaluate": (Evaluate, "measure.run_evaluate"),
    "sweep": (Sweep, "measure.run_sweep"),
    "adaptive": (Adaptive, "measure.run_adaptive"),
    "probe": (Probe, "measure.run_probe"),
    "align": (Align, "measure.run_align"),
    "bench": (Bench, "bench.run_bench"),
    "demo": (Demo, "demo.run_demo"),
    "info": (Info, "models.run_info"),
    "models": (Models, "models.run_models"),
    "convert": (Convert, "models.run_convert"),
}
