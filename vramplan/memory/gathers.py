"""ZeRO-3's gathering of weights, module by module, as the parameter coordinator decides it.

Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py and partition_parameters.py. The first
iteration records the order of modules and gathers each module's weights when it runs; later iterations prefetch along
the recorded order and keep what is needed again soon. Sizes of whole weights do not depend on the number of ranks
(their padding, less than one element a rank, is left out).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.blocks.context import Module
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import const
from vramplan.memory.tape import Tape, Tensor
from vramplan.spec.layout import shard

NEVER = -(10**10)

LEAF_FAMILIES = frozenset(["mixtral", "qwen2_moe", "qwen3_moe"])
"""Families whose blocks with experts are taken as one module (runtime/zero/leaf_module_config.py,
``DEFAULT_LEAF_MODULE_CLASSES``)."""


@dataclass(frozen=True, slots=True)
class GatherLimits:
    """DeepSpeed's thresholds, in elements (``zero_optimization.stage3_*``)."""

    prefetch_bucket_numel: int
    max_live_numel: int
    max_reuse_numel: int
    persistence_numel: int
    model_persistence_numel: int
    alone: bool = False
    """Whether one rank holds everything: its weights are used where they lie (``_no_gather_coalesced``)."""
    copied: bool = True
    """Whether a lone rank's weights lie elsewhere (offload) and are copied to be used."""
    degree: int = 0
    """Ranks that a weight is cut over, where a rank's part is copied or cast to be gathered; 0: no part is."""
    secondary: int = 0
    """Ranks that keep whole weights among them in second parts (hpZ); 0: none do."""
    ranks: int = 0
    """Those that a second part's padding is for."""
    one_by_one: bool = False  # each weight has a buffer of its own (``stage3_allgather_sequential``)
    by_all_reduce: bool = False
    """Whether weights gathered together stay views of one buffer (``stage3_use_all_reduce_for_fetch_params``)."""
    leaf_layers: bool = False  # whether decoder layers are gathered whole
    from_host: bool = False
    """Whether every part lies in the host's memory and is copied to the device to be gathered."""


class _Handle:
    """Gathers in flight: one flat receive buffer for several parameters, split into copies at the first wait
    (``AllGatherCoalescedHandle``); a single parameter is a view of its buffer."""

    def __init__(self, gathers: Gathers, params: list[Parameter]) -> None:
        self.params = params
        self.split = False
        """Whether each parameter has a tensor of its own already."""
        self.complete = False
        self.buffers: list[Tensor] = []
        self.lone = len(params) == 1 or gathers.limits.one_by_one
        """Whether each is a view of a buffer of its own, or a cast of it (``AllGatherHandle``)."""
        tape = gathers.tape
        if gathers.limits.alone:
            for param in params:
                numel = param.grad_numel if gathers.limits.copied else 0
                gathers.data[param.name] = tape.new(const(numel), param.dtype, labels.GATHERED)
            self.split = True
            return
        if gathers.limits.by_all_reduce and not self.lone:
            flat = tape.new(const(sum(param.grad_numel for param in params)), params[0].dtype, labels.GATHERED)
            for param in params:
                gathers.data[param.name] = Tensor(flat.storage, const(param.grad_numel), param.dtype)
            self.split = True
            return
        if self.lone and all(gathers.travels_in(param) is param.dtype for param in params):
            for param in params:
                gathers.data[param.name] = tape.new(const(param.grad_numel), param.dtype, labels.GATHERED)
                _bring(gathers, [param])
            self.split = True
            return
        for dtype in {gathers.travels_in(param): None for param in params}:
            together = [param for param in params if gathers.travels_in(param) is dtype]
            numel = sum(param.grad_numel for param in together)
            self.buffers.append(tape.new(const(numel), dtype, labels.GATHER_BUFFER))
            _bring(gathers, together)

    def wait(self, gathers: Gathers) -> None:
        """The first wait makes every parameter of the gather available; later ones change nothing."""
        if self.complete:
            return
        tape = gathers.tape
        for param in () if self.split else self.params:
            travels = gathers.travels_in(param)
            whole = None if self.lone else tape.new(const(param.grad_numel), travels, labels.GATHERED)
            if whole is None or travels is not param.dtype:
                whole = tape.new(const(param.grad_numel), param.dtype, labels.GATHERED)
            gathers.data[param.name] = whole
        self.complete = True
        gathers.available.update(param.name for param in self.params)


