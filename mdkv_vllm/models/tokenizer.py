"""Build SmolLM2's Hugging Face tokenizer from GGUF metadata, and prove it by golden ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkv_vllm.models.errors import ModelPreparationError
from mdkv_vllm.models.gguf_source import GgufModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL_TOKEN_TYPE = 3

# Found with a separate byte-pair encoder written against the merge ranks of the GGUF file.
# They cover digits one by one, the space before a number on its own, newlines and
# indentation, chat markers as single ids, and bytes beyond ASCII.
GOLDEN_IDS: dict[str, list[int]] = {
    "7391": [39, 35, 41, 33],
    " 7391": [216, 39, 35, 41, 33],
    "The code is 7391.": [504, 2909, 314, 216, 39, 35, 41, 33, 30],
    "line one\nline two\n\n  indented": [1311, 582, 198, 1311, 827, 8866, 641, 6574],
    "<|im_start|>user\nHi 2024<|im_end|>\n": [1, 4093, 198, 26843, 216, 34, 32, 34, 36, 2, 198],
    "<|im_start|>assistant\n": [1, 520, 9531, 198],
    "<|endoftext|>": [0],
    "caf\u00e9 12,5\t\u4f60": [83, 1939, 2756, 216, 33, 34, 28, 37, 197, 18645, 250],
    "It's 9 o'clock.": [1589, 506, 216, 41, 263, 23, 17466, 30],
}


def build_tokenizer(model: GgufModel) -> Tokenizer:
    """The ``tokenizers.Tokenizer`` of the GGUF file: byte-level BPE, digits split one by one.

    GGUF only names the pre-tokenizer ("smollm"). Generic converters take GPT-2's for it,
    which keeps numbers together; the model then reads numbers it never saw in training.

    Raises:
        ModelPreparationError: the file describes another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (model.metadata("tokenizer.ggml.model"), model.metadata("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ModelPreparationError(
            f"Expected the tokenizer of SmolLM2 (gpt2, smollm) in {model.path}, found {kind}."
        )
    tokens: list[str] = model.metadata("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in model.metadata("tokenizer.ggml.merges")]
    types: list[int] = model.metadata("tokenizer.ggml.token_type")

    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == _CONTROL_TOKEN_TYPE
        ]
    )
    return tokenizer


def tokenizer_config(model: GgufModel) -> dict[str, Any]:
    """Contents of ``tokenizer_config.json``: special tokens and the file's chat template."""
    tokens: list[str] = model.metadata("tokenizer.ggml.tokens")

    def token(role: str) -> str:
        token_id: int = model.metadata(f"tokenizer.ggml.{role}_token_id")
        return tokens[token_id]

    return {
        # The generic class keeps tokenizer.json as it is; GPT2Tokenizer and LlamaTokenizer
        # put pre-tokenizers of their own in place of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.metadata("llama.context_length"),
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "chat_template": model.metadata("tokenizer.chat_template"),
    }


def check_golden_ids(folder: Path) -> None:
    """Check the tokenizer in ``folder``, loaded the way vLLM loads it, against golden ids.

    Raises:
        ModelPreparationError: an encoding differs, or decoding does not restore the text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, expected in GOLDEN_IDS.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != expected:
            raise ModelPreparationError(
                f"The tokenizer in {folder} encodes {text!r} as {ids}, expected {expected}. "
                "The installed versions of transformers or tokenizers are probably not the "
                "pinned ones: see requirements/cpu.txt."
            )
        restored = tokenizer.decode(ids)
        if restored != text:
            raise ModelPreparationError(
                f"The tokenizer in {folder} restores {text!r} as {restored!r}."
            )
