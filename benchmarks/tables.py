r"""Fills the tables of README.md and docs/ from results/*.json.

A document holds blocks that begin with `<!-- table: NAME -->` and end with `<!-- /table -->`. Each name is a function
here, of the results that it reads; a line under its table says script, processor, commit and date of each.

    python benchmarks/tables.py            # prints the blocks that differ
    python benchmarks/tables.py --write    # fills them in
"""

from __future__ import annotations

import json
import re
import statistics
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
    "annealed_steps": "thesis/annealed.py",
    "batching": "overhead.py batching",
    "comparisons": "thesis/gans.py comparisons",
    "ddim": "thesis/ddim.py",
    "divergences": "thesis/divergences.py",
    "gan_bias": "thesis/gans.py bias",
    "gan_masks": "thesis/gans.py masks",
    "guided_pipeline": "pipelines.py guidance",
    "inception": "thesis/adversarial.py inception",
    "langevin_2d": "thesis/adversarial.py langevin",
    "latent_autoencoders": "latent.py autoencoders",
    "latent_diffusion": "latent.py diffusion",
    "loop_overhead": "pipelines.py cost",
    "measurements": "posterior.py network",
    "modes": "thesis/gans.py modes",
    "network": "network.py (last in 6513568; fitted.py has its question now)",
    "overhead": "overhead.py runs",
    "overhead_cuda": "overhead.py runs --device cuda",
    "pipelines": "pipelines.py classes",
    "posterior": "posterior.py exact",
    "rejections": "thesis/chapter10.py rejections",
    "stability": "thesis/chapter10.py stability",
    "thesis_network": "thesis/chapter10.py network",
    "thesis_nfe": "thesis/nfe.py",
    "thesis_tables": "thesis/chapter10.py exact",
    "tokens": "tokens.py images",
    "tokens_exact": "tokens.py exact",
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
    changed = " with changes" if record["commit"].endswith("-dirty") else ""
    return f"{script}, {machine}, commit {record['commit'][:7]}{changed}, {record['date']}"


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


def columns(rows: Iterable[Row], **shown: str) -> list[Row]:
    """Rows of a table: each column a key of the results, or a text with keys in braces; nothing where a key lacks.

    In the names of columns `_` stands for a space.
    """
    found = []
    for row in rows:
        known = {key: value for key, value in row.items() if value is not None}
        line = {}
        for name, said in shown.items():
            try:
                line[name.replace("_", " ")] = said.format_map(known) if "{" in said else known[said]
            except KeyError:
                line[name.replace("_", " ")] = None
        found.append(line)
    return found


