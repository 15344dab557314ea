"""Proof on one's own model: a short trajectory, run in all the ways that must give the same, and a table of how they differ.

=========================  ============================================================================================
full steps                 against the model compiled plainly
matrix products            of a cached step run in the dtypes in which the model runs them (autocast)
collapsed                  form against the literal one, at every step
refresh                    of every token at every layer, with live text, against full compute
constant trajectory        its cached steps against its full step: features that do not change are reused exactly
kept outputs               do not change when later steps update the feature state
repeat                     with the same seed gives the same bits
sessions                   two that take turns, against each alone
models                     two of one class on one backend, that take turns or follow one another, against each alone
=========================  ============================================================================================

A check that does not hold shows a defect of `hero_fx` with this model, never a loss of quality: what caching costs in
quality is no part of any check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from hero_fx import dynamo
from hero_fx.backends import Backend
from hero_fx.backends import backend as make_backend

from .example import by_name
from .trial import Check, Trial

__all__ = ["Check", "Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer of `verify`; `str` of it is the table."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether all checks hold."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        rows = [
            [
                c.name,
                c.compared,
                f"{c.error:.1e}",
                f"{c.tolerance:.0e}" if c.tolerance else "0",
                "yes" if c.ok else "NO",
            ]
            for c in self.checks
        ]
        table = tabulate(rows, headers=["check", "compared", "error", "tolerance", "holds"], disable_numparse=True)
        notes = [f"{c.name}: {c.note}" for c in self.checks if c.note]
        failed = [c.name for c in self.checks if not c.ok]
        verdict = (
            "all checks hold" if not failed else f"{len(failed)} of {len(self.checks)} do not hold: {', '.join(failed)}"
        )
        return "\n".join([table, *notes, verdict])


def verify(
    model: Callable[..., Any],
    *args: Any,
    backend: Backend | None = None,
    inner: str | Callable[..., Any] | None = None,
    show: bool = True,
    **inputs: Any,
) -> Verification:
    """Runs a short trajectory of a model in all the ways that must agree, and prints a table of the errors.

    ::

        model = torch.compile(model, backend=hero_fx.backend(interval=2))
        hero_fx.verify(model, hidden_states=latents, timestep=t, encoder_hidden_states=text)

    The trajectory starts at the example call. Its timestep (found as the backend finds it) travels a twentieth of the
    example at a time, whatever its shape and scale; the latents are those floating-point inputs that the image tokens come
    from and that are shaped like an output, else the largest one that the image tokens come from, and move by seeded noise.
    All other arguments are the same objects at every call, as in a denoising loop. Its schedule has as many full steps as the
    extrapolation needs, then cached and full ones: the backend's own may have its first cached step late.

    Dynamo traces the model once more, and its graph is compiled three to five times: plainly, with the backend's options, in
    the other form, and with two variants of the policy, where they differ (Inductor knows most kernels again); then there are
    some seventy calls. Nothing is left behind: the model's own compiled code and feature state stay, buffers that it writes
    get their values back, weights are never copied (but one small parameter, for the second model).

    Args:
        model: what `torch.compile` made of a module or function, or `module.compile`; or a plain one. In eval mode.
        args, inputs: one call, as the denoising loop makes it.
        backend: options to verify; None: those the model was compiled with, or the defaults.
        inner: another inner compiler than the backend's: `"aot_eager"` is fast, and shows all but errors of Inductor.
        show: print the table.

    Returns:
        The rows; `.ok` is true if all hold.

    Raises:
        ValueError: the model cannot be accelerated with these options, or `policy="full"`, which rewrites nothing, or a plan,
            whose coefficients are for its own schedule.
    """
    backend = backend or dynamo.backend_of(model, Backend) or make_backend()
    config = backend.config
    if config.plan is not None:
        raise ValueError(
            "the backend follows a plan, whose coefficients are for its own schedule and not for a short "
            "trajectory: verify the policy without plan=; hero_fx.calibrate reports a plan's error on trajectories of its own"
        )
    if inner is not None:
        config = replace(config, inner=inner, **({} if inner == "inductor" else {"mode": None, "options": None}))
    if config.policy == "full":
        raise ValueError("policy='full' rewrites nothing: there is nothing to verify")
    config = replace(config, strict=True)
    plain = dynamo.uncompiled(model)
    trial = Trial(plain, by_name(plain, args, inputs), config)
    try:
        result = Verification(tuple(trial.checks()))
    finally:
        trial.finish()
    if show:
        print(result)
    return result
