"""A classifier of the digits, trained once for all tests."""

from pathlib import Path

import pytest
import torch

from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import Judge, obtain_judge


@pytest.fixture(scope="session")
def shards(digits) -> ShardSet:
    return ShardSet.open(digits)


@pytest.fixture(scope="session")
def data(digits) -> DataConfig:
    return DataConfig(shards=digits)


@pytest.fixture(scope="session")
def judge_file(shards, data, build_once) -> Path:
    def build(folder: Path) -> None:
        obtain_judge(shards, data, folder / "classifier.safetensors", torch.device("cpu"))

    return build_once("classifier", build) / "classifier.safetensors"


@pytest.fixture(scope="session")
def judge(shards, data, judge_file) -> Judge:
    return obtain_judge(shards, data, judge_file, torch.device("cpu"))
