"""Render the evaluation report: one HTML file that contains its style and figures.

It needs no other file and no network, so it can be moved anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff;
       max-width: 70rem; margin: 2rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin-bottom: 0 }
h2 { margin: 2.4rem 0 .4rem; border-bottom: 1px solid #d8dbe0 }
h3 { margin: 1.6rem 0 .3rem; font-size: 1.05rem }
.sub, figcaption { color: #5b6470 }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.card { border: 1px solid #d8dbe0; border-radius: .5rem; padding: .6rem 1rem; min-width: 9rem }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #e7e9ed;
         white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { color: #5b6470; font-weight: 600 }
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
}

COMPARED = {
    "frechet": "Fréchet",
    "patch_frechet": "Fréchet of windows",
    "kid": "KID",
    "spectrum": "spectrum",
    "precision": "precision",
    "recall": "recall",
}


def render(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Render the HTML from the result of r2id.evaluation.run.evaluate, and PNG figures by name."""
    parts = [_head(metrics)]
    if "r2id" in metrics:
        parts += _r2id(metrics, pictures)
    if "invariance" in metrics:
        parts += _invariance(metrics, pictures)
    if "riae" in metrics:
        parts += _riae(metrics["riae"], pictures)
    parts += _provenance(metrics["provenance"])
    title = escape(f"r2id: {metrics['provenance']['data']['dataset']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def size_name(size: Sequence[int]) -> str:
    """Format a size (height, width): (42, 28) → '42×28'."""
    return f"{size[0]}×{size[1]}"


def _head(metrics: Mapping[str, Any]) -> str:
    data = metrics["provenance"]["data"]
    cards = [
        (
            f"PSNR of RIAE at {size_name(found['native']['size'])}",
            f"{found['native']['psnr']:.1f} dB",
        )
        for name, found in metrics.items()
        if name == "riae"
    ]
    if "r2id" in metrics:
        cards = [
            *(
                (f"class accuracy of samples at {size_name(row['size'])}", share(row["accuracy"]))
                for row in metrics["r2id"]["sizes"].values()
                if row["accuracy"] is not None
            ),
            *cards,
        ]
    if "classifier" in metrics:
        cards.append(
            (
                "the same classifier on real test images",
                share(metrics["classifier"]["test_accuracy"]),
            )
        )
    shown = "".join(
        f'<div class="card"><b>{value}</b>{escape(name)}</div>' for name, value in cards
    )
    return (
        f"<h1>{escape(data['dataset'])}: evaluation</h1>"
        f'<p class="sub">Sizes are height × width in pixels.</p><div class="cards">{shown}</div>'
    )


def _r2id(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterable[str]:
    found = metrics["r2id"]
    yield "<h2>R2ID: images from noise</h2>"
    if found["sizes"]:
        yield _samples_table(metrics)
    yield figure("ladder", pictures)
    grids = [
        figure(name, pictures, f"Samples at {name.removeprefix('samples_').replace('x', '×')}.")
        for name in pictures
        if name.startswith("samples_")
    ]
    yield f'<div class="grids">{"".join(grids)}{figure("real", pictures)}</div>'
    if "classifier" in metrics:
        yield _class_table(
            list(found["sizes"].values()), metrics["provenance"]["data"]["class_names"]
        )
        yield "<h3>Failures</h3>"
        yield from (
            figure(
                name,
                pictures,
                f"Samples at {name.removeprefix('failures_').replace('x', '×')} with the lowest "
                "probability of the class asked for: that class, its probability, and the class "
                "that the classifier chose.",
            )
            for name in pictures
            if name.startswith("failures_")
        )
    yield f"<h3>Loss against time</h3>{figure('loss_by_time', pictures)}"
    losses = found["loss_by_time"]
    yield table(
        ["t", *(f"given {name}" for name in losses["loss"])],
        [
            [f"{time:g}", *(f"{curve[k]:.4f}" for curve in losses["loss"].values())]
            for k, time in enumerate(losses["time"])
        ],
    )
    yield f'<p class="sub">{losses["images"]:,} test images, the same noise for all curves.</p>'
    yield figure("loss_by_grid", pictures)


def _samples_table(metrics: Mapping[str, Any]) -> str:
    real, provenance = metrics["r2id"]["real"], metrics["provenance"]
    sampling, extractor = provenance["sampling"], provenance["extractor"]
    rows = [
        [
            size_name(row["size"]),
            size_name(row["grid"]),
            f"{row['samples']:,}",
            share(row["accuracy"]),
            *(number(row[name]) for name in COMPARED),
        ]
        for row in metrics["r2id"]["sizes"].values()
    ]
    rows.append(
        [
            "real training images",
            "",
            f"{real['training_images']:,}",
            "",
            *(number(real[f"{name}_of_training_images"]) for name in COMPARED),
        ]
    )
    return table(["size", "latent grid", "images", "class accuracy", *COMPARED.values()], rows) + (
        f'<p class="sub">{_classifier_note(metrics)} Fréchet distances, precision and recall '
        f"(k = 3) are to {real['test_images']:,} real test images in the features of "
        f"{escape(extractor['name'])}, whose input is {size_name(extractor['size'])}; those of "
        "real training images are what perfect samples would have. Windows have half the height "
        f"and width. {sampling['steps']} steps of {sampling['solver']}, guidance "
        f"{sampling['guidance']:g}.</p>"
    )


def _classifier_note(metrics: Mapping[str, Any]) -> str:
    if "classifier" not in metrics:
        return ""
    classifier = metrics["classifier"]
    return (
        "Class accuracy is measured by a classifier that was trained on real images only, "
        f"{classifier['train_images']:,} of the training split. Its own accuracy is "
        f"{share(classifier['test_accuracy'])} on {classifier['test_images']:,} test images. "
        f"Samples are resized to its input, {size_name(classifier['size'])}."
    )


def _class_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    return "<h3>Class accuracy by class</h3>" + table(
        ["class", *(size_name(row["size"]) for row in rows)],
        [
            [name, *(share(row["accuracy_per_class"][k]) for row in rows)]
            for k, name in enumerate(names)
        ],
    )


def _invariance(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterable[str]:
    found, rules = metrics["invariance"], metrics["provenance"]["rules"]
    yield (
        "<h2>Whether the resolution matters</h2>"
        f'<p class="sub">Sizes: {escape(rules["invariance_sizes"])}.</p>'
    )
    if "r2id" in found:
        rows = found["r2id"]["sizes"].values()
        yield table(
            [
                "size",
                "latent grid",
                "accuracy",
                "of real",
                *(word for name in ("Fréchet", "of windows") for word in (name, "of real")),
                "precision",
                "recall",
                "consistency",
                "same class",
            ],
            [
                [
                    size_name(row["size"]),
                    size_name(row["grid"]),
                    *(
                        words(side[name])
                        for name, words in (
                            ("accuracy", share),
                            ("frechet", number),
                            ("patch_frechet", number),
                        )
                        for side in (row, row["stretched"])
                    ),
                    number(row["precision"]),
                    number(row["recall"]),
                    f"{row['consistency']['psnr']:.2f} dB",
                    share(row["consistency"]["same_class"]),
                ]
                for row in rows
            ],
        )
        yield _invariance_words(found["r2id"])
        yield from (figure(name, pictures) for name in pictures if name.startswith("invariance_"))
    if "riae" in found:
        yield from _reconstructions(found["riae"])


def _reconstructions(found: Mapping[str, Any]) -> Iterable[str]:
    yield "<h3>Reconstructions</h3>" + table(
        ["size", "images", "MSE", "PSNR", "SSIM", "Fréchet", "consistency"],
        [
            [
                size_name(row["size"]),
                f"{row['images']:,}",
                *_reconstruction(row, ""),
                number(row["frechet"]),
                f"{row['consistency']:.2f} dB",
            ]
            for row in found["sizes"].values()
        ],
    )
    half = found["half_to_double"]
    yield (
        '<p class="sub">Encoded at the native size and decoded at each; the truth is the image '
        "resized by a bicubic filter. Consistency: PSNR of the image decoded at twice the size, "
        "averaged down, against the one decoded at the size. Encoded at half and decoded at double "
        "the size, the "
        f"squared error is {half['mse']:.4f}, {half['relative']:.2f} times that at the native "
        f"size, {half['native_mse']:.4f}.</p>"
    )


def _invariance_words(found: Mapping[str, Any]) -> str:
    row = next(iter(found["sizes"].values()))
    return (
        f'<p class="sub">{row["samples"]:,} samples per size. Of real: '
        f"{row['stretched']['images']:,} real test images, stretched to the size and scored in the "
        "same way. All pictures are then resized to the input of the feature extractor, whatever "
        f"their aspect ratio. Both are compared with {found['reference_images']:,} other real test "
        f"images. Consistency: PSNR of the same {row['consistency']['samples']:,} seeds at twice "
        "the size, averaged down, against those at the size, and the share that is classified the "
        "same at both.</p>"
    )


def _riae(found: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterable[str]:
    yield "<h2>RIAE: images to latents and back</h2>"
    yield table(
        [
            "size",
            "",
            "images",
            "MSE from own size",
            "PSNR",
            "SSIM",
            "Fréchet",
            "MSE from this size",
            "PSNR",
            "SSIM",
        ],
        [
            [
                name,
                size_name(row["size"]),
                f"{row['images']:,}",
                *_reconstruction(row, ""),
                number(row["frechet"]),
                *(_reconstruction(row, "_encoded") if "mse_encoded" in row else ["", "", ""]),
            ]
            for name, row in found.items()
        ],
    )
    yield (
        '<p class="sub">Means over test images, with values in [−1, 1]. From own size: latents of '
        "the original image, decoded at this size. From this size: latents of the image resized to "
        "this size, with the same number of cells. The truth is the image resized by a bicubic "
        "filter; Fréchet distances are to the original images.</p>"
    )
    yield figure("reconstructions", pictures)
    yield figure("latents", pictures)


def _reconstruction(row: Mapping[str, Any], kind: str) -> list[str]:
    return [f"{row[f'mse{kind}']:.4f}", f"{row[f'psnr{kind}']:.2f} dB", f"{row[f'ssim{kind}']:.4f}"]


def _provenance(facts: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>How each figure was made</h2>"
    figures = facts["figures"]
    names = list(next(iter(figures.values())))
    each = table(["figure", *names], [[name, *row.values()] for name, row in figures.items()])
    yield f'<div class="facts">{each}</div>'
    rows = [
        [f"{part}: {name.replace('_', ' ')}", _words(value)]
        for part, values in facts.items()
        if part != "figures"
        for name, value in values.items()
    ]
    yield f'<div class="facts">{table([], rows)}</div>'


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


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
