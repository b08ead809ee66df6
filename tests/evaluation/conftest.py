"""Fixtures shared by the evaluation tests: the digits, and a classifier trained on them once."""

from pathlib import Path

import pytest
import torch

from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import Classifier, load_or_train_classifier


@pytest.fixture(scope="session")
def shards(digits) -> ShardSet:
    return ShardSet.open(digits)


@pytest.fixture(scope="session")
def data(digits) -> DataConfig:
    return DataConfig(shards=digits)


@pytest.fixture(scope="session")
def classifier_file(shards, data, build_once) -> Path:
    def build(folder: Path) -> None:
        load_or_train_classifier(
            shards, data, folder / "classifier.safetensors", torch.device("cpu")
        )

    return build_once("classifier", build) / "classifier.safetensors"


@pytest.fixture(scope="session")
def classifier(shards, data, classifier_file) -> Classifier:
    return load_or_train_classifier(shards, data, classifier_file, torch.device("cpu"))
