"""Put a plan's factors into the model: made, refined, verified."""
