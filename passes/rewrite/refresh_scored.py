"""Cached steps that compute the tokens with the highest scores anew (ToCa, DuCa)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.emit import Emitter, by_name, value_of
from hero_fx.passes.slots import ScalarSlot

from .features import score_slots
from .keep import Rows
from .plan import ScoredRefresh, StepPlan
from .recompute import Site
from .subset import Subset

__all__ = ["RefreshScored"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshScored:
    """Computes a branch for the image tokens with the highest scores, chosen in the graph (ToCa, DuCa).

    Before::

        linear = aten.linear.default(x, weight)
        add = aten.add.Tensor(x, linear)

    After::

        topk = aten.topk.default(total, K)  # score + 0.25 * age / N, best of each 2x2 cell + 0.4
        best = getitem(topk, 1)  # [B, K]
        sampled = aten.gather.default(x, 1, best)
        linear_1 = aten.linear.default(sampled, weight)
        merged = aten.scatter.src(y0, 1, best, linear_1)
        add = aten.add.Tensor(x, merged)

    Legal as for `RefreshBranches`; only branches without attention among their own tokens are planned this way.
    """

    structure: Structure
    plan: StepPlan
    grid: tuple[int, int, int] | None = None
    state_dtype: torch.dtype | None = None
    name: str = "refresh_scored"

    def apply(self, gm: fx.GraphModule) -> int:
        emitter, nodes = Emitter(gm), by_name(gm)
        sites = 0
        for branch, strategy in self.plan:
            if isinstance(strategy, ScoredRefresh):
                site = Site.of(emitter, nodes, self.structure, branch, strategy, self.state_dtype)
                site.recompute(Rows(self._best(site, strategy)), _attend)
                sites += 1
        return sites

    def _best(self, site: Site, strategy: ScoredRefresh) -> fx.Node:
        """The indices of the best tokens, which are stamped as fresh."""
        emitter, tokens = site.emitter, self.structure.image_tokens
        count = max(1, round(strategy.ratio * tokens))
        target = value_of(site.tokens.targets[0])
        with emitter.before(site.anchor()):
            with emitter.mode:
                like = torch.empty(target.shape[0], tokens, device=target.device)
            score, stamp = (emitter.state(slot, like) for slot in score_slots(site.branch))
            x = emitter.scalar(ScalarSlot("power"), target.device)
            grid = self.grid or (1, 1, tokens)
            best = emitter.inline(
                lambda s, t, x: best_tokens(s, x - t, strategy.interval, grid, count), score, stamp, x
            )
            now = emitter.call(aten.expand.default, x, [target.shape[0], count])
            emitter.write_back(stamp, emitter.call(aten.scatter.src, stamp, 1, best, now))
        return best


def _attend(subset: Subset, node: fx.Node) -> fx.Node:
    raise AssertionError("a branch with self-attention is not refreshed by score")


def best_tokens(
    score: torch.Tensor, age: torch.Tensor, interval: int, grid: tuple[int, int, int], count: int
) -> torch.Tensor:
    """Indices [B, count] of the best image tokens: score [B, N] + 0.25 age / interval, the best of each 1x2x2 cell + 0.4."""
    frames, height, width = grid
    total = score + 0.25 * age / interval
    cells = total.reshape(-1, frames, height, width)
    rows, columns = height + height % 2, width + width % 2
    padded = torch.nn.functional.pad(cells, (0, columns - width, 0, rows - height), value=float("-inf"))
    blocks = padded.reshape(-1, frames, rows // 2, 2, columns // 2, 2)
    best = blocks.amax(dim=(3, 5), keepdim=True)
    bonus = (blocks == best).reshape(-1, frames, rows, columns)[:, :, :height, :width]
    total = total + 0.4 * bonus.reshape(total.shape).to(total.dtype)
    return torch.topk(total, count, dim=1).indices
