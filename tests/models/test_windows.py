"""Models that the commands cannot read are refused before they are loaded."""

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from mdkv_vllm.models.windows import refuse_windows


@pytest.mark.parametrize(
    "config",
    [Gemma3TextConfig(), MistralConfig(sliding_window=4096)],
    ids=["some layers", "every layer"],
)
def test_sliding_windows(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding windows"):
        refuse_windows(tmp_path)


@pytest.mark.parametrize(
    "config", [LlamaConfig(), MistralConfig(sliding_window=None), Qwen2Config()]
)
def test_none(tmp_path, config):
    config.save_pretrained(tmp_path)
    refuse_windows(tmp_path)
