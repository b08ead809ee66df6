"""Who may import whom: layers, cycles, and what has to start without heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("r2id", "data_prep", "pipelines")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

# A module belongs to the longest prefix that fits it. Every module of r2id has to be in here.
LAYER = {
    "r2id": 0,  # the package itself, which is empty
    "r2id.config": 0,
    "r2id.errors": 0,
    "r2id.rng": 0,
    "r2id.constants": 0,
    "r2id.dist": 0,
    "r2id.progress": 0,
    "r2id.files": 0,
    "r2id.host_memory": 0,
    "r2id.mlflow_pages": 0,
    "r2id.openmp": 0,
    "r2id.parent_process": 0,
    "r2id.stop_signals": 0,
    "r2id.torchrun": 0,
    "r2id.images": 1,
    "r2id.spectra": 1,
    "r2id.data": 1,
    "r2id.diffusion": 1,
    "r2id.checkpoints": 1,
    "r2id.models": 2,
    "r2id.sampling": 3,
    "r2id.pipeline": 4,
    "r2id.app": 5,
    "r2id.training": 4,
    "r2id.evaluation": 5,
    "r2id.cli": 6,
}
# What the other two packages may import of the project; the command line alone may import them.
ALLOWED = {
    "data_prep": (
        "data_prep",
        *(
            f"r2id.data.{name}"
            for name in (
                "embeddings",
                "index",
                "manifest",
                "plots",
                "records",
                "shard_writer",
                "shards",
                "verify",
            )
        ),
        "r2id.config",
        "r2id.errors",
        "r2id.files",
        "r2id.parent_process",
        "r2id.progress",
    ),
    "pipelines": (
        "pipelines",
        "data_prep",
        "r2id.config",
        "r2id.errors",
        "r2id.files",
        "r2id.mlflow_pages",
        "r2id.parent_process",
        "r2id.progress",
    ),
}
# Libraries that one place alone imports.
ONLY = {
    "mlflow": ("r2id.training.tracking",),
    "deepspeed": ("r2id.training.engines.deepspeed",),
    "prefect": ("pipelines",),
}
NEVER = {"data_prep": ("torch",), "pipelines": ("torch",)}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imported(source: str, where: str = "") -> Iterator[str]:
    """What a module imports, wherever it does so: at its top, in functions, under TYPE_CHECKING.

    ``from a import b`` gives a.b where that is a module, and a where b is a name in a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: line {node.lineno}: imports are to be absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else str(node.module)


# What each of our modules imports.
IMPORTS = {
    name: sorted(set(imported(file.read_text(), name)))
    for name, file in ((module_name(file), file) for file in FILES)
}


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def layer(name: str) -> int:
    known = [
        prefix
        for prefix in LAYER
        if within(name, (prefix,)) and (prefix != "r2id" or name == "r2id")
    ]
    assert known, (
        f"{name} is in no layer: add it to the table in this test and to the architecture's"
    )
    return LAYER[max(known, key=len)]


def complaints(name: str, target: str) -> Iterator[str]:
    package = name.split(".")[0]
    for library, places in ONLY.items():
        if within(target, (library,)) and not within(name, places):
            yield f"{name} imports {target}: only {', '.join(places)} may"
    if within(target, NEVER.get(package, ())):
        yield f"{name} imports {target}: {package} works without it"
    if package in ALLOWED:
        if target != "r2id" and within(target, PACKAGES) and not within(target, ALLOWED[package]):
            yield f"{name} imports {target}: {package} may import {', '.join(ALLOWED[package])}"
    elif within(target, ("data_prep", "pipelines")):
        if not within(name, ("r2id.cli",)):
            yield f"{name} imports {target}: only r2id.cli may"
    elif within(target, ("r2id",)):
        below, above = layer(name), layer(target)
        if above > below:
            yield f"{name} (layer {below}) imports {target} (layer {above}), which is above it"


def cycles(graph: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Groups of modules of which each imports, through others, itself and all of its group."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        left = list(graph[start])
        while left:
            name = left.pop()
            if name in graph and name not in found:
                found.add(name)
                left += graph[name]
        return found

    reach = {name: reachable(name) for name in graph}
    return sorted(
        {
            tuple(sorted(other for other in reach[name] if name in reach[other]))
            for name in graph
            if name in reach[name]
        }
    )


def test_nothing_imports_from_above() -> None:
    wrong = [
        complaint
        for name, targets in IMPORTS.items()
        for target in targets
        for complaint in complaints(name, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_checker_finds_an_upward_import() -> None:
    assert list(complaints("r2id.models.riae", "r2id.training.loop"))
    assert list(complaints("r2id.config", "r2id.data.epoch_plan"))
    assert list(complaints("r2id.sampling.sampler", "mlflow"))
    assert list(complaints("pipelines.flows", "torch.nn"))
    assert list(complaints("pipelines.flows", "r2id.training.tracking"))
    assert list(complaints("r2id.training.loop", "pipelines"))
    assert not list(complaints("r2id.cli", "pipelines.pipeline"))
    assert not list(complaints("r2id.training.loop", "r2id.models.riae"))


def test_the_reader_finds_imports_wherever_they_are() -> None:
    source = """
import torch.nn
from r2id import rng
from r2id.errors import InputError
if TYPE_CHECKING:
    from r2id.models import coords
def later():
    from r2id.data.records import decode
"""
    assert set(imported(source)) == {
        "torch.nn",
        "r2id.rng",
        "r2id.errors",
        "r2id.models.coords",
        "r2id.data.records",
    }


def test_no_import_cycles() -> None:
    """No module imports itself through others, in functions and under TYPE_CHECKING included.

    A package is the module of its ``__init__.py``. Importing r2id.sampling.grids runs that of
    r2id.sampling first, but needs nothing of it, and so is no edge of the graph: a package may
    gather names of its modules. A module that takes such a name from its own package closes a
    circle, and is found.
    """
    found = cycles(IMPORTS)
    assert not found, "\n".join(" ↔ ".join(group) for group in found)


def test_the_checker_finds_cycles() -> None:
    package = {"p": ["p.a", "p.b"], "p.a": ["p.b"], "p.b": ["torch"]}
    assert cycles(package) == []
    assert cycles(package | {"p.b": ["p"]}) == [("p", "p.a", "p.b")]
    assert cycles({"a": ["b"], "b": ["a"], "c": ["c"], "d": ["a"]}) == [("a", "b"), ("c",)]


@pytest.mark.parametrize(
    ("start", "forbidden"),
    [
        (("-m", "r2id.cli", "--help"), ("torch", "numpy", "mlflow", "prefect", "deepspeed")),
        (
            ("-c", "from r2id.sampling import Sampler"),
            ("r2id.training", "webdataset", "mlflow", "deepspeed", "prefect", "pyarrow"),
        ),
    ],
    ids=["help", "sampling"],
)
def test_what_starts_at_once_loads_nothing_heavy(
    start: tuple[str, ...], forbidden: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *start],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = [line.split("|")[-1].strip() for line in done.stderr.splitlines()]
    assert "r2id.errors" in loaded, "the list is that of this process"
    assert not [name for name in loaded if within(name, forbidden)]
