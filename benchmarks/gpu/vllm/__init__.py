"""vLLM itself on a bare GPU machine: what is carried there, and what is run."""
