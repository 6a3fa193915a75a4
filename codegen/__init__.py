"""From contraction plans to source text to callables."""
