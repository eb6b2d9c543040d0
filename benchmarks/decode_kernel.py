"""Time of decode attention: full cache, lease, and vLLM's stock CPU kernel, beside a copy.

    python benchmarks/decode_kernel.py --batch 1 16 --json results/decode_kernel.json

A step is one call per layer of the model. Several sets of requests take turns, so that no
step finds its bytes in a cache. Variants are interleaved in rounds; the median is printed.
GB/s counts the bytes a step must read. The copy counts bytes read plus bytes written.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.kernels.cpu import cpu_isas
from mdkv_vllm.kernels.cpu.decode import CpuDecode
from mdkv_vllm.kernels.cpu.formats import pack_pages
from mdkv_vllm.kernels.interface import DecodeBatch, DecodeConfig
from mdkv_vllm.testing.plans import prompt_segments

STOCK_BLOCK_SIZE = 128
COPY_BYTES = 512 << 20
WINDOW = 32
"""Tokens at the end of every context that stay full."""


@dataclass(frozen=True)
class Shape:
    """A model and a load."""

    layers: int
    kv_heads: int
    group: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    tokens: int
    batch: int
    sets: int
    """Disjoint sets of requests that take turns."""

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.head_size**-0.5

    def query(self, dtype: torch.dtype) -> torch.Tensor:
        """``[batch, q_heads, head_size]``."""
        return torch.randn(self.batch, self.kv_heads * self.group, self.head_size).to(dtype)


@dataclass
class Variant:
    """Something to time: ``step(set)`` runs all layers once and reads ``step_bytes``."""

    name: str
    step: Callable[[int], None]
    step_bytes: int
    seconds: list[float]


def ours(
    shape: Shape,
    names: tuple[str, ...],
    mix: dict[str, float],
    budget: float,
    segment_tokens: int | None = None,
) -> Variant:
    """Our kernel, at full dimension (budget 1) or with leases.

    Args:
        shape: model and load.
        names: page formats and ``drop``.
        mix: share of the list pages by format.
        budget: share of the prompt's bytes to keep.
        segment_tokens: of what each lease has compressed; None for a single lease.
    """
    geometry = PageGeometry(shape.block_size, shape.head_size, shape.dtype)
    layout = LeaseLayout(geometry, parse_formats(names, geometry), shape.layers, shape.kv_heads, 0)
    rows, pages, size = shape.batch * shape.sets, layout.pages_per_block, shape.block_size
    segments = prompt_segments(shape.tokens, size, WINDOW, budget, 1, segment_tokens)
    tail = segments[-1].end_block if segments else 0
    columns = [*(range(*one.lease) for one in segments), range(tail, -(-shape.tokens // size))]
    sizes = [len(some) for some in columns]
    num_blocks = rows * sum(sizes)
    kv_cache = torch.empty(
        num_blocks, pages, shape.block_size, 2 * shape.head_size, dtype=shape.dtype
    )
    for block in kv_cache:
        block.normal_()
    block_table = torch.zeros(rows, columns[-1].stop, dtype=torch.int32)
    leases = torch.zeros(rows, max(len(segments), 1), 2, dtype=torch.int32)
    list_pages = 0
    ids = torch.randperm(num_blocks).view(rows, -1).int().split(sizes, dim=1)
    for own, some in zip(ids, columns, strict=True):
        block_table[:, some.start : some.stop] = own
    for index, segment in enumerate(segments):
        leases[:, index] = torch.tensor(segment.lease)
        list_pages += fill_leases(kv_cache, ids[index], layout, mix)
    query = shape.query(shape.dtype)
    output = torch.empty_like(query)
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32)
    query_rows = torch.arange(rows, dtype=torch.int32).view(shape.sets, shape.batch)
    batches = [DecodeBatch(block_table, some, lengths, leases) for some in query_rows]
    group = query.shape[1] // layout.num_kv_heads
    kernel = CpuDecode(
        DecodeConfig(kv_cache, layout, group, None, shape.scale, shape.batch, leases.shape[1])
    )

    def step(index: int) -> None:
        for layer in range(shape.layers):
            kernel.attend(query, layer, batches[index], output)

    slot_bytes = geometry.page_bytes // shape.block_size
    tail_bytes = (shape.tokens - tail * shape.block_size) * slot_bytes * pages
    step_bytes = shape.batch * (list_pages * geometry.page_bytes + tail_bytes)
    name = f"mixed_decode {budget:.0%}" + (f" of {segment_tokens}" if segment_tokens else "")
    return Variant(name, step, step_bytes, [])


def fill_leases(
    kv_cache: torch.Tensor, lease_blocks: torch.Tensor, layout: LeaseLayout, mix: dict[str, float]
) -> int:
    """Write the same lease of random tokens into every row's blocks; list pages per lease."""
    formats = layout.formats.formats
    per_head = layout.list_pages(lease_blocks.shape[1]) // layout.pages_per_block
    page_counts = torch.tensor([int(per_head * mix.get(f.name, 0.0)) for f in formats])
    capacity = torch.tensor([f.tokens_per_page for f in formats])
    tokens = (page_counts * capacity).expand(layout.table_shape[:3]).contiguous()
    table = layout.page_table(tokens)
    pages = torch.zeros(
        lease_blocks.shape[1] * layout.pages_per_block,
        layout.geometry.page_bytes,
        dtype=torch.uint8,
    )
    raw = table.contiguous().view(torch.uint8).flatten()
    pages.view(-1)[: raw.numel()] = raw
    for column, fmt in enumerate(formats):
        lists = layout.pages_per_block
        count = int(tokens[0, 0, column])
        packed = torch.zeros(
            lists * int(page_counts[column]), layout.geometry.page_bytes, dtype=torch.uint8
        )
        vectors = torch.randn(lists, count, fmt.rank)
        counts = torch.full((lists,), count, dtype=torch.int32)
        pack_pages(vectors, vectors, counts, fmt, layout.geometry, packed)
        firsts = table[..., column, 1].flatten().tolist()
        for first, part in zip(firsts, packed.chunk(lists), strict=True):
            pages[first : first + part.shape[0]] = part
    blocks = pages.view(kv_cache.dtype).view(lease_blocks.shape[1], *kv_cache.shape[1:])
    for row in lease_blocks.long():
        kv_cache[row] = blocks
    return int(page_counts.sum()) * layout.pages_per_block