def pivot(rows: Iterable[Row], by: Mapping[str, str], column: str, said: str) -> list[Row]:
    """A row for all results that agree in `by` (shown name: key); `column` and `said` are keys or texts with keys."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        line = found.setdefault(
            tuple(row.get(key) for key in by.values()), {name: row.get(k) for name, k in by.items()}
        )
        where, value = columns([row], where=column, value=said)[0].values()
        line[str(where)] = value
    return list(found.values())


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


def beside(peers: Row, kind: str) -> list[Row]:
    """One kind of sampler on all problems."""
    return [row for row in peers["summary"] if row["kind"] == kind and row.get("calls", 99) <= 30]


@shows("peers")
def peers_ode(peers: Row) -> list[Row]:
    """Distance over floor along the probability flow."""
    shown = {"spread_over_seeds": "ours sd", "best_peer": "peer ratio", "which": "peer"}
    return columns(beside(peers, "ODE"), problem="problem", calls="calls", ours="ours", **shown)


@shows("peers")
def peers_sde(peers: Row) -> list[Row]:
    """The same with noise; ours at eta 1 and 0.5."""
    shown = {"eta_1": "ours", "eta_0.5": "eta 0.5", "spread_over_seeds": "ours sd"}
    return columns(
        beside(peers, "SDE"), problem="problem", calls="calls", **shown, best_peer="peer ratio", which="peer"
    )


@shows("peers")
def peers_rtol(peers: Row) -> list[Row]:
    """Samplers that take a tolerance: distance over floor, and calls."""
    names = ("Algorithm 6", "dpm_adaptive", "dopri5")
    rows = [row for row in peers["summary"] if row.get("sampler") in names]
    rows.sort(key=lambda row: (names.index(row["sampler"]), -row["rtol"]))
    return pivot(rows, {"sampler": "sampler", "rtol": "rtol"}, "problem", "{ratio:.2f} ({nfe:.0f})")


@shows("peers")
def floors(peers: Row) -> list[Row]:
    """What one draw of exact samples has."""
    rows = ({"problem": name} | row for name, row in peers["floors"].items())
    return columns(rows, problem="problem", samples="n", distance_of_exact_samples="floor", spread="{spread:.0%}")


@shows("network")
def network(rows: list[Row]) -> list[Row]:
    """Median distance to the network's own flow, thousandths of the data's range."""
    rows = [row | {"thousandths": 1e3 * row["median"]} for row in rows if "rtol" not in row["solver"]]
    return pivot(rows, {"solver": "solver"}, "{budget} calls", "thousandths")


@shows("seeds")
def seeds(results: Row) -> list[Row]:
    """FID over three seeds, by budget."""
    rows = results["summary"]
    found = pivot(rows, {"sampler": "solver"}, "{mean_nfe:.0f} calls", "{fid:.3f} ± {fid_error:.3f}")
    ten = {row["solver"]: row for row in rows if round(row["mean_nfe"]) == 10}
    for line in found:
        line |= {key: ten.get(line["sampler"], {}).get(key) for key in ("precision", "recall")}
    keys = ("sampler", "8 calls", "10 calls", "36 calls", "precision", "recall")
    return [{key: line.get(key) for key in keys} for line in found]


@shows("digits")
def digits(results: Row) -> list[Row]:
    """Distance over floor of every sampler at about so many calls; bold where it is at the floor."""
    shown, budgets = [], (10, 12, 16, 20, 64, 100, 180, 500, 1000)
    for row in (row for row in results["rows"] if "rtol" not in row["setting"]):
        calls = min(budgets, key=lambda about: abs(about - row["nfe"]))
        solver = re.sub(r"(steps|levels)=\d+(, )?", "", re.sub(r"churn=[\d.]+", "with churn", row["solver"]))
        name = f"`{solver}`" + (f", {row['setting']}" if row["setting"][:3] not in ("", "nfe") else "")
        ratio = f"**{row['ratio']:.2f}**" if row["reached"] else cell(row["ratio"])
        shown.append({"sampler": name, "calls": calls, "ratio": ratio})
    found = sorted(pivot(shown, {"sampler": "sampler"}, "{calls} calls", "ratio"), key=lambda row: row["sampler"])
    return [{key: row.get(key) for key in ("sampler", *(f"{calls} calls" for calls in budgets))} for row in found]


@shows("digits")
def digits_rtol(results: Row) -> list[Row]:
    """The same for samplers that take a tolerance, with their calls."""
    rows = [row for row in results["rows"] if "rtol" in row["setting"]]
    return pivot(rows, {"sampler": "solver"}, "setting", "{ratio:.2f} ({nfe:.0f})")


# Our solver


@shows("ablation_solver")
def weights(rows: list[Row]) -> list[Row]:
    """What each choice of weights adds on equal steps in log-SNR, and ours on other grids."""
    rows = [row for row in rows if "ours," not in row["weights"]]
    rows = [row | {"all": slashed(row[calls] for calls in ("10", "12", "15", "20"))} for row in rows]
    return pivot(rows, {"grid": "grid", "weights": "weights"}, "problem", "all")


@shows("adaptivity")
def tolerances(rows: list[Row]) -> list[Row]:
    """Mean error of each tolerance on the plain grid, and what restarts would change."""
    found = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in some(rows, problem=problem) if "mean" in row]
        line: Row = {"problem": problem, "calls": slashed(row["calls"] for row in own)}
        line["error"] = slashed(row["mean"] for row in own)
        line["start again"] = slashed(f"{row['again']:.0%}" for row in own)
        found.append(line | {"error with restarts / plain": slashed(row.get("ratio, mean") for row in own)})
    return found


@shows("adaptivity")
def restarts(rows: list[Row]) -> list[Row]:
    """Root mean square error with restarts over that of the plain grid at equal mean calls, many samples."""
    rows = [
        row | {"range": " to ".join(map(cell, row["ratio, rms, 95 %"]))} for row in rows if "ratio, rms, 95 %" in row
    ]
    shown = {"mean_calls": "calls with restarts", "error_with_restarts_/_plain": "ratio, rms", "95_%": "range"}
    return columns(rows, problem="problem", rtol="rtol", **shown)


# Fits


@shows("fitted")
def fitted(rows: list[Row]) -> list[Row]:
    """Default, fitted and the best peers: distance on exact problems, error on networks."""
    networks = ("flow", "shifted", "clipped", "packaged")
    rows = [
        r for r in rows if r["measure"] == ("error" if r["problem"] in networks else "distance") and r.get("fitted")
    ]
    said = {"best_peer,_as_many_calls": "{peer:.3g} {who}", "two_calls_more": "{peer at n + 2:.3g} {who at n + 2}"}
    keys = {key: key for key in ("problem", "measure", "calls", "default", "fitted")}
    return columns(rows, **keys, **said, price="price")


@shows("fitted")
def fitted_fid(rows: list[Row]) -> list[Row]:
    """FID of 2000 images of the packaged network."""
    return pivot((row for row in rows if "FID" in row["measure"]), {"": "measure"}, "{calls} calls", "fitted")


@shows("fitted")
def fit_pilots(rows: list[Row]) -> list[Row]:
    """Errors of fits by three different pilots."""
    own = [row for row in some(rows, measure="error") if row.get("third pilots") is not None]
    shown = {"second_pilots": "second pilots", "third_pilots": "third pilots"}
    return columns(own, problem="problem", calls="calls", default="default", first_pilots="fitted", **shown)


@shows("fitted")
def fit_price(rows: list[Row]) -> list[Row]:
    """Errors of fits for several prices."""
    own = [row for row in some(rows, measure="error") if row.get("fitted for 2000") is not None]
    shown = {f"{price:,}_calls": f"fitted for {price}" for price in (2000, 4000, 20000)}
    return columns(own, problem="problem", calls="calls", default="default", **shown, price_by_default="fitted")


@shows("ablation_fit")
def ablation_fit(rows: list[Row]) -> list[Row]:
    """Medians of three pilots, with the least and the most."""
    said = {key: f"{{{key}:.3g}} ({{{key} range[0]:.3g}} to {{{key} range[1]:.3g}})" for key in ("distance", "error")}
    return columns(rows, problem="problem", calls="calls", setting="setting", **said, price="price")


# Algorithm 6 and the thesis


@shows("thesis_nfe")
def algorithm6_calls(results: Row) -> list[Row]:
    """Calls beside the published ones, with the path kept."""
    rows = some(results["nfe"], noise="path kept")
    return pivot(rows, {"rtol": "rtol"}, "{sde}: ours / published", "{ours:.0f} / {published}")


@shows("thesis_nfe")
def algorithm6_law(results: Row) -> list[Row]:
    """Second moment at t_min over its exact value, by thirds of the standard deviations."""
    said = {key: f"{{{key}:.3f}} ± {{{key} +-:.3f}}" for key in ("large", "middle", "small")}
    return columns(results["law"], process="sde", solver="solver", calls="{nfe:.0f}", **said)


@shows("thesis_tables")
def thesis_exact(results: Row) -> list[Row]:
    """Tables 10.1, D.2 and D.3 with an exact score."""
    shown = {"distance_/_floor": "ratio", "published_calls": "published_nfe", "published_FID": "published_fid"}
    return columns(results["rows"], process="process", table="part", method="method", calls="{nfe:.0f}", **shown)


@shows("thesis_network")
def thesis_learned(results: Row) -> list[Row]:
    """Tables 10.1 and D.2 with the packaged network."""
    shown = {"FID": "{fid:.2f} ± {fid_error:.2f}", "published_calls": "published_nfe", "published_FID": "published_fid"}
    return columns(results["rows"], table="part", method="method", setting="setting", calls="{mean_nfe:.0f}", **shown)


@shows("ddim")
def ddim(rows: list[Row]) -> list[Row]:
    """Distance over floor of DDIM on the published table and on the process."""
    shown = {"on_the_published_table": "table_ratio", "on_the_process": "ratio"}
    return columns(rows, calls="calls", **{"error_of_the_half-log-SNR_at_the_end": "half_log_snr_error"}, **shown)


@shows("annealed_steps")
def step_sizes(results: Row) -> list[Row]:
    """Distance over floor, denoised, by step size."""
    rows = sorted(results["rows"], key=lambda row: row["eta"])
    return pivot(rows, {"sampler": "sampler", "n_sigma": "n_sigma"}, "eta {eta:g}", "denoised")


@shows("adversarial_2d")
def points(results: Row) -> list[Row]:
    """Distance to the data by consistent annealed sampling, each seed."""
    said = "{gap_last:.3f} / {gap_denoised:.3f}"
    rows = some(results["rows"], sampler="CAS")
    return pivot(rows, {"data": "data", "training": "training"}, "seed {seed}: last state / denoised", said)


@shows("adversarial_images")
def trainings(results: Row) -> list[Row]:
    """Frechet distance, last state / denoised, at the step size where the latter is least."""
    best: dict[tuple[object, ...], Row] = {}
    for row in sorted(results["rows"], key=lambda row: row["denoised"]):
        best.setdefault(tuple(row[key] for key in ("training", "seed", "sampler", "n_sigma")), row)
    rows = (best[key] for key in sorted(best, key=lambda key: (key[2:], key[0] == "adversarial", key[1])))
    by = {"sampler": "sampler", "n_sigma": "n_sigma"}
    return pivot(rows, by, "{training}, seed {seed}", "{raw:.2f} / {denoised:.2f}")


@shows("latent_autoencoders")
def autoencoders(results: Row) -> list[Row]:
    """Every seed: distances, and KL against the margin."""
    shown = {
        "prior": "{prior:.2f}",
        "reconstructions": "{rec:.2f}",
        "rms error": "{rms:.3f}",
        "KL of data": "{kl:.1f}",
        "of reconstructions": "{kl_reconstructed:.1f}",
        "of samples": "{kl_generated:.1f}",
    }
    rows = [row | {"m": f"{row['margin']:.1f}" if row["kind"] == "IntroVAE" else None} for row in results["rows"]]
    return columns(rows, training="kind", seed="seed", **shown, m="m")


@shows("latent_diffusion")
def latent_diffusion(results: Row) -> list[Row]:
    """FID and time of an image; how many times faster, as the median of pairs."""
    low, high = (1 / v for v in reversed(results["times"]["ratio_interval"]))
    faster = f"{1 / results['times']['ratio']:.0f} times faster ({low:.0f} to {high:.0f})"
    rows = [row | {"fids": slashed(row["fid"])} for row in results["rows"]]
    rows = [row | ({"faster": faster} if row["model"] == "latents" else {}) for row in rows]
    shown = {"ms_an_image": "{ms_per_image:.1f}", "beside_pixels": "{faster}"}
    return columns(rows, model="model", parameters="parameters", FID="fids", **shown)


@shows("latent_flow")
def latent_flow(results: list[Row]) -> list[Row]:
    """Terms and steps, beside sampling alone."""
    shown = {"FID": "{fid:.2f}", "sliced_distance": "{sliced:.3f}"}
    return columns(results, samples="what", steps_of_the_flow="steps", calls="calls", **shown)


# Cost


@shows("overhead")
def overhead(results: Row) -> list[Row]:
    """Time of `sample` over the bare forwards."""
    shown = {"time_/_bare_forwards": "{ratio:.3f}", "interval": "{ratio_interval[0]:.3f} to {ratio_interval[1]:.3f}"}
    return columns(results["runs"], run="run", calls="{nfe:.0f}", **shown)


TABLES["overhead-cuda"] = ("overhead_cuda",), overhead  # on a GPU


@shows("overhead", "overhead_cuda")
def noise(cpu: Row, cuda: Row) -> list[Row]:
    """One increment of noise over one forward of the packaged network."""
    rows = [row | {"where": where} for where, all_of in (("CPU", cpu), ("GPU", cuda)) for row in all_of["noise"]]
    return pivot(rows, {"noise": "noise"}, "where", "{percent:.2g} %")


@shows("batching")
def batching(rows: list[Row]) -> list[Row]:
    """Rows evaluated over rows needed."""
    shown = {"calls,_least_/_mean_/_most": "{nfe[0]} / {nfe[1]:.0f} / {nfe[2]}"}
    shown |= {"rows_evaluated_/_needed": "{rows over needed:.3f}", "waiting_for_the_slowest": "{waiting:.3f}"}
    return columns(rows, problem="problem", **shown)


@shows("loop_overhead")
def loops(rows: list[Row]) -> list[Row]:
    """What a pipeline costs in its own loop."""
    said = {key: f"{{{key}:.2f}} ({{{key} range[0]:.2f}} to {{{key} range[1]:.2f}})" for key in ("ratio", "gain")}
    shown = {"wall_time_/_the_own_loop's": said["ratio"], "gain_of_a_batch_of_four": said["gain"]}
    return columns(rows, **{"class": "class"}, **shown)


@shows("survival")
def survival(results: Row) -> list[Row]:
    """Kills, and two processes."""
    killed, two = results["killed"], results["two_processes"]
    found = {
        "kills": len(killed["kills_after_seconds"]),
        "same bytes as a sweep left alone": all(killed["same_bytes"].values()),
        "throughput of two processes over one, sampling": slashed(two["sampling"]),
        "throughput of two processes over one, whole commands": slashed(two["whole_commands"]),
    }
    return [{"what": key, "found": value} for key, value in found.items()]


@shows("ray_jobs")
def sharing(results: Row) -> list[Row]:
    """Shards whose costs differ, over the best schedule."""
    return [
        {
            "four processes": row["way"],
            "time over the best schedule": slashed(f"{ratio:.2f}" for ratio in row["ratio"]),
            "shards drawn twice": row["drawn_twice"],
        }
        for row in results["skewed"]
    ]


@shows("ray_jobs")
def ray_jobs(results: Row) -> list[Row]:
    """Two workers, kills, and prices."""
    equal, killed, price = results["equal"], results["killed"], results["prices"]
    same = all(part["same_bytes"] for part in (equal, killed, *results["skewed"]))

    def spread(name: str) -> str:
        values = sorted(price[name])
        return f"{statistics.median(values):.2g} ({values[0]:.2g} to {values[-1]:.2g})"

    found = {
        "two workers of Ray, throughput over one process": slashed(f"{ratio:.2f}" for ratio in equal["ratio"]),
        "the same, with the start of the workers": slashed(
            f"{ratio:.2f}" for ratio in equal["ratio_with_the_start_of_workers"]
        ),
        "workers killed in a job of 2,000 samples": killed["kills"],
        "shards begun again for it": killed["shards_begun_again"],
        "machines that joined / left": f"{killed['machines_joined']} / {killed['machines_left']}",
        "same bytes in all jobs": same,
        "start of a cluster on one machine, seconds": price["cluster_start_seconds"],
        "start of a worker, seconds": spread("worker_start_seconds"),
        "a shard that takes no time, ms": spread("written_ms"),
        "the same with a claim, ms": spread("with_a_claim_ms"),
        "the same by a worker of Ray, ms": spread("by_a_worker_ms"),
        "from a worker to the writer, ms per MiB": price["transfer_ms_per_megabyte"],
        "onto the disk, ms per MiB": price["writing_ms_per_megabyte"],
    }
    return [{"what": key, "found": value} for key, value in found.items()]


# Other uses

TABLES |= {"guidance": (("guided_pipeline",), list), "divergences": (("divergences",), list)}


@shows("ode")
def ode(rows: list[Row]) -> list[Row]:
    """Calls of torchdiffeq's dopri5 over ours at equal error."""
    shown = {f"{who}:_{key}": f"{who}: {key}" for key in ("error", "calls") for who in ("ours", "theirs")}
    shown["calls_at_equal_error"] = "calls at equal error"
    return columns(rows, problem="problem", rtol="{rtol:.0e}", **shown)


