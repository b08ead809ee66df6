"""Models of the Hugging Face Hub, by their names: ``owner/name``, or ``owner/name@revision``.

Such a model is a folder that ``r2id checkpoint export`` wrote. Its files are kept in the hub's own
cache, where huggingface_hub finds them again without the network. What that library reads from the
environment holds here too: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import r2id
from r2id.checkpoints.pretrained import FORMAT, VERSIONS
from r2id.errors import InputError

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_PART = r"[A-Za-z0-9_][\w.-]*"
_PATIENCE = 10.0
"""Seconds for the hub's first answer."""
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?", re.ASCII)


def is_hub_name(text: str) -> bool:
    """Tell whether a model that is called so is to be looked for on the hub.

    A path that exists is none, and one of a folder that does: a name mistyped there is not sent
    anywhere.
    """
    if not _NAME.fullmatch(text) or text.endswith(".safetensors"):
        return False
    return not (Path(text).exists() or Path(text).parent.exists())


def fetch(name: str, revision: str | None = None, cache_dir: Path | str | None = None) -> Path:
    """Fetch a model from the hub, unless it is in the cache → its folder there.

    ``revision`` is a branch, a tag or a commit; None is the one in the name, or else the newest.
    ``cache_dir`` is a cache other than the hub's own. Without a network, what is in the cache
    serves. Raises InputError when there is no such model or revision, when neither the hub nor the
    cache can give it, and when it is no model that this version of r2id reads.
    """
    try:
        import huggingface_hub  # noqa: F401 (an optional dependency)
    except ImportError:
        raise InputError(
            f"{name}: no such file or folder; a model of the Hugging Face Hub needs "
            "huggingface_hub: pip install 'r2id[hub]'"
        ) from None
    match = _NAME.fullmatch(name)
    if not match:
        raise InputError(f"{name}: must be a path, or a model of the hub as owner/name")
    repository, named = match.groups()
    revision = revision or named
    absence = _absence(repository, revision)
    config = _download(repository, _CONFIG, revision, cache_dir, absence)
    _check(repository, config)
    # Of the same commit, even if somebody publishes another one meanwhile.
    return _download(repository, _WEIGHTS, config.parent.name, cache_dir, absence).parent


def _absence(repository: str, revision: str | None) -> str | None:
    """Tell why the hub does not answer; None if it does, and knows the model and the revision.

    Asked once, because files are asked for again and again, for half a minute.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        HfApi(library_name="r2id").model_info(repository, revision=revision, timeout=_PATIENCE)
    except (
        errors.HFValidationError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ) as error:
        raise _refusal(repository, revision, error) from None
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # of the library's HTTP client, which is another in each version
        return f"{constants.ENDPOINT} cannot be reached: {_first_line(error)}"
    return None


def _download(
    repository: str,
    file: str,
    revision: str | None,
    cache_dir: Path | str | None,
    absence: str | None,
) -> Path:
    """Fetch one file into the cache, or find it there if the hub is absent → its place."""
    from huggingface_hub import constants, errors, hf_hub_download

    at = f" of revision {revision}" if revision else ""
    try:
        return Path(
            hf_hub_download(
                repository,
                file,
                revision=revision,
                cache_dir=cache_dir,
                library_name="r2id",
                library_version=r2id.__version__,
                local_files_only=absence is not None,
            )
        )
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{repository}: no such file or folder here, {file}{at} is not in the hub's cache "
            f"{cache_dir or constants.HF_HUB_CACHE}, and {absence or _first_line(error)}"
        ) from None
    except errors.EntryNotFoundError:
        raise InputError(
            f"{repository}: holds no r2id model: there is no {file}{at} on {constants.ENDPOINT}"
        ) from None
    except Exception as error:
        raise _refusal(repository, revision, error) from None


def _refusal(repository: str, revision: str | None, error: Exception) -> InputError:
    """Say in one line what the hub answered."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        reason = f"is gated on {hub}: ask its owner for access, then run hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = (
            f"no such file or folder here, and no such model on {hub} (or a private one, which "
            "needs hf auth login)"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"has no revision {revision!r} on {hub}"
    elif isinstance(error, errors.HFValidationError):
        reason = f"no such file or folder here, and no name of the hub: {_first_line(error)}"
    else:
        reason = f"cannot be downloaded from {hub}: {_first_line(error)}"
    return InputError(f"{repository}: {reason}")


def _check(repository: str, file: Path) -> None:
    """Raise InputError when a config.json is not that of a model that can be read."""
    try:
        config: Any = json.loads(file.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(
            f"{repository}: holds no r2id model: its {_CONFIG} has no format {FORMAT!r}"
        )
    version = config.get("format_version")
    if version not in VERSIONS:
        raise InputError(
            f"{repository}: format_version {version}; this version of r2id reads "
            f"{', '.join(VERSIONS)}"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
