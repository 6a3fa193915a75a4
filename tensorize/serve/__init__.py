"""What other people's engines need to serve compressed models."""
