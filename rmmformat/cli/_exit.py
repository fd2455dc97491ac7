"""How errors leave the command line: one message, and the exit code that the error has."""

from __future__ import annotations

from typing import Any

import click

from rmmformat.errors import RmmError

__all__ = ["Verb"]


class _Failure(click.ClickException):
    def __init__(self, error: RmmError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads the instance


class _Interrupted(click.ClickException):
    exit_code = 1

    def __init__(self) -> None:
        super().__init__("interrupted; nothing was written")


class Verb(click.Command):
    """A command whose errors become exit codes (0 done, 1 failed, 2 usage, 3 malformed, ...)."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RmmError as error:
            raise _Failure(error) from error
        except BrokenPipeError:
            raise  # click ends quietly when a reader has seen enough
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{name}{error.strerror or error}") from error
        except MemoryError as error:
            raise click.ClickException("out of memory") from error
        except KeyboardInterrupt as error:
            raise _Interrupted from error
