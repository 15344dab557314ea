"""HERO and its baselines in plain eager PyTorch: the definition of correct for the compiler passes.

Written from the equations, on the block loop of diffusers' ``CogVideoXTransformer3DModel``; nothing of
``hero_fx`` is imported. A layer has two residual branches, ``"attn"`` and ``"ffn"``; each does
``X = X + g * F``, where F is its output after the output projection and g its adaLN gate. What a cache holds
is called C: F itself (``"pre_gate"``) or g * F with the gate of the step that computed it (``"post_gate"``).
The text stream ``[B, S, D]`` and the image stream ``[B, N, D]`` are one tensor ``[text, image]`` of S+N rows.

For every branch the state holds a list Y: ``Y[0] = C`` of the last full step and
``Y[i] = (Y[i-1] - Y[i-1] as it was before that full step) / d``, d = distance of the last two full steps.
x steps after a full step the estimate of C is ``sum_i Y[i] * x**i / i!`` (HERO's Eq. 6 is the case i <= 1). A calibrated
plan has other weights in the place of ``x**i / i!``, also for i = 0 where no rows are refreshed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .reference_parts import (
    attention_received,
    cell_bonus,
    differences,
    drift,
    joint_rotary,
    modulated,
    pick,
    put,
    qkv,
    unpatchify,
    value_smallness,
)

CHOICES = {
    "policy": ("full", "fora", "taylorseer", "hero", "toca", "duca"),
    "keys": ("sampled", "sampled+text", "landmarks", "all"),
    "text": ("skip", "live"),
    "unsampled": ("reuse", "extrapolate", "gate"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What cached steps do. Raises ``ValueError`` for values that are not allowed."""

    policy: str
    order: int = 1
    """Highest Taylor order: of all layers (taylorseer), of the deep layers (hero)."""
    refresh_layers: int | None = None
    """M: layers 0..M-1 are shallow. Needed by hero, ignored by the others."""
    ratio: float = 1 / 6
    """Share of the image tokens that toca and duca recompute (hero is given its indices)."""
    interval: int = 2
    """N of the staleness bonus of toca and duca."""
    keys: str = "all"
    stride: int = 6
    """keys "landmarks": image tokens 0, stride, 2 stride, ... are seen as they were at the last full step."""
    text: str = "skip"
    cache_point: tuple[str, str] = ("pre_gate", "pre_gate")
    """(shallow, deep) layers of hero; fora and taylorseer take the second, toca and duca the first."""
    unsampled: str = "reuse"
    grid: tuple[int, int, int] | None = None
    """(frames, height, width) in tokens. Needed by toca and duca."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {allowed}")
        points = self.cache_point
        if not isinstance(points, tuple) or len(points) != 2 or not set(points) <= {"pre_gate", "post_gate"}:
            raise ValueError(f"cache_point={points!r}: use a pair of 'pre_gate' or 'post_gate'")
        if self.order < 0:
            raise ValueError(f"order={self.order}: use 0 or more")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: use a share in (0, 1]")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: use 1 or more")
        if self.policy == "hero" and (self.refresh_layers is None or self.refresh_layers < 0):
            raise ValueError(f"refresh_layers={self.refresh_layers}: hero needs the count of shallow layers")
        grid_ok = self.grid is not None and len(self.grid) == 3 and min(self.grid) >= 1
        if self.policy in ("toca", "duca") and not grid_ok:
            raise ValueError(f"grid={self.grid}: {self.policy} needs (frames, height, width) in tokens")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the parts of ``Reference.run`` read of its arguments."""

    x: int
    d: int
    fulls: int
    indices: Callable[[int], Tensor] | None
    rotary: tuple[Tensor, Tensor] | None
    """Joint tables (cos, sin), ``[S+N, head_dim]``."""
    n_text: int
    weights: Callable[[int, int], Tensor | float] | None
    """(layer, i) -> a plan's weight of ``Y[i]``; None: Taylor's."""

    def weight(self, layer: int) -> Callable[[int], Tensor | float] | None:
        """Those of a layer."""
        weights = self.weights
        return None if weights is None else lambda i: weights(layer, i)


