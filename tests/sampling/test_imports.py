"""Sampling starts quickly and needs nothing of training: what a fresh process loads for it."""

import subprocess
import sys
from pathlib import Path

NOT_NEEDED = (
    "r2id.training",
    "webdataset",
    "mlflow",
    "deepspeed",
    "prefect",
    "pyarrow",
    "matplotlib",
    "sklearn",
    "torchmetrics",
    "scipy",
)


def loaded_needlessly(code: str, *arguments: Path) -> list[str]:
    """Modules that a new process loads to run some code, although sampling does not need them."""
    report = "\nimport sys\nprint('modules:', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = done.stdout.split("modules:")[1].split()
    assert "r2id.sampling" in modules
    return [
        module
        for module in modules
        if any(module == name or module.startswith(f"{name}.") for name in NOT_NEEDED)
    ]


def test_drawing_pictures_loads_nothing_of_training(r2id_run, tmp_path):
    code = """
import sys
from pathlib import Path
from r2id.sampling.files import draw_many
from r2id.sampling.grids import draw_grids
run, out = map(Path, sys.argv[1:])
draw_grids(run, out / "grids", [(8, 8)], count=1)
draw_many(run, out / "many", [(8, 8)], count=1, kind="png")
"""
    assert loaded_needlessly(code, r2id_run, tmp_path) == []
    assert (tmp_path / "grids" / "8x8.png").is_file()


def test_what_is_loaded_needlessly_is_found():
    assert "webdataset" in loaded_needlessly("import r2id.sampling, webdataset")