def second_part(numel: int, ranks: int, size: int) -> int:
    """Elements that a rank keeps of a weight besides its own part, where ``size`` ranks keep it whole."""
    return shard(numel, ranks) * ranks // size


def _bring(gathers: Gathers, params: list[Parameter]) -> None:
    """The rank's parts on the device in the format that they are gathered in, where they are not so already; they are
    together until they lie in the buffer (``_all_gather_dtype``, ``_all_gather_sequential``)."""
    limits, parts = gathers.limits, []
    for param in params if limits.degree else ():
        part, travels = const(shard(param.grad_numel, limits.degree)), gathers.travels_in(param)
        brought = gathers.tape.new(part, param.dtype, labels.GATHER_BUFFER) if limits.from_host else None
        if travels is not param.dtype:
            brought = gathers.tape.new(part, travels, labels.GATHER_BUFFER)
        parts.append(brought)


class Gathers:
    """The coordinator: listens to modules and keeps whole weights on the tape while they are gathered."""

    def __init__(self, tape: Tape, limits: GatherLimits, autocast: Dtype | None = None) -> None:
        self.tape = tape
        self.limits = limits
        self._autocast = autocast
        self.data: dict[str, Tensor] = {}
        self.available: set[str] = set()
        self.persistent: set[str] = set()
        self._persistent_numel = 0
        self.secondary: dict[str, Tensor] | None = None
        """The second parts of trained weights that were made since the last optimizer step took them away; None: no
        step was yet, and all are there since the model was built."""
        self._known: dict[str, Parameter] = {}
        self._inflight: dict[str, _Handle] = {}
        self._active: dict[str, set[str]] = defaultdict(set)
        self._available_numel = 0
        self._step = 0
        self._complete = False
        self._recording = False
        self._modules: list[Module] = []
        self._places: dict[str, list[int]] = defaultdict(list)
        """Where among the recorded modules each parameter is used; made when it is first asked for."""
        self._numel_before = [0]  # elements of all modules before each
        self._order: list[tuple[Parameter, int]] = []
        self._queue: deque[tuple[Parameter, int]] = deque()
        self._fetched_for: dict[str, int] = defaultdict(lambda: NEVER)
        self._backward: dict[str, Module] = {}
        self._has_read: set[str] = set()  # modules that have run once
        self._to_read: set[str] = set()  # by modules in their first forward
        self._recomputed: dict[str, list[Parameter]] = defaultdict(list)

    def travels_in(self, param: Parameter) -> Dtype:
        """The format that a weight is gathered in: low precision for a linear's under autocast."""
        return self._autocast if self._autocast is not None and param.lowered else param.dtype

    # Listening to modules

    def before_forward(self, module: Module) -> None:
        self._record(module)
        self._fetch(module, forward=True)

    def after_forward(self, module: Module) -> None:
        self._release(module, forward=True)

    def before_backward(self, module: Module) -> None:
        self._record(module)
        self._fetch(module, forward=False)

    def after_backward(self, module: Module) -> None:
        self._release(module, forward=False)

    def whole(self, name: str) -> Tensor | None:
        """The gathered tensor of a weight, if it is there."""
        return self.data.get(name)

    def start_iteration(self, *, remembers: bool = True) -> None:
        """``reset_step``. ``remembers``: not where a forward of other modules came between (``trace_prologue``)."""
        for name in list(self._inflight):
            self._inflight.pop(name).wait(self)
            self._free(name)
        if not remembers:
            self._complete, self._recording, self._order = False, False, []
        elif self._recording:
            self._order = [(param, step) for step, module in enumerate(self._modules) for param in module.params]
            self._complete, self._recording = True, False
        elif not self._complete:
            self._recording = True
        self._queue = deque(self._order)
        self._fetched_for.clear()
        self._step = 0
        self._available_numel = 0

    def adopt(self, module: Module) -> None:
        """A recorded module has got parameters since (``register_external_parameter``); the order of gathers stays."""
        self._modules = [module if recorded.name == module.name else recorded for recorded in self._modules]
        self._places.clear()
        self._numel_before = [0]

    @property
    def is_recorded(self) -> bool:
        """Whether an iteration has been recorded."""
        return self._complete

    def end_backward(self) -> None:
        """``release_backward_leftovers``: modules whose input needed no gradient were not released."""
        for module in list(self._backward.values())[::-1]:
            for param in (*module.params, *self._recomputed.pop(module.name, ())):
                self._active[param.name].discard(module.name)
                if param.name not in self.persistent:
                    self._let_go(param)
        self._backward.clear()

    def release_all(self) -> None:
        """``_partition_all_parameters``: at the start of the optimizer step."""
        for name in list(self._inflight):
            self._inflight.pop(name).wait(self)
        self._active.clear()
        for name in list(self.available):
            self._free(name)
        self._available_numel = 0

    def let_go_of_secondary(self) -> None:
        """``invalidate_secondary_tensor``: at the end of the optimizer step."""
        if self.limits.secondary:
            self.secondary = {}

    def keep_secondary(self, name: str, param: Parameter) -> None:
        """``_partition_param_sec``: the second part of a weight ``name`` like ``param`` is made as it is released, if
        there is none."""
        if self.secondary is not None and name not in self.secondary and param.requires_grad:
            part = second_part(param.grad_numel, self.limits.ranks, self.limits.secondary)
            self.secondary[name] = self.tape.new(const(part), param.dtype, labels.SECONDARY)

    def gather_persistent(self, params: tuple[Parameter, ...]) -> None:
        """``_post_step``: small tensors are whole from the end of the step on."""
        for param in params:
            if param.name in self.persistent and param.name not in self.available:
                numel = param.grad_numel if self.limits.copied or not self.limits.alone else 0
                self.data[param.name] = self.tape.new(const(numel), param.dtype, labels.GATHERED)
                self.available.add(param.name)

    # Fetching

    def _record(self, module: Module) -> None:
        for param in module.params:
            self._mark(param)
        if self._recording:
            self._modules.append(module)

    def _mark(self, param: Parameter) -> None:
        """``mark_persistent_parameters``, in the order in which parameters are first seen."""
        if param.name in self._known:
            return
        self._known[param.name] = param
        numel = param.grad_numel
        room = self.limits.model_persistence_numel - self._persistent_numel
        if numel <= min(room, self.limits.persistence_numel):
            self.persistent.add(param.name)
            self._persistent_numel += numel

    def _fetch(self, module: Module, forward: bool) -> None:
        if not forward:
            self._backward[module.name] = module
        unread = self._unread(module)
        known = [param for param in module.params if param.name not in unread]
        self._gather(known)
        recompute = forward and bool(self._backward)
        for param in known:
            self._active[param.name].add(module.name)
            if recompute and not param.requires_grad:
                owner = next(reversed(self._backward))
                self._recomputed[owner].append(param)
                self._active[param.name].add(owner)
            if param.name in self._inflight:
                self._inflight.pop(param.name).wait(self)
        if self._complete:
            self._prefetch(module)
        self._step += 1

    def _unread(self, module: Module) -> set[str]:
        """Other modules' parameters that this one is to read in its first forward, and does not hold until then."""
        fresh = () if module.name in self._has_read else module.read
        self._has_read.add(module.name)
        found = {name for name in fresh if name not in self.available and name not in self._inflight}
        self._to_read |= found
        return found

    def read(self, param: Parameter) -> None:
        """The first time another's parameter is read it is gathered by itself, into a tensor of its own even on a lone
        rank, whose weights are else used where they lie (``ZeROOrderedDict``; ``_allgather_params_sequential``)."""
        if param.name in self._to_read:
            self._to_read.remove(param.name)
            self.data[param.name] = self.tape.new(const(param.grad_numel), param.dtype, labels.GATHERED)
            self.available.add(param.name)

    def _prefetch(self, module: Module) -> None:
        wanted = {param.name for param in module.params if self._fetched_for[param.name] < self._step}
        taken: set[str] = set()
        while self._queue and len(taken) < len(wanted):
            param, step = self._queue.popleft()
            self._fetched_for[param.name] = step
            taken.add(param.name)
        limit = min(self.limits.max_live_numel - self._available_numel, self.limits.prefetch_bucket_numel)
        chosen: dict[str, Parameter] = {}
        numel = 0
        while self.limits.prefetch_bucket_numel and self._queue and numel < limit:
            param, step = self._queue.popleft()
            absent = param.name not in self.available and param.name not in self._inflight
            self._fetched_for[param.name] = max(self._fetched_for[param.name], step)
            if absent and param.name not in chosen:
                chosen[param.name] = param
                numel += param.grad_numel
        self._gather(list(chosen.values()))

    def _gather(self, params: list[Parameter]) -> None:
        absent = [param for param in params if param.name not in self.available and param.name not in self._inflight]
        unique = list({param.name: param for param in absent}.values())
        if not unique:
            return
        self._available_numel += sum(param.grad_numel for param in unique)
        handle = _Handle(self, unique)
        for param in unique:
            self._inflight[param.name] = handle

    # Releasing

    def _release(self, module: Module, forward: bool) -> None:
        names = self._to_release(module)
        params = list(module.params)
        if not forward:
            recomputed = self._recomputed.pop(module.name, [])
            names |= {param.name for param in recomputed if param.name not in self.persistent}
            params += recomputed
            self._backward.pop(module.name, None)
        for param in {param.name: param for param in params}.values():
            self._active[param.name].discard(module.name)
            if param.name in names:
                self._let_go(param)

    def _to_release(self, module: Module) -> set[str]:
        names = {param.name for param in module.params}
        if not self._complete:
            return names
        names -= self.persistent
        names = {name for name in names if self._fetched_for[name] <= self._step}
        if not module.is_leaf:
            return {name for name in names if not self._is_near(name)}
        traversed = 0
        for later in self._modules[self._step :]:
            if traversed >= self.limits.max_reuse_numel or not names:
                break
            for param in self._passed(later, under=module.is_leaf):
                names.discard(param.name)
                traversed += param.grad_numel
        return names

    def _is_near(self, name: str) -> bool:
        """Whether a parameter is needed again before as many elements as a reuse distance have passed: what the loop
        over later modules finds, without the loop."""
        if not self._places:
            for index, module in enumerate(self._modules):
                passed = list(self._passed(module, under=False))
                for param in passed:
                    self._places[param.name].append(index)
                self._numel_before.append(self._numel_before[-1] + sum(param.grad_numel for param in passed))
        places = self._places.get(name, [])
        found = bisect_left(places, self._step)
        if found == len(places):
            return False
        traversed = self._numel_before[places[found]] - self._numel_before[self._step]
        return traversed < self.limits.max_reuse_numel

    def _passed(self, module: Module, under: bool) -> Iterable[Parameter]:
        """The parameters that a module counts with when reuse is looked for: its own, and those under it if it is a
        leaf that is released (``__params_to_release`` asks that of the released module alone)."""
        if not under:
            return () if module.is_leaf else module.params
        return [param for name, param in self._known.items() if name.startswith(module.path)]

    def _let_go(self, param: Parameter) -> None:
        if param.name in self.available and not self._active[param.name]:
            self._free(param.name)
            self._available_numel -= param.grad_numel

    def _free(self, name: str) -> None:
        """What was saved of a weight as a view stays for backward (``BlockContext.hooks.whole``)."""
        if name in self._known:
            self.keep_secondary(name, self._known[name])
        self.available.discard(name)
        whole = self.data.pop(name, None)
        if whole is not None and whole.storage.refs > 1:
            self.tape.relabel(whole.storage, labels.VIEWED)
