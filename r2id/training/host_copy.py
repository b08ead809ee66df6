"""Bringing a scalar from the device to the host without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A scalar's copy on the host, made in the background and read later."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.value = torch.zeros((), pin_memory=cuda)
        self.copied = torch.cuda.Event() if cuda else None

    def start(self, value: Tensor) -> None:
        """Start copying a scalar that is on the device."""
        self.value.copy_(value, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def read(self) -> float:
        """Wait for the last copy that was started, and return it."""
        if self.copied is not None:
            self.copied.synchronize()
        return float(self.value)
