"""Networks that the evaluation trains, kept in a safetensors file for the next evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from r2id.files import write_atomic
from r2id.progress import say

Network = TypeVar("Network", bound=nn.Module)


def identity_of(*facts: Any) -> str:
    """Hash what a network depends on: its data and recipe."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def hash_of(model: nn.Module) -> str:
    """SHA-256 of the weights, hexadecimal."""
    return hashlib.sha256(save(_tensors(model))).hexdigest()


def write_network(file: Path, identity: str, model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Save the weights of a network of this identity, and facts about it."""
    text = json.dumps({"identity": identity, **facts})
    write_atomic(file, save(_tensors(model), {"r2id": text}))


def read_network(
    file: Path, identity: str, make: Callable[[], Network]
) -> tuple[Network, dict[str, Any]] | None:
    """Read a saved network, for use alone, and its facts.

    Returns None when there is none, or it is damaged or of another identity.
    """
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()["r2id"])
            if facts.pop("identity") != identity:
                return None
            model = make()
            model.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        say(f"{file}: damaged; training it again")
        return None
    return model.eval().requires_grad_(False), facts


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
