r"""Fills the tables of README.md and docs/ from results/*.json.

A document holds blocks that begin with `<!-- table: NAME -->` and end with `<!-- /table -->`. Each name is a function
here, of the results that it reads; a line under its table says script, processor, commit and date of each.

    python benchmarks/tables.py            # prints the blocks that differ
    python benchmarks/tables.py --write    # fills them in
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
Row = dict[str, Any]
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., list[Row]]]] = {}
"""By name: the results that a table reads, and the function of them."""
SCRIPTS = {
    "ablation_fit": "ablations.py fit",
    "ablation_solver": "ablations.py solver",
    "adversarial_2d": "thesis/adversarial.py points",
    "adversarial_images": "thesis/adversarial.py images",
    "annealed_steps": "thesis/annealed.py steps",
    "annealing": "thesis/annealed.py noise",
    "batching": "overhead.py batching",
    "ddim": "thesis/ddim.py",
    "guided_pipeline": "pipelines.py guidance",
    "loop_overhead": "pipelines.py cost",
    "measurements": "posterior.py network",
    "network": "network.py (last in 6513568; fitted.py has its question now)",
    "overhead": "overhead.py runs",
    "overhead_cuda": "overhead.py runs --device cuda",
    "pipelines": "pipelines.py classes",
    "posterior": "posterior.py exact",
    "stacked": "thesis/adversarial.py stacked",
    "thesis_network": "thesis/tables.py network",
    "thesis_nfe": "thesis/nfe.py",
    "thesis_tables": "thesis/tables.py exact",
}
"""The script behind a result, where it has another name."""


def result(name: str) -> Row:
    """A stored result with its provenance."""
    found: Row = json.loads((HERE / "results" / f"{name}.json").read_text())
    return found


def shows(*results: str) -> Callable[[Callable[..., list[Row]]], Callable[..., list[Row]]]:
    """Makes a function of results a table, which has the function's name with hyphens."""

    def add(work: Callable[..., list[Row]]) -> Callable[..., list[Row]]:
        TABLES[work.__name__.replace("_", "-")] = results, work
        return work

    return add


def cell(value: object) -> str:
    """Three digits of a number, nothing for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def slashed(values: Iterable[object]) -> str:
    """Several numbers in one cell."""
    return " / ".join(cell(value) or "-" for value in values)


def source(name: str) -> str:
    """Where a result comes from."""
    record, script = result(name), SCRIPTS.get(name, f"{name}.py")
    machine = record["machine"].get("gpu", record["machine"]["cpu"].split("@")[0].strip())
    return f"{script}, {machine}, commit {record['commit'][:7]}, {record['date']}"


def markdown(name: str) -> str:
    """A table with the line that says where it comes from."""
    results, work = TABLES[name]
    rows = work(*(result(one)["results"] for one in results))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([cell(row.get(key)) for key in keys] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n*{'; '.join(map(source, results))}*\n"


def filled(text: str) -> str:
    """A document with its blocks filled in.

    Raises:
        KeyError: if a block has a name that no table has.
    """
    return BLOCK.sub(lambda m: f"{m[1]}{markdown(m[2])}{m[3]}", text)


def documents() -> list[Path]:
    """Everything that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def of(rows: Sequence[Row], **key: object) -> Row:
    """The row that has these values."""
    return next(row for row in rows if all(row.get(k) == v for k, v in key.items()))


