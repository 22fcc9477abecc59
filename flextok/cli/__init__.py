"""The commands of `flextok`; train.py and sample.py are two of them, uninstalled. arguments.py
states what each takes, the modules beside it do the work; options.py and common.py they share."""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType

from flextok import __version__
from flextok.cli.arguments import COMMANDS
from flextok.cli.options import AnyOrder, Incomplete, add_command, write_json
from flextok.files import check_writable
from flextok.printing import PrintableFormatter, one_line

DESCRIPTION = "Images as short, ordered token sequences."
EXIT = "exit codes: 0 well, 1 a user's mistake, named in one line, 2 wrong usage, 130 interrupted"


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 well, 1 a user's mistake (named in one line), 130
    interrupted. Wrong usage raises SystemExit(2)."""
    # on a busy machine OpenMP's default of spinning threads can slow small models down 20 times
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may be no text of its encoding
            stream.reconfigure(errors="backslashreplace")
    options = make_parser().parse_args(arguments)
    try:
        with interruptible_imports():
            run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `flextok ... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"flextok: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flextok: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def interruptible_imports() -> Iterator[None]:
    """Ctrl-C while something is imported ends the process at once. KeyboardInterrupt would leave
    half a module behind, and libraries catch it there."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, b"flextok: interrupted; run the same command again to continue\n")
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(options: argparse.Namespace) -> None:
    """Run the command; with --json write what it returns, or what an Incomplete reports. JSON on
    standard output stands there alone: what people read goes to standard error."""
    asked = vars(options).get("json")
    if asked not in (None, "-"):
        check_writable(asked, "--json")
    failure: Incomplete | None = None
    with warnings.catch_warnings():
        # a command reads its images in [-1, 1], so a guess that bright ones are not would be wrong
        warnings.filterwarnings("ignore", message="images (are|span .*) all bright")
        with contextlib.redirect_stdout(sys.stderr if asked == "-" else sys.stdout):
            try:
                report = options.run(options)
            except Incomplete as error:
                report, failure = error.report, error
    if asked is not None and report is not None:  # None: another process writes it
        write_json(asked, report)
    if failure:
        raise failure


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flextok", description=DESCRIPTION, epilog=EXIT)
    parser.add_argument("--version", action="version", version=f"flextok {__version__}")
    commands = parser.add_subparsers(
        required=True,
        metavar="command",
        help="flextok <command> --help explains each command",
        parser_class=AnyOrder,
    )
    for name, (kind, work) in COMMANDS.items():
        add_command(commands, name, kind, work)
    return parser
