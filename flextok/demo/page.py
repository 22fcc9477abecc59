"""The page itself, in Gradio: what is where, and which click does what."""

import os
from collections.abc import Callable, Collection, Iterator
from functools import wraps
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import: nothing is sent anywhere

import gradio as gr
from fastapi import FastAPI

from flextok.data.emoji import Emoji
from flextok.demo.answers import bound_memory
from flextok.demo.guard import Guard
from flextok.demo.markup import (
    CSS,
    DROP,
    DROP_CSS,
    DROP_SCRIPT,
    figure,
    strip,
    tokens,
)
from flextok.demo.studio import (
    MAX_GUIDANCE,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    NO_CLASS,
    Settings,
    Studio,
    Voice,
)
from flextok.demo.upload import Limits, megabytes, read_picture

INTRO = """# FlexTok
A picture as a short sequence of tokens, coarse to fine: the first few are a picture already.
"""
HINT = "Drop a picture first, or take an emoji."
EXAMPLE = "a red heart on a blue background"
TARGET = 16.0  # dB, where the slider of the token need starts
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
SYSTEM_FONTS = ["system-ui", "sans-serif"]


def make_app(
    studio: Studio, limits: Limits, max_queue: int = 16, hosts: Collection[str] | None = ()
) -> Guard:
    """The page as an ASGI application. max_queue: clicks that may wait; more are told so. hosts:
    names to answer to, see Guard."""
    page = build_page(studio, limits).queue(max_size=max_queue, default_concurrency_limit=1)
    bound_memory(page)
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
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
    return Guard(app, limits.max_request, frozenset(page.fns), hosts)


