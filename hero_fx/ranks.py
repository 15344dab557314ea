"""Models whose tokens are shared by several processes: what all of them must decide alike, or wait for each other forever.

A graph of such a model has collectives. A process that takes a full step while another takes a cached one runs other
collectives, and both hang. So what a step is may depend only on what all ranks have in common: the options, the shapes, the
names and numbers of calls. What goes by the memory of one process is refused.
"""

from __future__ import annotations

from torch import fx

from hero_fx.passes.analysis.branch_tokens import body_of
from hero_fx.passes.analysis.exchange import collectives
from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.emit import by_name
from hero_fx.passes.rewrite.plan import ScoredRefresh

from .checks import UnsupportedModel
from .config import Config
from .policy import Forecast, Policy
from .step_graphs import StepGraphs

__all__ = ["check_alone", "check_options", "check_refreshed"]


def check_options(normal: fx.GraphModule, structure: Structure, policy: Policy, config: Config) -> None:
    """Refuses options by which ranks may decide differently.

    Raises:
        UnsupportedModel: the graph has collectives, and there are such.
    """
    if not collectives(normal):
        return
    if config.max_state_bytes is not None:
        raise UnsupportedModel(
            f"max_state_bytes={config.max_state_bytes} with a model that several processes run: each frees state by what it "
            "holds itself, and one that takes a full step where others take a cached one waits for them forever. Leave "
            "max_state_bytes out, and drop sessions on all ranks at the same call"
        )
    if isinstance(policy, Forecast):
        return
    if any(isinstance(strategy, ScoredRefresh) for plan in policy.steps(structure) for _, strategy in plan):
        raise UnsupportedModel(
            f"policy={config.policy!r} chooses tokens by attention, of which each process has some heads only: they would "
            "choose different tokens. Use policy='hero', whose tokens are drawn from one seed, 'fora' or 'taylorseer'"
        )


def check_refreshed(steps: StepGraphs) -> None:
    """Refuses what would be computed in full at cached steps, and with it exchanged.

    Raises:
        UnsupportedModel: a branch cannot be cached as planned, and collectives are part of it.
    """
    nodes, waiting = by_name(steps.normal), set(collectives(steps.normal))
    branches = {branch.label: branch for branch in steps.structure.branches}
    for fallback in steps.fallbacks:
        if waiting.isdisjoint(body_of(nodes, branches[fallback.branch], to_update=True)[1]):
            continue
        raise UnsupportedModel(
            f"{fallback.branch} cannot be cached as planned, so each cached step would exchange its tokens between processes: "
            f"{fallback.reason}. Use refresh_layers=0, by which cached steps extrapolate all layers and exchange nothing"
        )


def check_alone(normal: fx.GraphModule, what: str) -> None:
    """Refuses what one process does for all.

    Raises:
        UnsupportedModel: the graph has collectives.
    """
    if collectives(normal):
        raise UnsupportedModel(f"this model is run by several processes together: {what}")
