"""Models with sliding windows in some layers or all: tiny random ones of real architectures."""

import random

import pytest
import torch
from serving import run_script
from test_offline import same_but_for_ties
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

pytestmark = pytest.mark.server
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 100, "initializer_range": 0.2,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = (60, 300, 700, 1100)
SERVED = ("gemma3", "gemma4", "gpt_oss")


def gemma3(folder):
    """Three layers in four have a window; queries and keys are normed, rotations differ."""
    config = Gemma3TextConfig(
        num_hidden_layers=8, query_pre_attn_scalar=16,
        layer_types=[*["sliding_attention"] * 3, "full_attention"] * 2, **SIZES,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)


def gemma4(folder):
    """Full-attention layers have heads of another size."""
    config = Gemma4TextConfig(
        num_hidden_layers=4, layer_types=[*["sliding_attention"] * 3, "full_attention"],
        global_head_dim=128, num_kv_shared_layers=0, hidden_size_per_layer_input=0, **SIZES,
    )  # fmt: skip
    Gemma4ForCausalLM(config).save_pretrained(folder)


def gpt_oss(folder):
    """Every other layer has a window; query heads have sinks, projections have biases."""
    sizes = {**SIZES, "max_position_embeddings": 131072}  # as its rotations expect
    config = GptOssConfig(num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2, **sizes)
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 2.0, 1.0)
    model.save_pretrained(folder)


def mistral(folder):
    """Every layer has a window."""
    MistralForCausalLM(MistralConfig(num_hidden_layers=2, **SIZES)).save_pretrained(folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every engine answers, or why it does not start, all in one process."""
    torch.manual_seed(0)
    tmp = tmp_path_factory.mktemp("windowed")
    for make in (gemma3, gemma4, gpt_oss, mistral):
        make(tmp / make.__name__)
    random.seed(1)
    runs = {}
    for name in SERVED:
        stock = {"model": str(tmp / name), "max_model_len": 1536}
        ours = {**stock, "attention_backend": "mixeddim"}
        runs[f"{name} stock"] = stock
        runs[f"{name} whole"] = ours | settings(budget=1.0)
        runs[f"{name} quarter"] = ours | settings(budget=0.25)
    runs |= {
        # Prompts and answers are compressed in pieces, in a cache that is too small for all.
        "gemma3 tight": ours
        | {"model": str(tmp / "gemma3")}
        | settings(budget=0.25, segments="rolling", segment_tokens=128)
        | {"num_gpu_blocks_override": 115, "max_num_batched_tokens": 128}
        | {"scheduler_reserve_full_isl": False},
        "every layer": ours | {"model": str(tmp / "mistral")},
        "one group": ours | {"disable_hybrid_kv_cache_manager": True},
    }
    job = {
        "runs": runs,
        "prompts": [[random.randrange(3, 500) for _ in range(count)] for count in PROMPTS],
        "max_tokens": 200,
    }
    return run_script("windowed.py", tmp, job, VLLM_ENABLE_V1_MULTIPROCESSING="0")


def settings(**values):
    return {"additional_config": {"mixeddim": values}}


@pytest.mark.parametrize("model", SERVED)
def test_full_budget_answers_as_stock_does(results, model):
    """A difference must be a tie in stock's own probabilities."""
    stock, ours = results[f"{model} stock"], results[f"{model} whole"]
    for answer in stock["tokens"]:
        assert len(set(answer)) > 20, "an answer that repeats itself shows nothing"
    same = same_but_for_ties(stock["tokens"], stock["logprobs"], ours["tokens"])
    assert same >= len(PROMPTS) - 1


@pytest.mark.parametrize("name", [*(f"{model} quarter" for model in SERVED), "gemma3 tight"])
def test_decode_equals_the_reference_over_the_same_leases(results, name):
    """And what leases leave in blocks does no harm in layers with windows."""
    run = results[name]
    assert run["behind_leases"] > 100
    assert run["worst"] < 1e-3
    assert all(logprob <= 0 for answer in run["logprobs"] for step in answer for logprob in step)
    long = [one for one in run["status"]["recent"] if one["prompt_tokens"] == PROMPTS[-1]]
    assert all(one["kept_share"] < 0.36 for one in long)
    assert bool(long)


def test_requests_are_preempted_and_resumed(results):
    preemptions = results["gemma3 tight"]["preemptions"]
    assert preemptions > 0, "the cache was not tight enough to test anything"
    assert results["gemma3 quarter"]["preemptions"] == 0


@pytest.mark.parametrize("model", SERVED)
def test_a_prompt_is_found_again_up_to_its_lease(results, model):
    whole, quarter = results[f"{model} whole"], results[f"{model} quarter"]
    assert whole["again"]["cached"] == [1088]
    assert 16 * 40 < quarter["again"]["cached"][0] < 1088
    for run in (whole, quarter):
        assert run["again"]["tokens"][0] == run["tokens"][-1]
    assert quarter["status"]["configuration"]["shared_prefixes"] == "full"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("every layer", "every layer of this model has a sliding window"),
        ("one group", "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_what_is_refused(results, name, why):
    assert why in results[name]
