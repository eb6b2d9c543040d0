"""Two tensor-parallel ranks on CPU beside one: each compresses its own heads, by the same plan."""

import pytest
import torch
from test_offline import generate
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mdkv_vllm.calibrate.artifact import ArtifactInfo, model_identity, save_head_scores
from mdkv_vllm.config import HEADS_FILE

pytestmark = pytest.mark.server

LAYERS, QUERY_HEADS, KV_HEADS = 3, 4, 2
PROMPT_TOKENS = (300, 700, 701)


@pytest.fixture(scope="module")
def divisible_model(tmp_path_factory, model_folder):
    """A random model whose heads two ranks can share; the real one has three KV heads."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("divisible")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=192, num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS, head_dim=64,
        vocab_size=49152, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    # All heads alike: then a head's pages do not depend on how many share its lease.
    info = ArtifactInfo(str(folder), model_identity(str(folder)), "even", "", 1)
    save_head_scores(folder / HEADS_FILE, torch.ones(LAYERS, QUERY_HEADS), info)
    return folder


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
            # Its share of the tokens, but for the page that each rank's own table takes.
            for name, count in report["tokens"].items():
                assert abs(count - expected["tokens"][name] / 2) <= 64, (name, report, expected)
