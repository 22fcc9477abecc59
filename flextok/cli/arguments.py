"""What each command takes. Nothing here imports torch, which --help would wait for; the modules
beside this one do the work."""

from flextok.cli.options import (
    BY_CLASS,
    BY_PROMPT,
    MOST_CLASSES,
    RECONSTRUCTED,
    SAMPLING,
    TOKENIZER,
    Commands,
    add_command,
    add_fields,
    add_solving,
)


def add_commands(commands: Commands) -> None:
    add_training(commands)
    add_sample(commands)
    add_reconstruct(commands)
    add_align(commands)
    add_bench(commands)
    add_demo(commands)
    add_models(commands)


def add_training(commands: Commands) -> None:
    train = add_command(
        commands,
        "train",
        "training.run_train",
        "train a tokenizer or a generator from a config",
        "One YAML file states everything about a run; key=value changes it. The output folder gets "
        "checkpoints, logs, pictures and the model. An interrupted run continues when started "
        "again by the same command.",
        "flextok train configs/quickstart_tokenizer.yaml\n"
        "flextok train configs/quickstart_tokenizer.yaml output_dir=outputs/mine optim.lr=1e-3 \\\n"
        '    "data.train={name: folder, root: pictures}"',
    )
    train.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG [key=value ...]",
        help="a YAML file, see configs/, and what to change in it, e.g. optim.lr=1e-4; several "
        "files, which take no changes, are trained one after the other",
    )

    tokenize = add_command(
        commands,
        "tokenize",
        "training.run_tokenize",
        "encode a data set once, for generators to train on",
        "Writes shards of indices, labels and captions. Run it again to continue; "
        "torchrun or srun share the work. A generator reads the result by "
        "data.train={name: tokens, path: <output>}.",
        "flextok tokenize emoji emoji:train outputs/tokens --variants 4\n"
        "torchrun --nproc-per-node=8 -m flextok.cli tokenize MODEL 'shards-{000..999}.tar' tokens",
        *("--seed", "--batch-size", "--num-workers", "--device", "--json"),
    )
    tokenize.add_argument("model", help="folder or hub id of a tokenizer")
    tokenize.add_argument(
        "data", help="a folder of pictures, emoji:train, shards (*.tar) or {name: folder, root: x}"
    )
    tokenize.add_argument("output", help="the folder to write")
    tokenize.add_argument("--variants", type=int, default=1, help="encodings of each picture")
    tokenize.add_argument("--crop", choices=("center", "random"), default="center")
    tokenize.add_argument("--flip", action="store_true", help="mirror half of the variants")
    tokenize.add_argument("--shift", type=float, default=0.0, help="as data.shift in configs")
    tokenize.add_argument("--part-size", type=int, default=16_384, help="encodings a shard")
    tokenize.add_argument("--bf16", action="store_true", help="encode in bf16: GPUs only")
    tokenize.add_argument("--verify", action="store_true", help="then check all checksums")

    plan = add_command(
        commands,
        "plan",
        "training.run_plan",
        "a run's memory, arithmetic, data rate and cost, before it runs",
        "From the config's sizes and stated assumptions; docs/scale.md has how they were checked.",
        "flextok plan configs/flextok_d18_d28.yaml --gpus 128\n"
        "flextok plan configs/ar_class_1.33B.yaml --gpus 8 --gpu a100 --json plan.json\n"
        "flextok plan configs/flextok_d12_d12.yaml --gpus 1 --gpu rtx4090 data.batch_size=8",
        "--json",
    )
    plan.add_argument("config", help="a YAML file, see configs/")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--gpus", type=int, required=True, help="how many, over all nodes")
    plan.add_argument("--gpu", default="h100", help="a100, h100, h200, rtx3090, ...")
    plan.add_argument("--utilisation", type=float, default=0.35, help="of peak arithmetic")
    plan.add_argument("--price", type=float, help="dollars a GPU hour, 2.5 for rented ones")
    plan.add_argument("--picture-kb", type=float, default=110.0, help="a picture file's size")

    index = add_command(
        commands,
        "index",
        "training.run_index",
        "count the samples of WebDataset shards, for streaming them",
        "The file that it writes is what a webdataset_stream takes as urls: it states each shard's "
        "number of samples, hence an epoch's length.",
        "flextok index 'shards-{000..999}.tar' shards.json\n"
        "flextok index 's3://bucket/{000..999}.tar' shards.json --fetch 'aws s3 cp {url} -'",
        "--json",
    )
    index.add_argument("urls", nargs="+", help="paths or URLs, with {000..012} or *")
    index.add_argument("output", help="the .json to write")
    index.add_argument("--fetch", help="a command that writes the shard {url} to standard output")


