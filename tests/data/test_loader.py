"""The loader: one order for any number of processes, resumable; sizes, windows and mirroring."""

import multiprocessing
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from r2id.config import DataConfig
from r2id.data.loader import eval_loader, image_loader, image_sizes, load_items
from r2id.data.records import decode
from r2id.errors import InputError, WorkError
from r2id.images import to_float
from tests.data.conftest import MIXED, write_set


def config(shards, **changes):
    return DataConfig(shards=shards.folder, **changes)


def load(
    shards, start=0, total=24, rank=0, world_size=1, batch=12, micro_batch=3, seed=5, data=None
):
    return list(
        image_loader(
            shards,
            data or config(shards),
            split="train",
            batch=batch,
            micro_batch=micro_batch,
            seed=seed,
            start_step=start,
            total_steps=total,
            rank=rank,
            world_size=world_size,
        )
    )


def keys_of(steps):
    return [[key for part in step for key in part["sample_ids"]] for step in steps]


def test_batches_hold_what_the_index_says(mixed):
    split = mixed.split("train")
    for step in load(mixed, total=6):
        assert len(step) == 4
        for part in step:
            assert part["image"].dtype == torch.uint8 and part["image"].shape[:2] == (3, 1)
            assert part["image"].is_contiguous()
            assert part["label"].tolist() == split.label[part["index"].numpy()].tolist()
            assert part["label"].dtype == part["index"].dtype == torch.int64
            for key, index, image in zip(
                part["sample_ids"], part["index"].tolist(), part["image"], strict=True
            ):
                assert key == split.key(index)
                pixels = torch.from_numpy(decode(split.read(index), 1)).movedim(-1, 0)
                if pixels.shape == image.shape:
                    assert torch.equal(image, pixels)


def test_a_sample_that_a_step_has_several_times_is_drawn_anew_each_time(mixed):
    """Where a bucket has fewer samples than a batch; the same for any number of processes."""
    count, repeated = len(mixed.split("train")), 0
    alone = load(mixed, total=15, batch=24, micro_batch=24)
    ranks = [load(mixed, total=15, batch=24, micro_batch=6, rank=r, world_size=2) for r in (0, 1)]
    for (whole,), *parts in zip(alone, *ranks, strict=True):
        index, draw = whole["index"], whole["draw"]
        assert len(draw.unique()) == len(draw) and torch.equal(draw % count, index)
        assert set(index.tolist()) <= set(draw.tolist()), "the first time, it is its position"
        repeated += int((draw >= count).sum())
        shares = [torch.cat([part["draw"] for part in share]) for share in parts]
        assert torch.equal(torch.stack(shares, dim=1).flatten(), draw)
    assert repeated


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_audit_of_an_epoch_is_the_same_in_any_world(mixed, world_size, workers):
    """All ranks' samples, interleaved, are those of a single process, over an epoch and beyond."""
    expected = keys_of(load(mixed, total=20, batch=12, micro_batch=12))
    data = config(mixed, workers=workers)
    ranks = [
        keys_of(load(mixed, total=20, rank=rank, world_size=world_size, data=data))
        for rank in range(world_size)
    ]
    together = [
        [key for keys in zip(*parts, strict=True) for key in keys]
        for parts in zip(*ranks, strict=True)
    ]
    assert together == expected
    per_epoch = 6 + 6 + 1 + 1 + 1
    assert {key for keys in expected[:per_epoch] for key in keys} == {
        f"image-{i:04d}" for i in range(len(MIXED))
    }


@pytest.mark.parametrize("stop", [1, 14, 15, 16])
def test_resuming_is_knowing_the_step(mixed, stop):
    whole = load(mixed, total=20)
    resumed = load(mixed, total=stop) + load(mixed, start=stop, total=20)
    assert keys_of(resumed) == keys_of(whole)
    for a, b in zip(whole, resumed, strict=True):
        for one, two in zip(a, b, strict=True):
            assert torch.equal(one["image"], two["image"])


def test_resuming_in_another_world(mixed):
    """The order is the same if one process begins, four with workers go on, and two finish."""
    whole = keys_of(load(mixed, total=20, batch=12, micro_batch=12))
    found = []
    for start, end, world_size, workers in ((0, 6, 1, 0), (6, 13, 4, 2), (13, 20, 2, 0)):
        data = config(mixed, workers=workers)
        ranks = [
            keys_of(load(mixed, start, end, rank, world_size, data=data))
            for rank in range(world_size)
        ]
        found += [
            [key for keys in zip(*parts, strict=True) for key in keys]
            for parts in zip(*ranks, strict=True)
        ]
    assert found == whole


