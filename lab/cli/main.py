"""The command line. Every command is a few options here and a function in a file beside this one.

Nothing heavy is imported before a command runs, so that `--help` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lab.cli.output import Reply, answer_with
from lab.errors import LabError

EPILOG = """\b
Results go to stdout (--json: one JSON document), progress and notes to stderr.

\b
Exit codes:
  0  done            3  recipe or file       6  model
  1  failed          4  not enough memory    7  prompt
  2  wrong usage     5  video                8  run
  130  interrupted (Ctrl-C)

An error is one line. `--debug`, anywhere on the line, shows where it happened.
"""

LONGEST = 2000  # characters of an error; names of a megabyte are cut

app = typer.Typer(
    name="vlab", add_completion=False, no_args_is_help=True, rich_markup_mode=None, epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="See into video language models: ask about a video, trace where the answer comes from.",
)  # fmt: skip

Video = Annotated[str, typer.Argument(metavar="VIDEO", help="A video file, or a folder of images.")]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="A question about the video.")]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="TEXT", help="An answer option; repeat for each."),
]
AnswerIs = Annotated[
    str | None,
    typer.Option(
        "--answer", metavar="TEXT", help="The right answer, if known: an option or its letter, or a text."
    ),
]
Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="NAME", help="tiny, a folder, or a hub id (see `vlab models`)."),
]
Frames = Annotated[
    int | None, typer.Option("--frames", "-n", metavar="N", help="Sample N frames, evenly (default 8).")
]
Fps = Annotated[float | None, typer.Option("--fps", metavar="F", help="Sample F frames a second instead.")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16 (default: float32 on a CPU, the checkpoint's on a GPU).",
    ),
]
Pathway = Annotated[
    list[str] | None,
    typer.Option(
        "--pathway",
        "-p",
        metavar="A->B",
        help="Attention to cut, from role to role, e.g. 'video->last'; repeat for more.",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        "-w",
        metavar="K",
        help="Cut K layers at a time, centred on each layer (default 9, a third of the layers in small models).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error happened.")] = False,
) -> None:
    if version:
        from lab.environment import installed

        print(f"videollm-lab {installed('videollm-lab') or '(not installed)'}")
        raise typer.Exit(0)


def _finish(work: Any, as_json: bool = False) -> None:
    raise typer.Exit(answer_with(work, as_json))


@app.command(short_help="The bundled model, a bundled video, and where the answer comes from.")
def demo(
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where the files go.")] = "out/demo",
    as_json: Json = False,
) -> None:
    """Ask the bundled model about the bundled video, and trace its answer.

    Writes report.html, flow.png, result.npz, recipe.yaml and the video to FOLDER.
    """
    from lab.cli import tracing

    _finish(lambda: tracing.demonstrate(out), as_json)


@app.command(short_help="Ask a model about a video.")
def ask(
    video: Video, question: Question, option: Option = None, answer: AnswerIs = None, model: Model = "tiny",
    frames: Frames = None, fps: Fps = None, device: Device = None, dtype: Dtype = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Length of a free answer.")] = 64,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Ask a model about a video. With options: their probabilities; without: a free answer."""
    from lab.cli import asking

    def work() -> Reply:
        item = asking.question_about(video, question, option or [], answer)
        return asking.ask(item, asking.Setting(model, device, dtype, frames, fps), max_tokens)

    _finish(work, as_json)