@shows("likelihood")
def likelihood(results: Row) -> list[Row]:
    """Errors of bits per dimension."""
    shown = {"root_mean_square_error": "rms_error", "stated_error": "standard_error", "covered": "{covered:.1%}"}
    return columns(results["rows"], trace="trace", mean_error="{mean_error:.1e}", **shown)


@shows("posterior")
def posterior(rows: list[Row]) -> list[Row]:
    """Mean / trace / weights / misfit with the larger number of steps."""
    rows = [row for row in rows if row["method"] == "exact" or row["steps"] == 100]
    said = "{mean:.2f} / {trace:.2f} / {weights:.2f} / {misfit:.2f}"
    return pivot(rows, {"method": "method", "calls": "calls"}, "operator", said)


@shows("measurements")
def measurements(rows: list[Row]) -> list[Row]:
    """Largest value / misfit / samples outside."""
    return pivot(rows, {"model": "model"}, "eta {eta:g}", "{largest:.3g} / {misfit:.3g} / {outside}")


@shows("hosts")
def hosts(rows: list[Row]) -> list[Row]:
    """Errors of ours / theirs on a host's levels."""
    rows = [row for row in rows if "sample_dpmpp_2m" in row]
    return pivot(rows, {"levels": "levels"}, "{calls} calls", "{sample_exponential_pc:.3f} / {sample_dpmpp_2m:.3f}")


