"""A mixed-dimension paged KV cache for stock vLLM."""

__version__ = "0.1.0"
