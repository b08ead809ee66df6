"""The whole evaluation: what it writes, and what it refuses."""

import json
import re
import shutil

import pytest
from PIL import Image

from data_prep.prepare import prepare
from r2id.config import PrepareConfig, load_config
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation import self_supervised
from r2id.evaluation.headlines import headlines
from r2id.evaluation.noise_shift import measure_noise_shift
from r2id.evaluation.report import class_table, sampling_note
from r2id.evaluation.run import evaluate
from r2id.sampling.sampler import Sampler
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_R2ID, TINY_RIAE
from tests.evaluation import extractors
from tests.evaluation.folders import write_folder


@pytest.fixture(scope="module")
def evaluated(r2id_run, digits, classifier, classifier_file, tmp_path_factory):
    """(folder, what evaluate returned) of a small R2ID.

    The folder held a classifier and a figure of an earlier evaluation, and a user's picture.
    """
    out = tmp_path_factory.mktemp("evaluated") / "report"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "samples_9x9.png").write_bytes(b"old")
    (out / "metrics.json").write_text('{"figures": ["samples_9x9", "ladder"]}')
    (out / "figures" / "mine.png").write_bytes(b"mine")
    shutil.copy(classifier_file, out / "classifier.safetensors")
    return out, evaluate(r2id_run, digits, out, sizes=((8, 8), (12, 8), (8, 8)), count=40, seed=5)


def test_metrics_are_written_as_returned(evaluated, shards, classifier):
    out, metrics = evaluated
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert list(metrics["r2id"]["sizes"]) == ["8x8", "12x8"]
    assert metrics["classifier"]["test_accuracy"] == classifier.test_accuracy > 0.9
    facts = metrics["provenance"]
    assert facts["data"]["digest"] == shards.digest and facts["sampling"]["first_seed"] == 5
    assert facts["sampling"]["eta"] == 0
    assert facts["riae"]["steps"] == 60 and facts["r2id"]["steps"] == 40
    assert facts["riae"]["trained_on_this_data"] is True
    assert metrics["headlines"][0].startswith("samples at 8x8: class accuracy 0.")
    assert metrics["headlines"][-1].startswith("RIAE at 8x8: test MSE 0.")


def test_the_report_holds_everything(evaluated):
    out, metrics = evaluated
    html = (out / "report.html").read_text()
    assert (
        not re.search(r'(src|href)="(?!data:image/png;base64,)', html)
        and "http" not in html
        and "<script" not in html
    )
    assert (out / "figures" / "mine.png").read_bytes() == b"mine"
    files = {file.stem for file in (out / "figures").iterdir()} - {"mine"}
    assert files == set(metrics["figures"])
    assert files == {
        "reconstructions",
        "latents",
        "ladder",
        "neighbours",
        "samples_8x8",
        "samples_12x8",
        "real",
        "loss_by_time",
        "loss_by_grid",
        "failures_8x8",
        "failures_12x8",
    }
    assert files == set(re.findall(r'<figure id="([^"]+)"', html))
    for file in (out / "figures" / f"{name}.png" for name in files):
        with Image.open(file) as picture:
            picture.load()
            assert min(picture.size) > 100, file
    assert (
        metrics["provenance"]["r2id"]["identity"] in html
        and metrics["provenance"]["data"]["digest"] in html
    )


def test_again_gives_the_same(evaluated, r2id_run, digits):
    out, metrics = evaluated
    kept = (out / "classifier.safetensors").stat().st_mtime_ns
    again = evaluate(r2id_run, digits, out, sizes=((8, 8), (12, 8)), count=40, seed=5)
    assert again == metrics
    assert (out / "classifier.safetensors").stat().st_mtime_ns == kept


@pytest.fixture(scope="module")
def measured(r2id_run, digits, classifier_file, classifier, tmp_path_factory):
    """(folder, what evaluate returned) with invariance, in the features of a TorchScript file."""
    out = tmp_path_factory.mktemp("measured") / "report"
    out.mkdir()
    shutil.copy(classifier_file, out / "classifier.safetensors")
    file = extractors.write(extractors.Quarters(), out.parent / "quarters.pt")
    return out, evaluate(
        r2id_run,
        digits,
        out,
        count=10,
        seed=5,
        invariance=6,
        extractor=file,
        steps=3,
        guidance=1.25,
    )


