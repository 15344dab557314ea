"""`hero_fx.load`: a model with the step graphs of a file, which runs without compiling."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hero_fx.backends import Backend
from hero_fx.config import Config
from hero_fx.other_caches import cache_in_the_way
from hero_fx.passes import compat
from hero_fx.passes.normalize.subclasses import parts_of
from hero_fx.runtime.batch import current_batch
from hero_fx.runtime.stepper import Stepper
from hero_fx.runtime.steps import CompiledStep

from .archive import Archive, Argument, Output, Reading, SavedGraph, SavedStep, Stored, Weight, read
from .environment import Environment, changed_sources
from .package import load_package
from .save import fingerprint
from .signature import Call, bind, current_conditions
from .snapshot import Watched, differences, snapshot

__all__ = ["Loaded", "load"]

_ANEW = "Save it anew: compile the model here, call it, and hero_fx.save(compiled, path)"
_ANEW_CALL = "Call it as it was when it was saved, or compile and save it for such calls too"


def load(path: str | Path, model: nn.Module) -> Loaded:
    """A model with step graphs that were compiled ahead of time: nothing is compiled, traced, or guarded by Dynamo.

    ::

        pipe.transformer = hero_fx.load("transformer.hero", pipe.transformer)

    The file holds compiled code, which is run. Load only files that you trust, as you would with a program.

    Args:
        path: of a file that `hero_fx.save` wrote.
        model: the model it was saved from, with whatever weights of the same shapes, on the same device, in eval mode. They
            are used where they are, not copied.

    Raises:
        ValueError: there is no such file; or this model, its source code, the versions of hero_fx, PyTorch or Python, the
            processor or the device are not those that it was saved with. The message has all that differs.
    """
    path = Path(path)
    weight = next(iter((*model.parameters(), *model.buffers())), torch.empty(0))

    def check(needed: Environment) -> None:
        _refuse(path, Environment.current(weight.device.type).lacks(needed))

    with tempfile.TemporaryDirectory() as folder:
        reading = read(path, Path(folder), check)
        _check_model(path, reading.archive, model)
        backend = Backend(Config(**reading.archive.config, plan=reading.plan))
        graphs = [_Graph(backend, saved, reading, Path(folder), weight.device) for saved in reading.archive.graphs]
    weights = _Weights(model)
    for graph in graphs:
        _refuse(path, weights.misfits(graph.saved))
    return Loaded(model, backend, graphs)


def _refuse(path: Path, reasons: Sequence[str]) -> None:
    if reasons:
        raise ValueError(f"path={str(path)!r} cannot be loaded: {'; '.join(reasons)}. {_ANEW}")


def _check_model(path: Path, archive: Archive, model: nn.Module) -> None:
    cache = cache_in_the_way(model)
    if cache is not None:
        raise ValueError(cache)
    _refuse(path, archive.model.differences(fingerprint(model), "the file"))
    _refuse(path, differences(archive.modules, snapshot(model)))
    changed = changed_sources(archive.sources)
    _refuse(path, [f"the source code of {', '.join(changed)} is not what it was"] if changed else [])


class _Graph:
    """What a model became for one kind of call, ready to run."""

    def __init__(
        self, backend: Backend, saved: SavedGraph, reading: Reading, folder: Path, device: torch.device
    ) -> None:
        self.saved = saved
        self.structure = compat.treespec_loads(saved.call.structure)
        self._returns = compat.treespec_loads(saved.returns)
        self._stored = {
            source.name: reading.tensors[source.name].to(device)
            for source in saved.sources
            if isinstance(source, Stored)
        }
        positions = [i for i, source in enumerate(saved.sources) if isinstance(source, (Argument, Weight, Stored))]
        self._stepper: Stepper = backend.load(
            self._step(saved.full, positions, folder),
            [self._step(step, positions, folder) for step in saved.cached],
            state=saved.state,
            sampler=saved.sampler,
            inputs=saved.inputs,
        )

    def _step(self, step: SavedStep, positions: Sequence[int], folder: Path) -> CompiledStep:
        run = load_package(folder / step.file)
        arguments = frozenset(i for i, source in enumerate(self.saved.sources) if isinstance(source, Argument))
        count = len(self.saved.sources)

        def call(*inputs: Any) -> Any:
            own = [inputs[i].contiguous() if i in arguments else inputs[i] for i in positions]
            with compat.no_autocast():  # its casts are in the graph
                return run(*own, *inputs[count:])

        return CompiledStep(call, step.slots, step.device)

    def run(self, call: Call, weights: _Weights) -> Any:
        """What the model returns."""
        inputs = []
        for source in self.saved.sources:
            match source:
                case Argument(index):
                    inputs.append(call.values[index])
                case Weight():
                    inputs.append(weights.current(source))
                case Stored(name):
                    inputs.append(self._stored[name])
                case _:
                    inputs.append(source.value)
        outputs = self._stepper(*inputs)
        leaves = []
        for leaf in self.saved.leaves:
            match leaf:
                case Output(index):
                    leaves.append(outputs[index])
                case Argument(index):
                    leaves.append(call.values[index])
                case _:
                    leaves.append(leaf.value)
        return compat.tree_unflatten(leaves, self._returns)


class _Weights:
    """The weights of a model as they are at a call: loading others in place of them is no change of the model."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for mapping in (module._parameters, module._buffers):
                for key in mapping:
                    self._places[f"{path}.{key}" if path else key] = cast(dict[str, Tensor | None], mapping), key

    def current(self, source: Weight) -> Tensor:
        """Raises ValueError for a weight that compiled code cannot take."""
        value = self._find(source)
        if value is None or not source.fits(value):
            raise ValueError(f"{_misfit(source, value)}. {_ANEW_CALL}")
        return value

    def misfits(self, saved: SavedGraph, most: int = 5) -> list[str]:
        """What of the weights compiled code cannot take, one phrase each."""
        weights = [(source, self._find(source)) for source in saved.sources if isinstance(source, Weight)]
        return [_misfit(source, value) for source, value in weights if value is None or not source.fits(value)][:most]

    def _find(self, source: Weight) -> Tensor | None:
        mapping, key = self._places.get(source.name, ({}, ""))
        value = mapping.get(key)
        if value is None:
            return None
        parts = parts_of(value)
        return parts[source.part] if source.part < len(parts) else None


