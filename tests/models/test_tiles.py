"""Tiles of a grid: the tokens of each, and what they see."""

import pytest
import torch

from r2id.models.tiles import tiles_of


@pytest.mark.parametrize(
    ("grid", "tile", "halo"),
    [((9, 13), 4, 2), ((5, 3), 2, 1), ((7, 10), 3, 0), ((1, 6), 4, 1), ((4, 4), 8, 9)],
)
def test_tiles_list_each_query_once_and_the_keys_near_it(grid, tile, halo):
    tiles = tiles_of(grid, tile, halo)
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    low = (places // tile * tile).unsqueeze(1)
    expected = ((places >= low - halo) & (places < low + tile + halo)).all(-1)
    assert tiles.queries[tiles.query_mask].sort().values.equal(torch.arange(len(places)))
    assert tiles.padded == (not tiles.key_mask.all())
    for row, wanted, index, seen in zip(
        tiles.queries, tiles.query_mask, tiles.keys, tiles.key_mask, strict=True
    ):
        found = torch.zeros(len(places), dtype=torch.bool)
        found[index[seen]] = True
        assert seen.sum() == found.sum() and (expected[row[wanted]] == found).all()
    x = torch.randn(2, 3, len(places), 5)
    assert torch.equal(tiles.join_queries(tiles.split_queries(x)), x)
