"""`vlab trace` and `vlab demo`: ask, cut attention pathways layer by layer, and write down where the answer comes from."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.cli.asking import Setting, choice, choice_text
from lab.cli.output import Reply, folder_for
from lab.errors import UsageError

if TYPE_CHECKING:
    from lab.carriers import VideoQA
    from lab.model.ready import Ready
    from lab.result import Result
    from probes.knockout import KnockoutRecipe

CLIPS = Path(__file__).parents[1] / "data" / "clips"
NOTEWORTHY = 5  # percent; smaller changes are not worth a sentence
ALIKE = 0.95  # of the deepest fall: cuts that hurt so much hurt alike
LONG = 60  # characters; longer answers do not go over a picture
WINDOW = 9  # the paper's, for models of 28 layers and more


def demonstrate(out: str) -> Reply:
    """The bundled model and the first bundled clip. The clip is copied to `out`: the folder can be moved as a whole."""
    from lab.items import load_items

    item = load_items(CLIPS / "items.yaml")[0]
    folder = folder_for(out)
    copy = folder / Path(item.video).name
    shutil.copyfile(item.video, copy)
    reply = trace(replace(item, video=str(copy)), Setting("tiny", "cpu", None, None, None), [], None, out)
    return replace(reply, text=f"{item.question}\n{reply.text}\nAgain:  vlab run {folder / 'recipe.yaml'}")


def trace(item: VideoQA, setting: Setting, pathways: Sequence[str], window: int | None, out: str) -> Reply:
    """Answer, knock-out profile, report, picture and recipe in folder `out`."""
    from lab.cli.keeping import keep
    from lab.cli.rerunning import resumable

    if window is not None and window < 1:
        raise UsageError(f"--window {window}: at least 1 layer is needed")
    folder, started = folder_for(out), time.monotonic()
    model = setting.load()
    ready = model.prepare(item, **setting.sampling())
    found = model.answer(ready)
    recipe = _recipe(model, item, ready, setting, pathways, window, folder)
    results = resumable(recipe, folder, model=model)
    reading = sentence(results[0], recipe.window, model.cfg.n_layers)
    written = _write(recipe, results, item, _intro(recipe, setting, reading), ready, found, folder)
    files = [str(f) for f in keep(recipe, written, folder, started)]
    data = {
        **(choice(found, item) if found.letter else {"answer": found.text}),
        "reading": reading,
        "recipe": recipe.id,
        "files": files,
        "results": [json.loads(r.to_json()) for r in results],
    }
    text = choice_text(found, item) if found.letter else found.text
    return Reply(data, "\n".join([text, "", reading, "", *files]))


def _write(
    recipe: KnockoutRecipe,
    results: Sequence[Result],
    item: VideoQA,
    intro: str,
    ready: Ready,
    found: Any,
    folder: Path,
) -> list[Path]:
    from lab.cli.rerunning import write_results
    from lab.view.draw import report, save

    files = write_results(results, folder)
    # picture and page once more, with question and answer on them
    save(
        results[0],
        folder / "flow.png",
        title=_title(item, found),
        caption=f"At every point the pathway is cut in a window of {recipe.window} layers round that layer.",
    )
    report(
        results,
        folder / "report.html",
        title=item.question,
        intro=intro,
        answer=_answer(found, item),
        pictures=_frames(ready),
    )
    return files


def _recipe(
    model: Any,
    item: VideoQA,
    ready: Ready,
    setting: Setting,
    pathways: Sequence[str],
    window: int | None,
    folder: Path,
) -> KnockoutRecipe:
    from lab.items import spec_of
    from lab.recipe import ModelSpec
    from probes.knockout import PATHWAYS, KnockoutRecipe

    spec = spec_of(item, **(setting.sampling() or {"n_frames": len(ready.frames or ())}))
    spec = spec.model_copy(
        update={"video": spec.video.model_copy(update={"path": path_from(folder, item.video)})}
    )
    # one frame has no other to look at
    usual = [p for p in PATHWAYS if p != "cross-frame" or ready.tokens.n_frames > 1]
    recipe = KnockoutRecipe(
        model=ModelSpec(**model.spec), items=(spec,), pathways=tuple(pathways or usual),
        window=window or window_for(model.cfg.n_layers),
    )  # fmt: skip
    return recipe.at(folder.resolve())


def sentence(profile: Result, window: int, n_layers: int) -> str:
    """What a knock-out profile (item, pathway, layer) says, in one sentence."""
    change = np.nan_to_num(profile.values.mean(axis=profile.axes.index("item")))
    names: list[str] = profile.coords["pathway"]
    order = [i for i in np.argsort(change.min(1), kind="stable").tolist() if change[i].min() <= -NOTEWORTHY]
    if not order:
        return f"No pathway alone carries the answer: cutting any of them lowers its probability by less than {NOTEWORTHY} %."
    falls = [(names[i], _place(change[i], window, n_layers), f"{-change[i].min():.0f} %") for i in order]
    name, place, fall = falls[0]
    said = f"The answer depends most on {name}: cut {place}, its probability falls by {fall}"
    said += "".join(f"; {name} cut {place}, by {fall}" for name, place, fall in falls[1:])
    quiet = [n for n, values in zip(names, change, strict=True) if abs(values).max() < NOTEWORTHY]
    return f"{said}{f'; cutting {_listed(quiet)} changes next to nothing' if quiet else ''}."


def _place(change: Any, window: int, n_layers: int) -> str:
    """Where cuts hurt most: the window's layers, or the centres, where several windows hurt as much."""
    from probes.knockout import layers_of

    deepest = int(change.argmin())
    first = last = deepest
    while first > 0 and change[first - 1] <= ALIKE * change[deepest]:
        first -= 1
    while last < n_layers - 1 and change[last + 1] <= ALIKE * change[deepest]:
        last += 1
    if first == last:
        return f"in {_spoken(layers_of(deepest, window, n_layers))}"
    if last == first + 1:
        return f"round layer {first + 1} or {last + 1}"
    return f"round any layer from {first + 1} to {last + 1}"


