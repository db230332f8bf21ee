"""One local page with every figure, its caption, script, recipe, data and manifest. Asks the network for nothing."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import manifest
from figures.shelf import Entry
from lab.result import write_bytes

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { --paper: #fff; --ink: #1d2126; --soft: #5b6570; --line: #d9dee3; --panel: #f5f7f9; --accent: #0b62a4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e8ebee; --soft: #a2acb6; --line: #343b42; --panel: #1d2226; --accent: #7ec0f5 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
main { max-width: 1000px; margin: 0 auto; padding: 2rem 1.25rem 4rem }
section { margin-top: 2.4rem; padding-top: 1.6rem; border-top: 1px solid var(--line) }
h1 { font-size: 1.9rem; margin: 0 0 .6rem } h2 { font-size: 1.2rem; margin: 0 0 .6rem }
a, summary { color: var(--accent) } summary { cursor: pointer; width: fit-content }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; padding: 8px }
.caption { max-width: 60em } .about { color: var(--soft); font-size: .9rem }
.files a { margin-right: .9rem }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 4px; padding: .9rem 1rem; overflow: auto; max-height: 26rem;
  font: .82rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace }
nav a { display: inline-block; margin: 0 .9rem .3rem 0 }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
"""


def gallery(entries: Sequence[Entry], folders: Sequence[Path], path: Path) -> Path:
    """Writes the page; folders lie below the page's own. Raises ConfigError for a folder without a manifest."""
    told = [manifest.read(f / manifest.MANIFEST) for f in folders]
    links = "".join(
        f'<a href="#{e.name}">{e.number}. {_e(m["title"])}</a>' for e, m in zip(entries, told, strict=True)
    )
    body = "\n".join(_section(e, f, m, path.parent) for e, f, m in zip(entries, folders, told, strict=True))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>Figures</title><style>{STYLE}</style></head><body><main>
<header><h1>Figures</h1><p class="about">{len(entries)} figures. Make one again: <code>vlab figures run NAME</code>; check all:
<code>vlab figures verify</code>; on another model: <code>vlab run RECIPE --set model=NAME</code>.</p><nav aria-label="Figures">{links}</nav></header>
{body}
</main></body></html>
"""
    return write_bytes(path, page.encode())


def _section(entry: Entry, folder: Path, told: dict[str, Any], root: Path) -> str:
    picture = base64.b64encode((folder / "figure.png").read_bytes()).decode()
    at = folder.relative_to(root).as_posix()
    names = [
        "figure.html",
        "figure.svg",
        "figure.pdf",
        "figure.png",
        *told["data"],
        "recipe.yaml",
        "manifest.json",
    ]
    files = "".join(f'<a href="{_e(f"{at}/{n}")}">{_e(n)}</a>' for n in names)
    texts = {
        f"Script: figures/{entry.script.name}": entry.script.read_text(encoding="utf-8"),
        "Recipe": (folder / "recipe.yaml").read_text(encoding="utf-8"),
        "Manifest": json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False),
    }
    shown = "".join(
        f'<details><summary>{_e(k)}</summary><pre tabindex="0">{_e(v)}</pre></details>'
        for k, v in texts.items()
    )
    return f"""<section id="{entry.name}" aria-labelledby="h-{entry.name}"><h2 id="h-{entry.name}">{entry.number}. {_e(told["title"])}</h2>
<img src="data:image/png;base64,{picture}" width="{round(told["width_inches"] * 130)}" alt="{_e(told["title"])}. {_e(told["caption"])}">
<p class="caption">{_e(told["caption"])}</p><p class="about">{_e(_about(told))}</p><p class="files">{files}</p>{shown}</section>"""


def _about(told: dict[str, Any]) -> str:
    model = told["model"]
    return (
        f"Model {model['id']} (weights {model['weights'] or 'of the hub'}), {told['dtype']} on {told['device_name']}; recipe {told['recipe_id']}, "
        f"{told['determinism']}; computed {told['date']} in {told['wall_seconds']:.0f} s with at most {told['peak_bytes'] / 1e6:.0f} MB; "
        f"width {told['width_inches']} in."
    )


def _e(words: Any) -> str:
    return html.escape(str(words), quote=True)
