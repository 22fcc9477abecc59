"""The commands of `flextok`; train.py and sample.py are two of them, uninstalled."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = "Images as short, ordered token sequences."


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 well, 1 a user's mistake (told in one line), 130
    interrupted."""
    # on a busy machine OpenMP's default of spinning threads can slow small models down 20 times
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = make_parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"flextok: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flextok: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flextok", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="train a tokenizer or a generator from a config")
    train.add_argument("config", help="a YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-4")
    train.set_defaults(run=run_train)

    plan = commands.add_parser(
        "plan", help="a run's memory, arithmetic, data rate and cost, before it runs"
    )
    plan.add_argument("config", help="a YAML file, see configs/")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--gpus", type=int, required=True, help="how many, over all nodes")
    plan.add_argument("--gpu", default="h100", help="a100, h100 or h200")
    plan.add_argument("--utilisation", type=float, default=0.35, help="of peak arithmetic")
    plan.add_argument("--price", type=float, default=2.5, help="dollars a GPU hour")
    plan.add_argument("--picture-kb", type=float, default=110.0, help="a picture file's size")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run_plan)

    sample = commands.add_parser(
        "sample",
        help="reconstruct pictures or generate by class, as a coarse-to-fine grid",
        description="With a tokenizer: reconstruct --images or --data at each of --num-tokens. "
        "With a generator: generate --classes.",
    )
    sample.add_argument("model", help="folder or hub id of a tokenizer or a generator")
    sample.add_argument("--images", nargs="+", metavar="FILE", help="picture files or folders")
    sample.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers; 'none'")
    sample.add_argument("--num-samples", type=int, default=1, help="pictures a class")
    sample.add_argument("--tokenizer", help="generator: another place to find its tokenizer")
    sample.add_argument("--temperature", type=float)
    sample.add_argument("--top-k", type=int)
    sample.add_argument("--top-p", type=float)
    sample.add_argument("--class-guidance", type=float, help="generator's guidance, 1 = none")
    sample.add_argument("--output", default="outputs/sample.png", help="the PNG to write")
    add_decoding(sample)
    sample.set_defaults(run=run_sample)

    sweep = commands.add_parser(
        "sweep", help="reconstruction quality against the number of tokens, as a table"
    )
    sweep.add_argument("model", help="folder or hub id of a tokenizer")
    sweep.add_argument("--json", metavar="FILE", help="also write the figures to a JSON file")
    sweep.add_argument("--batch-size", type=int, default=64)
    add_decoding(sweep)
    sweep.set_defaults(run=run_sweep)

    tokenize = commands.add_parser(
        "tokenize",
        help="encode a data set once, for generators to train on",
        description="Writes shards of indices, labels and captions. Run it again to continue; "
        "torchrun or srun share the work. A generator reads the result by "
        "data.train={name: tokens, path: <output>}.",
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
    tokenize.add_argument("--seed", type=int, default=0)
    tokenize.add_argument("--part-size", type=int, default=16_384, help="encodings a shard")
    tokenize.add_argument("--batch-size", type=int, default=64)
    tokenize.add_argument("--num-workers", type=int, default=0)
    tokenize.add_argument("--bf16", action="store_true", help="encode in bf16: GPUs only")
    tokenize.add_argument("--device", help="by default this process's GPU, or the CPU")
    tokenize.add_argument("--verify", action="store_true", help="then check all checksums")
    tokenize.set_defaults(run=run_tokenize)

    index = commands.add_parser(
        "index", help="count the samples of WebDataset shards, for streaming them"
    )
    index.add_argument("urls", nargs="+", help="paths or URLs, with {000..012} or *")
    index.add_argument("output", help="the .json to write: urls of a webdataset_stream")
    index.set_defaults(run=run_index)

    info = commands.add_parser(
        "info", help="a model's config, sizes, vocabulary, bits per image and provenance"
    )
    info.add_argument("model", help="folder, weight file or hub id, published ones too")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info)

    convert = commands.add_parser(
        "convert",
        help="write a published model in our layout",
        description="Checks that every tensor is used and none is missing, then writes "
        "model.safetensors, config.json and a model card.",
    )
    convert.add_argument("input", help="folder, weight file, hub id, or owner/name/file.bin")
    convert.add_argument("output", help="the folder to write")
    convert.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config fields to change, e.g. max_timestep=1.0 or vae.scaling_factor=0.5",
    )
    convert.set_defaults(run=run_convert)
    return parser


def add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="SET", help="emoji:validation, emoji_scenes:train, a folder or *.tar"
    )
    parser.add_argument("--limit", type=int, help="take this many of --data, evenly spread")
    parser.add_argument("--num-tokens", type=int, nargs="+", help="default 1 2 4 ... all")
    parser.add_argument("--steps", type=int, help="decoder steps")
    parser.add_argument("--guidance-scale", type=float, help="decoder guidance, 1 = none")
    parser.add_argument("--solver", help="euler or heun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; a GPU where there is one")


