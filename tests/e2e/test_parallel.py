"""Two workers on CPU beside one: ranks of a tensor-parallel group, or two pipeline stages."""

import pytest
import torch
from test_offline import generate

from mdkv_vllm.plugin.artifacts import heads_of_rank

pytestmark = pytest.mark.server

PROMPT_TOKENS = (300, 700, 701)
SETTINGS = {"budget": 0.65, "formats": ["i8", "full"]}
"""Loses so little that even a random model's answers begin alike: wrong bytes would show."""
BEGIN = 3
"""Tokens of an answer, the first of which never sees compression."""


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


class Job:
    """Prompts at full budget and compressed, by one worker or by two."""

    def __init__(self, folder, model, variables=None, **engine):
        torch.manual_seed(0)
        prompts = [torch.randint(300, 30_000, (n,)).tolist() for n in PROMPT_TOKENS]
        result = generate(
            folder, model, prompts * 2, max_tokens=16, variables=variables,
            budgets=[1.0] * len(prompts) + [None] * len(prompts), attention_backend="mixeddim",
            enable_prefix_caching=False, additional_config={"mixeddim": SETTINGS}, **engine,
        )  # fmt: skip
        self.full = result["tokens"][: len(prompts)]
        self.compressed = [tokens[:BEGIN] for tokens in result["tokens"][len(prompts) :]]
        # Of every worker, its compressions.
        self.reports = [{r["prompt_tokens"]: r for r in one["recent"]} for one in result["ranks"]]
        assert all(set(reports) == set(PROMPT_TOKENS) for reports in self.reports)


@pytest.fixture(scope="module")
def one(tmp_path_factory, divisible_model):
    job = Job(tmp_path_factory.mktemp("one"), divisible_model)
    assert job.compressed == [tokens[:BEGIN] for tokens in job.full]
    assert all(r["kept_share"] < SETTINGS["budget"] for r in job.reports[0].values())
    return job


def two(one, folder, model, **engine):
    """Two workers that answer and plan as one does."""
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    job = Job(folder, model, variables, distributed_executor_backend="mp", **engine)
    assert job.full == one.full
    assert job.compressed == one.compressed
    assert len(job.reports) == 2
    for reports in job.reports:
        for n, report in reports.items():
            assert report["kept_blocks"] == one.reports[0][n]["kept_blocks"]
    return job


def test_two_ranks_compress_their_own_heads(tmp_path, divisible_model, one):
    ranks = two(one, tmp_path, divisible_model, tensor_parallel_size=2)
    for n, alone in one.reports[0].items():
        first, second = (reports[n]["tokens"] for reports in ranks.reports)
        # Together they hold what one holds, but for the page that each rank's own table takes.
        for name, count in alone["tokens"].items():
            assert abs(first[name] + second[name] - count) <= 128, name
        # Scores in one head of the second rank: it holds that head whole and the others poorly.
        assert second["full"] > first["full"]


def test_two_stages_compress_their_own_layers(tmp_path, divisible_model, one):
    """Three layers in two stages; prompts in chunks, so that two batches are in flight."""
    stages = two(
        one, tmp_path, divisible_model, pipeline_parallel_size=2, max_num_batched_tokens=512
    )  # fmt: skip
    for n, alone in one.reports[0].items():
        counts = [sum(reports[n]["tokens"].values()) for reports in stages.reports]
        assert sum(counts) == sum(alone["tokens"].values())
        assert counts[0] == 2 * counts[1]
