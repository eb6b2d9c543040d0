"""Prefill, decode and what heads look at, as transformers' own attention has them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mdkv_vllm.models import prepare_smollm2
from mdkv_vllm.models.held_cache import full_cache
from mdkv_vllm.models.in_process import InProcessModel

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 49152,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "phi3": {},
    "granite": {"attention_multiplier": 0.2},
    "olmo2": {},
    "starcoder2": {"sliding_window": None},
}
PROMPT = list(range(300, 390))
ANSWER = list(range(700, 712))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(prepare_smollm2(tmp_path_factory.mktemp("m") / "SmolLM2"))


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path, tokenizer):
    config = AutoConfig.for_model(request.param, **SIZES, **ARCHITECTURES[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_architectures(folder):
    """Biases, norms of queries and keys, fused projections and scales of their own."""
    model = InProcessModel(folder, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = plain(torch.tensor([PROMPT + ANSWER]), output_attentions=True)
    prefill = model.prefill(PROMPT, window=16)
    first = expected.logits[0, len(PROMPT) - 1]
    torch.testing.assert_close(prefill.logits, first, atol=1e-4, rtol=1e-3)
    seen = {}
    logits = model.follow(
        [full_cache(prefill)], ANSWER, lambda layer, weights: seen.update({layer: weights[0]})
    )
    torch.testing.assert_close(logits[0], expected.logits[0, len(PROMPT) :], atol=1e-4, rtol=1e-3)
    assert sorted(seen) == list(range(model.num_layers))
    for layer, weights in seen.items():
        whole = expected.attentions[layer][0, :, len(PROMPT) :, : len(PROMPT)]
        torch.testing.assert_close(weights, whole, atol=1e-5, rtol=1e-3)
