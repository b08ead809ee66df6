"""Score samples at several scales of classifier-free guidance, and find the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from r2id.config import change
from r2id.evaluation.classifier import Classifier
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.r2id import Samples, score_samples
from r2id.evaluation.reference import METRICS, ImageFeatures

MEASURED = ("accuracy", *METRICS, "frechet_spread")


def sweep_guidance(
    samples: Samples,
    scales: Sequence[float],
    classifier: Classifier | None,
    extractor: FeatureExtractor,
    real: ImageFeatures,
) -> tuple[Samples, dict[str, Any]]:
    """Score samples of the training images' size, with the same seeds at every scale.

    Returns the samples with the least Fréchet distance to ``real``, and the scores of each scale,
    with the spread of that distance (frechet_spread). ``alike`` are the other scales whose distance
    is larger by no more than the spread of either.
    ``samples`` must be at least 2.
    """
    sampler, rows, drawn = samples.sampler, [], []
    for scale in scales:
        guided = replace(sampler, defaults=change(sampler.defaults, {"guidance": scale}))
        drawn.append(samples.drawn_by(guided))
        scores = score_samples(
            drawn[-1], classifier, extractor, real, sampler.codec.image, spread=True
        )
        rows.append({"guidance": scale, **{name: scores[name] for name in MEASURED}})
    least = min(range(len(rows)), key=lambda number: rows[number]["frechet"])
    best = rows[least]
    return drawn[least], {
        "size": list(sampler.codec.image),
        "samples": len(samples),
        "scales": rows,
        "least_frechet": scales[least],
        "alike": [
            row["guidance"]
            for row in rows
            if row is not best
            and row["frechet"] - best["frechet"]
            <= max(row["frechet_spread"] or 0, best["frechet_spread"] or 0)
        ],
    }
