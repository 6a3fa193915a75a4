"""What the machine does in how much time, measured and known."""
