"""Time of compressing one prompt, beside the prefill that came before it.

The prefill is counted by what it cannot do without: the model's matrix products at the rate of one
of them, and causal attention by torch's flash kernel, both measured in the same run. Real prefills
take longer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mdkv_vllm.core.allocate import Allocation
from mdkv_vllm.core.compress import Compressor
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.kernels import CompressionKernels, LayersToCompress
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.prompt import PagedTokens
from mdkv_vllm.kernels.triton.compress import TritonKernels
from mdkv_vllm.testing.plans import whole_prompt

from .device import device
from .inputs import WINDOW
from .loads import BLOCK_SIZE, MODELS, Heads

SHARE = 0.02
"""Aim: of the prefill's time."""
FORMATS = ("drop", "i4", "i8", "full")
PARTS = ("losses", "allocate", "pack")
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
        seconds: median time of a whole compression, from event to event on the device.
        device_seconds: the same captured in a CUDA graph and replayed; NaN where it cannot be.
        host_seconds: what the host takes to launch it.
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
    device_seconds: float
    host_seconds: float
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
        parts = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in self.parts.items())
        return [
            f"compression of {self.tokens} tokens, {self.model}, budget {self.budget}: "
            f"{self.seconds * 1e3:.1f} ms (host {self.host_seconds * 1e3:.1f}, device "
            f"{self.device_seconds * 1e3:.1f} as a graph); parts, ms: {parts}",
            f"  prefill at least {self.product_seconds * 1e3:.0f} ms of products "
            f"({self.product_rate / 1e12:.0f} TFLOP/s) and {self.attention_seconds * 1e3:.0f} ms "
            f"of attention; share {self.share:.1%}, aim {SHARE:.0%}: "
            f"{'reached' if self.share <= SHARE else 'missed'}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        return asdict(self) | {"share": self.share, "aim": SHARE}


class Timed:
    """Kernels that note when their parts begin and end on the device.

    Args:
        kernels: what is called.
    """

    def __init__(self, kernels: CompressionKernels) -> None:
        self._kernels = kernels
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.layers_at_once, self.reads_pages = kernels.layers_at_once, kernels.reads_pages

    def time(self, part: str, call: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Call something as a part."""
        result: list[Any] = []
        (seconds,) = device().seconds(lambda: result.append(call()), 1)
        self.seconds[part] += seconds
        return result[-1]

    def layers(self, *arguments: Any) -> TimedGroup:  # noqa: ANN401
        """See :class:`CompressionKernels`."""
        return TimedGroup(self, self._kernels.layers(*arguments))

    def allocate(self, *arguments: Any) -> list[Allocation]:  # noqa: ANN401
        """See :class:`CompressionKernels`."""
        return self.time("allocate", lambda: self._kernels.allocate(*arguments))


@dataclass(frozen=True)
class TimedGroup:
    """A group of layers of :class:`Timed`."""

    timed: Timed
    group: LayersToCompress

    def losses(self) -> Any:  # noqa: ANN401
        """See :class:`LayersToCompress`."""
        return self.timed.time("losses", self.group.losses)

    def pack(self, *arguments: Any) -> torch.Tensor:  # noqa: ANN401
        """See :class:`LayersToCompress`."""
        return self.timed.time("pack", lambda: self.group.pack(*arguments))


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
        heads, where = model.heads, generator.device
        geometry = PageGeometry(BLOCK_SIZE, heads.head_size, heads.dtype)
        formats = parse_formats(FORMATS, geometry)
        self.layout = LeaseLayout(geometry, formats, model.layers, heads.kv_heads)
        self.segment = whole_prompt(tokens, BLOCK_SIZE, WINDOW, budget, self.layout.min_blocks)
        blocks = -(-tokens // BLOCK_SIZE)
        shape = (blocks, self.layout.pages_per_block, BLOCK_SIZE, 2 * heads.head_size)
        kv_cache = torch.empty(shape, dtype=heads.dtype, device=where).normal_(generator=generator)
        order = torch.randperm(blocks, generator=generator, device=where).int()
        self._tokens = PagedTokens(kv_cache, order, tokens, heads.kv_heads)
        query = (model.layers, heads.q_heads, WINDOW, heads.head_size)
        self._queries = torch.empty(query, dtype=heads.dtype, device=where)
        self._queries.normal_(generator=generator)

    def compress(self, kernels: CompressionKernels) -> None:
        """Compress it once."""
        scale = self.layout.geometry.head_size**-0.5
        compressor = Compressor(self.layout, LOSSES["hybrid"], scale, kernels=kernels)
        compressor.compress(self._tokens, self._queries, self.segment)


def device_seconds(run: Callable[[], object]) -> float:
    """Median time on the device of something that has been run before."""
    return statistics.median(device().seconds(run, ROUNDS))


def captured_seconds(run: Callable[[], object]) -> float:
    """The same of its CUDA graph; NaN where it cannot be captured."""
    if not device().captures:
        return math.nan
    try:
        return device_seconds(device().captured(run))
    except RuntimeError:
        return math.nan


def host_seconds(run: Callable[[], object]) -> float:
    """Median time that the host takes to launch something, the device being idle before."""
    seconds = []
    for _ in range(ROUNDS):
        device().synchronize()
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    device().synchronize()
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
    left @ right  # chooses its kernel
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
        with sdpa_kernel(FLASH if query.is_cuda else [SDPBackend.MATH]):
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=heads.group > 1
            )

    attend()
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

        def run(prompt: CachedPrompt = prompt) -> None:
            prompt.compress(kernels)

        run()  # compiles
        whole, host, alone = device_seconds(run), host_seconds(run), captured_seconds(run)
        timed = Timed(kernels)
        prompt.compress(timed)
        del prompt
        rate = product_rate(model, min(tokens, 8192), generator)
        yield CompressionTime(
            model.heads.name,
            tokens,
            budget,
            whole,
            alone,
            host,
            timed.seconds,
            model.layers,
            rate,
            model.products(tokens) / rate,
            attention_seconds(model, tokens, generator),
        )
