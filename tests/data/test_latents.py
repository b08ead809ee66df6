"""The latent cache equals encoding on the fly; stale or damaged caches are refused."""

import re

import pytest
import torch

from r2id.config import DataConfig
from r2id.data.latent_writer import LatentWriter
from r2id.data.latents import MANIFEST, LatentCache, latent_loader, verify_latents
from r2id.data.loader import eval_loader, image_loader
from r2id.data.manifest import SplitEntry, shard_file
from r2id.data.shard_writer import write_shard_files
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError
from r2id.images import to_float
from r2id.training.encode import _find_missing
from tests.data.conftest import write_set

CODEC, CHANNELS = "c" * 64, 2


def encoded(images):
    """Stands in for a codec: two channels on a grid of half the size, a function of the pixels."""
    halves = torch.nn.functional.adaptive_avg_pool2d(
        images, [max(1, side // 2) for side in images.shape[-2:]]
    )
    return torch.cat([halves, -3 * halves], 1)


def writer_of(folder, shards, data, codec=CODEC, **options):
    writer = LatentWriter(
        folder,
        shards,
        data,
        codec_hash=codec,
        codec_path="runs/riae",
        latent_channels=CHANNELS,
        **options,
    )
    writer.prepare()
    return writer


def write_cache(folder, shards, data, stop_after=None, codec=CODEC, **options):
    writer = writer_of(folder, shards, data, codec, **options)
    written = 0
    for split, files in writer.files.items():
        for number in range(len(files)):
            if writer.done(split, number):
                continue
            if written == stop_after:
                return written
            indices = shards.split(split).indices_in_shard(number)
            found = {}
            for batch in eval_loader(shards, data, split, 6, indices=indices):
                latents = encoded(batch["image"])
                if data.flip:
                    latents = torch.stack([latents, encoded(batch["image"].flip(-1))], 1)
                found.update(zip(batch["index"].tolist(), latents, strict=True))
            writer.write(split, number, [found[index] for index in indices])
            written += 1
    writer.finish()
    return written


@pytest.fixture
def data(mixed):
    return DataConfig(shards=mixed.folder)


ARGUMENTS = {
    "split": "train",
    "batch": 12,
    "micro_batch": 3,
    "seed": 1,
    "start_step": 4,
    "total_steps": 25,
    "rank": 1,
    "world_size": 2,
}


def test_the_cache_gives_the_same_batches_as_encoding_on_the_fly(mixed, data, tmp_path):
    write_cache(tmp_path / "cache", mixed, data)
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    steps = zip(
        latent_loader(cache, mixed, data, **ARGUMENTS),
        image_loader(mixed, data, **ARGUMENTS),
        strict=True,
    )
    for cached, live in steps:
        for one, two in zip(cached, live, strict=True):
            assert torch.equal(one["latent"], encoded(to_float(two["image"])))
            assert torch.equal(one["label"], two["label"]) and torch.equal(
                one["index"], two["index"]
            )
            assert one["sample_ids"] == two["sample_ids"]


def test_a_mirrored_cache_mirrors_the_samples_that_are_mirrored_on_the_fly(mixed, data, tmp_path):
    flip = data.model_copy(update={"flip": True})
    write_cache(tmp_path / "cache", mixed, flip)
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    assert verify_latents(tmp_path / "cache") == []
    mirrored = 0
    for one, two, plain in zip(
        *(latent_loader(cache, mixed, wanted, **ARGUMENTS) for wanted in (flip, data)),
        image_loader(mixed, flip, **ARGUMENTS),
        strict=True,
    ):
        for turned, same, image in zip(one, two, plain, strict=True):
            assert torch.equal(turned["latent"], encoded(to_float(image["image"])))
            mirrored += int((turned["latent"] != same["latent"]).flatten(1).any(1).sum())
    samples = 6 * (ARGUMENTS["total_steps"] - ARGUMENTS["start_step"])
    assert 0.3 * samples < mirrored < 0.7 * samples


def test_mirroring_takes_a_cache_of_mirrored_images(mixed, data, tmp_path):
    write_cache(tmp_path / "cache", mixed, data)
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    assert "mirrored" not in (tmp_path / "cache" / MANIFEST).read_text()  # as in older caches
    with pytest.raises(InputError, match=r"flip = True: .*cache holds no latents of mirrored"):
        cache.check(data.model_copy(update={"flip": True}))
    with pytest.raises(InputError, match="mirrored is False, not True"):
        writer_of(tmp_path / "cache", mixed, data.model_copy(update={"flip": True}))


def test_loader_processes_give_the_same(mixed, data, tmp_path):
    write_cache(tmp_path / "cache", mixed, data)
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    alone, helped = (
        list(latent_loader(cache, mixed, data.model_copy(update={"workers": workers}), **ARGUMENTS))
        for workers in (0, 1)
    )
    assert all(
        torch.equal(a["latent"], b["latent"])
        for one, two in zip(alone, helped, strict=True)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(("dtype", "relative"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_half_precision_takes_half_the_space_and_its_own_cache(
    mixed, data, tmp_path, dtype, relative
):
    write_cache(tmp_path / "half", mixed, data, dtype=dtype)
    write_cache(tmp_path / "full", mixed, data)
    half, full = (
        LatentCache.open(tmp_path / name, CODEC, mixed.digest) for name in ("half", "full")
    )
    for one, two in zip(
        latent_loader(half, mixed, data, **ARGUMENTS),
        latent_loader(full, mixed, data, **ARGUMENTS),
        strict=True,
    ):
        for a, b in zip(one, two, strict=True):
            assert a["latent"].dtype == torch.float32 and torch.equal(a["index"], b["index"])
            assert torch.allclose(a["latent"], b["latent"], rtol=relative, atol=1e-7)
            assert torch.equal(a["latent"], b["latent"].to(getattr(torch, dtype)).float())
    sizes = [sum(entry.bytes for entry in cache.manifest.files["train"]) for cache in (half, full)]
    values = sum(tensor.nbytes for tensor in full.split("train", mixed.split("train").shard).flat)
    assert sizes[1] - sizes[0] == pytest.approx(values / 2, rel=0.02)
    with pytest.raises(InputError, match="dtype"):
        writer_of(tmp_path / "full", mixed, data, dtype=dtype)


def test_latents_too_large_for_half_precision_are_refused(tmp_path):
    shards = write_set(tmp_path / "set", {"train": [(4, 4)]})
    writer = writer_of(
        tmp_path / "cache", shards, DataConfig(shards=shards.folder), dtype="float16"
    )
    with pytest.raises(WorkError, match="float16"):
        writer.write("train", 0, [torch.full((CHANNELS, 1, 1), 1e6)])


def test_an_interrupted_cache_goes_on_and_equals_an_undisturbed_one(mixed, data, tmp_path):
    assert write_cache(tmp_path / "a", mixed, data) == 8
    assert write_cache(tmp_path / "b", mixed, data, stop_after=3) == 3
    with pytest.raises(InputError, match="unfinished"):
        LatentCache.open(tmp_path / "b", CODEC, mixed.digest)
    file = tmp_path / "b/train/shard-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (tmp_path / "b/train/shard-000003.safetensors.7.tmp").write_bytes(b"left by a killed writer")
    assert write_cache(tmp_path / "b", mixed, data) == 6
    assert write_cache(tmp_path / "b", mixed, data) == 0
    names = [
        sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))
        for root in (tmp_path / "a", tmp_path / "b")
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if (tmp_path / "a" / name).is_file():
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_stale_cache_is_refused_with_the_reason(mixed, data, tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, mixed, data)
    for codec, digest, field in [
        ("d" * 64, mixed.digest, "codec_hash"),
        (CODEC, "e" * 64, "digest"),
    ]:
        with pytest.raises(InputError, match=field):
            LatentCache.open(folder, codec, digest)
    with pytest.raises(InputError, match="codec_hash"):
        writer_of(folder, mixed, data, codec="d" * 64)
    cache = LatentCache.open(folder, CODEC, mixed.digest)
    for change in ({"size": (4, 4)}, {"max_pixels": 60}, {"channels": 3}):
        with pytest.raises(InputError, match=rf"\({next(iter(change))} is "):
            cache.check(data.model_copy(update=change))


def test_a_split_whose_images_were_all_rejected(data, tmp_path):
    shards = write_set(tmp_path / "set", {"train": [(4, 4)] * 30})
    empty = write_shard_files(shards.folder, shard_file("val", 0), [], [])
    val = SplitEntry(samples=0, bytes=empty.bytes, shards=[empty])
    splits = {"val": val, **shards.manifest.splits}
    shards.manifest.model_copy(update={"splits": splits}).write(shards.folder)
    shards = ShardSet.open(shards.folder)
    with pytest.raises(InputError, match=r"/set: split 'val' is empty: it has train$"):
        shards.split("val")
    with pytest.raises(InputError, match=r"/set: no split 'test': it has train$"):
        shards.split("test")
    writer = writer_of(tmp_path / "cache", shards, data)
    missing = _find_missing(shards, writer)
    assert {shard: len(indices) for shard, indices in missing.items()} == {
        ("train", 0): 20,
        ("train", 1): 10,
    }
    assert write_cache(tmp_path / "cache", shards, data) == 2
    assert verify_latents(tmp_path / "cache") == []
    cache = LatentCache.open(tmp_path / "cache", CODEC, shards.digest)
    assert len(cache.split("train", shards.split("train").shard).start) == 30


def test_damage_is_noticed(mixed, data, tmp_path):
    write_cache(tmp_path / "cache", mixed, data)
    assert verify_latents(tmp_path / "cache") == []
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    flipped = tmp_path / "cache/train/shard-000001.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")
    (tmp_path / "cache/train/shard-000002.safetensors").unlink()
    (tmp_path / "cache/test/shard-000007.safetensors").write_bytes(b"")
    assert [str(damage) for damage in verify_latents(tmp_path / "cache")] == [
        "test/shard-000007.safetensors: not in the manifest",
        "train/shard-000001.safetensors: changed: its hash is not the manifest's",
        "train/shard-000002.safetensors: missing",
    ]
    with pytest.raises(InputError, match=r"shard-000002\.safetensors"):
        latent_loader(cache, mixed, data, **ARGUMENTS)
    (tmp_path / "cache/test/shard-000007.safetensors").unlink()
    with pytest.raises(WorkError, match="shard-000002"):
        writer_of(tmp_path / "cache", mixed, data).finish()
    manifest = tmp_path / "cache" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"samples": 20', '"samples": 19', 1))
    assert "edited" in str(verify_latents(tmp_path / "cache")[0])
    manifest.write_text("{}")
    with pytest.raises(InputError, match=re.escape(MANIFEST)):
        LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)


@pytest.mark.parametrize("change", [('"samples": 20', '"samples": 21'), ("-000001.s", "-000009.s")])
def test_a_damaged_marker_does_not_reach_the_manifest(mixed, data, tmp_path, change):
    write_cache(tmp_path / "cache", mixed, data)
    marker = tmp_path / "cache/train/shard-000001.json"
    content = marker.read_text()
    marker.write_text(content.replace(*change))
    assert marker.read_text() != content
    assert write_cache(tmp_path / "cache", mixed, data) == 1
    assert marker.read_text() == content and verify_latents(tmp_path / "cache") == []


def test_folders_that_are_something_else(mixed, data, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        LatentCache.open(tmp_path / "nowhere", CODEC, mixed.digest)
    with pytest.raises(InputError, match=re.escape(str(mixed.folder))):
        LatentCache.open(mixed.folder, CODEC, mixed.digest)
    with pytest.raises(InputError, match=r"manifest\.json"):
        writer_of(mixed.folder, mixed, data)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        writer_of(tmp_path / "file", mixed, data)


def test_latents_that_are_not_finite_are_refused(tmp_path):
    shards = write_set(tmp_path / "set", {"train": [(4, 4)]})
    writer = writer_of(tmp_path / "cache", shards, DataConfig(shards=shards.folder))
    with pytest.raises(WorkError, match="not finite"):
        writer.write("train", 0, [torch.full((CHANNELS, 1, 1), float("nan"))])