@shows("hosts")
def hosts_rtol(rows: list[Row]) -> list[Row]:
    """Errors of `sample_adaptive`."""
    return columns(
        (row for row in rows if "sample_adaptive" in row), levels="levels", calls="calls", error="sample_adaptive"
    )


@shows("live")
def live(rows: list[Row]) -> list[Row]:
    """Equality, latency and memory."""
    same, latency, memory = (next(r for r in rows if r["part"] == part) for part in ("same", "latency", "memory"))
    low, high = latency["ratio_interval"]
    found = {
        "requests with mixed settings beside `sample`": same["requests"],
        "the same calls and statuses": same["equal costs"],
        "largest difference of samples": f"{same['worst difference']:.1e}",
        "rows evaluated over rows needed": f"{same['rows']:.3f}",
        "one client: time over that of `sample` (95 % interval)": f"{latency['ratio']:.2f} ({low:.2f} to {high:.2f})",
        "requests while memory was read": f"{memory['requests'] // 10:,} / {memory['requests']:,}",
        "MB after them": f"{memory['MB after a tenth']:.0f} / {memory['MB']:.0f}",
        "tensors alive after them": f"{memory['tensors after a tenth']} / {memory['tensors']}",
    }
    return [{"what": key, "found": value} for key, value in found.items()]