def add_sample(commands: Commands) -> None:
    sample = add_command(
        commands,
        "sample",
        "sample.run_sample",
        "reconstruct pictures, or generate by class or prompt, as a coarse-to-fine grid",
        "With a tokenizer: reconstruct --images or --data at each of --num-tokens. "
        "With a generator: generate --classes, or --prompt, --prompts-file or the captions of "
        "--data; prompts also get their last pictures as files beside the grid. "
        "Without a model: the one for the purpose of those that come with the package.",
        "flextok sample\n"
        "flextok sample --images cat.jpg --num-tokens 1 16 256\n"
        "flextok sample --classes food-fruit heart none --num-samples 4\n"
        'flextok sample --prompt "a red heart left of a bomb" --output heart.png\n'
        "flextok sample outputs/quickstart/generator",
        *("--data", "--limit", "--num-tokens", "--num-samples", "--tokenizer", "--seed"),
        *("--device", "--json"),
    )
    sample.add_argument(
        "model",
        nargs="?",
        help="folder, name or hub id of a tokenizer or a generator; "
        f"default {TOKENIZER}, {BY_CLASS} or {BY_PROMPT}",
    )
    sample.add_argument("--images", nargs="+", metavar="FILE", help="picture files or folders")
    sample.add_argument(
        "--classes",
        nargs="*",
        metavar="CLASS",
        help="names, else numbers, else 'none' (or ''), for no class; alone: all, or "
        f"{MOST_CLASSES} of them",
    )
    sample.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts; '' = none")
    sample.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    sample.add_argument("--output", default="outputs/sample.png", help="the PNG to write")
    add_fields(sample, SAMPLING)
    add_solving(sample)


def add_reconstruct(commands: Commands) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        "reconstruct.run_reconstruct",
        "encode pictures and decode their first tokens, one PNG each",
        "Crops each picture to a square of the model's size, encodes it and decodes it from all "
        "tokens, or from the first few. Several pictures or lengths go to a folder, as "
        "<picture>-<tokens>.png. A picture named - is read from standard input, and its "
        "reconstruction goes to standard output. Unreadable pictures are skipped, and the exit "
        "code is 1 then.",
        "flextok reconstruct cat.jpg\n"
        "flextok reconstruct holiday/ --num-tokens 1 4 16 --output outputs/holiday --json\n"
        "flextok reconstruct - --num-tokens 4 < cat.jpg > cat-4.png",
        *("--num-tokens", "--seed", "--device", "--json"),
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders or -")
    parser.add_argument("--model", default=TOKENIZER, help="a tokenizer's folder, name or hub id")
    add_solving(parser)
    parser.add_argument(
        "--output", help=f"a folder, a file.png or - (standard output); default {RECONSTRUCTED}"
    )


def add_align(commands: Commands) -> None:
    align = add_command(
        commands,
        "align",
        "align.run_align",
        "how well generated emoji scenes show their prompts, against the number of tokens",
        "A small classifier, trained on real scenes, reads generated ones; the same "
        "pictures scored against shuffled prompts are the control.",
        "flextok align emoji-text --limit 64 --json align.json \\\n"
        '    --data "{name: emoji_scenes, max_objects: 2, vocabulary: basic, prompts: held_out}"',
        *("--tokenizer", "--data", "--limit", "--num-tokens", "--seed", "--device", "--json"),
    )
    align.add_argument("model", help="folder or hub id of a generator")
    align.add_argument("--probe", metavar="FILE", help="keep the classifier here, or take it")
    align.add_argument("--probe-steps", type=int, default=1500, help="its training, if needed")
    add_solving(align)


