"""Blocks that are compiled and checkpointed: the same gradients, few graphs, no silent way out."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r2id.config import (
    DiffusionConfig,
    LevelConfig,
    LossConfig,
    R2idConfig,
    RiaeConfig,
    TrainConfig,
)
from r2id.errors import InputError
from r2id.models.coords import Size
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.training import blocks
from r2id.training.blocks import prepare_blocks
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import riae_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ATTENTION: dict[str, Any] = {
    "pixel_width": 16,
    "heads": 2,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
}
CASES = [
    *((kind, "none") for kind in ("full", "cloud", "axial", "tiled", "linear")),
    ("full", 2),
    ("full", "all"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the compiler trace and check everything, and generate no code, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradients(
    settings: dict[str, Any],
    grids: Sequence[Size] = ((4, 4),),
    shapes: int | None = 1,
    **model: Any,
) -> Tensor:
    """Losses and gradients of an R2ID with four blocks after a micro-batch of each grid."""
    torch.manual_seed(0)
    config = R2idConfig(width=16, heads=2, encoder_blocks=2, decoder_blocks=2, dropout=0.0, **model)
    made = R2ID(config, 2, 10)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    loss = R2idLoss(made, DiffusionConfig(), 4.0, 0)
    prepare_blocks(made.blocks(), TrainConfig(steps=1, **settings), CPU, shapes=shapes)
    for grid in grids:
        value, _ = loss(torch.ones(2, 2, *grid), torch.tensor([1, 2]), torch.arange(2), 0)
        value.backward()
    found = [p.grad.flatten() for p in made.parameters() if p.grad is not None]
    return torch.cat([value.detach().view(1), *found])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "checkpointing"), CASES)
def test_compiled_blocks_compute_the_same(kind: str, checkpointing: Any, traced: None) -> None:
    plain = gradients({"compile": False}, attention=[kind])
    settings = {"compile": True, "activation_checkpointing": checkpointing}
    found = gradients(settings, attention=[kind])
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    # One for each kind of block, and as many for those that are recomputed if not all are.
    assert graphs() <= (4 if checkpointing == 2 else 2)


@pytest.mark.slow
def test_code_is_generated_that_computes_the_same() -> None:
    settings = {"compile": True, "activation_checkpointing": "all"}
    plain = gradients({"compile": False})
    torch.testing.assert_close(gradients(settings), plain, atol=1e-5, rtol=1e-4)


def test_blocks_of_a_kind_share_one_graph(traced: None) -> None:
    gradients({"compile": True})
    assert graphs() == 2, "with and without a condition"


def test_few_shapes_have_code_of_their_own_and_many_share_it(traced: None) -> None:
    grids = [(2, 2), (2, 4), (4, 2), (3, 5), (5, 3)]
    gradients({"compile": True}, grids, shapes=len(grids))
    assert graphs() == 2 * len({height * width for height, width in grids})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gradients({"compile": True}, grids, shapes=None)
    assert graphs() <= 4, "the second one is for any number of tokens"


@pytest.mark.slow
def test_levels_compile(traced: None) -> None:
    levels = [LevelConfig(width=16, blocks=1)]
    plain = gradients({"compile": False}, [(6, 4)], levels=levels)
    found = gradients({"compile": True}, [(6, 4)], levels=levels)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lattice", "attention"])
def test_blocks_of_an_riae_compile(kind: str, traced: None) -> None:
    """Without graph breaks, which would be errors, at the random sizes of its steps."""
    config = RiaeConfig(
        kind=kind, width=32, latent_channels=3, **({} if kind == "lattice" else ATTENTION)
    )

    def gradients(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        model = RIAE(config, 1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        sizes = {"magnify": 0.5} if kind == "lattice" else {"magnify": 0.0, "decode_pixels": 16}
        loss = riae_loss(model, LossConfig(**sizes), 0)
        train = TrainConfig(steps=1, compile=compiled, activation_checkpointing="all")
        prepare_blocks(model.blocks(), train, CPU, shapes=None)
        for step in range(3):
            value, _ = loss(torch.ones(2, 1, 12, 16), torch.arange(2), step)
            value.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False))


def test_too_many_versions_are_said_and_do_not_end_a_run(
    traced: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blocks, "_VERSIONS", 2)
    layer = nn.Linear(3, 3)
    with torch._dynamo.config.patch(recompile_limit=2):
        prepare_blocks([layer], TrainConfig(steps=1, compile=True), CPU)
        for rows in range(1, 6):
            x = torch.ones(rows, 3)
            torch.testing.assert_close(layer(x), nn.Linear.forward(layer, x))
    assert capsys.readouterr().err.count("more than 2 combinations of shapes") == 1


def test_auto_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "missing", lambda gpu: None)
    for device, gathered, compiled in ((CPU, False, False), (GPU, False, True), (GPU, True, False)):
        layer = nn.Linear(2, 2)
        prepare_blocks([layer], TrainConfig(steps=1), device, gathered=gathered)
        assert isinstance(layer.forward, blocks._Compiled) == compiled


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(InputError, match=r"train.compile = True: .*engine.zero_stage 3"):
        prepare_blocks([nn.Linear(2, 2)], TrainConfig(steps=1, compile=True), GPU, gathered=True)


def test_without_a_compiler_auto_compiles_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    layer = nn.Linear(2, 2)
    prepare_blocks([layer], TrainConfig(steps=1), GPU)
    assert not isinstance(layer.forward, blocks._Compiled)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not compiled" in line and "no C compiler (no-such-compiler)" in line
    for device, kind in ((GPU, "C"), (CPU, r"C\+\+")):
        with pytest.raises(InputError, match=rf"train.compile = True: no {kind} compiler"):
            prepare_blocks([layer], TrainConfig(steps=1, compile=True), device)
