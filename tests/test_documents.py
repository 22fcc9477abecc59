"""What README, docs, help texts and notebooks tell people to type, read out of them and run."""

import argparse
import ast
import importlib.metadata
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from helpers.files import write_idx
from helpers.models import tiny_gpt, tiny_releases, tiny_tokenizer
from PIL import Image

from flextok import evaluation
from flextok.cli import common, main, make_parser
from flextok.cli.common import data_spec
from flextok.cli.training import run_train
from flextok.config import ExperimentConfig, load_experiment
from flextok.data import fashion_mnist
from flextok.data.sets import take
from flextok.evaluation import evaluators
from flextok.generators.conditioning import TEXT_ENCODERS
from flextok.pipeline import remember_tokenizer
from flextok.registry import MODELS, model_config
from flextok.schema import options_of
from flextok.training import plan
from flextok.training.optim import make_optimizer

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
LAUNCHERS = ("flextok", "python -m flextok.cli", "torchrun --nproc-per-node=[N0-9]+ -m flextok.cli")
# commands of others, and what only a shell needs
TAKEN_AS_THEY_ARE = (
    *("export ", "python3 -m venv", ". .venv/", "jq ", "hf ", "jupytext "),
    "python -m flextok.cli",  # a mention
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands(text: str) -> list[str]:
    """The single commands of a shell text: no comments, no pipes, lines joined."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        parts = shlex.shlex(line, posix=False, punctuation_chars="|&<>")
        parts.whitespace_split = True
        command: list[str] = []
        for part in [*parts, "|"]:
            if set(part) <= set("|&"):
                found.append(" ".join(command))
                command = []
            else:
                command.append(part)
    return [command for command in found if command]


DOCUMENTED = [
    (page.relative_to(ROOT).as_posix(), command)
    for page in PAGES
    for block in blocks(page, "bash")
    for command in commands(block)
]
DOCUMENTED += [  # "Launch:" of a config and the lines that it is continued on
    (path.relative_to(ROOT).as_posix(), command)
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    for launch in re.findall(r"^# Launch:((?:.*\\\n)*.*)", path.read_text("utf-8"), re.M)
    for command in commands(re.sub(r"<[^>]*>", "PLACE", re.sub(r"\n#| \(.*", "\n", launch)))
]
INLINE = [  # `flextok ...` in running text
    (page.relative_to(ROOT).as_posix(), command)
    for page in PAGES
    for command in re.findall(r"`((?:flextok|python|make) [^`\n]*)`", page.read_text("utf-8"))
    if not re.search(r"\.\.\.|\||<|[A-Z]{4}", command)
]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_documented_settings_are_right(page, tmp_path):
    """A YAML block is what changes a generator's config of which it names the model."""
    for number, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"base: {ROOT / 'configs/quickstart_generator.yaml'}\n{block}")
        config = load_experiment(path)
        stated = yaml.safe_load(block)["model"]
        assert config.model == {**config.model, **stated}
        model_config(MODELS, {**config.model, "vocab_size": 16, "num_tokens": 4})
        encoder = stated["conditioner"]["encoder"]
        assert {*encoder} <= {"name", *options_of(TEXT_ENCODERS[encoder["name"]])}


def test_every_block_is_checked():
    """Shell, Python and YAML are; what has no language is text."""
    for page in PAGES:
        languages = re.findall(r"^```(\w*)\n.*?^```$", page.read_text("utf-8"), re.M | re.S)
        assert set(languages) <= {"bash", "python", "yaml", ""}, page.name


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def arguments_of(command: str) -> list[str] | None:
    """What `flextok` gets from a command; None for another's command. Redirections are the
    shell's."""
    words = shlex.split(re.sub(r"\s[<>]\s*\S+", "", command))
    scripts = {"train.py": "train", "sample.py": "sample", "scripts/train.slurm": "train"}
    for script, name in scripts.items():
        if words[0] in ("python", "torchrun", "sbatch") and script in words:
            added = ["trainer.num_nodes=16"] if words[0] == "sbatch" else []  # by the script
            return [name, *words[words.index(script) + 1 :], *added]
    match = re.match("|".join(f"{launcher}(?= )" for launcher in LAUNCHERS), command)
    return words[len(match.group().split()) :] if match else None


