"""Peak memory of `flextok evaluate` by number of images.

The pass holds one batch; the scores hold one network's features in float64, several times over.

python benchmarks/evaluation_memory.py MODEL [--counts 1000 5000 20000] [options of evaluate]

Each count runs in a process of its own, on emoji_scenes, with EfficientNet-Lite0's features.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 20000])
    options, more = parser.parse_known_args()
    print("  images  peak MiB  seconds")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "flextok.cli", "evaluate", options.model]
            command += ["emoji_scenes:validation", "--limit", str(count), "--output", folder]
            command += ["--networks", "efficientnet_lite0", *more]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            run = json.loads((Path(folder) / "report.json").read_text())["run"]
        print(f"{count:8d}  {run['peak_memory_mib']:8.0f}  {run['seconds']:7.0f}", flush=True)


if __name__ == "__main__":
    main()
