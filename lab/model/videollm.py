"""VideoLLM: a transformers VideoLLM you can see into. The file to read: see -> lay out -> embed -> decode -> read.

The checkpoint stays transformers' own: its layers, norms, RoPE and weights are called, never re-implemented. Around
them stand TransformerLens HookPoints, one attention function, and a token map that says what every position is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule

from lab.carriers import Frames, TokenMap, VideoQA
from lab.errors import LabWarning, RunError, UsageError
from lab.model import anatomy, capturing
from lab.model.activations import LabCache, NamesFilter, guard, wanted
from lab.model.answering import Answer, answer
from lab.model.cache import KVCache, LayerCache
from lab.model.decoder import decode
from lab.model.door import Door
from lab.model.families.base import Family
from lab.model.generation import Generated, generate
from lab.model.hooking import (
    Saver,
    Watch,
    check_layers,
    check_name,
    check_pairs,
    check_training,
    checked_edges,
    checkpointing,
    hooked,
)
from lab.model.layout import lay_out, pieces
from lab.model.lock import SharedLock
from lab.model.points import Block, FinalNorm, Points
from lab.model.preparing import prepare, prepare_inputs, with_sampler
from lab.model.pruning import EdgePolicy, Pruning, Reach, pruned_edges, refuse_with
from lab.model.reading import Read, rows
from lab.model.ready import Ready
from lab.model.run import Edges, Run
from lab.model.seeing import see
from lab.model.tower import TowerBlock
from lab.model.wrapping import make_known, place_hooks, use_our_attention
from lab.side import Side
from lab.slots import Hook, ModelSizes, Plan, plan_of

Mechanisms = Sequence[Any]


@dataclass(frozen=True)
class Output:
    """logits [world, read, d_vocab]; heads: what the plan's heads read; maps: the token map of each world at the end."""

    logits: Tensor
    heads: dict[str, Tensor]
    maps: tuple[TokenMap, ...]


