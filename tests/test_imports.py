"""The architecture, read from the syntax trees: imports go down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastsde"
MODULES = sorted(PACKAGE.rglob("*.py"))

LEVELS = {
    "types": 0,
    "checks": 0,
    "files": 0,
    "batching": 1,
    "flags": 1,
    "result": 1,
    "noise": 2,
    "sde": 2,
    "score": 3,
    "solvers": 4,
    "control": 4,
    "trajectory": 2,
    "job": 5,
    "steps": 6,
    "tokens": 6,
    "engine": 6,
    "arguments": 6,
    "api": 7,
    "diagnosis": 8,
    "fitting": 8,
    "integration": 8,
    "chains": 8,
    "latent": 8,
    "kdiffusion": 8,
    "ode": 8,
    "likelihood": 8,
    "lane": 7,
    "live": 8,
    "diffusers": 9,
    "checkpoints": 10,
    "training": 11,
    "evaluation": 12,
    "serve": 12,
    "cli": 13,
    "__main__": 14,
}
"""A module imports from lower levels or from its own part. `import fastsde` counts as `api`."""
FOUNDATIONS = {
    "noise": {"types", "batching"},
    "sde": {"types", "checks", "batching"},
    "control": {"types", "checks", "batching", "result", "noise"},
    "training": {"types", "checks", "files", "batching", "result", "sde", "score", "api", "checkpoints", "tokens"},
}
"""Parts that stand on less than all lower levels. `solvers` and `control` share a level: neither imports the other."""
INTERNAL = {"engine", "batching", "types"}
"""What benchmarks and examples leave alone, like every name that starts with an underscore."""


def imports(path):
    """Every (module, name) that a file imports, anywhere in it; name is None for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def parts(path):
    """The parts of fastsde that a file imports from."""
    for module, name in imports(path):
        names = module.split(".")
        if names[0] != "fastsde":
            continue
        if len(names) == 1:
            # `from fastsde import api` names a part, `from fastsde import sample` what api brings together.
            yield name if name in LEVELS else "api"
        else:
            yield names[1]


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_go_down_only(path):
    own = part_of(path)
    assert own in LEVELS, f"{own} needs a place in LEVELS"
    below = {part for part, level in LEVELS.items() if level < LEVELS[own]}
    allowed = FOUNDATIONS.get(own, below) | {own}
    assert set(parts(path)) <= allowed


def scripts():
    return sorted(p for folder in ("benchmarks", "examples") for p in (ROOT / folder).rglob("*.py"))


def test_benchmarks_and_examples_use_public_modules():
    for path in scripts():
        wrong = set(parts(path)) & INTERNAL
        assert not wrong, f"{name_of(path)} imports {wrong}"
        for module, name in imports(path):
            private = [n for n in (*module.split("."), name or "") if n.startswith("_") and not n.startswith("__")]
            assert module.split(".")[0] != "fastsde" or not private, f"{name_of(path)} imports {private}"


def test_an_upward_import_would_be_seen(tmp_path):
    """The walk finds imports inside functions and under TYPE_CHECKING."""
    file = tmp_path / "x.py"
    lines = (
        "import fastsde.noise",
        "if 0:",
        "    from fastsde.engine import E",
        "def f():",
        "    from fastsde import s",
    )
    file.write_text("\n".join(lines))
    assert set(parts(file)) == {"noise", "engine", "api"}
