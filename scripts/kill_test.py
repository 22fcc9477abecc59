"""Kill a command at random moments, start it again each time, and compare what it leaves in the
end with what one run without a kill leaves.

    python scripts/kill_test.py --kills 20 -- \
        python train.py configs/quickstart_tokenizer.yaml trainer.max_steps=60 \
        trainer.checkpoint_every=10 trainer.validate_every=30 output_dir={out}
    python scripts/kill_test.py --compare "*.safetensors" manifest.json -- \
        flextok tokenize <tokenizer> emoji:train {out} --part-size 64 --variants 4
    python scripts/kill_test.py --compare report.json -- \
        flextok evaluate <tokenizer> emoji:validation --networks --output {out}

{out} stands for the output folder. All processes of the command die at once (kill -9). After each
kill every checkpoint in the folder must be intact. Prints a JSON report; exit code 1 if a start
failed or the results differ.

Before each single change of a file, not at random: FLEXTOK_CRASHES=all pytest tests/test_crashes.py
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flextok.training.checkpoints import list_checkpoints, verify


def launch(command: list[str], out: Path, log: Path) -> subprocess.Popen:
    arguments = [part.replace("{out}", str(out)) for part in command]
    with open(log, "ab") as file:
        return subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def run_for(process: subprocess.Popen, seconds: float | None) -> bool:
    """Whether the command ended by itself; else it is killed. Raises if it failed."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    if code:
        raise SystemExit(f"the command failed with exit code {code}: see its log")
    return True


def differing(reference: Path, out: Path, patterns: list[str]) -> tuple[int, list[str]]:
    """How many files the patterns name, and those that are not the same bytes (JSON: values)."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (reference, out)
        for pattern in patterns
        for path in folder.glob(pattern)
    }

    def content(path: Path) -> Any:
        if not path.exists():
            return None
        if path.suffix == ".json":
            return unmeasured(json.loads(path.read_text()))
        return path.read_bytes()

    return len(names), sorted(n for n in names if content(reference / n) != content(out / n))


def unmeasured(found: Any) -> Any:
    """What a JSON file holds, but for time and memory taken, which no two runs share."""
    if isinstance(found, list):
        return [unmeasured(entry) for entry in found]
    if isinstance(found, dict):
        taken = ("seconds", "peak_memory")
        kept = {k: v for k, v in found.items() if not any(word in k for word in taken)}
        return {key: unmeasured(value) for key, value in kept.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=float, default=0.0, help="seconds without kills")
    parser.add_argument("--compare", nargs="+", default=["*.safetensors"], metavar="PATTERN")
    parser.add_argument("--work", type=Path, help="where to write, by default a temporary folder")
    parser.add_argument("command", nargs="+", help="after --, with {out} for its output folder")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="kill-test-"))
    work.mkdir(parents=True, exist_ok=True)
    log = work / "log"
    begun = time.monotonic()
    run_for(launch(options.command, work / "reference", log), None)
    duration = time.monotonic() - begun
    print(f"without a kill: {duration:.1f} s; log: {log}", file=sys.stderr)
    draws = random.Random(options.seed)
    kills = runs = checkpoints = 0
    differences: list[str] = []
    while kills < options.kills:
        out = work / f"killed-{runs}"
        ended = False
        while not ended:
            moment = draws.uniform(options.skip, max(duration, options.skip))
            ended = run_for(
                launch(options.command, out, log), moment if kills < options.kills else None
            )
            kills += not ended
            for path in list_checkpoints(out / "checkpoints").values():
                verify(path)
                checkpoints += 1
        runs += 1
        count, different = differing(work / "reference", out, options.compare)
        if not count:
            raise SystemExit(f"{options.compare} match no file in {out}: nothing to compare")
        differences += [f"{out.name}/{name}" for name in different]
        print(f"{kills} kills, {runs} runs finished, {count} files compared", file=sys.stderr)
    report = {
        "command": options.command,
        "kills": kills,
        "runs_finished": runs,
        "checkpoints_verified": checkpoints,
        "damage_reported": log.read_text(errors="replace").count("damaged"),
        "files_that_differ": differences,
    }
    print(json.dumps(report, indent=2))
    raise SystemExit(1 if differences else 0)


if __name__ == "__main__":
    main()
