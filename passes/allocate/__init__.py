"""One choice of formats and ranks under a budget."""
