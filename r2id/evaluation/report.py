"""Render the evaluation report: one HTML file that contains its style and figures.

It needs no other file and no network, so it can be moved anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from r2id.evaluation.html import figure, number, page, share, size_name, table

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
        parts += _invariance(metrics, pictures)
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
                *(number(row[name]) for name in COMPARED),
            ]
            for row in found["scales"]
        ],
    )
    yield (
        f'<p class="sub">{found["samples"]:,} samples of {size_name(found["size"])} at each scale, '
        "of the same seeds. All other figures are of samples with guidance "
        f"{found['least_frechet']:g}, whose Fréchet distance is the least.</p>"
    )


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
        "real training images are what perfect samples would have. KID: kernel distance in the "
        "same features, for few images. Spectrum: mean absolute log ratio of the power at each "
        "spatial frequency to that of real images of the same size; blur and noise raise it. "
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
        "<h2>Resolution invariance</h2>"
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


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
