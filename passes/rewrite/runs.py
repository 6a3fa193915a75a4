"""Run two models side by side, weight by weight, as a refit needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tensorize.capture.forward import ours, untouched
from tensorize.capture.inner_gradients import is_transformed
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch
from tensorize.passes.observe.outputs import call


def run_order(model: nn.Module, batch: Batch, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Weights that one forward pass uses exactly once, as a plain matrix, in the order of use."""
    uses: dict[str, int] = {}

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        plain = frame.rows is None and frame.expert is None and not matmul.stacked
        plain = plain and matmul.contract != "lookup" and matmul.offsets is None
        plain = plain and not is_transformed()  # rows of one run are none of another's
        uses[name] = uses.get(name, 0) + (1 if plain else 2)
        return output

    with untouched(model), Observer(parameters.items(), on_matmul):
        call(model, batch)
    return [name for name, count in uses.items() if count == 1]


class _Stop(BaseException):
    """Ends a run that is not needed any more; nothing in a model catches it."""


class WeightRun:
    """One batch going through the model in a thread of its own, waiting at every weight in turn.

    ``compressed`` computes what a factorized weight gives; None: the dense model runs.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        parameters: Mapping[str, nn.Parameter],
        order: Sequence[str],
        compressed: Callable[[str, Frame, Matmul], Tensor] | None,
    ) -> None:
        self.batch, self.matmul = batch, None
        self._place = {name: k for k, name in enumerate(order)}
        self._compressed = compressed
        self._at = -1  # the weight that it waits at; len(order): it is done
        self._error: BaseException | None = None
        self._stopped = False
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            self._go.acquire()
            try:
                if not self._stopped:
                    with torch.no_grad(), Observer(parameters.items(), instead=self._product):
                        call(model, batch)
            except _Stop:
                pass
            except BaseException as error:
                self._error = error
            self.matmul, self._at = None, len(order)
            self._waits.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _product(
        self, name: str, frame: Frame, matmul: Matmul, dense: Callable[[], Tensor]
    ) -> Tensor:
        # Nothing is multiplied before the wait: what all batches wait with is held at once.
        place = self._place.get(name, -1)
        if place > self._at:
            self.matmul, self._at = matmul, place
            self._waits.release()
            self._go.acquire()
            self.matmul = None
            if self._stopped:
                raise _Stop
        if self._compressed is None:
            return dense()
        with ours():
            return self._compressed(name, frame, matmul)

    def reach(self, place: int) -> bool:
        """Go on up to the weight at ``place``; False where the run does not come by it."""
        while self._at < place:
            self._go.release()
            self._waits.acquire()
            if self._error is not None:
                raise self._error
        return self._at == place

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self._thread.join()
