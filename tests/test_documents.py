"""Tables in documents are those of the stored results, and the results are of this version."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastsde

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

BLOCKS = [
    (path, name) for path in tables.documents() for name in re.findall(r"<!-- table: (\S+) -->", path.read_text())
]


def name_of(value):
    return value if isinstance(value, str) else str(value.relative_to(ROOT))


@pytest.mark.parametrize(("path", "name"), BLOCKS, ids=name_of)
def test_a_table_is_that_of_its_results(path, name):
    assert name in tables.TABLES, "no such table in benchmarks/tables.py"
    blocks = {m[2]: m[0] for m in tables.BLOCK.finditer(path.read_text())}
    assert name in blocks, "the block has no end"
    assert blocks[name] == tables.filled(blocks[name]), "run: python benchmarks/tables.py --write"


@pytest.mark.parametrize("name", sorted({r for _, name in BLOCKS for r in tables.TABLES.get(name, [()])[0]}))
def test_a_cited_result_is_of_this_minor_version_and_says_its_commit(name):
    record = tables.result(name)
    minor = fastsde.__version__.split(".")[:2]
    assert record["versions"]["fastsde"].split(".")[:2] == minor, f"run benchmarks/{record['script']} again"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=name_of)
def test_a_result_names_a_script_that_keeps_it(path):
    script, *command = tables.result(path.stem)["script"].split()
    text = (ROOT / "benchmarks" / script).read_text()
    name = path.stem.removesuffix("_cuda")
    assert re.search(rf'^@command\("{name}"[^@]*?^def {(command or ["main"])[0]}\(', text, re.MULTILINE | re.DOTALL)


def test_every_result_is_cited():
    """What no table reads is no result any more."""
    cited = {result for results, _ in tables.TABLES.values() for result in results}
    stored = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert stored == cited


def test_a_changed_number_is_seen():
    text = f"<!-- table: floors -->\n{tables.markdown('floors')}<!-- /table -->"
    assert tables.filled(text) == text
    assert tables.filled(text.replace("| 8,000 |", "| 8,001 |", 1)) == text
    with pytest.raises(KeyError):
        tables.filled("<!-- table: nothing -->\n<!-- /table -->")