def build_page(studio: Studio, limits: Limits) -> gr.Blocks:
    with gr.Blocks(title="FlexTok", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Tab("Reconstruct"):
            reconstruct_tab(studio, limits)
        for voice in studio.voices:
            with gr.Tab("From a prompt" if voice.reads_text else "From a class"):
                gr.Markdown(f"`{voice.name}`")
                generate_tab(voice)
    return page


def told(work: Callable) -> Callable:
    """A mistake in what the client sent becomes a message on the page."""

    @wraps(work)
    def wrapper(*arguments: Any) -> Iterator[Any]:
        try:
            yield from work(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return wrapper


def reconstruct_tab(studio: Studio, limits: Limits) -> None:
    total, width = studio.tokenizer.num_tokens, shown_width(studio.tokenizer)
    emoji = Emoji("validation")
    image = gr.State()  # the crop that the model sees; nothing larger is kept
    next_emoji = gr.State(0)
    with gr.Row():
        with gr.Column(scale=1):
            drop = drop_field(limits)
            example = gr.Button("Take an emoji")
            prefixes = len(studio.lengths) > 1
            slider = gr.Slider(
                1 if prefixes else total, total, total, step=1, label="Tokens", visible=prefixes
            )
            settings = decoder_settings(studio.tokenizer, studio.draws)
        with gr.Column(scale=2):
            result = gr.HTML(HINT, elem_id="result")
            gr.Markdown("### Filmstrip")
            film = gr.HTML(elem_id="filmstrip")
            with gr.Row(visible=studio.draws):
                several = gr.Button("Several seeds")
            seeds = gr.HTML(elem_id="seeds")
            with gr.Row(visible=prefixes):
                target = gr.Slider(5, 40, TARGET, step=0.5, label="PSNR asked for (dB)")
                ask = gr.Button("How many tokens does it need?")
            need = gr.Markdown(elem_id="need")

    @told
    def take(data: object) -> Iterator[Any]:
        # what was sent goes back empty: the session would keep it
        yield studio.crop(read_picture(data, limits)), "", "", ""

    @told
    def take_emoji(number: int) -> Iterator[Any]:
        yield studio.crop(emoji[number % len(emoji)]["image"]), "", "", number + 29

    @told
    def show(crop: Any, k: Any, *wishes: Any) -> Iterator[str]:
        if crop is None:
            yield HINT
            return
        made, quality = studio.reconstruct(crop, k, Settings(*wishes))
        yield strip(
            [
                figure(crop, "what the model sees", width),
                figure(made, f"{tokens(int(k))}, {quality:.1f} dB", width, f"flextok-{int(k)}.png"),
            ]
        )

    @told
    def show_film(crop: Any, *wishes: Any) -> Iterator[str]:
        if crop is None:
            return
        figures: list[str] = []
        for k, made, quality in studio.filmstrip(crop, Settings(*wishes)):
            figures.append(figure(made, f"{tokens(k)}\n{quality:.1f} dB", 76, f"flextok-{k}.png"))
            yield strip(figures)

    @told
    def show_seeds(crop: Any, k: Any, *wishes: Any) -> Iterator[str]:
        figures: list[str] = []
        for seed, made in studio.seeds(present(crop), k, Settings(*wishes)):
            figures.append(figure(made, f"seed {seed}", 96, f"flextok-{int(k)}-seed{seed}.png"))
            yield strip(figures)

    @told
    def show_need(crop: Any, value: Any, *wishes: Any) -> Iterator[str]:
        yield studio.need(present(crop), value, Settings(*wishes))

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


def generate_tab(voice: Voice) -> None:
    total, width = voice.generator.num_tokens, shown_width(voice.tokenizer)
    prefixes = len(voice.lengths) > 1
    own = voice.generator.config.generate
    with gr.Row():
        with gr.Column(scale=1):
            if voice.reads_text:
                wish: Any = gr.Textbox(
                    label="Prompt", max_lines=3, max_length=MAX_PROMPT, placeholder=EXAMPLE
                )
            else:
                names = [*voice.classes, NO_CLASS]
                wish = gr.Dropdown(names, value=names[0], label="Class")
            slider = gr.Slider(
                1 if prefixes else total, total, total, step=1, label="Tokens", visible=prefixes
            )
            every = gr.Checkbox(label="Show every token", visible=prefixes)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            guidance = gr.Slider(
                0, MAX_GUIDANCE / 3, own.guidance_scale, step=0.1, label="Guidance (1 = none)"
            )
            own_steps = getattr(own, "num_steps", None)  # MaskGIT's; a GPT takes one a token
            writing = gr.Slider(
                1, MAX_STEPS, own_steps, step=1, label="Steps", visible=own_steps is not None
            )
            steps = decoder_steps(voice.tokenizer)
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2):
            result = gr.HTML(elem_classes="ft-generated")
            film = gr.HTML(elem_classes="ft-grown")

    @told
    def grow(
        wish: Any, most: Any, every: Any, seed: Any, guidance: Any, writing: Any, steps: Any
    ) -> Iterator[tuple[str, str]]:
        settings = Settings(seed, writing if own_steps is not None else None, guidance)
        figures: list[str] = []
        for k, made in voice.grow(wish, settings, most, steps, bool(every)):
            name = f"flextok-{k}.png"
            figures.append(figure(made, tokens(k), 80))
            yield strip([figure(made, tokens(k), width, name)]), strip(figures)

    button.click(
        grow,
        [wish, slider, every, seed, guidance, writing, steps],
        [result, film],
        show_progress="minimal",
        **ONE_AT_A_TIME,
    )


def drop_field(limits: Limits) -> gr.HTML:
    script = DROP_SCRIPT.replace("MAX_BYTES", str(limits.max_bytes))
    return gr.HTML(
        html_template=DROP,
        css_template=DROP_CSS,
        js_on_load=script.replace("MAX_NAME", megabytes(limits.max_bytes)),
        elem_id="drop",
    )


def decoder_settings(tokenizer: Any, draws: bool) -> list[Any]:
    """Seed, steps and guidance, in the order of Settings."""
    own = getattr(tokenizer.config, "decode", None)
    scale = own.guidance_scale if draws and own is not None else 1
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, visible=draws)
    steps = decoder_steps(tokenizer)
    return [
        seed,
        steps,
        gr.Slider(0, MAX_GUIDANCE / 3, scale, step=0.1, label="Guidance (1 = none)", visible=draws),
    ]


def decoder_steps(tokenizer: Any) -> gr.Slider:
    draws = hasattr(tokenizer, "noise_shape")
    number = tokenizer.config.decode.num_steps if draws else None
    return gr.Slider(1, MAX_STEPS, number, step=1, label="Decoder steps", visible=draws)


def present(crop: Any) -> Any:
    if crop is None:
        raise ValueError(HINT)
    return crop


def shown_width(tokenizer: Any) -> int:
    """The width on the page: whole multiples of small pictures."""
    size = tokenizer.image_size
    return size * max(1, 256 // size)
