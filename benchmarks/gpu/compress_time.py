"""Time of compressing one prompt, beside the prefill that came before it.

The prefill is counted by what it cannot do without: the model's matrix products at the rate of one
of them, and causal attention by torch's flash kernel, both measured in the same run. Real prefills
take longer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.kernels import CompressionKernels
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.plan import LeasePlan, LeaseTerms, plan_lease
from mdkv_vllm.triton_kernels.compress import TritonKernels

from .inputs import WINDOW
from .loads import BLOCK_SIZE, MODELS, Heads

SHARE = 0.03
"""Aim: of the prefill's time."""
FORMATS = ("drop", "i4", "i8", "full")
PARTS = ("load", "rotate", "round_trip", "loss_sums", "allocate", "pack")
ROUNDS = 5
FLASH = [SDPBackend.FLASH_ATTENTION]


@dataclass(frozen=True)
class Model:
    """A decoder with gated feed-forward layers.

    Attributes:
        heads: of its attention.
        layers: layers.
        hidden: width.
        feed_forward: width of a feed-forward layer.
    """

    heads: Heads
    layers: int
    hidden: int
    feed_forward: int

    def products(self, tokens: int) -> float:
        """Operations of a prefill's matrix products, but for attention and the output layer."""
        attention = self.hidden * (2 * self.heads.q_heads + 2 * self.heads.kv_heads)
        weights = attention * self.heads.head_size + 3 * self.hidden * self.feed_forward
        return 2.0 * weights * self.layers * tokens


LLAMA_8B = Model(MODELS[0], 32, 4096, 14336)


