"""``mdkv plan``: how many requests of what length fit in a GPU's memory."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from mdkv_vllm.config import DEFAULT_BUDGET, MixedDimConfig, read_config
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.core.plan import RequestPlan
from mdkv_vllm.operate.model_sizes import ModelSizes, read_model_sizes
from mdkv_vllm.policy import Policy

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_GIB = 2**30
PREFILL_CHUNK = 8192
"""Prompt tokens of a step, vLLM's default on GPUs."""


@dataclass(frozen=True)
class Load:
    """Requests that are all alike.

    Attributes:
        prompt: prompt tokens.
        answer: generated tokens; a request is counted at its longest.
    """

    prompt: int
    answer: int


@dataclass(frozen=True)
class Capacity:
    """What fits in the blocks of one KV cache.

    Attributes:
        blocks: blocks of the cache.
        full_blocks: blocks of one request that is never compressed, at its longest.
        kept_blocks: blocks of one that is compressed, at most while it is answered.
        prefill_blocks: blocks of one that is compressed, at most while it is prefilled.
    """

    blocks: int
    full_blocks: int
    kept_blocks: int
    prefill_blocks: int

    @property
    def full(self) -> int:
        """Requests that fit uncompressed."""
        return self.blocks // self.full_blocks

    @property
    def compressed(self) -> int:
        """Requests that fit once all are compressed."""
        return self.blocks // self.kept_blocks if self.prefill_blocks <= self.blocks else 0

    @property
    def steady(self) -> int:
        """Requests that fit while one of them is prefilled, which happens uncompressed."""
        if self.prefill_blocks > self.blocks:
            return 0
        rest = (self.blocks - self.prefill_blocks) // self.kept_blocks
        return min(rest + 1, self.compressed)


