"""Where the time of a block goes."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bench.measure import synchronize
from model.denoise import Denoiser
from model.dit import DiTBlock


class Components:
    """Times what a `Denoiser` spends where, while entered: marks on the GPU's own clock, or CPU time.

    Hooks on the modules and a wrapper around the attention backend; of nested ones the outermost counts.
    Nothing can be marked inside of compiled code: of compiled layers `project` and `finish` are timed whole.
    """

    def __init__(self, denoiser: Denoiser, compiled: bool) -> None:
        self._denoiser, self._attend = denoiser, denoiser.attend
        self._compiled, self._cuda = compiled, denoiser.dit.device.type == "cuda"
        self._undo: list[Callable[[], object]] = []
        self._spans: list[tuple[str, Any, Any]] = []
        self._depth, self._begin = 0, None

    def __enter__(self) -> "Components":
        dit = self._denoiser.dit
        for block in cast(list[DiTBlock], list(dit.blocks)):
            if self._compiled:
                self._wrap(block)
            else:
                own, text = block.self_attn, block.cross_attn
                self._watch("projections", own.q, own.k, own.v, own.o)
                self._watch("text", text.q, text.o)
                self._watch("ffn", block.ffn)
        self._watch("injection", dit.audio_injector, dit.casual_audio_encoder)
        self._watch("embeddings", dit.head)
        self._denoiser.attend = replace(self._attend, attend=self._timed_attention)
        return self

    def __exit__(self, *_: object) -> None:
        self._denoiser.attend = self._attend
        for undo in self._undo:
            undo()

    def seconds(self) -> dict[str, float]:
        """By component; what is left of a call's time is norms, positions, sums and the embedding."""
        synchronize(self._denoiser.dit.device)
        totals: dict[str, float] = {}
        for name, begin, end in self._spans:
            elapsed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            totals[name] = totals.get(name, 0.0) + elapsed
        return totals

    def _watch(self, name: str, *modules: torch.nn.Module) -> None:
        for module in modules:
            before = module.register_forward_pre_hook(lambda *_: self._start())
            after = module.register_forward_hook(lambda *_: self._stop(name))
            self._undo += [before.remove, after.remove]

    def _wrap(self, block: DiTBlock) -> None:
        project, finish = block.project, block.finish
        self._undo.append(partial(block.__dict__.update, project=project, finish=finish))

        def timed_project(*arguments: Any) -> Any:
            return self._timed("project", project, *arguments)

        def timed_finish(*arguments: Any) -> Any:
            return self._timed("finish", finish, *arguments[:-1], self._attend)

        block.__dict__.update(project=timed_project, finish=timed_finish)

    def _timed_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_text = any(k is keys for keys, _ in self._denoiser.segment.texts[0])
        return self._timed("text" if of_text else "self_attention", self._attend, q, k, v)

    def _timed(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        self._start()
        result = call(*arguments)
        self._stop(name)
        return result

    def _start(self) -> None:
        if self._depth == 0:
            self._begin = self._now()
        self._depth += 1

    def _stop(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._spans.append((name, self._begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
