"""The command that lists the settings of configs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from r2id.cli.options import Json, Overrides, app, report
from r2id.config import load_config
from r2id.config.reference import list_settings


@app.command(rich_help_panel="Training")
def settings(
    stage: Annotated[
        str,
        typer.Argument(
            metavar="STAGE|CONFIG",
            help="riae, r2id or pipeline, for all settings of such a config; or the TOML file of "
            "one, to see what it sets beside the defaults.",
        ),
    ],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """List the settings of a config: allowed values, default, meaning, and what a file sets."""
    given = stage.endswith(".toml") or overrides
    config = load_config(Path(stage), overrides or ()) if given else None
    found = list_settings(config.stage if config is not None else stage, config)
    report({"settings": found}, as_json, _lines)


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for setting in result["settings"]:
        default = "required" if setting["default"] is None else f"default {setting['default']}"
        value = "" if setting["value"] is None else f", here {setting['value']}"
        lines += [f"{setting['name']}: {setting['type']}, {default}{value}"]
        lines += [f"    {setting['description']}"] if setting["description"] else []
    return lines
