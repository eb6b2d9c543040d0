"""Every way of asking that vLLM has: as stock vLLM answers at full budget, and compressed.

Some of it on the server of the other tests, adapters and what resets a cache offline.
"""

import json

import pytest
import torch
from features import CHOICES
from safetensors.torch import save_file
from serving import run_script
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.server

RANK, HIDDEN = 8, 256
WIDTHS = {"q_proj": 256, "k_proj": 128, "v_proj": 128}


def make_adapter(folder, seed, layers=3):
    """Random weights in the format of peft, large enough to change every answer."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for name, width in WIDTHS.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = 0.2 * torch.randn(RANK, HIDDEN, generator=random)
            weights[f"{place}.lora_B.weight"] = 0.2 * torch.randn(width, RANK, generator=random)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(WIDTHS),
        "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def ask(tmp_path_factory, divisible_model):
    """Runs ``features.py`` on a random model with two adapters, and with other weights to load."""
    folder = tmp_path_factory.mktemp("modes")
    adapters = [make_adapter(folder / str(seed), seed) for seed in range(2)]
    other = AutoModelForCausalLM.from_pretrained(divisible_model)
    with torch.no_grad():
        for weights in other.parameters():
            weights.mul_(0.9)
    other.save_pretrained(folder / "other")

    def run(**engine):
        job = {
            "engine": {
                "model": str(divisible_model), "dtype": "float32", "max_model_len": 2048,
                "enable_lora": True, "max_loras": 2, "max_lora_rank": RANK, **engine,
            },
            "adapters": adapters,
            "weights": str(folder / "other"),
        }  # fmt: skip
        return run_script("features.py", folder, job)

    return run


@pytest.fixture(scope="module")
def ours(ask):
    return ask(
        attention_backend="mixeddim", additional_config={"mixeddim": {"budget": 0.3}}
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock(ask):
    return ask()


def test_full_budget_answers_as_stock_does(ours, stock):
    mine, theirs = ours["full"], stock["full"]
    for name in ("several", "chosen"):
        assert mine[name] == theirs[name], name
    for name in ("logprobs", "prompt_logprobs"):
        for one, other in zip(mine[name], theirs[name], strict=True):
            assert one == pytest.approx(other, abs=1e-3), name
    for (beam, score), (other, expected) in zip(mine["beams"], theirs["beams"], strict=True):
        assert beam == other
        assert score == pytest.approx(expected, abs=1e-3)
    assert len({tuple(answer) for answer in mine["several"]}) == 3
    assert ours["full turns"]["answers"] == stock["full turns"]["answers"]


def test_what_comes_of_prefill_never_sees_compression(ours):
    """All of a beam search: it asks for one token at a time."""
    for name in ("prompt_logprobs", "beams"):
        assert ours["compressed"][name] == ours["full"][name]
    assert ours["compressed"]["logprobs"][0] == pytest.approx(ours["full"]["logprobs"][0], abs=1e-3)
    assert ours["compressed"]["logprobs"] != ours["full"]["logprobs"]
    assert ours["compressed"]["chosen"] in CHOICES


def test_urgent_requests_go_first(ask):
    """Others are preempted, and answer as they would have, but where two tokens all but tie."""
    done = ask(
        attention_backend="mixeddim", additional_config={"mixeddim": {"budget": 0.3}},
        scheduling_policy="priority", num_gpu_blocks_override=117, scheduler_reserve_full_isl=False,
        max_model_len=1024,
    )  # fmt: skip
    assert done["preemptions"] > 0
    order = list(done["answers"])
    assert len(order) == 9
    assert all(len(answer) == 120 for answer in done["answers"].values())
    assert order[-1].startswith("patient")
    same = [done["answers"][name] == answer for name, answer in done["alone"].items()]
    assert sum(same) >= len(same) - 1


def test_adapters_never_share_leases(ours):
    """Answers are those that each gives under a salt of its own, though all second turns read
    compressed prefixes."""
    assert ours["turns"]["answers"] == ours["alone"]["answers"]
    assert ours["turns"]["cached"] == ours["alone"]["cached"]
    assert all(cached > 550 for cached in ours["turns"]["cached"])
    assert len({tuple(answer) for answer in ours["turns"]["answers"]}) == 6


def test_nothing_compressed_outlives_a_reset(ours):
    """Nor sleep, nor other weights."""
    life = ours["life"]
    answers, cached = life["cold"]
    assert cached[0] == 0
    assert cached[1] > 550
    assert life["warm"][1][1] > 550
    for name in ("reset", "woken", "again"):
        assert life[name] == [answers, cached], name
    assert life["other"][1] == cached
    assert life["other"][0] != answers