def test_epochs_differ(mixed):
    steps = keys_of(load(mixed, total=30))
    assert steps[:15] != steps[15:]


def test_nothing_to_do_after_the_last_step(mixed):
    assert load(mixed, start=20, total=20) == []


def test_channels_and_size(mixed):
    for step in load(mixed, total=3, data=config(mixed, channels=3, size=(5, 9))):
        assert step[0]["image"].shape == (3, 3, 5, 9)
        assert torch.equal(step[0]["image"][:, 0], step[0]["image"][:, 2])


def test_bad_requests_are_refused_at_once(mixed):
    with pytest.raises(InputError, match=r"train\.batch = 12"):
        load(mixed, world_size=2, micro_batch=5)
    with pytest.raises(InputError, match="'val'"):
        eval_loader(mixed, config(mixed), "val", 4)


def test_a_damaged_image_names_its_sample(own_mixed):
    with own_mixed.split("test").files[0].open("r+b") as file:
        file.seek(int(own_mixed.split("test").offset[2]))
        file.write(b"0000000")
    with pytest.raises(WorkError, match=r"shard-000000\.tar: .*image-0002"):
        list(eval_loader(own_mixed, config(own_mixed), "test", 4))


def test_evaluation_takes_each_image_once_in_order(mixed):
    batches = list(eval_loader(mixed, config(mixed), "test", 5))
    assert [batch["index"].tolist() for batch in batches] == [
        [0, 1, 2, 3, 4],
        [5, 6],
        [7, 8, 9, 10],
    ]
    assert [tuple(batch["image"].shape) for batch in batches] == [
        (5, 1, 8, 8),
        (2, 1, 8, 8),
        (4, 1, 8, 20),
    ]
    assert batches[0]["image"].dtype == torch.float32
    assert batches[0]["image"].min() >= -1 and batches[0]["image"].max() <= 1


def test_evaluation_of_some(mixed):
    def indices(**choice):
        return [
            index
            for batch in eval_loader(mixed, config(mixed), "test", 5, **choice)
            for index in batch["index"].tolist()
        ]

    assert indices(limit=4) == [0, 2, 5, 8]
    assert indices(limit=100) == list(range(11))
    assert indices(indices=[3, 9, 1]) == [3, 1, 9]


def test_training_and_evaluation_see_the_same_pixels(mixed):
    seen = {
        int(index): image
        for batch in eval_loader(mixed, config(mixed), "train", 7)
        for index, image in zip(batch["index"], batch["image"], strict=True)
    }
    assert sorted(seen) == list(range(len(MIXED)))
    for step in load(mixed, total=15):
        for part in step:
            for index, image in zip(part["index"].tolist(), part["image"], strict=True):
                assert torch.equal(to_float(image), seen[index])


