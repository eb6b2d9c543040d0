"""Shared settings: fixed seeds, one thread a process where several run, no deadlines."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.load_profile("default")

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
