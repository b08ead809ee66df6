"""Nothing imports upwards: every import in the product's files is held against the table of layers."""

import ast
from collections.abc import Iterator
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
    "r2id.dist": 0,
    "r2id.progress": 0,
    "r2id.files": 0,
    "r2id.torchrun": 0,
    "r2id.images": 1,
    "r2id.data": 1,
    "r2id.diffusion": 1,
    "r2id.checkpoints": 1,
    "r2id.models": 2,
    "r2id.sampling": 3,
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
        "r2id.progress",
    ),
    "pipelines": (
        "pipelines",
        "data_prep",
        "r2id.config",
        "r2id.errors",
        "r2id.files",
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


def imported(file: Path) -> Iterator[str]:
    """Full names of all that a file imports, at its top or inside functions; ``from a import b`` gives a and a.b."""
    name = module_name(file)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name}: imports are absolute, so that they can be read and checked"
            )
            yield str(node.module)
            for alias in node.names:
                inner = ROOT.joinpath(*str(node.module).split("."), alias.name)
                if inner.is_dir() or inner.with_suffix(".py").exists():
                    yield f"{node.module}.{alias.name}"


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
        above = layer(target) > layer(name)
        if above:
            yield f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)}), which is above it"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_nothing_from_above(file: Path) -> None:
    name = module_name(file)
    wrong = [complaint for target in imported(file) for complaint in complaints(name, target)]
    assert not wrong, "\n".join(wrong)


def test_the_checker_finds_an_upward_import() -> None:
    assert list(complaints("r2id.models.riae", "r2id.training.loop"))
    assert list(complaints("r2id.config", "r2id.data.plan"))
    assert list(complaints("r2id.sampling.sampler", "mlflow"))
    assert list(complaints("pipelines.flows", "torch.nn"))
    assert list(complaints("pipelines.flows", "r2id.training.tracking"))
    assert list(complaints("r2id.training.loop", "pipelines"))
    assert not list(complaints("r2id.cli", "pipelines.pipeline"))
    assert not list(complaints("r2id.training.loop", "r2id.models.riae"))
