r"""Fills the tables of README.md and docs/ from results/*.json.

A document holds blocks that begin with `<!-- table: NAME -->` and end with `<!-- /table -->`. `TABLES` has for each
name the results that the table reads, and a function of them; a line under it says their script, processor, commit and
date.

    python benchmarks/tables.py            # prints the blocks that differ
    python benchmarks/tables.py --write    # fills them in
"""

from __future__ import annotations

import json
import re
import statistics
import string
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
Row = dict[str, Any]
Work = Callable[..., list[Row]]
TABLES: dict[str, tuple[tuple[str, ...], Work]] = {}
"""By name: the results that a table reads, and the function of them."""


def result(name: str) -> Row:
    """A stored result with its provenance."""
    found: Row = json.loads((HERE / "results" / f"{name}.json").read_text())
    return found


def source(name: str) -> str:
    """Where a result comes from."""
    record = result(name)
    machine = record["machine"].get("gpu", record["machine"]["cpu"].split("@")[0].strip())
    changed = " with changes" if record["commit"].endswith("-dirty") else ""
    return f"{record['script']}, {machine}, commit {record['commit'][:7]}{changed}, {record['date']}"


def cell(value: object) -> str:
    """Three digits of a number, a list with slashes, nothing for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return " / ".join(cell(one) or "-" for one in value)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


class Cells(string.Formatter):
    """Texts with keys of a row in braces; `{key}` alone is written as a cell."""

    def get_value(self, key: int | str, args: Sequence[Any], row: Any) -> Any:
        return row[str(key)]

    def format_field(self, value: Any, spec: str) -> Any:
        return format(value, spec) if spec else cell(value)


def said(text: str, row: Row) -> object:
    """What a key has in a row, or a text with keys in braces; None where a key lacks."""
    known = {key: value for key, value in row.items() if value is not None}
    try:
        return Cells().vformat(text, (), known) if "{" in text else known[text]
    except KeyError:
        return None


def shaped(rows: Iterable[Row], shown: str) -> list[Row]:
    """Rows of a table with the columns of "name = text | name", where one that stands alone is both.

    A name in brackets is a key or a text with keys, too: rows that agree in the other columns then make one row.
    """
    pairs = [(name, text or name) for name, _, text in (one.partition(" = ") for one in shown.split(" | "))]
    found: dict[object, Row] = {}
    for k, row in enumerate(rows):
        line = {name: said(text, row) for name, text in pairs if not name.startswith("[")}
        more = {str(said(name[1:-1], row)): said(text, row) for name, text in pairs if name.startswith("[")}
        found.setdefault(tuple(line.values()) if more else k, line).update(more)
    return list(found.values())


def table(name: str, shown: str, rows: Callable[..., Iterable[Row]] | None = None, of: str = "") -> None:
    """Adds a table of the rows that a function finds in results; of all rows of the result of its name by default."""
    TABLES[name] = results_of(name, of), lambda *found: shaped((rows or where())(*found), shown)


def facts(name: str, shown: str, row: Callable[..., Row]) -> None:
    """Adds a table of what was found: the one row that a function finds in the result of its name, upright."""

    def work(result: Any) -> list[Row]:
        return [{"what": key, "found": value} for key, value in shaped([row(result)], shown)[0].items()]

    TABLES[name] = results_of(name), work


def results_of(name: str, of: str = "") -> tuple[str, ...]:
    """The names of results, or that of a table's own."""
    return tuple(of.split()) or (name.replace("-", "_"),)


def lines_of(rows: Iterable[Row]) -> str:
    """Rows as a table of Markdown, with all of their keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(name: str) -> str:
    """A table with the line that says where it comes from."""
    results, work = TABLES[name]
    rows = work(*(result(one)["results"] for one in results))
    return f"{lines_of(rows)}\n\n*{'; '.join(map(source, results))}*\n"


def filled(text: str) -> str:
    """A document with its blocks filled in.

    Raises:
        KeyError: if a block has a name that no table has.
    """
    return BLOCK.sub(lambda m: f"{m[1]}{markdown(m[2])}{m[3]}", text)


def documents() -> list[Path]:
    """Everything that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def some(rows: Iterable[Row], *having: str, **equal: object) -> list[Row]:
    """All rows that have something under some keys, and these values under others."""
    rows = [row for row in rows if all(row.get(key) is not None for key in having)]
    return [row for row in rows if all(row.get(key) == value for key, value in equal.items())]


