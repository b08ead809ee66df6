"""Old names of settings, still read for one version.

A TOML file or override that uses one is read, with a note on stderr; the config in a checkpoint is
read silently. To rename a setting, add a line to SETTINGS; to rename a value of a setting, add one
to VALUES. Remove it a version later.
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
"""Old → new name, as ``section.key``."""
VALUES = {
    "riae.attention": {"local": "tiled"},
    "riae.latent_attention": {"local": "tiled"},
    "r2id.attention": {"local": "tiled"},
}
"""Today's name of a setting → old → new value."""
REMOVED = {"sample.attention_guidance"}
"""Settings that are no more. The config in a checkpoint is read without them."""


def renew_setting(name: str, value: Any) -> tuple[str, Any]:
    """Replace an old name, and an old value or those in a list, by today's."""
    name = SETTINGS.get(name, name)
    renamed = VALUES.get(name, {})

    def renew(item: Any) -> Any:
        return renamed.get(item, item) if isinstance(item, str) else item

    return name, [renew(item) for item in value] if isinstance(value, list) else renew(value)


def renew_config(config: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Copy the config of a run (not of a pipeline) with today's names in place of old ones.

    ``where`` says where the config comes from; with it, each old name is noted on stderr. Raises
    InputError when a setting is given under both its names.
    """
    renewed: dict[str, Any] = {
        name: {} if isinstance(part, dict) else part for name, part in config.items()
    }
    if where is None and "riae" in config and "kind" not in config["riae"]:
        renewed["riae"]["kind"] = "attention"  # what a checkpoint without a kind has
    if where is None and "riae" in config and "lapped" not in config["riae"]:
        renewed["riae"]["lapped"] = False  # likewise
    if where is None and "r2id" in config and "conditioning" not in config["r2id"]:
        renewed["r2id"]["conditioning"] = "cross"  # likewise
    for section, part in config.items():
        for key, old in part.items() if isinstance(part, dict) else ():
            if where is None and f"{section}.{key}" in REMOVED:
                continue
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
            if isinstance(target, dict):  # anything else is no table, and fails validation later
                target[new_key] = value
    return renewed


def tell_if_renamed(where: str, old_name: str, old: Any, name: str, value: Any) -> None:
    """Note on stderr what an old name, or an old value, is called now."""
    if old_name != name:
        say(f"{where}: {old_name} is called {name} now; the old name is read for one more version")
    if old is not value and old != value:  # not a number is not equal to itself
        change = f"{name} = {old!r} is {value!r} now"
        say(f"{where}: {change}; the old value is read for one more version")
