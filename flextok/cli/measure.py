"""`flextok evaluate | sweep | adaptive | probe`: the commands that measure."""

import argparse
import os
from pathlib import Path
from typing import Any

from flextok.cli.common import data_of, open_data, output_of, pick_device, token_lengths
from flextok.cli.options import Commands, add_command, add_json, add_solving, decoding_options

OWN_DATA = "default: what the model was validated on"


def add_commands(commands: Commands) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        run_evaluate,
        "FID, inception score, KID, precision, PSNR, SSIM, LPIPS, code usage",
        "A tokenizer reconstructs DATA; a generator is compared with DATA. Writes report.json. "
        "Several processes: torchrun --nproc-per-node=N -m flextok.cli evaluate ...",
        "flextok evaluate emoji emoji:validation\n"
        "flextok evaluate emoji-class emoji:train --num-samples 960",
    )
    evaluate.add_argument("model", help="folder or hub id of a tokenizer or a generator")
    evaluate.add_argument(
        "data",
        help="emoji:validation, emoji_scenes:train or a picture folder; for a generator also an "
        "ADM reference .npz",
    )
    evaluate.add_argument("--tokenizer", help="generator: another place to find its tokenizer")
    evaluate.add_argument("--num-tokens", type=int, nargs="+", help="default: all")
    evaluate.add_argument("--num-samples", type=int, help="generator: how many pictures")
    evaluate.add_argument(
        "--labels",
        choices=("balanced", "data"),
        default="balanced",
        help="generator: all classes alike, or as often as in DATA",
    )
    evaluate.add_argument("--reference", metavar="NPZ", help="tokenizer: also compare with this")
    evaluate.add_argument("--save-reference", metavar="NPZ", help="write DATA's statistics")
    add_solving(evaluate)
    add_networks(evaluate, None)
    add_measuring(evaluate, "evaluation")

    sweep = add_command(
        commands,
        "sweep",
        run_sweep,
        "reconstruction quality against the number of tokens, steps and guidance",
        "Prints a table and writes report.json, sweep.csv, tokens.png, bits.png, "
        "time.png, strips.png and variance.png.",
        "flextok sweep emoji --data emoji:validation --steps 1 4",
    )
    sweep.add_argument("model", help="folder or hub id of a tokenizer")
    sweep.add_argument("--data", metavar="SET", help=f"as for evaluate; {OWN_DATA}")
    sweep.add_argument("--num-tokens", type=int, nargs="+", help="default 1 2 4 ... all")
    sweep.add_argument("--num-pictures", type=int, default=6, help="in the strips and the map")
    add_solving(sweep, several=True)
    add_networks(sweep, ())
    add_measuring(sweep, "sweep")

    adaptive = add_command(
        commands,
        "adaptive",
        run_adaptive,
        "how many tokens each picture needs to meet a target, and whether complexity shows",
        "Finds the shortest prefix that meets the target, picture by picture, and tests by rank "
        "correlation whether pictures of more objects need more, where labels count them.",
        "flextok adaptive emoji --target psnr=18 --limit 64",
    )
    adaptive.add_argument("model", help="folder or hub id of a tokenizer that decodes prefixes")
    adaptive.add_argument(
        "--data",
        metavar="SET",
        help=f"as for evaluate; {OWN_DATA}, emoji scenes for the package's own models",
    )
    adaptive.add_argument("--target", required=True, help="psnr=20, ssim=, lpips=0.3, ...")
    add_solving(adaptive)
    add_measuring(adaptive, "adaptive")

    probe = add_command(
        commands,
        "probe",
        run_probe,
        "class accuracy of a linear probe on the first 1, 2, 4, ... codes",
        "Trains a linear classifier on the codes of labelled pictures and tests it on others: "
        "what the first codes know of the class.",
        "flextok probe emoji --train emoji:train --data emoji:validation",
    )
    probe.add_argument("model", help="folder or hub id of a tokenizer")
    probe.add_argument(
        "--train", metavar="SET", help="labelled images; default: those the model was trained on"
    )
    probe.add_argument("--data", metavar="SET", help=f"to test on; {OWN_DATA}")
    probe.add_argument("--num-tokens", type=int, nargs="+", help="default 1 2 4 ... all")
    add_measuring(probe, "probe")


def add_networks(parser: argparse.ArgumentParser, default: tuple[()] | None) -> None:
    parser.add_argument(
        "--networks",
        nargs="*",
        default=default,
        help="inception (FID), efficientnet_lite0 (offline, no FID), lpips; default: "
        + ("inception and lpips, or what is at hand" if default is None else "none"),
    )
    parser.add_argument("--inception-weights", metavar="FILE", help="default: torch's cache")


