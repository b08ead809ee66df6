"""Fixtures of the evaluation tests: the digits, and the classifier trained on them once."""

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
def classifier(shards, data, classifier_file) -> Classifier:
    return load_or_train_classifier(shards, data, classifier_file, torch.device("cpu"))