@app.command(short_help="Trace where an answer comes from.")
def trace(
    video: Video, question: Question, option: Option = None, answer: AnswerIs = None, model: Model = "tiny",
    frames: Frames = None, fps: Fps = None, device: Device = None, dtype: Dtype = None,
    pathway: Pathway = None, window: Window = None,
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="Where the files go.")] = "out/trace",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Find where an answer comes from: cut attention pathways layer by layer and watch the answer move.

    Writes report.html, flow.png, result.npz and recipe.yaml to FOLDER.
    """
    from lab.cli import asking, tracing

    def work() -> Reply:
        item = asking.question_about(video, question, option or [], answer)
        setting = asking.Setting(model, device, dtype, frames, fps)
        return tracing.trace(item, setting, pathway or [], window, out)

    _finish(work, as_json)


On = Annotated[
    list[str] | None,
    typer.Option(
        "--mechanism",
        metavar="NAME",
        help="With a mechanism on: a file of lab.mechanisms, settings after a colon (mixture_of_depths:keep=0.2); repeat for more.",
    ),
]


@app.command(short_help="Trace many questions at once.")
def sweep(
    items: Annotated[
        str,
        typer.Option(
            "--items",
            metavar="FILE",
            help="Questions: .jsonl or .yaml, a TVBench or MVBench .json, simulated ones: sim:TASKS:N:SEED "
            "(sim:temporal:20 is the paper's five tasks), or a benchmark's folder: tvbench, mvbench, tomato or "
            "tempcompass:FOLDER[:TASKS][:N].",
        ),
    ],
    video_root: Annotated[str | None, typer.Option("--video-root", metavar="FOLDER", help="Where a benchmark's videos lie.")] = None,
    model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    pathway: Pathway = None, window: Window = None,
    style: Annotated[str, typer.Option("--style", metavar="NAME", help="center, shift, inverse, top_down, bottom_up or triangle.")] = "center",
    metric: Annotated[list[str] | None, typer.Option("--metric", metavar="NAME", help="argmax, answer, target, logprob, option_p, margin, flip or kl; repeat for more.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="TEXT", help="Follow the probability of this answer text.")] = None,
    heads: Annotated[str | None, typer.Option("--heads", metavar="LIST", help="Cut heads one at a time: each, or 0,3,5.")] = None,
    frame_pairs: Annotated[str | None, typer.Option("--frame-pairs", metavar="LIST", help="Cut pairs of frames one at a time: each, or 0-3,1-3.")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Draw the items answered correct, wrong or all (default; the panel: correct).")] = None,
    panel: Annotated[bool, typer.Option("--panel", help="The paper's eleven curves, by task, on one page.")] = False,
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            metavar="NAME",
            help="fast: from one stored clean run a question; reference: one full forward a point.",
        ),
    ] = "fast",
    mechanism: On = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")] = "out/sweep",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Knock-out curves over many questions: mean and 95 % interval, report, picture, recipe. Can be interrupted."""
    from lab.cli import asking, sweeps

    def work() -> Reply:
        setting = asking.Setting(model, device, dtype, frames, None)
        asked = sweeps.Asked(
            items, out, video_root, pathway or (), window, style, metric or (), target, heads, frame_pairs, split, panel, executor,
            mechanism or (),
        )  # fmt: skip
        return sweeps.sweep_items(asked, setting)

    _finish(work, as_json)


@app.command(short_help="Switch mechanisms on, and compare what happens inside.")
def compare(
    items: Annotated[str, typer.Option("--items", metavar="FILE", help="Questions: .jsonl or .yaml, a TVBench or MVBench .json, or simulated ones: sim:TASKS:N:SEED.")],
    mechanism: Annotated[list[str] | None, typer.Option("--mechanism", metavar="NAME", help="A file of lab.mechanisms, e.g. differential_token_drop, its settings after a colon: mixture_of_depths:keep=0.2; several at once with +; LABEL=NAME gives it a name in the report. Repeat for more.")] = None,
    variant: Annotated[list[str] | None, typer.Option("--variant", metavar="MODEL", help="Another model of the same shape, with what it was trained with: tiny-mod. Repeat for more.")] = None,
    model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None, window: Window = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Also random choices of the same budget.")] = True,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Rounds of timing; 0: no costs.")] = 5,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")] = "out/compare",
    as_json: Json = False,
) -> None:  # fmt: skip
    """What a mechanism does to the internals: residual stream, attention, knock-outs, depth, answers, costs.

    Writes report.html, a file for every Result and recipe.yaml to FOLDER. Can be interrupted: the same command goes on.
    """
    from lab.cli import asking, comparing

    def work() -> Reply:
        setting = asking.Setting(model, device, dtype, frames, None)
        more = {"controls": controls, "rounds": rounds, "window": window}
        return comparing.compare(items, mechanism or [], variant or [], setting, out, more)

    _finish(work, as_json)


