"""The streaming pass: pictures or prompts in, a row of measurements for each out.

Every random draw belongs to a picture's number, never to a batch. So in float64 a row is the same
for any batch size and any number of processes; in float32, kernels for another batch size round
differently (about 1e-6 of a feature) and now and then tip a pixel's rounding.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from flextok.data.datamodule import prepare_image
from flextok.data.loading import make_loader, told_in_one_line
from flextok.data.pictures import CorruptPicture
from flextok.data.stream import EvaluationSet, Item, collate
from flextok.data.transforms import ImageTransform
from flextok.draws import CODES, NOISE, draw, row_generators
from flextok.evaluation import processes
from flextok.evaluation.features import Networks
from flextok.evaluation.job import Cell, Job, Options, hash_of
from flextok.evaluation.metrics import METRICS, to_8_bit
from flextok.evaluation.records import Records
from flextok.tokenizers.base import as_images

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # a batch -> its rows


class Numbered(Dataset):
    """Pictures as the evaluation transform makes them, with their numbers; unreadable ones None."""

    def __init__(self, dataset: Any, image_size: int):
        if len(dataset) == 0:
            raise ValueError("the data set is empty: nothing to evaluate")
        self.pictures = EvaluationSet(dataset, prepare_image(ImageTransform(image_size)))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Item | None:
        item = self.pictures[index]
        return None if item is None else {"index": index, **item}

    def identity(self) -> str:
        """A hash of a few pictures: enough to tell one data set from another."""
        items = [self[i] for i in sorted({0, len(self) // 2, len(self) - 1})]
        return hash_of(
            *((item["label"], picture_hashes(item["image"][None]).item()) for item in items if item)
        )


class Labels(Dataset):
    """Numbered labels to generate from."""

    def __init__(self, labels: Tensor):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return {"index": index, "label": self.labels[index]}

    def identity(self) -> str:
        return hash_of(self.labels.tolist())


class Captions(Dataset):
    """The captions of `number` pictures, in order and over again, to generate from. Where a picture
    cannot be read, the next one's caption stands in. Raises ValueError where none has a caption."""

    def __init__(self, dataset: Any, number: int):
        self.dataset, self.number = dataset, number
        self.shown = [self[i]["caption"] for i in sorted({0, number // 2, number - 1})]
        if not any(self.shown):
            raise ValueError(
                "this generator reads prompts, and the pictures have no captions: give DATA with "
                "captions (.txt files beside pictures, a caption column or key)"
            )

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Item:
        size = len(self.dataset)
        for attempt in range(size):
            try:
                item = self.dataset[(index + attempt) % size]
            except CorruptPicture:
                continue
            return {"index": index, "label": item["label"], "caption": item["caption"]}
        raise ValueError("no picture of the data set could be read")

    def identity(self) -> str:
        return hash_of(self.number, self.shown)


def collect(records: Records, source: Dataset, compute: Compute, job: Job, what: str) -> float:
    """Fill in what the records miss. Returns the seconds it took."""
    todo, size = records.missing, job.options.batch_size
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    loader = make_loader(source, job.options.num_workers, batch_sampler=batches, collate_fn=collate)
    started = time.perf_counter()
    progress_bar = tqdm(total=len(todo), desc=what, unit="img", disable=processes.rank() > 0)
    with progress_bar as progress, told_in_one_line():
        for asked, batch in zip(batches, loader, strict=True):
            records.add(asked, {k: v.cpu() for k, v in compute(batch).items()} if batch else {})
            progress.update(len(asked))
    return time.perf_counter() - started


def batches(source: Dataset, options: Options, what: str) -> Iterator[dict[str, Tensor]]:
    """All readable items of a source in order, on one process, with a progress bar."""
    loader = make_loader(
        source, options.num_workers, batch_size=options.batch_size, collate_fn=collate
    )
    with told_in_one_line():
        for batch in tqdm(loader, desc=what, unit="batch"):
            if batch:
                yield batch


def reconstruction(job: Job) -> Compute:
    """Rows of pictures beside their reconstructions."""

    def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["image"].to(job.device)
        indices = encode(job.tokenizer, images)
        rows = real_rows(batch, images, job.networks)
        if not indices.is_floating_point():
            rows["indices"] = indices.int()
        for number, decoded in decoded_cells(job, indices, batch["index"], rows):
            for name, metric in METRICS.items():
                rows[f"{number}/{name}"] = metric(decoded, images)
            if job.networks.lpips is not None:
                rows[f"{number}/lpips"] = lpips(job.networks, decoded, images)
        return rows

    return compute


def real_pictures(job: Job) -> Compute:
    """Rows of the pictures themselves, for a generator to be compared with."""
    return lambda batch: real_rows(batch, batch["image"].to(job.device), job.networks)


def generation(job: Job) -> Compute:
    """Rows of generated pictures."""
    assert job.generator is not None
    longest, generate = max(cell.num_tokens for cell in job.cells), job.generator.generate

    def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        draws = row_generators(job.options.seed, CODES, batch["index"])
        cond = batch["caption"] if "caption" in batch else batch["label"].to(job.device)
        indices = generate(cond, num_tokens=longest, generator=draws)
        rows = {"index": batch["index"], "label": batch["label"], "indices": indices.int()}
        for _ in decoded_cells(job, indices, batch["index"], rows):
            pass
        return rows

    return compute


def decoded_cells(job: Job, indices: Tensor, numbers: Tensor, rows: dict[str, Tensor]) -> Any:
    """Decodes in each cell's way, adds time and features to the rows, yields (number, pictures)."""
    noise = noise_of(job.tokenizer, numbers, job.options.seed)
    for number, cell in enumerate(job.cells):
        started = time.perf_counter()
        decoded = decode(job.tokenizer, indices, cell, job.options, noise)
        if decoded.is_cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / len(decoded)
        rows[f"{number}/seconds"] = torch.full((len(decoded),), seconds, dtype=torch.float64)
        for network in job.networks.features:
            features = network(to_8_bit(decoded))
            rows[f"{number}/{network.name}"] = features.pooled
            rows[f"{number}/{network.name}/logits"] = features.logits
        yield number, decoded


def real_rows(batch: dict[str, Tensor], images: Tensor, networks: Networks) -> dict[str, Tensor]:
    rows = {"index": batch["index"], "label": batch["label"], "picture": picture_hashes(images)}
    for network in networks.features:
        rows[f"real/{network.name}"] = network(to_8_bit(images)).pooled
    return rows


def lpips(networks: Networks, a: Tensor, b: Tensor) -> Tensor:
    """a, b: (B, 3, H, W) in [-1, 1], compared as a viewer gets them: rounded to 8 bits."""
    assert networks.lpips is not None
    dtype = networks.lpips.shift.dtype
    ours, theirs = ((to_8_bit(x) / 127.5 - 1).to(dtype) for x in (a, b))
    with torch.no_grad():
        return networks.lpips.distances(ours, theirs).cpu().double()


def encode(tokenizer: Any, images: Tensor) -> Tensor:
    """Indices (B, K) long, or codes (B, K, C) float of a continuous tokenizer. A VAE's posterior
    gives its mode: a draw would belong to the batch."""
    if not tokenizer.vocab_size:
        return tokenizer.encode_codes(images)
    if hasattr(tokenizer, "noise_shape"):
        return tokenizer.encode(images, sample_posterior=False)
    return tokenizer.encode(images)


def asked_of(tokenizer: Any, cell: Cell, options: Options) -> dict[str, Any]:
    """The options of decode() that the evaluation states. Raises ValueError for one that the
    tokenizer does not take, or not with this value."""
    asked = {**cell._asdict(), **options.solving()}
    asked = {k: v for k, v in asked.items() if v is not None and k != "num_tokens"}
    if asked and getattr(tokenizer, "noise_shape", None) is None:
        raise ValueError(
            f"{', '.join(asked)}: a {tokenizer.model_type} decodes in one step, without guidance"
        )
    if asked:
        tokenizer.decode_options(asked)
    return asked


def decode(
    tokenizer: Any, indices: Tensor, cell: Cell, options: Options, noise: Tensor | None
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] from the first cell.num_tokens of encode()'s result."""
    kept = indices[:, : cell.num_tokens]
    asked = asked_of(tokenizer, cell, options)
    if noise is not None:
        return tokenizer.decode(kept, noise=noise, **asked)
    if indices.is_floating_point():
        return as_images(tokenizer.decode_codes(kept))
    return tokenizer.decode(kept)


def noise_of(tokenizer: Any, numbers: Tensor, seed: int) -> Tensor | None:
    """The decoder's initial noise for pictures by number, (B, C, h, w); None where it has none."""
    shape = getattr(tokenizer, "noise_shape", None)
    if shape is None:
        return None
    draws = row_generators(seed, NOISE, numbers)
    return draw(torch.randn, (len(draws), *shape), draws, torch.device("cpu"))


def picture_hashes(images: Tensor) -> Tensor:
    """A number for each picture's 8-bit pixels, (B,) long: what the reference consisted of."""
    pixels = to_8_bit(images).byte().cpu().numpy()
    digests = [hashlib.sha256(picture.tobytes()).digest()[:8] for picture in pixels]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
