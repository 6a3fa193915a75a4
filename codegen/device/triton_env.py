"""Triton on this machine: whether it is there, whether it interprets, and how it multiplies."""

from __future__ import annotations

import builtins
import hashlib
import linecache
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tensorize.base.errors import TensorizeError

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=4096)
def load(text: str) -> dict[str, Any]:
    """What a text defines. Triton reads sources again, so they are kept where it looks for them.

    Raises:
        TensorizeError: triton is not installed.
    """
    require_triton()
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    filename = f"<tensorize kernel {digest}>"
    # Without a modification time, linecache never drops the entry.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": f"tensorize_kernel_{digest}"}
    exec(builtins.compile(text, filename, "exec"), namespace)
    return namespace


def require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise TensorizeError(
            "kernels need triton to be compiled or run", way_out="pip install triton"
        ) from error


def check_device(x: Tensor) -> None:
    """Raises TensorizeError where kernels cannot run on the tensor's device."""
    if not x.is_cuda and not interpreting():
        raise TensorizeError(
            f'the model was compiled with backend="triton", whose kernels do not run on '
            f"{x.device.type}",
            way_out="move the model to a GPU, or set TRITON_INTERPRET=1 before Python starts to "
            'run the kernels (slowly) on the CPU; backend="aten" needs neither',
        )


def precision(dtype: torch.dtype, device: str) -> str:
    """Of float32 dots: what torch allows its own matmuls."""
    if dtype != torch.float32 or not device.startswith("cuda") or torch.version.hip:
        return "ieee"
    # The attribute follows both of torch's ways to say it, of which reading the older one may fail.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
