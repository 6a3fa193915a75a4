"""How far a model is from a dense teacher, as a loss to train with.

``tensorize.heal`` uses it, and so can a loop of the caller's own, or the Trainer of transformers:

    distance = tensorize.distillation_loss(teacher)
    loss = distance(model, batch)

    with distance.compute_loss_func(model) as compute_loss_func:
        Trainer(model, arguments, train_dataset=data, compute_loss_func=compute_loss_func).train()

What is measured is the loss to preserve (``passes/observe/loss.py``), a mean over the rows that
count: the KL to the teacher's prediction, or the squared error relative to the outputs' variance.
The outputs of layers may be added, each by its relative squared error (Romero et al. 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from tensorize.base.errors import CaptureError, check_one_of
from tensorize.base.sharded import of_all_in
from tensorize.base.tensors import is_index, unwrapped
from tensorize.capture.batches import calibration_batches
from tensorize.capture.forward import untouched
from tensorize.capture.inputs import batch_of, positional
from tensorize.ir.sites import ALONE, Batch
from tensorize.passes.observe.loss import LossFunction, PreservedLoss
from tensorize.passes.observe.outputs import call
from tensorize.passes.rewrite.descent import relative_groups
from tensorize.weight.install import factored

Layers = bool | str | Sequence[str] | None
CORES, ALL = "cores", "all"
# Variances of outputs that are no logits are learnt from so many batches.
_FITTED = 16
# The smallest size of a parameter that a step is relative to: biases and shifts may be zero.
SMALLEST_SIZE = 0.01


@dataclass
class Distillation:
    """The distance to ``teacher``; made by ``distillation_loss``. Calling it gives a scalar."""

    teacher: nn.Module
    layers: tuple[str, ...] = ()
    layer_weight: float = 1.0
    loss_fn: LossFunction | None = None
    _outputs: PreservedLoss | None = field(default=None, repr=False)
    _inside: PreservedLoss | None = field(default=None, repr=False)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """``distance(model, batch)``: the mean over the rows of a batch that count, differentiable.

        Both are run on the batch: the model in the mode that it is in, the teacher in evaluation
        mode without gradients.

        Args:
            model: the compressed model itself, not what it gave.
            batch: what its forward takes: a tensor, a tuple, a dict.

        Raises:
            CaptureError: ``model`` is none, or the batch does not fit it.
        """
        if not isinstance(model, nn.Module):
            raise CaptureError(
                f"the distance is called as distance(model, batch) and runs the model itself, got "
                f"a {type(model).__name__} in place of the model",
                way_out="distance(model, batch); where outputs are there already, as in a Trainer, "
                "distance.compute_loss_func(model)",
            )
        return self.mean(model, replace(batch_of(batch), source=ALONE))[0].float()

    def mean(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The mean distance of a batch, and the rows that it is a mean over."""
        wanted, inside = self._taught(batch)
        with _watched(model, self.layers) as seen:
            result = call(model, batch)
        return self._between(model, batch, (wanted, inside), (result, seen))

    def fit(self, batches: Sequence[Batch], mesh: Any = None) -> PreservedLoss:
        """Learn what the distance is relative to; the loss to preserve comes back.

        Of the processes of a ``mesh`` all take what the first one learnt of its batches.
        """
        batches = batches[:_FITTED]
        if self.layers and self._inside is None:
            run = partial(_outputs_of_layers, names=self.layers)
            learnt = PreservedLoss.fit(self.teacher, batches, None, run)
            self._inside = of_all_in(mesh, learnt)[0]
        if self._outputs is not None:
            return self._outputs
        learnt = PreservedLoss.fit(self.teacher, batches, self.loss_fn)
        told = of_all_in(mesh, replace(learnt, loss_fn=None))  # a function is each one's own
        self._outputs = found = replace(told[0], loss_fn=learnt.loss_fn)
        return found

    @contextmanager
    def compute_loss_func(self, model: nn.Module) -> Iterator[Callable[..., Tensor]]:
        """The ``compute_loss_func`` that ``transformers.Trainer`` takes, while the block lasts.

        The Trainer gives it outputs and labels alone: what the model was called with is seen by a
        hook on it. Labels say which rows count, and are not learnt from.
        """
        calls: list[Batch] = []
        names = positional(model)

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # How many labels there are is said to models that compute their own loss.
            kwargs = {k: v for k, v in kwargs.items() if k != "num_items_in_batch"}
            calls[:] = [Batch(args, kwargs, kwargs or args, names)]

        with _watched(model, self.layers) as seen:

            def compute(
                outputs: Any, labels: Tensor | None = None, num_items_in_batch: Any = None
            ) -> Tensor:
                (batch,) = calls
                taught = self._taught(batch)
                if labels is not None:
                    batch = replace(batch, kwargs={**batch.kwargs, "labels": labels})
                loss, rows = self._between(model, batch, taught, (outputs, seen))
                seen.clear()  # or the graph would stay until the next call
                if num_items_in_batch is not None:
                    loss = loss * rows / num_items_in_batch
                return loss.float()

            hook = model.register_forward_pre_hook(keep, with_kwargs=True)
            try:
                yield compute
            finally:
                hook.remove()

    def _taught(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """What the teacher gives for a batch, and what its layers do."""
        with untouched(self.teacher), _watched(self.teacher, self.layers) as inside:
            return call(self.teacher, batch), inside

    def _between(
        self,
        model: nn.Module,
        batch: Batch,
        taught: tuple[Any, dict[str, Tensor]],
        given: tuple[Any, dict[str, Tensor]],
    ) -> tuple[Tensor, int]:
        outputs = self.fit([batch])
        total, rows = outputs.distance(taught[0], given[0], batch, model)
        mean = total / max(rows, 1)
        if self._inside is not None:
            if given[1].keys() != taught[1].keys():
                raise CaptureError(
                    "model and teacher do not call the same layers",
                    way_out="the model is one that was compiled from the teacher; or layers=None",
                )
            apart, count = self._inside.distance(taught[1], given[1], batch, model)
            mean = mean + self.layer_weight * apart / (max(count, 1) * max(len(given[1]), 1))
        return mean, rows


def distillation_loss(
    teacher: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    loss_fn: LossFunction | None = None,
    layers: Layers = None,
    layer_weight: float = 1.0,
) -> Distillation:
    """The distance to a dense model, for a loop of the caller's own or for a Trainer.

    What comes back is called as ``distance(model, batch)`` and gives a scalar to call ``backward``
    on; ``distance.compute_loss_func(model)`` is for the Trainer of transformers.

    Args:
        teacher: the dense model; it is run in evaluation mode, and stays as it is.
        batches: data from which the variances of outputs that are no logits are learnt; without
            them the first batch serves.
        loss_fn: ``loss_fn(outputs, batch) -> scalar``, instead of the distance of the outputs.
        layers: whose outputs to match as well: True, the blocks of the model (the entries of its
            outermost ``ModuleList``), or shell patterns over module names.
        layer_weight: what one relative squared error of the layers' outputs, their mean, weighs.

    Raises:
        CaptureError: a pattern matches no layer, or a batch does not fit the model's forward.

    Examples:
        >>> distance = tensorize.distillation_loss(dense)
        >>> distance(small, batches[0]).requires_grad
        True
    """
    found = Distillation(teacher, layer_names(teacher, layers), layer_weight, loss_fn)
    if batches is not None:
        found.fit(calibration_batches(batches, teacher, name="batches"))
    return found


def relative_parameter_groups(
    model: nn.Module, rate: float, train: str = CORES
) -> list[dict[str, Any]]:
    """Groups for an optimizer whose steps are relative to the size of each parameter.

    ``rate`` is the relative step: .03 suits a model that has lost much, less one that is nearly as
    good as the dense one. Give them to Adam, or by ``optimizers=`` to a Trainer.

    Raises:
        CaptureError: there is nothing to train.
    """
    parameters = list(trained_parameters(model, train).values())
    return relative_groups(parameters, rate, SMALLEST_SIZE)


def trained_parameters(model: nn.Module, train: str = CORES) -> dict[str, nn.Parameter]:
    """The cores of a compressed model by name, or ``"all"`` of its parameters.

    Raises:
        CaptureError: the model has no factorized weight, or ``train`` is neither.
    """
    check_one_of("train", train, (CORES, ALL), CaptureError)
    cores = {id(core) for _, weight in factored(model) for core in weight.cores}
    named = dict(model.named_parameters())
    found = {n: p for n, p in named.items() if not is_index(p) and id(p) in cores}
    if not found:
        raise CaptureError(
            "the model has no factorized weight to train",
            way_out="compress it first: tensorize.compile(model, budget=0.1)",
        )
    return found if train == CORES else {n: p for n, p in named.items() if not is_index(p)}


def layer_names(model: nn.Module, layers: Layers) -> tuple[str, ...]:
    """The modules that ``layers`` says.

    Raises:
        CaptureError: a pattern matches no module, or the model has no blocks of its own.
    """
    if layers is None or layers is False:
        return ()
    names = [name for name, _ in model.named_modules() if name]
    if layers is True:
        lists = [n for n, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
        blocks = tuple(n for n in names if n.rpartition(".")[0] in outer)
        if blocks:
            return blocks
        raise CaptureError(
            "the model has no ModuleList of blocks", way_out='name the layers: layers="encoder.*"'
        )
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CaptureError(
                f"layers: {pattern!r} matches no module",
                way_out=f"modules are named as in {', '.join(names[:3])}",
            )
    return tuple(name for name in names if any(fnmatchcase(name, p) for p in patterns))


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules at their last call, by the position of their name."""
    seen: dict[str, Tensor] = {}

    def keep(place: str, _: nn.Module, __: Any, output: Any) -> None:
        found = output
        if isinstance(output, Mapping):
            found = next(iter(output.values()), None)
        elif isinstance(output, tuple | list) and output:
            found = output[0]
        if isinstance(found, Tensor) and found.is_floating_point():
            seen[place] = found

    inside = unwrapped(model)
    places = dict(inside.named_modules())
    while not places.keys() >= set(names) and len(inside._modules) == 1:
        (inside,) = inside.children()  # of a wrapper of the caller's own
        places = dict(inside.named_modules())
    if missing := [name for name in names if name not in places]:
        raise CaptureError(
            f"the model has no layer {missing[0]!r}, as the teacher has",
            way_out="pass the model itself and not a wrapper, or layers=None",
        )
    hooks = [
        places[name].register_forward_hook(partial(keep, str(k))) for k, name in enumerate(names)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _outputs_of_layers(model: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    with _watched(model, names) as seen:
        call(model, batch)
    return seen
