"""How a model uses its weights, and what it runs on."""