def some(rows: Sequence[Row], **key: object) -> list[Row]:
    """All rows that have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in key.items())]


# Ours beside the peers


@shows("fitted", "network", "seeds")
def readme(fitted: list[Row], network: list[Row], seeds: Row) -> list[Row]:
    """Ours by default and fitted beside the best peer at equal calls, rows where ours is behind among them."""
    rows = []
    for problem, shown, measure, calls in (
        ("digits", "digits, exact score", "distance", 6),
        ("digits", "digits, exact score", "distance", 10),
        ("rare", "rare hard samples, exact score", "distance", 6),
        ("flow", "network, MNIST, flow", "error", 8),
        ("clipped", "network, MNIST, DDPM with 100 levels", "error", 6),
    ):
        row = of(fitted, problem=problem, measure=measure, calls=calls)
        found: Row = {"data": shown, "measure": measure, "calls": calls, "default": row["default"]}
        rows.append(found | {"fitted": row["fitted"], "best peer": f"{cell(row['peer'])} ({row['who']})"})
    peers = [row for row in network if row["budget"] == 15 and "ExponentialPC" not in row["solver"]]
    best, ours = min(peers, key=lambda row: row["median"]), of(network, solver="ExponentialPC", budget=15)
    line = {"data": "network, Fashion-MNIST", "measure": "median error", "calls": 15}
    rows.append(
        line | {"default": 1e3 * ours["median"], "best peer": f"{cell(1e3 * best['median'])} ({best['solver']})"}
    )
    summary = {row["solver"]: row["fid"] for row in seeds["summary"] if row["setting"] == "nfe 10"}
    for shown, solver, peer in (
        ("FID of 10,000", "ExponentialPC", "UniPC"),
        ("FID of 10,000, with noise", "ExponentialPC:eta=1", "DPMSolverPP:eta=1"),
    ):
        line = {"data": "network, Fashion-MNIST", "measure": shown, "calls": 10, "default": summary[solver]}
        rows.append(line | {"best peer": f"{cell(summary[peer])} ({peer})"})
    return rows


def beside(peers: Row, kind: str, *ours: str) -> list[Row]:
    """One kind of sampler on all problems."""
    rows = [row for row in peers["summary"] if row["kind"] == kind and row.get("calls", 99) <= 30]
    return [
        {"problem": row["problem"], "calls": row["calls"]}
        | {name: row.get(name) for name in ours}
        | {"spread over seeds": row.get("ours sd"), "best peer": row["peer ratio"], "which": row["peer"]}
        for row in rows
    ]


@shows("peers")
def peers_ode(peers: Row) -> list[Row]:
    """Distance over floor along the probability flow."""
    return beside(peers, "ODE", "ours")


@shows("peers")
def peers_sde(peers: Row) -> list[Row]:
    """The same with noise; ours at eta 1 and 0.5."""
    return beside(peers, "SDE", "ours", "eta 0.5")


@shows("peers")
def peers_rtol(peers: Row) -> list[Row]:
    """Samplers that take a tolerance: calls, and distance over floor."""
    names = ("ExponentialPC, rtol", "Algorithm 6", "dpm_adaptive", "dopri5")
    rows = [row for row in peers["summary"] if row.get("sampler") in names]
    lines = {(row["problem"], row["sampler"], row["rtol"]): f"{row['ratio']:.2f} ({row['nfe']:.0f})" for row in rows}
    keys = sorted({key[1:] for key in lines}, key=lambda key: (names.index(key[0]), -key[1]))
    problems = list(dict.fromkeys(key[0] for key in lines))
    return [{"sampler": s, "rtol": rtol} | {p: lines.get((p, s, rtol)) for p in problems} for s, rtol in keys]


@shows("peers")
def floors(peers: Row) -> list[Row]:
    """What one draw of exact samples has."""
    return [
        {
            "problem": name,
            "samples": v["n"],
            "distance of exact samples": v["floor"],
            "spread": f"{100 * v['spread']:.0f} %",
        }
        for name, v in peers["floors"].items()
    ]


@shows("network")
def network(rows: list[Row]) -> list[Row]:
    """Median distance to the network's own flow, thousandths of the data's range."""
    found: dict[str, Row] = {}
    left_out = ("first value", "alike", "rtol")
    for row in rows:
        if not any(word in row["solver"] for word in left_out):
            found.setdefault(row["solver"], {"solver": row["solver"]})[f"{row['budget']} calls"] = 1e3 * row["median"]
    return list(found.values())


@shows("seeds")
def seeds(results: Row) -> list[Row]:
    """FID over three seeds, by budget."""
    found: dict[str, Row] = {}
    for row in results["summary"]:
        line = found.setdefault(row["solver"], {"sampler": f"`{row['solver']}`"})
        line[f"{row['mean_nfe']:.0f} calls"] = f"{row['fid']:.3f} ± {row['fid_error']:.3f}"
        if round(row["mean_nfe"]) == 10:
            line |= {"precision": row["precision"], "recall": row["recall"]}
    keys = ("sampler", "8 calls", "10 calls", "36 calls", "precision", "recall")
    return [{key: line.get(key) for key in keys} for line in found.values()]


@shows("digits")
def digits(results: Row) -> list[Row]:
    """Calls and distance over floor of every sampler."""
    keys = ("solver", "setting", "nfe", "ratio", "spread", "reached")
    return [{key: row.get(key) for key in keys} for row in results["rows"]]


# Our solver


@shows("ablation_solver")
def weights(rows: list[Row]) -> list[Row]:
    """What each choice of weights adds on equal steps in log-SNR, and ours on other grids."""
    calls, problems = ("10", "12", "15", "20"), list(dict.fromkeys(row["problem"] for row in rows))
    lines: dict[tuple[str, str], Row] = {}
    for row in rows:
        if "first correction" in row["weights"] or "leaning" in row["weights"]:
            continue
        line = lines.setdefault((row["grid"], row["weights"]), {"grid": row["grid"], "weights": row["weights"]})
        line[row["problem"]] = slashed(row[c] for c in calls)
    return [{key: line.get(key) for key in ("grid", "weights", *problems)} for line in lines.values()]


@shows("adaptivity")
def tolerances(rows: list[Row]) -> list[Row]:
    """Mean error of each tolerance on the plain grid, and what restarts would change."""
    found = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in some(rows, problem=problem) if "mean" in row]
        line: Row = {"problem": problem, "calls": slashed(row["calls"] for row in own)}
        line["error"] = slashed(row["mean"] for row in own)
        line["start again"] = slashed(f"{100 * row['again']:.0f} %" for row in own)
        found.append(line | {"error with restarts / plain": slashed(row.get("ratio, mean") for row in own)})
    return found


@shows("adaptivity")
def restarts(rows: list[Row]) -> list[Row]:
    """Root mean square error with restarts over that of the plain grid at equal mean calls, 20,000 samples."""
    return [
        {"problem": row["problem"], "rtol": row["rtol"], "mean calls": row["calls with restarts"]}
        | {"most calls": row["most calls"], "error with restarts / plain": row["ratio, rms"]}
        | {"95 %": " to ".join(map(cell, row["ratio, rms, 95 %"]))}
        for row in rows
        if "most calls" in row
    ]


# Fits


@shows("fitted")
def fitted(rows: list[Row]) -> list[Row]:
    """Default, fitted and the best peers: distance on exact problems, error on networks."""
    networks = ("flow", "shifted", "clipped", "packaged")
    found = []
    for row in rows:
        if row["measure"] == ("error" if row["problem"] in networks else "distance") and row.get("fitted") is not None:
            line = {key: row.get(key) for key in ("problem", "measure", "calls", "default", "fitted")}
            for shown, key, who in (
                ("best peer, as many calls", "peer", "who"),
                ("best peer, two calls more", "peer at n + 2", "who at n + 2"),
            ):
                line[shown] = None if row.get(key) is None else f"{cell(row[key])} {row[who]}"
            found.append(line | {"price": row["price"]})
    return found


@shows("fitted")
def fitted_fid(rows: list[Row]) -> list[Row]:
    """FID of 2000 images of the packaged network."""
    own = [row for row in rows if "FID" in row["measure"]]
    return [{"": "fitted"} | {f"{row['calls']} calls": row["fitted"] for row in own}]


@shows("fitted")
def fit_pilots(rows: list[Row]) -> list[Row]:
    """Errors of fits by three different pilots."""
    own = [row for row in some(rows, measure="error") if row.get("third pilots") is not None]
    keys = ("default", "fitted", "second pilots", "third pilots")
    return [{"problem": row["problem"], "calls": row["calls"]} | {key: row[key] for key in keys} for row in own]


@shows("fitted")
def fit_price(rows: list[Row]) -> list[Row]:
    """Errors of fits for several prices."""
    own = [row for row in some(rows, measure="error") if row.get("fitted for 2000") is not None]
    prices = (2000, 4000, 20000)
    return [
        {"problem": row["problem"], "calls": row["calls"], "default": row["default"]}
        | {f"{price:,} calls": row[f"fitted for {price}"] for price in prices}
        | {"price by default": row["fitted"]}
        for row in own
    ]


@shows("ablation_fit")
def ablation_fit(rows: list[Row]) -> list[Row]:
    """Medians of three pilots, with the least and the most."""

    def spread(row: Row, key: str) -> str:
        low, high = row[f"{key} range"]
        return f"{cell(row[key])} ({cell(low)} to {cell(high)})"

    keys = ("problem", "calls", "setting")
    return [
        {k: row[k] for k in keys} | {k: spread(row, k) for k in ("distance", "error")} | {"price": row["price"]}
        for row in rows
    ]


# Algorithm 6 and the thesis


@shows("thesis_nfe")
def algorithm6_calls(results: Row) -> list[Row]:
    """Calls beside the published ones, with the path kept."""
    rows = some(results["nfe"], noise="path kept")
    found = []
    for rtol in sorted({row["rtol"] for row in rows}):
        line: Row = {"rtol": rtol}
        for sde in ("VE", "VP"):
            row = of(rows, rtol=rtol, sde=sde)
            line |= {f"{sde}: ours": f"{row['ours']:.0f}", f"{sde}: published": row["published"]}
        found.append(line)
    return found


@shows("thesis_nfe")
def algorithm6_law(results: Row) -> list[Row]:
    """Second moment at t_min over its exact value, by thirds of the standard deviations."""
    thirds = ("large", "middle", "small")
    return [
        {"process": row["sde"], "solver": row["solver"], "calls": f"{row['nfe']:.0f}"}
        | {key: f"{row[key]:.3f} ± {row[f'{key} +-']:.3f}" for key in thirds}
        for row in results["law"]
    ]


@shows("thesis_tables")
def thesis_exact(results: Row) -> list[Row]:
    """Tables 10.1, D.2 and D.3 with an exact score."""
    keys = {"process": "process", "part": "table", "method": "method", "nfe": "calls", "ratio": "distance / floor"}
    keys |= {"published_nfe": "published calls", "published_fid": "published FID"}
    return [
        {shown: round(row[key]) if key == "nfe" else row[key] for key, shown in keys.items()} for row in results["rows"]
    ]


@shows("thesis_network")
def thesis_learned(results: Row) -> list[Row]:
    """Tables 10.1 and D.2 with the packaged network."""
    return [
        {"table": row["part"], "method": row["method"], "setting": row["setting"], "calls": round(row["mean_nfe"])}
        | {"FID": f"{row['fid']:.2f} ± {row['fid_error']:.2f}"}
        | {"published calls": row["published_nfe"], "published FID": row["published_fid"]}
        for row in results["rows"]
    ]


@shows("ddim")
def ddim(rows: list[Row]) -> list[Row]:
    """Distance over floor of DDIM on the published table and on the process."""
    keys = {"calls": "calls", "half_log_snr_error": "error of the half-log-SNR at the end"}
    keys |= {"table_ratio": "on the published table", "ratio": "on the process"}
    return [{shown: row[key] for key, shown in keys.items()} for row in rows]


@shows("annealing")
def annealing(rows: list[Row]) -> list[Row]:
    """Noise above the schedule."""
    found = []
    for row in rows:
        line: Row = {
            "process": row["sde"],
            "sampler": row["sampler"],
            "n_sigma": row["n_sigma"],
            "eps": f"{row['eps']:.1e}",
        }
        line |= {
            "largest excess": f"{100 * row['largest excess']:.1f} %",
            "at the end": f"{100 * row['at the end']:.1f} %",
        }
        found.append(line | {"as the closed form": row["ok"]})
    return found


@shows("annealed_steps")
def step_sizes(results: Row) -> list[Row]:
    """Distance over floor, denoised, by step size."""
    rows, etas = results["rows"], sorted({row["eta"] for row in results["rows"]})
    found = []
    for sampler, n_sigma in dict.fromkeys((row["sampler"], row["n_sigma"]) for row in rows):
        own = {r["eta"]: r.get("denoised") for r in some(rows, sampler=sampler, n_sigma=n_sigma)}
        found.append({"sampler": sampler, "n_sigma": n_sigma} | {f"eta {eta:g}": own.get(eta) for eta in etas})
    return found


@shows("adversarial_2d")
def points(results: Row) -> list[Row]:
    """Distance to the data by consistent annealed sampling, both seeds."""
    rows, found = some(results["rows"], sampler="CAS"), []
    for data, kind in dict.fromkeys((row["data"], row["training"]) for row in rows):
        own = some(rows, data=data, training=kind)
        line: Row = {"data": data, "training": kind}
        for key, shown in (("gap_last", "last state"), ("gap_denoised", "expected denoised sample")):
            line[shown] = ", ".join(f"{row[key]:.3f}" for row in own)
        found.append(line)
    return found


@shows("adversarial_images")
def trainings(results: Row) -> list[Row]:
    """Frechet distance, last state / denoised, at the step size where the latter is least."""
    rows, found = results["rows"], []
    for sampler, n_sigma in (("ALS", 1), ("ALS", 5), ("CAS", 1), ("CAS", 5)):
        line: Row = {"sampler": sampler, "n_sigma": n_sigma}
        for kind in ("plain", "adversarial"):
            for seed in (0, 1):
                own = some(rows, sampler=sampler, n_sigma=n_sigma, training=kind, seed=seed)
                best = min(own, key=lambda row: row["denoised"])
                line[f"{kind}, seed {seed}"] = f"{best['raw']:.2f} / {best['denoised']:.2f}"
        found.append(line)
    return found


@shows("stacked")
def stacked(rows: list[Row]) -> list[Row]:
    """Modes of stacked images."""
    return [
        {"training": row["training"], "modes of 1000": row["modes"], "KL to uniform": row["KL"]}
        | {"FID of single channels": f"{row['fid_of_channels']:.3g} ± {row['fid_error']:.1g}"}
        for row in rows
    ]


# Cost


def runs_of(results: Row) -> list[Row]:
    """Time of `sample` over the bare forwards."""
    return [
        {"run": row["run"], "calls": round(row["nfe"]), "time / bare forwards": f"{row['ratio']:.3f}"}
        | {"interval": " to ".join(f"{v:.3f}" for v in row["ratio_interval"])}
        for row in results["runs"]
    ]


@shows("overhead")
def overhead(results: Row) -> list[Row]:
    """On the CPU."""
    return runs_of(results)


@shows("overhead_cuda")
def overhead_cuda(results: Row) -> list[Row]:
    """On a GPU."""
    return runs_of(results)


@shows("overhead", "overhead_cuda")
def noise(cpu: Row, cuda: Row) -> list[Row]:
    """One increment of noise over one forward of the packaged network."""
    return [
        {
            "noise": row["noise"],
            "CPU": f"{row['percent']:.1f} %",
            "GPU": f"{of(cuda['noise'], noise=row['noise'])['percent']:.0f} %",
        }
        for row in cpu["noise"]
    ]


@shows("batching")
def batching(rows: list[Row]) -> list[Row]:
    """Rows evaluated over rows needed."""
    return [
        {"problem": row["problem"], "calls, least / mean / most": slashed(row["nfe"])}
        | {
            "rows evaluated / needed": f"{row['rows over needed']:.3f}",
            "waiting for the slowest": f"{row['waiting']:.3f}",
        }
        for row in rows
    ]


def ranged(row: Row, key: str) -> str:
    """A median with the least and the most."""
    low, high = row[f"{key} range"]
    return f"{row[key]:.2f} ({low:.2f} to {high:.2f})"


@shows("loop_overhead")
def loops(rows: list[Row]) -> list[Row]:
    """What a pipeline costs in its own loop."""
    names = {"ratio": "wall time / the own loop's", "gain": "gain of a batch of four"}
    return [{"class": row["class"]} | {shown: ranged(row, key) for key, shown in names.items()} for row in rows]


@shows("survival")
def survival(results: Row) -> list[Row]:
    """Kills, and two processes."""
    killed, two = results["killed"], results["two_processes"]
    return [
        {"what": "kills", "found": len(killed["kills_after_seconds"])},
        {"what": "same bytes as a sweep left alone", "found": all(killed["same_bytes"].values())},
        {"what": "throughput of two processes over one, sampling", "found": slashed(two["sampling"])},
        {"what": "throughput of two processes over one, whole commands", "found": slashed(two["whole_commands"])},
    ]


# Other uses


@shows("ode")
def ode(rows: list[Row]) -> list[Row]:
    """Calls of torchdiffeq's dopri5 over ours at equal error."""
    keys = ("problem", "rtol", "ours: error", "theirs: error", "ours: calls", "theirs: calls", "calls at equal error")
    return [{key: f"{row[key]:.0e}" if key == "rtol" else row.get(key) for key in keys} for row in rows]


