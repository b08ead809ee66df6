"""Feature extractors: the classifier, and a TorchScript file."""

import hashlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from torch import nn

from r2id.errors import InputError, WorkError
from r2id.evaluation.extractor import FeatureExtractor, TorchScriptExtractor
from tests.evaluation import extractors

CPU = torch.device("cpu")


def test_a_file_sees_bytes_at_its_size(tmp_path):
    file = extractors.write(extractors.Quarters(), tmp_path / "quarters.pt")
    extractor: FeatureExtractor = TorchScriptExtractor.load(file, (8, 6), CPU)
    assert extractor.name == "quarters.pt" and extractor.size == (8, 6)
    assert extractor.hash == hashlib.sha256(file.read_bytes()).hexdigest()
    grey = torch.full((130, 1, 3, 50), -1.0)  # in two batches
    grey[1::2] = 0.2
    features = extractor.features(grey)
    assert features.shape == (130, 12) and features.dtype == torch.float32
    assert (features[0::2] == 0).all() and (features[1::2] == 153).all()
    red = torch.stack([torch.ones(8, 6), -torch.ones(8, 6), -torch.ones(8, 6)]).unsqueeze(0)
    assert extractor.features(red).tolist() == [[255.0] * 4 + [0.0] * 8]


def test_a_file_without_the_flag_is_called_without_it(tmp_path):
    extractor = TorchScriptExtractor.load(
        extractors.write(extractors.Plain(), tmp_path / "plain.pt"), (4, 4), CPU
    )
    assert extractor.features(torch.ones(2, 1, 9, 9)).tolist() == [[255.0] * 3] * 2


def test_files_that_are_refused(tmp_path):
    (tmp_path / "text").write_text("weights")
    odd = extractors.write(extractors.Odd(), tmp_path / "odd.pt")
    floats = extractors.write(nn.Linear(3, 3), tmp_path / "linear.pt")
    for file in (tmp_path / "none.pt", tmp_path / "text", odd, floats):
        with pytest.raises(InputError) as error:
            TorchScriptExtractor.load(file, (4, 4), CPU)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert "internal" not in str(error.value), "what is wrong, without guesses why"


@pytest.mark.parametrize(
    ("module", "said"), [(extractors.Pair, "makes a tuple of"), (extractors.Maps, "[2, 3, 4, 4]")]
)
def test_what_a_file_makes_is_said(module, said, tmp_path):
    file = extractors.write(module(), tmp_path / "file.pt")
    with pytest.raises(InputError) as error:
        TorchScriptExtractor.load(file, (4, 4), CPU)
    assert said in str(error.value) and "[2, D]" in str(error.value)


def test_a_file_that_takes_another_size(tmp_path):
    file = extractors.write(extractors.Whole(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"\[N, 3, 4, 4\].*--extractor-size HxW") as error:
        TorchScriptExtractor.load(file, (4, 4), CPU)
    assert "\n" not in str(error.value)
    extractor = TorchScriptExtractor.load(file, (14, 14), CPU)
    assert extractor.features(torch.ones(3, 1, 9, 9)).shape == (3, 5)


def test_an_address_is_downloaded_once(tmp_path, monkeypatch):
    """From a real server, which is then gone."""
    (tmp_path / "served").mkdir()
    extractors.write(extractors.Plain(), tmp_path / "served" / "plain.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/plain.pt"
        first = TorchScriptExtractor.load(address, (4, 4), CPU)
        with pytest.raises(WorkError, match=r"none\.pt"):
            TorchScriptExtractor.load(address.replace("plain", "none"), (4, 4), CPU)
        server.shutdown()
    assert TorchScriptExtractor.load(address, (4, 4), CPU).hash == first.hash
    assert [file.name for file in (tmp_path / "cache").rglob("*.pt*")] == ["plain.pt"]


def test_the_classifier_is_one(classifier, classifier_file, shards, data):
    extractor: FeatureExtractor = classifier
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    assert extractor.features(images).shape == (5, 192)
    assert extractor.size == (8, 8) and len(extractor.hash) == 64
    probabilities = classifier.probabilities(images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    assert probabilities.argmax(1).equal(classifier.classify(images))
