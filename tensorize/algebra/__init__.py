"""Tensor-train algebra, and the interpreter that everything else is compared with."""