@dataclass(frozen=True)
class CompressionTime:
    """What one prompt costs.

    Attributes:
        model: its attention heads' name.
        tokens: of the prompt.
        budget: share of the bytes kept.
        seconds: median time of a whole compression.
        parts: seconds of each of :data:`PARTS` in one compression, all layers together. What is
            between them is in no part.
        layers: of the model.
        product_rate: operations per second of a matrix product.
        product_seconds: the model's products at that rate.
        attention_seconds: causal attention of all layers.
    """

    model: str
    tokens: int
    budget: float
    seconds: float
    parts: dict[str, float]
    layers: int
    product_rate: float
    product_seconds: float
    attention_seconds: float

    @property
    def share(self) -> float:
        """Of the prefill's time."""
        return self.seconds / (self.product_seconds + self.attention_seconds)

    @property
    def lines(self) -> list[str]:
        """The report."""
        per_layer = ", ".join(f"{n} {s / self.layers * 1e3:.2f}" for n, s in self.parts.items())
        return [
            f"compression of {self.tokens} tokens, {self.model}, budget {self.budget}: "
            f"{self.seconds * 1e3:.1f} ms; ms per layer: {per_layer}",
            f"  prefill at least {self.product_seconds * 1e3:.0f} ms of products "
            f"({self.product_rate / 1e12:.0f} TFLOP/s) and {self.attention_seconds * 1e3:.0f} ms "
            f"of attention; share {self.share:.1%}, aim {SHARE:.0%}: "
            f"{'reached' if self.share <= SHARE else 'missed'}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        return asdict(self) | {"share": self.share, "aim": SHARE}


class Timed:
    """Kernels that note when they begin and end on the device.

    Args:
        kernels: what is called.
    """

    def __init__(self, kernels: CompressionKernels) -> None:
        self._kernels = kernels
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.layers_at_once = kernels.layers_at_once

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
        """Call something as a part of that name."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = function(*arguments)
        end.record()
        self._events.append((name, begin, end))
        return result

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._kernels, name)
        return lambda *arguments: self.call(name, function, *arguments)

    def seconds(self) -> dict[str, float]:
        """Seconds of every part so far."""
        torch.cuda.synchronize()
        total = dict.fromkeys(PARTS, 0.0)
        for name, begin, end in self._events:
            total[name] += begin.elapsed_time(end) / 1e3
        return total


class CachedPrompt:
    """A random prompt in a paged cache, its blocks anywhere.

    Args:
        model: whose.
        tokens: of the prompt.
        budget: share of the bytes to keep.
        generator: of its device.
    """

    def __init__(
        self, model: Model, tokens: int, budget: float, generator: torch.Generator
    ) -> None:
        heads, device, self._tokens = model.heads, generator.device, tokens
        geometry = PageGeometry(BLOCK_SIZE, heads.head_size, heads.dtype)
        formats = parse_formats(FORMATS, geometry)
        self.layout = LeaseLayout(geometry, formats, model.layers, heads.kv_heads)
        terms = LeaseTerms(BLOCK_SIZE, WINDOW, 1, budget, self.layout.min_blocks)
        plan = plan_lease(tokens, terms)
        assert plan is not None
        self.plan: LeasePlan = plan
        blocks = -(-tokens // BLOCK_SIZE)
        shape = (blocks, self.layout.pages_per_block, BLOCK_SIZE, 2 * heads.head_size)
        self._arena = torch.empty(shape, dtype=heads.dtype, device=device)
        self._arena.normal_(generator=generator)
        self._blocks = torch.randperm(blocks, generator=generator, device=device)
        query = (model.layers, heads.q_heads, WINDOW, heads.head_size)
        self._queries = torch.empty(query, dtype=heads.dtype, device=device)
        self._queries.normal_(generator=generator)

    def load(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, ``[kv_heads, tokens, head_size]``, gathered by block."""
        heads = self.layout.num_kv_heads
        mine = self._arena[:, layer * heads : (layer + 1) * heads]
        both = mine.index_select(0, self._blocks).transpose(0, 1).flatten(1, 2)
        keys, values = both[:, : self._tokens].chunk(2, dim=-1)
        return keys, values

    def compress(self, kernels: CompressionKernels, timed: Timed | None = None) -> None:
        """Compress it once."""
        scale = self.layout.geometry.head_size**-0.5
        compressor = Compressor(self.layout, "hybrid", scale, kernels=timed or kernels)
        load = self.load
        if timed is not None:
            compressor.compress(lambda i: timed.call("load", load, i), self._queries, self.plan)
        else:
            compressor.compress(load, self._queries, self.plan)


def device_seconds(run: Callable[[], object]) -> float:
    """Median time on the device of something that has been run before."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def product_rate(model: Model, tokens: int, generator: torch.Generator) -> float:
    """Operations per second of a feed-forward layer's product."""
    shapes = (tokens, model.hidden), (model.hidden, model.feed_forward)
    left, right = (
        torch.empty(shape, dtype=model.heads.dtype, device=generator.device).normal_(
            generator=generator
        )
        for shape in shapes
    )
    operations = 2.0 * tokens * model.hidden * model.feed_forward
    return operations / device_seconds(lambda: left @ right)


def attention_seconds(model: Model, tokens: int, generator: torch.Generator) -> float:
    """Time of causal attention of all layers by torch's flash kernel."""
    heads = model.heads
    query, key, value = (
        torch.empty(
            1, number, tokens, heads.head_size, dtype=heads.dtype, device=generator.device
        ).normal_(generator=generator)
        for number in (heads.q_heads, heads.kv_heads, heads.kv_heads)
    )

    def attend() -> torch.Tensor:
        with sdpa_kernel(FLASH):
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=heads.group > 1
            )

    return model.layers * device_seconds(attend)


def time_compression(
    generator: torch.Generator,
    model: Model = LLAMA_8B,
    lengths: tuple[int, ...] = (4096, 32768),
    budget: float = 0.25,
) -> Iterator[CompressionTime]:
    """Time a prompt of each length.

    Args:
        generator: of the inputs, on the GPU.
        model: whose layers.
        lengths: tokens of the prompts.
        budget: share of the bytes to keep.
    """
    kernels = TritonKernels()
    for tokens in lengths:
        prompt = CachedPrompt(model, tokens, budget, generator)
        whole = device_seconds(lambda prompt=prompt: prompt.compress(kernels))
        timed = Timed(kernels)
        prompt.compress(kernels, timed)
        del prompt
        rate = product_rate(model, min(tokens, 8192), generator)
        yield CompressionTime(
            model.heads.name,
            tokens,
            budget,
            whole,
            timed.seconds(),
            model.layers,
            rate,
            model.products(tokens) / rate,
            attention_seconds(model, tokens, generator),
        )
