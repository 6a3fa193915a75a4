"""The verbs: compile, analyze, apply, and what goes with them."""