def where(*having: str, part: str = "rows", **equal: object) -> Callable[[Any], list[Row]]:
    """The same as a function of a result, of a list in one of its parts."""
    return lambda results: some(results[part] if isinstance(results, dict) else results, *having, **equal)


# Rows that take more than a filter


def readme(fitted: list[Row], seeds: Row) -> list[Row]:
    """Ours by default and fitted beside the best peer at equal calls, rows where ours is behind among them."""
    found: list[Row] = []
    for problem, shown, measure, calls in (
        ("digits", "digits, exact score", "distance", 6),
        ("digits", "digits, exact score", "distance", 10),
        ("rare", "rare hard samples, exact score", "distance", 6),
        ("flow", "network, MNIST, flow", "error", 8),
        ("clipped", "network, MNIST, DDPM with 100 levels", "error", 6),
        ("packaged", "network, Fashion-MNIST", "error", 15),
    ):
        row = some(fitted, problem=problem, measure=measure, calls=calls)[0]
        found.append({"data": shown, "measure": measure, "calls": calls, "default": row["default"]})
        found[-1] |= {"fitted": of_three(row), "best peer": said("{peer} ({who})", row)}
    summary = {row["solver"]: row["fid"] for row in seeds["summary"] if row["setting"] == "nfe 10"}
    for measure, solver, peer in (
        ("FID of 10,000", "ExponentialPC", "UniPC"),
        ("FID of 10,000, with noise", "ExponentialPC:eta=1", "DPMSolverPP:eta=1"),
    ):
        line = {"data": "network, Fashion-MNIST", "measure": measure, "calls": 10, "default": summary[solver]}
        found.append(line | {"best peer": f"{cell(summary[peer])} ({peer})"})
    return found


def tolerant(peers: Row) -> list[Row]:
    """Samplers that take a tolerance."""
    names = ("Algorithm 6", "dpm_adaptive", "dopri5")
    rows = [row for row in peers["summary"] if row.get("sampler") in names]
    return sorted(rows, key=lambda row: (names.index(row["sampler"]), -row["rtol"]))


def seeds(results: Row) -> list[Row]:
    """FID over three seeds, by budget."""
    shown = "sampler = solver | [{mean_nfe:.0f} calls] = {fid:.3f} ± {fid_error:.3f}"
    ten = {row["solver"]: row for row in results["summary"] if round(row["mean_nfe"]) == 10}
    rows = [line | ten.get(line["sampler"], {}) for line in shaped(results["summary"], shown)]
    return shaped(rows, "sampler | 8 calls | 10 calls | 15 calls | 36 calls | precision | recall")


def digits(results: Row) -> list[Row]:
    """Distance over floor of every sampler at about so many calls; bold where it is at the floor."""
    shown, budgets = [], (10, 12, 16, 20, 64, 100, 180, 500, 1000)
    for row in (row for row in results["rows"] if "rtol" not in row["setting"]):
        calls = min(budgets, key=lambda about: abs(about - row["nfe"]))
        solver = re.sub(r"(steps|levels)=\d+(, )?", "", re.sub(r"churn=[\d.]+", "with churn", row["solver"]))
        name = f"`{solver}`" + (f", {row['setting']}" if row["setting"][:3] not in ("", "nfe") else "")
        ratio = f"**{row['ratio']:.2f}**" if row["reached"] else row["ratio"]
        shown.append({"sampler": name, "calls": calls, "ratio": ratio})
    found = sorted(shaped(shown, "sampler | [{calls:d} calls] = ratio"), key=lambda row: row["sampler"])
    return shaped(found, " | ".join(["sampler", *(f"{calls} calls" for calls in budgets)]))


def tolerances(rows: list[Row]) -> list[Row]:
    """Mean error of each tolerance on the plain grid, and what restarts would change."""
    found = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = some(rows, "mean", problem=problem)
        line: Row = {"problem": problem, "calls": [row["calls"] for row in own], "error": [row["mean"] for row in own]}
        line["start again"] = [f"{row['again']:.0%}" for row in own]
        found.append(line | {"error with restarts / plain": [row.get("ratio, mean") for row in own]})
    return found


def trainings(results: Row) -> list[Row]:
    """Of each training and sampler the step size where the distance of denoised samples is least."""
    best: dict[tuple[object, ...], Row] = {}
    for row in sorted(results["rows"], key=lambda row: row["denoised"]):
        best.setdefault(tuple(row[key] for key in ("training", "seed", "sampler", "n_sigma")), row)
    return [best[key] for key in sorted(best, key=lambda key: (key[2:], key[0] == "adversarial", key[1]))]


