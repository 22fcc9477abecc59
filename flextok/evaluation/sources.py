"""The three sources of images: real ones, their reconstructions and generated ones.

Every random draw belongs to an image's number, never to a batch. So in float64 a measured row is
the same for any batch size and any number of processes; in float32, kernels for another batch size
round differently (about 1e-6 of a feature) and now and then tip a pixel's rounding.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from flextok.data.loading import failures_in_one_line, make_loader
from flextok.data.sets import adapt, chosen_items, data_files
from flextok.data.stream import EvaluationSet, Item, as_it_is, collate
from flextok.data.transforms import ImageTransform
from flextok.draws import CODES, NOISE, row_generators
from flextok.evaluation.job import Job, Options, hash_of
from flextok.evaluation.metrics import image_hashes
from flextok.tokenizers.base import decode_rows, encode_rows

Batch = Mapping[str, Any]
# a batch -> (side, what there is of it by name): a side is "real", "codes" or a cell's number
Shown = dict[str, Any]  # tensors with a row for each image, and "captions", a list
Show = Callable[[Job, Batch], Iterator[tuple[str, Shown]]]


class Images(Dataset):
    """Images as the evaluation transform makes them, with their numbers. Raises CorruptPicture."""

    def __init__(self, dataset: Any, image_size: int | tuple[int, int]):
        """image_size: of squares, or (H, W)."""
        if len(dataset) == 0:
            raise ValueError("the data set is empty: nothing to evaluate")
        self.dataset, self.prepare = adapt(dataset), ImageTransform(image_size).prepare

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        item = self.dataset[index]
        caption = item.get("caption") or ""
        return {"index": index, "caption": caption, **self.prepare(item, None)}

    def few(self) -> list[Item]:
        """A first, a middle and a last one that can be read."""
        return readable(self, sorted({0, len(self) // 2, len(self) - 1}))

    def identity(self) -> str:
        """A hash of a few images, which distinguishes data sets, of the state of the files
        behind all of them, as far as the data set lists them (one may have been replaced), and of
        which items were taken."""
        few = self.few()
        return hash_of(
            *((i["label"], i["caption"], image_hashes(i["image"][None]).item()) for i in few),
            data_files(self.dataset),
            chosen_items(self.dataset),
        )


class Prompts(Dataset):
    """Labels or captions to generate from, numbered."""

    def __init__(self, conditions: Tensor | Sequence[str], labels: Tensor):
        self.conditions, self.labels = conditions, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return {"index": index, "label": self.labels[index], "condition": self.conditions[index]}

    def identity(self) -> str:
        return hash_of(list(self.conditions), self.labels.tolist())


def readable(images: Images, numbers: Iterable[int]) -> list[Item]:
    """Those of these images that can be read."""
    whole = skipping(images)
    return [item for number in numbers if (item := whole[number]) is not None]


def skipping(images: Images) -> EvaluationSet:
    """The images; None, and a warning, for each that cannot be read."""
    return EvaluationSet(images, as_it_is)


def real(job: Job, batch: Batch) -> Iterator[tuple[str, Shown]]:
    images = batch["image"].to(job.tokenizer.device)
    yield "real", {"images": images, "hash": image_hashes(images)}


def reconstructed(job: Job, batch: Batch) -> Iterator[tuple[str, Shown]]:
    """Real images, and what the tokenizer makes of them."""
    yield from real(job, batch)
    indices = encode_rows(job.tokenizer, batch["image"], job.options.seed, batch["index"])
    originals = batch["image"].to(job.tokenizer.device)
    known = {"originals": originals, "captions": batch["caption"]}
    yield from codes_and_images(job, batch["index"], indices, known)


def generated(job: Job, batch: Batch) -> Iterator[tuple[str, Shown]]:
    assert job.generator is not None
    cond = batch["condition"]
    indices = job.generator.generate(
        cond.to(job.generator.device) if isinstance(cond, Tensor) else cond,
        num_tokens=max(cell.num_tokens for cell in job.cells),
        options=job.sampling,
        generator=row_generators(job.options.seed, CODES, batch["index"]),
    )
    known = {} if isinstance(cond, Tensor) else {"captions": cond}
    yield from codes_and_images(job, batch["index"], indices, known)


def codes_and_images(
    job: Job, numbers: Tensor, indices: Tensor, known: Shown
) -> Iterator[tuple[str, Shown]]:
    """The indices, then the images that they decode to in each cell's way, and the time it took."""
    yield "codes", {"indices": indices}
    for number, (cell, options) in enumerate(zip(job.cells, job.decoding, strict=True)):
        started = time.perf_counter()
        kept = indices[:, : cell.num_tokens]
        rngs = row_generators(job.options.seed, NOISE, numbers)
        images = decode_rows(job.tokenizer, kept, options, rngs)
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds = torch.tensor((time.perf_counter() - started) / len(images), dtype=torch.float64)
        yield str(number), {"images": images, "seconds": seconds.expand(len(images)), **known}


def batches(images: Images, options: Options, what: str) -> Iterator[dict[str, Tensor]]:
    """All readable images in order, on one process, with a progress bar. Raises ValueError where
    there is none."""
    how = {"batch_size": options.batch_size, "collate_fn": collate}
    loader = make_loader(skipping(images), options.num_workers, **how)
    found = False
    with failures_in_one_line():
        for batch in tqdm(loader, desc=what, unit="batch"):
            if batch:
                found = True
                yield batch
    if not found:
        raise ValueError("no image of the data set could be read; see the warnings above")
