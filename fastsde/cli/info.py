"""`fastsde info`."""

from __future__ import annotations

import json
from typing import Any

import click

from fastsde.checkpoints import packaged, read_card, weight_hash
from fastsde.cli import options as option
from fastsde.cli.output import versions
from fastsde.solvers import SOLVERS, FittedSolver, Solver


@click.command()
@click.argument("topic", required=False, type=click.Choice(["models", "solvers"]))
@option.as_json
@click.option("--markdown", is_flag=True, help="Print the solver table of docs/reference/solver-table.md.")
def info(topic: str | None, as_json: bool, markdown: bool) -> None:
    """Show versions, the packaged models with their cards, and the solvers with their traits; or one TOPIC of these.

    \b
    Examples:
      fastsde info solvers
      fastsde info --json
    """
    if markdown:
        click.echo(solver_table())
        return
    models = {name: read_card(name) | {"weights_sha256": weight_hash(name)} for name in packaged()}
    if as_json:
        rows = {name: dict(zip(_COLUMNS[1:], traits, strict=True)) for name, *traits in _solver_rows()}
        parts = {"models": models, "solvers": rows}
        click.echo(json.dumps({"versions": versions()} | (parts if topic is None else {topic: parts[topic]}), indent=2))
        return
    click.echo("  ".join(f"{name} {version}" for name, version in versions().items()))
    if topic != "solvers":
        _print_models(models)
    if topic == "models":
        return
    click.echo("\nsolvers")
    for name, order, calls, steps, noise, sdes, use in _solver_rows():
        click.echo(
            f"  {name}: {use}\n      order {order}; calls a step: {calls}; steps: {steps}; noise: {noise}; SDEs: {sdes}"
        )


def _print_models(models: dict[str, Any]) -> None:
    click.echo("\nmodels")
    for name, card in models.items():
        shape = " x ".join(map(str, card["event_shape"]))
        click.echo(f"  {name}: {shape}, {card['parameters']:,} parameters, {card['data']} ({card['licence']})")
        if card["classes"]:
            click.echo("      class_labels: " + ", ".join(f"{k} {label}" for k, label in enumerate(card["classes"])))


_COLUMNS = ("solver", "order", "calls per step", "step size", "noise", "SDEs", "use")


def _solver_rows() -> list[tuple[str, ...]]:
    every: tuple[type[Solver], ...] = (*SOLVERS, FittedSolver)
    return [
        (s.__name__, s.convergence, s.cost or str(s.calls_per_step), _stepping(s), s.noise, s.sdes, s.use)
        for s in every
    ]


def _stepping(solver: type[Solver]) -> str:
    if solver.times is not None:
        return "its own times"
    if "base_step" in vars(solver):
        return "grid; per sample on request"
    trait = vars(solver).get("adaptive", False)
    return "grid" if trait is False else "per sample, from rtol" if trait is True else "per sample, from rtol, or grid"


def solver_table() -> str:
    """The solvers and their declared traits as a Markdown table."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *((f"`{name}`", *rest) for name, *rest in _solver_rows())]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
