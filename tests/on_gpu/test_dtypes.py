"""Under bfloat16 every module returns the same number format on a GPU as on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from r2id import dist
from r2id.config import R2idConfig, RiaeConfig
from r2id.diffusion.noise import noise_field
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from tests.stand_in import stand_in_gpu

SMALL = {"width": 32, "heads": 2, "encoder_blocks": 1, "decoder_blocks": 1}
RIAES = {
    "lattice": RiaeConfig(latent_channels=4, downsample=2, width=32, features=4),
    "attention": RiaeConfig(kind="attention", downsample=2.0, pixel_width=32, **SMALL),
}
R2IDS = {
    "context": R2idConfig(**SMALL),
    "cross": R2idConfig(conditioning="cross", **SMALL),
    "others": R2idConfig(attention=("axial", "linear", "tiled"), tile=2, halo=1, **SMALL),
    "levels": R2idConfig(levels=({"width": 32, "blocks": 1},), tile=2, halo=1, **SMALL),
}


def dtypes(module: nn.Module, device: str, use: Callable[[nn.Module, str], object]) -> list[str]:
    """Number formats of what every submodule returns, in order, when the module is used."""
    found: list[str] = []
    module.to(device)
    for name, part in module.named_modules():

        def note(_module: nn.Module, _given: object, out: object, name: str = name) -> None:
            if isinstance(out, Tensor):
                found.append(f"{name}: {out.dtype}")

        part.register_forward_hook(note)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        use(module, device)
    return found


def there_and_back(riae: nn.Module, device: str) -> None:
    assert isinstance(riae, RIAE)
    riae.decode(riae.encode(torch.zeros(1, 1, 8, 8).to(device)), (12, 9))


def predict(r2id: nn.Module, device: str) -> None:
    given = torch.zeros(2, 4, 4, 4), torch.full((2,), 0.5), torch.tensor([0, -1])
    r2id(*(part.to(device) for part in given))


CASES = {
    **{f"riae {name}": (lambda c=c: RIAE(c, 1), there_and_back) for name, c in RIAES.items()},
    **{f"r2id {name}": (lambda c=c: R2ID(c, 4, 10), predict) for name, c in R2IDS.items()},
}


@pytest.mark.parametrize(("make", "use"), CASES.values(), ids=CASES)
def test_modules_return_what_they_return_on_a_cpu(
    make: Callable[[], nn.Module], use: Callable[[nn.Module, str], object]
) -> None:
    on_cpu = dtypes(make(), "cpu", use)
    with stand_in_gpu():
        on_gpu = dtypes(make(), "cuda", use)
    # Points are decoded in other numbers at once on other devices.
    assert set(on_gpu) == set(on_cpu) and any("bfloat16" in line for line in on_cpu)


def test_a_seeds_noise_is_a_cpus_where_float32_is_multiplied_in_tf32() -> None:
    keys, expected = torch.arange(3), noise_field(torch.arange(3), 2, (5, 12))
    multiplied: list[torch.dtype] = []

    class Noting(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function.__name__ in ("matmul", "__matmul__"):
                multiplied.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    before = torch.backends.cuda.matmul.allow_tf32
    with stand_in_gpu():
        try:
            dist.allow_tf32(torch.device("cuda", 0))
            with Noting():
                found = noise_field(keys, 2, (5, 12), torch.device("cuda", 0))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        assert multiplied == [torch.float64] * 2 and found.dtype == torch.float32
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)
