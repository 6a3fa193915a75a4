"""Where compressed models meet transformers, peft and sharded checkpoints."""
