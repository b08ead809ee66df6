import pytest
import torch

from r2id.config import DataConfig
from r2id.data.latents import MANIFEST, LatentCache, LatentWriter, latent_loader
from r2id.data.loader import eval_loader, image_loader
from r2id.errors import InputError, WorkError
from tests.data.conftest import write_set

CODEC, CHANNELS = "c" * 64, 2


def encoded(images):
    """Stands in for a codec: two channels on a grid of half the size, told from the pixels alone."""
    halves = torch.nn.functional.adaptive_avg_pool2d(images, [max(1, side // 2) for side in images.shape[-2:]])
    return torch.cat([halves, -3 * halves], 1)


def writer_of(folder, shards, data, codec=CODEC):
    return LatentWriter(folder, shards, data, codec_hash=codec, codec_path="runs/riae", latent_channels=CHANNELS)


def write_cache(folder, shards, data, stop_after=None, codec=CODEC):
    writer = writer_of(folder, shards, data, codec)
    written = 0
    for split, files in writer.files.items():
        for number in range(len(files)):
            if writer.done(split, number):
                continue
            if written == stop_after:
                return written
            indices = shards.split(split).in_shard(number)
            found = {}
            for batch in eval_loader(shards, data, split, 6, indices=indices):
                found.update(zip(batch["index"].tolist(), encoded(batch["image"]), strict=True))
            writer.write(split, number, [found[index] for index in indices])
            written += 1
    writer.finish()
    return written


@pytest.fixture
def data(mixed):
    return DataConfig(shards=mixed.folder)


ARGUMENTS = {"split": "train", "batch": 12, "micro_batch": 3, "seed": 1, "start_step": 4, "total_steps": 25,
             "rank": 1, "world_size": 2}


def test_the_cache_gives_the_same_batches_as_encoding_on_the_fly(mixed, data, tmp_path):
    write_cache(tmp_path / "cache", mixed, data)
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    steps = zip(latent_loader(cache, mixed, data, **ARGUMENTS), image_loader(mixed, data, **ARGUMENTS), strict=True)
    for cached, live in steps:
        for one, two in zip(cached, live, strict=True):
            assert torch.equal(one["latent"], encoded(two["image"]))
            assert torch.equal(one["label"], two["label"]) and torch.equal(one["index"], two["index"])
            assert [one[name] for name in ("keys", "epoch", "step")] == [two[name] for name in ("keys", "epoch", "step")]


def test_loader_processes_give_the_same(mixed, data, tmp_path):
    write_cache(tmp_path / "cache", mixed, data)
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    alone, helped = (list(latent_loader(cache, mixed, data.model_copy(update={"workers": workers}), **ARGUMENTS))
                     for workers in (0, 1))
    assert all(torch.equal(a["latent"], b["latent"]) for one, two in zip(alone, helped, strict=True)
               for a, b in zip(one, two, strict=True))


def test_an_interrupted_cache_goes_on_and_equals_an_undisturbed_one(mixed, data, tmp_path):
    assert write_cache(tmp_path / "a", mixed, data) == 8
    assert write_cache(tmp_path / "b", mixed, data, stop_after=3) == 3
    with pytest.raises(InputError, match="unfinished"):
        LatentCache.open(tmp_path / "b", CODEC, mixed.digest)
    file = tmp_path / "b/train/shard-000001.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    (tmp_path / "b/train/shard-000003.safetensors.7.tmp").write_bytes(b"left by a killed writer")
    assert write_cache(tmp_path / "b", mixed, data) == 6
    assert write_cache(tmp_path / "b", mixed, data) == 0
    names = [sorted(p.relative_to(root).as_posix() for p in root.rglob("*")) for root in (tmp_path / "a", tmp_path / "b")]
    assert names[0] == names[1]
    for name in names[0]:
        if (tmp_path / "a" / name).is_file():
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_stale_cache_is_refused_with_the_reason(mixed, data, tmp_path):
    folder = tmp_path / "cache"
    write_cache(folder, mixed, data)
    for codec, digest, words in [("d" * 64, mixed.digest, "another RIAE"), (CODEC, "e" * 64, "another shard set")]:
        with pytest.raises(InputError, match=words):
            LatentCache.open(folder, codec, digest)
    with pytest.raises(InputError, match="another RIAE"):
        writer_of(folder, mixed, data, codec="d" * 64)
    cache = LatentCache.open(folder, CODEC, mixed.digest)
    for change in ({"size": (4, 4)}, {"max_pixels": 60}, {"channels": 3}):
        with pytest.raises(InputError, match=f"holds latents made otherwise .{next(iter(change))} is"):
            latent_loader(cache, mixed, data.model_copy(update=change), **ARGUMENTS)


def test_damage_is_noticed(mixed, data, tmp_path):
    write_cache(tmp_path / "cache", mixed, data)
    (tmp_path / "cache/train/shard-000002.safetensors").unlink()
    cache = LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)
    with pytest.raises(InputError, match=r"shard-000002\.safetensors: missing"):
        latent_loader(cache, mixed, data, **ARGUMENTS)
    with pytest.raises(WorkError, match=r"shard-000002.*not written"):
        writer_of(tmp_path / "cache", mixed, data).finish()
    (tmp_path / "cache" / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="damaged or edited"):
        LatentCache.open(tmp_path / "cache", CODEC, mixed.digest)


def test_folders_that_are_something_else(mixed, data, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        LatentCache.open(tmp_path / "nowhere", CODEC, mixed.digest)
    with pytest.raises(InputError, match="not a latent cache"):
        LatentCache.open(mixed.folder, CODEC, mixed.digest)
    with pytest.raises(InputError, match="holds something else"):
        writer_of(mixed.folder, mixed, data)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder"):
        writer_of(tmp_path / "file", mixed, data)


def test_latents_that_are_not_finite_are_refused(tmp_path):
    shards = write_set(tmp_path / "set", {"train": [(4, 4)]})
    writer = writer_of(tmp_path / "cache", shards, DataConfig(shards=shards.folder))
    with pytest.raises(WorkError, match="not finite"):
        writer.write("train", 0, [torch.full((CHANNELS, 1, 1), float("nan"))])
