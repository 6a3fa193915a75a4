"""Tensors within a bound as other people's coders hold them: SZ3 and zfp.

What they give back is compared with what they were given: they may pass a bound that is finer than
their arithmetic. A tensor that one cannot hold within it is for our own coder.

Sources: Liang et al., "SZ3: A Modular Framework for Composing Prediction-Based Error-Bounded Lossy
Compressors", IEEE Transactions on Big Data 2023; Lindstrom, "Fixed-Rate Compressed Floating-Point
Arrays", IEEE TVCG 2014.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorize.base.errors import CheckpointError

_MOST_DIMENSIONS = 4

_FEWEST = 64
"""Entries below which what these coders say of an array is most of it."""

_CHECK = 4
"""Bytes of a checksum: what is damaged is not for them to read."""


@dataclass(frozen=True)
class Peer:
    """A coder of arrays of float32 or float64 within a bound: its package, and two functions."""

    package: str
    code: Callable[[Any, np.ndarray, float], bytes]
    numbers: Callable[[Any, bytes, tuple[int, ...], type], np.ndarray]

    @property
    def module(self) -> Any:
        """Its package.

        Raises:
            CheckpointError: it is not installed.
        """
        try:
            return importlib.import_module(self.package)
        except ImportError as error:
            raise CheckpointError(
                f"this needs the package {self.package}, which is not installed",
                way_out=f"pip install {self.package}",
            ) from error


def _sz_code(sz: Any, array: np.ndarray, bound: float) -> bytes:
    config = sz.szConfig()
    config.errorBoundMode, config.absErrorBound = sz.szErrorBoundMode.ABS, bound
    data, _ = sz.sz.compress(array, config)
    return bytes(data)


def _sz_numbers(sz: Any, data: bytes, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    found, _ = sz.sz.decompress(np.frombuffer(data, dtype=np.uint8), dtype, shape)
    return found


def _zfp_code(zfp: Any, array: np.ndarray, bound: float) -> bytes:
    return bytes(zfp.compress_numpy(array, tolerance=bound))


def _zfp_numbers(zfp: Any, data: bytes, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return zfp.decompress_numpy(data)


PEERS = {
    "sz3": Peer("pysz", _sz_code, _sz_numbers),
    "zfp": Peer("zfpy", _zfp_code, _zfp_numbers),
}


def encoded(peer: Peer, numbers: Tensor, bound: float) -> tuple[bytes, float] | None:
    """The bytes of a tensor of real numbers, and its largest error; None: it cannot be held so."""
    floats = numbers.is_floating_point() and numbers.element_size() > 1
    if not floats or numbers.numel() < _FEWEST or not 0 < bound < math.inf:
        return None
    if not bool(numbers.isfinite().all()):
        return None
    module = peer.module
    array = np.ascontiguousarray(_wide(numbers).reshape(_laid_out(numbers.shape)).numpy())
    # A dtype of few digits rounds what comes back: that may take half of the bound.
    for within in (bound, bound / 2):
        data = peer.code(module, array, within)
        made = _as_tensor(peer, module, data, numbers.shape, numbers.dtype)
        found = float((made.double() - numbers.double()).abs().max())
        if found <= bound:
            return zlib.crc32(data).to_bytes(_CHECK, "little") + data, found
    return None


def decoded(peer: Peer, data: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of ``encoded``.

    Raises:
        ValueError: the bytes are damaged.
        CheckpointError: the coder is not installed.
    """
    check, rest = bytes(data[:_CHECK]), bytes(data[_CHECK:])
    if zlib.crc32(rest).to_bytes(_CHECK, "little") != check:
        raise ValueError(f"bytes of {peer.package} are damaged")
    return _as_tensor(peer, peer.module, rest, shape, dtype)


def _as_tensor(
    peer: Peer, module: Any, data: bytes, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    wide = np.float64 if dtype == torch.float64 else np.float32
    found = peer.numbers(module, data, _laid_out(shape), wide)
    if found.size != math.prod(shape) or found.dtype != wide:
        raise ValueError(f"bytes of {peer.package} are not those of {shape}")
    found = np.require(found, requirements=("C", "W"))
    return torch.from_numpy(found).to(dtype).reshape(shape)


def _wide(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def _laid_out(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of one, and with no more than these coders know: the first ones joined."""
    sizes = [size for size in shape if size != 1] or [1]
    more = len(sizes) - _MOST_DIMENSIONS + 1
    return tuple(sizes) if more < 2 else (math.prod(sizes[:more]), *sizes[more:])
