"""The model card of a published model: README.md in the format of the Hugging Face Hub.

It says nothing that is not in the model or in the report of its evaluation, and its examples run as
they are printed, with the model's folder where its name says or from the hub.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r2id.models.coords import Size
from r2id.sampling.thumbnails import LADDER

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """What a card tells."""

    name: str
    """How the examples call the model: a folder or a hub id."""
    config: Facts
    """The content of config.json."""
    sizes: Sequence[Size]
    """Sizes of the thumbnails; none for an RIAE."""
    metrics: Facts | None
    """The content of a report's metrics.json."""
    plots: Sequence[str]
    """Names of the plots that were copied from the report."""

    @property
    def image(self) -> Size:
        """Median size of the training images."""
        height, width = self.config["image_size"]
        return height, width

    @property
    def example_size(self) -> Size:
        """A size unlike theirs in the median: taller, and larger where that is small."""
        factor = max(1, 32 // min(self.image))
        return 3 * factor * self.image[0] // 2, factor * self.image[1]

    @property
    def of_pixels(self) -> bool:
        """Whether this is an R2ID that diffuses pixels: it has neither decoder nor latents."""
        return "riae" not in self.config["parameters"]


def render(card: Card) -> str:
    """Write the card as Markdown, with the hub's metadata as YAML at its top."""
    draws = card.config["stage"] == "r2id"
    parts = [_metadata(card), f"# {card.name.rpartition('/')[2]}", *_introduction(card)]
    parts += ["## Use", *(_use_r2id(card) if draws else _use_riae(card))]
    parts += ["## Figures", *(_figures(card, card.metrics) if card.metrics else [_NO_FIGURES])]
    if draws:
        parts += ["## Samples", *_samples(card)]
    parts += ["## Training", *_training(card), "## Licence", _licence(card.config)]
    return "\n\n".join(parts) + "\n"


_NO_FIGURES = (
    "None: the model was exported without a report. `r2id evaluate` measures it against images."
)
_EMBEDDINGS = "embeddings.npy"
"""A file of the reader's own, which the examples read."""
_PLOTS = {
    "guidance": "Scales of guidance compared.",
    "loss_by_time": "Loss against time: 0 is data, 1 is noise.",
}


def _metadata(card: Card) -> str:
    config, draws = card.config, card.config["stage"] == "r2id"
    task = "unconditional-image-generation" if draws else "image-to-image"
    tags = ["r2id", "resolution-invariant", *(["diffusion"] if draws else ["autoencoder"])]
    return "\n".join(
        [
            "---",
            f"license: {config['license']}",
            *([f"license_name: {config['license_name']}"] if config["license_name"] else []),
            "library_name: r2id",
            f"pipeline_tag: {task}",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
        ]
    )


def _introduction(card: Card) -> Iterable[str]:
    counts = card.config["parameters"]
    riae = f"RIAE of {counts['riae']:,} parameters" if "riae" in counts else ""
    if card.config["stage"] == "riae":
        yield (
            f"A resolution-invariant autoencoder, an {riae}: it encodes pictures of any size and "
            f"decodes them at any other. Trained on images of {_trained_on(card)}. Sizes are "
            "height × width."
        )
        return
    where = f"the latents of an {riae}" if riae else "pixels"
    yield (
        f"A generator that draws pictures of any size and aspect ratio: an R2ID of "
        f"{counts['r2id']:,} parameters that diffuses {where}. Trained on images of "
        f"{_trained_on(card)}{_told(card)}. Sizes are height × width."
    )
    columns = ", ".join(map(_size, card.sizes))
    yield f"![The same seeds at many sizes](pictures/{LADDER})"
    yield f"*Each row is one seed, each column one size: {columns}.*"


def _trained_on(card: Card) -> str:
    """Say of which sizes the training images were, as far as the model knows it."""
    areas, ratios = card.config["latent_areas"], card.config["latent_ratios"]
    if areas is None:  # an RIAE
        return f"{_size(card.image)} pixels in the median"
    if areas[0] == areas[1] and ratios[0] == ratios[1]:
        return f"{_size(card.image)} pixels"
    cell = f"{card.config['downsample']:g}"
    unit = "pixels" if card.of_pixels else f"latent cells of {cell}×{cell} pixels"
    return (
        f"several sizes: {areas[0]} to {areas[1]} {unit}, height / width {ratios[0]:.3g} to "
        f"{ratios[1]:.3g}, in the median {_size(card.image)} pixels"
    )


def _told(card: Card) -> str:
    """Say what samples can be conditioned on."""
    config = card.config
    if config["condition"] == "class" and config["classes"]:
        names = config["class_names"]
        return f", with {config['classes']} classes" + (f": {', '.join(names)}" if names else "")
    if config["condition"] == "attributes":
        return f", with the attributes {', '.join(config['attributes'])}"
    if config["condition"] == "embedding":
        return f", with embeddings of shape {config['embedding_shape']}"
    return ", without conditions"


def _use_r2id(card: Card) -> Iterable[str]:
    height, width = card.example_size
    given, options = _condition(card.config)
    embeddings = card.config["condition"] == "embedding"
    file = ""
    if embeddings:
        shape = [2, *card.config["embedding_shape"]]
        file = f", with two embeddings in `{_EMBEDDINGS}`, floats of shape {shape}"
    yield f"With r2id installed{file}, in Python:"
    yield _block(
        "python",
        *(["import numpy as np", ""] if embeddings else []),
        "from r2id import Pipeline",
        "",
        f"pipe = Pipeline.from_pretrained({_quoted(card.name)})",
        f"images = pipe({given}size=({height}, {width}), seeds=[0, 1])  # height, width",
        'images[0].save("sample.png")',
    )
    yield "In the shell:"
    words = ["r2id", "sample", card.name, "--size", f"{height}x{width}", *options]
    yield _block("bash", shlex.join([*words, "--count", "2", "--out", "samples.png"]))
    if card.config["condition"] == "attributes":
        yield (
            "Several attributes may be given. A minus before a name, as in "
            f"`-{card.config['attributes'][0]}`, asks for pictures without it."
        )
    yield "One seed gives one composition, at every size. " + (
        "It is drawn in pixels, within the sizes that training saw, and the picture is then "
        "resized to the size asked for."
        if card.of_pixels
        else "The latent grid of a size is kept within the shapes that training saw, and the "
        "decoder renders it at the size asked for."
    )


def _condition(config: Facts) -> tuple[str, list[str]]:
    """Return what conditions the examples' pictures → (in Python's call, in the shell)."""
    if config["condition"] == "attributes":
        name = config["attributes"][0]
        return f"attributes=[{_quoted(name)}], ", ["--attribute", name]
    if config["condition"] == "embedding":
        return f"embeddings=np.load({_quoted(_EMBEDDINGS)}), ", ["--embedding", _EMBEDDINGS]
    names, classes = config["class_names"], config["classes"]
    labels = [names[label % classes] for label in (3, 7)] if classes else []
    given = f"labels={json.dumps(labels, ensure_ascii=False)}, " if labels else ""
    return given, [word for label in labels for word in ("--label", str(label))]


def _use_riae(card: Card) -> Iterable[str]:
    height, width = card.example_size
    yield "With r2id installed, in Python, with a picture of any size:"
    yield _block(
        "python",
        "from pathlib import Path",
        "",
        "from r2id.images import read_image, save_png",
        "from r2id.models.codec import Codec",
        "",
        f"codec = Codec.load({_quoted(card.name)})",
        'image = read_image(Path("picture.png"), codec.channels)  # [C, H, W] in [−1, 1]',
        "latents = codec.encode(image.unsqueeze(0))",
        f"decoded = codec.decode(latents, ({height}, {width}))  # height, width",
        'save_png(decoded[0], Path("decoded.png"))',
    )
    yield "In the shell:"
    words = ["r2id", "reconstruct", card.name, "picture.png", "--size", f"{height}x{width}"]
    yield _block("bash", shlex.join([*words, "--out", "reconstructed.png"]))


def _figures(card: Card, metrics: Facts) -> Iterable[str]:
    """Tabulate the report's figures, then how they were measured."""
    if card.config["stage"] == "riae":  # and the report is of an R2ID with it
        metrics = {name: metrics[name] for name in ("riae", "provenance")}
    rows = [*_sample_rows(metrics), *_reconstruction_rows(metrics)]
    yield _table(["measured", "images", "result"], rows)
    provenance = metrics["provenance"]
    data, software = provenance["data"], provenance["software"]
    date = f" on {software['date']}" if "date" in software else ""
    split = data.get("split", "test")  # reports of before lack it
    yield (
        f"Measured{date} with r2id {software['r2id']} and PyTorch {software['torch']} "
        f"({software['device']}) on the {split} images of `{data['dataset']}` "
        f"({data.get(f'{split}_images', 0):,}; digest `{data['digest'][:12]}`), by this command:"
    )
    yield _block("bash", shlex.join(_command(card, metrics)))
    if card.config["dtype"] != "float32":
        yield f"Measured in float32, before the weights were rounded to {card.config['dtype']}."
    judge = provenance.get("extractor")
    if judge and "r2id" in metrics:
        yield (
            f"Fréchet distances, precision and recall are in the features of {judge['name']} "
            f"(`{judge['hash'][:12]}`), so that they compare only with others in the same "
            "features. Those of real training images are what perfect samples would have."
        )
    for plot in card.plots:
        yield f"![{_PLOTS[plot]}](pictures/{plot}.png)\n\n*{_PLOTS[plot]}*"


def _sample_rows(metrics: Facts) -> Iterable[list[str]]:
    found = metrics.get("r2id", {})
    for row in found.get("sizes", {}).values():
        results = {
            "class accuracy": _number(row["accuracy"]),
            "Fréchet distance": _number(row["frechet"], ".3g"),
            "precision": _number(row["precision"]),
            "recall": _number(row["recall"]),
        }
        yield [f"samples, {_size(row['size'])}", f"{row['samples']:,}", _results(results)]
    real = found.get("real")
    if real:
        named = {
            "Fréchet distance": _number(real["frechet_of_training_images"], ".3g"),
            "precision": _number(real["precision_of_training_images"]),
            "recall": _number(real["recall_of_training_images"]),
        }
        yield ["real training images", f"{real['training_images']:,}", _results(named)]
    judge = metrics.get("classifier")
    if judge:
        accuracy = {"class accuracy": _number(judge["test_accuracy"])}
        yield ["real test images", f"{judge['test_images']:,}", _results(accuracy)]


def _reconstruction_rows(metrics: Facts) -> Iterable[list[str]]:
    row = metrics.get("riae", {}).get("native")
    if row:
        results = {"PSNR": f"{row['psnr']:.2f} dB", "SSIM": _number(row["ssim"])}
        yield [f"RIAE, {_size(row['size'])}", f"{row['images']:,}", _results(results)]


def _command(card: Card, metrics: Facts) -> list[str]:
    """Return the words of the command that measures the figures again."""
    provenance = metrics["provenance"]
    words = ["r2id", "evaluate", card.name, "--shards", f"data/{provenance['data']['dataset']}"]
    split = provenance["data"].get("split")
    if split not in (None, card.config["config"]["data"]["test_split"]):
        words += ["--split", split]
    sizes, sampling = metrics.get("r2id", {}).get("sizes", {}), provenance.get("sampling", {})
    words += [word for name in sizes for word in ("--size", name)]
    if sizes:
        count = next(iter(sizes.values()))["samples"]
        words += ["--count", f"{count}", "--seed", f"{sampling['first_seed']}"]
        for name in ("steps", "guidance", "autoguidance", "guidance_interval", "solver", "eta"):
            value = sampling.get(name)  # reports of before lack some
            if value is not None and not (name == "eta" and value == 0):
                text = ",".join(map(str, value)) if isinstance(value, list) else f"{value}"
                words += [f"--{name.replace('_', '-')}", text]
    judge = provenance.get("extractor", {})
    if judge.get("name") not in (None, "classifier", "self-supervised"):
        height, width = judge["size"]
        words += ["--extractor", judge["name"], "--extractor-size", f"{height}x{width}"]
    return [*words, "--out", "report"]


def _samples(card: Card) -> Iterable[str]:
    sample, guide = card.config["sampling"], card.config["guide"]
    shown = {
        "class": ", each class in turn" if card.config["classes"] else "",
        "attributes": ", drawn without a condition",
        "embedding": ", drawn without a condition",
        "none": "",
    }
    yield (
        f"Seeds from {sample['seed']} on{shown[card.config['condition']]}; "
        f"{sample['steps']} steps of {sample['solver']}, guidance {sample['guidance']:g}, "
        f"autoguidance {sample['autoguidance']:g}"
        + (f" away from the weights of step {guide['step']:,}" if guide else "")
        + ". Not chosen: "
        "the first that were drawn. Pixels of small pictures are shown as squares."
    )
    for height, width in card.sizes:
        yield f"{height}×{width}:\n\n![Samples of {height}×{width}](pictures/{height}x{width}.png)"


def _training(card: Card) -> Iterable[str]:
    named = {"riae": card.config["codec"], card.config["stage"]: card.config}
    rows = [
        [
            name.upper(),
            f"{trained['step']:,}",
            f"{trained['samples_seen']:,}",
            f"{trained['config']['seed']}",
        ]
        for name, trained in named.items()
        if trained
    ]
    yield _table(["model", "steps", "images seen", "seed"], rows)
    if card.metrics:
        measured = card.metrics["provenance"]
        data, same = measured["data"], measured[card.config["stage"]]["trained_on_this_data"]
        if same and "train_images" in data:
            yield f"Trained on {data['train_images']:,} images of `{data['dataset']}`."
    yield "All settings are in `config.json`, and in the file of the weights."


def _licence(config: Facts) -> str:
    if config["license_name"]:
        return (
            "Unspecified: whoever published this model has chosen none. Ask for permission before "
            "using it."
        )
    return f"`{config['license']}`"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # as in Python


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else f"{value:{form}}"


def _results(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items() if value)


def _block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
