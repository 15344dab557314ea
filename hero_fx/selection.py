"""Which tokens a cached step refreshes: patch-wise sampling with age tracking (Eq. 5 and section 3.3).

The token grid is cut into patches, every patch gives a fixed share of its tokens, and a token is the likelier
to be drawn the longer it has not been. Nothing here looks at features, so a whole trajectory of indices can
be drawn ahead, and the same seed gives the same video.

Three questions are settled one after the other, each with integers or seeded noise alone:

1. *How many tokens does a draw give?* Always `PatchSampler.count`, so that shapes are static.
2. *How many does each patch give?* `floor(ratio * size)`, and some patches one more, see `_Quota`.
3. *Which ones?* A lottery in which every missed draw doubles a token's odds; tokens older than a whole cycle
   do not wait for luck, see `Selection.draw`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import torch

from .arguments import triple, whole_number

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
    def max_age(self) -> int | None:
        """A token is never left out of more than this many draws in a row; None without age weighting.

        Proof, for a patch of m tokens that gives `base` of them at every draw and one more in at least one of
        any `wait` draws in a row (`_Quota.wait`), and whose tokens are late from age H on (`_Quota.late`):

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
        return max(quota.max_age for quota in _quotas(self).values())

    def start(self) -> Selection:
        """The state of a new trajectory, all ages zero. Equal samplers start equal trajectories."""
        return Selection(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Quota:
    """How many tokens each patch of one size gives.

    The share of a patch is rarely a whole number of tokens. Each gives the whole part at every draw; the rest
    is carried by walking over the patches in a random order and adding up what is left over: a patch gives
    one more whenever the sum passes a multiple of `unit`. So the number of extras is the same at every draw.
    From draw to draw the walk starts with another remainder, `stride` more than the last (modulo `unit`): a
    patch gives an extra if and only if `(phase + t * stride) % unit >= unit - extra`. As `stride` and `unit`
    have no common divisor, every patch gives exactly `extra` extras in any `unit` draws in a row. That the
    stride is near the golden section spreads them evenly.
    """

    size: int
    """Tokens in a patch of this kind."""
    base: int
    """Tokens that it gives at every draw."""
    extra: int
    """Share of one more token, in parts of `unit`."""
    unit: int
    stride: int

    @property
    def wait(self) -> int | None:
        """Least w such that any w draws in a row have an extra; None if there are no extras.

        By the three-gap theorem w points of a rotation cut the circle into gaps of lengths `up`, `down` (the
        nearest neighbours on either side, first reached after i and j turns) and, until w = i + j, their sum.
        An arc of `extra` units can hide in no gap that is as short as itself.
        """
        if self.extra == 0:
            return None
        if self.extra == self.unit:
            return 1
        (up, i), (down, j) = (self.stride, 1), (self.unit - self.stride, 1)
        while max(up, down) > self.extra:
            if up > down:
                up, i = up - down, i + j
            else:
                down, j = down - up, i + j
        return i + j

    @property
    def late(self) -> int:
        """H: age from which a token goes before younger ones: the draws in which a patch gives `size`."""
        return math.ceil(Fraction(self.size * self.unit, self.base * self.unit + self.extra))

    @property
    def max_age(self) -> int:
        """The bound that is proved at `PatchSampler.max_age`."""
        late, wait = self.late, self.wait
        waiting = self.size - max(self.base, int(wait is not None and late >= wait))  # n of the proof
        if wait is None:
            return late - 1 + math.ceil(Fraction(waiting, self.base))
        # In `wait` draws the patch gives at least base * wait + 1; the last, shorter round gives base a draw.
        rounds, rest = divmod(waiting, self.base * wait + 1)
        last = wait if self.base == 0 else math.ceil(Fraction(rest, self.base))
        return late - 1 + rounds * wait + (last if rest else 0)


def _quotas(sampler: PatchSampler) -> dict[int, _Quota]:
    """The quota of each size of patch that the grid has."""
    cuts = [_cut(g, p) for g, p in zip(sampler.grid, sampler.patch, strict=True)]
    patches: dict[int, int] = {}
    for lengths in product(*map(set, cuts)):
        number = math.prod(cut.count(length) for cut, length in zip(cuts, lengths, strict=True))
        patches[math.prod(lengths)] = patches.get(math.prod(lengths), 0) + number
    # The float 1/6 is a little less than 1/6, and of 6 tokens that would be none.
    simple = Fraction(sampler.ratio).limit_denominator(10**6)
    for ratio in (simple, Fraction(sampler.count, math.prod(sampler.grid))):
        base = {size: math.floor(ratio * size) for size in patches}
        rest = {size: ratio * size - base[size] for size in patches}
        extras = sampler.count - sum(base[size] * patches[size] for size in patches)
        wanted = sum((rest[size] * patches[size] for size in patches), Fraction(0))
        able = sum(patches[size] for size, part in rest.items() if part)
        # The count is rounded. If that leaves no extras, a patch too small for a whole token would never be
        # drawn from; to share out the count itself, and not the ratio, then gives all tokens equal chances.
        if 0 <= extras <= able and bool(extras) == bool(wanted):
            break
    # The rests need not add up to the extras, again for the rounding. They are scaled to do so; where that
    # would ask a patch for more than one extra, what they lack of one is scaled.
    if wanted and max(rest.values()) * extras <= wanted:
        rest = {size: part * extras / wanted for size, part in rest.items()}
    elif wanted:
        rest = {size: part and 1 - (1 - part) * (able - extras) / (able - wanted) for size, part in rest.items()}
    unit = math.lcm(*(part.denominator for part in rest.values()))
    stride = _golden(unit)
    return {
        size: _Quota(size=size, base=base[size], extra=int(rest[size] * unit), unit=unit, stride=stride)
        for size in patches
    }


class Selection:
    """The state of one trajectory: how long each token has not been drawn. Not thread-safe.

    All its tensors are on the CPU. Row r of a draw depends on the seed, on r, on the number of draws before
    it and on when `refreshed` was called; on nothing else.
    """

    def __init__(self, sampler: PatchSampler) -> None:
        """Use `PatchSampler.start`."""
        self._sampler = sampler
        self._drawn = 0
        quotas = _quotas(sampler)
        some = next(iter(quotas.values()))
        self._unit, self._stride = some.unit, some.stride
        # Normal tensors, also if the first call comes in inference mode and the next does not.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._slot, sizes = _lay_out(sampler.grid, sampler.patch)
            width = math.prod(sampler.patch)
            self._shape = (sampler.draws, len(sizes), width)
            self._padding = torch.arange(width, device="cpu") >= sizes[:, None]
            table = [quotas.get(size) for size in range(width + 1)]
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
        Tokens of age `_Quota.late` and more go before all others, the oldest first.
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
        at, cut = torch.arange(g, device="cpu"), _ints(_cut(g, p))
        sizes = sizes * cut.view(shape)
        number = number * len(cut) + (at // p).view(shape)
        place = place * cut[at // p].view(shape) + (at % p).view(shape)
    return (number * math.prod(patch) + place).flatten(), sizes.flatten()


def _cut(length: int, piece: int) -> list[int]:
    """Lengths of the pieces of an axis; the last one may be shorter."""
    return [min(piece, length - start) for start in range(0, length, piece)]


def _golden(unit: int) -> int:
    """The number nearest to the golden section of `unit` that has no divisor in common with it."""
    middle = round(unit * (math.sqrt(5) - 1) / 2)
    return next(
        n for off in range(unit + 1) for n in (middle + off, middle - off) if 0 <= n <= unit and math.gcd(n, unit) == 1
    )


def _generator(seed: int, row: int) -> torch.Generator:
    """A generator of its own for each row: a row must not depend on how many others there are."""
    # 32 bits, for the CPU generator ignores the others.
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
