"""Write a small ImageNet in each of the four layouts in which it is handed on."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

WNIDS = ["n01440764", "n01443537", "n02105855", "n03995372"]
IDS = {1: "n02105855", 2: "n01440764", 3: "n03995372", 4: "n01443537"}
"""ILSVRC2012_ID → WordNet id: the kit's order is not that of the names."""
ODD = {"CMYK": ("JPEG", "CMYK"), "a PNG": ("PNG", "RGBA"), "gray": ("JPEG", "L")}


def picture(number, kind="JPEG", mode="RGB"):
    pixels = np.random.default_rng(number).integers(
        0, 256, (12 + number % 5, 10 + number % 3, 3), dtype=np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


TRAIN = {
    f"{wnid}/{wnid}_{number}.JPEG": picture(
        10 * position + number, *list(ODD.values())[number] if number < 3 else ()
    )
    for position, wnid in enumerate(WNIDS)
    for number in range(6)
}
TRUTH = [2, 1, 4, 4, 3, 2, 1, 3]
VAL = {
    f"ILSVRC2012_val_{number + 1:08d}.JPEG": picture(100 + number) for number in range(len(TRUTH))
}
TEST = {f"ILSVRC2012_test_{number + 1:08d}.JPEG": picture(200 + number) for number in range(3)}


def tar_of(members, order=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in order or members:
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            archive.addfile(info, io.BytesIO(members[name]))
    return buffer.getvalue()


def kit_of():
    dtype = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
    leaves = [
        (number, wnid, f"word {number}", "gloss", 0, [], 0, 6) for number, wnid in IDS.items()
    ]
    inner = [(5, "n00001740", "entity", "gloss", 2, [1, 2], 3, 0)]  # not a class
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(leaves + inner, dtype=dtype).reshape(-1, 1)})
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return {
        "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth,
        "ILSVRC2012_devkit_t12/readme.txt": b"x",
    }


def write_tars(root):
    root.mkdir()
    inner = {
        f"{wnid}.tar": tar_of(
            {name.split("/")[1]: data for name, data in TRAIN.items() if name.startswith(wnid)}
        )
        for wnid in WNIDS
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner, sorted(inner, reverse=True)))
    (root / "ILSVRC2012_img_val.tar").write_bytes(
        tar_of(VAL, sorted(VAL, key=lambda name: name[::-1]))
    )
    (root / "ILSVRC2012_img_test_v10102019.tar").write_bytes(
        tar_of({f"test/{name}": data for name, data in TEST.items()})
    )
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in kit_of().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_kaggle(root):
    for part, images in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        for name, data in images.items():
            path = root / "ILSVRC/Data/CLS-LOC" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    rows = [
        f"{name[:-5]},{IDS[number]} 10 20 30 40 {IDS[number]} 1 2 3 4"
        for name, number in zip(VAL, TRUTH, strict=True)
    ]
    (root / "LOC_val_solution.csv").write_text(
        "\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n"
    )
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} some, words\n" for wnid in WNIDS))


def write_folders(root):
    val = {
        f"{IDS[number]}/{name}": data
        for (name, data), number in zip(VAL.items(), TRUTH, strict=True)
    }
    for part, images in (("train", TRAIN), ("val", val)):
        for name, data in images.items():
            path = root / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def write_parquet(root):
    (root / "data").mkdir(parents=True)
    features = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ]
    )
    names = json.dumps({"info": {"features": {"label": {"names": WNIDS}}}})
    train = [
        (name, data, WNIDS.index(name[:9]))
        for name, data in sorted(TRAIN.items(), key=lambda pair: pair[0][::-1])
    ]
    val = [
        (name, data, WNIDS.index(IDS[number]))
        for (name, data), number in zip(VAL.items(), TRUTH, strict=True)
    ]
    test = [(name, data, -1) for name, data in TEST.items()]
    for split, rows, files in (("train", train, 2), ("validation", val, 1), ("test", test, 1)):
        for number in range(files):
            part = [
                {"image": {"bytes": data, "path": name.split("/")[-1]}, "label": label}
                for name, data, label in rows[number::files]
            ]
            table = pa.Table.from_pylist(part, features.with_metadata({"huggingface": names}))
            pq.write_table(
                table, root / f"data/{split}-{number:05d}-of-{files:05d}.parquet", row_group_size=5
            )


LAYOUTS = {
    "tars": write_tars,
    "kaggle": write_kaggle,
    "parquet": write_parquet,
    "folders": write_folders,
}
