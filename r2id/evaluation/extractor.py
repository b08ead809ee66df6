"""What images are compared by: features of a network, of the classifier that is trained here or of a file the user has.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from r2id.errors import InputError, WorkError
from r2id.evaluation.images import resize
from r2id.files import sha256_file
from r2id.images import to_uint8
from r2id.models.coords import Size

_BATCH = 100


class Extractor(Protocol):
    """Features in which distributions of images are compared."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """Identity of the weights, hexadecimal."""

    @property
    def size(self) -> Size:
        """Height and width to which every image is brought first, by r2id.evaluation.images.resize."""

    def features(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [−1, 1] of any size → float32 [N, D], on the CPU."""


@dataclass(frozen=True)
class FileExtractor:
    """A TorchScript program that makes [N, D] of uint8 images [N, 3, H, W], such as the Inception-v3 that StyleGAN's
    authors publish for the FID (``inception-2015-12-05.pt``). Grey images are given as colour."""

    name: str
    hash: str
    size: Size
    program: torch.jit.ScriptModule
    device: torch.device
    options: dict[str, bool]

    @classmethod
    def load(cls, place: str | Path, size: Size, device: torch.device) -> FileExtractor:
        """From a file or an address. InputError when it is no TorchScript program, or its output is not one row of numbers
        for each image; WorkError when it cannot be downloaded."""
        file = (
            download(str(place)) if str(place).startswith(("http://", "https://")) else Path(place)
        )
        if not file.is_file():
            raise InputError(f"--extractor {file}: no such file")
        try:
            program = torch.jit.load(str(file), map_location=device).eval()
        except RuntimeError as error:
            raise InputError(
                f"--extractor {file}: not a TorchScript file: {str(error).strip().splitlines()[0]}"
            ) from None
        wanted = {"return_features"} & {
            argument.name for argument in program.forward.schema.arguments
        }
        extractor = cls(
            file.name, sha256_file(file), size, program, device, dict.fromkeys(wanted, True)
        )
        extractor.check(file)
        return extractor

    def check(self, file: Path) -> None:
        """InputError when two grey images do not give [2, D] of finite numbers."""
        try:
            made = self.features(torch.zeros(2, 1, *self.size))
        except RuntimeError as error:
            raise InputError(
                f"--extractor {file}: takes no uint8 images [N, 3, {self.size[0]}, {self.size[1]}]: "
                f"{str(error).strip().splitlines()[-1]}"
            ) from None
        if made.dim() != 2 or len(made) != 2 or not made.isfinite().all():
            raise InputError(
                f"--extractor {file}: makes {list(made.shape)} of 2 images; must be finite numbers [2, D]"
            )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """See Extractor."""
        return torch.cat(
            [
                self.program(self._bytes(some), **self.options).float().cpu()
                for some in images.split(_BATCH)
            ]
        )

    def _bytes(self, images: Tensor) -> Tensor:
        seen = resize(images.to(self.device), self.size)
        return to_uint8(seen).expand(-1, 3, -1, -1)


def download(url: str) -> Path:
    """The file at an address, from where PyTorch keeps what it downloads (``TORCH_HOME``), downloaded when it is not there.
    WorkError when it cannot be."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=False)  # complete or not at all
        except OSError as error:
            raise WorkError(f"--extractor {url}: cannot be downloaded: {error}") from None
    return file
