"""Train a tokenizer or a generator: python train.py configs/<file>.yaml [key=value ...]"""

import sys

from flextok.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
