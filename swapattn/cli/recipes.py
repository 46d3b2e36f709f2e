"""`swapattn recipes list|show|check`."""

from __future__ import annotations

import click

from swapattn.environment import say

from .common import command, emit


@click.group("recipes")
def recipes_command() -> None:
    """List, show and check recipes.

    \b
    Examples:
      swapattn recipes list
      swapattn recipes show short --set distill.seed=1
      swapattn recipes check my-recipe.yaml
    """


@command("list", parent=recipes_command)
def list_command(as_json: bool) -> None:
    """The recipes that come with swapattn.

    \b
    Example:
      swapattn recipes list --json
    """
    from swapattn.recipe import load_recipe, recipe_names

    rows = [{"name": name, "summary": load_recipe(name).summary} for name in recipe_names()]
    width = max((len(row["name"]) for row in rows), default=0)
    emit(as_json, rows, "\n".join(f"{row['name']:<{width}}  {row['summary']}" for row in rows))


@command("show", parent=recipes_command)
@click.argument("name")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one key; repeatable.")
def show_command(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """The resolved recipe NAME (or a YAML file), every default spelled out.

    \b
    Example:
      swapattn recipes show short --set convert.feature_map=silu --set convert.normalizer=rms
    """
    from swapattn.recipe import load_recipe

    recipe = load_recipe(name, overrides)
    emit(as_json, recipe.to_dict(), recipe.to_yaml().rstrip("\n"))


@command("check", parent=recipes_command)
@click.argument("recipes", nargs=-1)
def check_command(recipes: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPES, names or YAML files; all that come with swapattn when none is given.

    Every recipe is checked before the command ends with exit code 2 for the invalid ones.

    \b
    Example:
      swapattn recipes check my-recipe.yaml short
    """
    from swapattn.errors import RecipeError
    from swapattn.recipe import load_recipe, recipe_names

    rows: list[dict[str, str | None]] = []
    for name in recipes or recipe_names():
        try:
            load_recipe(name)
            rows.append({"recipe": name, "error": None})
        except RecipeError as error:
            rows.append({"recipe": name, "error": str(error)})
    emit(as_json, rows, "\n".join(f"{row['recipe']}: {row['error'] or 'valid'}" for row in rows))
    invalid = [str(row["recipe"]) for row in rows if row["error"]]
    if invalid:
        raise RecipeError(f"{len(invalid)} of {len(rows)} recipes are invalid: {', '.join(invalid)}")
    say(f"{len(rows)} recipe{'s' if len(rows) != 1 else ''} checked")
