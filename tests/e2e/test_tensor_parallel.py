"""Two tensor-parallel ranks on CPU beside one: each compresses its own heads, by the same plan."""

import pytest
import torch
from test_offline import generate

from mdkv_vllm.plugin.artifacts import heads_of_rank

pytestmark = pytest.mark.server

PROMPT_TOKENS = (300, 700, 701)


@pytest.mark.parametrize(
    ("ranks", "total", "count", "expected"),
    [
        (1, 3, 3, [[0, 1, 2]]),
        (2, 8, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 2, 1, [[0], [0], [1], [1]]),  # as vLLM copies heads
    ],
)
def test_heads_of_each_rank(ranks, total, count, expected):
    heads = list(range(total))
    assert [heads[heads_of_rank(r, ranks, total, count)] for r in range(ranks)] == expected


def test_two_ranks_answer_and_compress_as_one_does(tmp_path, divisible_model):
    prompts = [torch.randint(300, 30_000, (n,)).tolist() for n in PROMPT_TOKENS]
    one, two = (
        generate(
            tmp_path, divisible_model, prompts * 2, max_tokens=16, variables=variables,
            budgets=[1.0] * len(prompts) + [None] * len(prompts), attention_backend="mixeddim",
            additional_config={"mixeddim": {"budget": 0.4}}, enable_prefix_caching=False, **engine,
        )
        for engine, variables in (
            ({}, {}),
            (
                {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
                {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
            ),
        )
    )  # fmt: skip
    full = slice(0, len(prompts))
    assert one["tokens"][full] == two["tokens"][full]
    assert one["tokens"][len(prompts) :] != one["tokens"][full]  # compression does something

    assert len(two["ranks"]) == 2
    alone = {r["prompt_tokens"]: r for r in one["ranks"][0]["recent"]}
    assert set(alone) == set(PROMPT_TOKENS)
    for rank in two["ranks"]:
        assert len(rank["recent"]) == len(prompts)
        for report in rank["recent"]:
            expected = alone[report["prompt_tokens"]]
            assert report["kept_blocks"] == expected["kept_blocks"]
    # Together they hold what one holds, but for the page that each rank's own table takes.
    for reports in zip(*(rank["recent"] for rank in two["ranks"]), strict=True):
        whole = alone[reports[0]["prompt_tokens"]]["tokens"]
        for name, count in whole.items():
            assert abs(sum(r["tokens"][name] for r in reports) - count) <= 128, (name, reports)
        # Scores in one head of the second rank: it holds that head whole and the others poorly.
        assert reports[1]["tokens"]["full"] > reports[0]["tokens"]["full"], reports