def test_invariance_is_measured_and_shown(measured):
    out, metrics = measured
    found = metrics["invariance"]
    assert (
        list(found["r2id"]["sizes"]) == list(found["riae"]["sizes"])
        and "37x37" in found["riae"]["sizes"]
    )
    for row in found["r2id"]["sizes"].values():
        assert row["samples"] == 6 and row["frechet"] > 0 and row["stretched"]["patch_frechet"] > 0
    html = (out / "report.html").read_text()
    assert {f"invariance_{name}" for name in ("accuracy", "frechet", "patch_frechet")} <= set(
        re.findall(r'<figure id="([^"]+)"', html)
    )
    assert "37×37" in html and "Resolution invariance" in html
    assert sum("consistency" in line or "stretched" in line for line in metrics["headlines"]) == 3
    assert any("times the native squared error" in line for line in metrics["headlines"])


def test_every_figure_says_where_it_is_from(measured, shards, classifier):
    out, metrics = measured
    facts, extractor = metrics["provenance"]["figures"], metrics["provenance"]["extractor"]
    assert extractor["name"] == "quarters.pt" and extractor["size"] == [8, 8]
    assert (
        metrics["provenance"]["sampling"]["guidance"] == 1.25
        and metrics["provenance"]["sampling"]["steps"] == 3
    )
    html = (out / "report.html").read_text()
    for name, fact in facts.items():
        assert list(fact) == ["images", "seeds", "extractor", "resize", "reference"]
        assert name in html and fact["images"] and "bicubic" in fact["resize"], name
        assert ("samples" in name) == bool(re.fullmatch(r"5 to \d+", fact["seeds"])), name
    distance, accuracy = (
        facts[f"samples: {name}"]
        for name in ("Fréchet distances, precision, recall", "class accuracy, failures")
    )
    assert distance["extractor"] == f"quarters.pt {extractor['hash']}"
    assert accuracy["extractor"] == f"classifier {classifier.hash}"
    assert distance["reference"] == f"359 images of test split of {shards.digest}" and distance[
        "images"
    ].startswith("10 ")
    assert facts["invariance: samples: class accuracy, failures"]["images"] == "6 samples per size"


def test_guidance_is_swept(r2id_run, digits, classifier, classifier_file, tmp_path):
    out = tmp_path / "report"
    out.mkdir()
    shutil.copy(classifier_file, out / "classifier.safetensors")
    asked = {"count": 20, "seed": 5, "steps": 3}
    metrics = evaluate(r2id_run, digits, out, guidance=(0.0, 1.0, 4.0, 1.0), **asked)
    found = metrics["guidance"]
    distances = {row["guidance"]: row["frechet"] for row in found["scales"]}
    assert list(distances) == [0.0, 1.0, 4.0] and len(set(distances.values())) == 3
    least = found["least_frechet"]
    assert distances[least] == min(distances.values())
    assert metrics["provenance"]["sampling"]["guidance"] == least
    assert metrics["r2id"]["sizes"]["8x8"]["frechet"] == distances[least]
    assert any(f"guidance {least:g} has the least" in line for line in metrics["headlines"])
    assert all(row["frechet_spread"] > 0 for row in found["scales"])
    html = (out / "report.html").read_text()
    assert all(f" ± {row['frechet_spread']:.2g}<" in html for row in found["scales"])
    assert 'figure id="guidance"' in (out / "report.html").read_text()
    other = max(distances, key=lambda scale: distances[scale])
    alone = evaluate(r2id_run, digits, out, guidance=other, **asked)
    assert alone["r2id"]["sizes"]["8x8"]["frechet"] == pytest.approx(distances[other])
    assert "guidance" not in alone and not (out / "figures" / "guidance.png").exists()
    with pytest.raises(InputError, match="count 1"):
        evaluate(r2id_run, digits, out, count=1, guidance=(1.0, 2.0))


def test_an_riae_alone_in_the_features_of_a_file(riae_run, digits, tmp_path):
    file = extractors.write(extractors.Quarters(), tmp_path / "quarters.pt")
    metrics = evaluate(riae_run, digits, tmp_path / "report", extractor=file, invariance=3)
    assert metrics["riae"]["native"]["frechet"] > 0 and set(metrics["invariance"]) == {"riae"}
    with pytest.raises(InputError, match=r"none\.pt"):
        evaluate(riae_run, digits, tmp_path / "other", extractor=tmp_path / "none.pt")
    with pytest.raises(InputError, match="guidance"):
        evaluate(riae_run, digits, tmp_path / "other", guidance=2.0)
    assert not (tmp_path / "other").exists()


def test_an_riae_alone(riae_run, digits, tmp_path):
    metrics = evaluate(riae_run, digits, tmp_path / "new" / "report")
    assert "r2id" not in metrics and "classifier" not in metrics and len(metrics["headlines"]) == 1
    assert {path.name for path in (tmp_path / "new" / "report").iterdir()} == {
        "metrics.json",
        "report.html",
        "figures",
    }