def add_measuring(parser: argparse.ArgumentParser, folder: str) -> None:
    """Options of all four; folder: where the command writes by default, below outputs/."""
    add_json(parser)
    parser.add_argument(
        "--output", help=f"folder to write; default: outputs/{folder}/ and the model's name"
    )
    parser.set_defaults(folder=folder)
    parser.add_argument("--limit", type=int, help="take this many pictures, evenly spread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        help="float64 gives the same numbers for any batch size: the default on a CPU; on a GPU "
        "float32",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; a GPU where there is one")


def prepare_output(options: argparse.Namespace) -> None:
    """Set options.output, the folder to write, and find it fit before the work."""
    from flextok.evaluation.report import check_output

    options.output = output_of(options.output, options.folder, options.model)
    check_output(Path(options.output))


def run_evaluate(options: argparse.Namespace) -> dict[str, Any] | None:
    from flextok.data.datasets import take
    from flextok.evaluation import Cell, evaluate, processes
    from flextok.pipeline import is_generator, load_tokenizer_of

    settings = measuring_options(
        options,
        num_samples=options.num_samples,
        labels=options.labels,
        reference=options.reference,
        save_reference=options.save_reference,
    )
    names = {"model": options.model, "data": options.data}
    prepare_output(options)
    with processes.joined():
        model, tokenizer = load_for_measuring(options), None
        stored = options.data.endswith(".npz")
        data = options.data if stored else take(open_data(options.data), options.limit)
        if is_generator(model):
            place = (model, options.model, options.tokenizer)
            tokenizer = load_tokenizer_of(*place, model.device).to(next(model.parameters()).dtype)
        cells = [
            Cell(k, options.steps, options.guidance_scale)
            for k in options.num_tokens or [model.num_tokens]
        ]
        report = evaluate(model, data, cells, settings, options.output, names, tokenizer)
        if processes.rank() != 0:
            return None
        print_report(report)
        print(f"wrote {Path(options.output) / 'report.json'}")
        return report


def run_sweep(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.data.datasets import take
    from flextok.evaluation.sweep import format_table, sweep

    prepare_output(options)
    data = data_of(options.data, options.model)
    model = load_for_measuring(options)
    report = sweep(
        model,
        take(data, options.limit),
        measuring_options(options),
        options.output,
        token_lengths(options.num_tokens, model, model.num_tokens),
        options.steps,
        options.guidance_scale,
        options.num_pictures,
        names={"model": options.model, "data": options.data or "the model's own validation data"},
    )
    print(format_table(report))
    print_warnings(report)
    print(f"wrote {options.output}")
    return report


def run_adaptive(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.data.datasets import take
    from flextok.evaluation.adaptive import Target, relate
    from flextok.places import released

    target = Target.parse(options.target)
    prepare_output(options)
    if options.data is None and options.model in released():
        options.data = "emoji_scenes:validation"
    data = take(data_of(options.data, options.model), options.limit or 256)
    model = load_for_measuring(options)
    report = relate(model, data, target, measuring_options(options))
    if (found := report["complexity"]) is not None:
        print("label  pictures  mean tokens  target met")
        for label, row in found["by_label"].items():
            print(f"{label:>5}  {row['count']:8d}  {row['mean_tokens']:11.2f}  {row['met']:10.2f}")
        control = found["shuffled"]
        print(
            f"Spearman of length and label: {found['spearman']:+.3f}; with shuffled labels "
            f"{control['first']:+.3f} ({control['mean']:+.3f} +- {control['std']:.3f} over "
            f"{control['shuffles']}), p = {control['p_value']:.2g}"
        )
    print(
        f"{report['count']} pictures, {report['met']} meet {report['target']}; "
        f"{report['mean_tokens']:.1f} tokens each, at most {report['decodes_per_picture']} decodes"
    )
    return write_measured(report, model, options)


def run_probe(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.data.datasets import take
    from flextok.evaluation.probe import format_table, linear_probe

    prepare_output(options)
    train = take(data_of(options.train, options.model, "train"), options.limit)
    test = take(data_of(options.data, options.model), options.limit)
    model = load_for_measuring(options)
    lengths = token_lengths(options.num_tokens, model, model.num_tokens)
    report = linear_probe(model, train, test, measuring_options(options), lengths)
    print(format_table(report))
    return write_measured(report, model, options)


def load_for_measuring(options: argparse.Namespace) -> Any:
    """The model on its device and in its precision."""
    import torch

    from flextok.pipeline import load_model

    device = pick_device(options.device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = options.dtype or ("float64" if device == "cpu" else "float32")
    return load_model(options.model, device).to(getattr(torch, dtype))


def measuring_options(options: argparse.Namespace, **more: Any) -> Any:
    from flextok.evaluation import Options

    if options.folder in ("evaluation", "sweep"):
        more["networks"] = None if options.networks is None else tuple(options.networks)
        more["inception_weights"] = options.inception_weights
    if options.folder != "probe":  # of cells, where there are several steps and scales
        several = () if options.folder == "adaptive" else ("num_steps", "guidance_scale")
        asked = decoding_options(options)
        more["decoding"] = {k: v for k, v in asked.items() if k not in several}
    return Options(
        seed=options.seed,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        **more,
    )


def print_report(report: dict[str, Any]) -> None:
    for result in report["results"]:
        facts = {k: v for k, v in result.items() if k != "scores"}
        print(f"{facts['num_tokens']} tokens, {facts['count']} images")
        for name, value in {**facts, **result["scores"]}.items():
            if name not in ("num_tokens", "count") and value is not None:
                print(f"  {name:<48}{value:.6g}")
    if report["codes"]:
        codes = report["codes"]
        print(f"  {'codes used':<48}{codes['usage']:.6g} of {codes['vocab_size']}")
        print(f"  {'entropy (bits), all positions':<48}{codes['entropy_bits']:.6g}")
    run = report["run"]
    if run["peak_memory_mib"] is not None:
        print(f"peak memory {run['peak_memory_mib']:.0f} MiB, {run['seconds']:.1f} s")
    print_warnings(report)


def print_warnings(report: dict[str, Any]) -> None:
    for warning in report["warnings"]:
        print(f"note: {warning}")


def write_measured(
    report: dict[str, Any], model: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """report.json of a command that is not one of the passes, with what it was asked."""
    from flextok.evaluation.job import model_settings
    from flextok.evaluation.report import write_report

    asked = {k: v for k, v in vars(options).items() if k not in ("run", "dtype", "json", "folder")}
    document = {"settings": {**asked, **model_settings(model, model)}, **report}
    print(f"wrote {write_report(document, Path(options.output))}")
    return document
