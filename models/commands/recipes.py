"""`cellops recipes`: what can be trained."""

from __future__ import annotations

import argparse

from cellops.models.commands import bad_input

HELP = "list the recipes, or print one"
EXAMPLES = """\
examples:
  cellops recipes                        every recipe with a line about it
  cellops recipes hybrid                 those with this in their name
  cellops recipes demo > mine.yaml       one with every setting, to be changed and used: --recipe mine.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe, or list those with it in the name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")


def run(arguments: argparse.Namespace) -> int:
    """List or print, and return the exit code."""
    from cellops.models.training.recipe import RecipeError, dump_recipe, load_recipe, nearest, recipe_names

    with bad_input():
        names = recipe_names()
        if arguments.name is not None:
            if arguments.name in names or arguments.name.endswith((".yaml", ".yml")) or arguments.set:
                print(dump_recipe(load_recipe(arguments.name, arguments.set)), end="")
                return 0
            known, names = names, [name for name in names if arguments.name in name]
            if not names:
                raise RecipeError(f"there is no recipe {arguments.name!r}: {nearest(arguments.name, known)}")
        width = max(map(len, names))
        for name in names:
            recipe = load_recipe(name)
            print(f"{name:<{width}}  {recipe.title or recipe.model.name}")
    return 0
