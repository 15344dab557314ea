from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

import hero_fx
from hero_fx import stability as analysis
from hero_fx.build import normalized
from hero_fx.passes.analysis.branches import find_branches
from hero_fx.passes.pipeline import Pipeline
from hero_fx.passes.render import graph_diff
from hero_fx.passes.rewrite.observe import ReturnFeatures
from hero_fx.step_graphs import copy_graph

from .support import layers, tiny, toys
from .support.branches import joint, single
from .support.tracing import capture, trace

LAYERS, STEPS = 3, 6


def hooked(model: Any, kwargs: dict[str, Any], times: Tensor) -> Tensor:
    """What forward hooks see in an eager loop: image streams [steps, layers + 1, B, N, D] around the blocks."""
    seen: list[list[Tensor]] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append([kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]])

    handles = [model.transformer_blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    for block in model.transformer_blocks:
        handles.append(block.register_forward_hook(lambda module, args, out: seen[-1].append(out[0])))
    tiny.denoise(model, kwargs, times)
    for handle in handles:
        handle.remove()
    return torch.stack([torch.stack(step) for step in seen])


@pytest.fixture(scope="module")
def recorded() -> tuple[analysis.Recorder, analysis.Recorder, Tensor]:
    """Recorders of updates and of hidden states after a trajectory, and the streams that hooks saw in the same loop."""
    torch._dynamo.reset()
    model = tiny.cogvideox(layers=LAYERS).double()
    kwargs = {
        key: value.double() if isinstance(value, Tensor) else tuple(v.double() for v in value)
        for key, value in tiny.inputs().items()
    }
    times = tiny.timesteps(STEPS)
    streams = hooked(model, kwargs, times)
    plain = tiny.denoise(model, kwargs, times)
    captured = tiny.Captured(model, kwargs)
    recorders = []
    for features in ("update", "hidden"):
        recorder = analysis.Recorder(features=features, inner="eager", keep=True)
        assert tiny.worst(tiny.denoise(captured.compiled(recorder), kwargs, times), plain) < 1e-12
        recorders.append(recorder)
    return recorders[0], recorders[1], streams


def test_features_are_those_that_hooks_see(recorded: tuple[analysis.Recorder, analysis.Recorder, Tensor]) -> None:
    updates, hidden, streams = recorded
    assert streams.shape == (STEPS, LAYERS + 1, 2, 72, 32)
    ours = torch.stack([torch.stack(call) for call in updates.kept])
    torch.testing.assert_close(ours, streams.diff(dim=1), rtol=1e-9, atol=1e-11)
    ours = torch.stack([torch.stack(call) for call in hidden.kept])
    torch.testing.assert_close(ours, streams[:, 1:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", [0, 1])
def test_stability_is_the_variance_of_second_differences(
    recorded: tuple[analysis.Recorder, analysis.Recorder, Tensor], which: int
) -> None:
    streams = recorded[2]
    features = streams.diff(dim=1) if which == 0 else streams[:, 1:]
    second = features.diff(n=2, dim=0)
    variance = second.var(dim=0, correction=0).mean(dim=(1, 2, 3))
    result = (recorded[0], recorded[1])[which].stability()
    assert result.variance == pytest.approx(variance.tolist(), rel=1e-5)
    assert result.score == pytest.approx(
        ((variance.max() - variance) / (variance.max() - variance.min())).tolist(), abs=1e-4
    )
    assert {min(result.score), max(result.score)} == {0.0, 1.0}
    power = features.square().mean(dim=(0, 2, 3, 4))
    assert result.relative == pytest.approx((variance / power).tolist(), rel=1e-5)
    size = [x.square().mean(dim=(2, 3, 4)).sqrt() for x in (features, features.diff(dim=0), second)]
    for table, expected in zip((result.feature, result.change, result.bend), size, strict=True):
        missing = STEPS - len(expected)
        assert all(math.isnan(value) for row in table[:missing] for value in row)
        torch.testing.assert_close(torch.tensor(table[missing:], dtype=torch.float64), expected, rtol=1e-5, atol=0)
    assert result.boundary == analysis.split(result.score)
    assert result.relative_boundary == analysis.split(result.relative_score)


def test_report_and_plot(recorded: tuple[analysis.Recorder, analysis.Recorder, Tensor], tmp_path: Path) -> None:
    result = recorded[0].stability()
    lines = str(result).splitlines()
    assert lines[0] == f"updates of the residual stream, {STEPS} steps, 1 series"
    assert [line.split()[0] for line in lines[3 : 3 + LAYERS]] == [str(i) for i in range(LAYERS)]
    assert lines[3].split()[2] == f"{result.score[0]:.2f}"
    assert lines[-2].startswith("by the score")
    path = tmp_path / "stability.png"
    figure = result.plot(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    curves, bars = figure.axes
    assert len(curves.lines) == LAYERS
    assert [bar.get_height() for bar in bars.patches[:LAYERS]] == pytest.approx(result.score)


def observed(normal: fx.GraphModule, features: Any) -> fx.GraphModule:
    gm = copy_graph(normal)
    Pipeline(label="test", passes=(ReturnFeatures(structure=find_branches(normal), features=features),))(gm)
    return gm


def test_graph_returns_features_and_nothing_else_changes() -> None:
    model = toys.toy(layers=2)
    normal = hero_fx.trace(model, toys.latents(), toys.times(1)[0], backend=hero_fx.backend("fora")).normal
    assert_expected_inline(
        graph_diff(normal, observed(normal, "update"), context=0),
        """\
  ...
- return (linear_12,)
+ add_tensor: f32[2, 30, 16] = aten.add.Tensor(mul_4, mul_6)
+ add_tensor_1: f32[2, 30, 16] = aten.add.Tensor(mul_8, mul_10)
+ return (linear_12, add_tensor, add_tensor_1)""",
    )
    assert_expected_inline(
        graph_diff(normal, observed(normal, "hidden"), context=0),
        """\
  ...
- return (linear_12,)
+ return (linear_12, add_5, add_11)""",
    )


def test_a_graph_without_branches_is_left_alone() -> None:
    gm = trace(lambda x: (x + 1,), torch.ones(2, 3))
    assert ReturnFeatures(structure=find_branches(gm), features="update").apply(gm) == 0


def test_only_the_image_tokens_of_a_joined_stream() -> None:
    class Flux(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dual, self.single = layers.Model(joint), layers.Model(single)

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            x, text = self.dual(x, text)
            result: Tensor = self.single(torch.cat([text, x], dim=1))[0][:, text.shape[1] :]
            return result

    torch.manual_seed(0)
    model = Flux().eval().requires_grad_(False)
    graph, inputs = capture(model, torch.randn(2, 5, layers.D), torch.randn(2, 3, layers.D))
    normal = normalized(graph, inputs)[0]
    output, *hidden = observed(normal, "hidden")(*inputs)
    assert [value.shape for value in hidden] == [(2, 5, layers.D)] * 4
    assert torch.equal(hidden[-1], output)
    output, *updates = observed(normal, "update")(*inputs)
    torch.testing.assert_close(hidden[1] + updates[2] + updates[3], output)


def test_trajectories_and_lanes_are_kept_apart() -> None:
    """Two trajectories of two lanes each: the mean of four series, none mixed with another."""
    torch._dynamo.reset()
    model = toys.toy(layers=2)
    recorder = analysis.Recorder(inner="eager", keep=True)
    call = toys.torch_compile(model, recorder, fullgraph=True)
    with torch.no_grad():
        for trajectory in range(2):
            for t in toys.times(5):
                for lane in range(2):
                    call(toys.latents() * (1 + float(t[0]) / (900 + 300 * lane + 100 * trajectory)), t)
    result = recorder.stability()
    assert result.series == 4
    kept = torch.stack([torch.stack(features) for features in recorder.kept]).unflatten(0, (2, 5, 2))
    variance = kept.diff(n=2, dim=1).var(dim=1, correction=0).mean(dim=(0, 1, 3, 4, 5))
    assert result.variance == pytest.approx(variance.tolist(), rel=1e-3)


@pytest.mark.parametrize(
    ("scores", "boundary"),
    [
        ([0.1, 0.0, 0.9, 1.0], 2),
        ([0.0, 0.8, 0.9, 1.0], 1),
        ([0.1, 0.2, 0.0, 0.1, 1.0], 4),
        ([1.0, 0.9, 0.1, 0.0], None),
        ([1.0, 1.0, 1.0], None),
        ([0.5], None),
    ],
)
def test_split(scores: list[float], boundary: int | None) -> None:
    assert analysis.split(scores) == boundary


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="features='layer' is not one of 'update', 'hidden'"):
        analysis.Recorder(features="layer")  # type: ignore[arg-type]
    recorder = analysis.Recorder(inner="eager")
    with pytest.raises(ValueError, match="no trajectory of at least three steps"):
        recorder.stability()