@shows("likelihood")
def likelihood(results: Row) -> list[Row]:
    """Errors of bits per dimension."""
    return [
        {"trace": row["trace"], "mean error": f"{row['mean_error']:.1e}", "root mean square error": row["rms_error"]}
        | {"stated error": row.get("standard_error")}
        | {"covered": f"{100 * row['covered']:.1f} %" if row.get("covered") is not None else None}
        for row in results["rows"]
    ]


@shows("posterior")
def posterior(rows: list[Row]) -> list[Row]:
    """Mean / trace / weights / misfit with the larger number of steps."""
    found: dict[str, Row] = {}
    steps = max(row["steps"] for row in rows if row["steps"] != "-")
    for row in rows:
        if row["method"] == "exact" or row["steps"] == steps:
            line = found.setdefault(row["method"], {"method": row["method"], "calls": row["calls"]})
            line[row["operator"]] = " / ".join(f"{row[key]:.2f}" for key in ("mean", "trace", "weights", "misfit"))
    return list(found.values())


@shows("measurements")
def measurements(rows: list[Row]) -> list[Row]:
    """Largest value / misfit / samples outside."""
    found: dict[str, Row] = {}
    for row in rows:
        values = [f"{row[key]:.3g}" for key in ("largest", "misfit", "outside")]
        found.setdefault(row["model"], {"model": f"`{row['model']}`"})[f"eta {row['eta']:g}"] = " / ".join(values)
    return list(found.values())


