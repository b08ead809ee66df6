"""How tokens attend: each cheaper way equals dense attention under the mask that it stands for."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from r2id.config import DiffusionConfig, R2idConfig, TrainConfig
from r2id.config.models import AttentionKind
from r2id.models import mixing
from r2id.models.r2id import R2ID
from r2id.models.tiles import tiles_of
from r2id.models.tracing import count_flops
from r2id.training.blocks import prepare_blocks
from r2id.training.losses.r2id import R2idLoss

GRIDS = [(1, 1), (4, 4), (5, 3), (1, 9), (9, 14)]
SMALL = {
    "width": 32,
    "heads": 2,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "dropout": 0.0,
    "cloud_tokens": 4,
    "tile": 2,
    "halo": 1,
}
KINDS = list(mixing.ATTENTION_KINDS)


def test_every_kind_of_the_config_is_there():
    assert list(get_args(AttentionKind)) == KINDS


def draw(grid, heads=4):
    torch.manual_seed(0)
    return torch.randn(3, 2, heads, grid[0] * grid[1], 8).unbind(0)


def masked(q, k, v, seen):
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def places(grid):
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(-1, 2)


@pytest.mark.parametrize("grid", GRIDS)
def test_axial(grid):
    row, column = (place.view(-1, 1) == place.view(1, -1) for place in places(grid).unbind(1))
    q, k, v = draw(grid)
    assert_close(
        mixing.axial(q, k, v, grid), masked(q, k, v, torch.stack([row, row, column, column]))
    )


@pytest.mark.parametrize(("tile", "halo"), [(2, 0), (3, 1), (4, 20)])
@pytest.mark.parametrize("grid", GRIDS)
def test_tiled(grid, tile, halo):
    at = places(grid)
    low = at // tile * tile
    # A token's centre lies half a token from its edge.
    near = (at[None] + 0.5 >= low[:, None] - halo) & (at[None] + 0.5 <= low[:, None] + tile + halo)
    q, k, v = draw(grid)
    assert_close(mixing.tiled(q, k, v, tiles_of(grid, tile, halo)), masked(q, k, v, near.all(-1)))


@pytest.mark.parametrize(("tokens", "groups"), [(12, 3), (13, 3), (9, 4), (5, 1), (4, 4)])
def test_cloud(tokens, groups):
    """Tokens see their group, and those of the last group a few of the first's too."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    size = -(-tokens // groups)
    group = torch.empty(tokens, dtype=torch.int64)
    group[order] = torch.arange(tokens) // size
    seen = group[:, None] == group[None]
    seen[group == groups - 1] |= torch.isin(torch.arange(tokens), order[: groups * size - tokens])
    q, k, v = draw((1, tokens))
    assert_close(mixing.cloud(q, k, v, order, groups), masked(q, k, v, seen))


@pytest.mark.parametrize("grid", GRIDS)
def test_linear(grid):
    q, k, v = draw(grid)
    weights = torch.einsum(
        "bhnd,bhmd->bhnm", torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    )
    assert_close(mixing.linear(q, k, v), weights / weights.sum(-1, keepdim=True) @ v)


def test_linear_sums_in_float32():
    """4096 tokens, whose sums bfloat16 would round to 8 bits."""
    q, k, v = draw((64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = mixing.linear(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(
        found.float(),
        mixing.linear(q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float()),
        atol=1e-2,
        rtol=1e-2,
    )


def build(kinds, **changes):
    torch.manual_seed(0)
    model = R2ID(
        R2idConfig.model_validate({**SMALL, "attention": kinds, **changes}), channels=4, classes=3
    )
    with torch.no_grad():
        for parameter in model.parameters():  # gates open, so that every path matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_any_grid_gets_a_gradient(kind, grid):
    model = build([kind])
    loss = R2idLoss(model, DiffusionConfig(condition_dropout=0.5), base_side=3.0, seed=0)
    loss(torch.randn(8, 4, *grid), torch.arange(8) % 3, torch.arange(8), step=0)[0].backward()
    lacking = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    assert lacking == []
    assert grid == (1, 1) or all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_every_kind_can_be_counted(kind):
    """Training and the planner run the loss on tensors without contents."""

    def work():
        loss = R2idLoss(build([kind]), DiffusionConfig(), base_side=3.0, seed=0)
        return partial(loss, torch.zeros(2, 4, 5, 3), torch.arange(2), torch.arange(2), step=0)

    assert count_flops(work) > 0


def test_blocks_take_turns():
    """With one kind after another, only its own block changes."""
    grid, key = (6, 6), torch.tensor(7)
    config = build(["axial", "linear", "tiled", "cloud", "full"]).config
    found = mixing.mixes(config, grid, 7, torch.device("cpu"), key)
    q, k, v = draw(grid)
    results = [mix(q, k, v) for mix in found]
    assert all(not torch.allclose(results[i], results[j]) for i in range(5) for j in range(i))
    assert torch.equal(results[0], results[5]) and torch.equal(results[1], results[6])
    assert torch.equal(
        mixing.mixes(config, grid, 7, torch.device("cpu"))[3](q, k, v), results[4]
    ), "all, without a key"


def test_clouds_are_new_each_step_and_layer_and_the_same_again():
    model = build(["cloud"])
    loss = R2idLoss(
        model,
        DiffusionConfig(condition_dropout=0.0, time_sampling="uniform"),
        base_side=4.0,
        seed=0,
    )
    torch.manual_seed(0)
    batch = torch.randn(4, 4, 4, 4), torch.arange(4) % 3, torch.arange(4)
    first = loss(*batch, step=3)[0]
    assert torch.equal(first, loss(*batch, step=3)[0])
    q, k, v = draw((4, 4))

    def mixed(key, layer):
        return mixing.mixes(model.config, (4, 4), 2, torch.device("cpu"), torch.tensor(key))[layer](
            q, k, v
        )

    assert not torch.allclose(mixed(1, 0), mixed(1, 1)) and not torch.allclose(
        mixed(1, 0), mixed(2, 0)
    )
    train = TrainConfig(steps=1, activation_checkpointing="all")
    prepare_blocks(model.blocks(), train, torch.device("cpu"))
    again = loss(*batch, step=3)[0]
    assert_close(
        torch.autograd.grad(again, model.token_in.weight)[0],
        torch.autograd.grad(first, model.token_in.weight)[0],
    )


def test_attributes():
    """Rows of −1, 0 and 1; all 0 is no condition."""
    torch.manual_seed(0)
    model = R2ID(
        R2idConfig.model_validate({**SMALL, "condition": "attributes"}), channels=4, classes=5
    )
    loss = R2idLoss(
        model,
        DiffusionConfig(objective="flow", schedule="flow", condition_dropout=0.0),
        3.0,
        seed=0,
    )
    attributes = torch.tensor(
        [[1, -1, 1, -1, 1], [-1, -1, 1, 1, 1], [1, 1, 1, 1, -1], [-1, 1, -1, 1, -1]],
        dtype=torch.int8,
    )
    latents, index = torch.randn(4, 4, 3, 3).repeat(16, 1, 1, 1), torch.arange(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(250):
        value, _ = loss(latents, attributes.repeat(16, 1), index, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert sum(values[-20:]) / 20 < 0.5 * values[0]
    model.eval()
    x, half = torch.randn(1, 4, 3, 3), torch.tensor([0.5])
    outs = [
        model(x, half, row.view(1, -1)) for row in [*attributes, torch.zeros(5, dtype=torch.int8)]
    ]
    assert all(not torch.allclose(outs[i], outs[j], atol=1e-3) for i in range(5) for j in range(i))
