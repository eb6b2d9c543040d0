"""Long answers and prompts, compressed segment by segment, in memory that holds neither whole."""

import pytest
from serving import fast_dtype, haystack
from test_offline import generate
from transformers import AutoTokenizer

pytestmark = pytest.mark.server
OURS = {"attention_backend": "mixeddim", "kv_cache_dtype": "bfloat16", "dtype": fast_dtype()}


def prompt_of(model_folder, tokens, secret):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return haystack(tokenizer, tokens, secret, 0.3, skip=30_000)


def settings(**more):
    return {"additional_config": {"mixeddim": {"budget": 0.25, **more}}}


def test_a_long_answer_is_served_in_less_than_its_full_size(tmp_path, model_folder):
    """300 + 600 tokens are 57 blocks; the cache has 53."""
    prompt = prompt_of(model_folder, 300, 3141593)
    result = generate(
        tmp_path, model_folder, [prompt], max_tokens=600, max_num_batched_tokens=256,
        max_model_len=1024, num_gpu_blocks_override=54, **OURS,
        **settings(segments="rolling", segment_tokens=128),
    )  # fmt: skip
    assert len(result["tokens"][0]) == 600
    assert result["preemptions"] == 0
    assert "3141593" in result["texts"][0]
    reports = result["ranks"][0]["recent"]
    ends = [report["end_token"] for report in reports if report["part"] == "answer"]
    begin = sum(report["part"] == "prompt" for report in reports)
    assert ends == [reports[begin - 1]["end_token"] + 128 * (n + 1) for n in range(4)]
    assert result["ranks"][0]["totals"]["segments"] == begin + 4


def test_a_prompt_longer_than_the_memory_is_served(tmp_path, model_folder):
    """3,200 tokens are 200 blocks; the cache has 149."""
    prompt = prompt_of(model_folder, 3200, 2718281)
    result = generate(
        tmp_path, model_folder, [prompt], max_tokens=24, max_model_len=3328,
        max_num_batched_tokens=256, num_gpu_blocks_override=150, **OURS,
        **settings(segments="rolling"),
    )  # fmt: skip
    assert "2718281" in result["texts"][0]
    assert result["preemptions"] == 0
    parts = [report["part"] for report in result["ranks"][0]["recent"]]
    assert parts == ["prompt"] * 6


def test_preempted_answers_are_compressed_again(tmp_path, model_folder):
    """Six requests whose tails alone do not fit together."""
    prompts = [prompt_of(model_folder, 300, 3141593 + i) for i in range(6)]
    result = generate(
        tmp_path, model_folder, prompts, max_tokens=330, max_model_len=1024,
        max_num_batched_tokens=256, num_gpu_blocks_override=70, **OURS,
        **settings(segment_tokens=128),
    )  # fmt: skip
    assert result["preemptions"] > 0, "the cache was not tight enough to test anything"
    assert all(len(tokens) == 330 for tokens in result["tokens"])
    assert all(str(3141593 + i) in text for i, text in enumerate(result["texts"]))
