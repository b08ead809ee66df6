"""The command as people use it: help, results, and one clear line for each mistake."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from PIL import Image

from r2id.cli.options import parse_size
from r2id.errors import InputError
from tests.conftest import CONFIGS, TINY_RIAE

COMMANDS = [
    "doctor",
    "prepare",
    "verify",
    "train",
    "encode",
    "sample",
    "reconstruct",
    "evaluate",
    "noise-shift",
    "run",
]


def test_every_command_has_help(r2id):
    code, out, _ = r2id("--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    for command in [*COMMANDS, "checkpoint show", "checkpoint verify", "checkpoint export"]:
        code, out, _ = r2id(*command.split(), "--help")
        assert code == 0 and "--json" in out


def test_the_version_is_that_of_the_installed_package(r2id):
    code, out, _ = r2id("--version")
    assert code == 0 and out.strip() == f"r2id {importlib.metadata.version('r2id')}"


def test_the_installed_command_reports_mistakes_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "r2id.cli", "verify", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr


def test_results_as_json(r2id, digits, riae_run, r2id_run, latents, tmp_path):
    code, out, _ = r2id("verify", digits, "--json")
    assert code == 0 and json.loads(out)["intact"] is True
    code, out, _ = r2id(
        "encode", "--riae", riae_run, "--shards", digits, "--out", latents, "--json"
    )
    assert code == 0 and json.loads(out)["reused"] == 1797
    code, out, errors = r2id(
        "sample",
        r2id_run,
        "--out",
        tmp_path / "s",
        "--size",
        "8x8",
        "--size",
        "12x9",
        "--count",
        4,
        "--steps",
        2,
        "--label",
        7,
        "--guidance",
        1.5,
        "--solver",
        "dpmpp_2m",
        "--seed",
        3,
        "--json",
    )
    result = json.loads(out)
    assert (
        code == 0
        and result["labels"] == [7] * 4
        and result["seeds"] == [3, 4, 5, 6]
        and len(result["files"]) == 2
    )
    grown = "12x9: drawn on 4x4 latent cells instead of 6x5, because training saw no larger grids"
    assert errors.count(" latent cells instead of ") == 1 and grown in errors
    many = [
        "sample",
        r2id_run,
        "--out",
        tmp_path / "many",
        "--format",
        "png",
        "--size",
        "5x4",
        "--count",
        3,
        "--steps",
        2,
    ]
    code, out, errors = r2id(*many)
    assert out == f"{tmp_path}/many: 3 samples of 5x4\n" and "latent cells" not in errors
    code, out, _ = r2id(*many, "--json")
    assert (
        code == 0
        and json.loads(out)["reused"] == 3
        and (tmp_path / "many" / "images" / "00000002.png").exists()
    )
    code, _, errors = r2id(*many, "--overwrite")
    assert code == 2 and "--overwrite" in errors and "--format png" in errors
    Image.new("L", (9, 7), 200).save(tmp_path / "in.png")
    code, out, _ = r2id(
        "reconstruct", riae_run, tmp_path / "in.png", "--out", tmp_path / "r.png", "--json"
    )
    assert code == 0 and (tmp_path / "r.png").exists()
    code, out, _ = r2id(
        "noise-shift",
        r2id_run,
        "--shards",
        digits,
        "--images",
        20,
        "--out",
        tmp_path / "shift",
        "--json",
    )
    assert code == 0 and json.loads(out) == json.loads(
        (tmp_path / "shift" / "noise-shift.json").read_text()
    )
    code, out, _ = r2id("train", r2id_run / "config.toml", "--json")
    assert code == 0 and json.loads(out)["step"] == 40


def test_checkpoint_commands(r2id, riae_run, r2id_run, tmp_path):
    code, out, _ = r2id("checkpoint", "show", r2id_run, "--json")
    assert code == 0 and json.loads(out)["stage"] == "r2id" and json.loads(out)["step"] == 40
    code, out, _ = r2id("checkpoint", "show", riae_run)
    assert code == 0 and "riae, step 60 of 60" in out and "samples     1920" in out
    assert "ema of decay 0.9" in out and "; 0 snapshots for other widths" in out
    assert "image 8x8 pixels in the median" in out and "files of 1 rank\n" in out
    code, out, _ = r2id("checkpoint", "show", r2id_run)
    assert "base_side 4 cells, where the noise schedule is not shifted" in out
    assert "areas 16 to 16 latent cells, ratios 1 to 1 height / width" in out
    file = tmp_path / "m.safetensors"
    code, out, _ = r2id(
        "checkpoint", "export", riae_run, "--out", file, "--dtype", "bfloat16", "--json"
    )
    assert code == 0 and json.loads(out)["bytes"] == file.stat().st_size
    code, out, _ = r2id("checkpoint", "verify", riae_run)
    assert code == 0 and out.endswith("step-00000060: intact\n")


def test_a_damaged_checkpoint_is_listed_refused_and_the_one_before_it_goes_on(
    r2id, digits, tmp_path
):
    train = [
        "train",
        CONFIGS / "digits" / "riae.toml",
        *TINY_RIAE,
        f"run={tmp_path}/run",
        f"data.shards={digits}",
        "train.save_every=2",
        "train.steps=4",
    ]
    assert r2id(*train)[0] == 0
    older, newer = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    for kind in ("ema", "optimizer"):
        data = bytearray((newer / f"{kind}.safetensors").read_bytes())
        data[-5] ^= 64
        (newer / f"{kind}.safetensors").write_bytes(data)
    code, out, _ = r2id("checkpoint", "verify", tmp_path / "run", "--json")
    result = json.loads(out)
    assert code == 1 and not result["intact"]
    assert [
        (newer / f"{kind}.safetensors").name in line
        for kind, line in zip(("ema", "optimizer"), result["damages"], strict=True)
    ] == [True, True]
    Image.new("L", (9, 7), 200).save(tmp_path / "in.png")
    reconstruct = [
        "reconstruct",
        tmp_path / "run",
        tmp_path / "in.png",
        "--out",
        tmp_path / "out.png",
    ]
    for command in ([*train, "train.steps=6"], reconstruct):
        code, out, errors = r2id(*command)
        assert code == 2 and out == "" and "Traceback" not in errors
        message = next(line for line in errors.splitlines() if line.startswith("error: "))
        assert "ema.safetensors: damaged" in message
        assert message.endswith(
            f"{older} is intact: name that one, or remove {newer} to go on from it"
        )
    assert r2id("reconstruct", older, *reconstruct[2:])[0] == 0
    for file in newer.iterdir():
        file.unlink()
    newer.rmdir()
    code, _, errors = r2id(*train, "train.steps=6")
    assert code == 0 and "going on from step 2" in errors


def test_data_stats_and_index(r2id, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = r2id("data", "stats", digits, "--batch", 100)
    assert code == 0 and "8x8      1438  100.0%     0.0%    100     62" in out
    assert "train: 1438 images in 1 shard," in out and "picture" not in out
    assert not list(tmp_path.iterdir()), "nothing is written unasked"
    code, out, _ = r2id(
        "data", "stats", digits, "--size", "4x2", "--out", tmp_path / "s.png", "--json"
    )
    assert (
        code == 0
        and json.loads(out)["splits"]["test"]["lost"] == 0.5
        and json.loads(out)["picture"] == str(tmp_path / "s.png")
    )
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 500
    code, out, _ = r2id("data", "index", digits, "--out", tmp_path / "index", "--json")
    assert code == 0 and json.loads(out)["samples"] == {"train": 1438, "test": 359}
    assert not list((tmp_path / "index").rglob("*.tar"))


def test_repair_from_the_command_line(r2id, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(4):
        Image.new("L", (5, 4 + number), 40 * number).save(source / f"{number}.png")
    assert r2id("prepare", "folder", "--source", source, "--out", tmp_path / "set")[0] == 0
    shard = tmp_path / "set/train/shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    assert r2id("verify", tmp_path / "set")[0] == 1
    code, out, _ = r2id("verify", tmp_path / "set", "--repair")
    assert code == 0 and shard.read_bytes() == whole
    assert out == f"train/shard-000000.tar: rebuilt\n{tmp_path / 'set'}: 4 images intact\n"


TRAIN = "train {configs}/digits/riae.toml run={tmp}/run"
SAMPLE = "sample {r2id} --out {tmp}/s.png --count 2 --steps 1"
EXPORT = "checkpoint export {riae} --out {tmp}/a.safetensors"
WINDOW = "reconstruct {riae} {tmp}/in.png --out {tmp}/o --size 30x50"
MISTAKES = {
    "source missing": ("prepare mnist --source {tmp}/none --out {tmp}/o", ["none"]),
    "source empty": ("prepare folder --source {tmp}/empty --out {tmp}/o", ["empty"]),
    "no shard set": (TRAIN + " data.shards={tmp}/empty", ["empty", "manifest.json"]),
    "unknown key": ("train {tmp}/typo.toml", ["batchh", "did you mean 'batch'"]),
    "wrong type": (TRAIN + " train.steps=soon", ["train.steps", "'soon'", "integer"]),
    "impossible value": (
        TRAIN + " train.batch=0",
        ["train.batch = 0", "greater than or equal to 1"],
    ),
    "config missing": ("train {tmp}/none.toml", ["none.toml", "no such config"]),
    "pipeline to train": ("train {configs}/digits/pipeline.toml", ["'pipeline'", "r2id run"]),
    "stage to run": ("run {configs}/digits/riae.toml", ["r2id run takes 'pipeline'"]),
    "sample of the other stage": ("sample {riae} --out {tmp}/s.png", ["stage 'riae', not 'r2id'"]),
    "encode of the other stage": (
        "encode --riae {r2id} --shards {digits} --out {tmp}/o",
        ["stage 'r2id', not 'riae'"],
    ),
    "no checkpoint": ("sample {tmp}/empty --out {tmp}/s.png", ["empty", "no checkpoint"]),
    "size 0x8": (SAMPLE + " --size 0x8", ["'0x8'", "HEIGHTxWIDTH"]),
    "size axb": (SAMPLE + " --size axb", ["'axb'", "HEIGHTxWIDTH"]),
    "size 64": (SAMPLE + " --size 64", ["'64'", "HEIGHTxWIDTH"]),
    "size -8x8": (SAMPLE + " --size=-8x8", ["'-8x8'", "HEIGHTxWIDTH"]),
    "label out of range": (SAMPLE + " --size 8x8 --label 10", ["label 10", "0 to 9"]),
    "text as image": ("reconstruct {riae} {tmp}/text.jpg --out {tmp}/o", ["text.jpg"]),
    "image missing": (
        "reconstruct {riae} {tmp}/none.jpg --out {tmp}/o",
        ["none.jpg", "no such file"],
    ),
    "window of three": (WINDOW + " --window 0,0,4", ["'0,0,4'", "y0,x0,y1,x1"]),
    "window of words": (WINDOW + " --window top,0,4,4", ["'top,0,4,4'", "y0,x0,y1,x1"]),
    "empty window": (WINDOW + " --window 4,0,4,4", ["window (4, 0, 4, 4)", "y0 < y1 ≤ 30"]),
    "window outside": (WINDOW + " --window 0,0,30,51", ["(0, 0, 30, 51)", "x1 ≤ 50", "30x50"]),
    "output exists": (
        "sample {r2id} --size 8x8 --out {tmp}/there.png",
        ["there.png", "exists already"],
    ),
    "output of another kind": (
        "sample {r2id} --out {tmp}/text.jpg",
        ["text.jpg", ".png file or a folder"],
    ),
    "interval of one": (
        SAMPLE + " --guidance-interval 0.2",
        ["--guidance-interval", "'0.2'", "LOW,HIGH"],
    ),
    "interval that falls": (
        "sample {r2id} --size 8x8 --out {tmp}/s.png --guidance-interval 0.9,0.1",
        ["guidance_interval", "[0.9, 0.1]"],
    ),
    "unknown dataset": ("prepare mnits --out {tmp}/o", ["'mnits'", "'mnist'"]),
    "unknown solver": (SAMPLE + " --solver rk9", ["rk9", "ddim"]),
    "checkpoint that is none": ("checkpoint show {tmp}/empty", ["empty", "no checkpoint"]),
    "export to another kind": (
        "checkpoint export {riae} --out {tmp}/there.png",
        ["there.png", ".safetensors file"],
    ),
    "export of a width that is none": (EXPORT + " --ema wide", ["'wide'", "default"]),
    "export of a width not tracked": (EXPORT + " --ema 0.1", ["one average", "train.ema_profiles"]),
    "export of an unknown type": (EXPORT + " --dtype int8", ["int8", "bfloat16"]),
    "shift of no R2ID": (
        "noise-shift {riae} --shards {digits} --out {tmp}/o",
        ["stage 'riae', not 'r2id'"],
    ),
    "unknown device": (SAMPLE + " --device tpu9", ["tpu9"]),
    "autoguidance without a guide": (
        "train {configs}/mnist/fast-r2id.toml run={tmp}/r sample.autoguidance=1.0",
        ["sample.autoguidance = 1.0", "train.guide_after"],
    ),
    "guide of an RIAE": (
        TRAIN + " data.shards={digits} train.guide_after=0.5",
        ["train.guide_after = 0.5", "stage 'r2id'"],
    ),
    "uneven batch": (
        TRAIN + " data.shards={digits} train.batch=10 train.micro_batch=4",
        ["train.batch = 10", "multiple of 4"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, r2id, digits, riae_run, r2id_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "there.png").write_text("precious")
    Image.new("L", (9, 7), 200).save(tmp_path / "in.png")
    (tmp_path / "typo.toml").write_text(
        (CONFIGS / "digits" / "riae.toml").read_text() + "\nbatchh = 3\n"
    )
    before = sorted(tmp_path.rglob("*"))
    command, words = MISTAKES[name]
    code, out, errors = r2id(
        *command.format(
            tmp=tmp_path, configs=CONFIGS, digits=digits, riae=riae_run, r2id=r2id_run
        ).split()
    )
    assert code == 2 and out == "" and "Traceback" not in errors
    assert all(word in " ".join(errors.split()) for word in words), errors
    assert (
        sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.png").read_text() == "precious"
    )


def test_sizes_are_height_by_width():
    assert parse_size("56x42") == (56, 42) and parse_size(" 8X9 ") == (8, 9)
    for text in ("56*42", "1x2x3", "1.5x2", "x", "", "8x", "٣x٣"):
        with pytest.raises(InputError):
            parse_size(text)
