"""Workers of data loaders: how they start, what they ignore, and how their end is told."""

import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import yaml
from helpers.files import CATS_AND_DOGS, draw_pictures, write_shard
from helpers.models import TINY, tiny_tokenizer
from helpers.processes import finish, start
from helpers.runs import SIX_STEPS
from torch.utils.data import Dataset

import flextok
from flextok.cli import interruptible_imports
from flextok.config import load_experiment
from flextok.data.augmentation import Augmentation
from flextok.data.datamodule import Shares
from flextok.data.datasets import ImageFolder, PictureFiles
from flextok.data.loading import SIGNALS, WorkerDied, failures_in_one_line, make_loader
from flextok.data.stream import EvaluationSet, Stream, collate
from flextok.data.tokens import TokenDataset, build_token_cache, cache_identity
from flextok.data.transforms import ImageTransform
from flextok.data.web import WebDatasetImages, WebDatasetStream
from flextok.emoji.datasets import Emoji
from flextok.emoji.scenes import EmojiScenes
from flextok.training.checkpoints import list_checkpoints
from flextok.training.run import train


def config(folder, **trainer) -> Path:
    draw_pictures(folder / "pictures", CATS_AND_DOGS)
    data = {"name": "folder", "root": str(folder / "pictures")}
    spec = {
        "task": "tokenizer",
        "output_dir": str(folder / "run"),
        "model": {"name": "flextok", **TINY, "decode": {"num_steps": 1, "guidance_scale": 1.0}},
        "data": {"train": data, "validation": data, "batch_size": 3, "num_workers": 1},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "trainer": {**SIX_STEPS, "num_pictures": 1, **trainer},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def start_python(code: str, *arguments, **options) -> subprocess.Popen:
    path = {"PYTHONPATH": str(Path(flextok.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run_python(code: str, *arguments) -> tuple[int, str]:
    process = start_python(code, *arguments)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


SPAWNED = """
import multiprocessing, sys
from flextok.cli import main
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
def test_an_epoch_under_spawn_ends_as_one_without_workers(tmp_path):
    path = config(tmp_path, max_steps=2, validate_every=2)  # two batches of three are an epoch
    code, output = run_python(SPAWNED, path)
    assert code == 0, output
    alone = [f"output_dir={tmp_path / 'alone'}", "data.num_workers=0"]
    train(load_experiment(path, alone))
    files = [tmp_path / name / "model.safetensors" for name in ("run", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()


def spawned(dataset):
    """As a worker that was spawned gets it."""
    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(dataset)
    return pickle.loads(buffer.getvalue())


@pytest.fixture
def spawning(monkeypatch):
    """What a process allows while it spawns another, and the default way to start one."""
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr("flextok.data.stream.Value", context.Value)
    monkeypatch.setattr("multiprocessing.context._tls.spawning_popen", object(), raising=False)


def every_dataset(folder):
    draw_pictures(folder / "pictures", CATS_AND_DOGS)
    picture = (folder / "pictures" / CATS_AND_DOGS[0]).read_bytes()
    sample = {"png": picture, "cls": b"1", "txt": b"a cat"}
    members = {f"{i}.{kind}": data for i in range(4) for kind, data in sample.items()}
    shard = write_shard(folder / "a.tar", members)
    stream = WebDatasetStream(shard, class_names=2)
    stream[0]  # with a shard open
    return {
        "folder": ImageFolder(folder / "pictures"),
        "files": PictureFiles([folder / "pictures"]),
        "emoji": Emoji(split="validation"),
        "scenes": EmojiScenes(split="validation"),
        "webdataset": WebDatasetImages(shard),
        "stream": stream,
    }


@pytest.mark.parametrize("name", ["folder", "files", "emoji", "scenes", "webdataset", "stream"])
def test_every_data_set_reaches_a_spawned_worker(tmp_path, name):
    dataset = every_dataset(tmp_path)[name]
    prepare = ImageTransform(16, Augmentation(flip=True)).prepare
    evaluation = EvaluationSet(dataset, prepare)
    evaluation.skips = stream_skips = None  # a shared counter travels at a process's start only
    item = spawned(Shares(evaluation))[1][0]
    assert torch.equal(item["image"], evaluation[1]["image"])
    stream = Stream(dataset, prepare)
    stream.skips = stream_skips
    assert torch.equal(spawned(stream)[5]["image"], stream[5]["image"])


def test_tokens_are_mapped_by_each_worker_itself(tmp_path):
    """Their content does not travel, nor is it checked again."""
    draw_pictures(tmp_path / "pictures", CATS_AND_DOGS)
    tokenizer, dataset = tiny_tokenizer(), ImageFolder(tmp_path / "pictures")
    transform = ImageTransform(16)
    identity = cache_identity(tokenizer, {"name": "folder"})
    build_token_cache(tmp_path / "tokens", tokenizer, dataset, transform, identity)
    tokens = TokenDataset(tmp_path / "tokens")
    assert len(tokens.captions) == 6
    tokens.text = {caption: torch.ones(2) for caption in tokens.captions}
    again = spawned(tokens)
    assert len(tokens[0]["indices"]) == 8  # mapped in this process
    assert not again.indices._kept
    assert "captions" not in again.__dict__
    for i in range(6):
        assert torch.equal(again[i]["indices"], tokens[i]["indices"])
        assert torch.equal(again[i]["text"], tokens[i]["text"])


UNFINISHED = """
from flextok.data.loading import make_loader
batches = iter(make_loader(list(range(100)), 1))
next(batches)
raise SystemError("a bug")
"""


def test_an_error_ends_the_program_whose_workers_are_at_work():
    """Workers ignore SIGTERM, so that Python waited for them for ever."""
    found = subprocess.run(
        [sys.executable, "-c", UNFINISHED], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 1
    assert "SystemError: a bug" in found.stderr


IMPORTS = """
import signal, sys, os, pkgutil, importlib
for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
known = {name: value for name, value in signal.Signals.__members__.items()
         if name in ("SIGINT", "SIGTERM", "SIGABRT")}
class Signals(int):
    __members__ = known
    def __class_getitem__(cls, name):
        return known[name]
import torch.distributed.checkpoint, lightning.pytorch, timm, diffusers, transformers, psutil
import huggingface_hub.hf_file_system
signal.Signals = Signals
for name in ("resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("fork", "getuid"):
    delattr(os, name)
import flextok
for module in pkgutil.walk_packages(flextok.__path__, "flextok."):
    if not module.name.startswith("flextok.demo") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from flextok.data.loading import SIGNALS
print(sorted(SIGNALS) == sorted([known["SIGINT"], known["SIGTERM"]]))
"""


@pytest.mark.slow
def test_the_package_imports_without_what_only_posix_has():
    code, output = run_python(IMPORTS)
    assert (code, output.split()[-1:]) == (0, ["True"]), output


class Deadly(Dataset):
    """Its reader is killed at one sample, or raises at another."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 7:
            raise ValueError("none of the 8 samples can be read")
        return {"index": index}


def test_the_end_of_a_killed_worker_is_one_line():
    loader = make_loader(Deadly(), 1, batch_size=1, collate_fn=collate)
    with pytest.raises(WorkerDied) as told, failures_in_one_line():
        list(loader)
    assert "killed by signal: Killed" in str(told.value) or "exited" in str(told.value)
    assert "take fewer workers or smaller batches" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_workers_mistake_of_a_user_loses_the_workers_traceback():
    loader = make_loader(Deadly(), 1, sampler=[7], collate_fn=collate)
    with (
        pytest.raises(ValueError, match=r"^none of the 8 samples can be read$"),
        failures_in_one_line(),
    ):
        list(loader)


def test_other_errors_keep_theirs():
    for error in (RuntimeError("a bug"), ValueError("a mistake")):
        with pytest.raises(type(error)) as told, failures_in_one_line():
            raise error
        assert told.value is error


class Ignores(Dataset):
    def __getitem__(self, index):
        return [signal.getsignal(signum) == signal.SIG_IGN for signum in SIGNALS]


def test_workers_ignore_signals_to_stop():
    assert {s.name for s in SIGNALS} >= {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"}
    loader = make_loader(Ignores(), 1, sampler=[0], collate_fn=list)
    assert list(loader) == [[[True] * len(SIGNALS)]]


def test_every_loader_is_made_so():
    sources = Path(flextok.__file__).parent.rglob("*.py")
    makers = {p.name for p in sources if "DataLoader(" in p.read_text("utf-8")}
    assert makers <= {"loading.py", "sample.py"}  # the latter's has no workers


SLOW = """
import sys, time
from flextok.objectives import FlowObjective
plain = FlowObjective.forward
def forward(self, *arguments, **options):
    if self.training:
        print("a step", flush=True)
        time.sleep(1.5)
    return plain(self, *arguments, **options)
FlowObjective.forward = forward
from flextok.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_signal_to_the_whole_group_saves_even_when_steps_are_slow(tmp_path, name):
    """As docker stop and scancel send it, workers of the data loader included; twice, as torchrun
    passes it on once more."""
    path = config(tmp_path, max_steps=50, validate_every=50, checkpoint_every=50)
    process = start_python(SLOW, path, "data.num_workers=2", start_new_session=True)
    for line in process.stdout:
        if line.rstrip().endswith("a step"):
            break
    time.sleep(0.2)
    number = getattr(signal, name)
    for _ in range(2):
        os.killpg(process.pid, number)
        time.sleep(0.2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"{name}: stopping after step 1; until then nothing is saved yet" in output
    assert f"flextok: {name}: stopped after step 1, saved; run the same command" in output
    assert set(list_checkpoints(tmp_path / "run" / "checkpoints")) == {1}


def test_an_ignored_hangup_stays_ignored(tmp_path):
    """nohup starts a command so."""
    path = config(tmp_path, max_steps=2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from flextok.training.saving import Checkpoints, catch

        caught = catch(Checkpoints(path.parent, 1).receive)
        assert signal.SIGHUP not in caught
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for signum, handler in caught.items():
            signal.signal(signum, handler)
    finally:
        signal.signal(signal.SIGHUP, before)


INTERRUPTED = """
import os, signal, sys
from flextok.cli import interruptible_imports
with interruptible_imports():
    try:
        import swallows
    except KeyboardInterrupt:
        sys.exit(9)
print("went on")
"""


def test_an_interrupt_inside_an_import_ends_the_process(tmp_path):
    """Libraries catch it there, or are left half imported."""
    (tmp_path / "swallows.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    pass\n"
    )
    code, output = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + INTERRUPTED)
    assert (code, "went on" in output) == (130, False), output
    assert "flextok: interrupted" in output


def test_an_interrupt_elsewhere_is_pythons_own():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible_imports():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: interruptible_imports().__enter__())
    thread.start()  # of a notebook's server, where signals are not ours
    thread.join()


@pytest.mark.slow
def test_a_killed_worker_ends_tokenize_in_one_line(tmp_path):
    draw_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(40)])
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ["tokenize", tmp_path / "model", tmp_path / "pictures", tmp_path / "tokens"]
    log = tmp_path / "log"
    code = (
        "import os, signal, sys\nfrom flextok.data.datasets import ImageFolder\n"
        "plain = ImageFolder.__getitem__\n"
        "def item(self, i):\n"
        "    if i == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(self, i)\n"
        "ImageFolder.__getitem__ = item\n"
        "from flextok.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    code, output = run_python(code, *command, "--batch-size", 4, "--num-workers", 1)
    assert code == 1, output
    assert "Traceback" not in output
    assert "flextok: DataLoader worker" in output
    assert finish(start(command, log)) == [0], log.read_text()
