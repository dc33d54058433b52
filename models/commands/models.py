"""`cellops models`: the networks and what they cost."""

from __future__ import annotations

import argparse

from cellops.models.commands import bad_input, need_models_extra

HELP = "list the networks with parameters, size, operations, memory and latency"
EXAMPLES = """\
examples:
  cellops models --names                 names and sources only, at once
  cellops models --no-measure            all of them, what follows from shapes alone
  cellops models ghostnet_100 dresnet    some of them, measured on this machine
  cellops models --size 112 --classes 8 --format csv > costs.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="all if not given")
    parser.add_argument("--names", dest="names_only", action="store_true", help="no figures")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="height [width] (each network's own)")
    parser.add_argument("--classes", type=int, default=1000, metavar="K", help="(1000)")
    parser.add_argument("--no-measure", action="store_true", help="leave out what takes time: memory and latency")
    parser.add_argument("--format", choices=("text", "csv", "markdown"), default="text", help="(text)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and return the exit code."""
    need_models_extra()
    with bad_input():
        from cellops.models import list_models, model_source

        names = arguments.names or list_models()
        if arguments.names_only:
            width = max(map(len, names))
            for name in names:
                print(f"{name:<{width}}  {model_source(name)}")
            return 0
        from cellops.models.cost import table

        if arguments.size is not None and (len(arguments.size) > 2 or min(arguments.size) < 1):
            raise ValueError("--size takes one or two positive integers")
        text = table(
            names,
            input_size=arguments.size and (3, *(arguments.size * 2)[:2]),
            num_classes=arguments.classes,
            measure=not arguments.no_measure,
            style=arguments.format,
        )
    print(text, end="")
    return 0
