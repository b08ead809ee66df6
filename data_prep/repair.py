"""Damaged shards of a set, written again from the source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.plan import Plan, make_plan, read_plan
from data_prep.prepare import finish, write_shard
from r2id.config import PrepareConfig
from r2id.data.shards import MANIFEST, REJECTS, find_intact
from r2id.data.verify import Damage
from r2id.errors import InputError
from r2id.progress import track


def repair(folder: Path, damages: Sequence[Damage], source: Path | None = None) -> list[str]:
    """Write the files again that verify found damaged; remove shards that do not belong to the set. Returns their names.

    ``source`` is where the source is now, when it has moved. InputError when the plan is damaged, or the source is gone or
    another one.
    """
    plan = _plan_of(folder, source)
    blamed = {damage.file for damage in damages}
    broken = [number for number, file in enumerate(plan.files) if _is_broken(folder, file, blamed)]
    belong = {name for file in plan.files for name in (file, _index_of(file))}
    present = {path.relative_to(folder).as_posix() for path in folder.glob("*/shard-*") if path.is_file()}
    extra = sorted(present - belong)
    for name in (*extra, *(name for number in broken for name in (plan.files[number], _index_of(plan.files[number])))):
        (folder / name).unlink(missing_ok=True)
    for number in track(broken, "repair", unit="shards"):
        write_shard(plan, number)
    finish(plan)
    return sorted({*(plan.files[number] for number in broken), *extra, *(blamed & {MANIFEST, REJECTS})})


def _is_broken(folder: Path, file: str, blamed: set[str]) -> bool:
    """Whether a shard has to be written again."""
    # Of a key that is there twice, one of the split's shards is to blame, and its hash may agree with an edited manifest.
    if blamed & {file, _index_of(file), file.split("/")[0]}:
        return True
    # Where the manifest cannot be believed, verify may not have come to the shards.
    return MANIFEST in blamed and find_intact(folder, file) is None


def _plan_of(folder: Path, source: Path | None) -> Plan:
    stored = read_plan(folder)
    settings = {name: value for name, value in stored["settings"].items() if name != "format_version"}
    where = source or (Path(stored["source"]) if stored["source"] else None)
    if where is not None and not where.exists():
        raise InputError(f"source {where}: no longer there: say with --source where it is now")
    labels = Path(stored["labels"]) if stored["labels"] else None
    return make_plan(PrepareConfig(**settings, labels=labels, source=where, out=folder, max_rejects=stored["max_rejects"]))


def _index_of(file: str) -> str:
    """The index of a shard, relative to the set like the shard."""
    return str(Path(file).with_suffix(".parquet"))
