"""The commands of `flextok`; train.py and sample.py are two of them, uninstalled."""

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextok.cli_evaluation import add_commands as add_evaluation_commands

DESCRIPTION = "Images as short, ordered token sequences."
TEXT_MODEL = "outputs/quickstart_text/generator"  # what make quickstart-text trains


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
        help="reconstruct pictures, or generate by class or prompt, as a coarse-to-fine grid",
        description="With a tokenizer: reconstruct --images or --data at each of --num-tokens. "
        "With a generator: generate --classes, or --prompt, --prompts-file or the captions of "
        "--data; prompts also get their last pictures as files beside the grid.",
    )
    sample.add_argument(
        "model",
        nargs="?",
        help=f"folder or hub id of a tokenizer or a generator; for prompts default {TEXT_MODEL}",
    )
    sample.add_argument("--images", nargs="+", metavar="FILE", help="picture files or folders")
    sample.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers; 'none'")
    sample.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts; '' = none")
    sample.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    sample.add_argument("--num-samples", type=int, default=1, help="pictures a class or prompt")
    sample.add_argument("--tokenizer", help="generator: another place to find its tokenizer")
    sample.add_argument("--temperature", type=float)
    sample.add_argument("--top-k", type=int)
    sample.add_argument("--top-p", type=float)
    sample.add_argument(
        *("--class-guidance", "--text-guidance"),
        dest="cond_guidance",
        type=float,
        help="generator's guidance; none is 1, and 0 for a MaskGIT with linear or constant decay",
    )
    sample.add_argument("--generator-steps", type=int, help="MaskGIT's sampling steps")
    sample.add_argument("--output", default="outputs/sample.png", help="the PNG to write")
    add_decoding(sample)
    sample.set_defaults(run=run_sample)

    add_evaluation_commands(commands)

    align = commands.add_parser(
        "align",
        help="how well generated emoji scenes show their prompts, against the number of tokens",
        description="A small classifier, trained on real scenes, reads generated ones; the same "
        "pictures scored against shuffled prompts are the control.",
    )
    align.add_argument("model", help="folder or hub id of a generator")
    align.add_argument("--tokenizer", help="another place to find its tokenizer")
    align.add_argument("--probe", metavar="FILE", help="keep the classifier here, or take it")
    align.add_argument("--probe-steps", type=int, default=1500, help="its training, if needed")
    align.add_argument("--json", metavar="FILE", help="also write the figures to a JSON file")
    add_decoding(align)
    align.set_defaults(run=run_align)

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
        "--data",
        metavar="SET",
        help="emoji:validation, emoji_scenes:train, a picture folder, shards (*.tar), or "
        "{name: ...} as in configs",
    )
    parser.add_argument("--limit", type=int, help="take this many of --data, evenly spread")
    parser.add_argument("--num-tokens", type=int, nargs="+", help="default 1 2 4 ... all, or all")
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
    from flextok.generators.conditioning import TextConditioner
    from flextok.hub import resolve
    from flextok.pipeline import (
        generate_images,
        is_generator,
        load_model,
        load_tokenizer_of,
        reconstruct_prefixes,
    )

    if options.model is None:
        if not (options.prompt or options.prompts_file):
            raise ValueError("name a model: the folder or hub id of a tokenizer or a generator")
        options.model = TEXT_MODEL
    model = load_model(options.model, pick_device(options.device))
    device = next(model.parameters()).device
    decoding = decoding_options(options)
    if is_generator(model):
        by_text = isinstance(model.conditioner, TextConditioner)
        if by_text:
            cond = names = read_prompts(options)
        elif options.images or options.data:
            raise ValueError("a generator makes pictures from --classes, not --images or --data")
        elif options.prompt or options.prompts_file:
            raise ValueError(f"{options.model} knows classes, not prompts: use --classes")
        else:
            cond, names = class_labels(model, options.classes, options.num_samples)
            cond = cond.to(device)
        tokenizer = load_tokenizer_of(model, resolve(options.model), options.tokenizer, device)
        lengths = token_lengths(options.num_tokens, tokenizer, model.num_tokens)
        sampling = {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "guidance_scale": options.cond_guidance,
            "num_steps": options.generator_steps,
        }
        pictures = generate_images(
            model, tokenizer, cond, lengths, options.seed, sampling, decoding
        )
        if len(lengths) > 1:
            picture = viz.coarse_to_fine(None, pictures, names)
        else:
            picture = viz.samples(pictures[lengths[0]], names, options.num_samples)
        if by_text:
            save_each(pictures[lengths[-1]], Path(options.output))
    else:
        if options.classes or options.prompt or options.prompts_file:
            raise ValueError(
                "a tokenizer reconstructs --images or --data; it has no --classes or prompts"
            )
        lengths = token_lengths(options.num_tokens, model, model.num_tokens)
        images = read_images(options, model.image_size)
        decoded = reconstruct_prefixes(model, images, lengths, options.seed, decoding)
        picture = viz.coarse_to_fine(images, decoded)
    print(f"wrote {viz.save(picture, options.output)}")


