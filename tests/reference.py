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

A forecast looks at no branch: see ``forecast``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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


# ------------------------------------------------------------------------------------ what the model computes
def modulated(norm: Any, tokens: Tensor, n_text: int, emb: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised and modulated tokens, and the gate of every token, both ``[B, S+N, D]``."""
    image, text, image_gate, text_gate = norm(tokens[:, n_text:], tokens[:, :n_text], emb)
    gate = torch.cat([text_gate.expand_as(text), image_gate.expand_as(image)], dim=1)
    return torch.cat([text, image], dim=1), gate


def joint_rotary(rotary: tuple[Tensor, Tensor], n_text: int) -> tuple[Tensor, Tensor]:
    """Tables (cos, sin) ``[S+N, head_dim]`` from those of image tokens; text is turned by the angle 0."""
    cos, sin = rotary
    one, zero = torch.ones_like(cos[:1]).expand(n_text, -1), torch.zeros_like(sin[:1]).expand(n_text, -1)
    return torch.cat([one, cos]), torch.cat([zero, sin])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, heads, n, head_dim]``, channels (2j, 2j+1) a pair; tables broadcast."""
    real, imag = x.unflatten(3, (-1, 2)).unbind(4)
    turned = torch.stack([-imag, real], dim=4).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def qkv(attn: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, n, head_dim]`` as attention is given them."""
    q, k, v = [p(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v)]
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    return q, k, v


def unpatchify(image: Tensor, shape: Sequence[int], p: int) -> Tensor:
    """Tokens ``[B, N, channels * p * p]`` to the video ``[B, frames, channels, height, width]``."""
    batch, frames, _, height, width = shape
    image = image.reshape(batch, frames, height // p, width // p, -1, p, p)
    return image.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


# ----------------------------------------------------------------------------------- what the methods compute
def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, K]`` of ``x [B, n, D]``."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def put(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """``x [B, n, D]`` with rows ``[B, K]`` replaced by ``new [B, K, D]``."""
    return x.scatter(1, rows[:, :, None].expand_as(new), new)


def differences(c: Tensor, before: Sequence[Tensor], order: int, d: int, fulls: int) -> list[Tensor]:
    """Y of a full step at which C = c; ``before`` is Y until then. Zero where full steps were too few."""
    y = [c]
    for i in range(1, order + 1):
        y.append((y[i - 1] - before[i - 1]) / d if fulls >= i else torch.zeros_like(c))
    return y


def drift(y: Sequence[Tensor], x: int, weight: Callable[[int], Tensor | float] | None = None) -> Tensor:
    """What the estimate x steps after the full step adds to ``Y[0]``; ``weight``: i -> what a plan has for x^i / i!."""
    total = torch.zeros_like(y[0])
    for i in range(1, len(y)):
        total = total + y[i] * (x**i / math.factorial(i) if weight is None else weight(i))
    return total


def attention_received(q: Tensor, k: Tensor, n_text: int) -> Tensor:
    """ToCa's base score ``[B, N]``: what image keys receive from all queries, over heads; unit L2 norm."""
    probability = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=3)
    received = probability.sum(dim=2).mean(dim=1)[:, n_text:]
    return functional.normalize(received, p=2.0, dim=1)


def value_smallness(v: Tensor, n_text: int) -> Tensor:
    """DuCa's base score ``[B, N]``: 1 - norm of an image token's value, relative to the largest one."""
    norm = v[:, :, n_text:].pow(2).sum(dim=(1, 3)).sqrt()
    return 1 - norm / norm.amax(dim=1, keepdim=True)


def cell_bonus(score: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """0.4 for the best token of every 1x2x2 cell, else 0, ``[B, N]``; cells at odd edges are smaller."""
    frames, height, width = grid
    best = []
    for f in range(frames):
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                rows, columns = range(top, min(top + 2, height)), range(left, min(left + 2, width))
                numbers = [(f * height + r) * width + c for r in rows for c in columns]
                cell = torch.tensor(numbers, device=score.device)
                best.append(cell[score[:, cell].argmax(dim=1)])
    return torch.zeros_like(score).scatter(1, torch.stack(best, dim=1), 0.4)


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


# ------------------------------------------------------------------------------------------------- output forecast
def forecast(theta: Sequence[Tensor], v: Sequence[Tensor], x: Sequence[Tensor], x_k: Tensor | None) -> Tensor:
    """The output at step k from those of the last full steps i > j > l, ``v = (v_i, v_j, v_l)``, and the latents.

    ``(1 + t0) v_i + t1 (v_i - v_j) + t2 (v_i - v_l) + t3 (x_k - x_i) + t4 (x_i - x_j)``. Steps that there were not are
    zeros; a shorter ``v`` has no further terms, and without a latent (x_k is None) the last two are left out.
    """
    result = (1 + theta[0]) * v[0]
    for t, before in zip(theta[1:], v[1:], strict=False):
        result = result + t * (v[0] - before)
    if x_k is not None:
        result = result + theta[3] * (x_k - x[0]) + theta[4] * (x[0] - x[1])
    return result


def forecast_trajectory(
    model: Callable[[int], Tensor],
    theta: Tensor,
    mask: Sequence[bool],
    latent: Callable[[int], Tensor] | None,
    history: int = 3,
) -> Iterator[Tensor]:
    """Yield the output of every step; ``theta [T, 5, ...]`` broadcasts to outputs.

    model, latent: step -> output, noisy latent of its inputs; asked for when the step is due.
    """
    v: list[Tensor] = []
    x: list[Tensor] = []
    for step, full in enumerate(mask):
        x_k = None if latent is None else latent(step)
        if full:
            out = model(step)
            v = [out, *v]
            x = [] if x_k is None else [x_k, *x]
        else:
            none = torch.zeros_like(v[0])
            past_v = (v + [none] * history)[:history]
            out = forecast(list(theta[step]), past_v, x if x_k is None else ([*x, torch.zeros_like(x_k)])[:2], x_k)
        yield out