@shows("live")
def live_throughput(rows: list[Row]) -> list[Row]:
    """Beside batches."""
    return [
        {
            "calls": f"5 to {row['most calls']}",
            "time of a call, ms": f"{1e3 * row['a']:g} + {1e3 * row['b']:g} per row",
            "live queue, samples a second": f"{row['samples a second']:.0f}",
            "batches that wait for their slowest": f"{row['in batches']:.0f}",
            "batches that shrink": f"{row['in batches that shrink']:.0f}",
            "gain": f"{row['samples a second'] / row['in batches']:.2f}",
            "latency, live / batches, s": f"{row['latency']:.2f} / {row['latency in batches']:.2f}",
        }
        for row in rows
        if row["part"] == "throughput"
    ]


@shows("soak")
def soak(rows: list[Row]) -> list[Row]:
    """Answers, and what the server holds."""
    return [{"client": r["client"], "answer": r["answer"], "found": f"{r['times']:.4g}"} for r in rows]


@shows("pipelines")
def pipelines(rows: list[Row]) -> list[Row]:
    """All classes."""
    return [{key: value for key, value in row.items() if key not in ("diffusers", "drop-in")} for row in rows]


@shows("pipelines")
def pipelines_count(rows: list[Row]) -> list[Row]:
    """How many classes do what."""
    words = {"right": "right", "refused": "refused", "wrong or failing": ("WRONG", "FAILS")}
    counts = {name: sum(row["in its own loop"].startswith(word) for row in rows) for name, word in words.items()}
    return [{"classes": len(rows)} | counts]


