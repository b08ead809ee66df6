"""Render the evaluation report: one HTML file that contains its style and figures.

It needs no other file and no network, so it can be moved anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from r2id.evaluation.html import figure, number, page, share, size_name, table
from r2id.evaluation.report_invariance import invariance_parts, reconstruction_cells

_MOST_CLASSES, _EXTREME_CLASSES = 50, 20  # of more classes, so many of both ends are shown

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
        parts += _guidance(metrics, pictures)
        parts += _neighbours(metrics, pictures)
    if "invariance" in metrics:
        parts += invariance_parts(metrics, pictures)
    if "riae" in metrics:
        parts += _riae(metrics["riae"], pictures)
    parts += _provenance(metrics["provenance"])
    return page(f"r2id: {metrics['provenance']['data']['dataset']}", parts)


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
    grey = (
        " The model has one colour channel: images were made grey before anything was compared "
        "with them."
        if data["made_grey"]
        else ""
    )
    return (
        f"<h1>{escape(data['dataset'])}: evaluation</h1>"
        f'<p class="sub">Sizes are height × width in pixels.{grey}</p>'
        f'<div class="cards">{shown}</div>'
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
        yield class_table(
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


def _guidance(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterable[str]:
    if "guidance" not in metrics:
        return
    found = metrics["guidance"]
    yield "<h3>Guidance</h3>" + figure("guidance", pictures)
    yield table(
        ["guidance", "class accuracy", *COMPARED.values()],
        [
            [
                f"{row['guidance']:g}",
                share(row["accuracy"]),
                *(
                    number(row[name]) + (_spread(row) if name == "frechet" else "")
                    for name in COMPARED
                ),
            ]
            for row in found["scales"]
        ],
    )
    yield (
        f'<p class="sub">{found["samples"]:,} samples of {size_name(found["size"])} at each scale, '
        "of the same seeds. All other figures are of samples with guidance "
        f"{found['least_frechet']:g}, whose Fréchet distance is the least. After ±: half the "
        "difference between the distances of two halves of the samples, which says how far chance "
        "moves it.</p>"
    )


def _spread(row: Mapping[str, Any]) -> str:
    return "" if row["frechet_spread"] is None else f" ± {row['frechet_spread']:.2g}"


def _neighbours(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterable[str]:
    found = metrics["neighbours"]
    known = found["test_images_in_training"]
    left_out = f" {known:,} more test images are among the training images." if known else ""
    yield "<h3>Nearest training images</h3>" + figure("neighbours", pictures)
    yield (
        f'<p class="sub">Of {found["samples"]:,} samples, {share(found["near"])} are nearer to one '
        f"of {found['training_images']:,} training images than 1 % of {found['test_images']:,} "
        "test images are: 1 % is what samples that repeat nothing have, and 100 % copies. Median "
        f"distance {number(found['median_distance'])}; of test images "
        f"{number(found['median_distance_of_test_images'])}.{left_out}</p>"
    )


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
        f"real training images are what perfect samples would have.{_fewer_note(metrics)} KID: "
        "kernel distance in the same features, for few images. Spectrum: mean absolute log ratio "
        "of the power at each spatial frequency to that of real images of the same size; blur and "
        "noise raise it. "
        f"Windows: {escape(provenance['rules']['windows'])}. "
        f"{sampling_note(sampling)}</p>"
    )


def sampling_note(sampling: Mapping[str, Any]) -> str:
    """Say how samples were drawn, in a sentence."""
    first, last = sampling["guidance_interval"]
    within = "" if (first, last) == (0, 1) else f" in times {first:g} to {last:g}"
    noise = f" with eta {sampling['eta']:g}" if sampling["eta"] else ""
    return (
        f"{sampling['steps']} steps of {sampling['solver']}{noise}, guidance "
        f"{sampling['guidance']:g} and autoguidance {sampling['autoguidance']:g}{within}."
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


def _fewer_note(metrics: Mapping[str, Any]) -> str:
    """Say what compares badly: fewer training images than samples, and fewer classes than all."""
    found, names = metrics["r2id"], metrics["provenance"]["data"]["class_names"]
    row, notes = next(iter(found["sizes"].values())), ""
    if found["real"]["training_images"] < row["samples"]:
        notes += (
            " There are fewer of them than samples, which makes their distances larger for that "
            "alone."
        )
    if row["classes"] and row["classes"] < len(names):
        notes += (
            f" Samples are of {row['classes']:,} of {len(names):,} classes, evenly spaced, which "
            "makes theirs larger: more samples show all."
        )
    return notes


def class_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Tabulate the accuracy by class: one column per size.

    Of many classes, only those with the lowest and highest accuracy at the first size are shown.
    """
    accuracy = rows[0]["accuracy_per_class"]
    shown = [number for number in range(len(names)) if accuracy[number] is not None]
    words = ""
    if len(shown) > _MOST_CLASSES:
        ordered = sorted(shown, key=lambda number: accuracy[number])
        shown = ordered[:_EXTREME_CLASSES] + ordered[-_EXTREME_CLASSES:]
        words = (
            f'<p class="sub">The {_EXTREME_CLASSES} lowest and highest of {len(ordered):,} classes '
            f"at {size_name(rows[0]['size'])}.</p>"
        )
    return (
        "<h3>Class accuracy by class</h3>"
        + table(
            ["class", *(size_name(row["size"]) for row in rows)],
            [
                [names[number], *(share(row["accuracy_per_class"][number]) for row in rows)]
                for number in shown
            ],
        )
        + words
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
                *reconstruction_cells(row, ""),
                number(row["frechet"]),
                *(reconstruction_cells(row, "_encoded") if "mse_encoded" in row else ["", "", ""]),
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


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
