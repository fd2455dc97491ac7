"""The command ``rmm``: one module a verb, none of which holds logic."""

from __future__ import annotations

import importlib

import click

from rmmformat._version import __version__

__all__ = ["main"]

#: Verb to the module that has it as ``command``, in the order of the help text.
VERBS = (
    "plan",
    "convert",
    "info",
    "card",
    "validate",
    "export",
    "onnx",
    "add",
    "remove",
    "compact",
    "compare",
    "dump",
    "formats",
    "bench",
)


class _Verbs(click.Group):
    """Loads a verb's module when it is asked for, so that ``rmm --help`` starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"rmmformat.cli.{cmd_name}")
        command: click.Command = module.command
        command.name = cmd_name
        return command


@click.command(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 malformed file, 4 unsupported, 5 would lose "
    "information.",
)
@click.version_option(__version__, prog_name="rmm")
def main() -> None:
    """A whole collection of low-rank adapters in one checked .rmm file.

    \b
    Example:
      rmm plan adapters/
      rmm convert adapters/ -o skills.rmm --max-error 5%
      rmm info skills.rmm
      rmm export skills.rmm imdb --to peft -o imdb/
    """
