"""The documents: their code runs and does what the page says, their commands exist, every public name has an entry."""

import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import torch

import fastsde
import fastsde.diffusers
from fastsde.cli.main import main

pyplot = pytest.importorskip("matplotlib.pyplot")
pyplot.switch_backend("Agg")

pytestmark = pytest.mark.usefixtures("without_type_checks")
ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def text_of(page):
    """A page as Markdown: of a notebook its cells, without what they printed."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    code = ["```python\n{}\n```", "{}"]
    return "\n\n".join(code[c["cell_type"] == "markdown"].format("".join(c["source"])) for c in cells)


def blocks(page, language):
    """(whether it is to run, text) of each code block; `<!-- not run: why -->` stands above those that are not."""
    found = re.findall(
        rf"(<!-- not run: .*? -->\n)?^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE
    )
    return [(not mark, code) for mark, code in found]


def run(page, tmp_path, monkeypatch, **names):
    """Runs the code of a page from top to bottom, in an empty folder; returns its names."""
    monkeypatch.chdir(tmp_path)
    for runs, code in blocks(page, "python"):
        if runs:
            for long, short in SHORTER.items():
                code = code.replace(long, short)
            exec(compile(code, str(page), "exec"), names)
    pyplot.close("all")
    return names


SHORTER = {
    "TrainConfig(steps=2000": "TrainConfig(steps=300",
    "1.0, 0.0, 1500": "1.0, 0.0, 800",
    "range(1500)": "range(800)",
}
"""What is cut down here, because the page has the size that gives a good result."""


def tutorial(name):
    return ROOT / "docs" / "tutorials" / name


def test_own_score_function(tmp_path, monkeypatch):
    names = run(tutorial("score-function.ipynb"), tmp_path, monkeypatch)
    # 1000 samples: a share of 1/8 has a standard error of 0.01, a standard deviation one of 2 %.
    assert torch.allclose(names["share"], torch.full((8,), 1 / 8), atol=0.045)
    assert abs(names["spread"] / names["std"] - 1) < 0.1


def test_own_network(tmp_path, monkeypatch):
    names = run(tutorial("network.ipynb"), tmp_path, monkeypatch)
    assert not names["found"].fits
    assert (names["found"].best.sign, names["found"].best.time) == (-1, "1 - t")
    assert issubclass(names["caught"][0].category, fastsde.DataRangeWarning)
    # Half of the samples are as near to the data as the data are wide, although the network is small.
    near = torch.cdist(names["good"].samples, names["data"]).amin(1).median()
    far = torch.cdist(names["bad"].samples, names["data"]).amin(1).median()
    assert near < 0.04 < 10 * 0.04 < far


def test_inpainting(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    names = run(tutorial("inpainting.ipynb"), tmp_path, monkeypatch)
    known, mask = names["given"] * names["mask"], names["mask"]
    projected, other = (names["rows"][name] for name in ("Projection", "Projection, other seed"))
    assert torch.allclose(projected * mask, known, atol=1e-5)  # rounding of single precision
    assert not torch.allclose(projected, other, atol=0.1)
    misfit = ((names["rows"]["MMPS"] * mask - known)[:, :, :14]).square().mean().sqrt()
    assert misfit < 0.1  # twice the noise that it was told


def test_pipeline(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    names = run(tutorial("pipeline.md"), tmp_path, monkeypatch)
    # 12 steps of a first-order method beside 12 of ours, from the same noise: the same garments.
    assert (names["own"] - names["ours"].images).norm() < 0.3 * names["own"].norm()
    assert (names["ours"].result.nfe == 24).all()
    assert float((names["again"].images[0] - names["r"].images[2]).abs().max()) < 1e-3


def test_fitting(tmp_path, monkeypatch):
    names = run(tutorial("fitting.md"), tmp_path, monkeypatch)
    assert (names["r"].nfe == 5).all()
    ours, default = (
        (x - names["exact"]).square().mean(1).sqrt().median() for x in (names["r"].samples, names["default"])
    )
    assert ours < 0.1 * default


def test_training(tmp_path, monkeypatch):
    names = run(tutorial("training.md"), tmp_path, monkeypatch)
    radius = names["x"].norm(dim=1)
    assert abs(float(radius.mean()) - 1) < 0.1  # a seventh of the page's steps
    assert float(radius.std()) < 0.4


def test_sweep(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    first = next(line for line in commands(tutorial("sweep.md")) if line.startswith("fastsde bench"))
    # As few samples as FID with 64 features takes, and as few calls as a solver takes.
    small = re.sub(r"-n \d+", "-n 130", re.sub(r"--nfe [\d,]+", "--nfe 2 --bootstrap 2", first))
    assert small != first
    main(shlex.split(small)[1:], standalone_mode=False)
    folder = tmp_path / "runs" / "first"
    assert (folder / "report.html").is_file()
    assert len((folder / "summary.csv").read_text().splitlines()) == 3  # a header and two solvers


def test_readme(tmp_path, monkeypatch):
    """The reader's network is here one for data that are N(0.2, 0.5^2), in the convention of the first example."""
    mean, std, betas = 0.2, 0.5, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)

    def network(x, level):
        k = level.double().clamp(0, 999)
        below = k.long().clamp(max=998)
        share = torch.lerp(kept[below], kept[below + 1], k - below)[:, None, None, None]
        return ((1 - share).sqrt() * (x - share.sqrt() * mean) / (share * std**2 + 1 - share)).float()

    pictures = mean + std * torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"network": network, "betas": betas, "sixteen_images": pictures}
    names = run(ROOT / "README.md", tmp_path, monkeypatch, **given)
    # 196,608 values: their sampling error is below 0.2 %. A table's last level leaves noise of 1 % of alpha.
    assert abs(float(names["r"].samples.mean()) - mean) < 0.01
    assert abs(float(names["r"].samples.std()) / std - 1) < 0.02