def check_launch(command: str, config: ExperimentConfig, only_caches: bool) -> str:
    """Raise where torchrun starts other processes than the config states."""
    if "torchrun " in command and not only_caches:
        nodes, processes = (
            int(found[1]) if (found := re.search(rf"--{name}=(\d+)", command)) else 1
            for name in ("nnodes", "nproc-per-node")
        )
        assert nodes == config.trainer.num_nodes, command
        assert str(config.trainer.devices) in ("auto", str(processes)), command
    return config.output_dir


def check(command: str) -> None:
    """Raise unless the command is one that runs: its options parse, its files and extras are
    there."""
    arguments = arguments_of(command)
    if arguments is not None and len(arguments) == 1:  # a mention
        assert arguments[0] in subparsers(), f"no command {arguments[0]}"
    elif arguments is not None:
        options = make_parser().parse_args([a for a in arguments if a != "..."])
        if arguments[0] == "train" and not options.data:  # it trains, or says why not
            named = options.arguments
            options.arguments = [a if "=" in a else str(ROOT / a) for a in named]
            with patch("flextok.cli.training.train", partial(check_launch, command)):
                run_train(options)
        for name in (getattr(options, key, None) for key in ("data", "train")):
            if name and not re.search(r"/|\.npz|^SET$", name):
                data_spec(re.sub(r", \.\.\.", "", name))
    elif command.startswith("make"):
        for word in command.split()[1:]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert "=" in word or word in targets, f"make has no {word}"
    elif command.startswith("pip install"):
        for extra in re.findall(r"\[([\w,]+)\]", command):
            assert set(extra.split(",")) <= set(EXTRAS), command
    elif re.match(r"python \S+\.py", command):
        script, *flags = shlex.split(command)[1:]
        source = (ROOT / script).read_text()
        assert all(f in source for f in flags if f.startswith("--")), command
    else:
        assert command.startswith(TAKEN_AS_THEY_ARE), f"teach this test to check {command!r}"


@pytest.mark.parametrize(("page", "command"), [*DOCUMENTED, *INLINE])
def test_documented_commands_are_right(page, command):
    check(command)


def test_the_check_finds_mistakes():
    """The test above can fail: each of these is wrong."""
    for wrong in [
        "flextok sample model --no-such-option 1",
        "flextok nothing",
        "python train.py configs/nowhere.yaml",
        "python train.py configs/quickstart_tokenizer.yaml optim.learning_rate=1",
        "python train.py configs/emoji_32px.yaml configs/emoji.yaml output_dir=outputs/mine",
        "torchrun --nproc-per-node=8 train.py configs/flextok_d12_d12.yaml",
        "make nothing",
        "pip install 'flextok[nothing]'",
        "frobnicate",
    ]:
        with pytest.raises((SystemExit, ValueError, AssertionError)):
            check(wrong)
    assert len(DOCUMENTED) > 50


def test_documented_trainings_can_start():
    """One named parts of which Muon trains none, and its optimizer was refused."""
    built = 0
    for _, command in DOCUMENTED:
        arguments = arguments_of(command) or [""]
        configs = [a for a in arguments[1:] if a.startswith("configs/quickstart_generator")]
        if arguments[0] == "train" and configs:
            changes = [a for a in arguments[2:] if "=" in a]
            config = load_experiment(ROOT / configs[0], changes)
            make_optimizer(plan.build(config), config.optim)
            built += bool(config.start)
    assert built >= 2


@pytest.mark.parametrize("name", subparsers())
def test_help_teaches(name):
    parser = subparsers()[name]
    assert len(parser.description) > 60
    for action in parser._actions:
        assert action.help or action.metavar, f"flextok {name} {action.dest} has no help"
    examples = parser.epilog.removeprefix("examples:\n")
    parsed = [command for command in commands(examples) if arguments_of(command)]
    assert parsed, f"flextok {name} --help shows no example"
    for command in parsed:
        check(command)


