"""What Pipeline takes and refuses: labels, seeds, sizes, conditions and pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from r2id import Pipeline
from r2id.config import change
from r2id.errors import InputError
from r2id.images import to_bytes
from r2id.models.r2id import R2ID
from r2id.sampling.conditions import choose_attributes, choose_embeddings


def test_one_for_all_or_one_for_each(pipe):
    four = pipe(2, size=(8, 8), seeds=[0, 1, 2, 3])
    assert len(four) == 4 and np.array_equal(four[2], pipe([2], size=(8, 8), seeds=2)[0])
    assert len(pipe([0, 1, 2])) == 3 and pipe()[0].size == (8, 8)
    assert np.array_equal(pipe(np.int64(3))[0], pipe([3])[0])
    assert np.array_equal(pipe(-1)[0], pipe()[0]), "no class"
    assert np.array_equal(pipe(torch.tensor(3))[0], pipe([3])[0])
    with pytest.raises(InputError, match="2 labels, 3 seeds"):
        pipe([0, 1], seeds=[0, 1, 2])


def test_numbers_may_be_those_of_numpy(pipe, picture):
    for seed in (np.int64(3), torch.tensor(3)):
        drawn = pipe.vary(picture, np.float32(0.5), label=seed, seed=seed, steps=np.int64(2))
        assert np.array_equal(drawn, pipe.vary(picture, label=3, seed=3, steps=2))
    several = pipe.interpolate(np.int64(1), torch.tensor(2), np.int8(3), steps=1)
    for one, other in zip(several, pipe.interpolate(1, 2, 3, steps=1), strict=True):
        assert np.array_equal(one, other)


def with_condition(pipe, condition, *, attributes=(), shape=()):
    """The pipeline with an untrained R2ID of another condition, whose weights are not zero."""
    sampler = pipe.sampler
    config = sampler.model.config.model_copy(update={"condition": condition})
    channels = sampler.codec.latent_channels
    model = R2ID(config, channels, len(attributes), shape).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    defaults = change(sampler.defaults, {"autoguidance": 0.0})
    return Pipeline(
        replace(sampler, model=model, attributes=attributes, guide=None, defaults=defaults)
    )


def test_attributes_are_a_condition(pipe):
    faces = with_condition(pipe, "attributes", attributes=("Smiling", "Male"))
    drawn = faces(attributes=["Smiling", "-Male"], seeds=[0, 1], steps=2, guidance=3.0)
    wanted = torch.tensor([[1.0, -1.0]]).expand(2, -1)
    images = faces.sampler.sample(wanted, torch.arange(2), (8, 8), steps=2, guidance=3.0)
    for one, other in zip(drawn, images, strict=True):
        assert np.array_equal(one, to_bytes(other)[..., 0].numpy())
    others = faces(attributes="Male", seeds=[0, 1], steps=2, guidance=3.0)
    assert not np.array_equal(others[0], drawn[0])
    edited = [faces.vary(drawn[0], 0.9, attributes=[name], steps=2) for name in ("Male", "-Male")]
    assert not np.array_equal(*edited)
    assert choose_attributes(["-Male", "-Male"], ("Smiling", "Male")).tolist() == [0, -1]
    with pytest.raises(InputError, match="attribute 'Male': is given with and without a minus"):
        faces(attributes=["Male", "Smiling", "-Male"])


def test_embeddings_are_a_condition(pipe, tmp_path):
    texts = with_condition(pipe, "embedding", shape=(3, 4))
    given = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).half()
    drawn = texts(embeddings=given, seeds=[0, 1], steps=2, guidance=3.0)
    images = texts.sampler.sample(given, torch.arange(2), (8, 8), steps=2, guidance=3.0)
    for one, other in zip(drawn, images, strict=True):
        assert np.array_equal(one, to_bytes(other)[..., 0].numpy())
    np.save(tmp_path / "text.npy", given[0].numpy())
    edited = [
        texts.vary(drawn[0], 0.9, embedding=embedding, steps=2)
        for embedding in (given[0], tmp_path / "text.npy", given[1])
    ]
    assert np.array_equal(edited[0], edited[1])
    assert not np.array_equal(edited[0], edited[2])
    with pytest.raises(InputError, match=r"must be \[B, 3, 4\]"):
        texts(embeddings=given[0])
    np.save(tmp_path / "texts.npy", given.numpy())
    assert torch.equal(choose_embeddings(tmp_path / "texts.npy", texts.sampler.model, 2), given)
    with pytest.raises(InputError, match=r"texts\.npy: 2 embeddings: must be at most 1"):
        texts.vary(drawn[0], embedding=tmp_path / "texts.npy")


def test_labels_may_come_one_by_one(pipe):
    for one, other in zip(pipe(iter([3, 4]), steps=1), pipe([3, 4], steps=1), strict=True):
        assert np.array_equal(one, other)


def test_arrays_and_lists_of_pictures(pipe, picture):
    expected = pipe.encode(picture, picture)
    bytes_, floats = np.asarray(picture), pipe.read(picture)
    for given in ([picture] * 2, (bytes_, floats), np.stack([bytes_] * 2)[..., None]):
        assert torch.equal(pipe.encode(given), expected)
    assert torch.equal(pipe.encode(torch.stack([floats] * 2)), expected)
    drawn = np.zeros((8, 8), bool)
    drawn[:, 4:] = True
    edited = (
        pipe.inpaint(floats, drawn, label=3),
        pipe.inpaint(picture, Image.fromarray(drawn * np.uint8(255)), label=3),
    )
    assert np.array_equal(*edited)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, picture: pipe(10), "label 10"),
        (lambda pipe, picture: pipe(attributes=["Smiling"]), "'Smiling': the model was not"),
        (lambda pipe, picture: pipe(embeddings=torch.zeros(1, 4)), "without|not trained with"),
        (lambda pipe, picture: pipe(1, attributes=["Smiling"]), "exclude"),
        (lambda pipe, picture: pipe(1, guidance=-1), "guidance"),
        (lambda pipe, picture: pipe([]), r"labels \[\]"),
        (lambda pipe, picture: pipe(1, seeds=2**63), str(2**63)),
        (lambda pipe, picture: pipe(["cat"]), "label cat: must be 0 to 9"),
        (lambda pipe, picture: pipe([0.5]), r"labels 0\.5: must be a whole number"),
        (lambda pipe, picture: pipe(1, seeds=["2"]), "seed '2': must be a whole number"),
        (lambda pipe, picture: pipe(1, seeds=1.5), r"seeds 1\.5: must be a whole number"),
        (lambda pipe, picture: pipe(1, seeds=None), "seeds None: must be a whole number"),
        (lambda pipe, picture: pipe(b"3"), "labels b'3': must be a whole number"),
        (lambda pipe, picture: pipe({3: 0.5}), r"labels \{3: 0\.5\}: must be a whole number"),
        (lambda pipe, picture: pipe.vary(picture, label=[3, 4]), r"labels \[3, 4\]: must be one"),
        (lambda pipe, picture: pipe(1, count=3), "count: no such setting; .*steps, guidance"),
        (lambda pipe, picture: pipe(1, size=(0, 8)), r"size \(0, 8\): .*at least 1"),
        (lambda pipe, picture: pipe(1, size=32), r"size 32: must be \(height, width\)"),
        (lambda pipe, picture: pipe(1, size=()), r"size \(\): must be \(height, width\)"),
        (lambda pipe, picture: pipe(1, size=np.array([8, 8])), r"size array\(\[8, 8\]\): must be"),
        (lambda pipe, picture: pipe.vary(picture, size=()), r"size \(\): must be"),
        (lambda pipe, picture: pipe.vary(picture, "a"), "strength 'a': must be above 0"),
        (lambda pipe, picture: pipe.vary(picture, None), "strength None: must be above 0"),
        (lambda pipe, picture: pipe.interpolate(0, 1, 2.5), r"count 2\.5: must be a whole number"),
        (lambda pipe, picture: pipe.interpolate(0, 1, "3"), "count '3': must be a whole number"),
        (lambda pipe, picture: pipe.interpolate(0, 1, 1), "count 1: must be at least 2"),
        (lambda pipe, picture: pipe.outpaint(picture, None), "size None: must be"),
        (lambda pipe, picture: pipe.outpaint(picture, (8, 12), 3), r"place 3: must be \(y, x\)"),
        (lambda pipe, picture: pipe.outpaint(picture, (8, 12), (0, 1.5)), r"place \(0, 1\.5\)"),
        (lambda pipe, picture: pipe.outpaint(picture, "9x9"), "size '9x9': must be"),
        (lambda pipe, picture: pipe.upscale(picture, (8, 0)), r"size \(8, 0\)"),
        (lambda pipe, picture: pipe.upscale(picture, (9, 9), (0, 0, 5)), r"window \(0, 0, 5\)"),
        (lambda pipe, picture: pipe.upscale(picture, (9, 9), (0, 0, 5, 5.0)), "in whole pixels"),
        (lambda pipe, picture: pipe.encode(Image.new("L", (0, 5))), r"picture of size \(5, 0\)"),
        (lambda pipe, picture: pipe.encode([1.5]), "picture of type float"),
        (lambda pipe, picture: pipe.encode([]), "pictures: there is none"),
        (lambda pipe, picture: pipe.decode(torch.zeros(1, 9, 4, 4)), r"shape \[1, 9, 4, 4\]"),
        (lambda pipe, picture: pipe.decode(torch.zeros(4, 4, 4)), r"shape \[4, 4, 4\]: must be"),
        (lambda pipe, picture: pipe.decode(pipe.encode(picture)[:0]), r"shape \[0, .*at least 1"),
        (lambda pipe, picture: pipe.decode(pipe.encode(picture) / 0), "NaN or infinite"),
        (lambda pipe, picture: pipe.decode([1]), "latents of type list"),
        (lambda pipe, picture: pipe.decode(pipe.encode(picture), native=8), "native size 8: must"),
        (lambda pipe, picture: Pipeline.from_pretrained(None), "model None: must be a path"),
        (lambda pipe, picture: pipe.encode(), "pictures: there is none"),
        (lambda pipe, picture: pipe(1, grid=(0, 4)), r"grid \(0, 4\): .* in latent cells"),
        (lambda pipe, picture: pipe(1, grid=4), r"grid 4: must be \(height, width\)"),
        (lambda pipe, picture: pipe(label=1), "label: no such .* labels, seeds, embed"),
        (lambda pipe, picture: pipe(seed=1), "seed: no .* labels, seeds, embeddings, size"),
        (lambda pipe, picture: pipe.vary(picture, seeds=1), "seeds: .* must be one of seed, steps"),
        (lambda pipe, picture: pipe.vary(picture, seed=-1), "seed -1"),
        (lambda pipe, picture: pipe.vary(picture, labels=1), "labels"),
        (lambda pipe, picture: pipe(1, size=(100_000, 100_000)), "100000x100000.*memory"),
        (lambda pipe, picture: pipe.upscale(picture, (200_000, 100_000)), "memory"),
        (lambda pipe, picture: pipe.vary(picture, size=(90_000, 90_000)), "90000x90000.*memory"),
        (lambda pipe, picture: pipe.vary("nowhere.png"), "nowhere.png"),
        (lambda pipe, picture: pipe.vary(__file__), "not a readable image"),
        (lambda pipe, picture: pipe.inpaint(picture, Image.new("L", (7, 8), 255)), "8x7"),
    ],
)
def test_what_cannot_be_done(pipe, picture, call, message):
    with pytest.raises(InputError, match=message):
        call(pipe, picture)
