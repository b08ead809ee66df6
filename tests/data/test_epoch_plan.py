"""The epoch plan: every sample in every epoch, full batches of one size, sound buckets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2id.config.batch_split import check_batch
from r2id.data.epoch_plan import make_buckets, plan_epoch, rank_micro_batches
from r2id.errors import InputError

DIGEST = "0123456789abcdef" * 4
sides = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=150)


def buckets_of(sizes, size=None, max_pixels=65536):
    heights, widths = np.array(sizes, np.int32).T
    return make_buckets(heights, widths, size, max_pixels)


def plan(buckets, epoch=0, seed=0, batch=8, digest=DIGEST, batch_pixels=None):
    return plan_epoch(
        buckets, digest=digest, seed=seed, epoch=epoch, batch=batch, batch_pixels=batch_pixels
    )


@settings(max_examples=150, deadline=None)
@given(sides, st.integers(1, 40), st.integers(0, 3), st.none() | st.integers(1, 1 << 20))
def test_every_sample_in_every_epoch_and_all_batches_full(sizes, batch, epoch, batch_pixels):
    buckets = buckets_of(sizes)
    batches = plan(buckets, epoch, batch=batch, batch_pixels=batch_pixels)
    drawn = np.concatenate([part.indices for part in batches])
    assert len(batches) == buckets.batches(batch, batch_pixels)
    assert set(drawn.tolist()) == set(range(len(sizes)))
    assert len(drawn) - len(sizes) == buckets.repeats(batch, batch_pixels)
    images = dict(zip(buckets.sizes, map(len, buckets.members), strict=True))
    for part in batches:
        count, size = len(part.indices), (part.height, part.width)

        def fits(count, size=size):
            return count * size[0] * size[1] <= (batch_pixels or 0) and count <= images[size]

        # The largest multiple that fits, but at least a batch.
        assert count % batch == 0 and (count == batch or fits(count)) and not fits(count + batch)
        assert set(buckets.height[part.indices]) == {part.height} and set(
            buckets.width[part.indices]
        ) == {part.width}


@settings(max_examples=150, deadline=None)
@given(sides, st.integers(1, 70000))
def test_nothing_is_enlarged_and_the_area_is_capped(sizes, max_pixels):
    buckets = buckets_of(sizes, max_pixels=max_pixels)
    heights, widths = np.array(sizes).T
    assert (buckets.height <= heights).all() and (buckets.width <= widths).all()
    assert (buckets.height >= 1).all() and (buckets.width >= 1).all()
    assert (buckets.height.astype(int) * buckets.width <= max_pixels).all()


@settings(max_examples=150, deadline=None)
@given(sides)
def test_joining_a_bucket_costs_at_most_half_of_a_side(sizes):
    buckets = buckets_of(sizes, max_pixels=600 * 600)
    heights, widths = np.array(sizes).T
    assert (buckets.height * 2 >= heights).all() and (buckets.width * 2 >= widths).all()


def test_a_whole_epoch_repeats_less_than_one_batch_per_bucket():
    buckets = buckets_of([(8, 8)] * 70 + [(8, 12)] * 65 + [(40, 40)] * 3)
    assert buckets.sizes == [(8, 8), (8, 12), (40, 40)]
    assert buckets.batches(16) == 5 + 5 + 1 and buckets.repeats(16) == 10 + 15 + 13


def test_a_batch_is_completed_from_the_next_epochs_order():
    buckets = buckets_of([(8, 8)] * 10)
    first, second = (
        np.concatenate([part.indices for part in sorted_parts(buckets, epoch)]) for epoch in (0, 1)
    )
    assert sorted(first[:10]) == list(range(10)) and first[10:].tolist() == second[:2].tolist()


def sorted_parts(buckets, epoch):
    """Batches in the order before the last shuffle: the one with repeats comes last."""
    parts = plan(buckets, epoch, batch=4)
    following = set(
        np.concatenate([part.indices for part in plan(buckets, epoch, batch=12)])[:10].tolist()
    )
    assert following == set(range(10))
    whole = plan(buckets, epoch, batch=12)[0].indices
    return sorted(
        parts,
        key=lambda part: [whole[i : i + 4].tolist() for i in (0, 4, 8)].index(
            part.indices.tolist()
        ),
    )


def test_order_depends_on_epoch_seed_and_data_alone():
    buckets = buckets_of([(8, 8)] * 100)
    base = [part.indices.tolist() for part in plan(buckets)]
    assert base == [part.indices.tolist() for part in plan(buckets_of([(8, 8)] * 100))]
    others = [plan(buckets, epoch=1), plan(buckets, seed=1), plan(buckets, digest="f" * 64)]
    assert all([part.indices.tolist() for part in other] != base for other in others)


def test_sizes_come_in_another_order_in_each_epoch():
    buckets = buckets_of([(8, 8)] * 80 + [(8, 12)] * 80)
    first, second = ([part.width for part in plan(buckets, epoch)] for epoch in (0, 1))
    assert len(first) == 20 and sorted(first) == sorted(second) and first != second


def test_order_is_random():
    """A sample's place is uniform over epochs: mean 49.5, deviation of the mean 28.9/√400 = 1.4."""
    buckets = buckets_of([(8, 8)] * 100)
    places = [
        np.concatenate([part.indices for part in plan(buckets, epoch, batch=10)]).tolist().index(17)
        for epoch in range(400)
    ]
    assert abs(np.mean(places) - 49.5) < 5 and len(set(places)) > 90