def test_image_sizes_are_those_of_the_batches(mixed):
    sizes = image_sizes(mixed, config(mixed), "train")
    assert len(sizes) == len(MIXED) and sizes[0] == (1, 1) and sizes[len(sizes) // 2] == (8, 8)
    assert [height * width for height, width in sizes] == sorted(
        height * width for height, width in sizes
    )


def test_windows_are_parts_at_native_resolution_drawn_anew_each_epoch(tmp_path):
    shards = write_set(tmp_path, {"train": [(40, 50)] * 8 + [(4, 50)] * 8})
    split, data = shards.split("train"), config(shards, window=(10, 12))
    places = {}
    for step in load(shards, total=8, batch=8, micro_batch=4, data=data):
        for part in step:
            for index, image in zip(part["index"].tolist(), part["image"], strict=True):
                assert image.shape[1:] == ((10, 12) if index < 8 else (4, 12))
                whole = torch.from_numpy(decode(split.read(index), 1)[:, :, 0])
                views = whole.unfold(0, image.shape[1], 1).unfold(1, 12, 1)
                found = (views == image[0]).all(-1).all(-1).nonzero().tolist()
                assert len(found) == 1, "not a part of the image"
                places.setdefault(index, set()).add(tuple(found[0]))
    assert all(len(seen) > 1 for seen in places.values())
    assert len({place for seen in places.values() for place in seen}) > 20
    middle = next(eval_loader(shards, data, "train", 1, indices=[0]))["image"]
    assert middle.shape == (1, 1, 40, 50), "evaluation sees whole images"


def test_half_are_mirrored_by_draws_that_depend_on_seed_epoch_and_sample(mixed):
    plain, mirrored, per_epoch = {}, {}, 15
    for seen, data in ((plain, config(mixed)), (mirrored, config(mixed, flip=True))):
        for number, step in enumerate(load(mixed, total=2 * per_epoch, data=data)):
            for part in step:
                seen.update(
                    {
                        (number // per_epoch, index): image
                        for index, image in zip(part["index"].tolist(), part["image"], strict=True)
                    }
                )
    turned = {
        place: torch.equal(image, plain[place].flip(-1)) and not torch.equal(image, plain[place])
        for place, image in mirrored.items()
    }
    assert all(
        torch.equal(image, plain[place].flip(-1) if turned[place] else plain[place])
        for place, image in mirrored.items()
    )
    assert 0.4 < np.mean(list(turned.values())) < 0.6
    assert any(turned[0, index] != turned[1, index] for _, index in turned)
    again = load(
        mixed, start=17, total=18, rank=1, world_size=2, data=config(mixed, flip=True, workers=1)
    )[0]
    for part in again:
        for index, image in zip(part["index"].tolist(), part["image"], strict=True):
            assert torch.equal(image, mirrored[17 // per_epoch, index])


def test_small_images_come_in_larger_steps(mixed):
    data = config(mixed, batch_pixels=12 * 8 * 8 * 3)
    counted = {}
    for step in load(mixed, total=20, batch=12, micro_batch=3, rank=1, world_size=2, data=data):
        height, width = step[0]["image"].shape[2:]
        counted[height, width] = {len(part["index"]) for part in step}
        assert len(step) == 2
    assert counted == {(8, 8): {9}, (8, 12): {6}, (30, 20): {3}, (1, 1): {3}, (9, 40): {3}}


def test_an_order_by_shards_goes_through_few_at_a_time(tmp_path):
    shards = write_set(tmp_path, {"train": [(2, 2)] * 400}, per_shard=5)
    shard = shards.split("train").shard
    for near, most in ((config(shards, shuffle="shards"), 16 + 1), (config(shards), 80)):
        steps = load(shards, total=50, batch=8, micro_batch=8, data=near)
        seen = [shard[step[0]["index"].numpy()] for step in steps]
        at_once = [
            len(set(np.concatenate(seen[start : start + 10]).tolist()))
            for start in range(0, 50, 10)
        ]
        assert max(at_once) <= most and min(at_once) > 10
        assert sorted(int(index) for step in steps for index in step[0]["index"]) == list(
            range(400)
        )
    epochs = [
        keys_of(
            load(
                shards,
                start=start,
                total=start + 50,
                batch=8,
                micro_batch=8,
                data=config(shards, shuffle="shards"),
            )
        )
        for start in (0, 50)
    ]
    assert epochs[0] != epochs[1]


def test_single_pixel_images(tmp_path):
    shards = write_set(tmp_path, {"train": [(1, 1)] * 5})
    steps = load(shards, batch=2, micro_batch=2, total=6)
    assert all(step[0]["image"].shape == (2, 1, 1, 1) for step in steps)


class Stuck(Dataset):
    """All items but the first take for ever."""

    def __getitem__(self, number: int) -> int:
        time.sleep(600 if number else 0)
        return number


def test_a_stuck_loader_ends_when_the_process_that_it_loads_for_says_so():
    items = load_items(Stuck(), range(9), 1)
    assert next(items) == 0
    (loader,) = multiprocessing.active_children()
    loader.terminate()
    loader.join(10)
    assert loader.exitcode == 0


class Tensors(Dataset):
    """A tensor for each number, which a loader process keeps until it is fetched."""

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((4,), number)


@pytest.mark.parametrize("ended", [True, False])
def test_a_loader_that_is_gone_before_its_tensors_are_fetched_was_killed(ended, monkeypatch):
    """torch raises an error of its own if the system has ended that process by then."""
    items = load_items(Tensors(), range(1000), 1)
    next(items)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch may hear of it even before
    (loader,) = multiprocessing.active_children()
    loader.kill()
    loader.join(10)
    if not ended:  # as far as torch knows when it fetches them, but not if there are none to fetch
        answers = iter([True])
        monkeypatch.setattr(type(loader), "is_alive", lambda _: next(answers, False))
    with pytest.raises(WorkError, match="a loader process was killed"):
        list(items)


class Refused(Dataset):
    """Its store refuses every item."""

    def __getitem__(self, number: int) -> int:
        raise ConnectionRefusedError(f"item {number}")


def test_a_store_that_refuses_is_no_killed_loader():
    with pytest.raises(ConnectionRefusedError, match="item 0"):
        next(load_items(Refused(), range(3), 1))


def test_loaders_share_memory_whatever_way_python_starts_processes():
    """They are forked, so that nothing is sent to them: what is local could not be."""

    class Local(Dataset):
        def __getitem__(self, number: int) -> int:
            return number

    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert list(load_items(Local(), range(3), 1)) == [0, 1, 2]
    finally:
        multiprocessing.set_start_method(before, force=True)
