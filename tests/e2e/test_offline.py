"""``LLM(..., attention_backend="mixeddim")`` beside stock vLLM, each in its own process."""

import pytest
from serving import fast_dtype, haystack, run_script
from transformers import AutoTokenizer

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def prompts(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return [
        haystack(tokenizer, tokens, 3141592 + tokens, 0.3, skip=30_000 + 40 * tokens)
        for tokens in (100, 200, 700, 1100, 1101)
    ]


def generate(
    tmp_path, model, prompts, max_tokens=48, budgets=None, variables=None, calls=None, **engine
):
    job = {
        "engine": {"model": str(model), "dtype": "float32", "max_model_len": 2048, **engine},
        "prompts": prompts,
        "budgets": budgets or [None] * len(prompts),
        "max_tokens": max_tokens,
        "calls": calls,
    }
    variables = dict(variables or {})
    if not any(name.endswith("_parallel_size") for name in engine):
        # Two processes less that import vLLM; servers' tests have them.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return run_script("generate.py", tmp_path, job, **variables)


def same_but_for_ties(expected, logprobs, answers):
    """How many answers are the expected ones; others must begin to differ at a tie.

    ``logprobs`` are those of the expected tokens.
    """
    same = 0
    for theirs, mine, probable in zip(expected, answers, logprobs, strict=True):
        differing = [i for i, (a, b) in enumerate(zip(theirs, mine, strict=True)) if a != b]
        same += not differing
        if differing:
            first, second = probable[differing[0]][:2]
            assert first - second < 1e-3, f"differs at {differing[0]}, gap {first - second}"
    return same


def test_full_budget_answers_as_stock_does(tmp_path, model_folder, prompts):
    """Greedy and token by token; a difference must be a tie in stock's own probabilities."""
    stock = generate(tmp_path, model_folder, prompts)
    ours = generate(
        tmp_path, model_folder, prompts, attention_backend="mixeddim",
        additional_config={"mixeddim": {"budget": 1.0}},
    )  # fmt: skip
    assert same_but_for_ties(stock["tokens"], stock["logprobs"], ours["tokens"]) >= len(prompts) - 1


def test_preemption_under_a_tiny_cache(tmp_path, model_folder, prompts):
    """130 blocks hold one long prompt and a few leases: requests are admitted as soon as they fit,
    preempted, resumed, compressed again, and still find what their prompts hide."""
    result = generate(
        tmp_path, model_folder, prompts * 2, max_tokens=150, attention_backend="mixeddim",
        dtype=fast_dtype(),
        kv_cache_dtype="bfloat16", num_gpu_blocks_override=130, scheduler_reserve_full_isl=False,
        additional_config={"mixeddim": {"budget": 0.3}},
    )  # fmt: skip
    assert result["preemptions"] > 0, "the cache was not tight enough to test anything"
    assert all(len(tokens) == 150 for tokens in result["tokens"])
    for index, tokens in enumerate((100, 200, 700, 1100, 1101)):
        assert str(3141592 + tokens) in result["texts"][index]
        assert str(3141592 + tokens) in result["texts"][index + 5]


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0.5, "formats": "paper", "basis": "prompt", "loss": "paper"},
        {
            "budget": 0.4,
            "formats": ["r32i8", "i8", "full"],
            "basis": "prompt",
            "loss": "pooled",
            "heads": "even",
        },
    ],
)
def test_other_formats_serve_too(tmp_path, model_folder, prompts, settings):
    result = generate(
        tmp_path, model_folder, prompts[2:4], max_tokens=16, attention_backend="mixeddim",
        kv_cache_dtype="bfloat16", additional_config={"mixeddim": settings}, dtype=fast_dtype(),
    )  # fmt: skip
    reports = result["ranks"][0]["recent"]
    assert [r["prompt_tokens"] for r in reports] == [700, 1100]
    assert all(r["kept_share"] <= settings["budget"] for r in reports)
    used = {name for r in reports for name, count in r["tokens"].items() if count}
    assert len(used) >= 2
