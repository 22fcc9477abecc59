"""HTML for images: they travel inside the page as data, so no file is kept for them."""

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image

CSS = """
.ft-strip { display: flex; flex-wrap: wrap; gap: 0.6rem; align-items: flex-end; }
.ft-strip figure { margin: 0; text-align: center; align-self: flex-start; }
.ft-strip img { image-rendering: pixelated; border-radius: 6px; display: block; }
.ft-strip figcaption { font-size: 0.85rem; padding-top: 0.25rem; white-space: pre-line; }
"""


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(image: Image.Image, caption: str, width: int = 128, download: str = "") -> str:
    """An image `width` pixels wide with its caption; download: a file name, for a link to it."""
    url, text = data_url(image), html.escape(caption)
    name = html.escape(download, quote=True)
    link = f'<br><a href="{url}" download="{name}">download</a>' if download else ""
    return (
        f'<figure style="width: {width}px"><img src="{url}" alt="{text}" width="{width}">'
        f"<figcaption>{text}{link}</figcaption></figure>"
    )


def strip(figures: Iterable[str]) -> str:
    return f'<div class="ft-strip">{"".join(figures)}</div>'


def tokens(number: int) -> str:
    return f"{number} token{'s' if number != 1 else ''}"


# the field that pictures are dropped on; its script sends them as data
DROP = """
<label class="ft-drop"><input type="file" accept="image/*" aria-label="picture">
<span>Drop a picture here, or click to choose one</span><span class="ft-note" role="status"></span>
</label>"""
DROP_CSS = """
.ft-drop { display: flex; flex-direction: column; gap: 0.4rem; align-items: center;
  padding: 1.6rem; border: 2px dashed #999; border-radius: 10px; cursor: pointer;
  text-align: center; }
.ft-drop:hover, .ft-drop:focus-within { border-color: #e80; }
input { opacity: 0; height: 1px; width: 1px; }
.ft-note { color: #c00; }
"""
DROP_SCRIPT = """
const note = text => { element.querySelector('.ft-note').textContent = text; };
const send = file => {
  if (!file) return;
  if (file.size > MAX_BYTES) {
    note(`${file.name} is too large: ${(file.size / 2**20).toFixed(1)} MB, at most MAX_NAME`);
    return;
  }
  note('');
  const reader = new FileReader();
  reader.onload = () => { props.value = reader.result; trigger('submit'); };
  reader.onerror = () => note('the browser could not read that file');
  reader.readAsDataURL(file);
};
element.addEventListener('change', event => {
  send(event.target.files[0]);
  event.target.value = '';
});
for (const kind of ['dragover', 'drop']) {
  element.addEventListener(kind, event => {
    event.preventDefault();
    if (kind === 'drop') send(event.dataTransfer.files[0]);
  });
}
"""