class VideoLLM(HookedRootModule):
    """A wrapped model. Make one with `lab.load` or `lab.wrap`.

    hf         the transformers model, usable as before
    family     how this family writes and tokenises videos
    tokenizer  None for models wrapped without one: then only `prepare_inputs` works
    cfg        sizes under TransformerLens's names
    tower_calls  how often the vision side ran
    trained_with  mechanisms a bundled variant was trained with, as plain data (see `lab.mechanisms.trained_with`)
    """

    def __init__(
        self, hf: nn.Module, family: Family, tokenizer: Any = None, preprocessor: Any = None
    ) -> None:
        super().__init__()
        self.hf = hf
        self.family = family
        self.tokenizer = tokenizer
        self.preprocessor = preprocessor
        self.lock, self.pruning = SharedLock(), Pruning()
        self.tower_calls = 0
        self.spec: dict[str, Any] | None = None  # how a recipe names this model; None if it cannot
        self.trained_with: tuple[dict[str, Any], ...] = ()
        lm = anatomy.language_model(hf)
        self.parts = anatomy.layer_parts(lm)
        self.cfg = anatomy.model_config(hf, lm)
        self.mrope = "mrope_section" in (getattr(anatomy.text_config(lm), "rope_parameters", None) or {})
        self.embed, self.connector = Points("hook_out"), Points("hook_out")
        self.blocks = nn.ModuleList(Block(parts) for parts in self.parts)
        self.ln_final = FinalNorm(cast(Any, lm).norm)
        tower = family.tower_layers(hf)
        self.vision = nn.ModuleList(TowerBlock(layer) for layer in tower)
        place_hooks(hf, lm, family, self.parts)
        self.kernel = use_our_attention(hf, lm)
        self.setup()

    def __getstate__(self) -> dict[str, Any]:
        with self.lock.alone():
            capturing.take_off(self.hf)
        # locks and context variables cannot be copied or pickled
        return {k: v for k, v in self.__dict__.items() if k not in ("lock", "pruning")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock, self.pruning = SharedLock(), Pruning()
        make_known(self.hf)
        capturing.make_known(self.hf)

    # ---- what it is -----------------------------------------------------------------------------------------------

    @property
    def lm(self) -> nn.Module:
        return anatomy.language_model(self.hf)

    @property
    def rotary(self) -> nn.Module:
        return cast(Any, self.lm).rotary_emb

    @property
    def device(self) -> torch.device:
        return anatomy.device_of(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        return cast(Any, self.hf).get_input_embeddings().weight.dtype

    @property
    def sizes(self) -> ModelSizes:
        """What mechanisms are told."""
        c = self.cfg
        return ModelSizes(c.n_layers, c.n_heads, c.n_key_value_heads, c.d_model, c.d_head, c.d_vocab)

    @property
    def reach(self) -> Reach:
        """What policies need to know: sizes, and which layers have edges."""
        return Reach(self.sizes, frozenset(p.index for p in self.parts if p.attn is not None))

    @property
    def W_U(self) -> Tensor:  # noqa: N802 (TransformerLens's name)
        """Unembedding, [d_model, d_vocab]."""
        return cast(Any, anatomy.head(self.hf)).weight.T

    @property
    def b_U(self) -> Tensor:  # noqa: N802
        bias = getattr(anatomy.head(self.hf), "bias", None)
        return torch.zeros(self.cfg.d_vocab, device=self.device, dtype=self.dtype) if bias is None else bias

    def unembed(self, resid: Tensor) -> Tensor:
        """Normed stream -> logits, by the checkpoint's own head."""
        return anatomy.head(self.hf)(resid)

    def to_single_token(self, text: str) -> int:
        """Id of a text that is one token. Raises UsageError if it is several or unknown, or without a tokenizer."""
        tokenizer = self.need_tokenizer()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UsageError(f"{text!r} is {len(ids)} tokens, not one; give a shorter text or a token id")
        if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
            raise UsageError(f"the model's vocabulary has no {text!r}; give another word or a token id")
        return int(ids[0])

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Directions in the normed stream before the final norm's gain, so that sums over components give the logit."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        index = torch.as_tensor(ids, device=self.device)
        return self.W_U.T[index] * self.ln_final.weight.to(self.W_U)

    def need_tokenizer(self) -> Any:
        """The tokenizer. Raises UsageError if the model was wrapped without one."""
        if self.tokenizer is None:
            raise UsageError(
                "this model was wrapped without a tokenizer: pass tokenizer= to lab.wrap, or use prepare_inputs"
            )
        return self.tokenizer

    # ---- prepare: touches no weights ------------------------------------------------------------------------------

    def prepare(
        self, item: VideoQA, n_frames: int | None = None, *, fps: float | None = None,
        index: Sequence[int] | None = None, system: str | None = None, mechanisms: Mechanisms = (),
    ) -> Ready:  # fmt: skip
        """Read the video, render the prompt, and say what every position will be. See `lab.model.preparing`."""
        plan = plan_of(mechanisms, self.sizes)
        return prepare(self, item, n_frames=n_frames, fps=fps, index=index, system=system, plan=plan)

    def prepare_inputs(self, *, roles: Any = None, **inputs: Any) -> Ready:
        """A transformers processor's own tensors (input_ids, pixel_values_videos, ...); the batch axis is `world`."""
        return prepare_inputs(self, inputs, roles=roles)

    # ---- see -> lay out -> embed -> decode -> read ----------------------------------------------------------------

    def forward(
        self, ready: Ready | Mapping[str, Any], *, read: Read = "last", edges: Mapping[int, Edges] | None = None,
        look: Sequence[int] = (), mechanisms: Mechanisms = (), chunk: int | None = None,
        policy: EdgePolicy | None = None, executor: str = "reference",
    ) -> Tensor:  # fmt: skip
        """Logits [world, pos, d_vocab] at the positions read.

        read    "last" (default), "all", a position or a list of positions
        edges   layer (0-based) -> function of (q positions, k positions) giving the edges kept, or a bias to add
        look    layers (0-based) whose scores and pattern must exist although no torch hook shows it (nnsight)
        chunk   prefill in pieces of so many positions: long videos in less memory. Not with hooks.
        policy  which edges are cut (`lab.edges.Policy`); in place of that of an open `pruned`. `edges` adds to it
        executor  "reference" masks; "fast" computes only the rows that change and matter, where the policy offers it
        Raises UsageError for a position or layer that does not exist; RunError for what cannot be combined.
        """
        policy = self.pruning.chosen(policy)
        if executor != "reference":
            refuse_with(executor, policy, edges=edges, look=look, mechanisms=mechanisms, chunk=chunk)
            return cast(Any, policy).executor(executor)(self, self._ready(ready), policy, read=read)
        return self.run(
            ready, read=read, edges=edges, look=look, mechanisms=mechanisms, chunk=chunk, policy=policy
        ).logits

    def run(
        self, ready: Ready | Mapping[str, Any], *, read: Read = "last", edges: Mapping[int, Edges] | None = None,
        look: Sequence[int] = (), mechanisms: Mechanisms = (), chunk: int | None = None,
        policy: EdgePolicy | None = None,
    ) -> Output:  # fmt: skip
        """The same run as `model(ready, ...)`, with what the plan's heads read and the token maps the decoder saw."""
        ready = self._ready(ready)
        run = Run(checked_edges(edges), frozenset(look), policy=self.pruning.chosen(policy))
        check_layers(self, [*run.edges, *run.look])
        plan = ready.plan + plan_of(mechanisms, self.sizes)
        ready = with_sampler(self, ready, plan)
        with self.plan_hooks(plan), self.lock.shared():
            door, maps = self.arrive(ready, plan, run)
            resid, side = self.stream(door, run, plan=plan, tokens=maps, chunk=chunk)
            logits = self.read(resid, side, read, chunked=chunk is not None)
            heads: dict[str, Tensor] = {}
            final = self.ln_final(resid) if plan.heads else resid
            for head in plan.heads:
                heads |= head(final, side)
        return Output(logits, heads, side.tokens if chunk is None else maps)

    def arrive(
        self, ready: Ready, plan: Plan | None = None, run: Run | None = None
    ) -> tuple[Door, tuple[Any, ...]]:
        """See and lay out: the state at the decoder's door, and the token map of every world.

        The policy of the `run`, if it has one, becomes edges here, on the maps that the decoder will see.
        """
        plan = ready.plan if plan is None else plan
        door = self.see(ready)
        door, maps = lay_out(self, ready, door, plan)
        if run is not None and run.policy is not None:
            run.edges = pruned_edges(run.policy, maps, self.reach, ready.item, run.edges)
        return Door(cast(Any, self.embed).hook_out(door.embeds), door.rope, door.pad, door.deep), maps

    def maps(self, ready: Ready, *, mechanisms: Mechanisms = ()) -> tuple[TokenMap, ...]:
        """The token map of every world as the decoder will see it, after the stages of the mechanisms."""
        plan = ready.plan + plan_of(mechanisms, self.sizes)
        with self.plan_hooks(plan), self.lock.shared():
            return self.arrive(with_sampler(self, ready, plan), plan)[1]

    def see(self, ready: Ready) -> Door:
        """Run the vision side, or take what an earlier run of this `ready` saw.

        Kept only where no gradient is asked, in eval mode, with nothing hooked before the door, outside `model.alone()`, and
        while the weights and `ready.inputs` are the same tensors at the same version under the same torch hooks (edits
        through `.data` do not count versions: call `ready.memo.clear()`).
        """
        return see(self, ready)

    def stream(
        self,
        door: Door,
        run: Run,
        *,
        plan: Plan | None = None,
        tokens: tuple[Any, ...] = (),
        chunk: int | None = None,
    ) -> tuple[Tensor, Side]:
        """Decode: the residual stream after the last layer, [world, pos, d_model], and its side."""
        plan = plan or Plan()
        check_training(self)
        if chunk is None:
            cache = None if plan.cache is None else LayerCache(plan.cache(), anatomy.text_config(self.lm))
            return decode(self, door, run, cache=cache, detours=plan.detours, tokens=tokens)
        return self.prefill(door, run, self.new_cache(plan), chunk=chunk, plan=plan, tokens=tokens)

    def new_cache(self, plan: Plan | None = None) -> LayerCache:
        """An empty cache: the plan's, or one that keeps every row."""
        make = KVCache if plan is None or plan.cache is None else plan.cache
        return LayerCache(make(), anatomy.text_config(self.lm))

    def prefill(
        self, door: Door, run: Run, cache: LayerCache, *, chunk: int | None = None, plan: Plan | None = None,
        tokens: tuple[TokenMap, ...] = (),
    ) -> tuple[Tensor, Side]:  # fmt: skip
        """Fill a cache with the prompt, in pieces of `chunk` positions; returns the last piece's stream.

        With detours in the plan, pieces end between frames: a detour may choose among the tokens of a frame. A cache
        whose `in_pieces` says something is warned of with it.
        """
        n = door.embeds.shape[1]
        size = n if chunk is None else chunk
        if not isinstance(size, Integral) or size < 1:
            raise UsageError(f"chunk must be at least 1 position, a whole number, got {chunk!r}")
        if size < n and hooked(self):
            raise RunError(
                "hooks see whole prompts, chunked prefill runs pieces; drop chunk=, or close the hooks"
            )
        if size == 1 < n and door.pad is not None and any(p.attn is None for p in self.parts):
            raise RunError("recurrent layers ignore padding in pieces of one position; use chunk=2 or more")
        note = getattr(cache.store, "in_pieces", "") if size < n else ""
        if note:
            warnings.warn(note, LabWarning, stacklevel=2)
        detours = () if plan is None else plan.detours
        out: tuple[Tensor, Side] | None = None
        for start, stop in pieces(n, int(size), tokens, whole_frames=bool(detours)):
            some = tokens if stop - start == n else tuple(t.only(torch.arange(start, stop)) for t in tokens)
            out = decode(
                self, door.rows(start, stop), run, start=start, cache=cache, detours=detours, tokens=some
            )
        if out is None:
            raise UsageError("the prompt is empty")
        return out

    def read(self, resid: Tensor, side: Side, read: Read = "last", *, chunked: bool = False) -> Tensor:
        """Final norm and head at the positions read: [world, read, d_vocab]."""
        normed = cast(Any, self.ln_final).hook_normalized(self.ln_final.normalise(resid))
        if chunked and read != "last":
            raise UsageError(
                "with chunk= only the last position can be read: that is what chunks save memory for"
            )
        return self.unembed(rows(normed, side, read))

    # ---- hooks ----------------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(
        self, fwd_hooks: Sequence[Any] = (), bwd_hooks: Sequence[Any] = (), reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:  # fmt: skip
        """TransformerLens's context manager; holds the model alone, so that no other thread's run is hooked by it.

        Raises UsageError for an unknown hook name (with the closest ones), before anything is hooked.
        """
        check_pairs(fwd_hooks)
        check_pairs(bwd_hooks)
        for name, _ in [*fwd_hooks, *bwd_hooks]:
            check_name(self, name)
        with (
            self.lock.alone(),
            super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts),
        ):
            yield self

    @contextmanager
    def pruned(self, policy: EdgePolicy) -> Iterator[VideoLLM]:
        """Cut a policy's edges in every run made inside: calls, hooked runs, generation, answers.

        The innermost policy counts. A run in a thread without the policy raises RunError: see `lab.model.pruning`.
        """
        with self.pruning.using(policy):
            yield self

    def materialise(self, policy: EdgePolicy) -> Any:
        """A handle on this model whose runs save what the policy cuts: rows nobody reads any more leave the stream and
        write no keys and values, and attention runs in blocks of what is kept. Answers are those of the masked policy.

        Offers calls, `generate`, `answer`, `kv_bytes`. Raises UsageError for what is no such policy, or saves nothing.
        """
        make = getattr(policy, "materialised", None)
        if not callable(make):
            raise UsageError(f"{type(policy).__name__} cannot be materialised; use a lab.edges.Policy")
        return make(self)

    @contextmanager
    def alone(self) -> Iterator[VideoLLM]:
        """Hold the model alone: for captum, nnsight and other code that hooks modules by itself.

        The vision side runs in every call made inside: what others change there is not seen from here.
        """
        with self.lock.alone(claim=True):
            yield self

    @contextmanager
    def plan_hooks(self, plan: Plan) -> Iterator[None]:
        """The hooks a plan asks for, open for one run."""
        if not plan.hooks:
            yield
            return
        with self.hooks(fwd_hooks=plan.hooks):
            yield

    def run_with_hooks(
        self, ready: Any, *, fwd_hooks: Sequence[Hook] = (), bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True, clear_contexts: bool = False, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Logits of a run with temporary hooks, `fn(value, hook=point)`.

        Warns (LabWarning) about a hook that never fired, or that returned a value but changed nothing.
        Raises UsageError for backward hooks that would be gone before any backward pass.
        """
        if bwd_hooks and reset_hooks_end:
            raise UsageError(
                "backward hooks are gone when run_with_hooks returns, before any backward pass; use "
                "`with model.hooks(bwd_hooks=...): model(ready).sum().backward()`"
            )
        if checkpointing(self) and torch.is_grad_enabled() and fwd_hooks:
            raise RunError(
                "gradient checkpointing runs layers again during backward, when these hooks are gone; use "
                "`with model.hooks(fwd_hooks=...): loss = ...; loss.backward()`"
            )
        ready = self._ready(ready)
        check_pairs(fwd_hooks)
        self._guard([n for n, _ in fwd_hooks], ready, kept=False)
        watch = [Watch(name, fn) for name, fn in fwd_hooks]
        with self.hooks([(w.name, w) for w in watch], bwd_hooks, reset_hooks_end, clear_contexts):
            logits = self(ready, **kwargs)
        for w in watch:
            w.warn()
        return logits

    def run_with_cache(
        self, ready: Any, *, names_filter: NamesFilter = None, device: Any = None, remove_batch_dim: bool = False,
        fwd_hooks: Sequence[Hook] = (), **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Logits and a TransformerLens ActivationCache.

        names_filter  None caches everything but scores and pattern (L x L each); name them to have them: the bytes
                      are printed first, and TooBig is raised beyond a quarter of free memory
        fwd_hooks     edits made in the same run; the cache holds the edited values
        """
        ready = self._ready(ready)
        names = wanted(list(self.hook_dict), names_filter)
        self._guard(names, ready, kept=True)
        store: dict[str, Tensor] = {}
        if remove_batch_dim and ready.n_worlds != 1:
            raise UsageError(f"remove_batch_dim needs one world, this input has {ready.n_worlds}")
        with self.hooks(fwd_hooks):
            edited = hooked(self)
            savers = [(name, Saver(store, device, remove_batch_dim, edited)) for name in names]
            with self.hooks(savers):
                logits = self(ready, **kwargs)
        return logits, LabCache(store, self, has_batch_dim=not remove_batch_dim)

    def _guard(self, names: Sequence[Any], ready: Ready, *, kept: bool) -> None:
        plain = [n for n in names if isinstance(n, str)]
        plain += [h for n in names if callable(n) for h in self.hook_dict if n(h)]
        guard(self.cfg, plain, ready.n_worlds, ready.n_pos, self.device, kept)

    # ---- ask ------------------------------------------------------------------------------------------------------

    def generate(
        self, ready: Any, *, max_new_tokens: int = 64, do_sample: bool = False, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, seed: int = 0, stop: Sequence[int] | None = None,
        edges: Mapping[int, Edges] | None = None, mechanisms: Mechanisms = (), chunk: int | None = None,
        callback: Callable[[list[int], str], Any] | None = None, return_ids: bool = False,
        policy: EdgePolicy | None = None,
    ) -> Any:  # fmt: skip
        """Text (a `Generated`: a str with `.ids` [world, new] and `.texts`), or (text, ids) with `return_ids`.

        See `lab.model.generation`. Hooks that are open see the prompt once, then one new row a step.
        """
        ready = self._ready(ready)
        run = Run(checked_edges(edges), policy=self.pruning.chosen(policy))
        check_layers(self, [*run.edges])
        plan = ready.plan + plan_of(mechanisms, self.sizes)
        ready = with_sampler(self, ready, plan)
        with self.plan_hooks(plan):
            out: Generated = generate(
                self, ready, run, plan=plan, max_new_tokens=max_new_tokens, do_sample=do_sample, seed=seed, stop=stop,
                temperature=temperature, top_k=top_k, top_p=top_p, chunk=chunk, callback=callback,
            )  # fmt: skip
        return (out, out.ids) if return_ids else out

    def answer(
        self, item: VideoQA | Ready, *, target: str | None = None, n_frames: int | None = None, **kwargs: Any
    ) -> Answer:
        """The answer to a question, with its probabilities. See `lab.model.answering`."""
        return answer(self, self._ready(item, n_frames), target=target, **kwargs)

    def _ready(self, item: Any, n_frames: int | None = None) -> Ready:
        match item:
            case Ready():
                return item
            case VideoQA():
                return self.prepare(item, n_frames)
            case Mapping():
                return self.prepare_inputs(**item)
            case Frames():
                raise UsageError(
                    "frames alone ask nothing; put them into VideoQA(video=frames, question=...)"
                )
            case _:
                raise UsageError(
                    f"expected a VideoQA, a Ready or a processor's tensors, got {type(item).__name__}"
                )
