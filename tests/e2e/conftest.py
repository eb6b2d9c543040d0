"""A real server of the real model, shared by the tests of this folder."""

import os

import pytest
import torch
from filelock import FileLock
from serving import Server, fast_dtype
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mdkv_vllm.artifacts.store import ArtifactInfo, model_identity, save_head_scores
from mdkv_vllm.cli import main
from mdkv_vllm.config import HEADS_FILE
from mdkv_vllm.models import prepare_smollm2
from mdkv_vllm.plugin.registration import vllm_version

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def for_all(tmp_path_factory):
    """A folder of all processes that run tests, and a lock for who puts something into it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder, FileLock(folder / "lock")


@pytest.fixture(scope="session")
def prepared_model(for_all):
    """The model as it comes, or with head scores by then."""
    folder, lock = for_all
    model = folder / "SmolLM2"
    with lock:
        return model if model.exists() else prepare_smollm2(model)


@pytest.fixture(scope="session")
def model_folder(prepared_model, for_all):
    """The model with head scores, so that servers give every head a budget of its own."""
    with for_all[1]:
        if not (prepared_model / HEADS_FILE).exists():
            arguments = ["head-scores", str(prepared_model), "--lengths", "512"]
            assert main([*arguments, "--per-length", "6"]) == 0
    return prepared_model


@pytest.fixture(scope="session")
def server(model_folder):
    """Prompts of more than 1,024 tokens are prefilled in chunks; the cache is 16-bit if it may.

    Its prefix cache may be reset.
    """
    # vLLM 0.33 wants the cache in the model's type.
    cache = ["--kv-cache-dtype=bfloat16"] if vllm_version().startswith("0.32.") else []
    with Server(
        model_folder,
        {"budget": 0.3},
        "--max-model-len=4608",
        "--max-num-batched-tokens=1024",
        "--dtype=float32",
        "--scheduling-policy=priority",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        *cache,
        variables={"VLLM_SERVER_DEV_MODE": "1"},
    ) as running:
        yield running


@pytest.fixture(scope="session")
def fast_server(model_folder):
    """The same in the type that this machine computes fastest in, one prompt a step."""
    with Server(
        model_folder, {"budget": 0.3}, "--max-model-len=4608", f"--dtype={fast_dtype()}",
        "--enable-prompt-tokens-details",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="session")
def divisible_model(tmp_path_factory, prepared_model):
    """A random model whose heads two ranks can share; the real one has three KV heads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("divisible")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=49152, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(prepared_model).save_pretrained(folder)
    # The square roots of both ranks' scores (KV heads 0 and 1) sum to 3, so a head's pages do not
    # depend on how many share its lease; but the ranks' scores lie in different heads.
    scores = torch.tensor([[0, 0, 9, 0], [2.25, 0, 0, 0], [1, 1.25, 0, 0]])
    info = ArtifactInfo(str(folder), model_identity(str(folder)), "test", "", 1)
    save_head_scores(folder / HEADS_FILE, scores, info)
    return folder
