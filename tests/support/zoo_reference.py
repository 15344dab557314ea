"""Step caching on any transformer, eagerly: hooks on its attention and FFN modules, nothing of `hero_fx.passes`.

A hooked module gives its own output at a full step. At a cached step it gives `sum_i Y[i] x**i / i!` of what it gave at
the full steps before (FORA, TaylorSeer, HERO's deep layers), or runs on all tokens, of which only the sampled image rows
are kept (HERO's shallow layers): what a token-wise module gives for a row does not depend on the others, and attention
is handed the keys and values that a refresh would see, by standing in for `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Place = tuple[str, int]
"""A module's path, and which of its calls within a step."""

_FEATURES = re.compile(r"Attention|FeedForward|GLUMB|SwiGLU")
_LAYERS = re.compile(r"(\w+|mode_blocks\.image)\.\d+\.")
_NOT_IMAGE = re.compile(r"^(context_refiner|(\w+_)?text_transformer_blocks|txt_mode_blocks)\.")

# Modules whose output is a branch's where the class does not say so, and those that are a part of such a branch.
_OUTPUTS = {
    "cosmos3": r"layers\.\d+\.(self_attn|mlp|mlp_moe_gen)",
    "sana_wm": r"blocks\.\d+\.(attn|cross_attn|mlp)",
    "prx": r"blocks\.\d+\.(attention|down_proj)",
    "ideogram4": r"layers\.\d+\.(attention|feed_forward)",
    "ace_step": r"layers\.\d+\.(self_attn|cross_attn|mlp)",
    "minimax_music_3": r"transformer_blocks\.\d+\.(attn|ff_out)",
    "proteina": r"transformer_layers\.\d+\.(mhba\.mha|transition\.transition)",
    "nucleus_moe": r"transformer_blocks\.\d+\.(attn|img_mlp)",
    "t5_film": r"decoders\.\d+\.layer\.\d+\.(attention|DenseReluDense)",
    "lumina_next": r"layers\.\d+\.(attn2\.to_out\.0|feed_forward)",
}
_SINGLE = r"single_transformer_blocks\.\d+\.proj_out"


def feature_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules whose outputs are the branches' features, by path, in the order of the model."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not _LAYERS.match(path + ".") or path.count(".") < 1 or _NOT_IMAGE.match(path):
            continue
        parent, _, _ = path.rpartition(".")
        if name in _OUTPUTS:
            if re.fullmatch(_OUTPUTS[name], path):
                found[path] = module
        elif re.fullmatch(_SINGLE, path) or (
            _FEATURES.search(type(module).__name__)
            and not any(path.startswith(f"{p}.") for p in found)
            and not hasattr(model.get_submodule(parent), "proj_mlp")
        ):
            found[path] = module
    return found


