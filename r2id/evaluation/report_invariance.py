"""The section of the report on resolution invariance, and cells of reconstructions' figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from r2id.evaluation.html import figure, number, share, size_name, table


def invariance_parts(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterable[str]:
    """Yield the section's parts from the result of r2id.evaluation.run.evaluate."""
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
                *reconstruction_cells(row, ""),
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


def reconstruction_cells(row: Mapping[str, Any], kind: str) -> list[str]:
    """Format MSE, PSNR and SSIM of a row; ``kind`` ends the names of the figures."""
    return [f"{row[f'mse{kind}']:.4f}", f"{row[f'psnr{kind}']:.2f} dB", f"{row[f'ssim{kind}']:.4f}"]
