"""How many tokens does this image need? The shortest prefix that is good enough, per image.

The candidates are 1, 2, 4, ... and all K tokens. Bisection finds the shortest one that meets the
target in at most ceil(log2(candidates + 1)) decodes (4 for K = 256), which supposes that quality
rises with the prefix. Whatever comes back was decoded and meets the target (or no candidate that
was tried did); the next shorter candidate was decoded too and does not.

The same measurements, of every candidate, fit a FlexTok's length head, which then predicts the
length without decoding (tokenizers/length.py).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flextok.data.sets import labels_count
from flextok.draws import NOISE, POSTERIOR, row_generators
from flextok.evaluation import sources
from flextok.evaluation.evaluators import EVALUATORS, Comparison, FeatureDistances, Setting
from flextok.evaluation.job import Options
from flextok.evaluation.metrics import image_hashes, warn_of_shared
from flextok.nn.devices import check_finite
from flextok.pipeline import decode_prefixes
from flextok.tokenizers import FlexTok, LengthHeadConfig, Tokenizer
from flextok.tokenizers.base import encode_rows, in_shape_of, prefix_lengths
from flextok.tokenizers.length import HIGHER_IS_BETTER, Adaptive, LengthHead, Target

Compare = Callable[[Tensor, Tensor], Tensor]  # decoded, images (B, 3, H, W) -> (B,)
SHUFFLES = 1000  # of the labels, for the control
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 600, 256, 2e-3, 1.0  # AdamW's, of a length head


def comparison(metric: str, device: torch.device, dtype: torch.dtype) -> Compare:
    """The function that compares images, with its network loaded. Raises ValueError where the
    weights are missing."""
    evaluator = EVALUATORS[metric](Setting(device, dtype))
    assert isinstance(evaluator, Comparison | FeatureDistances), f"{metric} has no pairs"
    return evaluator.compare


def encode(
    tokenizer: Tokenizer,
    images: Tensor,
    target: Target | str,
    compare: Compare | None = None,
    rows: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    decoding: Mapping[str, Any] | None = None,
) -> Adaptive:
    """images: (B, 3, H, W) in [-1, 1]. Finds the shortest prefix of each image that meets the
    target, such as "psnr=20".

    compare: comparison(...), to load its network once for many calls. rows: the images'
    numbers, 0 .. B-1 by default; an image's noise depends on its number and `seed` and is the same
    for each of its prefixes. decoding: options of decode(). Raises ValueError for a target that
    cannot be read and for a tokenizer that decodes no prefixes."""
    target = Target.parse(target) if isinstance(target, str) else target
    parameter = next(tokenizer.parameters())
    images = images.to(parameter.device)
    compare = compare or comparison(target.metric, parameter.device, parameter.dtype)
    numbers = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    options = tokenizer.decode_options(in_shape_of(tokenizer, images, decoding))
    indices = encode_rows(tokenizer, images, seed, numbers)
    lengths = torch.tensor(prefix_lengths(tokenizer.num_tokens))
    # the answer is in [low, high]; high = number of candidates means that none does
    low = torch.zeros(len(images), dtype=torch.long)
    high = torch.full_like(low, len(lengths))
    tried = torch.full((len(images), len(lengths)), math.nan, dtype=torch.float64)
    decodes = 0
    while len(unsettled := (low < high).nonzero()[:, 0]):  # images that are not settled yet
        middle = (low[unsettled] + high[unsettled]) // 2
        draws = row_generators(seed, NOISE, numbers[unsettled])
        decoded = tokenizer.decode(
            indices[unsettled], keep=lengths[middle], options=options, generator=draws
        )
        values = compare(decoded, images[unsettled]).cpu().double()
        tried[unsettled, middle] = values
        good = target.met(values)
        high[unsettled] = torch.where(good, middle, high[unsettled])
        low[unsettled] = torch.where(good, low[unsettled], middle + 1)
        decodes += 1
    return Adaptive.of(target, lengths.tolist(), indices, tried, high, decodes)


@torch.no_grad()
def fit_length_head(tokenizer: FlexTok, dataset: Any, metric: str, options: Options) -> Tensor:
    """Gives a FlexTok a length head, or another one, fitted to how good the images decoded from
    each prefix of the images of a data set are. Save the tokenizer to keep it. Returns hashes of
    these images, (n,) long, for relate().

    metric: psnr, ssim, lpips, efficientnet_lite0 or inception. options: decoding, seed, batch_size
    and num_workers are read. Each image is decoded once for each of 1, 2, 4, ... and all tokens.
    Raises ValueError for a tokenizer that decodes no prefixes."""
    head_config = LengthHeadConfig(metric, prefix_lengths(tokenizer.num_tokens))
    width = tokenizer.encoder.head.in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = LengthHead(head_config, width, tokenizer.num_tokens)
    weight = tokenizer.encoder.patch_embed.weight
    compare = comparison(metric, weight.device, weight.dtype)
    read, scores, hashes = [], [], []
    source = sources.Images(dataset, tokenizer.image_size)
    for batch in sources.batches(source, options, "measuring every prefix"):
        images, numbers = batch["image"].to(weight.device), batch["index"].tolist()
        draws = row_generators(options.seed, POSTERIOR, numbers)
        latents = tokenizer.vae.encode(images, generator=draws).to(weight.dtype)
        outputs = tokenizer.encoder.outputs(latents)
        indices = tokenizer.quantizer(tokenizer.encoder.head(outputs))[1]
        how = (head_config.lengths, options.seed, options.decoding, numbers)
        decoded = decode_prefixes(tokenizer, indices, *how)
        read.append(head.summary(outputs).cpu().float())
        hashes.append(image_hashes(images))
        scores.append(torch.stack([compare(x, images) for x in decoded.values()], 1).cpu().float())
    fit(head, torch.cat(read), torch.cat(scores), options.seed)
    tokenizer.config = replace(tokenizer.config, length_head=head_config)
    tokenizer.length_head = head.to(weight).eval()
    facts = {"images": len(torch.cat(read)), "decoding": dict(options.decoding)}
    tokenizer.metadata["length_head"] = facts
    return torch.cat(hashes)


@torch.enable_grad()
def fit(head: LengthHead, summaries: Tensor, scores: Tensor, seed: int) -> None:
    """summaries: (n, 2 D), what the head reads; scores: (n, lengths). Least squares by AdamW with a
    cosine schedule, on standardised summaries; the first layer then takes them as they are."""
    check_finite(scores, "the scores of prefixes")
    mean, std = summaries.mean(dim=0), summaries.std(dim=0, correction=0).clamp_min(1e-4)
    spread = scores.std(correction=0).clamp_min(1e-6)
    head.scale.copy_(spread if head.metric in HIGHER_IS_BETTER else -spread)
    summaries, scores = (summaries - mean) / std, scores / head.scale
    curve = scores.mean(dim=0)
    rise = curve.diff().clamp_min(1e-2).expm1().log()  # softplus gives the mean curve's
    with torch.no_grad():
        head.last.weight.mul_(0.1)
        head.last.bias.copy_(torch.cat([curve[:1], rise]))
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(len(scores), (min(BATCH, len(scores)),), generator=rng)
        loss = (head(summaries[rows]) / head.scale - scores[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        head.first.bias.sub_(head.first.weight @ (mean / std))
        head.first.weight.div_(std)


def relate(
    tokenizer: Tokenizer,
    dataset: Any,
    target: Target,
    options: Options,
    training: Tensor | None = None,
) -> dict[str, Any]:
    """The experiment: how many tokens each image of a data set needs; "complexity": where its
    labels count something (emoji_scenes: the objects), whether the length follows them;
    "predicted": where the tokenizer has a length head for the metric, how that agrees. Else None.

    training: what fit_length_head returned; warns of images that it read."""
    source = sources.Images(dataset, tokenizer.image_size)
    parameter = next(tokenizer.parameters())
    compare = comparison(target.metric, parameter.device, parameter.dtype)
    head = tokenizer.length_head if isinstance(tokenizer, FlexTok) else None
    predicts = head is not None and head.metric == target.metric
    decoding = tokenizer.decode_options(options.decoding)
    labels: list[int] = []
    searched: list[Adaptive] = []
    predicted: list[Adaptive] = []
    reached: list[Tensor] = []  # whether an image of the predicted length meets the target
    hashes: list[Tensor] = []
    seconds = [0.0, 0.0]
    for batch in sources.batches(source, options, "searching prefixes"):
        images, numbers = batch["image"].to(parameter.device), batch["index"]
        if training is not None:
            hashes.append(image_hashes(images))
        started = time.perf_counter()
        how = (target, compare, numbers, options.seed, options.decoding)
        searched.append(encode(tokenizer, images, *how))
        labels += batch["label"].tolist()
        seconds[0] += time.perf_counter() - started
        if predicts:
            assert isinstance(tokenizer, FlexTok)
            started = time.perf_counter()
            draws = row_generators(options.seed, POSTERIOR, numbers)
            found = tokenizer.encode(images, generator=draws, target=target)
            seconds[1] += time.perf_counter() - started
            predicted.append(found)
            draws = row_generators(options.seed, NOISE, numbers)
            decoded = tokenizer.decode(
                found.indices, keep=found.keep, options=decoding, generator=draws
            )
            reached.append(target.met(compare(decoded, images)).cpu())
    if training is not None:
        warn_of_shared(training, torch.cat(hashes), "predicted lengths agree too well")
    keeps = torch.cat([found.keep for found in searched])
    met = torch.cat([found.met for found in searched])
    needed = needed_lengths(searched, tokenizer.num_tokens)
    follows, agrees = None, None
    if labels_count(dataset):
        follows = complexity(keeps, met, needed, torch.tensor(labels), options.seed)
    if predicts:
        guessed = torch.cat([found.keep for found in predicted])
        agrees = {
            "spearman": spearman(needed_lengths(predicted, tokenizer.num_tokens), needed),
            "mean_tokens": float(guessed.double().mean()),
            "met": int(torch.cat(reached).sum()),
            "seconds_per_picture": {
                name: value / len(keeps)
                for name, value in zip(("search", "prediction"), seconds, strict=True)
            },
        }
    reasons = [reason for found in searched for reason in found.reason]
    rows = zip(labels, keeps.tolist(), reasons, strict=True)
    return {
        "target": f"{target.metric}={target.value:g}",
        "count": len(keeps),
        "met": int(met.sum()),
        "decodes_per_picture": max(found.decodes for found in searched),
        "mean_tokens": float(keeps.double().mean()),
        "complexity": follows,
        "predicted": agrees,
        "pictures": [{"label": a, "keep": b, "reason": c} for a, b, c in rows],
    }


def needed_lengths(found: Sequence[Adaptive], num_tokens: int) -> Tensor:
    """Of all images, (n,) long: one that not even all tokens satisfy needs more than any that they
    do."""
    return torch.cat([torch.where(some.met, some.keep, 2 * num_tokens) for some in found])


def complexity(
    keeps: Tensor, met: Tensor, length: Tensor, labels: Tensor, seed: int
) -> dict[str, Any]:
    """Spearman's rank correlation of `length`, as needed_lengths returns it, and labels, all (n,),
    against the same with labels shuffled SHUFFLES times; and the mean of `keeps` for each label."""
    rng = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=rng) for _ in range(SHUFFLES)]
    value = spearman(length, labels)
    control = torch.tensor([spearman(length, labels[order]) for order in orders]).double()
    return {
        "spearman": value,
        "shuffled": {
            "shuffles": SHUFFLES,
            "first": float(control[0]),
            "mean": float(control.mean()),
            "std": float(control.std(correction=0)),
            "p_value": float((1 + (control.abs() >= abs(value)).sum()) / (1 + SHUFFLES)),
        },
        "by_label": {
            str(one): {
                "count": int((labels == one).sum()),
                "mean_tokens": float(keeps[labels == one].double().mean()),
                "met": float(met[labels == one].double().mean()),
            }
            for one in labels.unique().tolist()
        },
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two (n,) tensors; ties share their mean rank. 0 if one is constant."""
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(a.double(), b.double()))
