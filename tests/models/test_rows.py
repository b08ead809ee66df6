"""Rows that are taken have the gradients of plain indexing, without sorting or atomics."""

import pytest
import torch

from r2id.models.mixing import cloud, tiled
from r2id.models.rows import gather_rows, inverted, permute_rows
from r2id.models.tiles import tiles_of
from tests.stand_in import stand_in_gpu

GRIDS = [((9, 13), 4, 2), ((5, 3), 2, 1), ((17, 11), 3, 0)]
SLOW = ("embedding_dense_backward", "index_put", "index_add", "scatter_add", "sort")


def gradient(function, *given):
    given = [x.detach().clone().requires_grad_() for x in given]
    out = function(*given)
    torch.manual_seed(1)
    return out.detach(), *torch.autograd.grad(out, given, torch.randn(out.shape))


def same(function, plain, *given):
    for found, wanted in zip(gradient(function, *given), gradient(plain, *given), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_reordered_rows(dim):
    x, order = torch.randn(7, 7, 7), torch.randperm(7)
    same(
        lambda x: permute_rows(x, order, order.argsort(), dim),
        lambda x: x.index_select(dim, order),
        x,
    )
    some, inverse, padding = order[:4], order.argsort().clamp(max=3), order.argsort() > 3
    same(
        lambda x: permute_rows(x, some, inverse, dim, padding),
        lambda x: x.index_select(dim, some),
        x,
    )


def test_rows_that_are_taken_once():
    chosen = torch.stack([torch.randperm(9)[:5] for _ in range(3)])
    same(
        lambda x: gather_rows(x, chosen, inverted(chosen, 9)),
        lambda x: x[torch.arange(3).unsqueeze(1), chosen],
        torch.randn(3, 9, 4),
    )


@pytest.mark.parametrize(("grid", "tile", "halo"), GRIDS)
def test_keys_that_several_tiles_take(grid, tile, halo):
    tiles = tiles_of(grid, tile, halo)
    # Nothing that is computed of padding counts.
    kept = tiles.key_mask.expand(2, -1, -1).flatten(0, 1)[:, None, :, None]

    def plain(x):
        index = tiles.keys.expand(2, -1, -1)[:, None, :, :, None]
        gathered = x.unsqueeze(2).expand(-1, -1, index.shape[2], -1, -1)
        return gathered.gather(3, index.expand(-1, 3, -1, -1, 5)).transpose(1, 2).flatten(0, 1)

    x = torch.randn(2, 3, grid[0] * grid[1], 5)
    same(lambda x: tiles.gather_keys(x) * kept, lambda x: plain(x) * kept, x)
    assert kept.any() and len(tiles.gather_keys(x)) == len(kept)


@pytest.mark.parametrize(("grid", "tile", "halo"), GRIDS)
def test_the_order_of_tiles(grid, tile, halo):
    tiles = tiles_of(grid, tile, halo)
    kept = tiles.query_mask.repeat(2, 1)[:, None, :, None]

    def apart(x):
        return x[:, :, tiles.queries].transpose(1, 2).flatten(0, 1)

    def together(x):
        return x.unflatten(0, (2, -1)).transpose(1, 2).flatten(2, 3)[:, :, tiles.slots]

    x = torch.randn(2, 3, grid[0] * grid[1], 5)
    same(lambda x: tiles.split_queries(x) * kept, lambda x: apart(x) * kept, x)
    same(tiles.join_queries, together, apart(x))


def test_a_mask_is_made_where_there_is_padding():
    whole = tiles_of((8, 8), 4, 0)
    assert whole.mask(2) is None and whole.key_mask.all()
    padded = tiles_of((8, 8), 3, 1)
    assert torch.equal(padded.mask(1)[:, 0, 0], padded.key_mask) and not padded.key_mask.all()
    q, k, v = torch.randn(3, 2, 2, 64, 8)
    apart = whole.queries
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(part[:, :, apart].transpose(1, 2) for part in (q, k, v))
    )
    found = tiled(q, k, v, whole)[:, :, apart].transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_a_gpu_neither_sorts_indices_nor_adds_with_atomics():
    tokens = 35
    with stand_in_gpu() as counts:
        there = tiles_of((5, 7), 2, 1, torch.device("cuda"))
        q, k, v = (torch.randn(2, 2, tokens, 8).to("cuda").requires_grad_() for _ in range(3))
        order = torch.randperm(tokens).to("cuda")
        mixed = tiled(q, k, v, there) + cloud(q, k, v, order, 4)
        counts.clear()
        mixed.sum().backward()
        assert counts.kernels and not counts.syncs
        assert not [place for place in counts.kernels if any(name in place for name in SLOW)]
        assert q.grad is not None and q.grad.abs().sum().item() > 0


def test_tiles_compile_to_one_graph():
    tiles = tiles_of((5, 7), 2, 1)
    q, k, v = torch.randn(3, 2, 2, 35, 8).requires_grad_()
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, tiles), tiled(q, k, v, tiles))
