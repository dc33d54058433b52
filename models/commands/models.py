"""`cellops models`: the networks and what they cost."""

from __future__ import annotations

import argparse

from cellops.models.commands import bad_input, need_models_extra

HELP = "list the networks with parameters, size, operations, memory and latency"
EXAMPLES = """\
examples:
  cellops models --names                 names and sources only, at once
  cellops models ghostnet_100 dresnet    some of them, measured on this machine
  cellops models --size 112 --classes 8  all of them, for another input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="all if not given")
    parser.add_argument("--names", dest="names_only", action="store_true", help="no figures")
    parser.add_argument("--size", type=int, nargs="+", default=[224], metavar="N", help="height [width] (224)")
    parser.add_argument("--classes", type=int, default=1000, metavar="K", help="(1000)")
    parser.add_argument("--no-measure", action="store_true", help="leave out what takes time: memory and latency")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and return the exit code."""
    need_models_extra()
    with bad_input():
        from cellops.models import create_model, list_models, model_source

        names = arguments.names or list_models()
        sources = {name: model_source(name) for name in names}
        width = max(map(len, names))
        if arguments.names_only:
            for name, source in sources.items():
                print(f"{name:<{width}}  {source}")
            return 0
        from cellops.models.cost import cost

        if len(arguments.size) > 2 or min(arguments.size) < 1:
            raise ValueError("--size takes one or two positive integers")
        height, wide = (arguments.size * 2)[:2]
        print(f"input 3x{height}x{wide}, {arguments.classes} classes; MAC = multiply-accumulate; MiB")
        columns = ("parameters", "MiB", "M MAC", "torchstat MiB", "peak MiB", "ms/image")
        print(f"{'':<{width}}  {'source':<12}" + "".join(f"{name:>15}" for name in columns))
        for name in names:
            model = create_model(name, num_classes=arguments.classes).eval()
            found = cost(model, input_size=(3, height, wide), measure=not arguments.no_measure)
            latency = None if found.latency_seconds is None else 1e3 * found.latency_seconds
            peak = None if found.peak_bytes is None else found.peak_bytes / 2**20
            figures = (found.megabytes, found.macs / 1e6, found.torchstat_bytes / 2**20, peak, latency)
            cells = "".join(f"{'–' if value is None else f'{value:.2f}':>15}" for value in figures)
            print(f"{name:<{width}}  {sources[name]:<12}{found.parameters:>15,}{cells}", flush=True)
    return 0
