"""`flextok demo`: the web page."""

from flextok.cli.arguments import Demo
from flextok.cli.common import pick_device


def run_demo(options: Demo) -> None:
    print("starting the page: loading the models ...", flush=True)
    try:
        from flextok.demo.guard import LOOPBACK
        from flextok.demo.page import make_app
        from flextok.demo.server import serve
        from flextok.demo.studio import Studio
        from flextok.demo.upload import Limits
    except ImportError as error:
        raise ValueError(
            f"the page needs a web server: pip install 'flextok[demo]' ({error})"
        ) from None
    limits = Limits(int(options.max_megabytes * 2**20), int(options.max_megapixels * 1e6))
    studio = Studio(options.models, pick_device(options.device))
    # beyond this machine any address in digits is good: a name is what a stranger's page could own
    addresses = options.host not in LOOPBACK
    hosts = [*options.allow_host, options.host]
    app = make_app(studio, limits, options.queue, hosts, addresses)
    serve(app, options.host, options.port)
