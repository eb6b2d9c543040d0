"""The method itself: formats, plan, loss, allocation, packing. Torch only, no vLLM."""
