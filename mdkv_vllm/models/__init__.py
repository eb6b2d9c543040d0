"""Ready-to-serve model folders for tests and demonstrations."""

from mdkv_vllm.models.errors import ModelPreparationError
from mdkv_vllm.models.smollm2 import DEFAULT_MODEL_NAME, is_prepared, prepare_smollm2

__all__ = ["DEFAULT_MODEL_NAME", "ModelPreparationError", "is_prepared", "prepare_smollm2"]