# --- and really run, with tiny models in the quickstart's places ----------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder that looks like a user's after both quickstarts, and a package with tiny models."""
    folder = tmp_path_factory.mktemp("desk")
    tokenizer = tiny_tokenizer(num_registers=16, decode={"num_steps": 1, "guidance_scale": 1.0})
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 64}
    for name, conditioner in [
        ("quickstart", {"name": "class", "num_classes": 9}),
        ("quickstart_text", {"name": "text", "encoder": encoder}),
        ("train", {"name": "none"}),  # of flextok train --data
    ]:
        place = folder / "outputs" / name
        for part in ("tokenizer", "drawer"):
            tokenizer.save_pretrained(place / part)
        gpt = tiny_gpt(num_tokens=16, conditioner=conditioner)
        if name == "quickstart":
            gpt.metadata["class_names"] = ["heart", "flag", "face-smiling", *map(str, range(6))]
        remember_tokenizer(gpt, place / "generator", tokenizer, str(place / "tokenizer"))
        gpt.save_pretrained(place / "generator")
    tokenizer.save_pretrained(folder / "outputs/mine")
    tiny_releases(folder / "releases")
    (folder / "configs").symlink_to(ROOT / "configs")
    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    for file in ("holiday/1.png", "holiday/2.jpg", "pictures/train/1.png"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / file)
    for file in ("a.png", "b.jpg", "cat.jpg", "picture.jpg"):
        picture.save(folder / file)
    (folder / "prompts.txt").write_text("a red heart\na key\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flextok.places.RELEASES", folder / "releases")
        yield folder


SHORT = sorted(
    {
        command
        for _, command in DOCUMENTED
        if re.match(r"(flextok (info|reconstruct|sample)|python sample.py)\b", command)
        and "EPFL" not in command
        and "quickstart_titok" not in command  # make quickstart-titok runs it
        and " - " not in command
    }
)


@pytest.mark.parametrize("command", SHORT)
def test_short_commands_run(desk, monkeypatch, command):
    monkeypatch.chdir(desk)
    assert main(arguments_of(command)) == 0


# what measures, searches, tokenizes and writes models, and what each is given to be brief
BRIEFLY = {
    "evaluate": ["--limit", "4", "--networks"],
    "sweep": ["--limit", "8"],
    "adaptive": ["--limit", "4"],
    "probe": ["--limit", "40"],
    "align": ["--limit", "4", "--probe-steps", "2"],
    "search": ["--budget", "8", "--probe-steps", "2"],
    **{name: [] for name in ("convert", "plan", "tokenize")},
}
LONGER = sorted(
    {
        command
        for _, command in DOCUMENTED
        if (arguments_of(command) or [""])[0] in BRIEFLY
        # published weights, sets of others, and what stands for a reader's own: the check above
        and not re.search("EPFL|outputs/ar_|TOKENIZER|torchrun", command)
    }
)


@pytest.mark.parametrize("command", LONGER)
def test_longer_commands_run(desk, monkeypatch, command):
    """On few images and for few steps, with what else the page tells people to type."""
    monkeypatch.chdir(desk)
    make = common.make_dataset
    monkeypatch.setattr(common, "make_dataset", lambda spec: take(make(spec), 40))
    arguments = arguments_of(re.sub(r"--num-samples \d+|--limit \d+", "", command))
    few = ["--num-samples", "8"] if "--num-samples" in command else []
    assert main([*arguments, *few, *BRIEFLY[arguments[0]]]) == 0