def test_images_without_classes(tmp_path, monkeypatch):
    """No classes can be scored; all else is, in features that were learned without them."""
    monkeypatch.setattr(self_supervised, "_SEEN", 3 * 128)
    shards = write_folder(tmp_path, {"train": 40, "test": 6})
    riae, r2id = tmp_path / "riae", tmp_path / "r2id"
    few = [f"data.shards={shards}", "train.steps=2"]
    train(load_config(CONFIGS / "digits" / "riae.toml", [*TINY_RIAE, *few, f"run={riae}"]))
    config = tmp_path / "r2id.toml"
    text = (CONFIGS / "digits" / "r2id.toml").read_text()
    config.write_text(re.sub(r"(?m)^latents = .*\n", "", text))
    train(load_config(config, [*TINY_R2ID, *few, f"run={r2id}", f"codec={riae}"]))
    metrics = evaluate(r2id, shards, tmp_path / "report", count=4)
    assert set(metrics["r2id"]["loss_by_time"]["loss"]) == {"no class"}
    (row,) = metrics["r2id"]["sizes"].values()
    assert row["accuracy"] is None and row["frechet"] > 0 and "classifier" not in metrics
    assert metrics["provenance"]["extractor"]["name"] == "self-supervised"
    assert {"ladder", "samples_8x8", "neighbours"} <= {
        file.stem for file in (tmp_path / "report" / "figures").iterdir()
    }
    kept = (tmp_path / "report" / "extractor.safetensors").stat().st_mtime_ns
    again = evaluate(r2id, shards, tmp_path / "report", count=4)
    assert again == metrics
    assert (tmp_path / "report" / "extractor.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match=r"guidance 2\.0.*without conditions"):
        evaluate(r2id, shards, tmp_path / "other", count=4, guidance=(1.0, 2.0))


def test_what_it_refuses(r2id_run, riae_run, digits, tmp_path):
    (tmp_path / "file").write_text("")
    others = write_folder(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 2})
    out = tmp_path / "report"
    for checkpoint, shards, folder, named in [
        (riae_run, digits, tmp_path / "file", [tmp_path / "file"]),
        (tmp_path, digits, out, [tmp_path]),
        (riae_run, tmp_path, out, [tmp_path]),
        (r2id_run, others, out, [others, " 2 ", " 10"]),
    ]:
        with pytest.raises(InputError) as error:
            evaluate(checkpoint, shards, folder)
        assert all(str(name) in str(error.value) for name in named)
    assert not out.exists()


def test_a_model_without_conditions_on_images_of_classes(
    digits, riae_run, latents, r2id_run, tmp_path
):
    """A folder of one kind of image has one class, and its R2ID need not be told it."""
    settings = [f"data.shards={digits}", f"codec={riae_run}", f"data.latents={latents}"]
    config = load_config(
        CONFIGS / "digits" / "r2id.toml",
        [*TINY_R2ID, *settings, "train.steps=2", "r2id.condition=none", f"run={tmp_path / 'r2id'}"],
    )
    train(config)
    file = extractors.write(extractors.Quarters(), tmp_path / "quarters.pt")
    metrics = evaluate(
        config.run, digits, tmp_path / "report", count=4, guidance=1.0, extractor=file
    )
    (row,) = metrics["r2id"]["sizes"].values()
    assert row["accuracy"] is None and row["frechet"] > 0
    few = write_folder(tmp_path, {"train": 40, "test": 6})  # has no classes
    with pytest.raises(InputError, match=r"has 0 classes, and .* was trained with 10"):
        evaluate(r2id_run, few, tmp_path / "other", extractor=file)


def test_classes_of_other_names_are_refused(r2id_run, tmp_path):
    folders = {f"train/{name}": 1 for name in ("0", "1", "2", "3", "4", "5", "6", "7", "8", "ten")}
    shards = write_folder(tmp_path, {**folders, "test/ten": 2})
    with pytest.raises(InputError, match=r"class 9 is 'ten', and .* with '9' as class 9") as error:
        evaluate(r2id_run, shards, tmp_path / "report", count=2)
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()


