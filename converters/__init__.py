"""Foreign adapter formats, in and out, behind one registry.

Start at :mod:`rmmformat.converters.base` for the contract that an importer or exporter keeps and
at :mod:`rmmformat.converters.registry` for the list of formats.  Importing this package loads no
foreign library.
"""

from __future__ import annotations

from rmmformat.converters.base import DEFAULTS, Exporter, Importer, Options
from rmmformat.converters.registry import (
    Format,
    collect,
    detect,
    formats,
    get,
    get_exporter,
    get_importer,
)

__all__ = [
    "DEFAULTS",
    "Exporter",
    "Format",
    "Importer",
    "Options",
    "collect",
    "detect",
    "formats",
    "get",
    "get_exporter",
    "get_importer",
]
