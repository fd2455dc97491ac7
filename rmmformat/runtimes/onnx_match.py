"""Which sites of a graph are which targets, and what is left over."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from rmmformat.converters.onnx_names import best_matches
from rmmformat.errors import NotFoundError, SourceError, UnsupportedError
from rmmformat.format.reader import nearest
from rmmformat.model import TargetKind, TargetShape
from rmmformat.runtimes.onnx_graph import Site

__all__ = ["Matching", "match_patterns", "match_targets"]

#: Origins of names that belong to the node rather than to the weight, which several may share.
_OF_NODE = ("scope", "path")


@dataclasses.dataclass(frozen=True)
class Matching:
    """What was found.

    Attributes
    ----------
    sites
        Target to its sites, at least one.
    unmatched
        Targets that are nowhere in the graph.
    """

    sites: Mapping[str, tuple[Site, ...]]
    unmatched: tuple[str, ...]


def match_targets(
    sites: Sequence[Site],
    targets: Mapping[str, TargetShape],
    names: Mapping[str, str],
    *,
    path: str | None,
    beside: bool = True,
) -> Matching:
    """Match targets of known shapes to the sites of a graph.

    All sites that share the weight of a target are the target's (a module that is called twice),
    unless the nodes have paths of their own that say otherwise (two modules with one weight).  An
    embedding is matched to lookups, a linear target to products, so tied weights stay apart.

    Parameters
    ----------
    names
        Target to the name of an initialiser or a node, where the rule cannot tell.
    path
        The model's file, for messages.
    beside
        A delta is to be added beside the nodes, so that a site that refuses that is an error.

    Raises
    ------
    SourceError
        A target may be several weights, two targets are one place, or shapes differ.
    UnsupportedError
        A target's node is of a kind that no delta can be added beside.
    NotFoundError
        A name in ``names`` is not in the graph, or not a target.
    """
    stray = sorted(set(names) - set(targets))
    if stray:
        raise NotFoundError(
            f"mapped target {stray[0]!r} is not one of the targets",
            path=path,
            hint=nearest(stray[0], tuple(targets)),
        )
    claims: dict[str, list[Site]] = {}
    for target, shape in targets.items():
        pool = [site for site in sites if site.kind in (shape.kind, None)]
        found = (
            _by_given_name(pool, target, names[target], path)
            if target in names
            else _by_rule(pool, target, path)
        )
        known = [site for site in found if site.kind is not None]
        if shape.kind is TargetKind.EMBEDDING and known:
            found = known
        if found:
            claims[target] = found
    _settle_conflicts(claims, names, path)
    for target, found in claims.items():
        for site in found:
            if site.refusal and (beside or site.kind is None):
                raise UnsupportedError(
                    f"target {target!r}: its {site.label} {site.refusal}",
                    path=path,
                    hint="Export the model without fusing or converting this operator.",
                )
            _check_shape(target, targets[target], site, path)
    unmatched = tuple(target for target in targets if target not in claims)
    return Matching({target: tuple(found) for target, found in claims.items()}, unmatched)


def match_patterns(
    sites: Sequence[Site], patterns: Iterable[str], *, path: str | None
) -> dict[str, TargetShape]:
    """Name targets by patterns, as PEFT's ``target_modules`` does: a path, its last parts, a glob.

    Returns
    -------
    dict
        The module path of every site that a pattern matches, to its shape.

    Raises
    ------
    NotFoundError
        A pattern matches nothing.
    SourceError
        Two different weights go by one name.
    """
    found: dict[str, tuple[str, TargetShape]] = {}
    for pattern in patterns:
        hits = [
            site
            for site in sites
            if site.kind is not None
            and not site.refusal
            and any(_matches(name, pattern) for name in site.names.values())
        ]
        if not hits:
            every = sorted({site.best_name for site in sites if not site.refusal})
            raise NotFoundError(
                f"nothing in the model matches target {pattern!r}",
                path=path,
                hint=f"{nearest(pattern, tuple(every))} The model has: {_some(every)}.",
            )
        for site in hits:
            assert site.kind is not None  # noqa: S101  # sorted out above
            kernel = site.kernel if site.kind is TargetKind.CONV else ()
            shape = TargetShape(site.n_in, site.n_out, site.kind, False, kernel)
            name = site.best_name
            if found.setdefault(name, (site.weight.name, shape))[0] != site.weight.name:
                raise SourceError(
                    f"two weights go by the name {name!r}: {found[name][0]!r} and "
                    f"{site.weight.name!r}",
                    path=path,
                    hint="Name targets of a collection and map them: --map TARGET=INITIALISER.",
                )
    return {name: shape for name, (_, shape) in found.items()}


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)


def _by_given_name(pool: list[Site], target: str, name: str, path: str | None) -> list[Site]:
    found = [site for site in pool if name in (site.weight.name, site.node.name)]
    if not found:
        every = tuple({site.weight.name for site in pool} | {site.node.name for site in pool})
        raise NotFoundError(
            f"target {target!r} is mapped to {name!r}, which is no weight or node of its kind",
            path=path,
            hint=nearest(name, every),
        )
    return found


def _by_rule(pool: list[Site], target: str, path: str | None) -> list[Site]:
    matches = set(best_matches(target, {name for site in pool for name in site.names.values()}))
    found = [site for site in pool if not matches.isdisjoint(site.names.values())]
    own = [site for site in found if _by_node(site, matches)]
    found = own or found
    weights = sorted({site.weight.name for site in found})
    if len(weights) > 1:
        raise SourceError(
            f"target {target!r} may be any of the weights {_some(weights)}",
            path=path,
            hint=f"Say which: --map {target}=INITIALISER.",
        )
    return found


def _by_node(site: Site, matches: set[str]) -> bool:
    return any(site.names.get(origin) in matches for origin in _OF_NODE)


def _settle_conflicts(
    claims: dict[str, list[Site]], names: Mapping[str, str], path: str | None
) -> None:
    """Give every site to one target: the one that was mapped, or that the node is named after."""
    claimed: dict[int, str] = {}
    for target in list(claims):
        for site in list(claims[target]):
            other = claimed.get(id(site))
            if other is None:
                claimed[id(site)] = target
                continue
            mine, theirs = (_strength(t, site, names) for t in (target, other))
            if mine == theirs:
                raise SourceError(
                    f"targets {other!r} and {target!r} are both {site.label}",
                    path=path,
                    hint="Say which weight each one is: --map TARGET=INITIALISER.",
                )
            loser = target if mine < theirs else other
            claimed[id(site)] = other if loser is target else target
            claims[loser].remove(site)
            if not claims[loser]:
                del claims[loser]


def _strength(target: str, site: Site, names: Mapping[str, str]) -> int:
    if target in names:
        return 2
    own = {site.names[origin] for origin in _OF_NODE if origin in site.names}
    return int(bool(best_matches(target, own)))


def _check_shape(target: str, shape: TargetShape, site: Site, path: str | None) -> None:
    if site.kind is None:
        return
    if (site.n_in, site.n_out) != (shape.n_in, shape.n_out):
        raise SourceError(
            f"target {target!r} has {shape.n_in} inputs and {shape.n_out} outputs, weight "
            f"{site.weight.name!r} has {site.n_in} and {site.n_out}",
            path=path,
            hint="Is this the base model of the collection?",
        )
    if shape.kind is TargetKind.CONV and shape.kernel != site.kernel:
        raise SourceError(
            f"target {target!r} has kernel {shape.kernel}, weight {site.weight.name!r} has "
            f"{site.kernel}",
            path=path,
        )


def _some(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