class Reference:
    """One lane: a model, what its cached steps do, and the features of the current trajectory."""

    def __init__(self, model: Any, config: Config) -> None:
        layers = len(model.transformer_blocks)
        if model.training:
            raise ValueError("model is in training mode: call model.eval()")
        if model.config.patch_size_t is not None or model.ofs_embedding is not None:
            raise ValueError("model is a CogVideoX 1.5 (patch_size_t or ofs is set): use a 1.0 configuration")
        if config.policy == "hero" and (config.refresh_layers or 0) > layers:
            raise ValueError(f"refresh_layers={config.refresh_layers}: the model has {layers} layers")
        self.model = model
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget the trajectory."""
        self.y: dict[tuple[int, str], list[Tensor]] = {}
        """(layer, branch): the list Y, each ``[B, S+N, D]``."""
        self.gates: dict[tuple[int, str], Tensor] = {}
        """(layer, branch): the gate of every token at the last full step, ``[B, S+N, D]``."""
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        """Shallow layers: K and V of all tokens, ``[B, heads, S+N, head_dim]``."""
        self.base: dict[int, Tensor] = {}
        """toca, duca: base score of the image tokens at the last full step, ``[B, N]``."""
        self.stamp: dict[int, Tensor] = {}
        """toca, duca: the x at which the FFN of each image token was last computed, ``[B, N]``."""
        self.selected: dict[int, Tensor] = {}
        """The image tokens ``[B, K]`` that a layer recomputed when it last did."""

    def run(
        self,
        *,
        kind: str,
        x: int,
        d: int,
        fulls: int,
        indices: Callable[[int], Tensor] | None,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        weights: Callable[[int, int], Tensor | float] | None = None,
    ) -> Tensor:
        """One call of the model, ``[B, frames, channels, height, width]``.

        kind: "full" or "cached"; policy "full" computes everything either way. x, for cached steps: steps
        since the last full step. d, for full steps: distance to the full step before, ignored if fulls is 0.
        fulls: full steps before this one. indices, for cached steps of hero: layer -> sampled image tokens
        ``[K]``, all different. weights, for cached steps of a plan: (layer, i) -> what ``Y[i]`` is multiplied with.
        """
        if kind not in ("full", "cached"):
            raise ValueError(f"kind={kind!r}: use 'full' or 'cached'")
        if not self.y and self.config.policy != "full" and (kind == "cached" or fulls > 0):
            raise ValueError(f"kind={kind!r}, fulls={fulls}: no full step came before; start with fulls=0")
        model, n_text = self.model, encoder_hidden_states.shape[1]
        rotary = None if image_rotary_emb is None else joint_rotary(image_rotary_emb, n_text)
        step = Step(x=x, d=d, fulls=fulls, indices=indices, rotary=rotary, n_text=n_text, weights=weights)
        compute = self._full if kind == "full" or self.config.policy == "full" else self._cached
        with torch.no_grad():
            emb = model.time_embedding(model.time_proj(timestep).to(hidden_states.dtype))
            tokens = model.patch_embed(encoder_hidden_states, hidden_states)
            for layer, block in enumerate(model.transformer_blocks):
                for branch, norm in (("attn", block.norm1), ("ffn", block.norm2)):
                    inputs, gate = modulated(norm, tokens, n_text, emb)
                    c = compute(layer, branch, inputs, gate, step)
                    tokens = tokens + (c if self._cache_point(layer) == "post_gate" else gate * c)
            image = model.norm_out(model.norm_final(tokens[:, n_text:]), temb=emb)
            return unpatchify(model.proj_out(image), hidden_states.shape, model.config.patch_size)

    def _full(self, layer: int, branch: str, inputs: Tensor, gate: Tensor, step: Step) -> Tensor:
        """C of all tokens, computed as the model does, and recorded."""
        f = self._features(layer, branch, inputs, None, step)
        c = self._cache_of(layer, f, gate)
        if self._shallow(layer) and self.config.unsampled == "gate":
            before = self.gates.get((layer, branch), gate)
            self.y[layer, branch] = [c, (gate - before) / max(step.d, 1) * f]
            self.gates[layer, branch] = gate
        elif self.config.policy != "full":
            self.y[layer, branch] = differences(
                c, self.y.get((layer, branch), []), self._order(layer), step.d, step.fulls
            )
        return c

    def _cached(self, layer: int, branch: str, inputs: Tensor, gate: Tensor, step: Step) -> Tensor:
        """C of all tokens: the estimate, with the rows that the policy refreshes recomputed.

        Norm and modulation act on each token alone, so rows may as well be picked after them.
        """
        y, weight = self.y[layer, branch], step.weight(layer)
        rows = self._rows(layer, branch, inputs, step)
        if rows is None:
            return y[0] * (1 if weight is None else weight(0)) + drift(y, step.x, weight)
        estimate = y[0] + drift(y, step.x, weight)
        f = self._features(layer, branch, pick(inputs, rows), rows, step)
        fresh = self._cache_of(layer, f, pick(gate, rows))
        # Y[0] is set such that the estimate at this x is the fresh value; without Y[1] it is the fresh value.
        self.y[layer, branch] = [put(y[0], rows, fresh - pick(drift(y, step.x, weight), rows)), *y[1:]]
        return put(estimate, rows, fresh)

    def _features(self, layer: int, branch: str, inputs: Tensor, rows: Tensor | None, step: Step) -> Tensor:
        """F of the tokens given: those of ``rows``, or all of them if it is None."""
        block, rotary = self.model.transformer_blocks[layer], step.rotary
        if branch == "ffn":
            return block.ff(inputs)  # type: ignore[no-any-return]
        if rows is not None and rotary is not None:
            rotary = (rotary[0][rows][:, None], rotary[1][rows][:, None])  # [B, 1, K, head_dim]
        q, k, v = qkv(block.attn1, inputs, rotary)
        if rows is None:
            self._record_attention(layer, q, k, v, step.n_text)
        else:
            k, v = self._attended(layer, rows, k, v, step.n_text)
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return block.attn1.to_out[0](out)  # type: ignore[no-any-return]

    def _attended(self, layer: int, rows: Tensor, k: Tensor, v: Tensor, n_text: int) -> tuple[Tensor, Tensor]:
        """K and V that the tokens ``rows`` attend to; k and v are their own."""
        if self.config.keys == "sampled":
            return k, v
        old_k, old_v = self.keys_values[layer]
        if self.config.keys != "all":
            seen = list(range(n_text)) if self.config.text == "skip" else []
            if self.config.keys == "landmarks":
                seen += range(n_text, old_k.shape[2], self.config.stride)
            return torch.cat([old_k[:, :, seen], k], dim=2), torch.cat([old_v[:, :, seen], v], dim=2)
        index = rows[:, None, :, None].expand_as(k)
        self.keys_values[layer] = (old_k.scatter(2, index, k), old_v.scatter(2, index, v))
        return self.keys_values[layer]

    def _rows(self, layer: int, branch: str, inputs: Tensor, step: Step) -> Tensor | None:
        """Rows of ``[text, image]`` to recompute, ``[B, K]``, with live text ``[B, S+K]``; None for none."""
        policy, batch, n_image = self.config.policy, inputs.shape[0], inputs.shape[1] - step.n_text
        if self._shallow(layer):
            if step.indices is None:
                raise ValueError("indices=None: cached steps of hero need layer -> sampled image tokens")
            chosen = step.indices(layer).to(inputs.device)
            if chosen.unique().numel() != chosen.numel() or chosen.min() < 0 or chosen.max() >= n_image:
                raise ValueError(f"indices({layer}): give different numbers below {n_image}")
            idx = chosen.expand(batch, -1)
        elif branch == "ffn" and (policy == "toca" or (policy == "duca" and step.x % 2 == 1)):
            idx = self._best(layer, n_image, step.x)
        else:
            return None
        self.selected[layer] = idx
        if self.config.text == "skip":
            return step.n_text + idx
        text = torch.arange(step.n_text, device=idx.device).expand(batch, -1)
        return torch.cat([text, step.n_text + idx], dim=1)

    def _best(self, layer: int, n_image: int, x: int) -> Tensor:
        """The image tokens ``[B, K]`` of the highest score."""
        grid = self.config.grid
        if grid is None or math.prod(grid) != n_image:
            raise ValueError(f"grid={grid}: its product must be the number of image tokens, {n_image}")
        age = x - self.stamp[layer]
        score = self.base[layer] + 0.25 * age / self.config.interval
        score = score + cell_bonus(score, grid)
        idx = score.topk(max(1, round(self.config.ratio * n_image)), dim=1).indices
        self.stamp[layer] = self.stamp[layer].scatter(1, idx, float(x))
        return idx

    def _record_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, n_text: int) -> None:
        if self._shallow(layer):
            self.keys_values[layer] = (k, v)
        if self.config.policy in ("toca", "duca"):
            toca = self.config.policy == "toca"
            self.base[layer] = attention_received(q, k, n_text) if toca else value_smallness(v, n_text)
            self.stamp[layer] = torch.zeros_like(self.base[layer])

    def _shallow(self, layer: int) -> bool:
        return self.config.policy == "hero" and layer < (self.config.refresh_layers or 0)

    def _order(self, layer: int) -> int:
        """The highest Y that a layer keeps."""
        if self._shallow(layer):
            return 1 if self.config.unsampled == "extrapolate" else 0
        return self.config.order if self.config.policy in ("taylorseer", "hero") else 0

    def _cache_point(self, layer: int) -> str:
        first = self._shallow(layer) or self.config.policy in ("toca", "duca")
        return self.config.cache_point[0 if first else 1]

    def _cache_of(self, layer: int, f: Tensor, gate: Tensor) -> Tensor:
        return gate * f if self._cache_point(layer) == "post_gate" else f


def trajectory(
    model: Any,
    config: Config,
    mask: Sequence[bool],
    indices: Callable[[int, int], Tensor] | None,
    inputs: Callable[[int], dict[str, Any]],
    weights: Callable[[int, int, int], Tensor | float] | None = None,
) -> Iterator[Tensor]:
    """Yield the output of every step of a denoising loop; ``mask[step]`` says which steps are full.

    indices: (step, layer) -> sampled image tokens ``[K]``. inputs: step -> tensor arguments of
    ``Reference.run``; asked for when the step is due, so they may depend on the outputs before. weights: a plan's, by
    (step, layer, i).
    """
    if not mask or not mask[0]:
        raise ValueError("mask: the first step must be full")
    reference, last, fulls = Reference(model, config), 0, 0
    for step, full in enumerate(mask):

        def of_layer(layer: int, step: int = step) -> Tensor:
            assert indices is not None
            return indices(step, layer)

        def of_term(layer: int, term: int, step: int = step) -> Tensor | float:
            assert weights is not None
            return weights(step, layer, term)

        x, d = (0, step - last) if full else (step - last, 0)
        sampled = None if indices is None else of_layer
        kind = "full" if full else "cached"
        chosen = None if weights is None else of_term
        yield reference.run(kind=kind, x=x, d=d, fulls=fulls, indices=sampled, weights=chosen, **inputs(step))
        if full:
            last, fulls = step, fulls + 1
