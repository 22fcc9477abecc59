"""Two processes do what one does: DDP and sharded training over gloo on the CPU."""

import json

import pytest
import torch
import yaml
from processes import finish, start_ranks
from test_reliability import same
from test_training import generator_yaml, logged_losses, tokenizer_yaml, weights

from flextok.config import load_experiment
from flextok.pipeline import load_model
from flextok.training.checkpoints import find_checkpoint, list_checkpoints, verify
from flextok.training.run import train

STEPS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Configs of a tokenizer and a generator of 20 steps, the tokenizer trained with batches of
    2 x 4, and the tokens cached."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("distributed")
    draws = torch.Generator().manual_seed(0)
    (folder / "pictures").mkdir()
    for i in range(12):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=draws, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{i:02d}.png")
    options = {"max_steps": STEPS, "checkpoint_every": 8, "validate_every": 10, "num_pictures": 1}
    paths = [tokenizer_yaml(folder, folder / "pictures", **options)]
    paths.append(generator_yaml(folder, folder / "pictures"))
    for path in paths:
        spec = yaml.safe_load(path.read_text())
        spec["trainer"] |= options
        spec["data"]["token_cache"] = str(folder / "tokens")
        path.write_text(yaml.safe_dump(spec))
    train(load_experiment(paths[0], ["trainer.accumulate=2"]))
    return folder


def run(place, config, output, *overrides, processes=2):
    command = ["train", place / config, f"output_dir={output}", f"trainer.devices={processes}"]
    log = output.with_suffix(".log")
    codes = finish(*start_ranks(processes, [*command, *overrides], log))
    text = "\n".join(p.read_text()[-3000:] for p in sorted(output.parent.glob("*.log")))
    assert codes == [0] * processes, text
    return output


def distance(a, b) -> float:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.slow
def test_ddp_is_one_process_with_twice_the_accumulation(place, tmp_path):
    """Same samples, same draws, same mean of the gradients."""
    two = run(place, "tokenizer.yaml", tmp_path / "ddp", "trainer.strategy=ddp")
    assert distance(two, place / "tokenizer") < 1e-5
    starts = list((two / "starts").glob("*.json"))
    assert len(starts) == 1  # one process speaks for both
    assert json.loads(starts[0].read_text())["processes"] == 2


@pytest.mark.slow
def test_ddp_is_one_process_with_twice_the_batch(place, tmp_path):
    """Of a model without random draws. The processes also share the work of tokenizing."""
    options = ("model.cond_drop=0", f"data.token_cache={tmp_path / 'tokens'}")
    two = run(place, "generator.yaml", tmp_path / "ddp", "trainer.strategy=ddp", *options)
    overrides = [f"output_dir={tmp_path / 'one'}", "data.batch_size=8", *options]
    one = train(load_experiment(place / "generator.yaml", overrides))
    assert distance(one, two) < 1e-5
    first, second = logged_losses(one), logged_losses(two)
    assert first.keys() == second.keys() == set(range(STEPS))


@pytest.mark.slow
def test_sharded_training_saves_resumes_and_exports(place, tmp_path):
    sharded = ("trainer.strategy=fsdp2", "model.checkpoint_blocks=true")
    two = run(place, "tokenizer.yaml", tmp_path / "whole", *sharded)
    assert distance(two, place / "tokenizer") < 1e-5
    tokenizer = load_model(two)  # one process
    image = torch.zeros(1, 3, 16, 16)
    assert tokenizer.decode(tokenizer.encode(image), num_steps=1).shape == image.shape

    half = tmp_path / "half"
    run(place, "tokenizer.yaml", half, *sharded)
    checkpoints = list_checkpoints(half / "checkpoints")
    assert set(checkpoints) >= {16, 20}
    assert all(path.is_dir() for path in checkpoints.values())
    # the newest loses a file, as if a disk had: the run goes on from the one before
    verify(checkpoints[20])
    next(checkpoints[20].glob("__1_*.distcp")).write_bytes(b"")
    assert find_checkpoint(half / "checkpoints") == checkpoints[16]
    (half / "model.safetensors").unlink()
    run(place, "tokenizer.yaml", half, *sharded)
    assert same(half, two)
    # started once more, when finished, in one process: the export comes from the folder of shards
    (half / "model.safetensors").unlink()
    overrides = [f"output_dir={half}", *sharded]
    train(load_experiment(place / "tokenizer.yaml", overrides))
    assert same(half, two)
