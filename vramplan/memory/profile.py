"""One micro-batch of a model on the tape: what is alive when, as polynomials of the batch.

Layers of one kind differ only in how many others are alive, so only the first and the last layer of each kind are
run; a layer between them stands as what it keeps for backward. Along a stretch of equal layers the bytes alive grow
or fall linearly, so the highest instant is in the first or the last of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from functools import lru_cache, partial

from vramplan.facts.architecture import DecoderLayer
from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.against_forgetting import added, base_logits, on_gradient, with_divergence
from vramplan.memory.blocks.balance import collect_of_skipped, with_balance
from vramplan.memory.blocks.chunked_loss import chunked_loss
from vramplan.memory.blocks.context import BlockContext, Module, Tables, identity
from vramplan.memory.blocks.core import masks
from vramplan.memory.blocks.fused_loss import fused_loss
from vramplan.memory.blocks.head import TOKENS, embed, logits, loss
from vramplan.memory.blocks.layer import RESIDUAL, call_layer
from vramplan.memory.blocks.linear import project
from vramplan.memory.blocks.norm import normalise
from vramplan.memory.blocks.rotary import rotary_tables
from vramplan.memory.garbage import uncollected
from vramplan.memory.gathers import Gathers
from vramplan.memory.kinds import layer_kind, layers_near_ends, layers_shown
from vramplan.memory.labels import AUTOCAST_COPIES, GATHERED, VIEWED
from vramplan.memory.leaf import Parameter
from vramplan.memory.micro_batch import Gradient as Gradient
from vramplan.memory.micro_batch import Profile as Profile
from vramplan.memory.model_run import ModelRun
from vramplan.memory.reentrant import checkpoint_reentrant, requiring_gradient
from vramplan.memory.size import ZERO, Size, add, per_token
from vramplan.memory.skipped import add_kept, difference, held_by_graph, hold_output_of_skipped, less
from vramplan.memory.tape import RANDOM_STATE, Node, Point, Tape, Tensor
from vramplan.spec.trainable import LoraMethod

CPU_RANDOM_STATE_BYTES = 5056
"""``torch.get_rng_state().nbytes``; a GPU's state is kept on the host too."""


