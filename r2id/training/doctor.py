"""A look at the machine before training: what is there, what will be used, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from r2id.config import PipelineRun, R2idRun, RiaeRun, Run, find_stages, load_config
from r2id.config.batch_split import most_processes
from r2id.errors import InputError
from r2id.openmp import waiting
from r2id.training import compilers
from r2id.training.reachable import existing_part, find_server, find_store

State = Literal["ok", "note", "broken"]
_SHOWN = ("r2id", "torch", "deepspeed", "webdataset", "mlflow", "prefect")
_GB = 1e9
_LITTLE_DISK, _NO_DISK, _LITTLE_SHARED = 10 * _GB, 1 * _GB, 0.25 * _GB


@dataclass(frozen=True)
class Check:
    """What was found about one thing."""

    name: str
    state: State
    """"note" is something to know; only what is "broken" keeps training from working."""
    found: str
    advice: str = ""
    """What to do about it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs."""


def examine(config: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Look at everything that training needs → whether it can work, and all checks.

    With the config of a stage or a pipeline, what is looked for is what that will use. Raises
    InputError when it cannot be read.
    """
    loaded = load_config(config, overrides) if config else None
    stages = _stages(loaded, config.parent) if loaded and config else {}
    checks = [_python(), _packages()]
    torch = _import_torch()
    if isinstance(torch, Check):
        checks.append(torch)
    else:
        checks += [*_devices(torch), _precision(torch, stages), _threads(torch, stages), _memory()]
    checks += [
        *_disks(_folders(loaded)),
        _store(stages),
        _server(),
        _compiler(stages, _has_gpu(torch)),
    ]
    return {
        "ready": all(check.state != "broken" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def describe(found: Mapping[str, Any]) -> list[str]:
    """Return the result of ``examine`` as lines of text."""
    lines = []
    for check in found["checks"]:
        lines.append(f"{check['state']:6}  {check['name']:9}  {check['found']}")
        if check["advice"]:
            lines.append(f"{'':19}→ {check['advice']}")
    verdict = "ready to train" if found["ready"] else "not ready to train: see what is broken"
    return [*lines, verdict]


Stages = Mapping[str, RiaeRun | R2idRun]


def _stages(loaded: Run, base: Path) -> dict[str, RiaeRun | R2idRun]:
    """Return the stages that a config trains; the files that it names are in ``base``."""
    if not isinstance(loaded, PipelineRun):
        return {loaded.stage: loaded}
    return {name: stage.run for name, stage in find_stages(loaded, base).items()}


def _folders(loaded: Run | None) -> list[Path]:
    """Return the folders that a run writes to; without a config, runs go to the working folder."""
    if loaded is None:
        return [Path()]
    if not isinstance(loaded, PipelineRun):
        return [loaded.run]
    shards = loaded.prepare.out
    return [loaded.out] if (shards / "manifest.json").exists() else [shards, loaded.out]


def _python() -> Check:
    version = platform.python_version()
    facts = {"version": version, "executable": sys.executable}
    return Check("python", "ok", f"{version}, {sys.executable}", facts=facts)


def _packages() -> Check:
    """Compare what is installed with what r2id requires."""
    versions = {name: _version(name) for name in _SHOWN}
    shown = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    try:
        required = [Requirement(line) for line in metadata.requires("r2id") or ()]
    except metadata.PackageNotFoundError:
        required = [Requirement(name) for name in _SHOWN[1:]]
    wrong = []
    for need in required:
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        version = _version(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name}{need.specifier} ({version or 'missing'})")
    facts = {"versions": versions, "wrong": wrong}
    if not wrong:
        return Check("packages", "ok", shown, facts=facts)
    advice = f"needed: {', '.join(wrong)}: pip install r2id again, or bash launch/setup.sh"
    return Check("packages", "broken", shown, advice, facts)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_torch() -> Any:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of its own that is missing or damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Check("torch", "broken", reason, "install torch again, for this machine")
    return torch


def _has_gpu(torch: Any) -> bool:
    return not isinstance(torch, Check) and torch.cuda.is_available()


def _devices(torch: Any) -> Iterable[Check]:
    """Find the GPUs, each of which multiplies a matrix, or else tell why the CPU is used."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{index}"
        wrong = _unsupported(torch, index)
        if wrong is not None:
            yield wrong
            continue
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(8, 8, device=name).mm(torch.ones(8, 8, device=name)).sum().item()
            kind = torch.cuda.get_device_name(index)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            advice = "another process may hold it; CUDA_VISIBLE_DEVICES chooses others"
            yield Check(name, "broken", reason, advice)
            continue
        found = f"{kind}, {free / _GB:.1f} of {total / _GB:.1f} GB free"
        yield Check(name, "ok", found, facts={"name": kind, "free": free, "total": total})
    if torch.cuda.is_available():
        return
    listed = _run("nvidia-smi", "--list-gpus")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    found, facts = f"the CPU: {_cpu()}", {"name": _cpu(), "cores": _cores()}
    if not listed:
        yield Check("device", "ok", f"{found}; no GPU was found", facts=facts)
    elif hidden is not None:
        yield Check("device", "note", f"{found}; CUDA_VISIBLE_DEVICES={hidden} hides the GPUs", "")
    elif torch.version.cuda is None:
        advice = "install a torch for CUDA (see pytorch.org)"
        yield Check("device", "note", f"{found}; torch {torch.__version__} is for CPUs", advice)
    else:
        advice = f"the GPU's driver may be older than CUDA {torch.version.cuda}, which torch needs"
        yield Check("device", "broken", f"{found}; torch cannot use the GPU", advice)


def _unsupported(torch: Any, index: int) -> Check | None:
    """Tell if torch has no kernels for a GPU: its first ones would fail, and not say why."""
    own, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not built or any(_runs_on(target, own) for target in built):
        return None
    kind = torch.cuda.get_device_name(index)
    found = f"{kind} is sm_{own[0]}{own[1]}; torch {torch.__version__} has {', '.join(built)}"
    advice = (
        "install a torch for a newer CUDA (an RTX 50 needs torch 2.7 or later for CUDA 12.8 or "
        "later; see pytorch.org)"
    )
    facts = {"name": kind, "capability": list(own), "built": built}
    return Check(f"cuda:{index}", "broken", found, advice, facts)


def _runs_on(target: str, own: tuple[int, int]) -> bool:
    """Tell whether kernels for a target, such as sm_86, run on a GPU of a compute capability.

    Those of sm_XY run on the same major number from that minor one on; those with an "a" on that
    one alone. From compute_XY the driver compiles for all later ones.
    """
    kind, _, number = target.partition("_")
    digits = number.rstrip("af")
    if not digits.isdecimal():
        return True  # of another maker, which names its GPUs otherwise
    made_for = int(digits[:-1]), int(digits[-1])
    if kind == "compute":
        return made_for <= own
    if number.endswith("a"):
        return made_for == own
    return made_for[0] == own[0] and made_for[1] <= own[1]


def _precision(torch: Any, stages: Stages) -> Check:
    """Say what numbers a run computes with, and whether bfloat16 is fast here."""
    from r2id.training.precision import fastest_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fastest, why = fastest_precision(device)
    chosen = {name: stage.train.precision for name, stage in stages.items()}
    words = ", ".join(
        f"{name} {fastest if precision == 'auto' else precision} ({precision})"
        for name, precision in chosen.items()
    )
    facts = {"chosen": chosen, "auto": fastest}
    found = f"{words or f'train.precision auto is {fastest} here'}, {why}"
    slow = fastest == "float32" and any(one not in ("auto", "float32") for one in chosen.values())
    advice = "train.precision=auto may be faster, if nothing else asks for it" if slow else ""
    return Check("precision", "note" if slow else "ok", found, advice, facts)


def _threads(torch: Any, stages: Stages) -> Check:
    """Say how many threads each process computes with, beside the cores that it may use."""
    threads, cores, given = torch.get_num_threads(), _cores(), os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={given}" if given else "one per core; OMP_NUM_THREADS changes it"
    gpus = max(1, torch.cuda.device_count() if torch.cuda.is_available() else 1)
    # The most that one of the stages has.
    processes = max((_processes(stage, gpus) for stage in stages.values()), default=gpus)
    found = (
        f"{threads} in each process: {why}; {cores:g} cores, {processes} process"
        f"{'es' if processes > 1 else ''} by launch/train.sh; {waiting()}"
    )
    facts = {"threads": threads, "cores": cores, "OMP_NUM_THREADS": given, "processes": processes}
    facts["waiting"] = waiting()
    if threads <= max(1, cores):
        return Check("threads", "ok", found, facts=facts)
    advice = f"threads wait for each other: export OMP_NUM_THREADS={max(1, int(cores))}"
    return Check("threads", "note", found, advice, facts)


def _processes(stage: RiaeRun | R2idRun, gpus: int) -> int:
    try:
        return most_processes(stage.train, gpus)
    except InputError:  # its batch is wrong for any number, which training says
        return gpus


def _memory() -> Check:
    """Find the free memory, and the shared memory, by which loaders hand images over."""
    import psutil
    import torch

    from r2id.sampling.memory import free_memory

    free, total = free_memory(torch.device("cpu")), psutil.virtual_memory().total
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    facts = {"free": free, "total": total, "shared": shared}
    found = f"{free / _GB:.1f} of {total / _GB:.1f} GB free"
    if shared is None or shared >= _LITTLE_SHARED:
        return Check("memory", "ok", found, facts=facts)
    advice = "data.workers above 0 need more (docker run --shm-size 8g)"
    found += f", {shared / _GB:.2f} GB of shared memory"
    return Check("memory", "note", found, advice, facts)


def _disks(folders: Iterable[Path]) -> Iterable[Check]:
    """Find the free space of every disk that is written to."""
    existing = [existing_part(folder) for folder in folders]
    alike = {(part.stat().st_dev, os.access(part, os.W_OK)): part for part in existing}
    for (_, writable), folder in alike.items():
        usage = shutil.disk_usage(folder)
        facts = {"folder": str(folder), "free": usage.free, "total": usage.total}
        found = f"{usage.free / _GB:.1f} of {usage.total / _GB:.1f} GB free in {folder}"
        advice = "checkpoints hold four times the weights, and train.keep of them are kept"
        if not writable:
            found, advice = f"{folder} cannot be written", "choose another folder"
            yield Check("disk", "broken", found, advice, facts)
        elif usage.free < _NO_DISK:
            yield Check("disk", "broken", found, f"make room: {advice}", facts)
        else:
            yield Check("disk", "note" if usage.free < _LITTLE_DISK else "ok", found, "", facts)


def _store(stages: Stages) -> Check:
    off = stages and not any(stage.tracking.enabled for stage in stages.values())
    if off:
        return Check("mlflow", "ok", "not used: tracking.enabled = false")
    where, wrong = find_store()
    chosen = "" if os.environ.get("MLFLOW_TRACKING_URI") else ", the default (MLFLOW_TRACKING_URI)"
    facts = {"store": where, "wrong": wrong}
    if wrong is None:
        return Check("mlflow", "ok", f"{where}{chosen}", facts=facts)
    advice = "training works, but is not recorded there; MLFLOW_TRACKING_URI names another store"
    return Check("mlflow", "note", f"{where} {wrong}", advice, facts)


def _server() -> Check:
    where, wrong = find_server()
    facts = {"server": where, "wrong": wrong}
    if where is None:
        found = "one of its own for each r2id run, the default (PREFECT_API_URL)"
        return Check("prefect", "ok", found, facts=facts)
    if wrong is None:
        return Check("prefect", "ok", where, facts=facts)
    advice = (
        "r2id run cannot start: start that server, or unset PREFECT_API_URL, in the environment, "
        "prefect.toml or by prefect config unset"
    )
    return Check("prefect", "broken", f"{where} {wrong}", advice, facts)


def _compiler(stages: Stages, gpu: bool) -> Check:
    """Find what train.compile needs, which few runs on a CPU do."""
    lacking = compilers.missing(gpu)
    if lacking is None:
        name = next(name for name in compilers.candidates(gpu) if shutil.which(name))
        version = _run(name, "--version") or ["?"]
        return Check("compiler", "ok", f"{name}: {version[0]}", facts={"name": name})
    asked = any(stage.train.compile is True for stage in stages.values())
    use = (
        "train.compile needs it on a GPU, where steps are slower without"
        if gpu
        else "train.compile on a CPU and packages without a wheel need it"
    )
    advice = f"{use}: {compilers.INSTALL}"
    return Check("compiler", "broken" if asked else "note", lacking, advice)


def _cores() -> float:
    """Count the cores that this process may use, which a container may limit to a fraction."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # there is no such file, or it says "max": no limit
        return cores


def _cpu() -> str:
    """Name the processor, by Linux's list of them if there is one."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _run(*words: str) -> list[str]:
    """Return the lines that a program prints; none where it is missing or fails."""
    try:
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