def capacity(policy: Policy, cache_bytes: int, load: Load) -> Capacity:
    """What fits, by the lease plans that scheduler and worker make.

    Args:
        policy: the settings applied to the model, as one rank has it.
        cache_bytes: the KV cache of one rank.
        load: the requests.
    """
    size = policy.geometry.block_size
    block_bytes = policy.geometry.page_bytes * policy.layout.pages_per_block
    full = -(-(load.prompt + load.answer) // size)
    plan = policy.plan(load.prompt)
    kept, prefilled = full, -(-load.prompt // size)
    if isinstance(plan, RequestPlan):
        longest = load.prompt + load.answer
        answered = plan.peak_blocks(load.prompt, longest, 1)
        kept = max(plan.blocks_held(load.prompt), answered)
        prefilled = plan.peak_blocks(0, load.prompt, PREFILL_CHUNK)
    # One block is vLLM's null block, which is never lent.
    blocks = max(cache_bytes // block_bytes - 1, 0)
    return Capacity(blocks, full, kept, prefilled)


@dataclass(frozen=True)
class Prefixes:
    """How many different prefixes stay in a cache in which nothing else is.

    Attributes:
        full: at full size.
        compressed: as the leases of their segments; None where these are not shared.
    """

    full: int
    compressed: int | None


def cached_prefixes(policy: Policy, blocks: int, tokens: int) -> Prefixes:
    """Count prefixes that stay cached.

    Args:
        policy: the settings applied to the model, as one rank has it.
        blocks: of the cache.
        tokens: of each prefix.
    """
    plan = policy.plan(tokens)
    leases = plan.prompt_segments if isinstance(plan, RequestPlan) and policy.shares else ()
    kept = sum(segment.num_lease_blocks for segment in leases)
    full = max(1, tokens // policy.geometry.block_size)
    return Prefixes(blocks // full, blocks // kept if kept else None)


def policy_for(
    sizes: ModelSizes,
    config: MixedDimConfig,
    block_size: int,
    cache_dtype: torch.dtype,
    ranks: int,
    head_scores: bool,
) -> Policy:
    """The policy of one tensor-parallel rank."""
    geometry = PageGeometry(block_size, sizes.head_size, cache_dtype)
    heads = max(1, sizes.kv_heads // ranks)
    return Policy(config, geometry, sizes.layers, heads, head_scores)


def parse_bytes(text: str) -> int:
    """Bytes from a text such as ``80GiB``, ``24 GB`` or ``1073741824``.

    Raises:
        argparse.ArgumentTypeError: the text is no size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; allowed are such as 80GiB or 24GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line of ``mdkv plan``."""
    parser.add_argument("model", help="model folder, config.json, or hub name")
    parser.add_argument(
        "--gpu-memory", type=parse_bytes, required=True, metavar="SIZE",
        help="memory of one GPU, such as 80GiB",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", type=int, nargs="+", required=True, metavar="TOKENS", help="prompt lengths"
    )
    parser.add_argument(
        "--answer", type=int, default=512, metavar="TOKENS",
        help="generated tokens per request (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shared-prefix", type=int, metavar="TOKENS",
        help="also say how many different prefixes of this length stay cached",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=DEFAULT_BUDGET,
        help="share of prompt bytes to keep (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--settings", default="{}", metavar="JSON", help="""other settings, as '{"window": 64}'"""
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="type of the cache (default: the model's)",
    )  # fmt: skip
    parser.add_argument("--block-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE",
        help="as vLLM's flag of that name (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=parse_bytes, metavar="SIZE",
        help="size of the model's weights (default: from its files)",
    )  # fmt: skip
    parser.add_argument(
        "--overhead", type=parse_bytes, default=2 * _GIB, metavar="SIZE",
        help="activations, graphs and libraries on each GPU, an assumption (default: 2GiB)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        ValueError: an option is out of range, or the weights leave no room.
    """
    _check(options)
    try:
        settings = json.loads(options.settings)
    except json.JSONDecodeError as error:
        raise ValueError(f"--settings is {options.settings!r}, no JSON: {error}") from error
    config = read_config(options.budget, settings)
    sizes = read_model_sizes(options.model)
    auto = options.kv_cache_dtype == "auto"
    dtype = sizes.dtype if auto else getattr(torch, options.kv_cache_dtype)
    policy = policy_for(
        sizes,
        config,
        options.block_size,
        dtype,
        options.tensor_parallel_size,
        config.heads_path(options.model) is not None,
    )
    weights = (options.weights or sizes.weight_bytes) // options.tensor_parallel_size
    usable = int(options.gpu_memory * options.gpu_memory_utilization)
    cache = usable - weights - options.overhead
    if cache <= 0:
        raise ValueError(
            f"--gpu-memory {options.gpu_memory / _GIB:.1f} GiB leaves no KV cache: of the "
            f"{usable / _GIB:.1f} GiB to use, weights take {weights / _GIB:.1f} and --overhead "
            f"{options.overhead / _GIB:.1f}"
        )
    console = Console()
    source = "--weights" if options.weights else sizes.weights_from
    _line(console, f"weights per GPU   {weights / _GIB:8.2f} GiB  ({source})")
    _line(console, f"overhead          {options.overhead / _GIB:8.2f} GiB  (assumed; --overhead)")
    _line(console, f"KV cache per GPU  {cache / _GIB:8.2f} GiB  ({dtype}, on each of "
                   f"{options.tensor_parallel_size})")  # fmt: skip
    console.print(_table(policy, cache, options))
    _line(console, "Requests are counted at their longest, with nothing shared. A request is")
    _line(console, "prefilled uncompressed; 'while one prefills' is what a busy server holds.")
    if options.shared_prefix:
        _line(console, _prefixes(policy, cache, options.shared_prefix))
    longest = max(options.prompt) + options.answer
    if sizes.context and longest > sizes.context:
        _line(console, f"Note: {longest} tokens exceed the model's context of {sizes.context}.")


def _prefixes(policy: Policy, cache: int, tokens: int) -> str:
    blocks = capacity(policy, cache, Load(tokens, 0)).blocks
    fits = cached_prefixes(policy, blocks, tokens)
    if fits.compressed is None:
        return (
            f"Prefixes of {tokens:,} tokens that stay cached where nothing runs: {fits.full:,}; "
            "compressed ones are not shared (no head scores, or it is set so)."
        )
    return (
        f"Prefixes of {tokens:,} tokens that stay cached where nothing runs: {fits.full:,} at full "
        f"size, {fits.compressed:,} compressed."
    )


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _check(options: argparse.Namespace) -> None:
    least = {
        "prompt": 1, "answer": 1, "block_size": 1, "tensor_parallel_size": 1, "shared_prefix": 1,
    }  # fmt: skip
    for name, low in least.items():
        values = getattr(options, name)
        if values is None:
            continue
        for value in values if isinstance(values, list) else [values]:
            if value < low:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is {value}; allowed are whole numbers from {low} up")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise ValueError(
            f"--gpu-memory-utilization is {options.gpu_memory_utilization}; allowed are numbers "
            "above 0, up to 1"
        )


def _table(policy: Policy, cache: int, options: argparse.Namespace) -> Table:
    table = Table(title=f"requests that fit, {options.answer} tokens answered each")
    table.add_column("prompt", justify="right")
    table.add_column("MiB each, full", justify="right")
    table.add_column("MiB each, kept", justify="right")
    table.add_column("full cache", justify="right")
    table.add_column("compressed", justify="right")
    table.add_column("while one prefills", justify="right")
    block = policy.geometry.page_bytes * policy.layout.pages_per_block
    for prompt in options.prompt:
        fits = capacity(policy, cache, Load(prompt, options.answer))
        table.add_row(
            f"{prompt:,}",
            f"{fits.full_blocks * block / 2**20:,.1f}",
            f"{fits.kept_blocks * block / 2**20:,.1f}",
            f"{fits.full:,}",
            f"{fits.compressed:,}",
            f"{fits.steady:,}",
        )
    return table
