"""Old names of settings, still read for one version, and settings that are no more.

A TOML file or override that uses one is read, with a note on stderr; the config in a checkpoint is
read silently. To rename a setting, add a line to SETTINGS; to rename a value of a setting, add one
to VALUES. Remove it a version later. To remove a setting, add a line to REMOVED.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2id.errors import InputError
from r2id.progress import say

SETTINGS = {
    "riae.cell": "riae.downsample",
    "riae.locality": "riae.gaussian_window",
    "riae.loss": "loss.pixel",
    "riae.texture": "loss.texture",
    "riae.encode_cloud": "loss.encode_cloud",
    "riae.latent_noise": "loss.latent_noise",
    "riae.decode_cloud": "loss.decode_cloud",
    "riae.decode_pixels": "loss.decode_pixels",
    "riae.jitter": "loss.jitter",
}
"""Old → new name, as ``section.key``."""
VALUES = {"r2id.attention": {"local": "tiled"}}
"""Today's name of a setting → old → new value."""
IGNORED = {"sample.attention_guidance"}
"""Settings of sampling that are no more. The config in a checkpoint is read without them."""
REMOVED = {
    "riae.attention": "cloud",
    "riae.latent_attention": "global",
    "riae.latent_blocks": 0,
    "riae.tile": 4,
    "riae.halo": 2.0,
    "riae.cell_fourier": [-3, 2],
    "riae.bounded": False,
    "riae.decode_scales": None,
    "riae.condition_on_pixel_size": False,
    "riae.cell_size": False,
    "riae.encode_scales": None,
    "loss.encode_scales": None,
    "loss.latent_mask": 0.0,
}
"""Settings that are no more → the value that holds now. A config that has this value is read
without them, and one that has another is refused."""


def renew_setting(name: str, value: Any) -> tuple[str, Any]:
    """Replace an old name, and an old value or those in a list, by today's."""
    name = SETTINGS.get(name, name)
    renamed = VALUES.get(name, {})

    def renew(item: Any) -> Any:
        return renamed.get(item, item) if isinstance(item, str) else item

    return name, [renew(item) for item in value] if isinstance(value, list) else renew(value)


def is_removed(name: str, value: Any, where: str, advice: str = "leave it out") -> bool:
    """Tell whether a setting was removed, and has the value that every model has now.

    Raises InputError, which begins with ``where`` and ends with ``advice``, when it has another.
    """
    if name not in REMOVED or value == REMOVED[name]:
        return name in REMOVED
    now = "does without it" if REMOVED[name] is None else f"has {REMOVED[name]!r}"
    raise InputError(
        f"{where}: {name} = {value!r}: was removed, and every model {now} now: {advice}"
    )


def renew_config(
    config: Mapping[str, Any], where: str | None = None, stored_in: Path | None = None
) -> dict[str, Any]:
    """Copy the config of a run (not of a pipeline) with today's names in place of old ones.

    ``where`` says where the config comes from; with it, what is old is noted on stderr.
    ``stored_in`` is the checkpoint or file of the config of a trained model. Raises InputError when
    a setting is given under both its names, or is refused by is_removed.
    """
    source, left_out = where or str(stored_in or "config"), list[str]()
    advice = "leave it out" if where else "only the version of r2id that trained this model uses it"
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
            if where is None and f"{section}.{key}" in IGNORED:
                continue
            if is_removed(f"{section}.{key}", old, source, advice):
                left_out.append(f"{section}.{key}")
                continue
            name, value = renew_setting(f"{section}.{key}", old)
            if where is not None:
                tell_if_renamed(where, f"{section}.{key}", old, name, value)
            new_section, _, new_key = name.partition(".")
            target = renewed.setdefault(new_section, {})
            both = {*part} if new_section == section else {*config.get(new_section, {})}
            if name != f"{section}.{key}" and new_key in both:
                raise InputError(
                    f"{source}: {section}.{key} is the old name of {name}, and both "
                    f"are set: remove {section}.{key}"
                )
            if isinstance(target, dict):  # anything else is no table, and fails validation later
                target[new_key] = value
    if where is not None and left_out:
        tell_left_out(where, *left_out)
    return renewed


def tell_left_out(where: str, *names: str) -> None:
    """Note on stderr which settings are left out, because they are no more."""
    say(f"{where}: {', '.join(names)}: removed; every model has the value that is set here")


def tell_if_renamed(where: str, old_name: str, old: Any, name: str, value: Any) -> None:
    """Note on stderr what an old name, or an old value, is called now."""
    if old_name != name:
        say(f"{where}: {old_name} is called {name} now; the old name is read for one more version")
    if old is not value and old != value:  # not a number is not equal to itself
        change = f"{name} = {old!r} is {value!r} now"
        say(f"{where}: {change}; the old value is read for one more version")
