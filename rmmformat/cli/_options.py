"""Options that several verbs have, said once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import click

from rmmformat.converters.base import Options
from rmmformat.methods import parse_fraction
from rmmformat.workers import worker_pool

__all__ = ["Pool", "Reading", "as_json", "force", "names", "reads_sources", "workers"]

F = TypeVar("F", bound=Callable[..., Any])
Pool = AbstractContextManager[Executor | None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the sources of a verb are to be read."""

    kind: str | None
    options: Options
    allow_base_mismatch: bool


def _pairs(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        left, equals, right = value.partition("=")
        if not (left and equals and right):
            raise click.BadParameter(f"expected TARGET=NAME, got {value!r}")
        if left in pairs:
            raise click.BadParameter(f"{left!r} is mapped twice")
        pairs[left] = right
    return pairs


def _fraction(_ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    return None if value is None else parse_fraction(value, str(param.name).replace("_", " "))


as_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")
force = click.option("--force", is_flag=True, help="Replace what is there.")
names = click.option(
    "--map",
    "names",
    multiple=True,
    callback=_pairs,
    metavar="TARGET=NAME",
    help="Foreign name of a target, where it cannot be told; may be given again.",
)


def workers(command: F) -> F:
    """Give a verb the options of parallel work; it is called with ``pool``, to be entered."""

    @functools.wraps(command)
    def with_pool(*args: Any, workers: int, scheduler: str | None, **given: Any) -> Any:
        return command(*args, pool=worker_pool(workers, scheduler), **given)

    for option in (
        click.option(
            "--scheduler", metavar="ADDRESS", help="A Dask scheduler whose workers to use instead."
        ),
        click.option(
            "--workers",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Processes that work on targets.",
        ),
    ):
        with_pool = option(with_pool)
    return with_pool  # type: ignore[return-value]  # click's decorators keep what they wrap


#: What decides how a source is read; one that is called as a field of Options becomes that field.
_SOURCE_OPTIONS = (
    click.option(
        "--from", "kind", metavar="FORMAT", help="Format of the sources, if not detected."
    ),
    click.option(
        "--base",
        type=click.Path(path_type=Path),
        help="The base model: fine-tuned models are read beside it, adapters compared with it.",
    ),
    names,
    click.option(
        "--allow-pickle",
        is_flag=True,
        help="Read pickled weights (.bin), with torch's safe reader.",
    ),
    click.option("--allow-nonfinite", is_flag=True, help="Take tensors with NaN or infinity."),
    click.option(
        "--allow-base-mismatch",
        is_flag=True,
        help="Take tasks of differing bases, and such as do not fit --base.",
    ),
    click.option(
        "--drop-private",
        is_flag=True,
        help="Leave out what is no factor: heads, biases, norms, ...",
    ),
    click.option(
        "--rank",
        type=click.IntRange(1),
        metavar="R",
        help="Of fine-tuned models: components extracted from each changed weight.  [default: 16]",
    ),
    click.option(
        "--energy",
        callback=_fraction,
        metavar="F",
        help="... the fewest that keep this part of its squared norm (0.9 or 90%).",
    ),
    click.option(
        "--extract-error",
        callback=_fraction,
        metavar="E",
        help="... the fewest within this relative error (0.3 or 30%).",
    ),
    click.option(
        "--svd",
        type=click.Choice(["auto", "exact", "random"]),
        default="auto",
        show_default=True,
        help="How they are extracted.",
    ),
    click.option(
        "--write-base",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="With --from lore: where the estimated base goes.",
    ),
    click.option(
        "--mu",
        type=click.FloatRange(0),
        default=0.01,
        show_default=True,
        help="... threshold on the singular values of what is left of each model.",
    ),
    click.option(
        "--steps", type=click.IntRange(1), default=20, show_default=True, help="... most rounds."
    ),
    click.option(
        "--weight", type=float, default=1.0, show_default=True, help="... scale of the deltas."
    ),
)
_FIELDS = {field.name for field in dataclasses.fields(Options)}


def reads_sources(command: F) -> F:
    """Give a verb the options of sources; it is called with ``reading``, a :class:`Reading`."""

    @functools.wraps(command)
    def with_reading(*args: Any, **given: Any) -> Any:
        kind = given.pop("kind")
        allow_base_mismatch = given.pop("allow_base_mismatch")
        options = Options(**{name: given.pop(name) for name in _FIELDS & given.keys()})
        reading = Reading(kind, options, allow_base_mismatch)
        return command(*args, reading=reading, **given)

    for option in reversed(_SOURCE_OPTIONS):
        with_reading = option(with_reading)
    return with_reading  # type: ignore[return-value]  # click's decorators keep what they wrap
