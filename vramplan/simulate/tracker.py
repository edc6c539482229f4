"""Tracker: sees every operator on fake tensors and writes down each storage's birth and death."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from vramplan.memory.birth import Birth
from vramplan.memory.term import Place
from vramplan.simulate.black_box import BlackBox
from vramplan.simulate.events import Note
from vramplan.simulate.lines import Lines
from vramplan.simulate.trace import PhaseSpan, Trace

RECOMPUTATION = "recomputation"
"""Stands for the autograd node of what checkpointing runs a second time."""

Scratch = Callable[..., Sequence[int]]
"""Given an operator's arguments and result: bytes of what its kernel allocates and frees inside."""
Answer = Callable[..., Any]
"""Given the tracker, the operator and its arguments: its result, instead of running it."""


class Tracker(TorchDispatchMode):
    """Enter it inside a ``FakeTensorMode``. ``scratch`` and ``answers`` say what a device's kernels do besides
    returning tensors: temporaries inside an operator, and operators answered without running them. ``black_box`` is
    told where the run is."""

    def __init__(
        self,
        device_type: str,
        scratch: Mapping[Any, Scratch],
        answers: Mapping[Any, Answer],
        black_box: BlackBox | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._black_box = black_box or BlackBox()
        self.trace = Trace()
        self.phase_name = ""
        self.stream = 0
        self.notes: list[Note] = []
        self.module_names: dict[int, str] = {}
        self.param_shapes: set[tuple[int, ...]] = set()
        self.last_dims = array("q")
        """Of each block, the last dimension of the tensor it was born with."""
        self.param_shaped = array("b")
        """Of each block, whether it was born with the shape of a parameter."""
        self.failed_phase = ""
        self.failed_in = ""
        """The phase and the module in which an exception passed first."""
        self.device_type = device_type
        self._scratch = scratch
        self._answers = answers
        self._block_of: dict[int, int] = {}
        self._watched: dict[int, Any] = {}
        self._modules: list[torch.nn.Module] = []
        self._made_by: dict[int, tuple[int, str, str]] = {}
        self._birth_numbers: dict[Birth, int] = {}
        self._lines = Lines()
        self._streams = {0: 0}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to phase ``name``; its span is kept also after an error."""
        start, self.phase_name = self.trace.num_instants, name
        try:
            self._black_box.arrive(name)
            yield
        except Exception:
            self.failed_phase = name
            raise
        finally:
            self.trace.phases.append(PhaseSpan(name, start, self.trace.num_instants))
            self.phase_name = ""
            self._black_box.note("")  # what dies from here on, as the trace is summed up, dies in no phase

    @contextmanager
    def inside(self, module: torch.nn.Module) -> Iterator[None]:
        """What is born inside is born in ``module``."""
        self._modules.append(module)
        try:
            self._black_box.arrive(self.phase_name, self.innermost_module())
            yield
        except Exception as error:
            # recomputation is stopped by an exception, caught further out
            if not self.failed_in and "StopRecomputation" not in type(error).__name__:
                self.failed_in = self.innermost_module()
            raise
        finally:
            self._modules.pop()
            self._black_box.note(self.phase_name, self.innermost_module())

    def learn_model(self, model: torch.nn.Module) -> None:
        """From now on modules have names and parameters' shapes are known."""
        self.module_names.update({id(module): name for name, module in model.named_modules()})
        for param in model.parameters():
            shape = tuple(getattr(param, "ds_shape", param.shape))
            self.param_shapes |= {shape, shape[::-1]}

    def stop(self) -> None:
        """From now on deaths are not written down: what a run leaves behind dies at some time or other."""
        self._watched.clear()  # a weak reference that is gone calls nobody

    def set_stream(self, number: int) -> None:
        """From now on births are on this stream; streams are numbered here as they first come, the first one 0."""
        self.stream = self._streams.setdefault(number, len(self._streams))

    def note(self, name: str, value: int) -> None:
        """Keeps a number that the engine carries along."""
        self.notes.append(Note(self.trace.num_instants, name, value))

    def empty_cache(self) -> None:
        """The engine asks the allocator to give back what it does not use."""
        self.trace.cache_emptied_at.append(self.trace.num_instants)

    def pin(self, tensor: torch.Tensor) -> None:
        """The block that holds a tensor of the host is page-locked from its birth on."""
        block = self.block_of(tensor)
        if block is not None:
            self.trace.move(block, Place.PINNED)

    def innermost_module(self) -> str:
        """Name of the module running now, or its class while it has none; empty outside of any."""
        if not self._modules:
            return ""
        module = self._modules[-1]
        return self.module_names.get(id(module)) or type(module).__name__

    def block_of(self, tensor: torch.Tensor) -> int | None:
        """The block that holds the tensor; None where it holds no bytes or was born unseen."""
        return self._block_of.get(tensor.untyped_storage()._cdata) if isinstance(tensor, FakeTensor) else None

    def op_of(self, tensor: FakeTensor) -> str:
        """The operator that made the tensor's storage; empty where it was not seen."""
        block = self.block_of(tensor)
        return "" if block is None else self.trace.births[self.trace.birth[block]].op

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = self._answers.get(func)
        result = func(*args, **kwargs) if answer is None else answer(self, func, args, kwargs)
        born = self._register(func, result)
        scratch = self._scratch.get(func)
        if scratch is not None:
            self._pass_scratch(scratch(*args, **kwargs, result=result), self._birth(func) if born is None else born)
        return result

    def _pass_scratch(self, sizes: Sequence[int], birth: int) -> None:
        """Bytes that a kernel holds all together before it returns."""
        inside = []
        for size in sizes:
            if size:
                inside.append(self._bear(size, birth, Place.DEVICE, None))
        for block in inside:
            self.trace.bury(block)

    def _register(self, func: Any, result: Any) -> int | None:
        if isinstance(result, FakeTensor):
            return self._register_tensor(func, result, None)
        birth = None
        if isinstance(result, tuple | list):
            for item in result:
                if isinstance(item, FakeTensor):
                    birth = self._register_tensor(func, item, birth)
        return birth

    def _register_tensor(self, func: Any, tensor: FakeTensor, birth: int | None) -> int | None:
        if tensor.fake_device.type == "meta":
            return birth
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        block = self._block_of.get(key)
        if block is not None:
            if self.trace.num_bytes[block] == num_bytes:
                return birth
            self.trace.bury(block)  # resized: the allocator frees the old bytes and hands out new ones
        elif not num_bytes:
            return birth
        birth = self._birth(func) if birth is None else birth
        place = Place.DEVICE if tensor.fake_device.type == self.device_type else Place.HOST
        self._block_of[key] = self._bear(num_bytes, birth, place, tensor)
        if block is None:
            self._watched[key] = weakref.ref(storage, partial(self._on_death, key))
        return birth

    def _bear(self, num_bytes: int, birth: int, place: Place, tensor: FakeTensor | None) -> int:
        shape = tuple(tensor.shape) if tensor is not None else ()
        self.last_dims.append(shape[-1] if shape else 0)
        self.param_shaped.append(shape in self.param_shapes)
        return self.trace.bear(num_bytes, birth, place, self.stream)

    def _on_death(self, key: int, _: object) -> None:
        del self._watched[key]
        self.trace.bury(self._block_of.pop(key))

    def _birth(self, func: Any) -> int:
        frame, outer = self._lines.calling(depth=3)
        module = id(self._modules[-1]) if self._modules else 0
        node = cast(Any, torch._C._current_autograd_node())
        node_name = ""
        if node is not None and not torch.is_grad_enabled():
            node_name = node.name().rsplit("::", 1)[-1]
            module, frame, outer = self._made_by.get(node._sequence_nr(), (module, frame, outer))
        elif torch.is_grad_enabled() and node is not None:
            node_name = RECOMPUTATION  # its nodes never run, and a device's thread numbers them from 0 again
        elif torch.is_grad_enabled():
            # below autograd the node of this operator exists already: it has the last number given out
            self._made_by.setdefault(torch._C._autograd._get_sequence_nr() - 1, (module, frame, outer))
        birth = Birth(_op_name(func), node_name, self.module_names.get(module, ""), frame, outer, self.phase_name)
        number = self._birth_numbers.get(birth)
        if number is None:
            number = self._birth_numbers[birth] = len(self.trace.births)
            self.trace.births.append(birth)
        return number


def _op_name(func: Any) -> str:
    """``aten::mm`` of ``aten.mm.default``."""
    return str(func._schema.name)
