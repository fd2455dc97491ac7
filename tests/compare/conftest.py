"""Running ``rmm compare`` in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from rmmformat.cli.main import main


def rmm(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
