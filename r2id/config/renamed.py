"""Old names of settings, still read for one version.

TOML files and overrides that use one are read with a word on stderr; configs that checkpoints store
are read silently. To rename a setting, add a line to SETTINGS (``section.key``) or to VALUES (what
it may be set to), and remove it a version later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r2id.errors import InputError
from r2id.progress import say

SETTINGS = {
    "riae.cell": "riae.downsample",
    "riae.cell_size": "riae.condition_on_pixel_size",
    "riae.locality": "riae.gaussian_window",
    "riae.loss": "loss.pixel",
    "riae.texture": "loss.texture",
    "riae.encode_cloud": "loss.encode_cloud",
    "riae.encode_scales": "loss.encode_scales",
    "riae.latent_noise": "loss.latent_noise",
    "riae.decode_cloud": "loss.decode_cloud",
    "riae.decode_pixels": "loss.decode_pixels",
    "riae.jitter": "loss.jitter",
}
"""Old → new name."""
VALUES = {
    "riae.attention": {"local": "tiled"},
    "riae.latent_attention": {"local": "tiled"},
    "r2id.attention": {"local": "tiled"},
}
"""New name of a setting → its old → new values."""


def renew_setting(name: str, value: Any) -> tuple[str, Any]:
    """Replace an old name, and an old value (or those in a list), by today's."""
    name = SETTINGS.get(name, name)
    renamed = VALUES.get(name, {})

    def renew(item: Any) -> Any:
        return renamed.get(item, item) if isinstance(item, str) else item

    return name, [renew(item) for item in value] if isinstance(value, list) else renew(value)


def renew_config(config: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Replace all old names in the config of a run (not of a pipeline): a copy under today's names.

    With ``where``, the place that the config comes from, each old name is told on stderr. Raises
    InputError when one setting is given under both its names.
    """
    renewed: dict[str, Any] = {
        name: {} if isinstance(part, dict) else part for name, part in config.items()
    }
    for section, part in config.items():
        for key, old in part.items() if isinstance(part, dict) else ():
            name, value = renew_setting(f"{section}.{key}", old)
            if where is not None:
                tell_if_renamed(where, f"{section}.{key}", old, name, value)
            new_section, _, new_key = name.partition(".")
            target = renewed.setdefault(new_section, {})
            both = {*part} if new_section == section else {*config.get(new_section, {})}
            if name != f"{section}.{key}" and new_key in both:
                raise InputError(
                    f"{where or 'config'}: {section}.{key} is the old name of {name}, and both "
                    f"are set: remove {section}.{key}"
                )
            if isinstance(target, dict):  # what is none fails validation
                target[new_key] = value
    return renewed


def tell_if_renamed(where: str, old_name: str, old: Any, name: str, value: Any) -> None:
    """Say on stderr what an old name, or an old value, is called now."""
    if old_name != name:
        say(f"{where}: {old_name} is called {name} now; the old name is read for one more version")
    if old != value:
        told = f"{name} = {old!r} is {value!r} now"
        say(f"{where}: {told}; the old value is read for one more version")
