"""Random leases, lists and prompts, for the tests and for the GPU kit (benchmarks/gpu)."""
