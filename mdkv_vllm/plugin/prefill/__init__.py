"""Attention while prompts are prefilled: one module per implementation, all called alike."""