def add_bench(commands: Commands) -> None:
    bench = add_command(
        commands,
        "bench",
        "bench.run_bench",
        "seconds, FLOP/s, memory of encoding, decoding, generating and a training step",
        "Random weights at named sizes, beside the machine's own best rates; on a CPU, "
        "compare CPU seconds with --threads 1.",
        "flextok bench quickstart\nflextok bench d12-d12 ar-49M --threads 1 --json bench.json",
        *("--device", "--json"),
    )
    bench.add_argument("sizes", nargs="*", metavar="SIZE", help="names, all, or config files")
    bench.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds this")
    bench.add_argument("--batch", type=int, nargs="+", help="in place of a size's own")
    bench.add_argument("--steps", type=int, default=4, help="of FlexTok's decoder")
    bench.add_argument("--repeats", type=int, default=3, help="the best of these counts")
    bench.add_argument("--compare-mkl", action="store_true", help="also without oneDNN, on a CPU")
    bench.add_argument("--threads", type=int, help="of the CPU")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        "demo.run_demo",
        "a web page to take pictures apart and grow new ones, on this machine",
        "Drop a picture and slide its number of tokens; with a generator, watch a picture of a "
        "class or a prompt grow token by token. The page is served to this machine only, works "
        "offline, keeps no files, and stops with Ctrl-C. Needs pip install 'flextok[demo]'.",
        "flextok demo\n"
        "flextok demo outputs/quickstart/tokenizer outputs/quickstart/generator --port 8000",
        "--device",
    )
    parser.add_argument(
        "models",
        nargs="*",
        default=[TOKENIZER, BY_CLASS, BY_PROMPT],
        metavar="MODEL",
        help="folders, names or hub ids: a tokenizer to reconstruct with, generators with theirs; "
        "default: those that come with the package",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows it to your network")
    parser.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names in a browser's address bar that the page answers to, beside this machine's own",
    )
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--max-megabytes", type=float, default=10, help="of one upload")
    parser.add_argument("--max-megapixels", type=float, default=40, help="of one upload")
    parser.add_argument("--queue", type=int, default=16, help="how many clicks may wait")


def add_models(commands: Commands) -> None:
    info = add_command(
        commands,
        "info",
        "models.run_info",
        "a model's config, sizes, vocabulary, bits per image and provenance",
        "Reads the header of the weight file only, so it is quick for the largest models too. "
        "What a published file left open is listed as assumed.",
        "flextok info emoji-class\n"
        "flextok info EPFL-VILAB/flextok_d12_d12_in1k --json | jq .parameters.total",
        "--json",
    )
    info.add_argument(
        "model",
        nargs="?",
        default=TOKENIZER,
        help=f"folder, weight file, name or hub id, published ones too; default {TOKENIZER}",
    )

    add_command(
        commands,
        "models",
        "models.run_models",
        "the models that come with the package",
        "Lists tokenizers and generators. Their names serve wherever a command takes a model.",
        "flextok models\nflextok info emoji-class",
        "--json",
    )

    convert = add_command(
        commands,
        "convert",
        "models.run_convert",
        "write a published model in our layout",
        "Checks that every tensor is used and none is missing, then writes "
        "model.safetensors, config.json and a model card.",
        "flextok convert EPFL-VILAB/flextok_d12_d12_in1k outputs/flextok_d12\n"
        "flextok convert weights.safetensors outputs/mine max_timestep=1.0 vae.scaling_factor=0.5",
        "--json",
    )
    convert.add_argument("input", help="folder, weight file, hub id, or owner/name/file.bin")
    convert.add_argument("output", help="the folder to write")
    convert.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config fields to change, e.g. max_timestep=1.0 or vae.scaling_factor=0.5",
    )
