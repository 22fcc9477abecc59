"""The page itself, in Gradio: what is where, and which click does what."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import wraps
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import: nothing is sent anywhere

import gradio as gr
from fastapi import Depends, FastAPI
from PIL import Image

from flextok.demo.guard import Guard
from flextok.demo.markup import CSS, DROP, DROP_CSS, DROP_SCRIPT, figure, strip, tokens
from flextok.demo.messages import bound_memory, message_check
from flextok.demo.studio import MAX_PROMPT, MAX_SEED, Pair, Studio
from flextok.demo.upload import Limits, megabytes, read_picture
from flextok.emoji.datasets import Emoji
from flextok.tokenizers.base import Tokenizer

INTRO = """# FlexTok
A picture as a short sequence of tokens, coarse to fine: the first few are a picture already.
"""
HINT = "Drop a picture first, or take an emoji."
LEGEND = (
    "Plausible: sharpness over your picture's (1 is right, less is blurred). Faithful: PSNR in dB, "
    "which counts at all tokens; few tokens leave much open."
)
EXAMPLE = "a red heart on a blue background"
TARGET = 16.0  # dB, where the slider of the token need starts
MAX_STEPS, MAX_SCALE = 100, 10  # of what a client may ask for
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
SYSTEM_FONTS = ["system-ui", "sans-serif"]


def make_app(
    studio: Studio, limits: Limits, max_queue: int = 16, hosts: Collection[str] | None = ()
) -> Guard:
    """The page as an ASGI application. max_queue: clicks that may wait; more are turned away.
    hosts: names to answer to, see Guard."""
    page = build_page(studio, limits).queue(max_size=max_queue, default_concurrency_limit=1)
    bound_memory(page)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        app_kwargs={"dependencies": [Depends(message_check(frozenset(page.fns)))]},
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    return Guard(app, limits.max_request, hosts)


def build_page(studio: Studio, limits: Limits) -> gr.Blocks:
    with gr.Blocks(title="FlexTok", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Tab("Reconstruct"):
            reconstruct_tab(studio, limits)
        for pair in studio.pairs:
            with gr.Tab("From a prompt" if pair.reads_text else "From a class"):
                gr.Markdown(f"`{pair.name}`")
                generate_tab(pair)
    return page


def answering(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """`work`, whose ValueErrors, which are mistakes of a client, become messages on the page."""

    @wraps(work)
    def wrapper(*arguments: Any) -> Iterator[Any]:
        try:
            yield from work(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return wrapper


def reconstruct_tab(studio: Studio, limits: Limits) -> None:
    width, draws = shown_width(studio.tokenizer), studio.tokenizer.stochastic
    prefixes = len(studio.lengths) > 1
    emoji = Emoji("validation")
    image = gr.State()  # the crop that the model sees; nothing larger is kept
    next_emoji = gr.State(0)
    with gr.Row():
        with gr.Column(scale=1):
            drop = gr.HTML(
                html_template=DROP,
                css_template=DROP_CSS,
                js_on_load=DROP_SCRIPT.replace("MAX_BYTES", str(limits.max_bytes)).replace(
                    "MAX_NAME", megabytes(limits.max_bytes)
                ),
                elem_id="drop",
            )
            example = gr.Button("Take an emoji")
            slider = tokens_slider(studio.tokenizer.num_tokens, prefixes)
            scale = vars(studio.tokenizer.decode_defaults).get("guidance_scale", 1.0)
            settings: list[gr.Number | gr.Slider] = [
                seed_field(draws),
                decoder_steps(studio.tokenizer),
                guidance_slider(scale, draws),
            ]
        with gr.Column(scale=2):
            result = gr.HTML(HINT, elem_id="result")
            gr.Markdown(f"### Filmstrip\n{LEGEND}")
            film = gr.HTML(elem_id="filmstrip")
            with gr.Row(visible=draws):
                several = gr.Button("Several seeds")
            seeds = gr.HTML(elem_id="seeds")
            with gr.Row(visible=prefixes):
                target = gr.Slider(5, 40, TARGET, step=0.5, label="PSNR asked for (dB)")
                ask = gr.Button("How many tokens does it need?")
            need = gr.Markdown(elem_id="need")

    @answering
    def take(data: object) -> Iterator[tuple[Image.Image, str, str, str]]:
        # what was sent goes back empty: the session would keep it
        yield studio.crop(read_picture(data, limits)), "", "", ""

    @answering
    def take_emoji(number: int) -> Iterator[tuple[Image.Image, str, str, int]]:
        yield studio.crop(emoji[number % len(emoji)]["image"]), "", "", number + 29

    @answering
    def show(crop: Image.Image | None, k: int, *asked: Any) -> Iterator[str]:
        if crop is None:
            yield HINT
            return
        made, quality = studio.reconstruct(crop, k, *asked)
        seen = figure(crop, "what the model sees", width)
        caption = f"{tokens(int(k))}\n{quality.caption(long=True)}"
        yield strip([seen, figure(made, caption, width, f"flextok-{int(k)}.png")])

    @answering
    def show_film(crop: Image.Image | None, *asked: Any) -> Iterator[str]:
        yield from growing(
            figure(made, f"{tokens(k)}\n{quality.caption()}", 76, f"flextok-{k}.png")
            for k, made, quality in (studio.filmstrip(crop, *asked) if crop else ())
        )

    @answering
    def show_seeds(crop: Image.Image | None, k: int, *asked: Any) -> Iterator[str]:
        yield from growing(
            figure(made, f"seed {number}", 96, f"flextok-{int(k)}-seed{number}.png")
            for number, made in studio.seeds(present(crop), k, *asked)
        )

    @answering
    def show_need(crop: Image.Image | None, value: float, *asked: Any) -> Iterator[str]:
        yield studio.need(present(crop), value, *asked)

    taken = [
        drop.submit(take, drop, [image, seeds, need, drop], **ONE_AT_A_TIME),
        example.click(take_emoji, next_emoji, [image, seeds, need, next_emoji], **ONE_AT_A_TIME),
    ]
    shown: dict[str, Any] = {"fn": show, "inputs": [image, slider, *settings], "outputs": result}
    filmed: dict[str, Any] = {"fn": show_film, "inputs": [image, *settings], "outputs": film}
    for event in taken:
        event.success(**shown, **ONE_AT_A_TIME).success(**filmed, **ONE_AT_A_TIME)
    latest: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
    gr.on([part.change for part in (slider, *settings)], **shown, **latest, **ONE_AT_A_TIME)
    gr.on([part.change for part in settings], **filmed, **latest, **ONE_AT_A_TIME)
    several.click(show_seeds, [image, slider, *settings], seeds, **ONE_AT_A_TIME)
    ask.click(show_need, [image, target, *settings], need, **ONE_AT_A_TIME)


def generate_tab(pair: Pair) -> None:
    width, prefixes = shown_width(pair.tokenizer), len(pair.lengths) > 1
    own = vars(pair.generator.generate_defaults)
    with gr.Row():
        with gr.Column(scale=1):
            asked: list[gr.Component] = [
                gr.Textbox(label="Prompt", max_lines=3, max_length=MAX_PROMPT, placeholder=EXAMPLE)
                if pair.reads_text
                else gr.Dropdown(pair.classes, value=pair.classes[0][1], label="Class"),
                tokens_slider(pair.generator.num_tokens, prefixes),
                gr.Checkbox(label="Show every token", visible=prefixes),
                seed_field(),
                guidance_slider(own["guidance_scale"]),
                # a generator that writes its indices in order predicts one a step
                gr.State(None) if pair.generator.streams else steps_slider("Steps", own),
                decoder_steps(pair.tokenizer),
            ]
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2):
            result = gr.HTML(elem_classes="ft-generated")
            film = gr.HTML(elem_classes="ft-grown")

    @answering
    def grow(condition: str | int, *asked: Any) -> Iterator[tuple[str, str]]:
        figures: list[str] = []
        for k, made in pair.grow(condition, *asked):
            figures.append(figure(made, tokens(k), 80))
            yield strip([figure(made, tokens(k), width, f"flextok-{k}.png")]), strip(figures)

    button.click(grow, asked, [result, film], show_progress="minimal", **ONE_AT_A_TIME)


def growing(figures: Iterable[str]) -> Iterator[str]:
    """A strip of the first figure, of the first two, ..."""
    shown: list[str] = []
    for one in figures:
        shown.append(one)
        yield strip(shown)


def tokens_slider(total: int, prefixes: bool) -> gr.Slider:
    low = 1 if prefixes else total
    return gr.Slider(low, total, total, step=1, label="Tokens", visible=prefixes)


def seed_field(visible: bool = True) -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, visible=visible)


def guidance_slider(scale: float, visible: bool = True) -> gr.Slider:
    label = "Guidance (1 = none)"
    return gr.Slider(0, MAX_SCALE, scale, step=0.1, label=label, visible=visible)


def steps_slider(label: str, own: dict[str, Any], visible: bool = True) -> gr.Slider:
    return gr.Slider(1, MAX_STEPS, own.get("num_steps"), step=1, label=label, visible=visible)


def decoder_steps(tokenizer: Tokenizer) -> gr.Slider:
    return steps_slider("Decoder steps", vars(tokenizer.decode_defaults), tokenizer.stochastic)


def present(crop: Image.Image | None) -> Image.Image:
    if crop is None:
        raise ValueError(HINT)
    return crop


def shown_width(tokenizer: Tokenizer) -> int:
    """The width on the page: whole multiples of small pictures."""
    size = tokenizer.image_size
    return size * max(1, 256 // size)