def _spoken(layers: range) -> str:
    """0-based layers as people count them."""
    first, last = layers[0] + 1, layers[-1] + 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def window_for(n_layers: int) -> int:
    """Layers cut at a time when nobody says: 9, in small models an odd number near a third of the layers."""
    return min(WINDOW, n_layers // 3 // 2 * 2 + 1)


def path_from(folder: Path, video: str) -> str:
    """The video's path as a recipe in `folder` writes it: relative where both lie below the working folder."""
    here, file, start = Path.cwd(), Path(video).resolve(), folder.resolve()
    near = file.is_relative_to(here) and start.is_relative_to(here)
    return Path(os.path.relpath(file, start)).as_posix() if near or file.parent == start else file.as_posix()


def _intro(recipe: KnockoutRecipe, setting: Setting, reading: str) -> str:
    return (
        f"{setting.model} was asked once, and then again with attention cut: one pathway at a time, in {recipe.window} "
        f"neighbouring layers at a time. Where a curve drops, the answer was passing.\n\n{reading}"
    )


def _title(item: VideoQA, found: Any) -> str:
    said = f"({found.letter}) {found.text}" if found.letter else found.text.strip()
    return (
        f"{item.question}  {said}"
        if len(said) <= LONG and len(item.question) <= 2 * LONG
        else "Attention knock-out"
    )


def _answer(found: Any, item: VideoQA) -> Any:
    from lab.view.draw import Answer

    if not found.letter:
        return Answer(item.question, said=found.text)
    truth = item.answer if isinstance(item.answer, int) else None
    return Answer(item.question, item.options, found.letter_probs.tolist(), found.index, truth)


def _frames(ready: Ready) -> dict[str, Any]:
    frames = ready.frames
    return {} if frames is None else {"What the model saw": frames.pixels.permute(0, 2, 3, 1).cpu().numpy()}
