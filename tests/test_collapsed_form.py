"""The collapsed form against the literal one: the same outputs, fewer ops, less state."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hero_fx
from hero_fx.passes.emit import value_of
from hero_fx.passes.render import op_count
from hero_fx.passes.slots import StateSlot

from .support import tiny

aten = torch.ops.aten
STEPS = 9


OPTIONS: list[dict[str, Any]] = [
    {},
    {"unsampled": "reuse"},
    {"policy": "lean"},
    {"text": "live"},
    {"unsampled": "extrapolate", "cache_point": "pre_gate"},
    {"unsampled": "gate", "keys": "landmarks"},
    {"unsampled": "gate", "state_dtype": torch.bfloat16},
    {"selection": "per_layer"},
    {"keys": "sampled+text"},
    {"policy": "fora", "cache_point": "post_gate"},
    {"policy": "taylorseer", "order": 2, "cache_point": "post_gate"},
    {"policy": "duca", "cache_point": "post_gate"},
]


# Their outputs, in the collapsed form, are the reference's in test_exactness.py.
IN_EXACTNESS = OPTIONS[3:6] + OPTIONS[7:9] + OPTIONS[10:11]
ROWS = [pytest.param(options, marks=pytest.mark.exhaustive if options in IN_EXACTNESS else ()) for options in OPTIONS]


@pytest.mark.parametrize("options", ROWS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_collapsed_equals_literal(options: dict[str, Any]) -> None:
    results = []
    for form in ("literal", "collapsed"):
        backend = hero_fx.backend(inner=tiny.INNER, num_steps=STEPS, interval=3, form=form, **options)
        results.append(tiny.denoise(tiny.captured().compiled(backend), tiny.inputs(), tiny.timesteps(STEPS)))
    # Sums of rounded caches are not rounded sums of caches: with state in bf16 the forms agree to its precision.
    assert tiny.worst(results[1], results[0]) < (1e-5 if "state_dtype" not in options else 1e-2)


@cache
def traced(layers: int) -> hero_fx.StepGraphs:
    with torch.no_grad():
        return hero_fx.backend().steps_of(tiny.captured(layers=layers).shared.source)


@cache
def steps_of(layers: int, **options: Any) -> hero_fx.StepGraphs:
    """The step graphs of a tiny model, which tests share and none of them changes."""
    return hero_fx.backend(**options).rewrite(traced(layers))


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["default", "reuse"])
def test_cached_step_gathers_and_scatters_once(options: dict[str, Any], layers: int) -> None:
    steps = steps_of(layers, **options)
    cached = steps.cached[0]
    reuse = bool(options)
    # The stream, the two rotary tables, and the slopes of the sampled tokens: one sum for all shallow layers.
    assert op_count(cached, "aten.index_select")["aten.index_select"] == (3 if reuse else 4)
    assert op_count(cached, "aten.index_copy")["aten.index_copy"] == 1
    assert op_count(cached, "aten.copy_")["aten.copy_"] == 0
    shallow = layers // 2
    # Full-size work on the stream: the extrapolated sums of the shallow and of the deep layers (3 each) and the modulation of the last norm
    # (2). Caches in front of the gate cannot be summed: gate * cache and the sum, of attention and of FFN, per shallow layer.
    tokens = steps.structure.image_tokens
    full_size = [n for n in cached.graph.nodes if n.op == "call_function" and _tokens(n) == tokens]
    streams = [n for n in full_size if n.target in (aten.mul.Tensor, aten.add.Tensor)]
    assert len(streams) <= (4 * shallow + 5 if reuse else 8)
    sampled = op_count(cached, "aten.linear")["aten.linear"]
    assert sampled == op_count(steps.normal, "aten.linear")["aten.linear"] - 6 * (layers - shallow) - 2 * (
        layers - shallow
    )


def _tokens(node: torch.fx.Node) -> int:
    value = value_of(node)
    return value.shape[1] if isinstance(value, Tensor) and value.dim() == 3 else 0


@pytest.mark.parametrize("layers", [2, 4])
def test_state_by_depth(layers: int) -> None:
    hidden = 2 * 72 * 32 * 4
    lean = steps_of(layers, policy="lean")
    assert lean.state_bytes == 3 * hidden
    assert steps_of(layers, policy="lean", order=0).state_bytes == 2 * hidden
    assert len(steps_of(layers, policy="fora", cache_point="post_gate").state) == 1
    assert len(steps_of(layers, policy="taylorseer", order=2, cache_point="post_gate").state) == 3
    default = steps_of(layers)  # features and their differences of either half, keys and values of each shallow layer
    assert len(default.state) == 4 + 2 * (layers // 2)
    assert len(steps_of(layers, unsampled="reuse").state) == 2 + 4 * (layers // 2)


@pytest.mark.parametrize("layers", [2, 4])
def test_state_of_the_gate_correction_by_depth(layers: int) -> None:
    """Two tensors for all shallow layers and two for all deep ones; per layer keys, and gates of one token."""
    shallow, width, heads = layers // 2, 32, 2
    hidden = 2 * 72 * width * 4
    gates = 2 * shallow * 2 * width * 4
    for keys, tokens in (("sampled", 0), ("landmarks", 12 + 7), ("all", 72 + 7)):
        steps = steps_of(layers, unsampled="gate", keys=keys)
        assert steps.state_bytes == 4 * hidden + gates + 2 * shallow * (2 * heads * tokens * 16 * 4)
    assert steps_of(layers, keys="sampled").state_bytes == 4 * hidden


@pytest.mark.parametrize("options", OPTIONS[:3], ids=["default", "reuse", "lean"])
def test_each_state_tensor_is_read_once(options: dict[str, Any]) -> None:
    (cached,) = steps_of(4, **options).cached
    for node in cached.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("slot"), StateSlot):
            readers = [u for u in node.users if u.target is not aten.index_copy_.default]
            # A slope is read a second time at the sampled rows, which are extrapolated from what was just computed.
            rows = [u for u in readers if u.target is aten.index_select.default]
            assert len(readers) - len(rows) == 1, node.name
            assert not rows or options == {}, node.name
