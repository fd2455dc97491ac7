"""How PEFT decides by module name: pattern keys, target lists and modules to save.

These classes repeat PEFT's rules (read in 0.21: ``get_pattern_key``, ``_set_trainable`` and
``check_target_module_exists``), oddities included, because an adapter means what PEFT makes of it.
Tests hold them against PEFT itself.

The regular expressions in a config have been vetted by nobody, and Python's matcher backtracks, so
that a short pattern can take years on a short name.  :func:`compile_pattern` bounds the work.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rmmformat.errors import SourceError, UnsupportedError

if sys.version_info >= (3, 11):
    from re import _constants as sre_constants  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_constants
    import sre_parse

__all__ = ["PatternKeys", "TargetRule", "compile_pattern", "covers_module", "pattern_key"]

_STEPS = 200_000_000  # of the matcher, for one name; real patterns stay far below
_PAIRS = 5_000_000  # of patterns and modules to compare: some seconds
_KEYS = 20_000  # patterns to compile: some seconds

_REPEATS = (sre_constants.MAX_REPEAT, sre_constants.MIN_REPEAT)


def _cost(tree: Any, inside: bool) -> tuple[int, int]:
    """Estimate the ways in which a pattern can divide a name.

    Returns
    -------
    n_open, ways
        Number of repeats without a bound, and the product of all other choices.

    Raises
    ------
    ValueError
        A repeat or choice stands inside a repeat: the ways grow with a power of the length.
    """
    n_open, ways = 0, 1
    for kind, argument in tree:
        inner: list[tuple[int, int]] = []
        if kind in _REPEATS:
            low, high, body = argument
            if low != high:
                if inside:
                    raise ValueError("a repeat inside a repeat")
                if high is sre_constants.MAXREPEAT:
                    n_open += 1
                else:
                    ways *= int(high) - int(low) + 1
            inner = [_cost(body, inside or high is sre_constants.MAXREPEAT or int(high) > 1)]
        elif kind is sre_constants.BRANCH:
            if inside:
                raise ValueError("a choice inside a repeat")
            ways *= len(argument[1])
            inner = [_cost(branch, inside) for branch in argument[1]]
        elif kind is sre_constants.SUBPATTERN:
            inner = [_cost(argument[-1], inside)]
        elif kind in (sre_constants.ASSERT, sre_constants.ASSERT_NOT):
            inner = [_cost(argument[1], inside)]
        elif kind in (sre_constants.GROUPREF, sre_constants.GROUPREF_EXISTS):
            raise ValueError("a back-reference")
        for more_open, more_ways in inner:
            n_open += more_open
            ways *= more_ways
    return n_open, ways


def compile_pattern(pattern: str, longest: int, field: str, path: str) -> re.Pattern[str]:
    """Compile a regular expression if matching names of ``longest`` characters stays cheap.

    Raises
    ------
    SourceError
        Not a regular expression.
    UnsupportedError
        It could take too long.
    """
    try:
        compiled = re.compile(pattern)
        n_open, ways = _cost(sre_parse.parse(pattern), inside=False)
        if math.comb(longest + n_open, n_open) * ways > _STEPS:
            raise ValueError(f"{n_open} open repeats on names of {longest} characters")
    except (re.error, RecursionError, OverflowError) as error:
        raise SourceError(
            f"field {field}: {pattern[:80]!r} is not a regular expression: {error}", path=path
        ) from error
    except ValueError as error:
        raise UnsupportedError(
            f"field {field}: {pattern[:80]!r} could take too long to match: {error}",
            path=path,
            hint="Name the modules instead.",
        ) from error
    return compiled


class PatternKeys:
    """The keys of ``rank_pattern`` or ``alpha_pattern``, compiled once for many modules.

    Parameters
    ----------
    keys
        In the order of the file.
    modules
        Every module that will be asked for.
    field, path
        For messages.
    """

    def __init__(
        self, keys: Iterable[str], modules: Sequence[str], field: str, path: str = ""
    ) -> None:
        self.keys = tuple(keys)
        if len(self.keys) > _KEYS or len(self.keys) * len(modules) > _PAIRS:
            raise UnsupportedError(f"field {field}: {len(self.keys)} keys are too many", path=path)
        longest = max((len(module) for module in modules), default=1)
        self._compiled = [
            compile_pattern(rf"(.*\.)?({key})$", longest, field, path) for key in self.keys
        ]
        self.used: set[str] = set()

    def find(self, module: str) -> str | None:
        """Return the key that decides for ``module``: the first, in file order, that matches.

        A key matches a module if it matches its whole path or a tail of it that starts behind a
        dot.  Where none does, a key that is literally the path counts.
        """
        for key, compiled in zip(self.keys, self._compiled, strict=True):
            if compiled.match(module):
                self.used.add(key)
                return key
        if module in self.keys:
            self.used.add(module)
            return module
        return None


def pattern_key(keys: Iterable[str], module: str) -> str | None:
    """Find the pattern key that decides for one module (see :class:`PatternKeys`).

    >>> pattern_key({"q_proj": 4, "layers.1.q_proj": 8}, "model.layers.1.q_proj")
    'q_proj'
    """
    return PatternKeys(keys, [module], "pattern").find(module)


def covers_module(entries: Sequence[str], module: str) -> bool:
    """Say whether ``modules_to_save`` wraps a module: its path ends in an entry, dot or no dot."""
    return any(module.endswith(entry) for entry in entries)


class TargetRule:
    """Where a config lets PEFT put adapters.

    Parameters
    ----------
    config
        A LoRA config with fields of the right types.
    modules
        Every module that will be asked for.
    path
        For messages.

    Raises
    ------
    SourceError
        A pattern is not a regular expression.
    """

    def __init__(self, config: Mapping[str, Any], modules: Sequence[str], path: str = "") -> None:
        self._targets = config.get("target_modules")
        self._layers = config.get("layers_to_transform")
        excluded = config.get("exclude_modules")
        saved = config.get("modules_to_save") or ()
        layered = config.get("layers_pattern") or ()
        layered = [layered] if isinstance(layered, str) else layered
        self._listed = frozenset(self._targets if isinstance(self._targets, list) else ())
        self._unlisted = frozenset(excluded if isinstance(excluded, list) else ())
        self._whole: re.Pattern[str] | None = None
        self._refused: list[re.Pattern[str]] = []
        longest = max((len(module) for module in modules), default=1)

        def compiled(pattern: str, field: str) -> re.Pattern[str]:
            return compile_pattern(pattern, longest, field, path)

        try:
            self._clear = (len(saved) + len(layered)) * len(modules) <= _PAIRS
            self._saved = [compiled(rf"(^|.*\.){e}($|\..*)", "modules_to_save") for e in saved]
            self._layered = [
                compiled(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", "layers_pattern")
                for pattern in layered
            ] or [re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")]
            if isinstance(excluded, str) and excluded:
                self._refused = [compiled(excluded, "exclude_modules")]
            if isinstance(self._targets, str) and self._targets != "all-linear":
                self._whole = compiled(self._targets, "target_modules")
        except UnsupportedError:
            self._clear = False

    def allows(self, module: str) -> bool | None:
        """Say whether PEFT would adapt ``module``; None where that cannot be told.

        It depends on the model if the targets are "all-linear" or not stated, and is not worked
        out if the patterns could take too long.
        """
        if not self._clear:
            return None
        if any(pattern.fullmatch(module) for pattern in self._refused):
            return False
        if _tail_in(self._unlisted, module) or any(p.match(module) for p in self._saved):
            return False
        if self._targets is None or self._targets == "all-linear":
            return None
        if self._whole is not None:
            return self._whole.fullmatch(module) is not None
        if module in self._listed:
            return True
        return _tail_in(self._listed, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self._layers is None or self._layers == []:
            return True
        match = next(filter(None, (pattern.match(module) for pattern in self._layered)), None)
        if match is None:
            return False
        layer = int(match["layer"])
        return layer == self._layers if isinstance(self._layers, int) else layer in self._layers


def _tail_in(entries: frozenset[str], module: str) -> bool:
    """Say whether the path, or a tail of it that starts behind a dot, is among ``entries``."""
    if not entries:
        return False
    dot = -1
    while module[dot + 1 :] not in entries:
        dot = module.find(".", dot + 1)
        if dot < 0:
            return False
    return True
