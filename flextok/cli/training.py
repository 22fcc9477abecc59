"""`flextok train | tokenize | plan | index`: runs from configs, data sets into tokens."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from flextok.cli.common import add_command, data_spec, load_tokenizer


def add_commands(commands: Any) -> None:
    train = add_command(
        commands,
        "train",
        run_train,
        "train a tokenizer or a generator from a config",
        "One YAML file says everything about a run; key=value changes it. The output folder gets "
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
        run_tokenize,
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
        run_plan,
        "a run's memory, arithmetic, data rate and cost, before it runs",
        "From the config's sizes and stated assumptions; docs/scale.md says how they were checked.",
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
        run_index,
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


def run_train(options: argparse.Namespace) -> None:
    from flextok.config import load_experiment
    from flextok.training.checkpoints import Interrupted, requeue
    from flextok.training.run import train

    for chatty in ("lightning.pytorch", "lightning.fabric"):  # importing them set their level
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # a file may have an = in its name
    configs = [a for a in options.arguments if "=" not in a or os.path.isfile(a)]
    overrides = [a for a in options.arguments if a not in configs]
    if not configs or (len(configs) > 1 and overrides):
        raise ValueError("train takes one config with key=value changes, or several without")
    try:
        for config in [load_experiment(path, overrides) for path in configs]:
            print(f"trained model in {train(config)}")
    except Interrupted as stop:
        print(f"flextok: {stop}; run the same command again to continue", file=sys.stderr)
        requeue(stop.signum)
        raise SystemExit(128 + stop.signum) from None


def run_plan(options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from flextok.config import load_experiment
    from flextok.training.plan import Assumptions, as_text, plan

    assumed = Assumptions(options.gpu, options.utilisation, options.price, options.picture_kb)
    found = plan(load_experiment(options.config, options.overrides), options.gpus, assumed)
    print(as_text(found))
    return asdict(found)


def run_index(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.cli.common import write_json
    from flextok.data.openers import parse_fetch
    from flextok.data.shards import write_index

    index = write_index(options.urls, parse_fetch(options.fetch))
    write_json(options.output, index)
    total = sum(shard["nsamples"] for shard in index["shardlist"])
    print(f"{options.output}: {total} samples in {len(index['shardlist'])} shards")
    return {"output": options.output, "samples": total, "shards": len(index["shardlist"])}


def run_tokenize(options: argparse.Namespace) -> dict[str, Any] | None:
    from flextok.data.datasets import DATASETS
    from flextok.data.tokens import (
        build_token_cache,
        cache_identity,
        read_manifest,
        verify_token_cache,
    )
    from flextok.data.transforms import ImageTransform
    from flextok.schema import build

    tokenizer = load_tokenizer(options.model, options.device)
    spec = data_spec(options.data)
    transform = ImageTransform(tokenizer.image_size, options.flip, options.crop, options.shift)
    finished = build_token_cache(
        options.output,
        tokenizer,
        build(DATASETS, spec, "dataset"),
        transform,
        cache_identity(tokenizer, spec, transform, options.bf16),
        options.variants,
        options.batch_size,
        options.num_workers,
        options.seed,
        options.part_size,
    )
    if not finished:
        print(f"this process's part of {options.output} is done, other processes' is not")
        return None
    folder = Path(options.output)
    manifest = verify_token_cache(folder) if options.verify else read_manifest(folder)
    unreadable = sum(part["unreadable"] for part in manifest["parts"])
    print(
        f"{options.output}: {manifest['num_sequences']} sequences in {len(manifest['parts'])} parts"
        + (f", {unreadable} pictures unreadable (see the parts' metadata)" if unreadable else "")
        + (", all checksums agree" if options.verify else "")
    )
    return manifest
