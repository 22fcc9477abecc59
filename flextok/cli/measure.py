"""`flextok evaluate | sweep | adaptive | probe | align`: the commands that measure."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from flextok.cli.arguments import (
    PROBE_STEPS,
    Adaptive,
    Align,
    Evaluate,
    Measuring,
    Probe,
    Search,
    Sweep,
)
from flextok.cli.common import (
    data_of,
    data_spec,
    open_data,
    pick_device,
    spare_run,
    token_lengths,
)
from flextok.cli.options import decoding_options, refuse_given
from flextok.data.sets import take
from flextok.emoji import probe as scene_probe
from flextok.emoji.alignment import (
    alignment,
    check_generator,
    check_probe,
    check_scenes,
    format_report,
)
from flextok.emoji.scenes import EmojiScenes
from flextok.evaluation import Cell, Options, evaluate, processes
from flextok.evaluation.adaptive import Target, fit_length_head, relate
from flextok.evaluation.evaluators import FAITHFUL, PLAUSIBLE
from flextok.evaluation.job import model_settings
from flextok.evaluation.probe import format_table as probe_table
from flextok.evaluation.probe import linear_probe
from flextok.evaluation.report import check_output, write_report
from flextok.evaluation.sweep import format_table as sweep_table
from flextok.evaluation.sweep import offline_network, sweep
from flextok.files import check_writable
from flextok.generators import Generator
from flextok.pipeline import load_token_model, load_tokenizer_of
from flextok.places import CONFIG, check_layout, layout_of, list_models
from flextok.registry import make_dataset
from flextok.storage import read_json
from flextok.tokenizers import FlexTok, Tokenizer

FITTED = 4096  # images, at most, to which a length head is fitted


def prepare_output(options: Measuring) -> Path:
    """The folder to write, found fit before the work."""
    model = re.sub(r"[^\w.-]+", "-", options.model).strip("-.") or "model"
    options.output = options.output or f"outputs/{options.folder}/{model}"
    check_output(Path(options.output))
    return Path(options.output)


def load_for_measuring(options: Measuring) -> Any:
    """The model on its device and in its precision."""
    device = pick_device(options.device)
    double = options.dtype == "float64" or (options.dtype is None and device == "cpu")
    return load_token_model(options.model, device).to(torch.float64 if double else torch.float32)


def tokenizer_for_measuring(options: Measuring) -> Any:
    """As load_for_measuring. Raises ValueError for a generator."""
    model = load_for_measuring(options)
    if not isinstance(model, Tokenizer):
        raise ValueError(f"{options.model} is a generator: name a tokenizer")
    return model


def measuring_options(options: Measuring, decoding: Mapping[str, Any] | None = None) -> Options:
    given = vars(options)
    asked = {f.name: given[f.name] for f in fields(Options) if given.get(f.name) is not None}
    if (reference := asked.get("reference")) and not reference.endswith(".npz"):
        asked["reference"] = open_data(reference)
    return Options(**asked, decoding=decoding or {})


def names_of(options: Evaluate | Sweep, data: str) -> dict[str, str]:
    """What the report calls the model and the data sets."""
    names = {"model": options.model, "data": data}
    return names | ({"reference": options.reference} if options.reference else {})


def run_evaluate(options: Evaluate) -> dict[str, Any] | None:
    how = measuring_options(options, decoding_options(options))
    names = names_of(options, options.data)
    output = prepare_output(options)
    with processes.joined():
        model, tokenizer = load_for_measuring(options), None
        if stored := options.data.endswith(".npz"):
            refuse_given(options, ["limit"], f"{options.data} is statistics of all its images")
        data = options.data if stored else take(open_data(options.data), options.limit)
        if isinstance(model, Tokenizer):
            generator_s = ("labels", "num_samples", "tokenizer")
            refuse_given(options, generator_s, f"{options.model} is a tokenizer")
        else:
            place = (model, options.model, options.tokenizer)
            tokenizer = load_tokenizer_of(*place, model.device).to(next(model.parameters()).dtype)
        cells = [Cell(k) for k in options.num_tokens or [model.num_tokens]]
        report = evaluate(model, data, cells, how, output, names, tokenizer)
        if processes.rank() != 0:
            return None
        print_report(report)
        print(f"wrote {output / 'report.json'}")
        return report


def run_sweep(options: Sweep) -> dict[str, Any]:
    output = prepare_output(options)
    data = take(data_of(options.data, options.model), options.limit)
    if options.networks is None:
        options.networks = offline_network(len(data))
    model = tokenizer_for_measuring(options)
    cells = ("num_steps", "guidance_scale")  # of which there may be several
    alike = {k: v for k, v in decoding_options(options).items() if k not in cells}
    report = sweep(
        model,
        data,
        measuring_options(options, alike),
        output,
        token_lengths(options.num_tokens, model, model.num_tokens),
        options.steps,
        options.guidance_scale,
        options.num_pictures,
        names=names_of(options, options.data or "the model's own validation data"),
    )
    print(sweep_table(report))
    print_warnings(report)
    print(f"wrote {output}")
    return report


def run_adaptive(options: Adaptive) -> dict[str, Any]:
    target = Target.parse(options.target)
    output = prepare_output(options)
    hashes, fitted = None, output / "tokenizer"
    if options.train is not None:
        check_fitted(fitted)
    if options.data is None and options.model in list_models():
        options.data = "emoji_scenes:validation"
    data = take(data_of(options.data, options.model), options.limit or 256)
    model = tokenizer_for_measuring(options)
    how = measuring_options(options, decoding_options(options))
    if options.train is not None:
        if not isinstance(model, FlexTok):
            raise ValueError(f"--train: {options.model} is a {model.model_type}, not a FlexTok")
        train = take(open_data(options.train), FITTED)
        hashes = fit_length_head(model, train, target.metric, how)
        dtype = model.dtype
        model.to(torch.float32).save_pretrained(fitted)
        model.to(dtype)
        print(f"wrote {fitted}, which has a length head for {target.metric}")
    report = relate(model, data, target, how, hashes)
    if (found := report["complexity"]) is not None:
        print("label  images  mean tokens  target met")
        for label, row in found["by_label"].items():
            print(f"{label:>5}  {row['count']:6d}  {row['mean_tokens']:11.2f}  {row['met']:10.2f}")
        control = found["shuffled"]
        print(
            f"Spearman of length and label: {found['spearman']:+.3f}; with shuffled labels "
            f"{control['first']:+.3f} ({control['mean']:+.3f} +- {control['std']:.3f} over "
            f"{control['shuffles']}), p = {control['p_value']:.2g}"
        )
    print(
        f"{report['count']} images, {report['met']} meet {report['target']}; "
        f"{report['mean_tokens']:.1f} tokens each, at most {report['decodes_per_picture']} decodes"
    )
    if (predicted := report["predicted"]) is not None:
        took = predicted["seconds_per_picture"]
        print(
            f"predicted lengths: Spearman with these {predicted['spearman']:+.3f}; "
            f"{predicted['met']} meet it, {predicted['mean_tokens']:.1f} tokens each; "
            f"{1000 * took['prediction']:.2g} ms an image, where the search takes "
            f"{1000 * took['search']:.2g}"
        )
    return write_measured(report, model, options, output)


def check_fitted(folder: Path) -> None:
    """Raise ValueError where a tokenizer with a length head would be written over a model that an
    earlier `adaptive` has not."""
    spare_run(folder)
    check_layout(folder, "flextok")
    if layout_of(folder) and "length_head" not in read_json(folder / CONFIG).get("metadata", {}):
        raise ValueError(
            f"{folder} holds another tokenizer, which would be lost: name another folder"
        )


def run_probe(options: Probe) -> dict[str, Any]:
    output = prepare_output(options)
    train = take(data_of(options.train, options.model, "train"), options.limit)
    test = take(data_of(options.data, options.model), options.limit)
    model = tokenizer_for_measuring(options)
    lengths = token_lengths(options.num_tokens, model, model.num_tokens)
    report = linear_probe(model, train, test, measuring_options(options), lengths)
    print(probe_table(report))
    return write_measured(report, model, options, output)


def run_align(options: Align) -> dict[str, Any]:
    number = options.limit or 256
    check_scenes(number)
    check_probe_file(options)
    spec = data_spec(options.data or "emoji_scenes:validation")
    scenes = make_dataset(spec)
    if not isinstance(scenes, EmojiScenes):
        raise ValueError("--data must be emoji_scenes: the classifier reads those")
    generator = load_token_model(options.model, pick_device(options.device))
    if not isinstance(generator, Generator):
        raise ValueError(f"{options.model} is a {generator.model_type} model, not a generator")
    check_generator(generator, scenes)  # before the classifier is trained
    tokenizer = load_tokenizer_of(generator, options.model, options.tokenizer, generator.device)
    lengths = token_lengths(options.num_tokens, tokenizer, generator.num_tokens)
    decoding = decoding_options(options)
    tokenizer.decode_options(decoding)  # before the classifier is trained
    probe = probe_for(scenes, spec, tokenizer, options)
    report = alignment(
        generator,
        tokenizer,
        probe,
        scenes,
        lengths,
        number,
        options.seed,
        decoding=decoding,
    )
    print(format_report(report))
    return {"model": options.model, "data": spec, **asdict(report)}


def check_probe_file(options: Align | Search) -> None:
    """Raise ValueError where --probe is neither a file nor can become one."""
    if options.probe and not Path(options.probe).is_file():
        check_writable(options.probe, "--probe")


def probe_for(
    scenes: EmojiScenes, spec: dict[str, Any], tokenizer: Tokenizer, options: Align | Search
) -> scene_probe.Probe:
    """The classifier that options.probe holds, else a trained one, which is kept there."""
    if options.probe and Path(options.probe).is_file():
        probe = scene_probe.Probe.load(options.probe).to(tokenizer.device)
        check_probe(probe, scenes, tokenizer.image_size)
        return probe
    prompts = "train" if scenes.prompts == "held_out" else "all"
    known: dict[str, Any] = {"split": "train", "prompts": prompts}
    if scenes.split == "train":  # others than those that it is to read
        known["seed"] = scenes.seed + 1
    probe = scene_probe.train_probe(
        make_dataset({**spec, **known}),
        tokenizer.image_size,
        options.probe_steps or PROBE_STEPS,
        device=tokenizer.device,
    )
    if options.probe:
        probe.save(options.probe)
    return probe


def print_report(report: dict[str, Any]) -> None:
    for result in report["results"]:
        groups = {group: result[group] for group in (PLAUSIBLE, FAITHFUL)}
        facts = {k: v for k, v in result.items() if k not in (*groups, "scores")}
        print(f"{facts.pop('num_tokens')} tokens, {facts.pop('count')} images")
        grouped = set().union(*groups.values())
        others = {k: v for k, v in result["scores"].items() if k not in grouped}
        for title, numbers in {"": facts, **groups, "others": others}.items():
            if title and numbers:
                print(f"  {title}")
            for name, value in numbers.items():
                if value is not None:
                    print(f"    {name:<45} {value:.6g}")
    if report["codes"]:
        codes = report["codes"]
        print(f"    {'codes used':<45} {codes['usage']:.6g} of {codes['vocab_size']}")
        print(f"  {'entropy (bits), all positions':<48}{codes['entropy_bits']:.6g}")
    run = report["run"]
    if run["peak_memory_mib"] is not None:
        print(f"peak memory {run['peak_memory_mib']:.0f} MiB, {run['seconds']:.1f} s")
    print_warnings(report)


def print_warnings(report: dict[str, Any]) -> None:
    for warning in report["warnings"]:
        print(f"note: {warning}")


def write_measured(
    report: dict[str, Any], model: Any, options: Measuring, output: Path
) -> dict[str, Any]:
    """report.json of a command that is not one of the passes, with what it was asked."""
    asked = {k: v for k, v in vars(options).items() if k not in ("dtype", "json")}
    document = {"settings": {**asked, **model_settings(model, model)}, **report}
    print(f"wrote {write_report(document, output)}")
    return document