@dataclass
class Hooked:
    """A model whose branches are cached; `call` runs a step."""

    model: Any
    modules: dict[str, nn.Module]
    order: int = 0
    """Highest Taylor order of the modules that are not refreshed."""
    linear: bool = False
    """Tokens of refreshed modules that are not sampled are extrapolated linearly; false: they keep their features."""
    shallow: Callable[[str], bool] = lambda path: False
    full: Callable[[str], bool] = lambda path: False
    """Modules that are computed at every step."""
    image: int = 0
    """Image tokens; a joint sequence holds them at its end, or at its start."""
    image_first: bool = False
    past: int = 0
    """Tokens of past frames that lie in front of the image, where a joint sequence begins with them."""
    behind: int = 0
    """Tokens behind the image in a joint sequence that neither begins nor ends with it."""
    token_axis: Callable[[str], int] = lambda path: -2
    """Of a module's output."""
    folds: Callable[[str], int] = lambda path: 1
    """How many batches of tokens lie along axis 0 of a module's output, where each token is an element of the batch."""
    stale: str = "-"
    """Modules that attend to a stream which is not refreshed."""
    given: dict[Place, Any] = field(default_factory=dict)
    """What a module gave at the last full step: a tensor or a tuple."""
    y: dict[tuple[Place, int], list[Tensor]] = field(default_factory=dict)
    keys: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def call(
        self, inputs: dict[str, Any], *, full: bool, x: int = 0, d: int = 1, fulls: int = 0, rows: Any = None
    ) -> Any:
        """One call of the model: `x` steps after the last full step, or `d` steps after the one before."""
        mode, calls = _Keys(self, rows), Counter[str]()
        for path, module in self.modules.items():
            original = module.forward

            def forward(*args: Any, path: str = path, original: Any = original, **kwargs: Any) -> Any:
                mode.path = path
                if self.full(path):
                    return original(*args, **kwargs)
                calls[path] += 1  # some modules run for one stream after the other
                place = (path, calls[path])
                if full or self.shallow(path):
                    self.given[place] = original(*args, **kwargs)
                given = self.given[place]
                parts = given if isinstance(given, tuple) else (given,)
                new = tuple(
                    self._part(place, i, part, full, x, d, fulls, rows) if isinstance(part, Tensor) else part
                    for i, part in enumerate(parts)
                )
                mode.path = f"behind {path}"
                return new if isinstance(given, tuple) else new[0]

            module.forward = forward
        try:
            with torch.no_grad(), mode:
                return self.model(**inputs, return_dict=False)
        finally:
            for module in self.modules.values():
                del module.forward

    def _part(self, place: Place, i: int, part: Tensor, full: bool, x: int, d: int, fulls: int, rows: Any) -> Tensor:
        shallow, old = self.shallow(place[0]), self.y.get((place, i), [])
        if full:
            y = [part]
            for k in range(1, 1 + (int(self.linear) if shallow else self.order)):
                y.append((y[k - 1] - old[k - 1]) / d if fulls >= k else torch.zeros_like(part))
            self.y[place, i] = y
            return part
        estimate = old[0]
        for k in range(1, len(old)):
            estimate = estimate + old[k] * (x**k / math.factorial(k))
        if shallow:
            axis, batches = self.token_axis(place[0]) % part.dim(), self.folds(place[0])
            index = self.places(part.shape[axis], rows)
            if batches > 1:
                axis, tokens = 0, part.shape[0] // batches
                index = torch.cat([rows + i * tokens for i in range(batches)])
            cache = old[0]
            if index is not None:
                rows = part.index_select(axis, index)
                estimate = estimate.index_copy(axis, index, rows)
                # A sampled token keeps its slope, and is extrapolated from what was computed.
                for slope in old[1:]:
                    rows = rows - x * slope.index_select(axis, index)
                cache = cache.index_copy(axis, index, rows)
            self.y[place, i] = [cache, *old[1:]]
        return estimate

    def places(self, length: int, rows: Tensor) -> Tensor | None:
        """Where the sampled image tokens are in a sequence; None if it holds none."""
        if length < self.image:
            return None
        return rows + (self.past if self.image_first else max(0, length - self.image - self.behind))


class _Keys(TorchFunctionMode):
    """Keys and values of image tokens that are not sampled, and of text, are those of when they last were computed.

    The calls of attention are counted, in each module and behind it: cached steps leave out whole modules.
    """

    def __init__(self, owner: Hooked, rows: Any) -> None:
        super().__init__()
        self.owner, self.rows, self.path = owner, rows, ""
        self.numbers = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention or not self.owner.image:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        given = dict(zip(names, args, strict=False)) | {n: kwargs.pop(n) for n in names if n in kwargs}
        self.numbers[self.path] += 1
        index = None if self.rows is None else self.owner.places(given["key"].shape[-2], self.rows)
        for number, name in enumerate(names[1:]):
            place, fresh = (self.path, self.numbers[self.path], number), given[name]
            if self.rows is not None and re.search(self.owner.stale, self.path):
                fresh = self.owner.keys[place]
            elif index is not None and not self.owner.full(self.path):
                fresh = self.owner.keys[place].index_copy(-2, index, fresh.index_select(-2, index))
            self.owner.keys[place] = fresh
            given[name] = fresh
        return func(*(given[n] for n in names), *args[3:], **kwargs)
