"""A model's graphs before and after, as text and as a picture."""
