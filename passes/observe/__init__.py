"""What a model and its data say of every weight: sites, moments, the loss to preserve."""
