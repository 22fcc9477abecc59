"""Reconstruct pictures or generate by class: python sample.py <model> [options], --help for all."""

import sys

from flextok.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
