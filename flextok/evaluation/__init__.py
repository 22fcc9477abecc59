"""Evaluation: how good reconstructions and generations are, and by how many tokens.

    evaluate(tokenizer, dataset)                          reconstructions
    evaluate(generator, dataset, tokenizer=tokenizer)     generated images

An evaluator (evaluators.py) measures each image and computes scores from the rows of all. One
runner (runner.py) streams over real, reconstructed and generated images (sources.py) and writes
one report (report.py).
"""

from flextok.evaluation.evaluators import EVALUATORS, Evaluator, Rows, Setting
from flextok.evaluation.job import Cell, Options
from flextok.evaluation.runner import evaluate

__all__ = ["EVALUATORS", "Cell", "Evaluator", "Options", "Rows", "Setting", "evaluate"]