@app.command(short_help="Find the attention edges a model needs.")
def prune(
    items: Annotated[str, typer.Option("--items", metavar="FILE", help='Calibration questions: .jsonl or .yaml, or a simulator task: \'{"sim": "moving_direction", "n": 128}\'.')],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The policy file; pictures and data go to a folder of its name.")] = "out/policy.yaml",
    holdout: Annotated[str | None, typer.Option("--holdout", metavar="FILE", help="Other questions, to measure the policy on beside every baseline.")] = None,
    model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    flips: Annotated[float, typer.Option("--flips", metavar="S", help="Share of answers that may change (95 % bound).")] = 0.03,
    kl: Annotated[float, typer.Option("--kl", metavar="NATS", help="Mean KL divergence of the answers that is allowed (95 % bound).")] = 0.02,
    forwards: Annotated[float, typer.Option("--forwards", metavar="N", help="Forward-equivalents a question the search may cost.")] = 80.0,
    portable: Annotated[bool, typer.Option("--portable", help="Only name what any prompt has, for use in other harnesses.")] = False,
    contiguous: Annotated[bool, typer.Option("--contiguous", help="Keep every pair in one range of layers only.")] = False,
    warm: Annotated[bool, typer.Option("--warm", help="Order the search by first-order scores.")] = False,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="acdc (from the last layer to the first), greedy, or knapsack (single heads of all layers, by what each does).")] = "acdc",
    baseline: Annotated[list[str] | None, typer.Option("--baseline", "-b", metavar="SORT", help="With --holdout: all (default), none, or some of paper, random, shuffled, exit, local, mass, controls; repeat.")] = None,
    finer: Annotated[str, typer.Option("--finer", metavar="A,B", help="How units are parted: some of distance, option, head.")] = "distance,option,head",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Search the smallest set of attention edges that keeps the answers, prove it on other questions, write it to a file.

    Can be interrupted: the best policy so far is written, and the same command goes on.
    """
    from lab.cli import asking, prunes

    def work() -> Reply:
        setting = asking.Setting(model, device, dtype, frames, None)
        options = {
            "roles": "portable" if portable else "all", "layers": "contiguous" if contiguous else "free", "warm": warm,
            "method": method, "finer": tuple(f.strip() for f in finer.split(",") if f.strip()), "baselines": prunes.sorts(baseline),
        }  # fmt: skip
        budget = {"flips": flips, "kl": kl, "forwards": forwards}
        return prunes.prune(items, holdout, setting, out, budget=budget, options=options)

    _finish(work, as_json)


@app.command("eval", short_help="Measure a policy beside its baselines.")
def evaluate(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A policy file (.yaml, .json), or a preset such as 7b/strict.")],
    items: Annotated[str, typer.Option("--items", metavar="FILE", help="Questions the policy was not made on: a file, or a simulator task.")],
    model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    baseline: Annotated[list[str] | None, typer.Option("--baseline", "-b", metavar="SORT", help="all (default), none, or some of paper, random, shuffled, exit, local, mass, controls; repeat.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Save table and curve here.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Accuracy, flips, KL and edges kept of a policy, beside every baseline; can be interrupted if --out is given."""
    from lab.cli import asking, prunes

    setting = (model, device, dtype, frames, None)
    _finish(
        lambda: prunes.evaluate(policy, items, asking.Setting(*setting), prunes.sorts(baseline), out), as_json
    )


