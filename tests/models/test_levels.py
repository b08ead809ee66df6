"""Hourglass levels: any grid, HDiT's merge where sides are even, local, and linear in the grid."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.testing import assert_close

from r2id.config import DiffusionConfig, LevelConfig, R2idConfig, load_config
from r2id.errors import InputError
from r2id.models import levels
from r2id.models.coords import grid_coordinates
from r2id.models.layers import Dropout
from r2id.models.r2id import R2ID
from r2id.models.tracing import count_flops
from r2id.training.losses.r2id import R2idLoss
from tests.conftest import CONFIGS

GRIDS = [(1, 1), (1, 9), (4, 4), (5, 3), (8, 6), (9, 14)]
TWO = (LevelConfig(width=16, blocks=1), LevelConfig(width=24, blocks=2))
SMALL = R2idConfig(
    width=32, heads=4, encoder_blocks=1, decoder_blocks=1, dropout=0.0, tile=2, halo=1, levels=TWO
)


def build(config=SMALL):
    torch.manual_seed(0)
    return R2ID(config, channels=3, classes=3)


def opened(model):
    """Gates open, so that every path matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_of(model):
    return R2idLoss(model, DiffusionConfig(condition_dropout=0.5), base_side=3.0, seed=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_and_every_parameter_learns(grid):
    model = opened(build())
    x, half = torch.randn(8, 3, *grid), torch.full((8,), 0.5)
    out = model(x, half, torch.arange(8) % 3)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()
    loss_of(model)(x, torch.arange(8) % 3, torch.arange(8), step=0)[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    # One token attends to itself alone, whatever its queries and keys are.
    lone = {(1, 1): ("",), (4, 4): ("encoder.", "decoder.")}.get(grid, ("-",))
    assert [
        name
        for name, gradient in gradients.items()
        if not gradient.any() and not (name.startswith(lone) and ("query" in name or "key" in name))
    ] == []


def test_starts_by_predicting_zero():
    assert not build()(torch.randn(2, 3, 5, 3), torch.full((2,), 0.5), torch.tensor([0, 1])).any()


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_conditions_together_equal_conditions_alone(grid):
    model, x, noise = opened(build()).eval(), torch.randn(2, 3, *grid), torch.tensor([0.2, 0.7])
    labels = torch.tensor([[0, 2], [-1, -1], [1, 1]])
    together = model.predict(x, noise, labels)
    assert not torch.allclose(together[0], together[1], atol=1e-4)
    for row, out in zip(labels, together, strict=True):
        assert_close(model(x, noise, row), out, atol=1e-5, rtol=1e-4)


def test_loss_does_not_depend_on_the_batch():
    loss = loss_of(opened(build()))
    latent, label, index = torch.randn(4, 3, 5, 4), torch.arange(4) % 3, torch.tensor([4, 8, 1, 3])
    whole = loss(latent, label, index, step=2)[0]
    first, others = (
        loss(latent[part], label[part], index[part], step=2)[0]
        for part in (slice(0, 1), slice(1, 4))
    )
    assert_close(whole, (first + 3 * others) / 4)


def test_even_grids_merge_like_patches():
    """Merging is the linear map of 2×2 patches of HDiT."""
    merge, x = levels.Merge(3, 5), torch.randn(2, 3, 4, 6)
    patches = rearrange(F.pixel_unshuffle(x, 2), "b (d q) h w -> b (h w) (q d)", q=4)
    assert_close(
        merge(rearrange(x, "b d h w -> b (h w) d"), (4, 6)), patches @ merge.linear.weight.T
    )


@pytest.mark.parametrize("grid", [(3, 6), (4, 5), (7, 1), (1, 1)])
def test_odd_grids_merge_as_if_their_last_tokens_were_there_twice(grid):
    merge, x = levels.Merge(3, 5), torch.randn(2, 3, *grid)
    padded = F.pad(x, (0, grid[1] % 2, 0, grid[0] % 2), mode="replicate")
    even = (padded.shape[2], padded.shape[3])
    whole, mine = (rearrange(part, "b d h w -> b (h w) d") for part in (padded, x))
    assert_close(merge(mine, grid), merge(whole, even))
    assert merge(mine, grid).shape[1] == math.prod(levels.coarse(grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_token_belongs_to_the_cell_that_holds_its_centre(grid):
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows, columns], -1).view(1, -1, 2).float() + 0.5
    cells = levels.group_2x2(places, grid)
    height, width = levels.coarse(grid)
    corner = 2.0 * torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(1, -1, 1, 2)
    inside = ((cells >= corner) & (cells < corner + 2)).all(-1)
    assert inside.all() and {tuple(p) for p in cells.flatten(0, 2).tolist()} == {
        tuple(p) for p in places[0].tolist()
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_splitting_inverts_merging(grid):
    """With maps that only move numbers, and a share of 1, tokens come back to their places."""
    merge, split, x = levels.Merge(3, 12), levels.Split(3, 12), torch.randn(2, math.prod(grid), 3)
    with torch.no_grad():
        merge.linear.weight.copy_(torch.eye(12))
        split.linear.weight.copy_(torch.eye(12))
        split.share.fill_(1.0)
        assert_close(split(merge(x, grid), torch.zeros_like(x), grid), x)
        split.share.fill_(0.25)
        assert_close(split(merge(x, grid), -x, grid), -0.5 * x)


def through(model, tokens, grid):
    """Down to the coarsest grid and up again, with nothing in between."""
    time = torch.ones(1, model.config.width)
    coarsest, _, passed = model.levels.descend(tokens, time, grid)
    return model.levels.ascend(coarsest, time, passed).view(*grid, -1)


def test_a_part_of_a_grid_is_treated_like_the_whole():
    """Far from the cut, tokens do not see whether they are in a window; places must be even."""
    model, grid = opened(build()).eval(), (40, 40)
    x = torch.randn(1, *grid, 16)

    def window(start):
        part = x[:, start : start + 32, start : start + 32].flatten(1, 2)
        return through(model, part, (32, 32))

    whole = through(model, x.flatten(1, 2), grid)
    inside = slice(12, 20)  # at least 12 tokens from every edge of a window
    for start in (0, 8):
        seen = slice(start + 12, start + 20)
        assert_close(window(start)[inside, inside], whole[seen, seen], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(window(1)[inside, inside], whole[13:21, 13:21], atol=1e-2)


def test_levels_see_near_tokens_alone():
    model, grid = opened(build()).eval(), (40, 40)
    x = torch.randn(1, *grid, 16)
    before = through(model, x.flatten(1, 2), grid)
    x[:, 20, 20] += 1
    change = (through(model, x.flatten(1, 2), grid) - before).abs().amax(-1)
    rows, columns = (change > 1e-5).nonzero().unbind(1)
    assert change[20, 20] > 1e-2 and change[24, 20] > 1e-5
    assert rows.min() >= 4 and rows.max() <= 36 and columns.min() >= 4 and columns.max() <= 36


def test_only_the_coarsest_grid_has_dropout():
    model = build(SMALL.model_copy(update={"dropout": 0.3}))
    shares = {name: m.p for name, m in model.named_modules() if isinstance(m, Dropout)}
    assert {p for name, p in shares.items() if name.startswith("levels.")} == {0.0}
    assert {p for name, p in shares.items() if not name.startswith("levels.")} == {0.3}


def test_operations_grow_linearly_with_the_pixels():
    config = SMALL.model_copy(
        update={"levels": (*TWO, LevelConfig(width=32), LevelConfig(width=32))}
    )

    def operations(side):
        return count_flops(
            lambda: partial(
                loss_of(build(config)),
                torch.zeros(1, 3, side, side),
                torch.zeros(1, dtype=torch.int64),
                torch.zeros(1, dtype=torch.int64),
                step=0,
            )
        )

    exponent = math.log(operations(256) / operations(64)) / math.log(16)
    assert exponent == pytest.approx(1.0, abs=0.1)


def test_blocks_are_in_the_order_in_which_they_run():
    model, ran = build().eval(), []
    for block in model.blocks():
        block.register_forward_hook(lambda block, _in, _out: ran.append(block))
    model(torch.randn(1, 3, 4, 4), torch.tensor([0.5]), torch.tensor([0]))
    assert ran == model.blocks() and len(ran) == 2 * (1 + 2) + 2


def test_without_levels_there_is_nothing_of_them():
    flat = build(SMALL.model_copy(update={"levels": ()}))
    assert not [name for name in flat.state_dict() if "levels" in name]
    assert flat.token_in.out_features == flat.out.in_features == 32
    x, half, label = torch.randn(1, 3, 4, 4), torch.tensor([0.5]), torch.tensor([0])
    place = grid_coordinates((4, 4)).unsqueeze(0)
    assert torch.equal(flat(x, half, label), flat(x, half, label, place))


def test_mistakes():
    config = CONFIGS / "mnist" / "pixel-hourglass-r2id.toml"
    for change, said in {
        "r2id.levels=[{width=40}]": r"levels\.0\.width = 40: must be a multiple of 32",
        "r2id.levels=[{width=64, blocks=0}]": r"r2id\.levels\.0\.blocks = 0",
        "r2id.levels=[{width=64, depth=1}]": r"r2id\.levels\.0\.depth: unknown key.* width, blocks",
        "r2id.levels=2": r"r2id\.levels = 2",
        "diffusion.multiscale=-1": r"diffusion\.multiscale = -1",
    }.items():
        with pytest.raises(InputError, match=said):
            load_config(config, [change])


@pytest.mark.parametrize(
    ("grid", "allowed"), [((28, 28), 4), ((7, 9), 2), ((8, 9), 3), ((1, 9), 0)]
)
def test_levels_deeper_than_the_grid(grid, allowed):
    levels.check_halvings("r2id.levels", allowed, grid)
    with pytest.raises(
        InputError, match=rf"^r2id\.levels: {allowed + 1} .*{grid[0]}x{grid[1]}.*at most {allowed}"
    ):
        levels.check_halvings("r2id.levels", allowed + 1, grid)
