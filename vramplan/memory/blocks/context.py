"""What every block needs to run on a tape: formats, device, attention, which parameters are trained, adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vramplan.facts.architecture import Attention, Embedding, LatentAttention, Linear, Norm, Role
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.leaf import Parameter
from vramplan.memory.quantized import packed_numel
from vramplan.memory.size import Size, per_position, per_token
from vramplan.memory.tape import LEAF, Node, Tape, Tensor
from vramplan.spec.trainable import FullMethod, LoraMethod, Method

INPUT = "input of a layer"


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the model by its full name, with the parameters that it owns itself; a leaf's are all under it."""

    name: str
    params: tuple[Parameter, ...]
    is_leaf: bool = False
    read: frozenset[str] = frozenset()
    """Of the parameters those of other modules, which it reads as it runs (``register_external_parameter``)."""

    @property
    def path(self) -> str:
        """What the names of all parameters under it begin with."""
        if self.name in ("", "base_model", "base_model.model"):
            return ""
        return self.name.removesuffix("layer") if self.name.endswith(".layer") else f"{self.name}."


class ModuleHooks(Protocol):
    """Listens to modules as they run."""

    def before_forward(self, module: Module) -> None: ...
    def after_forward(self, module: Module) -> None: ...
    def before_backward(self, module: Module) -> None: ...
    def after_backward(self, module: Module) -> None: ...
    def whole(self, name: str) -> Tensor | None: ...
    def read(self, param: Parameter) -> None: ...


@dataclass(slots=True)
class Tables:
    """What the inner model makes once for all layers, on each path: layers with a sliding window have their own."""

    rotary: tuple[Tensor, ...] | None = None
    """Cosines and sines, or both as one table of complex numbers."""
    window_rotary: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    window_mask: Tensor | None = None
    """None where the kernel is told that the mask is causal."""

    def tensors(self) -> list[Tensor]:
        """All of them."""
        masks = [each for each in (self.mask, self.window_mask) if each is not None]
        return [*(self.rotary or ()), *(self.window_rotary or ()), *masks]

    def of(self, mixer: Attention | LatentAttention) -> Tables:
        """What of them a layer is given."""
        if mixer.local_window is not None:
            return Tables(window_rotary=self.window_rotary, window_mask=self.window_mask)
        return Tables(rotary=self.rotary, mask=self.mask)