def test_every_command_runs_somewhere():
    """Those that neither test above runs, each with what runs it in its place."""
    ran = {*SHORT, *LONGER}
    elsewhere = {
        "train": "test_training.py: a step of each config; test_recipe.py: --data",
        "demo": "test_demo_browser.py",
        "bench": "test_bench.py",
        "index": "test_cli.py",
        "reconstruct": "test_cli_reconstruct.py: a pipe",
        "sample": "make quickstart-titok",
        "info": "published weights: test_convert.py",
        "evaluate": "published weights, ImageNet: test_evaluate.py",
        "tokenize": "of WebDataset shards, by several processes: test_tokens.py",
        "convert": "published weights: test_convert.py",
    }
    left = {(arguments_of(c) or [""])[0] for _, c in DOCUMENTED if c not in ran} - {""}
    assert left == set(elsewhere)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_examples_run(desk, monkeypatch, page):
    """In order, as one session; of those that load published weights, the imports and the names."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(evaluators, "EVALUATORS", evaluators.EVALUATORS.copy())
    monkeypatch.setattr(evaluation, "EVALUATORS", evaluators.EVALUATORS)  # a page adds one
    session: dict[str, object] = {}
    for code in blocks(page, "python"):
        if "fit(" in code:
            continue  # test_fit.py runs it, with fewer steps
        if re.search(r"EPFL|yucornetto|fun-research", code):
            used = [line for line in ast.parse(code).body if isinstance(line, ast.ImportFrom)]
            exec(compile(ast.Module(used, []), page.name, "exec"), session)
            for name in re.findall(r"^(\w+)\.from_pretrained", code, re.M):
                assert callable(session[name].from_pretrained)
        else:
            exec(compile(code, page.name, "exec"), session)


def test_the_page_on_pypi_has_no_relative_address():
    """PyPI showed broken images, and links to its own pages."""
    page_of = runpy.run_path(str(ROOT / "setup.py"))["page_of"]
    readme = (ROOT / "README.md").read_text("utf-8")
    page = page_of(readme, "https://example.org/me/flextok/")
    paths = re.findall(r"https://example\.org/me/flextok/(?:raw|blob)/HEAD/([^)\s]+)", page)
    assert len(paths) > 20
    assert all((ROOT / path).exists() for path in paths)
    assert "](https://example.org/me/flextok/raw/HEAD/docs/pictures/seeds.png)" in page
    for text in (page, page_of(readme, None)):
        assert not re.search(r"\]\((?!https?:)", text)
    assert "each decoded four times from its first token |" in page_of(readme, None)
    assert "(https://arxiv.org/abs/2502.13967)" in page_of(readme, None)


def test_the_figures_of_readme_are_those_of_the_card():
    """README repeats some of the model card's numbers, for its table of models."""
    card = (ROOT / "docs/model_card.md").read_text("utf-8")
    rows = re.findall(r"^\| `emoji.*", (ROOT / "README.md").read_text("utf-8"), re.M)
    found = 0
    for row in rows:
        for number, percent in re.findall(r"(\d+\.\d+|\d+(?= %))( %)?", row):
            stated = f"{int(number) / 100:.2f}" if percent else number
            assert re.search(rf"(?<![\d.]){re.escape(stated)}(?![\d])", card), (number, row)
            found += 1
    assert found >= 14