def test_another_split_is_compared_with(r2id_run, riae_run, tmp_path):
    """The shards have no split ``test``, by which the models were trained."""
    folders = {f"train/{number}": 3 for number in range(10)}
    shards = write_folder(tmp_path, {**folders, "val/3": 4})
    assert set(ShardSet.open(shards).manifest.splits) == {"train", "val"}
    wrong = r"no split 'test': it has train, val: --split names"
    with pytest.raises(InputError, match=wrong):
        evaluate(riae_run, shards, tmp_path / "report")
    with pytest.raises(InputError, match=wrong):
        measure_noise_shift(r2id_run, shards, tmp_path / "shift")
    with pytest.raises(InputError, match="no split 'valid'"):
        evaluate(riae_run, shards, tmp_path / "report", split="valid")
    assert not (tmp_path / "report").exists()
    metrics = evaluate(riae_run, shards, tmp_path / "report", split="val")
    assert metrics["riae"]["native"]["images"] == 4
    assert metrics["provenance"]["data"]["split"] == "val"
    found = measure_noise_shift(r2id_run, shards, tmp_path / "shift", split="val")
    assert found["images"] == 4 and found["split"] == "val"


def test_too_few_images_are_told_before_anything_is_drawn(
    digits, riae_run, latents, tmp_path, monkeypatch
):
    settings = [f"data.shards={digits}", f"codec={riae_run}", f"data.latents={latents}"]
    config = load_config(
        CONFIGS / "digits" / "r2id.toml",
        [*TINY_R2ID, *settings, "train.steps=2", "r2id.condition=none", f"run={tmp_path / 'r2id'}"],
    )
    train(config)
    monkeypatch.setattr(Sampler, "latents", lambda *_, **__: pytest.fail("drawn"))
    shards = write_folder(tmp_path, {"train": 2, "test": 4})
    with pytest.raises(InputError, match="'train' has 2 images"):
        evaluate(config.run, shards, tmp_path / "report", count=4)
    shards = write_folder(tmp_path / "one", {"train": 4, "test": 1})
    with pytest.raises(InputError, match="'test' has 1 image; --invariance"):
        evaluate(config.run, shards, tmp_path / "report", count=4, invariance=2)


def test_a_grey_model_says_that_colour_was_left_out(riae_run, tmp_path):
    grey = write_folder(tmp_path / "grey", {"train/a": 2, "test/a": 4})
    said = "The model has one colour channel"
    for coloured in (False, True):
        if coloured:
            for number, file in enumerate((tmp_path / "grey" / "source").rglob("*.png")):
                with Image.open(file) as picture:
                    picture.convert("RGB").save(file)  # grey still
                if number == 3:
                    Image.new("RGB", (8, 8), (200, 40, 40)).save(file)
            grey = prepare(
                PrepareConfig(
                    dataset="folder", source=tmp_path / "grey" / "source", out=tmp_path / "other"
                )
            )
        metrics = evaluate(riae_run, grey, tmp_path / "report")
        assert metrics["provenance"]["data"]["made_grey"] is coloured
        assert (said in (tmp_path / "report" / "report.html").read_text()) == coloured
        assert any("the model is grey" in line for line in metrics["headlines"]) == coloured


def test_the_headline_names_scales_within_chance():
    rows = [{"guidance": g, "frechet": f} for g, f in ((1.0, 2.0), (1.5, 1.1), (2.0, 1.0))]
    found = {"scales": rows, "least_frechet": 2.0, "samples": 40, "alike": [1.5]}
    metrics = {"guidance": found, "provenance": {"data": {"made_grey": False}}}
    (line,) = headlines(metrics)
    assert line.endswith("(40 samples each); chance may make the difference to 1.5")
    (line,) = headlines({**metrics, "guidance": {**found, "alike": []}})
    assert line.endswith("(40 samples each)")


def test_many_classes_are_shown_by_the_lowest_and_highest():
    names = [f"class-{number}" for number in range(200)]
    accuracy = [(number * 7 % 200) / 200 for number in range(200)]
    row = {"size": [8, 8], "accuracy_per_class": [None, *accuracy[1:]]}
    html = class_table([row], names)
    shown = {int(number) for number in re.findall(r"class-(\d+)<", html)}
    ordered = sorted(range(1, 200), key=lambda number: accuracy[number])
    assert shown == {*ordered[:20], *ordered[-20:]} and "of 199 classes" in html
    html = class_table([{**row, "accuracy_per_class": accuracy[:50]}], names[:50])
    assert all(f"{name}<" in html for name in names[:50]) and "lowest" not in html


def test_the_report_says_how_samples_were_drawn():
    plain = {"steps": 9, "solver": "ddim", "guidance": 2.0, "autoguidance": 0.0, "eta": 0.0}
    note = "9 steps of ddim, guidance 2 and autoguidance 0"
    assert sampling_note({**plain, "guidance_interval": [0, 1]}) == f"{note}."
    within = {**plain, "guidance_interval": [0.2, 0.8], "eta": 0.5}
    note = note.replace("ddim", "ddim with eta 0.5")
    assert sampling_note(within) == f"{note} in times 0.2 to 0.8."
