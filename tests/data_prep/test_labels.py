"""Classes from a table of labels, and tables that do not fit the images."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.items import number_classes
from r2id.errors import InputError
from tests.data_prep.archives import rejected
from tests.data_prep.conftest import make, write_images

TABLES = {
    "csv": lambda path, rows: write_csv(path.with_suffix(".csv"), rows),
    "parquet": lambda path, rows: pq.write_table(
        pa.Table.from_pylist(rows), path.with_suffix(".parquet")
    ),
}


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("labels", [["ant", "bee"], [10, 9]])
def test_classes_from_a_table(tmp_path, kind, labels):
    names = [f"{number}.png" for number in range(20)]
    write_images(tmp_path / "in", names)
    rows = [
        {"filename": name, "label": labels[number % 2], "split": ("train", "val")[number % 5 == 0]}
        for number, name in enumerate(names)
    ]
    TABLES[kind](tmp_path / "labels", rows)
    shards = make("folder", tmp_path / "set", tmp_path / "in", labels=tmp_path / f"labels.{kind}")
    assert shards.class_names == sorted(map(str, labels), key=lambda name: (len(name), name))
    assert shards.summary()["samples"] == {"val": 4, "train": 16}
    split = shards.split("train")
    for index in range(len(split)):
        number = next(
            n for n in range(20) if (tmp_path / f"in/{n}.png").read_bytes() == split.read(index)
        )
        assert shards.class_names[split.label[index]] == str(labels[number % 2])


def test_classes_that_are_equal_as_numbers_have_one_order():
    """A set of texts has another order in each process."""
    names = [f"{'0' * zeros}1" for zeros in range(12)]
    assert number_classes(["2", *names]) == [*sorted(names), "2"]


def test_names_that_only_look_the_same(tmp_path):
    """Accents apart from their letters, as of macOS, and blanks; what is the same goes first."""
    apart, composed = "e\u0301", "\u00e9"
    classes = {f"{apart}.png": "a", f"{composed}.png": "b", f"{apart}2.png": "a", " 1.png": "b"}
    write_images(tmp_path / "in", [*classes, "3.png"])
    paths = {f"{apart}2.png": f" ./{composed}2.png"}
    rows = [{"path": paths.get(name, name), "label": label} for name, label in classes.items()]
    write_csv(tmp_path / "labels.csv", [*rows, {"path": "3.png ", "label": "b"}])
    options = {"labels": tmp_path / "labels.csv"}
    shards = make("folder", tmp_path / "set", tmp_path / "in", **options)
    assert shards.manifest.rejects == 0
    split = shards.split("train")
    found = {split.read(index): "ab"[split.label[index]] for index in range(len(split))}
    for name, label in {**classes, "3.png": "b"}.items():
        assert found[(tmp_path / "in" / name).read_bytes()] == label


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("form", ["{folder}/{name}.png", "{name}", "./{folder}/{name}", " {name}"])
def test_tables_as_others_write_them(tmp_path, separator, form):
    """With the folder's name, without suffixes, of other separators, with a column "category"."""
    names = [f"a.{number}" for number in range(6)]
    write_images(tmp_path / "in", [f"{name}.png" for name in names])
    lines = [("Image", "Category")] + [
        (form.format(folder="in", name=name), "ant, bee"[number % 2 :: 5])
        for number, name in enumerate(names)
    ]
    table = tmp_path / "labels.csv"
    table.write_text("".join(f'{path}{separator}"{label}"\n' for path, label in lines))
    shards = make("folder", tmp_path / "set", tmp_path / "in", labels=table)
    assert shards.manifest.rejects == 0 and shards.class_names == ["ab", "ne"]
    split = shards.split("train")
    images = [(tmp_path / f"in/{name}.png").read_bytes() for name in names]
    for index in range(len(split)):
        assert split.label[index] == images.index(split.read(index)) % 2


def test_rows_that_fit_several_images(tmp_path):
    write_images(tmp_path / "in", ["1.png", "1.bmp", "2.png", "2.bmp", "3.png"])
    rows = [("1", "a"), ("2.bmp", "b"), ("2", "c"), ("3", "d"), ("in/3", "e"), ("in/4", "e")]
    write_csv(tmp_path / "labels.csv", [{"path": path, "label": label} for path, label in rows])
    shards = make("folder", tmp_path / "set", tmp_path / "in", labels=tmp_path / "labels.csv")
    assert set(rejected(tmp_path / "set")) == {"1.png", "1.bmp", "1", "in/3", "in/4"}
    assert len(shards.split("train")) == 3


def test_a_table_and_images_that_do_not_fit(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(6)])
    good = [{"path": f"{number}.png", "class": number % 2} for number in range(6)]
    table = tmp_path / "labels.csv"

    def prepare(rows, out="set"):
        write_csv(table, rows)
        return make("folder", tmp_path / out, tmp_path / "in", labels=table)

    prepare([*good[1:], {"path": "./9.png", "class": 0}])
    assert set(rejected(tmp_path / "set")) == {"0.png", "9.png"}
    for rows, words in (
        ([*good, good[2]], r"line 8: .*2\.png"),
        ([*good, {"path": "6.png", "class": ""}], r"line 8: .*6\.png"),
        ([{"path": "img/1.png", "class": 1}], r"labels\.csv: .* 'img/1\.png', .* '0\.png'"),
        ([{"path": "1.png", "kind": 1}], "'label'"),
        ([{"x": "1.png", "class": 1}], "'path'"),
    ):
        with pytest.raises(InputError, match=words):
            prepare(rows, "other")
    table.write_text("path,label\n1.png,1,2\n")
    with pytest.raises(InputError, match="line 2: 3 "):
        make("folder", tmp_path / "other", tmp_path / "in", labels=table)
    with pytest.raises(InputError, match=r"none\.csv"):
        make("folder", tmp_path / "other", tmp_path / "in", labels=tmp_path / "none.csv")