def faster(results: Row) -> list[Row]:
    """How many times faster latents are than pixels, as the median of pairs."""
    low, high = (1 / v for v in reversed(results["times"]["ratio_interval"]))
    text = f"{1 / results['times']['ratio']:.0f} times faster ({low:.0f} to {high:.0f})"
    return [row | {"faster": text if row["model"] == "latents" else None} for row in results["rows"]]


def killed(results: Row) -> Row:
    """Kills of a sweep, and two processes."""
    found = {"kills": len(results["killed"]["kills_after_seconds"])}
    return results["two_processes"] | found | {"same": all(results["killed"]["same_bytes"].values())}


def beset(results: Row) -> Row:
    """Kills of workers of Ray, and what two of them bring."""
    equal = results["equal"]
    for key in ("ratio", "ratio_with_the_start_of_workers"):
        equal[key] = [f"{ratio:.2f}" for ratio in equal[key]]
    same = all(part["same_bytes"] for part in (equal, results["killed"], *results["skewed"]))
    return equal | results["killed"] | {"same": same}


def live(rows: list[Row]) -> Row:
    """Equality, latency and memory in one row."""
    memory = some(rows, part="memory")[0]
    of = {"many": memory["requests"], "tenth": memory["requests"] // 10}
    return memory | some(rows, part="latency")[0] | some(rows, part="same")[0] | of


def throughput(rows: list[Row]) -> list[Row]:
    """Beside batches, with times in milliseconds."""
    return [
        row | {"a": 1e3 * row["a"], "b": 1e3 * row["b"], "gain": row["samples a second"] / row["in batches"]}
        for row in some(rows, part="throughput")
    ]


def classes(rows: list[Row]) -> list[Row]:
    """How many pipelines do what."""
    words = {"right": "right", "refused": "refused", "wrong or failing": ("WRONG", "FAILS")}
    return [
        {"classes": len(rows)}
        | {name: sum(row["in its own loop"].startswith(word) for row in rows) for name, word in words.items()}
    ]


def ratios(rows: list[Row]) -> list[Row]:
    """Masks of patches and bands on the fewest images, by the share masked in the generator's turn."""
    key, own = "generator's share", some(rows, masks="patches and bands", n=min(row["n"] for row in rows))
    return sorted((row | {key: row[key] or 0.25} for row in own), key=lambda row: row[key])


def over_seeds(*parts: str) -> Work:
    """Means of the cells of parts of the study of tokens over their seeds, and the spread of FID."""

    def work(results: Row) -> list[Row]:
        cells: dict[tuple[str, str], list[Row]] = {}
        for row in results["rows"]:
            if row["part"] in parts:
                cells.setdefault((row["solver"], row["schedule"]), []).append(row)
        found = []
        for (solver, schedule), runs in cells.items():
            mean = {k: statistics.mean(float(row[k]) for row in runs) for k in ("calls", "fid", "pairs", "entropy")}
            spread = f" +- {statistics.stdev(float(row['fid']) for row in runs):.3f}" if len(runs) > 1 else ""
            row = mean | {"spread": spread, "calls": f"{mean['calls']:.1f}" if mean["calls"] else ""}
            row |= {"solver": f"`{solver}`" if schedule else solver}
            found.append(row | {"schedule": {"sine": "sin(pi t / 2)", "linear": "t"}.get(schedule, "")})
        shown = "solver | schedule | calls | FID = {fid:.3f}{spread} | pairs = {pairs:.3f} | entropy = {entropy:.2f}"
        return shaped(found, shown)

    return work


def of_three(row: Row) -> str | float | None:
    """The mean of the fits of three pilots, the smallest and the largest; the first alone if not all are there."""
    fits = [row[key] for key in ("fitted", "second pilots", "third pilots") if row.get(key) is not None]
    return f"{sum(fits) / 3:.3g} ({min(fits):.3g} to {max(fits):.3g})" if len(fits) == 3 else row["fitted"]


def fids_of_fits(rows: list[Row]) -> list[Row]:
    """The FIDs with the smallest and the largest of the seeds, where there are several."""
    found = []
    for row in rows:
        if "FID" in row["measure"]:
            ends = " ({:.3g} to {:.3g})".format(*row["range"]) if row["range"] else ""
            found.append(row | {"shown": f"{row['fitted']:.3g}{ends}"})
    return found


def exact_tokens(rows: list[Row]) -> list[Row]:
    """KL and its bound on exact laws."""
    laws = {"table": "no structure", "chain": "Markov chain"}
    return [
        row
        | {"law": laws[row["law"]], "KL": max(row["KL"], 0)}
        | {"steps": f"rtol {row['setting']:g}" if row["rule"] == "tolerance" else str(row["setting"])}
        for row in sorted(rows, key=lambda row: (row["law"], row["rule"]))
    ]


def beside(kind: str) -> Callable[[Row], list[Row]]:
    """One kind of sampler on all problems."""
    return lambda peers: [row for row in some(peers["summary"], kind=kind) if row.get("calls", 99) <= 30]


PRICES = " | ".join(f"{price:,} calls = fitted for {price}" for price in (2000, 4000, 20000))
NETWORKS = ("flow", "shifted", "clipped", "packaged")
OVERHEAD = "run | calls = {nfe:.0f} | time / bare forwards = {ratio:.3f} | "
OVERHEAD += "interval = {ratio_interval[0]:.3f} to {ratio_interval[1]:.3f}"

TABLES["readme"] = ("fitted", "seeds"), readme
table(
    "peers-ode",
    "problem | calls | ours | spread over seeds = ours sd | best peer = peer ratio | which = peer",
    beside("ODE"),
    of="peers",
)
table(
    "peers-sde",
    "problem | calls | eta 1 = ours | eta 0.5 | spread over seeds = ours sd | best peer = peer ratio | which = peer",
    beside("SDE"),
    of="peers",
)
table("peers-rtol", "sampler | rtol | [problem] = {ratio:.2f} ({nfe:.0f})", tolerant, of="peers")
table(
    "floors",
    "problem | samples = n | distance of exact samples = floor | spread = {spread:.0%}",
    lambda peers: [{"problem": name} | row for name, row in peers["floors"].items()],
    of="peers",
)
table(
    "packaged",
    "calls | default | equal steps = log-SNR | best peer = peer | which = who",
    where("peer", problem="packaged", measure="error"),
    of="fitted",
)
TABLES["seeds"] = ("seeds",), seeds
TABLES["digits"] = ("digits",), digits
table(
    "digits-rtol",
    "sampler = solver | [setting] = {ratio:.2f} ({nfe:.0f})",
    lambda results: [row for row in results["rows"] if "rtol" in row["setting"]],
    of="digits",
)

# Our solver

table(
    "weights",
    "grid | weights | [problem] = {10} / {12} / {15} / {20}",
    lambda rows: [row for row in rows if "ours," not in row["weights"]],
    of="ablation_solver",
)
TABLES["tolerances"] = ("adaptivity",), tolerances
table(
    "restarts",
    "problem | rtol | mean calls = calls with restarts | error with restarts / plain = ratio, rms "
    "| 95 % = {ratio, rms, 95 %[0]} to {ratio, rms, 95 %[1]}",
    where("ratio, rms, 95 %"),
    of="adaptivity",
)

# Fits

table(
    "fitted",
    "problem | measure | calls | default | fitted = fits | best peer, as many calls = {peer:.3g} {who} "
    "| two calls more = {peer at n + 2:.3g} {who at n + 2} | price",
    lambda rows: [
        row | {"fits": of_three(row)}
        for row in some(rows, "fitted")
        if row["measure"] == ("error" if row["problem"] in NETWORKS else "distance")
    ],
)
table(
    "fitted-fid",
    " = measure | [{calls} calls] = shown",
    fids_of_fits,
    of="fitted",
)
table(
    "fit-pilots",
    "problem | calls | default | first pilots = fitted | second pilots | third pilots",
    where("third pilots", measure="error"),
    of="fitted",
)
table(
    "fit-price",
    f"problem | calls | default | {PRICES} | price by default = fitted",
    where("fitted for 2000", measure="error"),
    of="fitted",
)
table(
    "fit-many",
    "problem | calls | default | fitted | fitted with 512 pilots = many pilots "
    "| best peer, two calls more = {peer at n + 2:.3g} {who at n + 2} | price of 512 pilots = many cost",
    where("many pilots", measure="distance"),
    of="fitted",
)
table(
    "ablation-fit",
    "problem | calls | setting | distance = {distance:.3g} ({distance range[0]:.3g} to {distance range[1]:.3g}) "
    "| error = {error:.3g} ({error range[0]:.3g} to {error range[1]:.3g}) | price",
)

# Algorithm 6 and the thesis

table(
    "algorithm6-calls",
    "rtol | [{sde}: ours / published] = {ours:.0f} / {published}",
    where(part="nfe", noise="path kept"),
    of="thesis_nfe",
)
table(
    "algorithm6-law",
    "process = sde | solver | calls = {nfe:.0f} | large = {large:.3f} ± {large +-:.3f} "
    "| middle = {middle:.3f} ± {middle +-:.3f} | small = {small:.3f} ± {small +-:.3f}",
    where(part="law"),
    of="thesis_nfe",
)
table(
    "thesis-exact",
    "process | table = part | method | calls = {nfe:.0f} | distance / floor = ratio "
    "| published calls = published_nfe | published FID = published_fid",
    of="thesis_tables",
)
table(
    "thesis-learned",
    "table = part | method | setting | calls = {mean_nfe:.0f} | FID = {fid:.2f} ± {fid_error:.2f} "
    "| published calls = published_nfe | published FID = published_fid",
    of="thesis_network",
)
table(
    "step-sizes",
    "sampler | n_sigma | [eta {eta:g}] = denoised",
    lambda results: sorted(results["rows"], key=lambda row: row["eta"]),
    of="annealed_steps",
)
table("rejections", "SDE = sde | elements | rtol | [steps] = {error:+.4f} ± {standard error:.4f} ({calls:.0f})")
table(
    "points",
    "data | training | [seed {seed}: last state / denoised] = {gap_last:.3f} / {gap_denoised:.3f}",
    where(sampler="CAS"),
    of="adversarial_2d",
)
table(
    "one-level",
    "data | start | [seed {seed}: last state / denoised] = {gap_last:.3f} / {gap_denoised:.3f}",
    lambda rows: sorted(rows, key=lambda row: (row["data"] != "swiss roll", row["start"])),
    of="langevin_2d",
)
table(
    "trainings",
    "sampler | n_sigma | [{training}, seed {seed}] = {raw:.2f} / {denoised:.2f}",
    trainings,
    of="adversarial_images",
)
table(
    "inception",
    "solver | last noise = {noise over signal:.3f} | of | FID = {fid:.2f} ± {fid error:.2f} "
    "| inception score = {inception score:.3f} ± {score's sd of splits:.3f}",
)
TABLES["divergences"] = ("divergences",), list
table(
    "estimators",
    "f | kind | first half = {first half:.4f} ({first half, range[0]:.4f} to {first half, range[1]:.4f}) "
    "| second half = {second half:.4f} ({second half, range[0]:.4f} to {second half, range[1]:.4f}) "
    "| second half, by the known bias = {second half, known bias:.4f}",
    of="gan_bias",
)
TABLES["comparisons"] = ("comparisons",), where()
table(
    "masks",
    "images = n | masks | [seed {seed}] = {fid:.2f} / {gini:.2f} / {gap:.2f}",
    lambda rows: sorted(some(rows, **{"generator's share": None}), key=lambda row: row["n"]),
    of="gan_masks",
)
table(
    "mask-ratios",
    "share in the generator's turn = generator's share | [seed {seed}] = {fid:.2f} / {gini:.2f} / {gap:.2f}",
    ratios,
    of="gan_masks",
)
table(
    "modes",
    "training | [seed {seed}] = {modes} / {KL:.2f}",
    lambda rows: [row | {"seed": row["seed"] or 0} for row in rows],
)

# Latents and tokens

table(
    "autoencoders",
    "training = kind | seed | prior = {prior:.2f} | reconstructions = {rec:.2f} | rms error = {rms:.3f} "
    "| KL of data = {kl:.1f} | of reconstructions = {kl_reconstructed:.1f} | of samples = {kl_generated:.1f} "
    "| m = {m:.1f}",
    lambda results: [row | ({"m": row["margin"]} if row["kind"] == "IntroVAE" else {}) for row in results["rows"]],
    of="latent_autoencoders",
)
table(
    "latent-diffusion",
    "model | parameters | FID = fid | ms an image = {ms_per_image:.1f} | beside pixels = faster",
    faster,
)
table(
    "latent-flow",
    "samples = what | steps of the flow = steps | calls | FID = {fid:.2f} | sliced distance = {sliced:.3f}",
)
TABLES["tokens-solvers"] = ("tokens",), over_seeds("floor", "solvers")
TABLES["tokens-tuning"] = ("tokens",), over_seeds("tuning MaskGIT", "tuning critic")
TABLES["tokens-tolerance"] = ("tokens",), over_seeds("tolerance", "fixed")
table("tokens-exact", "law | steps | calls | KL = {KL:.3f} | bound = {bound:.3f}", exact_tokens)

# Cost

table("overhead", OVERHEAD, where(part="runs"))
table("overhead-cuda", OVERHEAD, where(part="runs"))
table(
    "noise",
    "noise | [where] = {percent:.2g} %",
    lambda cpu, gpu: [row | {"where": where} for where, part in (("CPU", cpu), ("GPU", gpu)) for row in part["noise"]],
    of="overhead overhead_cuda",
)
table(
    "batching",
    "problem | calls, least / mean / most = {nfe[0]} / {nfe[1]:.0f} / {nfe[2]} "
    "| rows evaluated / needed = {rows over needed:.3f} | waiting for the slowest = {waiting:.3f}",
)
table(
    "loops",
    "class | wall time / the own loop's = {ratio:.2f} ({ratio range[0]:.2f} to {ratio range[1]:.2f}) "
    "| gain of a batch of four = {gain:.2f} ({gain range[0]:.2f} to {gain range[1]:.2f})",
    of="loop_overhead",
)
facts(
    "survival",
    "kills | same bytes as a sweep left alone = same | throughput of two processes over one, sampling = sampling "
    "| throughput of two processes over one, whole commands = whole_commands",
    killed,
)
table(
    "sharing",
    "four processes = way | time over the best schedule = ratio | shards drawn twice = drawn_twice",
    lambda results: [row | {"ratio": [f"{ratio:.2f}" for ratio in row["ratio"]]} for row in results["skewed"]],
    of="ray_jobs",
)
facts(
    "ray-jobs",
    "two workers of Ray, throughput over one process = ratio "
    "| the same, with the start of the workers = ratio_with_the_start_of_workers "
    "| workers killed in a job of 2,000 samples = kills | shards begun again for it = shards_begun_again "
    "| machines that joined / left = {machines_joined} / {machines_left} | same bytes in all jobs = same",
    beset,
)
facts(
    "live",
    "requests with mixed settings beside `sample` = requests | the same calls and statuses = equal costs "
    "| largest difference of samples = {worst difference:.1e} | rows evaluated over rows needed = {rows:.3f} "
    "| one client: time over that of `sample` (95 % interval) "
    "= {ratio:.2f} ({ratio_interval[0]:.2f} to {ratio_interval[1]:.2f}) "
    "| requests while memory was read = {tenth} / {many} | MB after them = {MB after a tenth:.0f} / {MB:.0f} "
    "| tensors alive after them = {tensors after a tenth:d} / {tensors:d}",
    live,
)
table(
    "live-throughput",
    "calls = 5 to {most calls} | time of a call, ms = {a:g} + {b:g} per row "
    "| live queue, samples a second = {samples a second:.0f} "
    "| batches that wait for their slowest = {in batches:.0f} | batches that shrink = {in batches that shrink:.0f} "
    "| gain = {gain:.2f} | latency, live / batches, s = {latency:.2f} / {latency in batches:.2f}",
    throughput,
    of="live",
)
table("soak", "client | answer | found = {times:.4g}")

# Other uses

TABLES["guidance"] = ("guided_pipeline",), list
TABLES["pipelines"] = (
    ("pipelines",),
    lambda rows: [{k: v for k, v in row.items() if k not in ("diffusers", "drop-in")} for row in rows],
)
TABLES["pipelines-count"] = ("pipelines",), classes
table(
    "ode",
    "problem | rtol = {rtol:.0e} | ours: error | theirs: error | ours: calls | theirs: calls | calls at equal error",
)
table(
    "likelihood",
    "trace | mean error = {mean_error:.1e} | root mean square error = rms_error | stated error = standard_error "
    "| covered = {covered:.1%}",
)
table(
    "posterior",
    "method | calls | [operator] = {mean:.2f} / {trace:.2f} / {weights:.2f} / {misfit:.2f}",
    lambda rows: [row for row in rows if row["method"] == "exact" or row["steps"] == 100],
)
table(
    "hosts", "levels | [{calls} calls] = {sample_exponential_pc:.3f} / {sample_dpmpp_2m:.3f}", where("sample_dpmpp_2m")
)
table("hosts-rtol", "levels | calls | error = sample_adaptive", where("sample_adaptive"), of="hosts")
TABLES["codebases"] = ("codebases",), list


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