def stock(shape: Shape, dtype: torch.dtype) -> Variant | None:
    """VLLM's own CPU kernel, or None where vLLM cannot be imported."""
    try:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return None
    rows, held = shape.batch * shape.sets, -(-shape.tokens // STOCK_BLOCK_SIZE)
    caches = []
    for _ in range(shape.layers):
        cache = torch.empty(
            rows * held, shape.kv_heads, 2 * STOCK_BLOCK_SIZE, shape.head_size, dtype=dtype
        )
        caches.append(cache.normal_().chunk(2, dim=2))
    block_table = torch.randperm(rows * held).view(shape.sets, shape.batch, held).int()
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32)
    query = shape.query(dtype)
    output = torch.empty_like(query)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch,
        num_heads=query.shape[1],
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_size,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=_get_attn_isa(dtype, STOCK_BLOCK_SIZE, shape.head_size),
        enable_kv_split=True,
    )

    def step(index: int) -> None:
        for keys, values in caches:
            ops.cpu_attention_with_kv_cache(
                query=query,
                key_cache=keys,
                value_cache=values,
                output=output,
                query_start_loc=starts,
                seq_lens=lengths,
                scale=shape.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=block_table[index],
                softcap=0,
                scheduler_metadata=metadata,
                s_aux=None,
            )

    token_bytes = 2 * shape.head_size * dtype.itemsize * shape.kv_heads * shape.layers
    name = f"stock {str(dtype).removeprefix('torch.')}"
    return Variant(name, step, shape.batch * shape.tokens * token_bytes, [])