def test_given_size_is_that_of_all():
    assert buckets_of([(8, 8), (100, 3)], size=(20, 30)).sizes == [(20, 30)]


def test_common_sizes_stay_and_rare_ones_join_similar_ones():
    rare = [(100 + i % 10, 80) for i in range(40)]
    buckets = buckets_of([(32, 32)] * 200 + [(32, 33)] * 200 + rare + [(300, 10)])
    assert buckets.sizes == [(32, 32), (32, 33), (100, 80), (300, 10)]
    assert [len(members) for members in buckets.members] == [200, 200, 40, 1]


def test_a_size_of_one_in_twenty_is_common():
    buckets = buckets_of([(32, 32)] * 1895 + [(32, 33)] * 100 + [(31, 34)] * 5)
    assert buckets.sizes == [(31, 34), (32, 32), (32, 33)]


def test_few_images_are_parted_in_the_middle_of_their_logarithms():
    """√(10·80) = 28; then 10 and 20 stay together, and 39 and 80 are too far apart."""
    buckets = buckets_of([(height, 100) for height in (10, 20, 39, 80)])
    assert buckets.sizes == [(10, 100), (39, 100), (80, 100)]


def test_the_shape_is_kept_when_the_area_is_capped():
    buckets = buckets_of([(375, 500)] * 100, max_pixels=10000)
    assert buckets.sizes == [(86, 115)]
    assert buckets_of([(1, 100000)] * 2, max_pixels=500).sizes == [(1, 500)]
    assert all(
        buckets_of([(n, n)], max_pixels=m * m).sizes == [(m, m)]
        for m in range(1, 40)
        for n in (m, 249, 333)
    )


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 24), (2, 4), (4, 3), (3, 8)])
def test_every_world_sees_the_same_samples(world_size, micro_batch):
    indices = np.arange(100, 124)
    shares = [
        rank_micro_batches(indices, rank, world_size, micro_batch) for rank in range(world_size)
    ]
    assert all(len(part) == micro_batch for share in shares for part in share)
    assert sorted(np.concatenate([part for share in shares for part in share])) == indices.tolist()


def test_a_batch_that_does_not_divide_is_refused():
    check_batch(24, 2, 4)
    with pytest.raises(InputError, match=r"train\.batch = 20: .* 16 or 32"):
        check_batch(20, 2, 8)
    with pytest.raises(InputError, match=r"nearest: 16$"):
        check_batch(3, 2, 8)


def test_a_few_images_of_another_ratio_do_not_decide_the_shape_of_all():
    """Between the middle of the ratios and 2 lie fewer images than a bucket takes."""
    ratios = np.concatenate([np.linspace(0.95, 1.15, 100), np.linspace(1.3, 1.4, 60), [2.0] * 30])
    sizes = [(round(100 / ratio**0.5), round(100 * ratio**0.5)) for ratio in ratios]
    buckets = buckets_of(sizes)
    assert len(buckets.sizes) == 2 and min(map(len, buckets.members)) >= 64
    kept = sum(
        high * wide * len(m) for (high, wide), m in zip(buckets.sizes, buckets.members, strict=True)
    )
    assert kept > 0.8 * sum(high * wide for high, wide in sizes)