class Runner:
    """Runs micro-batches one after another; gathered weights stay from one to the next."""

    def __init__(self, run: ModelRun) -> None:
        self.run = run
        self.tape = Tape()
        self.tape.logits_numel = per_token(run.architecture.vocab_size)
        if run.device == "cpu":
            self.tape.widens_operands = self.tape.kernel_buffers = True
            self.tape.random_state_bytes = CPU_RANDOM_STATE_BYTES
        self.gathers = Gathers(self.tape, run.gathers, run.autocast) if run.gathers is not None else None
        self.ctx = BlockContext(
            self.tape,
            run.dtype,
            run.device,
            run.attention,
            method=run.method,
            autocast=run.autocast,
            adapter_dtype=run.adapter_dtype,
            sequence_parallel=run.sequence_parallel,
            lone_sequence=run.lone_sequence,
            windowed=run.windowed,
            masked=run.masked,
            given_positions=run.given_positions,
            hooks=self.gathers,
            own_linears=run.gathers is not None and run.own_linears,
            adapted_parameters=run.adapted_parameters,
            leaves=run.leaves,
            num_layers=run.architecture.num_layers,
            last_parameter=list(run.architecture.named_tensors())[-1].name,
            liger_kernels=run.liger_kernels,
            tile_rows=run.tile_rows,
            router_scores=[] if run.architecture.router_scores != "dropped" else None,
        )
        self.gradients: list[Gradient] = []
        self.pulls = False
        """Whether springs pull in this backward."""
        self.base: Tensor | None = None
        """The base's logits, until the loss is there."""
        self.tape.on_grad = self._collect
        self.kept: list[Tensor] = []
        if run.keep_outputs:
            self.ctx.graph = self.kept
        self.views_in_graph = run.gathers is not None and run.method.kind == "qlora"
        """Whether views of gathered weights live until the graph goes."""
        self.persistent_between: Tensor | None = None
        architecture = run.architecture
        numbers: dict[Hashable, int] = {}  # what is looked up for every layer is not hashed each time
        self.keys: list[Hashable] = [
            numbers.setdefault((layer_kind(architecture, run.method, index), run.recomputes(index)), len(numbers))
            for index in range(architecture.num_layers)
        ]
        packed_width = run.dtype.nbytes if self.views_in_graph else 0
        near = layers_near_ends(architecture, run.gathers, packed_width) if run.gathers is not None else (0, 0)
        self.shown = layers_shown(self.keys, *near)

    def _collect(self, param: Parameter, held: list[Tensor]) -> None:
        if self.pulls and not self.run.springs_on_host:
            self.tape.grad_numel -= param.grad_numel  # it is still the tape's
            with added(held) if self.run.adds_gradients else nullcontext():
                on_gradient(param, self.run.spring_ranks, self.run.springs)
            self.tape.grad_numel += param.grad_numel
        self.gradients.append(Gradient(param.name, param.grad_numel, self.snapshot(self.tape.where)))

    def micro_batch(self, *, is_last: bool = True) -> Profile:
        """Run one micro-batch; what outlives it stays alive until the next. ``is_last``: of its step, in which springs
        pull."""
        tape = self.tape
        self.pulls = is_last and bool(self.run.springs)
        self.kept.clear()
        self.gradients = []
        tape.points.clear()
        tape.grad_numel = 0
        result = self.forward()
        end = self.snapshot("after forward")
        forward = tuple(tape.points)
        tape.points.clear()
        grad = tape.new((1, 0, 0, 0, 0), Dtype.FP32, ops.GRADIENTS)
        tape.backward(result, grad)
        del grad, result
        if not self.run.keep_outputs:
            self.ctx.graph.clear()
        done = self.snapshot("after backward")
        if self.gathers is not None:
            self.gathers.end_backward()
        last = self.snapshot("after backward")
        return Profile(forward, end, tuple(tape.points), done, last, tuple(self.gradients))

    def optimizer_step(self, skipped: bool) -> Size:
        """What the step does to gathered weights; the loop lets go of the outputs after it. Gives what the graph, where
        the outputs keep it, holds of weights that were whole until the step."""
        self.persistent_between = None
        before = dict(self.tape.by_label)
        if self.gathers is not None:
            self.gathers.release_all()
        viewed = difference(self.tape.by_label, before).get(VIEWED, ZERO)
        if self.views_in_graph and viewed != ZERO:
            numel = sum(self._persistent_numel(index, self.ctx.viewed) for index in self._not_shown())
            viewed = add(viewed, (numel * self.run.dtype.nbytes, 0, 0, 0, 0))
        self.kept.clear()
        if self.gathers is not None and not skipped:
            self.gathers.let_go_of_secondary()
            self.gathers.gather_persistent(tuple(self.ctx.parameters.values()))
            numel = sum(self._persistent_numel(index) for index in self._not_shown())
            self.persistent_between = self.tape.new((numel, 0, 0, 0, 0), self._trained_dtype(), GATHERED)
        return viewed

    def _not_shown(self) -> list[int]:
        return [index for index in range(len(self.keys)) if index not in self.shown]

    def _persistent_numel(self, index: int, among: set[str] | None = None) -> int:
        """Elements that stay whole of a layer that is not run: those of one of its kind that is; ``among`` these."""
        assert self.gathers is not None
        twin, names = self._twin_prefix(index), self.gathers.persistent
        names = names if among is None else names & among
        return sum(self.ctx.parameters[name].grad_numel for name in names if name.startswith(twin))

    def _twin_prefix(self, index: int) -> str:
        """The prefix of a layer that is run, of the same kind as one that is not."""
        twin = next(other for other in sorted(self.shown, reverse=True) if self.keys[other] == self.keys[index])
        return f"{self.run.architecture.layer_prefix}.{twin}."

    def _keep_secondary(self, skipped: list[int]) -> None:
        """The second parts (hpZ) of layers that are not run, as their forward leaves them; what stays whole until the
        step gets its own then."""
        if self.gathers is None or self.gathers.secondary is None:
            return
        for index in skipped:
            twin = self._twin_prefix(index)
            for name, param in self.ctx.parameters.items():
                if name.startswith(twin) and name not in self.gathers.persistent:
                    self.gathers.keep_secondary(f"{index}.{name}", param)

    def _trained_dtype(self) -> Dtype:
        return self.run.adapter_dtype or self.run.dtype

    def snapshot(self, where: str) -> Point:
        tape = self.tape
        tape.settle()
        return Point(where, len(tape.points), tape.total, dict(tape.by_label), tape.grad_numel)

    def forward(self) -> Tensor:
        ctx = self.ctx
        hooks, model = ctx.hooks, Module("model", ())
        wrappers = [Module("", ())]
        if isinstance(self.run.method, LoraMethod):  # PeftModel, LoraModel, and the causal language model
            wrappers += [Module("base_model", ()), Module("base_model.model", ())]
        if self.gathers is not None:
            # with adapters the base's logits come from the same engine, which passes them by
            asks_base = self.run.kl_chunk_tokens > 0 and isinstance(self.run.method, LoraMethod)
            self.gathers.start_iteration(remembers=not asks_base)
            if self.run.architecture.reads_embedding and self.gathers.is_recorded:
                model = Module("model", (ctx.parameters[f"{self.run.architecture.embeddings[0].name}.weight"],))
                self.gathers.adopt(model)
        self.kept.append(self.tape.new((0, 1, 0, 0, 0), Dtype.INT64, TOKENS))
        if self.run.kl_chunk_tokens:
            self.base = base_logits(self.tape, self.run.architecture.vocab_size, self.run.autocast or self.run.dtype)
        if hooks is not None:
            for module in (*wrappers, model):
                hooks.before_forward(module)
        x = self._decoder()
        if hooks is not None:
            hooks.after_forward(model)
            if self.run.architecture.reads_embedding:
                model = Module("model", (ctx.parameters[f"{self.run.architecture.embeddings[0].name}.weight"],))
            x = identity(x, lambda: hooks.before_backward(model))
        held: list[Tensor] = []  # the output's logits, which the caller of the model has
        result = self._loss(x, held)
        del x  # the caller of the head holds its input until the loss is there
        ctx.casts.clear()
        if hooks is not None:
            for module in reversed(wrappers):
                hooks.after_forward(module)
                result = identity(result, partial(hooks.before_backward, module))
        if self.run.kl_chunk_tokens:
            with self.tape.at("KL to the base"):
                chunk = self.run.kl_chunk_tokens
                result = with_divergence(result, (held or self.kept)[-1], self.run.architecture.vocab_size, chunk)
        self.base = None
        return result

    def _loss(self, x: Tensor, held: list[Tensor]) -> Tensor:
        """The head and the model's own loss, or both fused, where no logits are left for the output to hold."""
        ctx, architecture = self.ctx, self.run.architecture
        kept = self.kept if self.run.keep_outputs else held if self.run.kl_chunk_tokens else []
        if self.run.fused_loss_rows:
            with self.tape.at("loss"):
                result = fused_loss(ctx, x, architecture, self.run.fused_loss_rows)
                return with_balance(ctx, result, architecture, kept)
        with self.tape.at("head"):
            scores = logits(ctx, x, architecture)
        with self.tape.at("loss"):
            if self.run.loss == "chunked":
                result = chunked_loss(ctx, scores, architecture.vocab_size, self.run.chunk_rows)
            else:
                result = loss(ctx, scores, self.run.shifted_logits)
            result = with_balance(ctx, result, architecture, kept)
        kept.append(scores)
        return result

    def _decoder(self) -> Tensor:
        """Embeddings, layers and final norm: the inner model of the causal language model."""
        ctx, architecture = self.ctx, self.run.architecture
        with self.tape.at("embedding"):
            requires = self.run.checkpointing
            given = [embed(ctx, architecture, self.kept[0], self._require_input_gradient if requires else None)]
        attentions = [layer.mixer for layer in architecture.layers]
        masks(ctx, attentions, architecture.spare_mask, architecture.both_masks)
        rotary_tables(ctx, attentions, architecture.rotary_of_kind)
        x = self._layers(given)
        with self.tape.at("head"):
            if architecture.final_norm is not None:
                x = normalise(ctx, x, architecture.final_norm)
            if architecture.embedding_projections:
                x = project(ctx, x, architecture.embedding_projections[0], RESIDUAL)
        ctx.tables = Tables()
        ctx.model_frame.clear()
        ctx.output = None
        return x

    def _require_input_gradient(self, x: Tensor) -> Tensor:
        """The first layer's input as checkpointing wants it; its leaf holds its gradient where the outputs are kept."""
        return requiring_gradient(x, self.kept if self.run.keep_outputs else [])

    def _layers(self, given: list[Tensor]) -> Tensor:
        """``given``: the first layer's input, which goes when that layer has returned."""
        x = given.pop()
        costs: dict[Hashable, dict[str, Size]] = {}
        skipped: list[int] = []
        for index, key in enumerate(self.keys):
            if index not in self.shown:
                skipped.append(index)
                continue
            x = self._skip(x, skipped, self.keys, costs)
            skipped = []
            before = held_by_graph(self.ctx)
            x = self._layer(x, self.run.architecture.layers[index], index)
            costs.setdefault(key, difference(held_by_graph(self.ctx), before))
        return self._skip(x, skipped, self.keys, costs)

    def _layer(self, x: Tensor, layer: DecoderLayer, index: int) -> Tensor:
        ctx = self.ctx
        prefix = f"{self.run.architecture.layer_prefix}.{index}."
        tables = ctx.tables.of(layer.mixer)

        def forward(hidden: Tensor) -> Tensor:
            before = ctx.prefix, ctx.tables
            # a second forward runs when the model's own has let go of the tables
            ctx.prefix, ctx.tables = prefix, tables
            again = not self.tape.in_first_forward
            casts = ctx.casts
            if again:
                ctx.casts = {}  # recomputing has an autocast of its own, whose cache ends with it
            try:
                return call_layer(ctx, hidden, layer)
            finally:
                ctx.prefix, ctx.tables = before
                ctx.casts = casts
                ctx.frame.clear()  # recomputing can end in the middle of a module
                ctx.returned = None
                if not self.run.reentrant:
                    ctx.recomputed = None

        def other_result() -> Tensor | None:
            found, ctx.recomputed = ctx.output if self.tape.in_first_forward else ctx.recomputed, None
            return found

        with self.tape.at(f"layer {index}"):
            if not self.run.recomputes(index):
                return forward(x)
            if not self.run.reentrant:
                return self.tape.checkpoint(forward, x, on_host=self.run.host_checkpoints)
            kept, on_host = self._kept_by_nodes(), self.run.host_checkpoints
            kept += tables.tensors()
            return checkpoint_reentrant(self.tape, forward, x, kept, other_result, on_host=on_host)

    def _kept_by_nodes(self) -> list[Tensor]:
        """What nodes of reentrant checkpoints hold beside saved tensors: the loop's, where it keeps the outputs and
        with them the graph."""
        return self.kept if self.run.keep_outputs else []

    def _skip(
        self, x: Tensor, skipped: list[int], keys: list[Hashable], costs: dict[Hashable, dict[str, Size]]
    ) -> Tensor:
        """Layers that are not run: what they keep, as a node that frees it when backward passes."""
        if not skipped:
            return x
        self._keep_secondary(skipped)
        hold_output_of_skipped(self.ctx, recomputed=self.run.recomputes(skipped[-1]))
        tape = self.tape
        collect_of_skipped(self.ctx, [self.run.architecture.layers[index] for index in skipped])
        total: dict[str, Size] = {}
        cached = ZERO
        for index in skipped:
            for label, size in costs[keys[index]].items():
                # autocast's cache holds it, not the graph
                if label == AUTOCAST_COPIES and (self.run.recomputes(index) or not tape.training):
                    cached = add(cached, size)
                else:
                    total[label] = add(total.get(label, ZERO), size)
        if self.views_in_graph and VIEWED in total:
            self.ctx.graph.append(tape.new(total.pop(VIEWED), Dtype.UINT8, VIEWED))
        if cached != ZERO:
            copies = tape.new(cached, Dtype.UINT8, AUTOCAST_COPIES)
            self.ctx.casts[f"layers {skipped[0]} to {skipped[-1]}"] = copies
            del copies
        held = [tape.new(size, Dtype.UINT8, label) for label, size in total.items() if size != ZERO]
        if self.run.reentrant:
            self._kept_by_nodes().extend(each for each in held if each.storage.label == RANDOM_STATE)
        out = Tensor(x.storage, x.numel, x.dtype)

        def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
            self._deliver_skipped(skipped, keys, costs)
            return [grads[0]]

        with tape.at(""):
            out = tape.attach("layers between", out, [x], [], backward)
        if out.node is not None:
            out.node.saved.extend(held)
        return out

    def _add_kept(self, total: dict[str, Size], costs: dict[str, Size], index: int) -> None:
        """Adds what a layer keeps until its backward."""
        add_kept(total, costs, {VIEWED: self.views_in_graph, AUTOCAST_COPIES: self.run.recomputes(index)})

    def _deliver_skipped(
        self, skipped: list[int], keys: list[Hashable], costs: dict[Hashable, dict[str, Size]]
    ) -> None:
        """Gradients at the instants of the next run layer of their kind above, less what layers up to it keep."""
        prefix, above = self.run.architecture.layer_prefix, skipped[-1] + 1
        freed: dict[Hashable, dict[str, Size]] = {}
        templates: dict[Hashable, tuple[str, list[Gradient]]] = {}
        for key in {keys[index] for index in skipped}:
            twin = next(index for index in range(above, len(keys)) if index in self.shown and keys[index] == key)
            name, freed[key] = f"{prefix}.{twin}.", {}
            templates[key] = name, [event for event in self.gradients if event.name.startswith(name)]
            for index in range(above, twin + 1):
                self._add_kept(freed[key], costs[keys[index]], index)
        for index in reversed(skipped):
            key = keys[index]
            name, events = templates[key]
            self.tape.settle()
            for event in events:
                self.tape.grad_numel += event.numel
                at = less(event.at, freed[key], self.tape.grad_numel, f"layer {index}")
                self.gradients.append(Gradient(f"{prefix}.{index}.{event.name[len(name) :]}", event.numel, at))
            for each in freed.values():
                self._add_kept(each, costs[key], index)


@lru_cache(maxsize=256)
def profile(run: ModelRun) -> Profile:
    """The profile of one micro-batch where weights stay whole: every one is like the first."""
    with uncollected():
        return Runner(run).micro_batch()
