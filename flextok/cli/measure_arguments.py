"""What evaluate, sweep, adaptive and probe take; measure.py does their work."""

import argparse

from flextok.cli.options import Commands, add_command, add_solving

SHARED = ("--limit", "--seed", "--batch-size", "--num-workers", "--device", "--json")
OWN_DATA = "default: what the model was validated on"


def add_measuring(commands: Commands) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        "measure.run_evaluate",
        "FID, inception score, KID, precision, PSNR, SSIM, LPIPS, sharpness, code usage",
        "A tokenizer reconstructs DATA; a generator is compared with DATA. Writes report.json. "
        "Several processes: torchrun --nproc-per-node=N -m flextok.cli evaluate ...",
        "flextok evaluate emoji emoji:validation\n"
        "flextok evaluate emoji-class emoji:train --num-samples 960",
        *("--tokenizer", *SHARED),
    )
    evaluate.add_argument("model", help="folder or hub id of a tokenizer or a generator")
    evaluate.add_argument(
        "data",
        help="emoji:validation, emoji_scenes:train or a picture folder; for a generator also an "
        "ADM reference .npz",
    )
    evaluate.add_argument("--num-tokens", type=int, nargs="+", help="default: all")
    evaluate.add_argument("--num-samples", type=int, help="generator: how many images")
    evaluate.add_argument(
        "--labels",
        choices=("balanced", "data"),
        default="balanced",
        help="generator: all classes alike, or as often as in DATA",
    )
    evaluate.add_argument("--reference", metavar="NPZ", help="tokenizer: also compare with this")
    evaluate.add_argument("--save-reference", metavar="NPZ", help="write DATA's statistics")
    add_solving(evaluate)
    add_networks(evaluate, "inception and lpips, or what is at hand")
    add_output(evaluate, "evaluation")

    sweep = add_command(
        commands,
        "sweep",
        "measure.run_sweep",
        "reconstruction quality against the number of tokens, steps and guidance",
        "Prints a table and writes report.json, sweep.csv, tokens.png, bits.png, "
        "time.png, strips.png and variance.png.",
        "flextok sweep emoji --data emoji:validation --steps 1 4",
        *("--num-tokens", *SHARED),
    )
    sweep.add_argument("model", help="folder or hub id of a tokenizer")
    sweep.add_argument("--data", metavar="SET", help=f"as for evaluate; {OWN_DATA}")
    sweep.add_argument("--num-pictures", type=int, default=6, help="in the strips and the map")
    add_solving(sweep, several=True)
    add_networks(sweep, "none").set_defaults(networks=())
    add_output(sweep, "sweep")

    adaptive = add_command(
        commands,
        "adaptive",
        "measure.run_adaptive",
        "how many tokens each image needs to meet a target, and whether complexity shows",
        "Finds the shortest prefix that meets the target, image by image, and tests by rank "
        "correlation whether images of more objects need more, where labels count them.",
        "flextok adaptive emoji --target psnr=18 --limit 64",
        *SHARED,
    )
    adaptive.add_argument("model", help="folder or hub id of a tokenizer that decodes prefixes")
    adaptive.add_argument(
        "--data",
        metavar="SET",
        help=f"as for evaluate; {OWN_DATA}, emoji scenes for the package's own models",
    )
    adaptive.add_argument("--target", required=True, help="psnr=20, ssim=, lpips=0.3, ...")
    add_solving(adaptive)
    add_output(adaptive, "adaptive")

    probe = add_command(
        commands,
        "probe",
        "measure.run_probe",
        "class accuracy of a linear probe on the first 1, 2, 4, ... codes",
        "Trains a linear classifier on the codes of labelled images and tests it on others: "
        "how well the first codes predict the class.",
        "flextok probe emoji --train emoji:train --data emoji:validation",
        *("--num-tokens", *SHARED),
    )
    probe.add_argument("model", help="folder or hub id of a tokenizer")
    probe.add_argument(
        "--train", metavar="SET", help="labelled images; default: those the model was trained on"
    )
    probe.add_argument("--data", metavar="SET", help=f"to test on; {OWN_DATA}")
    add_output(probe, "probe")


def add_networks(parser: argparse.ArgumentParser, default: str) -> argparse.ArgumentParser:
    parser.add_argument(
        "--networks",
        nargs="*",
        help=f"inception (FID), efficientnet_lite0 (offline, no FID), lpips; default: {default}",
    )
    parser.add_argument("--inception-weights", metavar="FILE", help="default: torch's cache")
    return parser


def add_output(parser: argparse.ArgumentParser, folder: str) -> None:
    """folder: where the command writes by default, below outputs/."""
    parser.set_defaults(folder=folder)
    parser.add_argument(
        "--output", help=f"folder to write; default: outputs/{folder}/ and the model's name"
    )
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        help="float64 gives the same numbers for any batch size: the default on a CPU; on a GPU "
        "float32",
    )
