"""Rename and reorder llama.cpp tensors into a Hugging Face Llama state dict."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mdkv_vllm.models.errors import ModelPreparationError

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def huggingface_name(gguf_name: str) -> str:
    """The Hugging Face name of a llama.cpp tensor, e.g. ``blk.3.attn_q.weight``.

    Raises:
        ModelPreparationError: the name is not one of a bias-free Llama with tied embeddings.
    """
    if gguf_name in _TOP_LEVEL:
        return _TOP_LEVEL[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, module, "weight"] if module in _PER_LAYER:
            return f"model.layers.{layer}.{_PER_LAYER[module]}.weight"
    raise ModelPreparationError(f"The model file holds an unexpected tensor: {gguf_name}.")


def undo_rope_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection in Hugging Face order.

    llama.cpp rotates neighbouring rows (2i, 2i+1), Hugging Face rotates row i with row
    i + head_size / 2, so the converter to GGUF interleaves the two halves of every head.

    Args:
        weight: ``[num_heads * head_size, hidden]``, any dtype, in llama.cpp order.
        num_heads: query heads for q, KV heads for k.

    Returns:
        A tensor of the same shape and dtype.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def llama_state_dict(
    tensors: Iterable[tuple[str, torch.Tensor]], *, num_heads: int, num_kv_heads: int
) -> dict[str, torch.Tensor]:
    """Turn dequantized llama.cpp tensors into a bfloat16 Hugging Face state dict.

    There is no ``lm_head.weight``: the embedding is tied, and a second copy on disk could
    only disagree with it.

    Args:
        tensors: (llama.cpp name, float32 ``[out, in]`` or ``[hidden]``).
        num_heads: query heads per layer.
        num_kv_heads: KV heads per layer.

    Raises:
        ModelPreparationError: a tensor name is not known.
    """
    state: dict[str, torch.Tensor] = {}
    for gguf_name, tensor in tensors:
        name = huggingface_name(gguf_name)
        if name.endswith("q_proj.weight"):
            tensor = undo_rope_permutation(tensor, num_heads)
        elif name.endswith("k_proj.weight"):
            tensor = undo_rope_permutation(tensor, num_kv_heads)
        state[name] = tensor.to(torch.bfloat16).contiguous()
    return state
