"""The ``styleforge`` command: one module per subcommand, imported only when it is the one asked for.

A subcommand's module has ``DESCRIPTION``, ``add_arguments(parser)`` and ``run(arguments)``, which returns
the exit code. ``styleforge --help`` imports none of them, and so not PyTorch either.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sf_compile import __version__

COMMANDS = {
    "stylize": "paint a photo in the style of a trained network",
    "explain": "show which layers of a network are fused, and why the others are not",
    "doctor": "show what was found on this machine, what will run, and how to fix what is missing",
    "bench": "measure a network against eager PyTorch and other backends",
}


class CommandError(Exception):
    """What the user asked for cannot be done; the one-line message says why and what to do instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, a subcommand's own, or 2 for bad use.

    Args:
        argv: the words after the program's name; those of this process if None.

    Raises:
        SystemExit: from argparse, for --help and --version (0) and for words it cannot parse (2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="styleforge",
        description='Fused style transfer. In Python: torch.compile(model, backend="styleforge").',
    )
    parser.add_argument("--version", action="version", version=f"styleforge {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    # No option of `styleforge` itself takes a value, so the first word that is a command is the command.
    chosen = next((word for word in words if word in COMMANDS), None)
    try:
        for name, summary in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=summary)
            if name == chosen:
                module = importlib.import_module(f"sf_compile.cli.{name}")
                subparser.description = module.DESCRIPTION
                module.add_arguments(subparser)
                subparser.set_defaults(run=module.run)
        arguments = parser.parse_args(words)
        if chosen is None:
            parser.print_help(sys.stderr)
            return 2
        return arguments.run(arguments)
    except CommandError as error:
        print(f"styleforge {chosen}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"styleforge {chosen}: interrupted", file=sys.stderr)
        return 130
