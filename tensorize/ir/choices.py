"""What options may be, where they are one of a few words."""

from __future__ import annotations

from typing import Literal

Metric = Literal["frobenius", "input", "loss"]
Refine = Literal["auto", None, "refit", "polish"]
Backend = Literal["auto", "aten", "triton", "inductor"]
Inner = Literal["auto", "eager", "inductor"]
Activations = Literal["float", "int8", "int16"]
