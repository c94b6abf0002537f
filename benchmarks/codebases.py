"""How much must be read to follow four parts of this library, and of four others? Lines of code and names of their own.

A line of code is one that is neither blank, comment nor part of a docstring. A name counts if the code of the part
uses it and the package defines it: a class, a function or a method of its own. The sources are read, not imported:

    pip install --no-deps --target others azula k-diffusion diffrax torchode
    python benchmarks/codebases.py --others others
"""

from __future__ import annotations

import ast
from pathlib import Path

from common import Row, command

HERE = Path(__file__).parent.parent

PARTS: dict[str, dict[str, list[str]]] = {
    "DDIM, the step": {
        "fastsde": ["fastsde/solvers/ddim.py:DDIM.step"],
        "azula": ["azula/sample.py:DDIMSampler.step"],
    },
    "DDIM, the class": {
        "fastsde": ["fastsde/solvers/ddim.py:DDIM"],
        "azula": ["azula/sample.py:DDIMSampler"],
        "k_diffusion": ["k_diffusion/sampling.py:sample_euler", "k_diffusion/sampling.py:to_d"],
    },
    "adaptive step": {
        "fastsde": ["fastsde/control/adaptive.py:Adaptive"],
        "k_diffusion": [
            "k_diffusion/sampling.py:PIDStepSizeController",
            "k_diffusion/sampling.py:DPMSolver.dpm_solver_adaptive",
        ],
        "diffrax": ["diffrax/_step_size_controller/pid.py"],
        "torchode": ["torchode/step_size_controllers.py"],
    },
    "loop": {
        "fastsde": ["fastsde/engine.py:Engine"],
        "azula": ["azula/sample.py:Sampler"],
        "diffrax": ["diffrax/_integrate.py:loop", "diffrax/_integrate.py:diffeqsolve"],
        "torchode": ["torchode/adjoints.py:AutoDiffAdjoint"],
    },
    "guidance, the step": {
        "fastsde": ["fastsde/score/guidance.py:ClassifierFreeGuidance.output"],
        "azula": ["azula/guidance/cfg.py:CFGDenoiser.forward"],
    },
    "guidance, the class": {
        "fastsde": ["fastsde/score/guidance.py:ClassifierFreeGuidance"],
        "azula": ["azula/guidance/cfg.py:CFGDenoiser"],
    },
}
"""Files, and names in them, that one reads for a part."""


def nodes_of(place: str, roots: dict[str, Path]) -> list[ast.stmt]:
    """The statements of a class, a function, a method or a whole file."""
    path, _, name = place.partition(":")
    body: list[ast.stmt] = ast.parse((roots[path.split("/")[0]] / path).read_text()).body
    for part in filter(None, name.split(".")):
        found = [node for node in body if getattr(node, "name", None) == part]
        body = found[-1:] if part == name.split(".")[-1] else found[-1].body  # type: ignore[attr-defined]
    return body


def lines_of(nodes: list[ast.stmt]) -> int:
    """Lines that hold code: those of which some expression or statement other than a docstring is."""
    lines = set[int]()
    for top in nodes:
        docs = [
            node.body[0]
            for node in ast.walk(top)
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None
        ]
        inside = {k for doc in docs for k in range(doc.lineno, (doc.end_lineno or doc.lineno) + 1)}
        for node in ast.walk(top):
            if isinstance(node, (ast.expr, ast.stmt, ast.arg)):
                lines.update({node.lineno, node.end_lineno or node.lineno} - inside)
    return len(lines)


def own_names(package: Path) -> set[str]:
    """Classes, functions and methods that a package defines."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    trees = (ast.parse(path.read_text()) for path in package.rglob("*.py"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}


def used_names(nodes: list[ast.stmt], own: set[str]) -> set[str]:
    """Those of a package's names that the code uses and does not itself define."""
    walked = [node for top in nodes for node in ast.walk(top)]
    used = {node.id for node in walked if isinstance(node, ast.Name)}
    used |= {node.attr for node in walked if isinstance(node, ast.Attribute)}
    defined = {node.name for node in walked if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    return {name for name in (used & own) - defined if not name.startswith("__")}


@command("codebases")
def main(others: Path) -> list[Row]:
    """The table."""
    roots = {name: others for name in ("azula", "k_diffusion", "diffrax", "torchode")} | {"fastsde": HERE}
    own = {name: own_names(root / name) for name, root in roots.items()}
    rows = []
    for part, places in PARTS.items():
        for name, files in places.items():
            nodes = [node for place in files for node in nodes_of(place, roots)]
            row = {"part": part, "library": name, "lines": lines_of(nodes), "names": len(used_names(nodes, own[name]))}
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