@shows("stability")
def stability(rows: list[Row]) -> list[Row]:
    """Stationary variance over the exact one."""
    by = {"steps": "steps", "elements": "elements"}
    found = pivot(rows, by, "rule", "{variance:.3g} ± {error:.1g}")
    closed = pivot(rows, by, "{rule}, closed form", "closed form")
    return [a | b for a, b in zip(found, closed, strict=True)]


@shows("rejections")
def rejections(rows: list[Row]) -> list[Row]:
    """Error of the mean, and calls."""
    by = {"SDE": "sde", "elements": "elements", "rtol": "rtol"}
    return pivot(rows, by, "steps", "{error:+.4f} ± {standard error:.4f} ({calls:.0f})")


@shows("langevin_2d")
def one_level(rows: list[Row]) -> list[Row]:
    """Distance to the data of last states and of their denoised samples."""
    rows = sorted(rows, key=lambda row: (row["data"] != "swiss roll", row["start"]))
    said = "{gap_last:.3f} / {gap_denoised:.3f}"
    return pivot(rows, {"data": "data", "start": "start"}, "seed {seed}: last state / denoised", said)


@shows("gan_bias")
def estimators(rows: list[Row]) -> list[Row]:
    """Batch estimate over the one with means of 3200 values; in brackets the range over seeds and times."""
    said = "{{{0} half:.4f}} ({{{0} half, range[0]:.4f}} to {{{0} half, range[1]:.4f}})".format
    shown = {"first_half": said("first"), "second_half": said("second")}
    known = {"second_half,_by_the_known_bias": "{second half, known bias:.4f}"}
    return columns(rows, f="f", kind="kind", **shown, **known)


