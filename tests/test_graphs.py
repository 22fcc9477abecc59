"""Training by CUDA graphs, here with recordings that run the network: what is replayed and what is
not, and that training stays the same."""

import pytest
import torch
from helpers.models import TITOK, tiny_tokenizer

from flextok.config import load_experiment
from flextok.objectives import make_objective
from flextok.registry import build_model
from flextok.tokenizers import TOKENIZERS
from flextok.training import graphs
from flextok.training.run import train

PARTS = ["encoder", "decoder"]


class Recorder:
    """Stands for the GPU's recordings."""

    def __init__(self, monkeypatch, fault=None):
        self.recorded, self.replayed, self.fault = [], 0, fault
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(graphs, "capture_forward", self.capture)

    def capture(self, body, samples):
        if isinstance(self.fault, Exception):
            raise self.fault
        self.recorded.append([tuple(x.shape) for x in samples])

        def run(*tensors):
            self.replayed += 1
            out = body(*tensors)
            if not self.fault:
                return out
            return (
                tuple(self.fault * x for x in out) if isinstance(out, tuple) else self.fault * out
            )

        return run


def make(name):
    torch.manual_seed(0)
    if name == "titok":
        return make_objective(build_model(TOKENIZERS, {"name": "titok", **TITOK})).train()
    alignments = {
        "prefix_alignment": {"pretrained": False, "size": 32},
        "repa": {"pretrained": False, "model": "efficientnet_lite0"},
    }
    spec = {"batch_lengths": 2, **alignments}
    objective = make_objective(tiny_tokenizer(drop_mode="truncate"), spec).train()
    objective.prepare()
    return objective


def steps(objective, count=4):
    """Losses and gradients of some steps."""
    found = []
    size = objective.model.image_size
    for step in range(count):
        rng = torch.Generator().manual_seed(step)
        images = torch.rand(4, 3, size, size, generator=rng) * 2 - 1
        objective.zero_grad()
        loss = objective({"image": images}, rng)["loss"]
        loss.backward()
        found += [
            loss.detach(),
            *(p.grad.clone() for p in objective.parameters() if p.grad is not None),
        ]
    return found


@pytest.mark.parametrize("name", ["flextok", "titok"])
def test_steps_are_the_same_and_each_shape_is_recorded_once(name, monkeypatch):
    plain = steps(make(name))
    recorder, objective = Recorder(monkeypatch), make(name)
    with graphs.replayed(objective):
        replayed = steps(objective)
        number = len(recorder.recorded)
        torch.testing.assert_close(replayed, plain)
        torch.testing.assert_close(steps(objective), plain)
    assert len(recorder.recorded) == number  # the same shapes again
    # encoder, decoder; several lengths of prefix, and two aligned networks
    assert number == 2 if name == "titok" else number > 5
    assert recorder.replayed > number
    # outside everything is as it was
    before = recorder.replayed
    torch.testing.assert_close(steps(objective), plain)
    assert recorder.replayed == before
    assert all("forward" not in vars(getattr(objective.model, part)) for part in PARTS)


def test_a_recording_serves_one_call_a_step(monkeypatch):
    """It holds one call's activations: a second one would spoil the first one's gradients."""
    recorder, objective = Recorder(monkeypatch), make("flextok")
    encoder = objective.model.encoder
    x = torch.randn(2, *objective.model.noise_shape)
    with graphs.replayed(objective):
        encoder(x, 4)
        before = recorder.replayed
        encoder(x, 4)
        assert recorder.replayed == before
        encoder(x, 2)  # another length, another recording
        assert recorder.replayed > before
        steps(objective, 1)  # the next step
        before = recorder.replayed
        with torch.no_grad():
            encoder(x, 4)
        encoder.eval()(x, 4)
        assert recorder.replayed == before


@pytest.mark.parametrize("name", ["titok", "flextok"])
@pytest.mark.parametrize("fault", [RuntimeError("not while capturing"), 1.1])
def test_what_cannot_be_recorded_runs_as_it_is_with_a_warning(fault, name, monkeypatch, caplog):
    plain = steps(make(name))
    objective = make(name)
    Recorder(monkeypatch, fault)
    with graphs.replayed(objective):
        torch.testing.assert_close(steps(objective), plain)
    reason = str(fault) if isinstance(fault, Exception) else "its recording is off by 0.1"
    told = [r.getMessage() for r in caplog.records]
    if name == "flextok":  # once for each of several shapes
        aligned = [f"network of {kind.__name__}" for kind in graphs.ALIGNMENTS]
        whats = [*PARTS, *aligned]
        assert sorted(set(told)) == sorted(message(what, reason) for what in whats)
    else:
        assert told == [message(part, reason) for part in PARTS]


def message(what, reason):
    return f"the {what} is not recorded as a CUDA graph: {reason}"


@pytest.mark.parametrize(
    ("option", "missing"),
    [
        ("trainer.accelerator=cpu", "trainer.accelerator=gpu, an NVIDIA one"),
        ("trainer.precision=bf16-mixed", "trainer.precision=32-true"),
        ("trainer.compile=true", "trainer.compile=false"),
        ("trainer.checkpoint_blocks=true", "trainer.checkpoint_blocks=false"),
        ("trainer.strategy=ddp", "trainer.strategy=auto"),
        ("trainer.devices=2", "trainer.devices=1"),
        ("trainer.accumulate=2", "trainer.accumulate=1"),
    ],
)
def test_what_goes_with_no_recording_is_refused(option, missing, tmp_path, monkeypatch):
    if "accelerator" not in option:
        monkeypatch.setattr("flextok.training.trainer.device_type", lambda accelerator: "cuda")
    options = ["cuda_graphs=true", "precision=32-true", "devices=1"]
    given = [f"output_dir={tmp_path}", *(f"trainer.{o}" for o in options), option]
    config = load_experiment("configs/quickstart_tokenizer.yaml", given)
    with pytest.raises(ValueError, match=f"^trainer.cuda_graphs needs {missing}$"):
        train(config)