def run_train(options: argparse.Namespace) -> None:
    from flextok.config import load_experiment
    from flextok.training.checkpoints import Interrupted, requeue
    from flextok.training.run import train

    for chatty in ("lightning.pytorch", "lightning.fabric"):  # importing them set their level
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        folder = train(load_experiment(options.config, options.overrides))
    except Interrupted as stop:
        print(f"flextok: {stop}; run the same command again to continue", file=sys.stderr)
        requeue(stop.signum)
        raise SystemExit(128 + stop.signum) from None
    print(f"trained model in {folder}")


def run_plan(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from flextok.config import load_experiment
    from flextok.training.plan import Assumptions, as_text, plan

    assumed = Assumptions(options.gpu, options.utilisation, options.price, options.picture_kb)
    found = plan(load_experiment(options.config, options.overrides), options.gpus, assumed)
    print(json.dumps(asdict(found), indent=2) if options.json else as_text(found))


def run_sample(options: argparse.Namespace) -> None:
    from flextok import viz
    from flextok.hub import resolve
    from flextok.pipeline import (
        decode_prefixes,
        generate_images,
        is_generator,
        load_model,
        load_tokenizer_of,
    )

    model = load_model(options.model, pick_device(options.device))
    if model.model_type not in ("flextok", "gpt"):
        raise ValueError(
            f"{options.model} is a {model.model_type!r} model: this command drives FlexTok and its "
            "generators so far; use the model's encode, decode or generate from Python"
        )
    device = next(model.parameters()).device
    lengths = token_lengths(options.num_tokens, model.num_tokens)
    decoding = decoding_options(options)
    if is_generator(model):
        if options.images or options.data:
            raise ValueError("a generator makes pictures from --classes, not --images or --data")
        tokenizer = load_tokenizer_of(model, resolve(options.model), options.tokenizer, device)
        cond, names = class_labels(model, options.classes, options.num_samples)
        sampling = {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "guidance_scale": options.class_guidance,
        }
        pictures = generate_images(
            model, tokenizer, cond.to(device), lengths, options.seed, sampling, decoding
        )
        picture = viz.coarse_to_fine(None, pictures, names)
    else:
        if options.classes:
            raise ValueError("a tokenizer reconstructs --images or --data; it has no --classes")
        images = read_images(options, model.image_size)
        indices = model.encode(images.to(device))
        decoded = decode_prefixes(model, indices, lengths, options.seed, decoding)
        picture = viz.coarse_to_fine(images, decoded)
    print(f"wrote {viz.save(picture, options.output)}")


def run_sweep(options: argparse.Namespace) -> None:
    from flextok.evaluation.prefix import format_table, prefix_quality
    from flextok.hub import atomic_write
    from flextok.pipeline import load_model

    if not options.data:
        raise ValueError("name the pictures to measure on, e.g. --data emoji:validation")
    model = load_model(options.model, pick_device(options.device))
    lengths = token_lengths(options.num_tokens, model.num_tokens)
    dataset = take(open_data(options.data), options.limit)
    results = prefix_quality(
        model, dataset, lengths, options.seed, decoding_options(options), options.batch_size
    )
    print(format_table(results))
    if options.json:
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {
                "model": options.model,
                "data": options.data,
                "seed": options.seed,
                **decoding_options(options),
                "results": [r.as_dict() for r in results],
            },
            indent=2,
        )
        atomic_write(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))


def run_tokenize(options: argparse.Namespace) -> None:
    from flextok.data.datasets import DATASETS
    from flextok.data.processes import local_device
    from flextok.data.tokens import (
        build_token_cache,
        cache_identity,
        read_manifest,
        verify_token_cache,
    )
    from flextok.data.transforms import ImageTransform
    from flextok.pipeline import is_generator, load_model
    from flextok.schema import build

    tokenizer = load_model(options.model, pick_device(options.device or local_device()))
    if is_generator(tokenizer):
        raise ValueError(f"{options.model} is a generator: name the tokenizer to encode with")
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
        return
    folder = Path(options.output)
    manifest = verify_token_cache(folder) if options.verify else read_manifest(folder)
    unreadable = sum(part["unreadable"] for part in manifest["parts"])
    print(
        f"{options.output}: {manifest['num_sequences']} sequences in {len(manifest['parts'])} parts"
        + (f", {unreadable} pictures unreadable (see the parts' metadata)" if unreadable else "")
        + (", all checksums agree" if options.verify else "")
    )


def run_index(options: argparse.Namespace) -> None:
    from flextok.data.web import write_index
    from flextok.hub import atomic_write

    index = write_index(options.urls)
    text = json.dumps(index, indent=2) + "\n"
    atomic_write(Path(options.output), lambda path: path.write_text(text, encoding="utf-8"))
    total = sum(shard["nsamples"] for shard in index["shardlist"])
    print(f"{options.output}: {total} samples in {len(index['shardlist'])} shards")


