"""`vlab compare`: what mechanisms change inside a model, over items as `vlab sweep` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.cli.asking import Setting
from lab.cli.output import Reply, table
from lab.cli.probing import checked
from lab.cli.rerunning import resumable
from lab.cli.sweeps import source_of
from lab.cli.switching import described
from lab.cli.tracing import folder_for
from lab.errors import UsageError

if TYPE_CHECKING:
    from lab.comparison import Report


def compare(
    items: str, mechanisms: Sequence[str], variants: Sequence[str], setting: Setting, out: str, more: Mapping[str, Any]
) -> Reply:  # fmt: skip
    """Report and data in a folder. Raises UsageError for unknown mechanisms and settings."""
    asked = {label: described(text) for label, text in _labels("--mechanism", mechanisms)}
    if not asked and not variants:
        raise UsageError("nothing to compare: give --mechanism, e.g. --mechanism mixture_of_depths")
    source = source_of(items)
    from lab.comparison import CompareRecipe, Report
    from lab.recipe import ModelSpec

    model = setting.load()
    others = {
        label: checked(ModelSpec, name=name, device=setting.device or "auto", dtype=setting.dtype or "auto")
        for label, name in _labels("--variant", variants)
    }
    recipe = checked(
        CompareRecipe, model=ModelSpec(**(model.spec or {})), mechanisms=asked, items=source, n_frames=setting.frames or 8,
        variants=others, **more,
    )  # fmt: skip
    folder = folder_for(out)
    report = Report.of(resumable(recipe, folder, model=model))
    files = [str(f) for f in report.save(folder)]
    data = {"recipe": recipe.id, "variants": report.variants, "words": report.words(), "accuracy": _accuracy(report), "files": files}  # fmt: skip
    return Reply(data, "\n".join([_table(report), "", *report.words(), "", f"{folder / 'report.html'} and {len(files) - 1} files of data"]))  # fmt: skip


def _labels(option: str, given: Sequence[str]) -> list[tuple[str, str]]:
    """(label, what) of every LABEL=WHAT, or WHAT, which is then its own label. Raises UsageError for a label given twice."""
    found = [_labelled(text) for text in given]
    labels = [label for label, _ in found]
    for at, (label, text) in enumerate(zip(labels, given, strict=True)):
        if not label or label in labels[:at]:
            why = "has no label before the =" if not label else f"is called {label!r}, as another one"
            raise UsageError(f"{option} {text}: {why}; write LABEL=NAME with a label of its own")
    return found


def _labelled(text: str) -> tuple[str, str]:
    label, equals, what = text.partition("=")
    return (label.strip(), what) if equals and ":" not in label else (text, text)


def _accuracy(report: Report) -> dict[str, list[float]]:
    one = report["accuracy"]
    assert one.low is not None and one.high is not None
    numbers = zip(one.values.tolist(), one.low.tolist(), one.high.tolist(), strict=True)
    return {v: list(n) for v, n in zip(report.variants, numbers, strict=True)}


def _table(report: Report) -> str:
    """Variants, accuracy, answers that changed, video tokens, and what was measured in proportion to vanilla."""
    head, rows = ["variant", "right", "low", "high", "changed", "written", "tokens"], list[list[Any]]()
    for v, numbers in _accuracy(report).items():
        counts = [int(report[n].select(variant=v).values.sum()) for n in ("flips", "text_flips")]
        rows.append([v, *numbers, *counts, float(report["tokens"].select(variant=v).values.mean())])
    return table(head, rows)