TESTED = [ROOT / "README.md", *(ROOT / "docs" / "tutorials").iterdir()]
OTHERS = [page for page in PAGES if page not in TESTED and any(runs for runs, _ in blocks(page, "python"))]


@pytest.mark.parametrize("page", OTHERS, ids=[str(page.relative_to(ROOT)) for page in OTHERS])
def test_code_of_other_pages(page, tmp_path, monkeypatch):
    if "pretrained" in text_of(page):
        pytest.importorskip("diffusers")
    results = [r for r in run(page, tmp_path, monkeypatch).values() if isinstance(r, fastsde.SampleResult)]
    assert all(r.success.all() for r in results)


def commands(page):
    """The lines of a page that call the command, continued lines joined and comments cut off."""
    text = "\n".join(code for _, code in blocks(page, "sh")).replace("\\\n", " ")
    found = [line.split("  #")[0].strip() for part in text.splitlines() for line in part.split("&&")]
    return [line for line in found if line.startswith("fastsde ")]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist(page):
    for line in commands(page):
        _, name, *rest = shlex.split(line)
        with click.Context(main) as context:
            command = main.get_command(context, name)
            assert command is not None, line
            command.make_parser(click.Context(command)).parse_args(rest)


def resolve(name):
    """The object of a dotted name, or None if there is none."""
    first, *rest = name.split(".")
    found = importlib.import_module(first)
    try:
        for part in rest:
            found = getattr(found, part)
        return found
    except AttributeError:
        pass
    home, _, last = name.rpartition(".")  # a module that was not imported, or that a function of its name hides
    try:
        return getattr(importlib.import_module(home), last, None) or importlib.import_module(name)
    except ImportError:
        return None


def dotted(node, imported):
    """The name of an expression like a.b.c, with what was imported written out; None of any other."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([imported.get(node.id, node.id), *reversed(parts)])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_code_uses_what_is_there(page):
    """Also code that is not run: its names of fastsde exist, and so do the arguments that it gives them."""
    imported = {}
    for _, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastsde":
                imported |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for node in ast.walk(ast.parse(code)):
            name = dotted(node.func if isinstance(node, ast.Call) else node, imported)
            if name is None or not name.startswith("fastsde."):
                continue
            found = resolve(name)
            assert found is not None, name
            if isinstance(node, ast.Call):
                given = inspect.signature(found).parameters
                if not any(p.kind is p.VAR_KEYWORD for p in given.values()):
                    assert {k.arg for k in node.keywords} - {None} <= set(given), (name, ast.unparse(node))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_pages_that_the_code_names_are_there():
    files = [*(ROOT / "fastsde").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("*.md")]
    named = {(file.name, page) for file in files for page in re.findall(r"\bdocs/[\w/-]+\.md", file.read_text())}
    missing = [(file, page) for file, page in named if not (ROOT / page).exists()]
    assert not missing


def test_reference_has_every_public_name():
    entries = re.findall(
        r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in PAGES if p.parent.name == "reference"), re.M
    )
    found = [resolve(name) for name in entries]
    assert all(obj is not None for obj in found), [e for e, obj in zip(entries, found, strict=True) if obj is None]
    assert len(entries) == len(set(entries))
    packages = (fastsde, fastsde.score, fastsde.diffusers, fastsde.solvers, fastsde.control)
    public = {f"{p.__name__}.{name}" for p in packages for name in p.__all__}
    missing = [name for name in public if not any(resolve(name) is obj for obj in found)]
    assert not missing, sorted(missing)
