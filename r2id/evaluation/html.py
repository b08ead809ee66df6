"""Parts of the HTML report: page, pictures, tables and numbers."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff;
       max-width: 78rem; margin: 2rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin-bottom: 0 }
h2 { margin: 2.4rem 0 .4rem; border-bottom: 1px solid #d8dbe0 }
h3 { margin: 1.6rem 0 .3rem; font-size: 1.05rem }
.sub, figcaption { color: #5b6470 }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.card { border: 1px solid #d8dbe0; border-radius: .5rem; padding: .6rem 1rem; min-width: 9rem }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #e7e9ed }
td { white-space: nowrap } th { vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
thead th { color: #5b6470; font-weight: 600 }
figure { margin: 1rem 0 } figcaption { font-size: .92rem; margin-top: .3rem }
img { max-width: 100%; height: auto } img.pixels { image-rendering: pixelated }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr));
         gap: 1rem; align-items: end }
.facts td, .facts th { text-align: left; white-space: normal; overflow-wrap: anywhere }
"""

_CAPTIONS = {
    "reconstructions": "Test images (top), and RIAE's reconstructions at their own size and at "
    "others. The latents are always those of the own size.",
    "latents": "Latents of the same images, as they come out of the encoder.",
    "ladder": "One seed and one class per row, at every size of the columns.",
    "loss_by_time": "Loss against time on test images. The distance between the curves shows how "
    "much the class helps.",
    "real": "For comparison, real test images.",
    "loss_by_grid": "Loss against logSNR on test latents of three grids. Where the curves "
    "coincide, denoising is equally hard on every grid.",
    "invariance_accuracy": "Class accuracy by size.",
    "invariance_frechet": "Fréchet distance to real test images by size.",
    "invariance_patch_frechet": "Fréchet distance of windows to windows of real test images, by "
    "size.",
    "guidance": "Scores by the scale of guidance, at the size of the training images. Dotted: real "
    "training images. The grey line marks the least Fréchet distance.",
    "neighbours": "The first samples, each followed by the training images that are nearest to it "
    "in the features, with the distances.",
}


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page, which needs no other file."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def size_name(size: Sequence[int]) -> str:
    """Format a size (height, width): (42, 28) → '42×28'."""
    return f"{size[0]}×{size[1]}"


def figure(name: str, pictures: Mapping[str, bytes], caption: str = "") -> str:
    """Return the HTML of a picture with its caption; empty when there is no such picture."""
    if name not in pictures:
        return ""
    caption = escape(caption or _CAPTIONS[name])
    data = base64.b64encode(pictures[name]).decode()
    style = ' class="pixels"' if name == "real" or name.startswith("samples_") else ""
    return (
        f'<figure id="{escape(name)}">'
        f'<img{style} src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the HTML of a table, which scrolls sideways if it is too wide."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def share(value: float | None) -> str:
    """Format a share in percent; empty for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Format a number with four digits; empty for None."""
    return "" if value is None else f"{value:.4g}"
