"""Tiny random models of the families the instrument must run on."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mdkv_vllm.artifacts.store import ArtifactInfo, model_identity, save_head_scores
from mdkv_vllm.config import HEADS_FILE
from mdkv_vllm.models import prepare_smollm2

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 49152,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "head_dim": 32}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 80, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),  # biases
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 64}),  # norms of queries and keys
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return prepare_smollm2(tmp_path_factory.mktemp("model") / "SmolLM2")


@pytest.fixture(scope="session", params=FAMILIES)
def tiny_folder(request, tmp_path_factory, model_folder):
    """A checkpoint of one family, saved and loaded like a real one."""
    model_class, config_class, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    # Larger weights than at initialisation, so that attention is not uniform.
    model = model_class(config_class(**SIZES | changes, initializer_range=0.2))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    scores = torch.rand(SIZES["num_hidden_layers"], SIZES["num_attention_heads"]) ** 3
    info = ArtifactInfo(str(folder), model_identity(str(folder)), "random", "", 1)
    save_head_scores(folder / HEADS_FILE, scores, info)
    return folder
