"""Repair a shard set: write damaged shards again from the source.

This is possible because a shard depends on the shard plan alone: the same source gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.prepare import check_rebuilt, finish, write_shard
from data_prep.shard_plan import ShardPlan, make_shard_plan, read_shard_plan, recorded_hashes
from r2id.config import PrepareConfig
from r2id.data.index import find_intact
from r2id.data.manifest import MANIFEST, REJECTS
from r2id.data.verify import Damage
from r2id.errors import InputError
from r2id.files import exclusive
from r2id.progress import track


def repair(folder: Path, damages: Sequence[Damage], source: Path | None = None) -> dict[str, str]:
    """Write damaged files again, and remove shards that do not belong to the set.

    ``damages`` come from r2id.data.verify. ``source`` is the path of the source, if it has moved.
    Returns what was done to each file: "rebuilt", "removed" or, for the manifest and the table of
    rejects, "rewritten". Raises InputError when the shard plan is damaged, or the source is missing
    or another one; WorkError when the source gives other bytes than before, or another process is
    at work in the folder.
    """
    with exclusive(folder):
        plan = _plan_of(folder, source)
        blamed = {damage.file for damage in damages}
        broken = [file for file in plan.files if _is_broken(folder, file, blamed)]
        expected = _expected_hashes(folder, blamed)
        belong = {name for file in plan.files for name in (file, _index_of(file))}
        present = {
            path.relative_to(folder).as_posix()
            for path in folder.glob("*/shard-*")
            if path.is_file()
        }
        extra = sorted(present - belong)
        _remove(folder, extra)
        for file in track(broken, "repair", unit="shards"):
            _remove(folder, [file, _index_of(file)])
            write_shard(plan, plan.files.index(file))
            check_rebuilt(plan, file, expected)
        finish(plan)
        return {
            **dict.fromkeys(broken, "rebuilt"),
            **dict.fromkeys(extra, "removed"),
            **dict.fromkeys(sorted(blamed & {MANIFEST, REJECTS}), "rewritten"),
        }


def _is_broken(folder: Path, file: str, blamed: set[str]) -> bool:
    """Tell whether a shard has to be written again."""
    # A key that occurs twice is reported for the whole split. Any of its shards may be the wrong
    # one, even if its hash is in the manifest, which may have been edited.
    if blamed & {file, _index_of(file), file.split("/")[0]}:
        return True
    # When the manifest is damaged, verify may have stopped before it checked the shards.
    return MANIFEST in blamed and find_intact(folder, file) is None


def _expected_hashes(folder: Path, blamed: set[str]) -> dict[str, str]:
    """Return the recorded SHA-256 of each shard, but of none whose record may be wrong."""
    if MANIFEST in blamed:
        return {}
    recorded = recorded_hashes(folder)
    return {file: recorded[file] for file in recorded if file.split("/")[0] not in blamed}


def _plan_of(folder: Path, source: Path | None) -> ShardPlan:
    """Load a set's plan, and check that the source is still the same."""
    stored = read_shard_plan(folder)
    settings = {
        name: value for name, value in stored["settings"].items() if name != "format_version"
    }
    before = Path(stored["source"]) if stored["source"] else None
    where = source or before
    if where is not None and not where.exists():
        raise InputError(f"source {where}: no longer there: say with --source where it is now")
    labels = Path(stored["labels"]) if stored["labels"] else None
    if labels and where and before and not labels.exists() and labels.is_relative_to(before):
        labels = where / labels.relative_to(before)  # it has moved with the source
    return make_shard_plan(
        PrepareConfig(
            **settings, labels=labels, source=where, out=folder, max_rejects=stored["max_rejects"]
        )
    )


def _index_of(file: str) -> str:
    return str(Path(file).with_suffix(".parquet"))


def _remove(folder: Path, files: Sequence[str]) -> None:
    for file in files:
        (folder / file).unlink(missing_ok=True)
