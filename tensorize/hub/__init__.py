"""Where models meet transformers, peft, FSDP2 and sharded checkpoints."""
