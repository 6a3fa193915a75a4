"""What compressed models are served by: other people's engines, and a small server of our own."""
