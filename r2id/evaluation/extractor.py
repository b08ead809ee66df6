"""Feature extractors: networks that map images to features, in which sets of images are compared.

There are three kinds: the classifier that r2id trains (r2id.evaluation.classifier); for images
without classes, a network that it trains on them alone (r2id.evaluation.self_supervised); and a
TorchScript file that the user names, such as the Inception-v3 of the published FID.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from r2id.errors import InputError, WorkError
from r2id.evaluation.images import resize
from r2id.files import sha256_file
from r2id.images import to_uint8
from r2id.models.coords import Size

_BATCH = 100


class FeatureExtractor(Protocol):
    """A network that maps images to feature vectors."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """SHA-256 of the weights, hexadecimal."""

    @property
    def size(self) -> Size:
        """Height and width that every image is resized to (by r2id.evaluation.images.resize)."""

    def features(self, images: Tensor) -> Tensor:
        """Extract features: images [N, C, H, W] in [−1, 1] of any size → float32 [N, D] on CPU."""


@dataclass(frozen=True)
class TorchScriptExtractor:
    """A TorchScript program that maps uint8 images [N, 3, H, W] to features [N, D].

    An example is the Inception-v3 that StyleGAN's authors publish for the FID
    (``inception-2015-12-05.pt``). Grey images are repeated to three channels.
    """

    name: str
    hash: str
    size: Size
    program: torch.jit.ScriptModule
    device: torch.device
    options: dict[str, bool]
    """Keyword arguments of the program. Inception returns logits unless return_features is set."""

    @classmethod
    def load(cls, place: str | Path, size: Size, device: torch.device) -> TorchScriptExtractor:
        """Load an extractor from a file or a URL.

        Raises InputError when it is not a TorchScript program, or its output is not one row of
        finite numbers per image; WorkError when it cannot be downloaded.
        """
        file = (
            download(str(place)) if str(place).startswith(("http://", "https://")) else Path(place)
        )
        if not file.is_file():
            raise InputError(f"--extractor {file}: no such file")
        try:
            program = torch.jit.load(str(file), map_location=device).eval()
        except RuntimeError as error:
            # PyTorch's first sentence says what is wrong; more of them guess why.
            reason = str(error).strip().splitlines()[0].partition(". ")[0]
            raise InputError(f"--extractor {file}: not a TorchScript file: {reason}") from None
        wanted = {"return_features"} & {
            argument.name for argument in program.forward.schema.arguments
        }
        extractor = cls(
            file.name, sha256_file(file), size, program, device, dict.fromkeys(wanted, True)
        )
        extractor.check(file)
        return extractor

    def check(self, file: Path) -> None:
        """Raise InputError unless two grey images give [2, D] of finite numbers."""
        height, width = self.size
        try:
            with torch.no_grad():
                made = self._run(torch.zeros(2, 1, *self.size))
        except RuntimeError as error:
            raise InputError(
                f"--extractor {file}: takes no uint8 images [N, 3, {height}, {width}]; "
                "--extractor-size HxW sets another size: "
                f"{str(error).strip().splitlines()[-1]}"
            ) from None
        is_tensor = isinstance(made, Tensor)
        if not (is_tensor and made.dim() == 2 and len(made) == 2 and made.isfinite().all()):
            kind = list(made.shape) if is_tensor else f"a {type(made).__name__}"
            raise InputError(
                f"--extractor {file}: makes {kind} of 2 images of {height}x{width}; must be one "
                "tensor [2, D] of finite numbers"
            )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """See FeatureExtractor.features."""
        return torch.cat([self._run(part).float().cpu() for part in images.split(_BATCH)])

    def _run(self, images: Tensor) -> Any:
        resized = resize(images.to(self.device), self.size)
        return self.program(to_uint8(resized).expand(-1, 3, -1, -1), **self.options)


def download(url: str) -> Path:
    """Return the file at a URL, downloaded unless PyTorch's cache (``TORCH_HOME``) has it.

    Raises WorkError when it cannot be downloaded.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            # It writes the whole file or none.
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except OSError as error:
            raise WorkError(f"--extractor {url}: cannot be downloaded: {error}") from None
    return file