def bandwidth() -> list[Variant]:
    """A copy and a read of memory, as torch does them with its threads."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)

    def copy(_: int) -> None:
        target.copy_(source)

    def read(_: int) -> None:
        source.sum()

    return [Variant("copy", copy, 2 * COPY_BYTES, []), Variant("read", read, COPY_BYTES, [])]


def measure(variants: list[Variant], sets: int, rounds: int) -> None:
    """Time one step per set of every variant in every round, after one round to warm up."""
    for turn in range(rounds + 1):
        for variant in variants:
            start = time.perf_counter()
            steps = 1 if variant.name in ("copy", "read") else sets
            for index in range(steps):
                variant.step(index)
            if turn > 0:
                variant.seconds.append((time.perf_counter() - start) / steps)


def report(shape: Shape, variants: list[Variant]) -> list[dict[str, float | str]]:
    """Print the table of one batch size and return its rows."""
    medians = {v.name: statistics.median(v.seconds) for v in variants}
    copy = variants[0].step_bytes / medians["copy"] / 1e9
    baseline = next((v for v in variants if v.name.startswith("stock")), None)
    rows: list[dict[str, float | str]] = []
    print(f"\nbatch {shape.batch}, {shape.tokens} tokens, {shape.layers} layers")
    print(
        f"{'variant':>22} {'ms/step':>9} {'best':>9} {'MB/step':>9} "
        f"{'GB/s':>7} {'of copy':>8} {'speed':>7}"
    )
    for variant in variants:
        seconds = medians[variant.name]
        rate = variant.step_bytes / seconds / 1e9
        row: dict[str, float | str] = {
            "variant": variant.name,
            "batch": shape.batch,
            "ms_per_step": seconds * 1e3,
            "best_ms_per_step": min(variant.seconds) * 1e3,
            "mb_per_step": variant.step_bytes / 1e6,
            "gb_per_s": rate,
            "share_of_copy": rate / copy,
        }
        speed = ""
        if baseline is not None and variant.name not in ("copy", "read"):
            row["speed_over_stock"] = medians[baseline.name] / seconds
            speed = f"{row['speed_over_stock']:.2f}x"
        print(
            f"{variant.name:>22} {seconds * 1e3:9.3f} {min(variant.seconds) * 1e3:9.3f} "
            f"{variant.step_bytes / 1e6:9.1f} "
            f"{rate:7.1f} {rate / copy:8.0%} {speed:>7}"
        )
        rows.append(row)
    return rows


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--group", type=int, default=3, help="query heads per KV head")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.25])
    parser.add_argument("--formats", default="drop,i4,i8,full")
    parser.add_argument(
        "--mix", default="i4=0.5,i8=0.4,full=0.1", help="share of the list pages by format"
    )
    parser.add_argument(
        "--segments",
        type=int,
        nargs="*",
        default=[],
        help="budgets also in leases of so many tokens",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-mb", type=int, default=256, help="bytes that take turns")
    parser.add_argument("--stock", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    machine = {
        "cpu": cpu_model(),
        "isas": cpu_isas(),
        "torch": torch.__version__,
        "threads": args.threads,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    mix = {name: float(share) for name, share in (p.split("=") for p in args.mix.split(","))}
    rows = []
    for batch in args.batch:
        token_bytes = 4 * args.head_size * args.kv_heads * args.layers
        smallest = min(args.budget) * batch * args.tokens * token_bytes
        shape = Shape(
            args.layers,
            args.kv_heads,
            args.group,
            args.head_size,
            args.block_size,
            getattr(torch, args.dtype),
            args.tokens,
            batch,
            sets=max(1, -(-(args.min_mb << 20) // int(smallest))),
        )
        variants = bandwidth()
        for dtype in args.stock:
            variant = stock(shape, getattr(torch, dtype))
            variants += [variant] if variant else []
        names = tuple(args.formats.split(","))
        variants += [ours(shape, names, mix, budget) for budget in (1.0, *args.budget)]
        variants += [
            ours(shape, names, mix, budget, segment)
            for budget in args.budget
            for segment in args.segments
        ]
        measure(variants, shape.sets, args.rounds)
        rows += report(shape, variants)
        print(json.dumps({k: str(v) for k, v in asdict(shape).items()}))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        options = {k: str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps(machine | {"options": options, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