def run_align(options: argparse.Namespace) -> None:
    from flextok.data.datasets import DATASETS
    from flextok.data.emoji import EmojiScenes
    from flextok.evaluation.alignment import alignment, format_report
    from flextok.evaluation.scene_probe import Probe, train_probe
    from flextok.hub import resolve
    from flextok.pipeline import is_generator, load_model, load_tokenizer_of
    from flextok.schema import build

    spec = data_spec(options.data or "emoji_scenes:validation")
    scenes = build(DATASETS, spec, "dataset")
    if not isinstance(scenes, EmojiScenes):
        raise ValueError("--data must be emoji_scenes: the classifier reads those")
    generator = load_model(options.model, pick_device(options.device))
    if not is_generator(generator):
        raise ValueError(f"{options.model} is a {generator.model_type} model, not a generator")
    device = next(generator.parameters()).device
    tokenizer = load_tokenizer_of(generator, resolve(options.model), options.tokenizer, device)
    if options.probe and Path(options.probe).is_file():
        probe = Probe.load(options.probe).to(device)
    else:
        known = {"split": "train", "prompts": "train" if scenes.prompts == "held_out" else "all"}
        real = build(DATASETS, {**spec, **known}, "dataset")
        probe = train_probe(real, tokenizer.image_size, options.probe_steps, device=device)
        if options.probe:
            probe.save(options.probe)
    report = alignment(
        generator,
        tokenizer,
        probe,
        scenes,
        token_lengths(options.num_tokens, tokenizer, generator.num_tokens),
        options.limit or 256,
        options.seed,
        decoding=decoding_options(options),
    )
    print(format_report(report))
    if options.json:
        write_json(options.json, {"model": options.model, "data": spec, **asdict(report)})


def write_json(path: str, content: dict[str, Any]) -> None:
    from flextok.hub import atomic_write

    text = json.dumps(content, indent=2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(path), lambda p: p.write_text(text + "\n", encoding="utf-8"))


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
    from flextok.data.shards import write_index
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


def token_lengths(asked: list[int] | None, tokenizer: Any, total: int) -> list[int]:
    from flextok.pipeline import decodable_lengths

    lengths = sorted(set(asked or decodable_lengths(tokenizer, total)))
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
    if name.startswith("{"):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            spec: Any = OmegaConf.to_container(OmegaConf.create(name))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"--data {name!r} is no mapping: {error}") from None
        return spec
    if Path(name).is_dir():
        return {"name": "folder", "root": name}
    if ".tar" in name:
        return {"name": "webdataset", "urls": name}
    dataset, _, split = name.partition(":")
    if dataset not in ("emoji", "emoji_scenes"):
        raise ValueError(
            f"--data {name!r} is neither a folder nor shards (*.tar) nor emoji[:split] nor "
            "emoji_scenes[:split] nor {name: ...}"
        )
    return {"name": dataset, "split": split or "validation"}


def read_images(options: argparse.Namespace, size: int) -> Any:
    """--images or --data as (n, 3, size, size) in [-1, 1]; unreadable ones are skipped."""
    from torch.utils.data import DataLoader

    from flextok.data.datamodule import prepare_image
    from flextok.data.datasets import PictureFiles, take
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


def read_prompts(options: argparse.Namespace) -> list[str]:
    """--prompt, --prompts-file or the captions of --data, each --num-samples times."""
    if options.images or options.classes:
        raise ValueError("this generator makes pictures from prompts, not --images or --classes")
    given = [bool(x) for x in (options.prompt, options.prompts_file, options.data)]
    if sum(given) != 1:
        raise ValueError("name the prompts: --prompt TEXT ..., --prompts-file FILE or --data SET")
    if options.num_samples < 1:
        raise ValueError(f"--num-samples {options.num_samples} must be at least 1")
    if options.prompt:
        prompts = options.prompt
    elif options.prompts_file:
        prompts = read_lines(Path(options.prompts_file))
    else:
        from flextok.data.datasets import take

        dataset = take(open_data(options.data), 8 if options.limit is None else options.limit)
        prompts = [dataset[i]["caption"] for i in range(len(dataset))]
    return [prompt for prompt in prompts for _ in range(options.num_samples)]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    if not path.is_file():
        raise ValueError(f"--prompts-file {path}: there is no such file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path} is not UTF-8 text ({error})") from None
    if not any(lines):
        raise ValueError(f"--prompts-file {path} is empty: write one prompt a line")
    return [line for line in lines if line]


def save_each(pictures: Any, output: Path) -> None:
    """(n, 3, H, W) -> <output>-1.png, <output>-2.png, ... beside the grid."""
    from flextok import viz
    from flextok.data.transforms import to_image

    for number, picture in enumerate(pictures, 1):
        path = viz.save(to_image(picture), output.with_name(f"{output.stem}-{number}.png"))
        print(f"wrote {path}")


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
