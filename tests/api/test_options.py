"""The record of options: what signatures, the command line and the backend have in common."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from typer.main import get_command

import tensorize
from tensorize.api.analysis import AS_ANALYSED
from tensorize.api.options import Options
from tensorize.backend.options import TAKEN, read_options
from tensorize.cli import COMMANDS, app, parse
from tensorize.cli.compile import compile_command
from tensorize.ir.choices import Refine

VERBS: dict[str, Callable[..., Any]] = {
    "compile": tensorize.compile,
    "analyze": tensorize.analyze,
    "plan": tensorize.Analysis.plan,
    "apply": tensorize.apply,
    "compile_checkpoint": tensorize.compile_checkpoint,
}
NOTHING = dict.fromkeys(("self", "model", "plan", "directory", "out"), "nowhere")
"""Arguments that are no options: what a verb is done to, here nothing that it could be done to."""

RECORD = {each.name: each for each in fields(Options)}


def options_of(verb: str) -> dict[str, Any]:
    """The options that a verb takes, and its defaults."""
    parameters = inspect.signature(VERBS[verb]).parameters
    return {name: p.default for name, p in parameters.items() if name not in NOTHING}


# ------------------------------------------------------------------------------------ signatures


@pytest.mark.parametrize("verb", VERBS)
def test_a_signature_has_options_of_the_record_in_its_order_with_its_defaults(verb: str) -> None:
    taken = options_of(verb)
    assert list(taken) == [name for name in RECORD if name in taken]
    if verb == "plan":
        assert taken.pop("budget") is inspect.Parameter.empty
        assert taken.pop("precision") == taken.pop("activations") == AS_ANALYSED
    assert taken == {name: RECORD[name].default for name in taken}


@pytest.mark.parametrize("verb", VERBS)
def test_what_the_verb_is_done_to_and_the_budget_are_given_by_position(verb: str) -> None:
    for name, parameter in inspect.signature(VERBS[verb]).parameters.items():
        by_name = parameter.kind is parameter.KEYWORD_ONLY
        assert by_name == (name not in {*NOTHING, "budget"})


def test_no_option_is_of_no_use() -> None:
    taken = {name for verb in VERBS for name in options_of(verb)}
    assert taken | set(TAKEN) == set(RECORD)


def test_compile_says_what_its_options_mean() -> None:
    meant = str(tensorize.compile.__doc__).partition("Args:")[2].partition("Raises:")[0]
    assert set(options_of("compile")) <= set(re.findall(r"\w+", meant))


# ---------------------------------------------------------------------------------------- checks

WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("budget", 7, tensorize.BudgetError, r"budget must be a float in \(0, 1\]"),
    ("budget", 1.5, tensorize.BudgetError, "a float above 1"),
    ("calibration", torch.zeros(3), tensorize.CaptureError, "got one Tensor"),
    ("calibration", "text", tensorize.CaptureError, "got one str"),
    ("to_inputs", "image", tensorize.CaptureError, "to_inputs='image' is no function"),
    ("metric", "entropy", tensorize.AnalysisError, "metric='entropy' "),
    ("refine", "twice", tensorize.AnalysisError, "refine='twice' is not one of 'auto', None"),
    ("include", 5, tensorize.AnalysisError, "shell patterns or by a predicate"),
    ("exclude", [3], tensorize.AnalysisError, "shell patterns or by a predicate"),
    ("formats", "cp", tensorize.AnalysisError, "formats='cp' is no format"),
    ("formats", {"*": ["tt", 3]}, tensorize.AnalysisError, "formats=3 is no format"),
    ("precision", "int5", tensorize.AnalysisError, "precision='int5' is no precision"),
    ("activations", "int7", tensorize.AnalysisError, "'int7' is not one of 'float', 'int8'"),
    ("ranks", 8, tensorize.AnalysisError, "maps patterns to ranks"),
    ("ranks", {"*": 0}, tensorize.AnalysisError, "positive integer or 'full'"),
    ("backend", "tpu", tensorize.TensorizeError, "backend='tpu' is not one of 'auto'"),
    ("backend", None, tensorize.TensorizeError, "backend=None is not one of 'auto'"),
    ("inner", "tpu", tensorize.TensorizeError, "inner"),
    ("loss_fn", "kl", tensorize.AnalysisError, "loss_fn='kl' is no function"),
    ("metrics", {"mae": 3}, tensorize.AnalysisError, "no mapping from names to functions"),
    ("seed", "x", tensorize.AnalysisError, "seed must be an integer, got 'x'"),
    ("max_memory", "much", tensorize.BudgetError, "max_memory='much' is no size"),
]


@pytest.mark.parametrize(("option", "value", "error", "match"), WRONG)
def test_a_wrong_value_is_told_before_any_work(
    option: str, value: Any, error: type[Exception], match: str
) -> None:
    """By each verb that takes it, though there is no model, no plan and no checkpoint."""
    with pytest.raises(error, match=match) as caught:
        Options.of({option: value})
    assert type(caught.value) is error
    assert "way out" in str(caught.value)
    for verb, call in VERBS.items():
        if option not in options_of(verb):
            continue
        done_to = [NOTHING[name] for name in inspect.signature(call).parameters if name in NOTHING]
        more = {"budget": 0.5} if verb == "plan" else {}
        with pytest.raises(error, match=match):
            call(*done_to, **{**more, option: value})


def test_every_check_is_tried_above() -> None:
    checked = {name for name, each in RECORD.items() if each.metadata.get("check")}
    assert checked == {option for option, *_ in WRONG}


def test_values_are_kept_as_they_are_used() -> None:
    options = Options.of(
        {
            "budget": 0.5,
            "include": (pattern for pattern in ("a", "b")),
            "exclude": "c",
            "max_memory": "4GB",
            "seed": np.int64(3),
        }
    )
    assert options.budget == tensorize.Budget(params=0.5)
    assert (options.include, options.exclude) == (["a", "b"], ["c"])
    assert (options.max_memory, options.seed) == (4 * 10**9, 3)
    assert type(options.seed) is int
    assert vars(replace(options, metric="loss")) == {**vars(options), "metric": "loss"}


def test_calibration_data_are_not_taken_by_the_check() -> None:
    batches = iter([1, 2])
    options = replace(Options.of({"calibration": batches}), seed=1)
    assert options.calibration is batches
    assert list(batches) == [1, 2]


@pytest.mark.parametrize(
    ("given", "lacks"),
    [
        ({"metric": "loss"}, "metric='loss'"),
        ({"metric": "input", "loss_fn": max}, "metric='input'"),
        ({"metric": "frobenius", "loss_fn": max}, "loss_fn"),
        ({"loss_fn": max}, "loss_fn"),
    ],
)
def test_what_needs_calibration_data_says_so(given: dict[str, Any], lacks: str) -> None:
    with pytest.raises(tensorize.AnalysisError, match=f"^{lacks} needs calibration data"):
        tensorize.analyze(torch.nn.Linear(4, 4), **given)
    Options.of({**given, "calibration": [torch.zeros(2, 4)]}).check_data()


def test_a_checkpoint_without_budget_or_ranks_is_not_opened() -> None:
    with pytest.raises(tensorize.BudgetError, match="needs ranks="):
        tensorize.compile_checkpoint("nowhere", "out", None)


# -------------------------------------------------------------------------------- command line


def test_the_command_line_has_one_word_for_an_option_in_all_commands() -> None:
    commands: Any = get_command(app)
    said: dict[str, set[str]] = {}
    for command in (commands.get_command(None, name) for name in COMMANDS):
        for parameter in command.params:
            if parameter.name in RECORD:
                said.setdefault(parameter.name, set()).add(parameter.help)
    assert all(len(words) == 1 and "" not in words for words in said.values()), said
    only_in_python = {"example_inputs", "tokenizer", "to_inputs", "loss_fn", "metrics", "ranks"}
    only_in_python |= {"batch_sizes", "rank_multiple", "inner", "inplace", "device", "progress"}
    assert said.keys() == RECORD.keys() - only_in_python


def test_the_command_line_has_the_defaults_of_the_record() -> None:
    parameters = inspect.signature(compile_command).parameters.items()
    read = parse.read_options({name: each.default for name, each in parameters})
    assert vars(read) == vars(Options())


def test_each_refinement_can_be_named_on_the_command_line() -> None:
    for name, meant in zip(("auto", "none", "refit", "polish"), get_args(Refine), strict=True):
        assert parse.read_options({"refine": name}).refine == meant


# ------------------------------------------------------------------------------------- backend


def test_the_backend_takes_some_of_the_options_and_names_them() -> None:
    assert set(TAKEN) <= set(RECORD)
    with pytest.raises(tensorize.TensorizeError, match=", ".join(TAKEN)) as caught:
        read_options({"metric": "loss"})
    assert "options['metric'] is not one of" in str(caught.value)


def test_the_backend_previews_only_where_a_budget_is_given() -> None:
    assert read_options(None).budget is None
    options = read_options({"budget": 0.5, "seed": 3, "inner": "eager"})
    assert options.budget == tensorize.Budget(params=0.5)
    assert (options.seed, options.inner, options.metric) == (3, "eager", "frobenius")
