"""Class activation maps for PyTorch: see which regions of an image made a score.

start here:
  torchcam demo
      explain a picture of two digits with a model that ships with the package;
      needs no network
  torchcam explain photo.jpg
      what does a resnet50 see in a photo, and where? (downloads its weights,
      once)
  torchcam evaluate --demo
      which method's maps are the most faithful? (on pictures that are made for
      it; needs no network)

`torchcam COMMAND --help` describes a command. With the package installed by
`pip install -e ".[completion]"`, from a clone, and the line
`eval "$(register-python-argcomplete torchcam)"` in its settings, a shell
completes commands, options, methods, models and layers.
"""
# A module for each command; its docstring is what `--help` prints. None imports more than the standard library at its
# top, so that this is fast.

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter as HelpFormatter
from collections.abc import Sequence

from torchcam import __version__

from . import _options, app, compare, demo, diagnose, evaluate, explain, export, layers, trust
from ._completion import complete
from ._messages import Parser, UserError, one_line, plain_messages

COMMANDS = (demo, app, explain, compare, diagnose, trust, evaluate, layers, export)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, by default those of the process

    Returns:
        the exit code: 0, 2 after a wrong input, 130 after Ctrl-C
    """
    parser = make_parser()
    complete(parser)
    try:
        arguments = parser.parse_args(argv)
        with plain_messages():
            arguments.run(arguments)
    except UserError as error:
        # In one write, as several processes may print at the same time.
        sys.stderr.write(f"torchcam: error: {one_line(error)}\n")
        return 2
    except KeyboardInterrupt as interrupt:
        sys.stderr.write("; ".join(["torchcam: interrupted", *map(one_line, interrupt.args)]) + "\n")
        return 130
    return 0


def make_parser() -> Parser:
    """Make the parser of all commands. `run` is the function that takes the parsed arguments."""
    about, _, start = str(__doc__).partition("\n\n")
    parser = Parser(prog="torchcam", description=about, epilog=start, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"torchcam {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help(), **_options.DEFAULTS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        short, _, text = str(command.__doc__).partition("\n\n")
        about, heading, examples = text.partition("Examples:")
        added = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=short[0].lower() + short[1:].rstrip("."),
            description=about,
            epilog=heading.lower() + examples,
            formatter_class=HelpFormatter,
        )
        added.set_defaults(run=command.run)
        command.add_options(added)
    return parser
