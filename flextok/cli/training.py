"""`flextok train | tokenize | plan | index`: runs from configs, data sets into tokens."""

import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextok.cli.arguments import Index, Plan, Tokenize, Train
from flextok.cli.common import data_spec, load_tokenizer
from flextok.cli.options import refuse_given, write_json
from flextok.config import load_experiment
from flextok.data.openers import parse_fetch
from flextok.data.shards import write_index
from flextok.data.tokens import (
    build_token_cache,
    cache_identity,
)
from flextok.data.transforms import ImageTransform
from flextok.data.variants import warn_unused
from flextok.files import check_writable
from flextok.registry import make_dataset
from flextok.training.plan import Assumptions, as_text, plan
from flextok.training.recipe import memory_here, memory_of, write_recipe
from flextok.training.run import train
from flextok.training.saving import Interrupted, requeue


def run_train(options: Train) -> None:
    for chatty in ("lightning.pytorch", "lightning.fabric"):  # importing them set their level
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Lightning's own use of torch, and frozen parts that are in eval mode on purpose
    for harmless in (r"`isinstance\(treespec, LeafSpec\)`", r"Found \d+ module\(s\) in eval mode"):
        warnings.filterwarnings("ignore", message=harmless)
    # a file may have an = in its name
    configs = [a for a in options.arguments if "=" not in a or os.path.isfile(a)]
    overrides = [a for a in options.arguments if a not in configs]
    if options.data is not None and not configs:
        configs = [str(path) for path in configs_for(options, options.data)]
    elif not configs or options.data is not None:
        raise ValueError("train takes configs with key=value changes, or --data FOLDER")
    else:
        refuse_given(options, ("size", "gpu_memory", "output"), "that is for --data FOLDER")
    own = [a for a in overrides if a.startswith(("output_dir=", "start", "tokenizer="))]
    if len(configs) > 1 and own:
        raise ValueError(
            f"{own[0]}: changes are for all {len(configs)} configs, and each has an output_dir and "
            "takes models of its own: change it in the file, or train them one by one"
        )
    try:
        for config in [load_experiment(path, overrides) for path in configs]:
            folder = train(config, options.only_caches)
            done = "filled the caches of" if options.only_caches else "trained model in"
            print(f"{done} {folder}")
    except Interrupted as stop:
        if config.resume:
            print(f"flextok: {stop}; run the same command again to continue", file=sys.stderr)
            requeue(stop.signum)
        else:  # the same command would start over, and so would the requeued job
            print(
                f"flextok: {stop}; it continues when run again without resume=false (a SLURM job "
                "is not requeued)",
                file=sys.stderr,
            )
        raise SystemExit(128 + stop.signum) from None


def configs_for(options: Train, pictures: str) -> list[Path]:
    """Write the configs for a folder of pictures. Returns their files. Raises ValueError."""
    here = memory_here()
    if options.gpu_memory is not None and here is None:
        raise ValueError(
            f"--gpu-memory {options.gpu_memory:g}: this machine has no GPU, leave it out for a CPU"
        )
    memory = here if options.gpu_memory is None else options.gpu_memory
    if not os.path.isdir(pictures):
        raise ValueError(f"--data {pictures!r} is not a folder: give that of the pictures")
    output = options.output or Path("outputs") / Path(pictures).resolve().name
    files = write_recipe(pictures, output, 64 if options.size is None else options.size, memory)
    for path in files:
        config, takes = load_experiment(path), ""
        if memory is not None:
            takes = f"; it takes about {memory_of(config):.1f} of {memory:.0f} GB (flextok plan)"
        print(f"config of the {config.task}: {path}{takes}")
    if config.data.train == config.data.validation:
        print(f"{pictures} has no folders train and val: validation is on the training images")
    return files


def run_plan(options: Plan) -> dict[str, Any]:
    assumed = Assumptions(options.gpu, options.utilisation, options.price, options.picture_kb)
    found = plan(load_experiment(options.config, options.overrides), options.gpus, assumed)
    print(as_text(found))
    return asdict(found)


def run_index(options: Index) -> dict[str, Any]:
    if options.output != "-" and not options.output.endswith(".json"):  # such as the last shard
        raise ValueError(
            f"the index would be written to {options.output}: name a file that ends in .json, or - "
            "for standard output, behind the shards"
        )
    if options.output != "-":
        check_writable(options.output, "output")
    elif options.json == "-":
        raise ValueError("standard output takes the index or --json: name a file for one")
    index = write_index(options.urls, parse_fetch(options.fetch))
    write_json(options.output, index)
    total = sum(shard["nsamples"] for shard in index["shardlist"])
    place = sys.stderr if options.output == "-" else sys.stdout
    print(f"{options.output}: {total} samples in {len(index['shardlist'])} shards", file=place)
    return {"output": options.output, "samples": total, "shards": len(index["shardlist"])}


def run_tokenize(options: Tokenize) -> dict[str, Any] | None:
    tokenizer = load_tokenizer(options.model, options.device)
    spec = data_spec(options.data)
    transform = ImageTransform(tokenizer.image_size, options)
    warn_unused(options, options.variants, "--variants")
    store = build_token_cache(
        options.output,
        tokenizer,
        make_dataset(spec),
        transform,
        cache_identity(tokenizer, spec, options.bf16),
        options.variants,
        options.batch_size,
        options.num_workers,
        options.seed,
        options.part_size,
    )
    if not store.is_finished:
        print(f"this process's part of {options.output} is done, other processes' is not")
        return None
    if options.verify:
        store.verify()
    if not (sequences := len(store.column("position"))):
        raise ValueError(f"no image of {options.data} could be read; see the warnings above")
    unreadable = store.length - sequences
    print(
        f"{options.output}: {sequences} sequences in {store.num_parts} parts"
        + (f", {unreadable} could not be read (see the parts' metadata)" if unreadable else "")
        + (", all checksums agree" if options.verify else "")
    )
    counts = {"sequences": sequences, "parts": store.num_parts, "unreadable": unreadable}
    return {**store.manifest, **counts}