Items = Annotated[
    str,
    typer.Option(
        "--items",
        metavar="FILE",
        help="Questions: .jsonl or .yaml, sim:TASKS:N:SEED, or a benchmark's folder, such as tvbench:FOLDER[:TASKS][:N].",
    ),
]
UnderPolicy = Annotated[
    str | None,
    typer.Option("--policy", metavar="POLICY", help="Under a policy: a file, or a preset such as 7b/strict."),
]
TheLayers = Annotated[
    str | None, typer.Option("--layers", metavar="LIST", help="Layers, such as 1-4,8 (default: all).")
]
Site = Annotated[
    str, typer.Option("--site", metavar="NAME", help="resid_pre, resid_mid, resid_post, attn_out or mlp_out.")
]


@app.command(short_help="Read the stream at every layer as if it were the last.")
def lens(
    items: Items, model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    tokens: Annotated[list[str] | None, typer.Option("--tokens", "-t", metavar="ROLE", help="Tokens to read: last, video, option, frame:3 ... (default last); repeat for more.")] = None,
    word: Annotated[list[str] | None, typer.Option("--word", metavar="TEXT", help="Words to follow: answer (what the model answers, the default), right, or a word; repeat for more.")] = None,
    measure: Annotated[str, typer.Option("--measure", metavar="NAME", help="p, logp, rank or entropy.")] = "p",
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="role, frame or patch.")] = "role",
    site: Site = "resid_post",
    mode: Annotated[str, typer.Option("--mode", metavar="NAME", help="normed; raw or paper: without the final norm.")] = "normed",
    layers: TheLayers = None, policy: UnderPolicy = None, mechanism: On = None,
    paint: Annotated[int | None, typer.Option("--paint", metavar="LAYER", help="Also write the best words of this layer over the first video's frames.")] = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")] = "out/lens",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Logit lens: what tokens would say at every layer. Writes report, picture, result and recipe to FOLDER."""
    from lab.cli import asking, probing

    def work() -> Reply:
        over = probing.Over(
            items, asking.Setting(model, device, dtype, frames, None), policy, mechanism, layers, out
        )
        return probing.lens(over, tokens or [], word or [], measure, by, site, mode, paint)

    _finish(work, as_json)


@app.command(short_help="Where heads look, and whether it matters.")
def attention(
    items: Items, model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    pathway: Pathway = None, layers: TheLayers = None, policy: UnderPolicy = None, mechanism: On = None,
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="Knock the same edges out, layer by layer.")] = True,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")] = "out/attention",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Share of attention by pathway, layer and head; beside it what knocking the same edges out does to the answer."""
    from lab.cli import asking, probing

    def work() -> Reply:
        over = probing.Over(
            items, asking.Setting(model, device, dtype, frames, None), policy, mechanism, layers, out
        )
        return probing.attention(over, pathway or [], causal)

    _finish(work, as_json)


@app.command(short_help="What can be read linearly, at which layer.")
def probe(
    items: Items, model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    label: Annotated[str, typer.Option("--label", metavar="NAME", help="answer, letter, direction, colour, shape, count, position, time or 'next event'.")] = "answer",
    role: Annotated[list[str] | None, typer.Option("--role", "-r", metavar="ROLE", help="Tokens to read (mean of each): video, last, frame:3, or frames: each by itself; repeat for more.")] = None,
    site: Site = "resid_post", layers: TheLayers = None, policy: UnderPolicy = None, mechanism: On = None,
    folds: Annotated[int, typer.Option("--folds", metavar="N", help="Groups of videos held out in turn.")] = 5,
    twins: Annotated[bool, typer.Option("--twins", help="Take every simulated item's twin too.")] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of folds, shuffled labels and intervals.")] = 0,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")] = "out/probe",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Linear probes with a control on shuffled labels; videos and their twins are never parted. Can be interrupted."""
    from lab.cli import asking, probing

    def work() -> Reply:
        over = probing.Over(
            items, asking.Setting(model, device, dtype, frames, None), policy, mechanism, layers, out
        )
        return probing.linear(over, label, role or [], site, folds, twins, seed)

    _finish(work, as_json)


Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="NAME",
        help="The other world: twin, reversed, blank, noise, mean (default: twin, else reversed).",
    ),
]


@app.command(short_help="Patch activations between a video and its twin.")
def patch(
    items: Items, model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="Columns of the grid: frame, role or head.")] = "frame",
    site: Annotated[str, typer.Option("--site", metavar="NAME", help="Where values are taken: resid_pre, z, mlp_out ...")] = "resid_pre",
    role: Annotated[str | None, typer.Option("--role", metavar="NAME", help="Only these tokens, e.g. video, last.")] = None,
    window: Annotated[int | None, typer.Option("--window", "-w", metavar="K", help="Patch K layers at a time (default 1).")] = None,
    into: Annotated[str, typer.Option("--into", metavar="WORLD", help="corrupted: restore the answer; clean: undo it.")] = "corrupted",
    against: Against = None,
    metric: Annotated[str, typer.Option("--metric", metavar="NAME", help="recovered, logit_diff, probability or flip.")] = "recovered",
    policy: UnderPolicy = None, mechanism: On = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")] = "out/patch",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run questions with another video's activations, layer by layer: where does the answer follow? Can be interrupted."""
    from lab.cli import asking, patching

    def work() -> Reply:
        asked = {
            "site": site,
            "role": role,
            "into": into,
            "against": against,
            "metric": metric,
            "policy": policy,
            "mechanisms": mechanism,
        }
        return patching.patch_items(
            items, asking.Setting(model, device, dtype, frames, None), by, window, asked, out
        )

    _finish(work, as_json)