@shows("comparisons")
def comparisons(results: Row) -> list[Row]:
    """Frechet distance, each seed."""
    return results["rows"]


MASKED = "{fid:.2f} / {gini:.2f} / {gap:.2f}"


@shows("gan_masks")
def masks(rows: list[Row]) -> list[Row]:
    """Frechet distance, Gini coefficient and gap, with the same masks in both turns."""
    rows = sorted(some(rows, **{"generator's share": None}), key=lambda row: row["n"])
    return pivot(rows, {"images": "n", "masks": "masks"}, "seed {seed}", MASKED)


@shows("gan_masks")
def mask_ratios(rows: list[Row]) -> list[Row]:
    """The same by the share of pixels masked in the generator's turn."""
    key, own = "generator's share", some(rows, masks="patches and bands", n=min(row["n"] for row in rows))
    own = sorted((row | {key: row[key] or 0.25} for row in own), key=lambda row: row[key])
    return pivot(own, {"share in the generator's turn": key}, "seed {seed}", MASKED)


@shows("modes")
def modes(rows: list[Row]) -> list[Row]:
    """Modes reached of 1000, and the divergence of their shares to uniform ones."""
    return pivot(
        [row | {"seed": row["seed"] or 0} for row in rows],
        {"training": "training"},
        "seed {seed}",
        "{modes} / {KL:.2f}",
    )


