"""What a bundled model can do: accuracy by task, on twins, and on videos that should not be answerable.

    python -m lab.learn.table                                    # prints the table of `tiny`, 1,000 items a task
    python -m lab.learn.table --model tiny-image --n 200
    python -m lab.learn.table --write                            # and writes it into training.json and README.md

Accuracy is the share of items whose right letter has the highest probability among the item's option letters. The items
are drawn with a seed that training never uses.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from lab.carriers import LETTERS, VideoQA
from lab.learn.tiny_checks import Clips
from lab.learn.tiny_data import FRAMES, Prompts, shrink, to_pixels
from lab.model.zoo import DATA, load
from lab.sim.ceilings import ceilings_of
from lab.sim.stills import FACTS
from lab.sim.stills import items as fact_items
from lab.sim.tasks import TEMPORAL, draw_items
from lab.sim.turning import backwards

SEED = 424_242
README = Path(__file__).parents[2] / "README.md"
Numbers = dict[str, float]


@torch.no_grad()
def accuracy(hf: Any, prompts: Prompts, asked: Sequence[VideoQA], clips: Clips) -> float:
    """Share of items whose letter is the likeliest of their option letters. clips: [item, frame, 32, 32, 3]."""
    right = 0
    for i in range(0, len(asked), 50):
        part = asked[i : i + 50]
        ids = torch.cat([prompts.whole(item) for item in part])
        out = hf(
            input_ids=ids, pixel_values_videos=to_pixels(clips[i : i + 50]), use_cache=False, logits_to_keep=1
        )
        letters = prompts.word(list(LETTERS[: len(part[0].options)]))
        picks = out.logits[:, -1, letters].argmax(-1).tolist()
        right += sum(int(p == item.answer) for p, item in zip(picks, part, strict=True))
    return right / len(asked)


def shown(items: Sequence[VideoQA]) -> Clips:
    """The items' clips at the tower's size."""
    return np.stack([shrink(item.video) for item in items])


def task_row(hf: Any, prompts: Prompts, task: str, n: int, seed: int = SEED) -> Numbers:
    """One row of the table: accuracies on `n` items of a task, and the ceilings beside them."""
    asked = draw_items(task, n, seed)
    clips, ceiling = shown(asked), ceilings_of(task)
    twins = [item.twin for item in asked if item.twin is not None]
    turned = [backwards(item) for item in asked]
    rng = np.random.default_rng(seed)
    shuffled = np.stack([clip[rng.permutation(len(clip))] for clip in clips])
    blank = np.broadcast_to(rng.integers(0, 256, (n, 1, 1, 1, 1), dtype=np.uint8), clips.shape).copy()
    still = np.stack(
        [clip[[k] * FRAMES] for clip, k in zip(clips, rng.integers(FRAMES, size=n), strict=True)]
    )
    return {
        "clean": accuracy(hf, prompts, asked, clips),
        "twins": accuracy(hf, prompts, twins, shown(twins)),
        "reversed": accuracy(hf, prompts, turned, shown(turned)),
        "shuffled": accuracy(hf, prompts, asked, shuffled),
        "shuffled_ceiling": ceiling.bag,
        "one_frame": accuracy(hf, prompts, asked, still),
        "one_frame_ceiling": ceiling.frame,
        "blank": accuracy(hf, prompts, asked, blank),
        "blank_ceiling": ceiling.blank,
    }


def fact_row(hf: Any, tokenizer: Any, fact: str, n: int, seed: int = SEED) -> Numbers:
    """Accuracy on `n` questions of a single-frame fact: one frame, and the same frame eight times."""
    one, eight = (fact_items(fact, n, seed, frames=f) for f in (1, FRAMES))
    return {
        "one_frame": accuracy(hf, Prompts(tokenizer, 1), one, shown(one)),
        "still_clip": accuracy(hf, Prompts(tokenizer), eight, shown(eight)),
    }


def measure(name: str | Path, n: int) -> dict[str, dict[str, Numbers]]:
    """All rows for a model of the bundled kind: {"tasks": {task: numbers}, "facts": {fact: numbers}}."""
    model = load(name, verify=False)
    prompts = Prompts(model.tokenizer)
    tasks = {t: task_row(model.hf, prompts, t, n) for t in tqdm(TEMPORAL, desc="tasks", leave=False)}
    facts = {f: fact_row(model.hf, model.tokenizer, f, n) for f in tqdm(FACTS, desc="facts", leave=False)}
    return {"tasks": tasks, "facts": facts}


# ---- as markdown ----

COLUMNS: tuple[tuple[str, Callable[[Numbers], str]], ...] = (
    ("right", lambda r: _percent(r["clean"])),
    ("twins", lambda r: _percent(r["twins"])),
    ("backwards", lambda r: _percent(r["reversed"])),
    ("frames shuffled (ceiling)", lambda r: f"{_percent(r['shuffled'])} ({_percent(r['shuffled_ceiling'])})"),
    ("one frame (ceiling)", lambda r: f"{_percent(r['one_frame'])} ({_percent(r['one_frame_ceiling'])})"),
    ("blank (ceiling)", lambda r: f"{_percent(r['blank'])} ({_percent(r['blank_ceiling'])})"),
)


def markdown(rows: Mapping[str, Numbers]) -> str:
    """The table of tasks, in per cent."""
    head = ["task", *(name for name, _ in COLUMNS)]
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{task}`", *(show(row) for _, show in COLUMNS)] for task, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def into(text: str, name: str, table: str) -> str:
    """`text` with the table between its markers `<!-- table: name -->` and `<!-- end -->` replaced."""
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


def write(name: str, found: dict[str, Any], n: int) -> None:
    """Store the numbers beside the weights, and the table in the README where it has a place for it."""
    file = DATA / name / "training.json"
    report = json.loads(file.read_text()) | {"table": {"items": n, "seed": SEED, **_rounded(found)}}
    file.write_text(json.dumps(report, indent=2) + "\n")
    README.write_text(into(README.read_text(), name, markdown(found["tasks"])))


def _rounded(found: Any) -> Any:
    return {k: _rounded(v) for k, v in found.items()} if isinstance(found, dict) else round(found, 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy of a bundled model by task, with controls.")
    parser.add_argument("--model", default="tiny", help="tiny, tiny-image, or a folder that lab.learn wrote")
    parser.add_argument("--n", type=int, default=1000, help="items a task")
    parser.add_argument(
        "--write", action="store_true", help="into the model's training.json and the README (a checkout's)"
    )
    args = parser.parse_args()
    found = measure(args.model, args.n)
    print(markdown(found["tasks"]))
    print(json.dumps(_rounded(found["facts"]), indent=2))
    if args.write:
        write(args.model, found, args.n)


if __name__ == "__main__":
    main()
