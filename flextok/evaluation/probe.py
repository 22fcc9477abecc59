"""Linear probe: how well the first k codes predict an image's class, the tokenizer frozen.

Multinomial logistic regression on the code vectors of a prefix, standardised and side by side, with
an L2 penalty, fitted to its optimum (L-BFGS, float64): nothing is drawn.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.evaluation.job import Options
from flextok.evaluation.metrics import image_hashes, warn_of_shared
from flextok.evaluation.sources import Images, batches
from flextok.tokenizers.base import Tokenizer, encode_rows, prefix_lengths

L2 = 1e-2  # of the mean loss, on standardised codes
ONE_CLASS = (
    "the {} training images are all of one class: nothing to predict; give images of two classes "
    "at least (folders, labels)"
)


def linear_probe(
    tokenizer: Tokenizer,
    train: Any,
    test: Any,
    options: Options,
    lengths: list[int] | None = None,
) -> dict[str, Any]:
    """Class accuracy on `test` from the first k codes of each image, for k = 1, 2, 4, ... all.

    train, test: data sets with the same class_names. Beside each accuracy stand that of a probe
    trained on shuffled labels and, once, the share of test's most frequent class: what no code at
    all gives. Raises ValueError for data of different classes, and of a single one."""
    names = [list(part.class_names) for part in (train, test)]
    if names[0] != names[1]:
        raise ValueError(f"train and test have different classes: {names[0][:5]}, {names[1][:5]}")
    lengths = lengths or prefix_lengths(tokenizer.num_tokens)
    known = getattr(train, "labels", None)
    if known is not None and len(set(map(str, known))) < 2:
        raise ValueError(ONE_CLASS.format(len(train)))
    train_codes, train_labels, seen = codes_of(tokenizer, train, options)
    if len(train_labels.unique()) < 2:
        raise ValueError(ONE_CLASS.format(len(train_labels)))
    test_codes, test_labels, held_out = codes_of(tokenizer, test, options)
    warn_of_shared(seen, held_out, "the accuracy is too high")
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(options.seed))
    results = []
    for k in lengths:
        x, y = (codes[:, :k].flatten(1) for codes in (train_codes, test_codes))
        mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
        x, y = (x - mean) / std, (y - mean) / std
        fitted = fit(x, train_labels)
        control = fit(x, train_labels[order])
        results.append(
            {
                "num_tokens": k,
                "accuracy": accuracy(fitted, y, test_labels),
                "train_accuracy": accuracy(fitted, x, train_labels),
                "shuffled_accuracy": accuracy(control, y, test_labels),
            }
        )
    most = test_labels == train_labels.mode().values
    return {
        "train_count": len(train_labels),
        "test_count": len(test_labels),
        "classes": len(names[0]),
        "most_frequent_class": float(most.double().mean()),
        "penalty": L2,
        "results": results,
    }


def codes_of(tokenizer: Tokenizer, dataset: Any, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Code vectors (n, K, C) float64, labels (n,) and hashes (n,) of all readable images."""
    codes, labels, hashes = [], [], []
    source = Images(dataset, tokenizer.image_size)
    for batch in batches(source, options, "encoding"):
        found = encode_rows(tokenizer, batch["image"], options.seed, batch["index"])
        if not found.is_floating_point():
            found = tokenizer.quantizer.indices_to_codes(found)
        codes.append(found.cpu().double())
        labels.append(batch["label"])
        hashes.append(image_hashes(batch["image"]))
    return torch.cat(codes), torch.cat(labels), torch.cat(hashes)


def fit(x: Tensor, labels: Tensor) -> Tensor:
    """x: (n, D) float64; labels: (n,). Returns weights and, last, the bias: (D + 1, classes)."""
    weights = torch.zeros(x.shape[1] + 1, int(labels.max()) + 1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scores(weights, x), labels)
        value = value + L2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def scores(weights: Tensor, x: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]


def accuracy(weights: Tensor, x: Tensor, labels: Tensor) -> float:
    return float((scores(weights, x).argmax(dim=-1) == labels).double().mean())


def format_table(report: dict[str, Any]) -> str:
    lines = ["tokens  accuracy  shuffled labels"]
    lines += [
        f"{r['num_tokens']:6d}  {r['accuracy']:8.3f}  {r['shuffled_accuracy']:15.3f}"
        for r in report["results"]
    ]
    lines.append(
        f"{report['classes']} classes, {report['train_count']} + {report['test_count']} images; "
        f"the most frequent class alone: {report['most_frequent_class']:.3f}"
    )
    return "\n".join(lines)
