"""Two processes do what one does: DDP and sharded training over gloo on the CPU."""

import functools
import json
import os
import time

import pytest
import torch
import yaml
from helpers.files import draw_pictures
from helpers.models import DRAWER, TINY, TITOK, randomize
from helpers.processes import finish, start_ranks
from helpers.runs import generator_yaml, logged_losses, same, tokenizer_yaml, weights

from flextok.config import load_experiment
from flextok.generators import GENERATORS
from flextok.objectives import OBJECTIVES, make_objective
from flextok.pipeline import load
from flextok.registry import build_model
from flextok.tokenizers import TOKENIZERS, FlexTok
from flextok.tokenizers.networks import Encoder, FlowDecoder
from flextok.training.checkpoints import find_checkpoint, list_checkpoints, verify
from flextok.training.run import train
from flextok.training.sharding import gather, is_sharded, shard, whole

STEPS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Configs of a tokenizer and a generator of 20 steps, and both trained by one process that
    accumulates two batches of 4 a step: it draws what one of two processes draws for each."""
    folder = tmp_path_factory.mktemp("distributed")
    draw_pictures(folder / "pictures", [f"{i:02d}.png" for i in range(12)])
    options = {"max_steps": STEPS, "checkpoint_every": 8, "validate_every": 10, "num_pictures": 1}
    paths = [tokenizer_yaml(folder, folder / "pictures", **options)]
    paths.append(generator_yaml(folder, folder / "pictures"))
    for path in paths:
        spec = yaml.safe_load(path.read_text())
        spec["trainer"] |= options
        if spec["task"] == "generator":
            spec["objective"] = {"cond_drop": 0.5}
        path.write_text(yaml.safe_dump(spec))
        train(load_experiment(path, ["trainer.accumulate=2"]))
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
@pytest.mark.parametrize("task", ["tokenizer", "generator"])
def test_ddp_is_one_process_with_twice_the_batch(place, tmp_path, task):
    """Same samples, same draws, same mean of the gradients. The processes of the generator share
    the work of tokenizing, too."""
    two = run(place, f"{task}.yaml", tmp_path / "ddp", "trainer.strategy=ddp")
    assert distance(two, place / task) < 1e-5
    assert logged_losses(two).keys() == set(range(STEPS))
    starts = list((two / "starts").glob("*.json"))
    assert len(starts) == 1  # one process speaks for both
    assert json.loads(starts[0].read_text())["processes"] == 2


def record_work(folder):
    """Has this process write the rows and the length of each sequence that a loss runs, a line a
    step, in training."""
    rank = os.environ["RANK"]
    parts = {"encoder": Encoder, "decoder": FlowDecoder}
    flow = OBJECTIVES["flow"]
    plain = {name: part.forward for name, part in parts.items()} | {"loss": flow.forward}
    work = []

    def loss(self, *arguments, **options):
        work.clear()
        losses = plain["loss"](self, *arguments, **options)
        if self.training:
            with (folder / f"work-{rank}.txt").open("a") as file:
                file.write(json.dumps(work) + "\n")
        return losses

    def encode(self, latents, length=None):
        work.append(["encoder", len(latents), length])
        return plain["encoder"](self, latents, length)

    def decode(self, x_t, t, registers, mask=None):
        work.append(["decoder", *registers.shape[:2]])
        return plain["decoder"](self, x_t, t, registers, mask)

    flow.forward, Encoder.forward, FlowDecoder.forward = loss, encode, decode


@pytest.mark.slow
def test_a_step_costs_every_process_the_same_whatever_lengths_it_draws(tmp_path):
    """Each drew its own: at 128 processes one nearly always had the longest, and all waited."""
    draw_pictures(tmp_path / "pictures", [f"{i:02d}.png" for i in range(12)])
    config = tokenizer_yaml(tmp_path, tmp_path / "pictures", num_pictures=0)
    command = ["train", config, "trainer.devices=2", "trainer.strategy=ddp"]
    command += ["model.drop_mode=truncate", "objective.nested_dropout=uniform"]
    command += ["objective.batch_lengths=4"]
    before = functools.partial(record_work, tmp_path)
    codes = finish(*start_ranks(2, command, tmp_path / "run.log", before))
    text = "\n".join(p.read_text()[-3000:] for p in sorted(tmp_path.glob("run.*.log")))
    assert codes == [0, 0], text
    one, two = (
        [json.loads(line) for line in (tmp_path / f"work-{rank}.txt").read_text().splitlines()]
        for rank in range(2)
    )
    assert one == two
    assert len(one) == 6
    for step in one:
        for part in ("encoder", "decoder"):
            found = [(rows, length) for name, rows, length in step if name == part]
            assert sum(rows for rows, _ in found) == 4
            assert len(found) == 4  # four pictures, four of eight lengths
    assert len({json.dumps(step) for step in one}) > 1


def write_late():
    """Has the first process write its models late."""
    if os.environ["RANK"] == "0":
        plain = FlexTok.save_pretrained

        def save(self, *arguments, **options):
            time.sleep(3)
            return plain(self, *arguments, **options)

        FlexTok.save_pretrained = save


@pytest.mark.slow
def test_a_config_that_starts_from_the_one_before_waits_for_its_model(tmp_path):
    draw_pictures(tmp_path / "pictures", [f"{i:02d}.png" for i in range(12)])
    path = tokenizer_yaml(tmp_path, tmp_path / "pictures", max_steps=1, num_pictures=0)
    first = yaml.safe_load(path.read_text())
    first["data"]["validation"] = None
    second = {
        **first,
        "output_dir": str(tmp_path / "next"),
        "start": {"weights": first["output_dir"]},
    }
    paths = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    for path, spec in zip(paths, (first, second), strict=True):
        path.write_text(yaml.safe_dump(spec))
    command = ["train", *paths, "trainer.devices=2", "trainer.strategy=ddp"]
    codes = finish(*start_ranks(2, command, tmp_path / "run.log", write_late))
    text = "\n".join(p.read_text()[-3000:] for p in sorted(tmp_path.glob("run.*.log")))
    assert codes == [0, 0], text
    assert "weights" in load(tmp_path / "next").metadata["start"]


SHARDED = ("trainer.strategy=fsdp2", "trainer.checkpoint_blocks=true")


@pytest.mark.slow
def test_a_sharded_tokenizer_trains_saves_continues_and_loads_on_one_process(place, tmp_path):
    two = run(place, "tokenizer.yaml", tmp_path / "two", *SHARDED)
    assert distance(two, place / "tokenizer") < 1e-5
    assert "from flextok import FlexTok\n" in (two / "README.md").read_text()
    tokenizer = load(two)  # one process
    image = torch.zeros(1, 3, 16, 16)
    assert tokenizer.decode(tokenizer.encode(image), num_steps=1).shape == image.shape
    checkpoints = list_checkpoints(two / "checkpoints")
    assert set(checkpoints) >= {16, 20}
    assert all(path.is_dir() for path in checkpoints.values())
    # the newest loses a file, as if a disk had: the run goes on from the one before
    verify(checkpoints[20])
    next(checkpoints[20].glob("__1_*.distcp")).write_bytes(b"")
    assert find_checkpoint(two / "checkpoints") == checkpoints[16]
    (two / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((two / "config.json").read_bytes())
    run(place, "tokenizer.yaml", two, *SHARDED)
    assert same(two, tmp_path)


@pytest.mark.slow
def test_a_sharded_generator_trains_saves_and_loads_on_one_process(place, tmp_path):
    two = run(place, "generator.yaml", tmp_path / "two", *SHARDED)
    assert distance(two, place / "generator") < 1e-5
    generator = load(two)  # one process
    assert generator.generate(torch.zeros(2, dtype=torch.long)).shape == (2, 8)
    # started once more, when finished, in one process: the export comes from the folder of shards
    exported = two / "model.safetensors"
    before = exported.read_bytes()
    exported.unlink()
    run(place, "generator.yaml", two, *SHARDED, processes=1)
    assert exported.read_bytes() == before


def compare_gradients(plain, sharded, mesh, batch):
    """Shards the second of two like objectives, and compares the gradients of a batch."""
    for parameter in plain.parameters():  # no zero hides a gradient
        torch.nn.init.normal_(parameter.data, std=0.1)
    sharded.load_state_dict(plain.state_dict())
    shard(sharded, mesh)
    for objective in (plain, sharded):
        objective(batch, torch.Generator().manual_seed(1))["loss"].backward()
    trained = {n: p.grad for n, p in sharded.named_parameters() if p.grad is not None}
    gradients = gather(trained, keep=True)
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if name in gradients:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "titok", **TITOK, "stage": "single"},
        {"name": "titok", **TITOK, "ordered": True},
        {"name": "flextok", **TINY, "drop_mode": "truncate"},
    ],
    ids=["titok", "titok of many lengths", "flextok of many lengths"],
)
def test_a_sharded_objective_has_the_same_gradients_codes_and_images(alone, spec):
    """Each length runs the blocks once more; encode and decode are no forward of the objective."""
    many = {} if spec.get("stage") else {"nested_dropout": "uniform"}
    models = (build_model(TOKENIZERS, spec) for _ in range(2))
    plain, sharded = (make_objective(model, many).train() for model in models)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    compare_gradients(plain, sharded, alone, {"image": images})
    indices = plain.model.encode(images)
    noise = {"generator": torch.Generator().manual_seed(2)}
    with whole(sharded):
        assert torch.equal(sharded.model.encode(images), indices)
        decoded = sharded.model.decode(indices, **noise)
    noise = {"generator": torch.Generator().manual_seed(2)}
    assert torch.allclose(decoded, plain.model.decode(indices, **noise), atol=1e-5)
    # and trains on, sharded as before
    sharded({"image": images}, torch.Generator().manual_seed(1))["loss"].backward()
    assert is_sharded(sharded)


@pytest.mark.parametrize("kind", ["flextok", "drawer", "titok", "gpt", "maskgit"])
def test_a_model_sharded_in_bf16_draws_as_under_autocast(alone, kind):
    """What is drawn after a validation, which is no forward of the objective."""
    sizes = {"vocab_size": 50, "num_tokens": 6, "depth": 3, "dim": 32, "num_heads": 2}
    spec = {
        "flextok": {**TINY, "name": "flextok", "drop_mode": "truncate"},
        "drawer": {**TINY, "name": "flextok", "drawer": DRAWER},
        "titok": {**TITOK, "name": "titok", "ordered": True},
    }.get(kind, {**sizes, "name": kind})
    kinds = GENERATORS if kind in GENERATORS else TOKENIZERS
    model = randomize(build_model(kinds, spec)).eval()

    def drawn():
        rng = torch.Generator().manual_seed(0)
        if kind in GENERATORS:
            return model.generate(torch.arange(4), generator=rng)
        return model.decode(torch.arange(24).view(4, 6), generator=rng)

    with torch.autocast("cpu", torch.bfloat16):
        expected = drawn()
    shard(model, alone, bf16=True)
    with whole(model):
        found = drawn()
    assert found.dtype is expected.dtype
    assert (found - expected).float().abs().mean() < 0.02
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_a_sharded_generator_by_text_has_the_same_gradients_and_indices(alone, name):
    """Each block reads the text by weights of its own, which only its forward gathers."""
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 16}
    sizes = {"vocab_size": 50, "num_tokens": 6, "depth": 2, "dim": 32, "num_heads": 2}
    sizes["dropout"] = 0.0
    spec = {"name": name, **sizes, "conditioner": {"name": "text", "encoder": encoder}}
    models = (build_model(GENERATORS, spec) for _ in range(2))
    plain, sharded = (make_objective(model).train() for model in models)
    texts = ["a cat", "two dogs", "", "a"]
    indices = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
    compare_gradients(plain, sharded, alone, {"indices": indices, "text": texts})
    drawn = [torch.Generator().manual_seed(2) for _ in range(2)]
    expected = plain.eval().model.generate(texts, generator=drawn[0])
    with whole(sharded.eval()):
        assert torch.equal(sharded.model.generate(texts, generator=drawn[1]), expected)