def _misfit(source: Weight, value: Tensor | None) -> str:
    then = f"{source.dtype} {list(source.shape)} {source.stride} on {source.device} in the file"
    if value is None:
        return f"the weight {source.name} is missing here and {then}"
    return f"the weight {source.name} is {value.dtype} {list(value.shape)} {value.stride()} on {value.device} here and {then}"


class Loaded(nn.Module):
    """A model that runs the step graphs of a file; what `hero_fx.load` returns.

    It is called as the model is, and its attributes are the model's. `backend` has the options, and `backend.stats()` counts
    as under `torch.compile`; so do sessions and `hero_fx.calling`. A call unlike those that were saved is refused, and so is
    any call once an attribute of the model's modules has changed; weights may.
    """

    _OWN = frozenset(
        {"_orig_mod", "backend", "_graphs", "_weights", "_watched", "_signature", "forward", "_old_forward", "_hf_hook"}
    )
    """Attributes that are not the model's; the last three are what accelerate puts on a module that it offloads."""

    backend: Backend

    def __init__(self, model: nn.Module, backend: Backend, graphs: Sequence[_Graph]) -> None:
        super().__init__()
        del self.__dict__["training"]  # the model's
        self._orig_mod = model
        self.backend = backend
        self._graphs = tuple(graphs)
        self._weights = _Weights(model)
        self._watched = Watched(model)
        self._signature = inspect.signature(model.forward)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:
            return super().__getattr__(name)
        return getattr(self._orig_mod, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self._orig_mod, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns.

        Raises:
            ValueError: the file has no step graphs for such a call, or the model has changed; the message has what is saved.
            AmbiguousCall: as under `torch.compile`.
        """
        changes = self._watched.changes()
        if changes:
            raise ValueError(f"the model has changed since it was loaded: {', '.join(changes[:5])}. {_ANEW_CALL}")
        batch = current_batch()
        if batch is not None and len(batch.calls) > 1:
            raise ValueError(
                "hero_fx.batch: a saved model has the step graphs of one request alone. Call it once for each, or compile the "
                "model with torch.compile"
            )
        call = bind(self._signature, args, kwargs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in self._tensors(call)):
            raise ValueError(
                "gradients are enabled, but step graphs have no backward: call the model under torch.no_grad() or "
                "torch.inference_mode()"
            )
        return self._find(call).run(call, self._weights)

    def _tensors(self, call: Call) -> Iterator[Tensor]:
        yield from (value for value in call.values if isinstance(value, Tensor))
        yield from self._orig_mod.parameters()

    def _find(self, call: Call) -> _Graph:
        conditions = current_conditions()
        alike = [g for g in self._graphs if g.saved.call.leaves == call.leaves and g.structure == call.structure]
        for graph in alike:
            if graph.saved.conditions == conditions:
                return graph
        if alike:
            raise ValueError(
                f"a call like this is saved for {' and for '.join(str(g.saved.conditions) for g in alike)}, and it comes with "
                f"{conditions}. {_ANEW_CALL}"
            )
        saved = "".join(f"\n  {graph.saved.call}" for graph in self._graphs)
        raise ValueError(f"no step graphs are saved for this call\n  {call}\nbut for{saved}\n{_ANEW_CALL}")
