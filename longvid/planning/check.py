"""Check of a model: is it causal, exact at any cut, complete, bounded, free of state, and safe in 16 bits?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from longvid.events import Direction
from longvid.memory.tracker import is_out_of_memory
from longvid.models.base import model_name
from longvid.models.loading import ARCHITECTURES, load_model
from longvid.planning import conformance
from longvid.planning.conformance import Finding
from longvid.planning.subject import Subject

__all__ = ["ModelCheck", "check_model"]

_SIZE = (480, 832)
_DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """What the checks of a model found."""

    model: str
    random_weights: bool
    "whether the weights were drawn for the check, so that dtypes say nothing of trained ones"
    chunk_invariant: bool
    "whether the model claims that the cut into chunks does not matter"
    findings: tuple[Finding, ...]

    @property
    def conforms(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.verdict != "wrong" for finding in self.findings)

    def finding(self, check: str, direction: Direction | None = None) -> Finding:
        """The finding of one check; KeyError if it did not run."""
        for finding in self.findings:
            if (finding.check, finding.direction) == (check, direction):
                return finding
        raise KeyError((check, direction))

    def to_dict(self) -> dict[str, Any]:
        """All findings with their figures, ready for JSON."""
        return {
            "model": self.model,
            "conforms": self.conforms,
            "random_weights": self.random_weights,
            "chunk_invariant": self.chunk_invariant,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        wrong = sum(finding.verdict == "wrong" for finding in self.findings)
        what = "conforms" if self.conforms else f"does not conform, {wrong} of {len(self.findings)} findings are wrong"
        title = f"{self.model}{' with random weights' if self.random_weights else ''}: {what}"
        rows = (f"{f.verdict:8}{f.check:11}{f.direction or '':8}{f.text}" for f in self.findings)
        return "\n".join([title, *rows])


def check_model(
    model: Any = "tiny",
    *,
    size: tuple[int, int] | None = None,
    random_weights: int | None = None,
    revision: str | None = None,
    allow_pickle_weights: bool = False,
) -> ModelCheck:
    """Run a causal video VAE on frames of a few pixels and report whether it keeps to what longvid relies on.

    It says whether the model is causal in time, at which cuts into chunks it is exact, whether every length comes
    back, how long a start in the middle takes to be exact, how large its contexts are, whether 16-bit dtypes overflow,
    whether anything is left on its modules, and how far it is from the diffusers class of its name, if it has one and
    diffusers is installed. On a CPU it takes seconds for a narrow model, and minutes for a large one. The model is not
    changed.

    Args:
        model: what :func:`longvid.load_model` takes. An architecture without weights gets random ones.
        size: height and width in pixels for which the bytes of contexts are counted; None for 480 x 832.
        random_weights: seed of those.
        revision: branch, tag or commit of a hub id.
        allow_pickle_weights: as for :func:`longvid.load_model`.

    Raises:
        ModelError: there is no such model, it has no weights, or it is no torch module.
        ScheduleError: ``size`` is not positive.
    """
    is_name = isinstance(model, (str, Path)) and str(model) in ARCHITECTURES and not Path(model).exists()
    if is_name and random_weights is None:
        random_weights = 0
    loaded = load_model(
        model, random_weights=random_weights, revision=revision, allow_pickle_weights=allow_pickle_weights
    )
    subject = Subject(loaded)
    own_dtype = next((weight.dtype for weight in cast("nn.Module", loaded).parameters()), torch.float32)
    return ModelCheck(
        model=model_name(loaded),
        random_weights=random_weights is not None,
        chunk_invariant=loaded.geometry.chunk_invariant,
        findings=tuple(_findings(subject, size or _SIZE, own_dtype)),
    )


def _findings(subject: Subject, size: tuple[int, int], own_dtype: torch.dtype) -> Iterator[Finding]:
    """Every check, and what it raises as a finding of its own. State comes first, as it may explain the others."""
    per_direction: list[tuple[str, Callable[[Direction], Finding]]] = [
        ("state", partial(conformance.state, subject)),
        ("two videos", partial(conformance.interleaving, subject)),
        ("causal", partial(conformance.causality, subject)),
        ("cuts", partial(conformance.cuts, subject)),
        ("warm-up", partial(conformance.warmup_length, subject)),
        ("contexts", partial(conformance.contexts, subject.model, size=size)),
    ]
    for dtype in (torch.float16, torch.bfloat16):
        check = partial(conformance.narrow_dtype, subject, dtype=dtype, own=dtype == own_dtype)
        per_direction.append((str(dtype).removeprefix("torch."), check))
    per_direction.append(("diffusers", partial(conformance.parity, subject)))
    yield _attempt("lengths", None, partial(conformance.lengths, subject))
    for name, run in per_direction:
        for direction in _DIRECTIONS:
            yield _attempt(name, direction, partial(run, direction))


def _attempt(name: str, direction: Direction | None, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as exc:  # of a model that we do not know
        if isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and is_out_of_memory(exc)):
            raise
        said = conformance.brief(exc)
        return Finding(check=name, direction=direction, verdict="wrong", text=f"it fails: {said}")
