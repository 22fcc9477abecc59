"""`flextok demo`: the web page."""

import argparse
from typing import Any

from flextok.cli.common import BY_CLASS, BY_PROMPT, TOKENIZER, add_command, pick_device


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        run_demo,
        "a web page to take pictures apart and grow new ones, on this machine",
        "Drop a picture and slide its number of tokens; with a generator, watch a picture of a "
        "class or a prompt grow token by token. The page is served to this machine only, works "
        "offline, keeps no files, and stops with Ctrl-C. Needs pip install 'flextok[demo]'.",
        "flextok demo\n"
        "flextok demo outputs/quickstart/tokenizer outputs/quickstart/generator --port 8000",
        "--device",
    )
    parser.add_argument(
        "models",
        nargs="*",
        default=[TOKENIZER, BY_CLASS, BY_PROMPT],
        metavar="MODEL",
        help="folders, names or hub ids: a tokenizer to reconstruct with, generators with theirs; "
        "default: those that come with the package",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows it to your network")
    parser.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names in a browser's address bar that the page answers to, beside this machine's own",
    )
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--max-megabytes", type=float, default=10, help="of one upload")
    parser.add_argument("--max-megapixels", type=float, default=40, help="of one upload")
    parser.add_argument("--queue", type=int, default=16, help="how many clicks may wait")


def run_demo(options: argparse.Namespace) -> None:
    print("starting the page: loading Gradio and the models ...", flush=True)
    try:
        from flextok.demo.guard import LOOPBACK
        from flextok.demo.page import make_app
        from flextok.demo.server import serve
        from flextok.demo.studio import Studio
        from flextok.demo.upload import Limits
    except ImportError as error:
        raise ValueError(f"the page needs Gradio: pip install 'flextok[demo]' ({error})") from None
    limits = Limits(int(options.max_megabytes * 2**20), int(options.max_megapixels * 1e6))
    studio = Studio(options.models, pick_device(options.device))
    # beyond this machine any address in digits is good: a name is what a stranger's page could own
    named = options.allow_host or options.host in LOOPBACK
    hosts = [*options.allow_host, options.host] if named else None
    serve(make_app(studio, limits, options.queue, hosts), options.host, options.port)
