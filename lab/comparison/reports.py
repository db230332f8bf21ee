"""Report: the Results of a comparison, saved and loaded together, as a page, as a table and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.comparison.page import parts_of
from lab.comparison.words import sentences
from lab.errors import ConfigError, UsageError
from lab.result import Result, write_bytes
from lab.view.pages import report as page
from lab.yamlfile import as_yaml

TITLE = "What the mechanisms change inside"


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Results by name: "accuracy", "cosine", "cka", "kl", "mass", "knockout", "centre", "depth", "left", "costs", ..."""

    results: dict[str, Result]

    def __getitem__(self, name: str) -> Result:
        if name not in self.results:
            raise UsageError(f"no Result {name!r}; there are {', '.join(self.results)}")
        return self.results[name]

    def __contains__(self, name: object) -> bool:
        return name in self.results

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return f"<Report: {', '.join(self.variants)}; {', '.join(self.results)}>"

    @property
    def variants(self) -> list[str]:
        """Names of what was compared, vanilla first."""
        return self.results["accuracy"].coords["variant"]

    def words(self) -> list[str]:
        """What each variant did, a paragraph each."""
        return sentences(self.results)

    def html(self, path: str | Path, *, title: str = TITLE) -> Path:
        """Write the page: one file that asks the network for nothing."""
        frames = self.results["frames"].values.astype("uint8")
        parts = parts_of(self.results, frames)
        shown = [one for part in parts for one in part.shown]
        lines = [n for part in parts for n in part.lines]
        return page(shown, path, title=title, intro="\n\n".join(self.words()), across=lines)

    def save(self, folder: str | Path) -> list[Path]:
        """Write NAME.npz for every Result, report.html, and recipe.yaml if there is a recipe; returns the files."""
        folder = Path(folder)
        files = [r.save(folder / f"{name}.npz") for name, r in self.results.items()]
        recipe = self.results["accuracy"].recipe
        if recipe:
            files.append(write_bytes(folder / "recipe.yaml", as_yaml(recipe).encode()))
        return [*files, self.html(folder / "report.html")]

    @staticmethod
    def of(results: Sequence[Result]) -> Report:
        """A Report of the Results that a recipe's `run` gives. Raises UsageError for others."""
        wrong = [r.name for r in results if "part" not in r.notes]
        if wrong:
            raise UsageError(f"{wrong[0]!r} is no Result of a comparison")
        return Report({r.notes["part"]: r for r in results})

    @staticmethod
    def load(folder: str | Path) -> Report:
        """Read what `save` wrote. Raises ConfigError if it is not that."""
        files = sorted(Path(folder).glob("*.npz"))
        found = {f.stem: Result.load(f) for f in files}
        missing = [n for n in ("accuracy", "cosine", "frames") if n not in found]
        if missing:
            raise ConfigError(
                f"{folder} holds no report: {', '.join(f'{n}.npz' for n in missing)} is missing"
            )
        return Report(found)