@app.command(short_help="What each frame or patch is worth for the answer.")
def attribute(
    items: Items, model: Model = "tiny", frames: Frames = None, device: Device = None, dtype: Dtype = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="shapley, ablation, occlusion, ig or gradient_shap.")] = "shapley",
    place: Annotated[str, typer.Option("--at", metavar="NAME", help="Of gradients: embed, pixels, connector, resid_pre, z, pattern ...")] = "embed",
    layer: Annotated[int | None, typer.Option("--layer", metavar="N", min=1, help="The layer of resid_pre, z, ...: 1 is the first.")] = None,
    players: Annotated[str, typer.Option("--players", metavar="NAME", help="frames, tubelets, tokens or objects.")] = "frames",
    against: Against = None,
    target: Annotated[str | None, typer.Option("--target", metavar="TEXT", help="'generated', or a text (default: the answer).")] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="NAME", help="logit_diff, logit or logprob.")] = None,
    policy: UnderPolicy = None, mechanism: On = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")] = "out/attribute",
    as_json: Json = False,
) -> None:  # fmt: skip
    """How much of the answer each frame, block or patch of the video is worth, against a baseline video."""
    from lab.cli import asking, patching

    def work() -> Reply:
        asked = {
            "method": method,
            "place": place,
            "players": players,
            "against": against,
            "target": target,
            "output": output,
            "policy": policy,
            "mechanisms": mechanism,
        }
        return patching.attribute_items(
            items, asking.Setting(model, device, dtype, frames, None), layer, asked, out
        )

    _finish(work, as_json)


