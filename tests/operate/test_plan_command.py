"""How many requests fit: against counting blocks one by one, and for the command's errors."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mdkv_vllm.cli import main
from mdkv_vllm.config import MixedDimConfig
from mdkv_vllm.core.plan import RequestPlan
from mdkv_vllm.operate.model_sizes import read_model_sizes
from mdkv_vllm.operate.plan import Load, cached_prefixes, capacity, parse_bytes, policy_for

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def fits(policy, blocks, load, requests, prefilling):
    """Whether that many requests can be held while some are being prefilled."""
    size = policy.geometry.block_size
    plan = policy.plan(load.prompt)
    longest = -(-(load.prompt + load.answer) // size)
    kept = longest - (plan.first_lease_block if isinstance(plan, RequestPlan) else 0)
    prompt = -(-load.prompt // size)
    return (requests - prefilling) * kept + prefilling * prompt <= blocks


@given(
    prompt=st.integers(1, 60_000), answer=st.integers(0, 5_000), gib=st.floats(0.01, 40),
    budget=st.sampled_from([0.0625, 0.25, 0.5, 1.0]), ranks=st.sampled_from([1, 2, 8, 16]),
)  # fmt: skip
def test_one_more_would_not_fit(tmp_path_factory, prompt, answer, gib, budget, ranks):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    sizes = read_model_sizes(str(folder))
    policy = policy_for(sizes, MixedDimConfig(budget=budget), 16, torch.bfloat16, ranks, False)
    load = Load(prompt, answer)
    result = capacity(policy, int(gib * 2**30), load)
    longest = -(-(prompt + answer) // 16)
    assert result.full * longest <= result.blocks < (result.full + 1) * longest
    if -(-prompt // 16) > result.blocks:
        assert result.compressed == result.steady == 0
        return
    assert fits(policy, result.blocks, load, result.compressed, 0)
    assert not fits(policy, result.blocks, load, result.compressed + 1, 0)
    assert result.steady <= result.compressed
    if result.steady:
        assert fits(policy, result.blocks, load, result.steady, 1)
    if result.steady < result.compressed:
        assert not fits(policy, result.blocks, load, result.steady + 1, 1)


def test_a_block_of_llama_8b_has_the_size_it_is_known_for(folder):
    """128 KiB per token: 32 layers, 8 heads, 128 dimensions, K and V, 2 bytes."""
    policy = policy_for(
        read_model_sizes(str(folder)), MixedDimConfig(budget=1), 16, torch.bfloat16, 1, False
    )
    assert capacity(policy, 1001 * 16 * 128 * 1024, Load(16_000, 0)).full == 1


def test_weights_come_from_the_index_then_the_files_then_an_estimate(folder):
    sizes = read_model_sizes(str(folder))
    assert "estimate" in sizes.weights_from
    assert sizes.weight_bytes == pytest.approx(2 * 8.03e9, rel=0.001)  # Llama-3.1-8B
    save_file({"w": torch.zeros(1000, dtype=torch.bfloat16)}, folder / "model.safetensors")
    sizes = read_model_sizes(str(folder))
    assert "files" in sizes.weights_from
    assert 2000 <= sizes.weight_bytes < 2200
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16_000_000_000}}))
    assert read_model_sizes(str(folder)).weight_bytes == 16_000_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5gib", 3 * 2**29), ("4096", 4096)],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


def test_the_command_prints_full_compressed_and_steady(folder, capsys):
    arguments = ["plan", str(folder), "--gpu-memory", "80GiB", "--prompt", "32768"]
    assert main([*arguments, "--budget", "0.25"]) == 0
    shown = capsys.readouterr().out
    assert "an estimate from config.json" in shown
    row = next(line for line in shown.splitlines() if "32,768" in line)
    prompt, full_mib, kept_mib, full, compressed, steady = (
        float(cell.replace(",", "")) for cell in row.strip("│ ").split("│")
    )
    assert (prompt, full_mib) == (32768, 4160.0)
    assert kept_mib == pytest.approx(0.25 * 4096 + 64, abs=2)
    assert full == int((80 * 0.92 - 2) * 1024 - 16_060_522_496 / 2**20) // 4160
    assert full < steady < compressed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu-memory", "8GiB", "--prompt", "100"], "--gpu-memory 8.0 GiB leaves no KV cache"),
        (["--gpu-memory", "80GiB", "--prompt", "0"], "--prompt is 0; allowed are whole numbers"),
        (["--gpu-memory", "80GiB", "--prompt", "9", "--budget", "2"], "--budget is 2"),
        (["--gpu-memory", "80GiB", "--prompt", "9", "--settings", '{"windw": 1}'], "mean window"),
        (["--gpu-memory", "80GiB", "--prompt", "9", "--settings", "{"], "no JSON"),
        (["--gpu-memory", "80GiB", "--prompt", "9", "--gpu-memory-utilization", "1.5"], "up to 1"),
    ],
)
def test_errors_name_the_flag_and_what_is_allowed(folder, capsys, arguments, named):
    assert main(["plan", str(folder), *arguments]) == 2
    assert named in capsys.readouterr().err


def test_no_model(tmp_path, capsys):
    common = ["--gpu-memory", "80GiB", "--prompt", "9"]
    assert main(["plan", str(tmp_path), *common]) == 2
    assert "without a config.json" in capsys.readouterr().err
    broken = tmp_path / "config.json"
    broken.write_text("{")
    assert main(["plan", str(tmp_path), *common]) == 2
    assert "is not a model's config.json" in capsys.readouterr().err
    broken.write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": None}))
    assert main(["plan", str(tmp_path), *common]) == 2
    assert "num_hidden_layers None" in capsys.readouterr().err
    broken.write_text(json.dumps(LLAMA_8B | {"kv_lora_rank": 512}))
    assert main(["plan", str(tmp_path), *common]) == 2
    assert "MLA" in capsys.readouterr().err
    broken.write_text(json.dumps(LLAMA_8B | {"sliding_window": 4096}))
    assert main(["plan", str(tmp_path), *common]) == 2
    assert "sliding windows" in capsys.readouterr().err


def test_answers_are_compressed_where_heads_have_scores(folder):
    """And prompts longer than one segment are never held whole."""
    sizes, config = read_model_sizes(str(folder)), MixedDimConfig(budget=0.25)
    load, memory = Load(2048, 32_768), 4 << 30
    with_scores, without = (
        capacity(policy_for(sizes, config, 16, torch.bfloat16, 1, scores), memory, load)
        for scores in (True, False)
    )
    assert without.kept_blocks == (32_768 + 512) // 16
    assert 0.25 * with_scores.full_blocks < with_scores.kept_blocks < 0.3 * with_scores.full_blocks
    long = capacity(policy_for(sizes, config, 16, torch.bfloat16, 1, True), memory, Load(60_000, 1))
    assert long.prefill_blocks < 0.45 * long.full_blocks


def test_prefixes_that_stay_cached(folder, capsys):
    sizes = read_model_sizes(str(folder))
    scored, unscored = (
        policy_for(sizes, MixedDimConfig(budget=0.25), 16, torch.bfloat16, 1, scores)
        for scores in (True, False)
    )
    fits = cached_prefixes(scored, 10_000, 4096)
    assert fits.full == 10_000 // 256
    # What follows the prompt's boundary, 16 tokens, is charged to its lease.
    assert fits.compressed == 10_000 // 63
    assert cached_prefixes(unscored, 10_000, 4096).compressed is None
    command = ["plan", str(folder), "--gpu-memory", "80GiB", "--prompt", "8192"]
    assert main([*command, "--shared-prefix", "4096"]) == 0
    assert "Prefixes of 4,096 tokens that stay cached" in capsys.readouterr().out
    assert main([*command, "--shared-prefix", "0"]) == 2
    assert "--shared-prefix is 0" in capsys.readouterr().err