@shows("hosts")
def hosts(rows: list[Row]) -> list[Row]:
    """Errors of ours / theirs on a host's levels."""
    found: dict[str, Row] = {}
    for row in rows:
        if "sample_dpmpp_2m" in row:
            line = found.setdefault(row["levels"], {"levels": row["levels"]})
            line[f"{row['calls']} calls"] = f"{row['sample_exponential_pc']:.3f} / {row['sample_dpmpp_2m']:.3f}"
    return list(found.values())


@shows("hosts")
def hosts_rtol(rows: list[Row]) -> list[Row]:
    """Errors of `sample_adaptive`."""
    own = [row for row in rows if "sample_adaptive" in row]
    return [{"rtol": row["levels"].split()[-1], "calls": row["calls"], "error": row["sample_adaptive"]} for row in own]


@shows("guided_pipeline")
def guidance(rows: list[Row]) -> list[Row]:
    """Distance to 200 evaluations."""
    return [dict(row) for row in rows]


@shows("pipelines")
def pipelines(rows: list[Row]) -> list[Row]:
    """All classes."""
    return [{key: value for key, value in row.items() if key != "diffusers"} for row in rows]


@shows("pipelines")
def pipelines_count(rows: list[Row]) -> list[Row]:
    """How many classes do what."""

    def counts(key: str) -> Mapping[str, int]:
        words = {"right": "right", "refused": "refused", "wrong or failing": ("WRONG", "FAILS")}
        return {shown: sum(row[key].startswith(word) for row in rows) for shown, word in words.items()}

    names = {"in its own loop": "`sample_pipeline`", "drop-in": "`FastSDEScheduler`"}
    return [{"": shown, "classes": len(rows)} | counts(key) for key, shown in names.items()]


def main() -> None:
    """Prints the names of documents whose blocks differ, or fills them in."""
    for path in documents():
        text = path.read_text()
        if (new := filled(text)) != text:
            print(f"{'written' if '--write' in sys.argv else 'differs'}: {path.relative_to(ROOT)}")
            if "--write" in sys.argv:
                path.write_text(new)


if __name__ == "__main__":
    main()
