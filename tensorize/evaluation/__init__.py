"""How a compressed model compares with the dense one: quality, size, speed."""
