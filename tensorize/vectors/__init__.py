"""Vectors that hold matrices: found, and kept as the matrices that they are cut into."""
