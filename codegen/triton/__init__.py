"""Works as Triton source: text, and nothing that runs."""
