"""A contact sheet of one simulated item: `python -m lab.sim.show TASK --seed S --out FILE.png`.

Upper row the clip, lower row its twin; frames in which they differ are framed. Below: question, options, answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lab.carriers import LETTERS, VideoQA
from lab.errors import LabError, UsageError
from lab.sim.stage import FPS, Knobs
from lab.sim.tasks import TASKS, draw_items

ZOOM, GAP, LEFT, LINE = 2, 6, 62, 22
PAPER, TEXT, MARK = (255, 255, 255), (25, 25, 25), (200, 60, 20)


def contact_sheet(item: VideoQA) -> Image.Image:
    """The picture of an item with a twin. Raises UsageError for one without."""
    if item.twin is None:
        raise UsageError("this item has no twin to show beside it")
    lines = _caption(item, item.twin)
    n, side = len(item.video), 64 * ZOOM
    width, top = LEFT + n * (side + GAP), LINE + 4
    sheet = Image.new("RGB", (max(width, 760), top + 2 * (side + GAP) + LINE * len(lines) + 16), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    differs = (item.video != item.twin.video).any((1, 2, 3))
    for row, one in enumerate((item, item.twin)):
        y = top + row * (side + GAP)
        draw.text((6, y + side // 2 - 9), ("clip", "twin")[row], TEXT, font)
        for t, picture in enumerate(one.video):
            x = LEFT + t * (side + GAP)
            if row and differs[t]:
                draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), fill=MARK)
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
            if not row:
                draw.text((x, 5), f"{t}: {t / FPS:.3g} s", TEXT, font)
    for i, (text, colour) in enumerate(lines):
        draw.text((6, top + 2 * (side + GAP) + 6 + i * LINE), text, colour, font)
    return sheet


def _caption(item: VideoQA, twin: VideoQA) -> list[tuple[str, tuple[int, int, int]]]:
    options = [f"({LETTERS[i]}) {o}" for i, o in enumerate(item.options)]
    said = [options[int(q.answer or 0)] if options else str(q.answer) for q in (item, twin)]
    changed = float((item.video != twin.video).any(-1).mean())
    frames = int((item.video != twin.video).any((1, 2, 3)).sum())
    return [
        (f"{item.id}:  {item.question}", TEXT),
        ("     ".join(options) if options else "(open question)", TEXT),
        (f"clip: {said[0]}       twin: {said[1]}", MARK),
        (
            f"the twin differs in {changed:.1%} of all pixels, in {frames} of {len(item.video)} frames (framed)",
            TEXT,
        ),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A contact sheet of one simulated item.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, default=0, help="which item of the seed")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    for name, kind in (("distractors", int), ("noise", int), ("camera", int), ("static", float)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Knobs, name))
    a = parser.parse_args()
    knobs = {"distractors": a.distractors, "noise": a.noise, "camera": a.camera, "static": a.static}
    try:
        item = draw_items(a.task, a.index + 1, a.seed, frames=a.frames, **knobs)[a.index]
    except LabError as e:
        parser.error(str(e))
    contact_sheet(item).save(a.out)
    print(f"{a.out}: {item.question}")


if __name__ == "__main__":
    main()
