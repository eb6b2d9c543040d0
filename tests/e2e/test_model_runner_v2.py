"""Model runner V2, and the GPU's kernels in it, on CPU: Triton's interpreter runs both.

V2 is what vLLM uses on GPUs. Its own kernels and ours are the ones that run there; what
is missing here is the GPU, with its streams and CUDA graphs.
"""

from pathlib import Path

import pytest
import torch
from test_offline import generate
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.server

INTERPRETED = {
    "PYTHONPATH": str(Path(__file__).parent / "interpreted"),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}
VOCABULARY = 512


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A random model without a tokenizer, small because kernels are interpreted."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        hidden_size=256, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=VOCABULARY, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts_of(*lengths):
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (n,), generator=numbers).tolist() for n in lengths]


def run(tmp_path, model, prompts, settings, variables=None, **engine):
    return generate(
        tmp_path, model, prompts, attention_backend="mixeddim", skip_tokenizer_init=True,
        additional_config={"mixeddim": {"budget": 0.4, **settings}}, variables=variables, **engine,
    )  # fmt: skip


def without_ids(result):
    """Reports in the order of their prompts' lengths, without what differs from run to run."""
    reports = result["ranks"][0]["recent"]
    kept = [{**report, "request_id": "", "seconds": 0} for report in reports]
    return sorted(kept, key=lambda report: report["prompt_tokens"])


def test_both_runners_agree(tmp_path, small_model):
    """Chunks and prefix hits, then preemptions: the same answers and leases."""
    prompts = prompts_of(20, 300, 555, *[270] * 6)
    prompts += [prompts[2][:400], prompts[2]]
    engine = {
        "kv_cache_dtype": "bfloat16", "max_num_batched_tokens": 256, "max_model_len": 700,
    }  # fmt: skip
    v1 = run(tmp_path, small_model, prompts, {}, max_tokens=24, **engine)
    v2 = run(tmp_path, small_model, prompts, {}, INTERPRETED, max_tokens=24, **engine)
    tight = run(
        tmp_path, small_model, prompts, {}, INTERPRETED, max_tokens=100, num_gpu_blocks_override=45,
        scheduler_reserve_full_isl=False, **engine,
    )  # fmt: skip
    assert (v1["runner"], v2["runner"]) == ("V1", "V2")
    assert v1["tokens"] == v2["tokens"]
    assert without_ids(v1) == without_ids(v2)
    assert tight["preemptions"] > 0
    assert all(len(tokens) == 100 for tokens in tight["tokens"])
    # Compressed again after each preemption, to the same.
    assert {str(r) for r in without_ids(tight)} == {str(r) for r in without_ids(v2)}


def test_the_gpus_kernels_serve(tmp_path, small_model):
    """Triton compresses and decodes as the CPU kernels do, in int8 and float32 to stay close."""
    prompts = prompts_of(260, 300)
    settings = {"formats": ["i8"], "budget": 0.4, "prefill": "sdpa"}
    by_cpu, by_triton = (
        run(
            tmp_path, small_model, prompts, {**settings, "kernels": kernels}, INTERPRETED,
            max_tokens=4,
        )
        for kernels in ("cpu", "triton")
    )  # fmt: skip
    assert without_ids(by_cpu) == without_ids(by_triton)
    assert len(by_triton["ranks"][0]["recent"]) == 2
    assert by_cpu["tokens"] == by_triton["tokens"]
    for ours, theirs in zip(by_triton["logprobs"], by_cpu["logprobs"], strict=True):
        # The first token sees no lease; the others do.
        for step, expected in zip(ours, theirs, strict=True):
            assert step == pytest.approx(expected, abs=5e-3)
