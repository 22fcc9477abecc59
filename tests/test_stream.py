import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from flextok.data.augmentation import Augmentation
from flextok.data.datamodule import DataModule
from flextok.data.datasets import ImageFolder
from flextok.data.stream import EvaluationSet, PositionSampler, Stream, as_it_is, collate
from flextok.data.transforms import ImageTransform
from flextok.draws import derived_generator
from flextok.images import to_tensor, to_uint8


def stream(folder, seed=0, **options):
    transform = ImageTransform(16, Augmentation(flip=True, crop="random", shift=0.1))
    return Stream(ImageFolder(folder), transform.prepare, seed, **options)


def test_a_position_always_gives_the_same_sample(picture_folder):
    first, second = stream(picture_folder), stream(picture_folder)
    for position in (7, 0, 3, 7, 100):
        assert torch.equal(first[position]["image"], second[position]["image"])
    other = stream(picture_folder, seed=1)
    assert any(not torch.equal(first[p]["image"], other[p]["image"]) for p in range(6))


def test_an_epoch_visits_every_sample_once(picture_folder):
    s = stream(picture_folder)
    orders = [[s.index_at(epoch * 6 + i) for i in range(6)] for epoch in range(4)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_workers_and_restarts_see_the_same_batches(picture_folder):
    def batches(count, start=0, workers=0):
        samples = stream(picture_folder)
        loader = DataLoader(
            samples,
            batch_sampler=PositionSampler(samples, 4, 4 * start),
            collate_fn=collate,
            num_workers=workers,
        )
        return [batch["image"] for batch, _ in zip(loader, range(count), strict=False)]

    plain = batches(5)
    for other in (batches(5, workers=2), batches(2) + batches(3, start=2)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_ranks_share_a_global_batch_without_overlap(picture_folder):
    samples = stream(picture_folder)

    def first(rank, count):
        sampler = PositionSampler(samples, 3, rank=rank, world_size=2)
        return [batch for batch, _ in zip(sampler, range(count), strict=False)]

    joined = [a + b for a, b in zip(first(0, 4), first(1, 4), strict=True)]
    whole = [batch for batch, _ in zip(PositionSampler(samples, 6), range(4), strict=False)]
    assert joined == whole


def taken(folder, state=None, step=0, steps=1, batch_size=4, processes=1, accumulate=1):
    """The positions that these steps take, in order, and the state of the data after them."""
    found = []
    for rank in range(processes):
        data = DataModule(ImageFolder(folder), None, as_it_is, batch_size)
        data.trainer = SimpleNamespace(
            global_step=step,
            accumulate_grad_batches=accumulate,
            global_rank=rank,
            world_size=processes,
        )
        if state is not None:
            data.load_state_dict(state)
        sampler = data.train_dataloader().batch_sampler
        found.append([batch for batch, _ in zip(sampler, range(steps * accumulate), strict=False)])
        data.trainer.global_step += steps
    return [
        n for turn in zip(*found, strict=True) for batch in turn for n in batch
    ], data.state_dict()


@pytest.mark.parametrize(
    "changed",
    [{"processes": 2}, {}, {"processes": 4}, {"batch_size": 8}, {"batch_size": 3, "accumulate": 2}],
    ids=str,
)
def test_a_run_goes_on_after_the_samples_it_had_whatever_takes_them_now(picture_folder, changed):
    positions, state = taken(picture_folder, steps=10, processes=2)
    assert positions == list(range(80))
    now, state = taken(picture_folder, state, step=10, steps=3, **changed)
    assert now == list(range(80, 80 + len(now)))
    later, _ = taken(picture_folder, state, step=13, steps=2, processes=2)
    assert later == list(range(80 + len(now), 80 + len(now) + 16))


def test_a_checkpoint_without_the_number_of_samples_goes_on_as_before(picture_folder):
    assert taken(picture_folder, step=10, processes=2, accumulate=3)[0][0] == 10 * 24


def test_corrupt_pictures_are_skipped_and_counted(picture_folder, caplog):
    (picture_folder / "cats" / "1.png").write_bytes(b"not a picture")
    (picture_folder / "dogs" / "0.png").write_bytes(
        (picture_folder / "dogs" / "1.png").read_bytes()[:100]
    )
    s = stream(picture_folder)
    with caplog.at_level(logging.WARNING):
        samples = [s[p]["image"] for p in range(6)]
    assert all(sample.shape == (3, 16, 16) for sample in samples)
    assert s.skips.count.value >= 2
    assert "skipped an unreadable sample (2 so far)" in caplog.text
    assert "1.png" in caplog.text

    evaluation = EvaluationSet(ImageFolder(picture_folder), s.prepare)
    batch = collate([evaluation[i] for i in range(6)])
    assert len(batch["image"]) == 4
    assert evaluation.skips.count.value == 2


def test_a_damaged_picture_is_named_once(picture_folder, caplog):
    """It once was at every epoch, by every worker, and counted each time."""
    (picture_folder / "cats" / "1.png").write_bytes(b"not a picture")
    (picture_folder / "dogs" / "2.png").write_bytes(b"")
    pictures = ImageFolder(picture_folder)
    s = Stream(pictures, ImageTransform(16).prepare)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            for position in range(6):
                s[6 * epoch + position]
        loader = DataLoader(EvaluationSet(pictures, s.prepare), num_workers=2, collate_fn=collate)
        for _ in range(2):
            assert sum(1 for batch in loader if batch) == 4
    assert sum("1.png" in message for message in caplog.messages) == 1
    assert sum("2.png" in message for message in caplog.messages) == 1
    assert s.skips.count.value == 2


def test_counts_add_up_over_workers(picture_folder):
    (picture_folder / "cats" / "1.png").write_bytes(b"not a picture")
    (picture_folder / "dogs" / "2.png").write_bytes(b"")
    evaluation = EvaluationSet(ImageFolder(picture_folder), stream(picture_folder).prepare)
    loader = DataLoader(evaluation, batch_size=1, num_workers=2, collate_fn=collate)
    assert sum(1 for batch in loader if batch) == 4
    assert evaluation.skips.count.value == 2


def test_nothing_readable_is_an_error(picture_folder):
    for path in picture_folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 6 samples can be read"):
        stream(picture_folder)[0]


def test_derived_generators_differ():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**40, 3), (3, 2**40)]
    draws = [torch.rand((), generator=derived_generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)
    assert torch.rand((), generator=derived_generator(0, 1)).item() == draws[3]


def test_pictures_survive_the_trip_to_tensors_and_back():
    pixels = torch.arange(256).view(16, 16, 1).expand(-1, -1, 3).to(torch.uint8).numpy()
    from PIL import Image

    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert (to_uint8(tensor) == pixels).all()


def test_the_evaluation_transform_is_resize_then_center_crop():
    from PIL import Image

    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    tensor = ImageTransform(10)(wide)
    assert tensor.shape == (3, 10, 10)
    assert tensor[2, :, 2:8].min() > 0.9  # the middle is blue
    assert torch.equal(tensor, ImageTransform(10, Augmentation(flip=True, crop="random"))(wide))
