"""Which tokens a cached step refreshes: patch-wise sampling with age tracking (Eq. 5 and section 3.3).

The token grid is cut into patches, every patch gives a fixed share of its tokens, and a token is the likelier
to be drawn the longer it has not been. Nothing here looks at features, so a whole trajectory of indices can
be drawn ahead, and the same seed gives the same video.

Three questions are settled one after the other, each with integers or seeded noise alone:

1. *How many tokens does a draw give?* Always `PatchSampler.count`, so that shapes are static.
2. *How many does each patch give?* `floor(ratio * size)`, and some patches one more, see `Quota`.
3. *Which ones?* A lottery in which every missed draw doubles a token's odds; tokens older than a whole cycle
   do not wait for luck, see `Selection.draw`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from .arguments import triple, whole_number
from .quota import Quota, pieces, quotas

__all__ = ["PatchSampler", "Selection"]

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchSampler:
    """Draws a fixed share of the tokens of every patch, the longest unsampled ones with the best odds.

    Holds the options alone; `start` makes the state of a trajectory. Raises ValueError for sizes that are not
    positive ints, a patch that is larger than the grid, a ratio outside (0, 1] and fewer draws than one.
    """

    grid: Triple
    """Frames, height, width in tokens. Token (f, h, w) has the index (f * height + h) * width + w."""
    patch: Triple
    """Frames, height, width of a patch. Where it does not divide the grid, the last patches are smaller."""
    ratio: float
    """Share of the tokens in a draw, alpha in the paper; 0 < ratio <= 1."""
    seed: int = 0
    """Any int. The same seed gives the same indices, with any number of threads and any global seed."""
    draws: int = 1
    """Independent selections a step: 1 for one per step, the number of layers for one per layer."""
    age_weighting: bool = True
    """False: the tokens of a patch have equal odds whatever their age, and nothing bounds the age."""

    def __post_init__(self) -> None:
        for name in ("grid", "patch"):
            sizes = getattr(self, name)
            triple(name, sizes)
            object.__setattr__(self, name, tuple(sizes))
        if any(p > g for p, g in zip(self.patch, self.grid, strict=True)):
            raise ValueError(
                f"patch={self.patch} is larger than grid={self.grid}; allowed: at most the grid on every "
                f"axis. Try patch={tuple(map(min, self.patch, self.grid))}."
            )
        if isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r} is not allowed; it must lie in (0, 1], where 1 is all tokens.")
        whole_number("draws", self.draws, 1, "(one selection a step, or one for each layer)")
        whole_number("seed", self.seed, None)

    @property
    def count(self) -> int:
        """K: the number of tokens in a selection, the same at every draw."""
        return max(1, round(self.ratio * math.prod(self.grid)))

    @property
    def quotas(self) -> dict[int, Quota]:
        """By size of patch."""
        return quotas(self.grid, self.patch, self.ratio, self.count)

    @property
    def max_age(self) -> int | None:
        """A token is never left out of more than this many draws in a row; None without age weighting.

        Proof, for a patch of m tokens that gives `base` of them at every draw and one more in at least one of
        any `wait` draws in a row (`Quota.wait`), and whose tokens are late from age H on (`Quota.late`):

        Late tokens go first, the oldest before the others. So as long as a late token x is not drawn, all
        that its patch gives are tokens that were late when x became late; once drawn they are younger than x,
        as are all that become late after x, and do not go before it again. Let n be the number of tokens, x
        included, that are late when x becomes so. Then x is drawn at the latest when the patch has given n
        tokens, which takes at most W draws, the least w with `base * w + floor(w / wait) >= n`. So x is left
        out H times before and at most W - 1 times after it became late. And n < m: x has age H, so there was
        no full step in the last H draws, and what the patch gave at the last of them (`base` tokens) or at
        any of them (at least one, if H >= wait) is not late. If that leaves n = 0, no token ever is late.
        """
        if not self.age_weighting:
            return None
        return max(quota.max_age for quota in self.quotas.values())

    def start(self) -> Selection:
        """The state of a new trajectory, all ages zero. Equal samplers start equal trajectories."""
        return Selection(self)


class Selection:
    """The state of one trajectory: how long each token has not been drawn. Not thread-safe.

    All its tensors are on the CPU. Row r of a draw depends on the seed, on r, on the number of draws before
    it and on when `refreshed` was called; on nothing else.
    """

    def __init__(self, sampler: PatchSampler) -> None:
        """Use `PatchSampler.start`."""
        self._sampler = sampler
        self._drawn = 0
        quota_of = sampler.quotas
        some = next(iter(quota_of.values()))
        self._unit, self._stride = some.unit, some.stride
        # Normal tensors, also if the first call comes in inference mode and the next does not.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._slot, sizes = _lay_out(sampler.grid, sampler.patch)
            width = math.prod(sampler.patch)
            self._shape = (sampler.draws, len(sizes), width)
            self._padding = torch.arange(width, device="cpu") >= sizes[:, None]
            table = [quota_of.get(size) for size in range(width + 1)]
            self._base = _ints([q.base if q else 0 for q in table])[sizes]
            self._extra = _ints([q.extra if q else 0 for q in table])[sizes]
            self._late = _ints([q.late if q else 0 for q in table])[sizes, None]
            self._rank = torch.arange(width, device="cpu").expand(self._shape)
            # Odds that double beyond this are certainty, and halves of halves would end at zero.
            self._luck = 0.5 ** torch.arange(65, dtype=torch.float64, device="cpu")
            self._age = torch.zeros(self._shape, dtype=torch.int64, device="cpu")
            self._random = [_generator(sampler.seed, row) for row in range(sampler.draws)]
            self._phase = torch.stack([self._walk(generator) for generator in self._random])

    @property
    def ages(self) -> torch.Tensor:
        """int64 [draws, N]: draws in a row that each token has been left out of, since the last full step."""
        return self._age.flatten(1)[:, self._slot]

    def refreshed(self) -> None:
        """A full step has computed every token: all ages are zero."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self._age = torch.zeros_like(self._age)

    def draw(self) -> torch.Tensor:
        """int64 [draws, K] on the CPU: the next selection, each row ascending and without repeats.

        Within a patch this is a weighted draw without replacement, weight 2^age: `E * 2^-age` with E
        exponential, the smallest first (an exponential race; the same thing as Gumbel top-k with log-weights
        `age * ln 2`). So every missed draw doubles a token's odds, and after a full step all are equal.
        Tokens of age `Quota.late` and more go before all others, the oldest first.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            noise = torch.stack(
                [
                    torch.rand(self._shape[1:], generator=generator, dtype=torch.float64, device="cpu")
                    for generator in self._random
                ]
            )
            # 1 - u is never 0, so the logarithm is finite and no token falls behind the padding.
            key = -torch.log1p(-noise)
            if self._sampler.age_weighting:
                key = key * self._luck[self._age.clamp(max=64)]
                # From -1 - age up to -age: before all that race, the older the earlier, equals by lot.
                key = torch.where(self._age >= self._late, noise - (1.0 + self._age), key)
            key = key.masked_fill(self._padding, math.inf)
            quota = self._base + self._has_extra()
            first = self._rank < quota[..., None]
            taken = torch.zeros_like(first).scatter_(-1, key.argsort(-1), first)
            self._age = (self._age + 1).masked_fill(taken, 0)
            self._drawn += 1
            # nonzero() goes row by row in ascending order, and all rows have the same number.
            tokens = taken.flatten(1)[:, self._slot].nonzero()[:, 1]
            return tokens.view(self._sampler.draws, self._sampler.count)

    def _has_extra(self) -> torch.Tensor:
        """bool [draws, patches]: which patches give one more at this draw."""
        turn = self._drawn * self._stride % self._unit
        return (self._phase + turn) % self._unit >= self._unit - self._extra

    def _walk(self, generator: torch.Generator) -> torch.Tensor:
        """int64 [patches]: the sum before each patch on a walk in random order from a random start."""
        order = torch.randperm(self._shape[1], generator=generator, device="cpu")
        extra = self._extra[order]
        start = torch.randint(self._unit, (), generator=generator, device="cpu")
        phase = torch.empty_like(extra)
        phase[order] = (start + extra.cumsum(0) - extra) % self._unit
        return phase


def _lay_out(grid: Triple, patch: Triple) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot of each token among [patches, tokens of the largest patch], size of each patch); both int64."""
    number = place = torch.zeros((1, 1, 1), dtype=torch.int64, device="cpu")
    sizes = torch.ones((1, 1, 1), dtype=torch.int64, device="cpu")
    for axis, (g, p) in enumerate(zip(grid, patch, strict=True)):
        shape = [-1 if other == axis else 1 for other in range(3)]
        at, cut = torch.arange(g, device="cpu"), _ints(pieces(g, p))
        sizes = sizes * cut.view(shape)
        number = number * len(cut) + (at // p).view(shape)
        place = place * cut[at // p].view(shape) + (at % p).view(shape)
    return (number * math.prod(patch) + place).flatten(), sizes.flatten()


def _generator(seed: int, row: int) -> torch.Generator:
    """A generator of its own for each row: a row must not depend on how many others there are."""
    # 32 bits, for the CPU generator ignores the others.
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