@app.command("run", short_help="Carry out a recipe.")
def rerun(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe.yaml that a command wrote, or your own.")
    ],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value: items.n=4, model.dtype=bfloat16, pathways.0='video->last'; repeat for more.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help="Another model.")] = None,
    items: Annotated[str | None, typer.Option("--items", metavar="FILE", help="Other questions, as in `vlab sweep`.")] = None,
    device: Device = None,
    out: Annotated[str | None, typer.Option("--out", metavar="FOLDER", help="Save results and report here (default: out/ID, if no results lie beside the recipe).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run it even if FOLDER holds its results.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Show the recipe and where its results would go; run nothing.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Carry out a recipe, with other values if you like. Can be interrupted; the same command goes on.

    Results of the same recipe are used again if nothing has changed since. If result.npz lies beside the recipe, say how
    far the numbers are from it.
    """
    from lab.cli import rerunning

    changes = rerunning.Changes(tuple(settings or ()), model, items, device)
    _finish(lambda: rerunning.rerun(rerunning.Asked(recipe, changes, out, fresh, dry)), as_json)


@app.command(short_help="The JSON Schema of recipes, for editors.")
def schema(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="One kind, such as knockout (default: all).")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE", help="Write it here.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Print the JSON Schema of recipes: of one kind, or of all."""
    from lab.cli import schemas

    _finish(lambda: schemas.schema(kind, out), as_json)


@app.command(short_help="Show what every position of the prompt is.")
def tokens(
    video: Video, question: Question, option: Option = None, model: Model = "tiny", frames: Frames = None,
    fps: Fps = None,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Draw the map too (.png, .svg, .pdf).")] = None,
    every: Annotated[bool, typer.Option("--all", help="One line for every position, not for every run of equal role.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show what every position of the prompt is: which frame, row and column, which option, which text."""
    from lab.cli import asking, showing

    def work() -> Reply:
        item = asking.question_about(video, question, option or [], None)
        return showing.show_tokens(item, asking.Setting(model, "cpu", None, frames, fps), every, out)

    _finish(work, as_json)


PolicyName = Annotated[
    str, typer.Argument(metavar="POLICY", help="A policy file (.yaml, .json), or a preset such as 7b/strict.")
]
Layers = Annotated[
    int | None,
    typer.Option(
        "--layers", metavar="N", min=1, max=10_000, help="Layers of the model, where the policy does not say."
    ),
]
policy_app = typer.Typer(
    name="policy",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show, check and list attention-edge policies.",
)
app.add_typer(policy_app, short_help="Show, check and list attention-edge policies.")


@app.command("count", short_help="Count the attention edges a policy keeps.")
def count_edges(
    policy: PolicyName,
    layout: Annotated[
        str, typer.Option("--layout", metavar="SIZES", help="System, frames x tokens, question, template; '52,8x7+128,44,19' has timestamps.")
    ] = "52,8x144,44,19",
    layers: Layers = None,
    heads: Annotated[int | None, typer.Option("--heads", metavar="N", min=1, help="Heads, if the policy cuts single ones.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Count the attention edges a policy keeps: by the paper's rule, and those that can reach the answer."""
    from lab.cli import policies

    _finish(lambda: policies.count(policy, layout, layers, heads), as_json)


@policy_app.command("show", short_help="Show a policy.")
def show_policy(
    policy: PolicyName, layers: Layers = None,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write it here too (.yaml or .json).")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show a policy file or preset: what it cuts, in which layers."""
    from lab.cli import policies

    _finish(lambda: policies.show(policy, layers, out), as_json)


@policy_app.command("validate", short_help="Check a policy file.")
def validate_policy(policy: PolicyName, as_json: Json = False) -> None:
    """Check a policy file. An error names the field."""
    from lab.cli import policies

    _finish(lambda: policies.validate(policy), as_json)


@policy_app.command("presets", short_help="List the presets.")
def list_presets(as_json: Json = False) -> None:
    """List the presets and the share of edges they keep."""
    from lab.cli import policies

    _finish(policies.presets_known, as_json)


@policy_app.command("schema", short_help="Print the JSON Schema of policy files.")
def policy_schema(as_json: Json = False) -> None:
    """Print the JSON Schema of policy files."""
    from lab.cli import policies

    _finish(policies.schema, as_json)


figures_app = typer.Typer(
    name="figures",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, check and show the figures of a paper.",
)
app.add_typer(figures_app, short_help="Make, check and show the figures of a paper.")
FigureNames = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Figures by name or number (default: all).")
]
FiguresOut = Annotated[
    str, typer.Option("--out", "-o", metavar="FOLDER", help="Folder that holds a folder for each figure.")
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", metavar="N", help="Figures made side by side (default: one a core)."),
]


@figures_app.command("list", short_help="List the figures.")
def list_figures(out: FiguresOut = "out/figures", as_json: Json = False) -> None:
    """List the figures: what they show, how well they repeat, and which are made."""
    from lab.cli import figures

    _finish(lambda: figures.listed(out), as_json)


@figures_app.command("run", short_help="Make figures.")
def run_figures(
    names: FigureNames = None, out: FiguresOut = "out/figures", jobs: Jobs = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value in the recipe, such as model=FOLDER or items.n=4; repeat for more. Goes to a folder of its own.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Compute again what is there already.")] = False,
    from_data: Annotated[bool, typer.Option("--from-data", help="Only draw, from the data in the folder; needs no torch.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make figures: data, svg, pdf, png, html and manifest in FOLDER/NAME. What is whole already is kept."""
    from lab.cli import figures

    _finish(
        lambda: figures.run(names or (), out, changes or (), jobs, redo=redo, from_data=from_data), as_json
    )


@figures_app.command("verify", short_help="Check figures: bytes, drawings, numbers.")
def verify_figures(
    names: FigureNames = None, out: FiguresOut = "out/figures", jobs: Jobs = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave the second run out: check files and drawings alone.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compute every figure again and compare: bytes of data and drawings, numbers within the recipe's tolerance."""
    from lab.cli import figures

    _finish(lambda: figures.verify(names or (), out, jobs, quick), as_json)


@figures_app.command("gallery", short_help="Write one page with all figures.")
def figures_gallery(out: FiguresOut = "out/figures", as_json: Json = False) -> None:
    """One local page with every figure, its caption, script, recipe, data and manifest."""
    from lab.cli import figures

    _finish(lambda: figures.gallery(out), as_json)


@app.command(short_help="List known checkpoints and their sizes.")
def models(as_json: Json = False) -> None:
    """List checkpoints known to work, their sizes and the memory they take."""
    from lab.cli import catalogue

    _finish(catalogue.list_models, as_json)


@app.command(short_help="Check the installation; predict memory.")
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Also predict the memory this model takes.")
    ] = None,
    frames: Annotated[int, typer.Option("--frames", "-n", metavar="N", help="Frames to predict for.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Check versions, devices and widgets; with MODEL, predict the memory for weights, cache and activations."""
    from lab.cli import health

    _finish(lambda: health.check(model, frames, dtype, device), as_json)


def main(args: Sequence[str]) -> int:
    """Runs one command line and returns its exit code. Prints errors as one line on stderr."""
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"] or ["--help"]
    usage_error: type[Exception] = typer.BadParameter.__bases__[
        0
    ]  # click's, which some versions of typer carry inside
    try:
        code = int(app(args, prog_name="vlab", standalone_mode=False) or 0)
        # some versions of typer turn Ctrl-C into this code without a word
        return _say("interrupted", 130) if code == 130 else code
    except Exception as e:
        if debug:
            raise
        return _explained(e, usage_error)
    except KeyboardInterrupt:
        return _say("interrupted", 130)


def _explained(e: Exception, usage_error: type[Exception]) -> int:
    match e:
        case LabError():
            return _say(" ".join(str(e).split()), e.exit_code)
        case typer.Abort():
            return _say("interrupted", 130)
        case BrokenPipeError():  # `vlab ... | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        case MemoryError():
            return _say("out of memory; try fewer frames or a smaller model", 4)
        case RuntimeError() if any(
            s in str(e) for s in ("out of memory", "allocate memory")
        ):  # torch's ways of saying it
            return _say("out of memory; try fewer frames or a smaller model", 4)
        case usage_error():
            return _say(f"{' '.join(e.format_message().split())} (see `vlab --help`)", 2)  # type: ignore[attr-defined]
        case _:
            what = " ".join(str(e).split())[:300]
            return _say(f"unexpected {type(e).__name__}: {what}; add --debug to see where it happened", 1)


def _say(message: str, code: int) -> int:
    # names of files and questions come from anywhere: what would move the cursor is shown, not sent
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:LONGEST])
    shown += "..." if len(message) > LONGEST else ""
    print(f"vlab: {shown}", file=sys.stderr)
    return code


def run() -> None:
    """The `vlab` program."""
    # transformers and tokenizers report progress and advice of their own; errors still come through
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
