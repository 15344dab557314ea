"""How many of its tokens each patch of a grid gives at a draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

__all__ = ["Quota", "pieces", "quotas"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
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


def quotas(grid: tuple[int, ...], patch: tuple[int, ...], ratio: float, count: int) -> dict[int, Quota]:
    """The quota of each size of patch that the grid has."""
    cuts = [pieces(g, p) for g, p in zip(grid, patch, strict=True)]
    patches: dict[int, int] = {}
    for lengths in product(*map(set, cuts)):
        number = math.prod(cut.count(length) for cut, length in zip(cuts, lengths, strict=True))
        patches[math.prod(lengths)] = patches.get(math.prod(lengths), 0) + number
    # The float 1/6 is a little less than 1/6, and of 6 tokens that would be none.
    simple = Fraction(ratio).limit_denominator(10**6)
    for share in (simple, Fraction(count, math.prod(grid))):
        base = {size: math.floor(share * size) for size in patches}
        rest = {size: share * size - base[size] for size in patches}
        extras = count - sum(base[size] * patches[size] for size in patches)
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
        size: Quota(size=size, base=base[size], extra=int(rest[size] * unit), unit=unit, stride=stride)
        for size in patches
    }


def pieces(length: int, piece: int) -> list[int]:
    """Lengths of the pieces of an axis; the last one may be shorter."""
    return [min(piece, length - start) for start in range(0, length, piece)]


def _golden(unit: int) -> int:
    """The number nearest to the golden section of `unit` that has no divisor in common with it."""
    middle = round(unit * (math.sqrt(5) - 1) / 2)
    return next(
        n for off in range(unit + 1) for n in (middle + off, middle - off) if 0 <= n <= unit and math.gcd(n, unit) == 1
    )
