"""Preconditions for step caching; each error says how to fix it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hero_fx.passes.analysis.structure import Structure
from hero_fx.passes.pipeline import PassError

from . import dynamo
from .other_caches import cache_in_the_way
from .stack import modules_within

__all__ = ["BuildError", "UnsupportedModel", "as_ours", "check_call", "check_graph", "check_structure"]


class UnsupportedModel(ValueError):
    """hero_fx cannot accelerate this graph; the message says why and what to do. `strict=False` warns instead."""


class BuildError(RuntimeError):
    """hero_fx failed where it should not; the error is its cause. `strict=False` warns and compiles the model plainly."""


def as_ours(error: Exception) -> Exception:
    """An error of building as a user is to see it: what says what to do as it is, any other as `BuildError`."""
    if isinstance(error, (ValueError, PassError)):
        return error
    return BuildError(
        f"hero_fx could not build this model's steps ({type(error).__name__}: {str(error).strip() or 'no message'}). This is a "
        "fault of hero_fx or of the compiler beneath, please report it; hero_fx.backend(strict=False) compiles such a model "
        "without step caching"
    )


def check_call(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Refuses training, autograd, ring attention, sharded blocks, and models that another cache works on."""
    module = dynamo.frame_module()
    for running in (module, *modules_within()):
        cache = cache_in_the_way(running)
        if cache is not None:
            raise UnsupportedModel(cache)
        _check_parallel(running)
    if (module is not None and module.training) or _has_live_dropout(gm):
        raise UnsupportedModel(
            "the model is in training mode (model.training=True), but hero_fx is for inference: call model.eval() first"
        )
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise UnsupportedModel(
            "gradients are enabled (torch.is_grad_enabled()=True and parameters require them), but cached steps have no "
            "backward: call the model under torch.no_grad() or torch.inference_mode()"
        )
    marks = dynamo.dynamic_marks(gm)
    if marks:
        where = ", ".join(f"axes {', '.join(map(str, axes))} of {name}" for name, axes in marks.items())
        raise UnsupportedModel(
            f"torch._dynamo.mark_dynamic was called for {where}, but token counts are part of a step graph: every "
            "resolution compiles once and owns its state; leave mark_dynamic out, or use torch._dynamo.maybe_mark_dynamic"
        )


def _check_parallel(module: torch.nn.Module | None) -> None:
    """Refuses diffusers' ring attention, and FSDP2 of parts of a model."""
    parallel: Any = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    degree = getattr(parallel, "ring_degree", None) or 1
    if degree > 1:
        raise UnsupportedModel(
            f"ring attention (ring_degree={degree}) attends to the keys of one process after the other and joins the results "
            "by their log-sum-exp, so no attention of the graph sees the keys of all tokens: use Ulysses, "
            f"diffusers.ContextParallelConfig(ulysses_degree={degree})"
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody asked for it, nothing is sharded
    if module is None or fsdp is None:
        return
    sharded = [name for name, part in module.named_modules() if name and isinstance(part, fsdp.FSDPModule)]
    if sharded:
        raise UnsupportedModel(
            f"fully_shard was called for {len(sharded)} parts of the model (the first is {sharded[0]}), and each brings its "
            "weights in by hooks that break the graph: call fully_shard for the transformer as a whole, and for no part of it"
        )


def _has_live_dropout(gm: fx.GraphModule) -> bool:
    for node in gm.graph.nodes:
        if node.target in (torch.nn.functional.dropout, torch.dropout):
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            share = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            if training and share:
                return True
    return False


def check_graph(gm: fx.GraphModule) -> None:
    """Refuses a part of a model that a graph break cut off."""
    if dynamo.frame_resumes_after_break():
        raise UnsupportedModel(
            "this graph is what follows a graph break, so the model's layers may be split over several graphs; "
            f"find the break with torch.compile(..., fullgraph=True) or TORCH_LOGS=graph_breaks and remove it{_offload_hint()}"
        )
    reason = dynamo.graph_break_reason(gm)
    if reason is not None:
        raise UnsupportedModel(
            f"a graph break ends this graph early ({reason.strip().splitlines()[0]}), so the model's layers may be split "
            "over several graphs; find it with torch.compile(..., fullgraph=True) and remove it, or, if only the first call "
            f"breaks (one that makes tables), call the model once before torch.compile{_offload_hint()}"
        )


def _offload_hint() -> str:
    """What to do about hooks that move weights while the model runs; nothing if there are none."""
    module = dynamo.frame_module()
    hooked = [name or "the model itself" for name, m in (module.named_modules() if module else ()) if _moves_weights(m)]
    if not hooked and not dynamo.frame_module_name().startswith(("accelerate.hooks", "diffusers.hooks")):
        return ""
    where = f" ({len(hooked)} of its modules have one, the first is {hooked[0]})" if hooked else ""
    return (
        f". Offload hooks break the graph{where}: in place of group or sequential offload call "
        "pipe.enable_model_cpu_offload(), and only after torch.compile, so that the transformer is moved as a whole, "
        "outside of its graph"
    )


def _moves_weights(module: torch.nn.Module) -> bool:
    """True if accelerate or diffusers hooked the module to bring its weights in before each call."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or "group_offloading" in getattr(registry, "hooks", ())


_IF_WHOLE = "; if you did, a graph break split it: find the break with torch.compile(..., fullgraph=True)"


def check_structure(normal: fx.GraphModule, structure: Structure, *, forecast: bool = False) -> None:
    """Refuses a graph without branches, of one block, or that begins or ends between layers.

    `forecast`: cached steps look at outputs alone, so that the graph needs no branches; that it is a whole model it needs.
    """
    if forecast:
        _check_ends(normal, structure)
        return
    if not structure.branches:
        raise UnsupportedModel(
            "no attention or FFN branch was found: no residual update x + f(x) of hidden states [batch, tokens, width]; "
            f"compile the whole transformer (the module whose forward runs all blocks){_IF_WHOLE}"
        )
    if all(branch.kind == "ffn" for branch in structure.branches):
        raise UnsupportedModel(
            f"no attention was found in the {len(structure.branches)} residual branches, so this is no transformer, or "
            "not all of one: use torch.nn.functional.scaled_dot_product_attention, and compile the whole transformer"
            f"{_IF_WHOLE}"
        )
    if structure.depth == 1:
        raise UnsupportedModel(
            "the graph holds a single transformer block. In a regional compile (compile_repeated_blocks) all blocks share "
            "one compiled graph, and their caches would mix: compile the whole transformer, torch.compile(model, ...)"
            f"{_IF_WHOLE}"
        )
    _check_ends(normal, structure)


def _check_ends(normal: fx.GraphModule, structure: Structure) -> None:
    nodes = {node.name: node for node in normal.graph.nodes}
    entering = [s.root for s in structure.streams if nodes[s.root].op == "placeholder"]
    returned = set(normal.graph.output_node().all_input_nodes)
    leaving = [u.add for b in structure.branches for u in b.updates if nodes[u.add] in returned]
    if entering and leaving:
        raise UnsupportedModel(
            f"the residual stream enters the graph as an input ({entering[0]}) and leaves it as an output ({leaving[0]}), "
            "so this is a part of a model: compile the whole transformer, without graph breaks between its layers"
        )
