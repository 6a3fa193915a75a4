"""From plans to text that runs: torch operations and Triton kernels."""