@dataclass
class BlockContext:
    """One run of a model on a tape."""

    tape: Tape
    dtype: Dtype
    """Format of activations and weights (under autocast: of weights and of the residual stream)."""
    device: str
    """``cuda`` or ``cpu``: kernels save different things."""
    attention: str
    method: Method = field(default_factory=FullMethod)
    autocast: Dtype | None = None
    """Format that matrix products are cast to, or None."""
    adapter_dtype: Dtype | None = None
    """Format of adapters where it is not that of the weights."""
    sequence_parallel: int = 1
    lone_sequence: bool = False
    """Whether a micro-batch is one sequence: some transposed tensors are then in order as they lie."""
    flat: bool = False
    """Whether activations are matrices (tokens, features), as they are around routed experts."""
    prefix: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    casts: dict[str, Tensor] = field(default_factory=dict)
    """Autocast's cache: the low-precision copy of each trained weight, until autocast ends."""
    windowed: bool = False
    """Whether sequences reach the sliding window, so that fused kernels need a mask."""
    masked: bool = False
    """Whether sequences are padded or packed, so that fused kernels need a mask for each."""
    given_positions: bool = False
    """Whether the batch brings positions of every token."""
    tables: Tables = field(default_factory=lambda: Tables())
    model_frame: list[Tensor] = field(default_factory=list)
    """Local variables of the inner model, alive until it returns."""
    output: Tensor | None = None
    """Attention weights that a layer returns to the model, which holds them until the next layer returns (BLOOM)."""
    recomputed: Tensor | None = None
    """Attention weights that a layer returns as it is recomputed."""
    returned: Tensor | None = None
    """Attention weights that the caller of an attention module holds until its layer is done."""
    frame: list[Tensor] = field(default_factory=list)
    """Local variables of the attention module, alive until it returns."""
    hooks: ModuleHooks | None = None
    """Who listens to modules: ZeRO-3's gathers, or nobody."""
    adapted_parameters: frozenset[str] = frozenset()
    """Parameters of experts and routers that get adapters as they are."""
    leaves: str = "none"
    """What ZeRO-3 takes as one module: ``layers``, ``mixtures`` (``gathers.LEAF_FAMILIES``), ``none``."""
    own_linears: bool = False
    """Whether linears are DeepSpeed's own, as ZeRO-3 replaces them."""
    in_leaf: bool = False
    """Whether a module runs whose own modules nobody listens to."""

    graph: list[Tensor] = field(default_factory=list)
    """What nodes of the micro-batch's graph hold by themselves: it lives as long as the loss or the outputs."""
    viewed: set[str] = field(default_factory=set)
    """Weights of which it holds views."""
    router_scores: list[Tensor] | None = None
    """The scores of every router that the model collects, or None where it collects none."""
    num_layers: int = 0
    last_parameter: str = ""
    """The model's last, whose module is never quantized (transformers/quantizers/base.py,
    ``get_keys_to_not_convert``)."""
    liger_kernels: bool = False
    """Whether norms, rotary positions and MLPs are liger-kernel's."""
    tile_rows: int = 0
    """Tokens that a gated MLP takes at a time; 0: all."""

    def at_positions(self, width: int) -> Size:
        """Elements of what is made of positions: ``width`` for each, shared by the batch where it brings none."""
        return per_token(width) if self.given_positions else per_position(width)

    def trains_base(self, name: str) -> bool:
        """Whether a parameter of the model itself is trained; with adapters that is a copy which is saved whole."""
        if isinstance(self.method, LoraMethod):
            return self.method.saves(name.rpartition(".")[0])
        return self.method.trains(name, self.num_layers)

    def parameter(self, name: str, numel: int, trainable: bool | None = None, dtype: Dtype | None = None) -> Parameter:
        """The parameter of that full name; the same object for the same name (tied weights)."""
        full = f"{self.prefix}{name}"
        if full not in self.parameters:
            trained = self.trains_base(full) if trainable is None else trainable
            self.parameters[full] = Parameter(self.tape, full, numel, dtype or self.dtype, trained)
        return self.parameters[full]

    def quantizes(self, linear: Linear) -> bool:
        """Whether its weight is kept in 4 bits: every linear's but the head's, and none that a class of its own
        multiplies (transformers/integrations/bitsandbytes.py, ``replace_with_bnb_linear``)."""
        packs = isinstance(self.method, LoraMethod) and self.method.kind == "qlora"
        name = f"{self.prefix}{linear.name}".removesuffix(".base_layer")
        whole = linear.role is Role.HEAD or linear.by_matmul or f"{name}.weight" == self.last_parameter
        return packs and not whole

    def linear_parameters(self, linear: Linear) -> tuple[Parameter, Parameter | None]:
        numel = linear.weight_numel
        if self.hooks is not None and self.quantizes(linear):  # ZeRO-3 gathers what is packed
            numel = packed_numel(numel, self.dtype.nbytes)
        weight = self.parameter(f"{linear.name}.weight", numel)
        bias = self.parameter(f"{linear.name}.bias", linear.out_features) if linear.bias else None
        for param in (weight, bias):
            if param is not None:
                param.lowered = linear.is_nn_linear and not self.quantizes(linear)  # ``Linear4bit`` is another class
        return weight, bias

    def norm_parameters(self, norm: Norm) -> tuple[Parameter | None, Parameter | None]:
        numel = norm.width * (norm.num_heads or 1)
        dtype = Dtype.FP32 if isinstance(self.method, LoraMethod) and self.method.fp32_norms else None
        weight = self.parameter(f"{norm.name}.weight", numel, dtype=dtype) if norm.affine else None
        bias = self.parameter(f"{norm.name}.bias", numel, dtype=dtype) if norm.affine and norm.bias else None
        return weight, bias

    def low(self, x: Tensor, label: str) -> Tensor:
        """``x`` as autocast hands it to a matrix product. Of a leaf in fp32, as the embeddings' output is that
        checkpointing makes require a gradient, the copy is cached while autocast is on, as a weight's
        (autocast_mode.cpp, ``cached_cast``)."""
        if self.autocast is None:
            return x
        if x.node is None or x.node.name != LEAF or x.dtype is not Dtype.FP32:
            return ops.to(x, self.autocast, label)
        if INPUT not in self.casts:
            self.casts[INPUT] = ops.to(x, self.autocast, label)
        return self.casts[INPUT]

    def all_low(self, label: str, *operands: Tensor) -> list[Tensor]:
        """The operands of one product as autocast hands them to it, in their order. The last is cast first
        (autocast_mode.h, ``WrapFunction_::call``: a list of arguments, evaluated from the right), so backward comes to
        the first one's copy first."""
        return [self.low(operand, label) for operand in reversed(operands)][::-1]

    def both_low(self, label: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """``all_low`` of two."""
        second = self.low(b, label)
        return self.low(a, label), second

    def adapts(self, linear: Linear) -> LoraMethod | None:
        """The adapter settings if this projection gets an adapter (PEFT's ``check_target_module_exists``)."""
        method = self.method
        if not isinstance(method, LoraMethod):
            return None
        if method.target_modules == "all-linear" and linear.role is Role.HEAD:
            return None
        return method if method.adapts(f"{self.prefix}{linear.name}") else None

    def adapts_table(self, table: Embedding) -> LoraMethod | None:
        """The adapter settings if the token table gets an adapter: ``all-linear`` takes none."""
        method = self.method
        if not isinstance(method, LoraMethod) or not method.adapts_table(table.name):
            return None
        return method

    def call(
        self,
        name: str,
        params: tuple[Parameter | None, ...],
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        positional: bool = True,
        is_leaf: bool = False,
        read: tuple[Parameter, ...] = (),
    ) -> Tensor:
        """Run a module of the model. ZeRO-3 hangs its hooks here: fetch before, release after, and the same in
        backward by two identity nodes (deepspeed/runtime/zero/parameter_offload.py, ``_register_deepspeed_module``).

        ``positional``: whether ``x`` is a positional argument; the backward release hooks see no others.
        ``read``: other modules' parameters that it reads, by which ZeRO-3 takes them for its own (``ZeROOrderedDict``);
        ``reads`` says when.
        """
        hooks = self.hooks
        if hooks is None or self.in_leaf:
            return function(x)
        own = tuple(param for param in params if param is not None)
        module = Module(f"{self.prefix}{name}", (*own, *read), is_leaf, frozenset(param.name for param in read))
        hooks.before_forward(module)
        if positional:
            x = identity(x, lambda: hooks.after_backward(module))
        out = function(x)
        hooks.after_forward(module)
        return identity(out, lambda: hooks.before_backward(module))

    def dropout(self, x: Tensor, probability: float, label: str, module: str) -> Tensor:
        """``nn.Dropout`` where ``module`` names one, to which ZeRO-3 listens though it has no weights; else the
        function."""
        if not module:
            return ops.dropout(x, probability, self.device, label)
        return self.call(module, (), lambda x: ops.dropout(x, probability, self.device, label), x)

    def reads(self, *params: Parameter | None) -> None:
        """The module that runs reads parameters of others; each was among what ``call`` was told of."""
        if self.hooks is not None and not self.in_leaf:
            for param in params:
                if param is not None:
                    self.hooks.read(param)

    def call_leaf(
        self, name: str, params: tuple[Parameter, ...], function: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """Run a module that ZeRO-3 takes as one: all weights under it are fetched and released together, and their
        gradients wait for the end of its backward (deepspeed/runtime/zero/stage3.py, ``reduce_leaf_module_grads``).

        torch's hook for that holds the gradient of the module's result until then (torch/utils/hooks.py,
        ``BackwardHook``).
        """
        trained = [param for param in params if param.requires_grad] if x.requires_grad else []
        result_gradient: list[Tensor] = []

        def deliver() -> None:
            for param in trained:
                param.deliver()
            result_gradient.clear()

        def run(x: Tensor) -> Tensor:
            x = identity(x, deliver) if trained else x
            self.in_leaf = True
            try:
                return function(x)
            finally:  # recomputing can end in the middle
                self.in_leaf = False

        for param in trained:
            param.waits = True
        out = self.call(name, params, run, x, is_leaf=True)
        return kept_gradient(out, result_gradient) if trained else out


def kept_gradient(x: Tensor, keeper: list[Tensor]) -> Tensor:
    """The same bytes behind a node that leaves its gradient with ``keeper`` too."""
    out = Tensor(x.storage, x.numel, x.dtype)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        keeper.extend(grad for grad in grads if grad is not None)
        return [grads[0]]

    return x.storage.tape.attach("hook", out, [x], [], backward)


def identity(x: Tensor, event: Callable[[], None]) -> Tensor:
    """The same bytes behind a node that runs ``event`` in backward (``PreBackwardFunctionForModule``)."""
    out = Tensor(x.storage, x.numel, x.dtype)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        event()
        return [grads[0]]

    return x.storage.tape.attach("hook", out, [x], [], backward)


def tokens(width: int) -> tuple[int, int, int, int, int]:
    """Elements of an activation of ``width`` features a token."""
    return per_token(width)
