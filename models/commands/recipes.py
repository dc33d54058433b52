"""`cellops recipes`: what can be trained."""

from __future__ import annotations

import argparse
from typing import Any

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
    from cellops.models.training.recipe import (
        RecipeError,
        dump_recipe,
        load_recipe,
        nearest,
        recipe_families,
        recipe_names,
    )

    with bad_input():
        name, names = arguments.name, recipe_names()
        if arguments.set and name is None:
            raise RecipeError("--set changes one recipe, which is then printed: cellops recipes NAME --set KEY=VALUE")
        several = [known for known in names if name is not None and name in known]
        if arguments.set and several and name not in names:
            raise RecipeError(
                f"--set changes one recipe, and {name!r} is in the name of {', '.join(several)}: take one"
            )
        if name is not None and (name in names or name.endswith((".yaml", ".yml")) or arguments.set):
            print(dump_recipe(load_recipe(name, arguments.set)), end="")
            return 0
        if name is not None and not several:
            raise RecipeError(f"there is no recipe {name!r}: {nearest(name, names)}")
        families = sorted(recipe_families().values(), key=lambda recipes: next(iter(recipes.values()))["paper"])
        for recipes in families:
            print(_family({known: told for known, told in recipes.items() if name is None or name in known}), end="")
    return 0


def _family(recipes: dict[str, dict[str, Any]]) -> str:
    """The recipes of one file: a line each, their twins in one line below."""
    plain = {name: told for name, told in recipes.items() if not told["twin"]}
    twins = {told["setting"]: name for name, told in recipes.items() if told["twin"]}
    if not plain:
        return "".join(f"{name}  {told['setting']}\n" for name, told in recipes.items())
    papers = dict.fromkeys(told["paper"] for told in plain.values() if told["paper"])
    text = "".join(f"\nPaper {paper}\n" for paper in papers)
    settings = {told["setting"] for told in plain.values()}
    common = settings.pop() if not papers and len(settings) == 1 else ""
    text += f"\nEach: {common}\n" if common else ""
    width = max(map(len, plain))
    for name, told in plain.items():
        text += f"  {name:<{width}}  {told['title']}{'' if common else _aside(told['setting'])}\n"
    for setting, example in twins.items():
        suffix = example.removeprefix(max((name for name in plain if example.startswith(name)), key=len, default=""))
        text += f"  each also as NAME{suffix}: {setting}\n"
    return text


def _aside(setting: str) -> str:
    return f" ({setting})" if setting and setting != "the paper's setting" else ""
