"""Damaged shards of a set, written again from the source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.plan import Plan, make_plan, read_plan
from data_prep.prepare import finish, write_shard
from r2id.config import PrepareConfig
from r2id.data.shards import MANIFEST, REJECTS
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
    # Of a key that is there twice, one of two shards is to blame, and their hashes agree with an edited manifest.
    broken = [number for number, file in enumerate(plan.files)
              if {file, str(Path(file).with_suffix(".parquet")), file.split("/")[0]} & blamed]
    belong = {name for file in plan.files for name in (file, str(Path(file).with_suffix(".parquet")))}
    extra = sorted(blamed - belong - {MANIFEST, REJECTS} - {file.split("/")[0] for file in plan.files})
    for name in extra:
        (folder / name).unlink(missing_ok=True)
    for number in track(broken, "repair", unit="shards"):
        file = plan.files[number]
        for name in (file, str(Path(file).with_suffix(".parquet"))):
            (folder / name).unlink(missing_ok=True)
        write_shard(plan, number)
    finish(plan)
    return sorted({*(plan.files[number] for number in broken), *extra, *(blamed & {MANIFEST, REJECTS})})


def _plan_of(folder: Path, source: Path | None) -> Plan:
    stored = read_plan(folder)
    settings = {name: value for name, value in stored["settings"].items() if name != "format_version"}
    where = source or (Path(stored["source"]) if stored["source"] else None)
    if where is not None and not where.exists():
        raise InputError(f"source {where}: no longer there: say with --source where it is now")
    labels = Path(settings.pop("labels")) if settings.get("labels") else None
    settings.pop("labels", None)
    return make_plan(PrepareConfig(**settings, labels=labels, source=where, out=folder, max_rejects=stored["max_rejects"]))
