"""A real server of the real model, shared by the tests of this folder."""

import pytest
from serving import Server

from mdkv_vllm.cli import main
from mdkv_vllm.models import prepare_smollm2

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The model with head scores, so that servers give every head a budget of its own."""
    folder = prepare_smollm2(tmp_path_factory.mktemp("model") / "SmolLM2")
    assert main(["head-scores", str(folder), "--lengths", "512", "--per-length", "6"]) == 0
    return folder


@pytest.fixture(scope="session")
def server(model_folder):
    """Prompts of more than 1,024 tokens are prefilled in chunks; the cache is 16-bit."""
    with Server(
        model_folder,
        {"budget": 0.3},
        "--max-model-len=4608",
        "--max-num-batched-tokens=1024",
        "--dtype=float32",
        "--kv-cache-dtype=bfloat16",
    ) as running:
        yield running
