"""The whole evidence for pruning a model on simulated tasks, in one command that can be interrupted.

    python -m lab.bench.prune --out out/prune                                      # the five temporal tasks
    python -m lab.bench.prune --tasks moving_direction --holdout 200 --out out/md  # a quick look
    python -m lab.bench.prune --model planted:plain --out out/plain --more-frames 0   # a model whose circuit is known

1 three searches on three draws of calibration items, and how far their policies agree   2 the first policy beside every
baseline on `--table` held-out items   3 the first policy, the paper's scaled one and the two earliest exits that may do on
all `--holdout` items: the claim; and policies that the search passed on its way, which cut less   4 the policy at 12 and 16 frames   5 with `--by-task`, what each task alone needs   6 `report.json` with every number, and whether it meets what is aimed at;
pictures. Journals lie in the folder: the same command goes on where it stopped. Calibration and held-out items are
drawn with different seeds, and items that happen to be equal are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lab.bench.measuring import setting, write
from lab.carriers import VideoQA
from lab.edges import presets
from lab.edges.curves import curve_of
from lab.edges.evidence import evaluate, overlap, video_key
from lab.edges.found import ladder
from lab.edges.policy import Policy
from lab.edges.searching import Found, search
from lab.model.zoo import load
from lab.result import Result
from lab.sim.planted import planted_model, questions
from lab.sim.tasks import TEMPORAL, draw_items
from lab.view.draw import save
from probes.prune import DRAWN, liveness, proven, unit_map

PLANTED = "planted"
SEED, TEST_SEED = 1000, 9
AIMS = {"kept_video": 0.25, "drop_bound": 0.01, "flips": 0.03, "forwards_per_item": 80.0}
EXTRA_FRAMES = (12, 16)
RUNGS = 10
SHARES = (0.25, 0.5, 0.75)
FAR = 0.05  # an exit that loses more in the table is not tried on all held-out items


def model_of(name: str) -> Any:
    """A model by its name; `planted:plain` and the like are those of `lab.sim.planted`."""
    kind, _, variant = name.partition(":")
    return planted_model(variant) if kind == PLANTED else load(name)  # type: ignore[arg-type]


def drawn(task: str, n: int, seed: int, **kw: Any) -> list[VideoQA]:
    """`n` questions of a task, or of the planted models."""
    return questions(n, seed, steady=False) if task == PLANTED else draw_items(task, n, seed, **kw)


def calibration(tasks: Sequence[str], n: int, seed: int) -> list[VideoQA]:
    """About `n` items, the same number of every task."""
    each = -(-n // len(tasks))
    return [item for task in tasks for item in drawn(task, each, SEED + seed)]


def holdout(tasks: Sequence[str], n: int, taken: Sequence[VideoQA], **kw: Any) -> list[VideoQA]:
    """About `n` other items; those whose video and question were calibrated on are left out."""
    known = {_name(i) for i in taken}
    each = -(-n // len(tasks))
    items = (item for task in tasks for item in drawn(task, each, TEST_SEED, **kw))
    return [item for item in items if _name(item) not in known]


def _name(item: VideoQA) -> tuple[str, str, tuple[str, ...]]:
    return video_key(item), item.question, item.options


def searched(model: Any, items: Sequence[VideoQA], args: argparse.Namespace, out: Path) -> Found:
    """One search as the arguments say, journalled."""
    return search(
        model, list(items), budget={"kl": args.kl, "flips": args.flips, "forwards": AIMS["forwards_per_item"]},
        roles="portable" if args.portable else "all", finer=tuple(args.finer), method=args.method, worth=args.worth,
        out=out,
    )  # fmt: skip


def searches(model: Any, args: argparse.Namespace, out: Path) -> dict[str, Found]:
    """One search for every seed."""
    items = {seed: calibration(args.tasks, args.calibration, seed) for seed in range(args.seeds)}
    return {f"seed {s}": searched(model, some, args, out / f"search-{s}") for s, some in items.items()}


def by_task(model: Any, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What each task alone needs: a policy of its own, measured on other questions of that task."""
    found: dict[str, Any] = {}
    for task in args.tasks if args.by_task else ():
        items = calibration([task], args.by_task, 0)
        policy, trail = searched(model, items, args, out / f"task-{task}")
        tested = holdout([task], args.holdout // len(args.tasks), items)
        told = evaluate(model, policy, tested, "none", out=out / f"task-{task}-held")
        part = told.select(task="all", policy="policy")
        numbers = dict(zip(part.coords["measure"], part.values.tolist(), strict=True))
        found[task] = {"items": len(tested), **numbers, **_search(Found(policy, trail))}
        policy.save(out / f"task-{task}.yaml")
    return found


def claim(model: Any, policy: Policy, items: Sequence[VideoQA], table: Result, out: Path) -> Result:
    """The policy, the paper's scaled one and the exits that may be the best, on all held-out items."""
    n = model.cfg.n_layers
    rivals = {"7b/strict": presets.paper("7b", "strict", n)}
    exits = {f"video-exit/{i}": presets.video_exit(i, n) for i in near_exits(table, n)}
    return evaluate(model, policy, list(items), {**rivals, **exits}, out=out / "claim")


def earlier(found: Found) -> dict[str, Policy]:
    """Policies the search passed on its way, when it had used a quarter, half and three quarters of its KL in the end."""
    policy, trail = found
    taken = trail.select(measure="accepted").values > 0
    kl = trail.select(measure="kl").values[taken].tolist()
    rungs, out = ladder(policy, trail), dict[str, Policy]()
    for share in SHARES:
        within = [i for i, k in enumerate(kl[:-1]) if k <= share * kl[-1]]
        out |= {f"search/kl {share:g}": rungs[within[-1]]} if within else {}
    return out


def near_exits(table: Result, n_layers: int) -> list[int]:
    """The two earliest exits whose accuracy in the table is not far from the full model's: those earlier lose too much."""
    part = table.select(task="all", measure="accuracy")
    full = float(part.select(policy="full").values)
    known = [i for i in range(1, n_layers) if f"video-exit/{i}" in part.coords["policy"]]
    good = [i for i in known if float(part.select(policy=f"video-exit/{i}").values) >= full - FAR]
    return good[:2] or known[-1:]


def verdict(told: Result, trail: Result) -> dict[str, Any]:
    """Every number that was aimed at, and whether it was met."""
    part = told.select(task="all")

    def of(policy: str, measure: str) -> float:
        return float(part.select(policy=policy, measure=measure).values)

    got = {
        m: of("policy", m) for m in ("kept_video", "drop_bound", "flips", "kept", "kept_live", "kl", "drop")
    }
    got["forwards_per_item"] = float(trail.notes["forwards_per_item"])
    exit_ = _least_exit(part)
    return {
        **got, "items": told.notes["n"]["item"], "paper_live": of("7b/strict", "kept_live"), "exit": exit_,
        "met": {
            **{name: got[name] <= most for name, most in AIMS.items()},
            "fewer live edges than the scaled paper policy": got["kept_live"] < of("7b/strict", "kept_live"),
            "fewer live edges than the best exit": exit_ is not None and got["kept_live"] < exit_["kept_live"],
        },
    }  # fmt: skip


def _least_exit(part: Result) -> dict[str, Any] | None:
    """The exit with fewest live edges whose accuracy bound meets the same aim; the full model if none does."""
    rows = [(float(part.select(policy=p, measure="kept_live").values), p) for p in part.coords["policy"] if p == "full" or "exit" in p]  # fmt: skip
    good = [
        r for r in rows if float(part.select(policy=r[1], measure="drop_bound").values) <= AIMS["drop_bound"]
    ]
    return {"kept_live": min(good)[0], "name": min(good)[1]} if good else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Search, evidence and export of a pruning policy on simulated tasks."
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", nargs="+", help="default: the five temporal tasks")
    parser.add_argument(
        "--calibration", type=int, default=160, help="calibration items of each search, all tasks together"
    )
    parser.add_argument("--seeds", type=int, default=3, help="searches, each on its own calibration items")
    parser.add_argument("--holdout", type=int, default=5000, help="held-out items of the claim")
    parser.add_argument(
        "--table", type=int, default=250, help="held-out items of the table with every baseline"
    )
    parser.add_argument(
        "--more-frames", type=int, default=200, help="held-out items at 12 and 16 frames each; 0: none"
    )
    parser.add_argument(
        "--by-task", type=int, default=0, help="calibration items of a search for each task; 0: none"
    )
    parser.add_argument("--kl", type=float, default=0.03)
    parser.add_argument("--flips", type=float, default=0.03)
    parser.add_argument("--finer", nargs="*", default=["head", "distance"])
    parser.add_argument("--worth", type=float, default=0.0009, help="units of a smaller share are not parted")
    parser.add_argument("--method", default="knapsack", choices=("knapsack", "acdc", "greedy"))
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--out", default="out/prune")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out, model = Path(args.out), model_of(args.model)
    args.tasks = args.tasks or ([PLANTED] if args.model.startswith(PLANTED) else list(TEMPORAL))
    found = searches(model, args, out)
    policy, trail = found["seed 0"]
    for name, f in found.items():  # at once: the evaluation takes long
        f.policy.save(out / f"{name.replace(' ', '-')}.yaml")
    taken = [i for seed in range(args.seeds) for i in calibration(args.tasks, args.calibration, seed)]
    tested = holdout(args.tasks, args.holdout, taken)
    every = max(1, len(ladder(policy, trail)) // RUNGS)
    table = evaluate(model, policy, tested[:: max(1, len(tested) // args.table)], curve=ladder(policy, trail)[::every], out=out / "table")  # fmt: skip
    told = claim(model, policy, tested, table, out)
    on_the_way = evaluate(model, policy, tested, earlier(found["seed 0"]), out=out / "earlier")
    ready = model.prepare(tested[0])
    c = model.cfg
    pictures = {
        "curve": curve_of(table),
        "units": unit_map(policy, model, ready),
        "live": liveness(policy, model, ready),
    }
    if len(found) > 1:
        same = overlap(
            {n: f.policy for n, f in found.items()}, ready.maps[0], c.n_layers, c.n_heads, ready.item
        )
        pictures["overlap"] = same
    longer = {
        f"{f} frames": evaluate(
            model,
            policy,
            holdout(args.tasks, args.more_frames, [], frames=f),
            "none",
            n_frames=f,
            out=out / f"frames-{f}",
        )
        for f in EXTRA_FRAMES
        if args.more_frames
    }
    for name, r in {
        **pictures,
        "table": table,
        "claim": told,
        "earlier": on_the_way,
        "trail": trail,
        **longer,
    }.items():
        r.save(out / f"{name.replace(' ', '-')}.npz")
    for name, r in pictures.items():
        save(r, out / f"{name}.png", **DRAWN[name])
    proven(policy, told).save(out / "policy.yaml")
    write(out / "report.json", {
        "setting": setting(model.device), "args": vars(args), "verdict": verdict(told, trail),
        "searches": {n: _search(f) for n, f in found.items()}, "overlap": pictures["overlap"].values.tolist() if "overlap" in pictures else None,
        "areas": {k: {"cpr": v["cpr"], "cmd": v["cmd"]} for k, v in table.notes["curves"].items()},
        "frames": {n: _accuracies(r) for n, r in longer.items()}, "tasks": _by_task(told), "earlier": _by_policy(on_the_way), "by_task": by_task(model, args, out), "table": _by_policy(table),
    })  # fmt: skip


def _search(found: Found) -> dict[str, Any]:
    notes = found.trail.notes
    kept = ("complete", "stopped", "caution", "forwards_per_item", "naive_per_item")
    return {
        **{k: notes[k] for k in kept},
        "count": found.policy.count_.model_dump(),
        "policy": found.policy.id,
    }


def _accuracies(r: Result) -> dict[str, float]:
    return {p: float(r.select(policy=p, task="all", measure="accuracy").values) for p in r.coords["policy"]}


def _by_task(r: Result) -> dict[str, Any]:
    part = r.select(policy="policy")
    return {t: dict(zip(part.coords["measure"], row.tolist(), strict=True)) for t, row in zip(part.coords["task"], part.values, strict=True)}  # fmt: skip


def _by_policy(r: Result) -> dict[str, Any]:
    part = r.select(task="all")
    rows = zip(part.coords["policy"], part.values, strict=True)
    return {p: {m: None if v != v else v for m, v in zip(part.coords["measure"], row.tolist(), strict=True)} for p, row in rows}  # fmt: skip


if __name__ == "__main__":
    main()