@shows("inception")
def inception(rows: list[Row]) -> list[Row]:
    """FID and inception score, before and after."""
    score = "{inception score:.3f} ± {score's sd of splits:.3f}"
    fid, noise = "{fid:.2f} ± {fid error:.2f}", "{noise over signal:.3f}"
    return columns(rows, solver="solver", last_noise=noise, of="of", FID=fid, inception_score=score)


@shows("codebases")
def codebases(rows: list[Row]) -> list[Row]:
    """Lines and names of four parts, here and elsewhere."""
    return rows


def over_seeds(rows: list[Row], *parts: str) -> list[Row]:
    """Means of the cells of parts over their seeds, and the spread of FID."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["part"] in parts:
            cells.setdefault((row["solver"], row["schedule"]), []).append(row)
    found = []
    for (solver, schedule), seeds in cells.items():
        mean = {k: statistics.mean(float(row[k]) for row in seeds) for k in ("calls", "fid", "pairs", "entropy")}
        spread = statistics.stdev(float(row["fid"]) for row in seeds) if len(seeds) > 1 else None
        found.append(
            {
                "solver": f"`{solver}`" if schedule else solver,
                "schedule": {"sine": "sin(pi t / 2)", "linear": "t"}.get(schedule, ""),
                "calls": f"{mean['calls']:.1f}" if mean["calls"] else "",
                "FID": f"{mean['fid']:.3f}" + (f" +- {spread:.3f}" if spread is not None else ""),
                "pairs": f"{mean['pairs']:.3f}",
                "entropy": f"{mean['entropy']:.2f}",
            }
        )
    return found


for name, parts in {
    "tokens-solvers": ("floor", "solvers"),
    "tokens-tuning": ("tuning MaskGIT", "tuning critic"),
    "tokens-tolerance": ("tolerance", "fixed"),
}.items():
    TABLES[name] = ("tokens",), lambda results, parts=parts: over_seeds(results["rows"], *parts)


@shows("tokens")
def tokens_calls(results: Row) -> list[Row]:
    """How many samples take how many calls, in groups of five."""
    found = []
    for row in results["rows"]:
        if row["part"] == "tolerance" and row["seed"] == "0":
            groups: dict[int, int] = {}
            for pair in row["histogram"].split():
                calls, count = map(int, pair.split(":"))
                groups[calls // 5 * 5] = groups.get(calls // 5 * 5, 0) + count
            said = ", ".join(f"{low}-{low + 4}: {count}" for low, count in sorted(groups.items()))
            found.append({"solver": f"`{row['solver']}`", "calls: samples": said})
    return found


@shows("tokens_exact")
def tokens_exact(rows: list[Row]) -> list[Row]:
    """KL and its bound on exact laws."""
    said = {"law": {"table": "no structure", "chain": "Markov chain"}}
    return [
        {
            "law": said["law"][row["law"]],
            "steps": f"rtol {row['setting']:g}" if row["rule"] == "tolerance" else str(row["setting"]),
            "calls": row["calls"],
            "KL": f"{max(row['KL'], 0):.3f}",
            "bound": "" if row["bound"] is None else f"{row['bound']:.3f}",
        }
        for row in sorted(rows, key=lambda row: (row["law"], row["rule"]))
    ]


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