def test_no_fact_stands_twice():
    """No eight words in a row stand in two pages of docs, but for code and what is said of images;
    the front page may repeat README."""
    page_of: dict[str, Path] = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```|!\[.*?\]\(.*?\)", " ~ ", page.read_text("utf-8"), flags=re.S)
        words = re.findall(r"[\w%]+|[~|]", re.sub(r"\]\(.*?\)", "]", text).lower())
        for i in range(len(words) - 7 if page.name != "index.md" else 0):
            run = " ".join(words[i : i + 8])
            if not re.search("[~|]", run):
                assert page_of.setdefault(run, page) == page, (run, page_of[run].name, page.name)
    assert len(page_of) > 5000


def test_notebooks_are_paired():
    """Each notebook holds the cells of the .py beside it."""
    jupytext = pytest.importorskip("jupytext")
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 7
    for path in notebooks:
        cells, script = (
            [(cell.cell_type, cell.source) for cell in jupytext.read(p).cells]
            for p in (path, path.with_suffix(".py"))
        )
        assert cells == script, f"{path.name}: run jupytext --sync notebooks/*.ipynb"


def code_cells(notebook: str, changes: dict[str, str]) -> list[str]:
    """The code cells of a notebook, with other values in place of some; `display` is not imported,
    so that a test may give its own."""
    script = (ROOT / f"notebooks/{notebook}.py").read_text("utf-8")
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    cells = script.replace("from IPython.display import display\n", "").split("# %%")[1:]
    return [cell for cell in cells if "[markdown]" not in cell.partition("\n")[0]]


def test_the_training_notebook_writes_nothing_into_a_users_folder(tmp_path, monkeypatch):
    """It made the folder, and wrote 256 emoji into it."""
    own = tmp_path / "it's a #1 folder = x, y"
    own.mkdir()
    Image.linear_gradient("L").convert("RGB").save(own / "mine.png")
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path / "work"))
    asked = []
    monkeypatch.setattr("flextok.training.run.train", lambda experiment: asked.append(experiment))
    monkeypatch.chdir(ROOT / "notebooks")
    cells = code_cells("train_your_own", {"ROOT = None": f"ROOT = {str(own)!r}"})
    session: dict[str, object] = {"display": lambda image: None}
    for cell in cells[:2]:  # up to the training
        exec(cell, session)
    assert [path.name for path in own.iterdir()] == ["mine.png"]
    assert asked[0].data.train == {"name": "folder", "root": str(own)}
    assert str(own) not in asked[0].output_dir


@pytest.mark.parametrize("here", [True, False])
def test_the_papers_figures_are_drawn_with_and_without_the_models(
    tmp_path, monkeypatch, capsys, here
):
    """From tiny models and a twin of the data set; without them, the stored figures are shown, and
    a sentence names what is missing."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    if here:
        write_idx(tmp_path / "data", {"train": 10, "test": 20})
        tokenizer = tiny_tokenizer(image_size=28, num_registers=32, decode={"num_steps": 1})
        tokenizer.save_pretrained(tmp_path / "runs/flextok/seed-0")
        gpt = tiny_gpt(num_tokens=32, conditioner={"name": "class", "num_classes": 10})
        gpt.metadata["class_names"] = list(fashion_mnist.FashionMNIST.class_names)
        gpt.save_pretrained(tmp_path / "runs/gpt_class/seed-0")
    changes = {
        'ROOT = "../data"': f'ROOT = "{tmp_path / "data"}"',
        'Path("../outputs/paper/full")': f'Path("{tmp_path / "runs"}")',
    }
    monkeypatch.chdir(ROOT / "notebooks")
    drawn: list[Image.Image] = []
    session: dict[str, object] = {"display": drawn.append}
    for cell in code_cells("paper_figures", changes):
        exec(cell, session)
    assert len(drawn) == 6
    assert all(len(set(image.convert("L").tobytes())) > 10 for image in drawn)  # none is blank
    printed = " ".join(capsys.readouterr().out.split())
    assert ("dataset-fashion-mnist" in printed) != here


@pytest.mark.slow
def test_docs_build_without_a_warning_and_ask_nobody(tmp_path):
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api/tokenizers/index.html").read_text()
    assert "any 1 &lt;= k &lt;= K" in page  # FlexTok.decode's docstring
    for path in tmp_path.rglob("*.html"):
        loads = re.findall(
            r'<(?:script|img|iframe)[^>]*src="([^"]+)"|<link[^>]*href="([^"]+)"', path.read_text()
        )
        strangers = [x for pair in loads for x in pair if x.startswith(("http", "//"))]
        assert not strangers, f"{path.name} loads {strangers}"


@pytest.mark.slow
def test_the_wheel_works_away_from_the_repository(tmp_path, desk):
    """Built and unpacked into an empty environment that borrows only the dependencies, with tiny
    models in it; scripts/check_package.sh installs all, and serves the page."""
    pytest.importorskip("build")
    source = tmp_path / "source"
    source.mkdir()
    tracked = ("flextok", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    for name in tracked:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    shutil.rmtree(source / "flextok/releases", ignore_errors=True)
    tiny_releases(source / "flextok/releases")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    env = tmp_path / "env"
    shutil.unpack_archive(wheel, env, "zip")
    environment = {**os.environ, "PYTHONPATH": str(env)}
    for arguments in (
        ["info", "emoji"],
        ["reconstruct", "picture.jpg"],
        ["sample", "--classes", "heart"],
    ):
        code = (
            "import flextok, sys; from flextok.cli import main; "
            f"assert flextok.__file__.startswith({str(env)!r}); sys.exit(main({arguments!r}))"
        )
        subprocess.run([sys.executable, "-c", code], cwd=desk, env=environment, check=True)
    assert (env / "flextok/py.typed").is_file()
    for shard in ("emoji-64.tar", "emoji-styles-64.tar"):
        assert (env / "flextok/emoji/assets" / shard).is_file()
    page = importlib.metadata.PathDistribution(next(env.glob("*.dist-info"))).metadata
    assert page["Description-Content-Type"] == "text/markdown"
    assert "# FlexTok" in page.get_payload()
    assert not re.search(r"\]\((?!https?:)", page.get_payload())
