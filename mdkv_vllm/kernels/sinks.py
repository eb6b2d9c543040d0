"""Attention sinks around any decode kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mdkv_vllm.kernels.interface import DecodeBatch, DecodeKernel


class SinkDecode:
    """:class:`.interface.DecodeKernel` of a model with attention sinks.

    A sink is one more score of each query head, whose weight goes to no value: it scales what
    attention without it gives by ``sum / (sum + exp(sink))``.

    Args:
        kernel: attends without sinks.
        sinks: of each layer ``[query_heads]``: the model's own, which new weights may change.
    """

    def __init__(self, kernel: DecodeKernel, sinks: Sequence[torch.Tensor]) -> None:
        self.kernel = kernel
        self._sinks = sinks

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        batch: DecodeBatch,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
        recent: torch.Tensor | None = None,
    ) -> None:
        """See :class:`.interface.DecodeKernel`."""
        if lse is None:
            lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        self.kernel.attend(query, layer, batch, output, lse=lse, recent=recent)
        sinks = self._sinks[layer].float()
        output.mul_(torch.sigmoid(lse - sinks).unsqueeze(-1).to(output.dtype))
        torch.logaddexp(lse, sinks, out=lse)

    def scratch(self) -> Sequence[torch.Tensor]:
        """That of the kernel."""
        return self.kernel.scratch()
