"""The main results of an evaluation as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_OF_IMAGES = {"attributes": "attributes", "embedding": "embeddings"}


def headlines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the main results as lines of text."""
    lines = []
    if "r2id" in metrics:
        condition = metrics["r2id"].get("condition")  # reports of before lack it
        under = f" under {_OF_IMAGES[condition]} of test images" if condition in _OF_IMAGES else ""
        for name, row in metrics["r2id"]["sizes"].items():
            accuracy = "" if row["accuracy"] is None else f" class accuracy {row['accuracy']:.3f},"
            distance = "" if row["frechet"] is None else f" Fréchet distance {row['frechet']:.3g},"
            lines.append(
                f"samples at {name}:{accuracy}{distance}".rstrip(",")
                + f" ({row['samples']} samples{under})"
            )
    if "guidance" in metrics:
        lines.append(_guidance_headline(metrics["guidance"]))
    if "neighbours" in metrics:
        near = metrics["neighbours"]
        lines.append(
            f"nearer to a training image than 1 % of the test images are: {near['near']:.1%} of "
            f"{near['samples']} samples"
        )
    if "classifier" in metrics:
        classifier = metrics["classifier"]
        lines.append(
            f"the classifier on real test images: {classifier['test_accuracy']:.4f} "
            f"({classifier['test_images']} images)"
        )
    if "invariance" in metrics:
        lines += _invariance_headlines(metrics["invariance"])
    if metrics["provenance"]["data"]["made_grey"]:
        lines.append(
            "the model is grey: images were made grey before anything was compared with them"
        )
    if "riae" not in metrics:
        return lines
    native = metrics["riae"]["native"]
    height, width = native["size"]
    return [
        *lines,
        f"RIAE at {height}x{width}: test MSE {native['mse']:.4f}, PSNR {native['psnr']:.2f} dB "
        f"({native['images']} images)",
    ]


def _guidance_headline(found: Mapping[str, Any]) -> str:
    scales = {row["guidance"]: row["frechet"] for row in found["scales"]}
    least = found["least_frechet"]
    alike = (
        f"; chance may make the difference to {', '.join(f'{scale:g}' for scale in found['alike'])}"
        if found["alike"]
        else ""
    )
    return (
        f"guidance {least:g} has the least Fréchet distance, {scales[least]:.3g}, of "
        f"{', '.join(f'{scale:g}' for scale in scales)} ({found['samples']} samples each){alike}"
    )


def _invariance_headlines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the worst result of all sizes, for each kind of result."""
    rows, riae = (found[name]["sizes"] if name in found else {} for name in ("r2id", "riae"))
    ratios = {
        name: row["accuracy"] / row["stretched"]["accuracy"]
        for name, row in rows.items()
        if row["accuracy"] is not None and row["stretched"]["accuracy"]
    }
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        yield (
            "lowest accuracy relative to real images stretched to the size: "
            f"{ratios[worst]:.3f} at {worst}"
        )
    for kind, pairs in (
        ("samples", {name: row["consistency"]["psnr"] for name, row in rows.items()}),
        ("reconstructions", {name: row["consistency"] for name, row in riae.items()}),
    ):
        if pairs:
            worst = min(pairs, key=lambda name: pairs[name])
            yield (
                f"lowest consistency of {kind} with twice the size: "
                f"{pairs[worst]:.2f} dB at {worst}"
            )
    if riae:
        relative = found["riae"]["half_to_double"]["relative"]
        yield (
            f"RIAE encoded at half and decoded at double size: {relative:.2f} times the native "
            "squared error"
        )
