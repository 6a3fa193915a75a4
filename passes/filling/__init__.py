"""Which bits a model's weights get in a file: one share of the loss for all of their entries."""