def run_info(options: argparse.Namespace) -> None:
    from flextok.card import model_facts, summary
    from flextok.pipeline import load_model

    facts = model_facts(load_model(options.model, "meta"))  # the weights stay in their file
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    lines = summary(facts)
    width = max(map(len, lines)) + 2
    for label, value in lines.items():
        print(f"{label:<{width}}{value}")
    print(f"config {json.dumps(facts['config'], indent=2)}")


def run_convert(options: argparse.Namespace) -> None:
    from flextok.pipeline import load_model

    overrides = {}
    for entry in options.overrides:
        key, equals, text = entry.partition("=")
        if not equals:
            raise ValueError(f"override {entry!r} must look like key=value, e.g. max_timestep=1.0")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    folder = load_model(options.input, overrides=overrides).save_pretrained(options.output)
    print(f"wrote {folder}")


def pick_device(name: str | None) -> str:
    import torch

    if name is not None:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name}: {error}") from None
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def token_lengths(asked: list[int] | None, total: int) -> list[int]:
    from flextok.pipeline import prefix_lengths

    lengths = sorted(set(asked or prefix_lengths(total)))
    if bad := [k for k in lengths if not 1 <= k <= total]:
        raise ValueError(f"--num-tokens {bad[0]} must be in [1, {total}]")
    return lengths


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "solver": options.solver,
    }


def open_data(name: str) -> Any:
    from flextok.data.datasets import DATASETS
    from flextok.schema import build

    return build(DATASETS, data_spec(name), "dataset")


def data_spec(name: str) -> dict[str, Any]:
    """emoji, emoji:validation, emoji_scenes:train, a folder of pictures, WebDataset shards (*.tar)
    or a spec as in configs, {name: folder, root: pictures}."""
    if Path(name).is_dir():
        return {"name": "folder", "root": name}
    if name.startswith("{"):
        from omegaconf import OmegaConf

        try:
            spec: Any = OmegaConf.to_container(OmegaConf.create(name))
        except Exception as error:  # a YAML parser's error type is its own
            raise ValueError(f"data {name!r} is no valid YAML: {error}") from None
        return spec
    if ".tar" in name:
        return {"name": "webdataset", "urls": name}
    dataset, _, split = name.partition(":")
    if dataset not in ("emoji", "emoji_scenes"):
        raise ValueError(
            f"--data {name!r} is neither a folder nor shards (*.tar) nor emoji[:split] nor "
            "emoji_scenes[:split] nor {name: ...}"
        )
    return {"name": dataset, "split": split or "validation"}


def take(dataset: Any, limit: int | None) -> Any:
    from torch.utils.data import Subset

    if limit is None or limit >= len(dataset):
        return dataset
    if limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1")
    return Subset(dataset, [i * len(dataset) // limit for i in range(limit)])


def read_images(options: argparse.Namespace, size: int) -> Any:
    """--images or --data as (n, 3, size, size) in [-1, 1]; unreadable ones are skipped."""
    from torch.utils.data import DataLoader

    from flextok.data.datamodule import prepare_image
    from flextok.data.datasets import PictureFiles
    from flextok.data.stream import EvaluationSet, collate
    from flextok.data.transforms import ImageTransform

    if bool(options.images) == bool(options.data):
        raise ValueError("name the pictures to reconstruct: either --images FILE ... or --data SET")
    source = PictureFiles(options.images) if options.images else open_data(options.data)
    limit = 8 if options.limit is None and options.data else options.limit
    dataset = EvaluationSet(take(source, limit), prepare_image(ImageTransform(size)))
    batch = next(iter(DataLoader(dataset, batch_size=len(dataset), collate_fn=collate)))
    if not batch:
        raise ValueError("none of the pictures could be read; see the warnings above")
    return batch["image"]


def class_labels(model: Any, classes: list[str] | None, num_samples: int) -> tuple[Any, list[str]]:
    """Class names or numbers to labels, each num_samples times. All classes by default."""
    import torch

    from flextok.generators.conditioning import NULL_CLASS

    known: list[str] = model.metadata.get("class_names", [])
    if num_samples < 1:
        raise ValueError(f"--num-samples {num_samples} must be at least 1")
    labels, names = [], []
    for entry in classes or [str(i) for i in range(len(known) or 1)]:
        if entry == "none":
            label = NULL_CLASS
        elif entry in known:
            label = known.index(entry)
        elif entry.isdigit() and (not known or int(entry) < len(known)):
            label = int(entry)
        else:
            raise ValueError(f"unknown class {entry!r}; known: {', '.join(known) or 'numbers'}")
        name = known[label] if known and label != NULL_CLASS else entry
        labels += [label] * num_samples
        names += [name] * num_samples
    return torch.tensor(labels), names


if __name__ == "__main__":
    sys.exit(main())
