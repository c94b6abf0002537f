"""The plot and the page of a sweep."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsde.evaluation.images import image_grid
from fastsde.evaluation.sweep import pareto

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def plot(summary: Sequence[Mapping[str, Any]]) -> bytes:
    """The picture of `draw` as a PNG file; errors are the same."""
    buffer = io.BytesIO()
    draw(summary).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """NFE against FID on logarithmic axes: a line for each solver, bars of two standard errors, the Pareto front.

    The front is a staircase: at each number of calls the least FID that so many or fewer reach.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots are drawn by matplotlib: pip install 'fastsde[bench]'.") from error
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="network calls per sample (mean)", ylabel="FID")
    there = [row for row in summary if row["fid"] is not None]
    if not there:
        return figure
    for k, solver in enumerate(dict.fromkeys(row["solver"] for row in there)):
        for kind, style in (("nfe", "-"), ("rtol", ":")):
            own = sorted(
                (row for row in there if row["solver"] == solver and row["setting"].startswith(kind)),
                key=lambda row: row["mean_nfe"],
            )
            if own:
                axes.errorbar(
                    [row["mean_nfe"] for row in own],
                    [row["fid"] for row in own],
                    [2 * row["fid_error"] for row in own],
                    label=solver + (" (rtol)" if kind == "rtol" else ""),
                    linestyle=style,
                    color=f"C{k % 10}",
                    marker="osD^vP*Xhp"[k % 10],
                    markersize=4,
                    capsize=3,
                    linewidth=1,
                )
    front = pareto(summary)
    calls, best = [row["mean_nfe"] for row in front], [row["fid"] for row in front]
    axes.plot(calls, best, "o", color="black", markersize=11, fillstyle="none", label="on the Pareto front")
    most = max(row["mean_nfe"] for row in there)
    axes.step([*calls, most], [*best, best[-1]], where="post", color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xscale="log", yscale="log")
    budgets_first = sorted(there, key=lambda row: row["setting"].startswith("rtol"))
    _plain_ticks(axes.xaxis, [float(round(row["mean_nfe"])) for row in budgets_first])
    _plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _plain_ticks(axis: Axis, wanted: Sequence[float] = ()) -> None:
    """Ticks of a logarithmic axis as plain numbers: those wanted, the first ones first if they crowd, or round ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    kept: list[float] = []
    for tick in wanted:
        room = (high / low) ** 0.04  # for 25 labels at most
        if tick > 0 and all(max(tick / other, other / tick) > room for other in kept):
            kept.append(tick)
    round_ones = MaxNLocator(6) if high < 10 * low else LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
    axis.set_major_locator(FixedLocator(kept) if kept else round_ones)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


_HEADINGS = {
    "solver": "solver",
    "setting": "setting",
    "mean_nfe": "calls, mean",
    "max_nfe": "calls, most",
    "fid": "FID",
    "rank": "rank",
    "fid_infinite": "FID, n to infinity",
    "kid": "KID x 1000",
    "divergence": "divergence by a critic",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "seeds": "seeds",
    "failed": "not successful",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: bottom }
td { white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
.front td:first-child { font-weight: 600 }
.scroll { overflow-x: auto } img { max-width: 100% } .plot img { min-width: 640px }
.narrow { display: none; color: #555; font-size: 13px } @media (max-width: 1100px) { .narrow { display: block } }
figure { margin: 1rem 0 } figcaption { color: #555; font-size: 13px }
pre { background: #f5f5f5; padding: 1rem; font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere }
""".strip()


def page(
    summary: Sequence[Mapping[str, Any]],
    picture: bytes,
    strips: Sequence[tuple[str, str, np.ndarray]],
    provenance: Mapping[str, Any],
    title: str,
) -> str:
    """A page that needs no other file: plot, table, images of each solver at equal settings, provenance.

    Args:
        summary: from `Sweep.write_tables`.
        picture: from `plot`.
        strips: setting, solver and images, uint8 with shape (k, H, W, C); those of one setting stand together.
        provenance: settings and versions, as JSON values.
        title: of the page.
    """
    front = [id(row) for row in pareto(summary)]
    columns = [key for key in _HEADINGS if any(row.get(key) is not None for row in summary)]
    head = "".join(f"<th>{_HEADINGS[key]}</th>" for key in columns)
    body = "\n".join(
        f"<tr{' class=front' if id(row) in front else ''}>"
        + "".join(f"<td>{_cell(row, key)}</td>" for key in columns)
        + "</tr>"
        for row in summary
    )
    pictures = []
    for setting in dict.fromkeys(setting for setting, _, _ in strips):
        pictures.append(f"<h2>Samples at {html.escape(setting)}</h2>")
        for other, solver, images in strips:
            if other == setting:
                buffer = io.BytesIO()
                image_grid(images, columns=16, width=56).save(buffer, format="PNG")
                name = html.escape(solver)
                source = f'<img alt="samples of {name}" src="{_embedded(buffer.getvalue())}">'
                pictures.append(f"<figure>{source}<figcaption>{name}</figcaption></figure>")
    record = html.escape(json.dumps(provenance, indent=1))
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p class="narrow">What is wider than this window scrolls sideways.</p>
<figure><div class="scroll plot"><img alt="calls against FID" src="{_embedded(picture)}"></div>
<figcaption>Means over seeds; bars are two standard errors of sampling. The dashed line is the Pareto front: the least
FID that so many calls or fewer reach. Circles are the settings on it.</figcaption></figure>
<h2>Figures</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p>FID is given with one standard error (bootstrap over samples, or spread over seeds where larger). Within one budget,
differences of less than two joint errors are not ranked: such solvers share a rank. Bold: on the Pareto front. The same
seeds give every solver the same start states.</p>
{"".join(pictures)}
<h2>Provenance</h2>
<pre>{record}</pre>
</body>
</html>
"""


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if key == "fid":
        return f"{value:.3f} &plusmn; {row['fid_error']:.3f}"
    if key == "kid":
        error = row["kid_error"]
        return f"{1000 * value:.3f}" + ("" if error is None else f" &plusmn; {1000 * error:.3f}")
    if isinstance(value, float):
        return f"{value:.1f}" if key.endswith("nfe") else f"{value:.3f}"
    return html.escape(str(value))
