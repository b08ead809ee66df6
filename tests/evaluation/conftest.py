"""The digits' judge, trained once for all tests."""

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
def judge_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("judge") / "classifier.safetensors"


@pytest.fixture(scope="session")
def judge(shards, data, judge_file) -> Judge:
    before = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # of two, each would mostly wait for the other, above all on a busy machine
    trained = obtain_judge(shards, data, judge_file, torch.device("cpu"))
    torch.set_num_threads(before)
    return trained
