"""The classes that modules have while a model is optimised for inference.

Each tries a faster computation first. Where there is none, in training, under a compiler, or around modules that
somebody changed, it does what its original class does.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .caching import Derived
from .linears import InferenceLinear
from .smoothing import smoothing_factors
from .unpadding import CROSS_SENTENCE_ARGUMENTS, Sentences, attend, has_class_forward


InferenceLinears = tuple[InferenceLinear, ...]


class OptimizedModule:
    """A mixin that replaces a module's linear layers in inference, and rebuilds them when weights change."""

    training: bool
    __getstate__: Callable[[], Any]
    make_linear: Callable[..., InferenceLinear]
    optimized_device: torch.device
    built: Derived[InferenceLinears]
    peaks: Tensor | None  # largest absolute value of each channel that `first_reader` reads, for int8

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Return how copies and pickles make the class anew, which no module holds under its name."""
        return new_optimized, type(self).__bases__, self.__getstate__()

    def replaced_linears(self) -> list[nn.Linear]:
        """Return the linear layers that are replaced in inference."""
        return []

    def first_reader(self) -> Any:
        """Return the module whose input the first replacement reads."""
        return next(iter(self.replaced_linears()), self)

    def bypassed_modules(self) -> list[nn.Module]:
        """Return the other modules that are not called while linear layers are replaced."""
        return []

    def source_tensors(self, linears: list[nn.Linear]) -> list[Tensor | None]:
        """Return the tensors that the replacements of these layers are built from."""
        return [tensor for linear in linears for tensor in (linear.weight, linear.bias)]

    def build_linears(self) -> InferenceLinears:
        """Build the replacements from the weights as they are now."""
        raise NotImplementedError

    def inference_linears(self, x: Tensor) -> InferenceLinears | None:
        """Return the replacements where they apply, else None.

        They apply in plain inference in float32, as long as nobody has wrapped or hooked the modules they stand for.
        They are rebuilt after a weight was trained, loaded, merged or moved.
        """
        if torch.is_grad_enabled() or self.training or x.dtype != torch.float32 or not x.numel():
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled(x.device.type):
            return None
        linears = self.replaced_linears()
        if not all(map(is_plain_linear, linears)) or not all(map(is_untouched, self.bypassed_modules())):
            self.built.clear()
            return None
        sources = [source for source in self.source_tensors(linears) if source is not None]
        return self.built.get(sources, lambda: self.build_linears() if self.supports([x, *sources]) else ()) or None

    def supports(self, tensors: list[Tensor]) -> bool:
        """Check whether weights and input are in float32, on the device the model was optimised for."""
        return all(tensor.dtype == torch.float32 and tensor.device == self.optimized_device for tensor in tensors)


@cache
def make_optimized_class(mixin: type, original: type) -> type:
    """Make the class of an optimised module; the original class stays among its bases."""
    return type(f"Optimized{original.__name__}", (mixin, original), {"__module__": original.__module__})


def new_optimized(mixin: type, original: type) -> Any:
    """Make an empty module of an optimised class, for a copy."""
    made: Any = make_optimized_class(mixin, original)
    return made.__new__(made)


def is_plain_linear(linear: nn.Module) -> bool:
    """Check whether a layer is torch's own linear layer, without hooks and with its own forward."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and has_class_forward(linear) and not hooks


def is_untouched(module: nn.Module) -> bool:
    """Check whether a module is in eval mode, without hooks and with its own forward."""
    return has_class_forward(module) and not (module.training or module._forward_hooks or module._forward_pre_hooks)


class OptimizedAttention(OptimizedModule):
    """BERT's attention with one product for queries, keys and values, on sentences without their padding."""

    self: Any  # the name that transformers gives to queries, keys and values
    output: Any

    @property
    def inner(self) -> Any:
        """Return the module that attends."""
        return self.self

    def replaced_linears(self) -> list[nn.Linear]:
        """Return queries, keys, values and the output projection."""
        return [self.self.query, self.self.key, self.self.value, self.output.dense]

    def bypassed_modules(self) -> list[nn.Module]:
        """Return the modules around them."""
        return [self.self.dropout, self.output, self.output.dropout]

    def finish(self, projected: Tensor, hidden_states: Tensor) -> Tensor:
        """Do what follows the output projection: add the residual and normalise."""
        return self.output.LayerNorm(projected + hidden_states)

    def project(self, context: Tensor, hidden_states: Tensor) -> Tensor:
        """Apply the output projection, and what follows it, as the modules do."""
        return self.output(context, hidden_states)

    def build_linears(self) -> InferenceLinears:
        """Build one linear layer for queries, keys and values, and one for the output."""
        *three, output = self.replaced_linears()
        weight = torch.cat([linear.weight.detach() for linear in three])  # (3 * heads * head_size, hidden)
        biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in three]
        return (
            self.make_linear(weight, torch.cat(biases), factors=smoothing_factors(self.peaks, weight)),
            self.make_linear(output.weight, output.bias),
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        sentences: Sentences | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, add the residual and normalise, as transformers' sdpa does; attention weights are not returned."""
        within = not args and all(kwargs.get(name) is None for name in CROSS_SENTENCE_ARGUMENTS)
        linears = None
        if within and self.inner.config._attn_implementation == "sdpa":
            linears = self.inference_linears(hidden_states)
        if linears is not None:
            read, write = linears
            qkv = read(read.prepare(hidden_states))
            context = self.attend(qkv, attention_mask, sentences)
            return self.finish(write(write.prepare(context)), hidden_states), None
        if sentences is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        three = self.replaced_linears()[:3]
        context = self.attend(torch.cat([linear(hidden_states) for linear in three], dim=-1), None, sentences)
        return self.project(context.to(hidden_states.dtype), hidden_states), None

    def attend(self, qkv: Tensor, mask: Tensor | None, sentences: Sentences | None) -> Tensor:
        """Split into heads and attend, `(batch, seq, 3 * heads * head_size)` to `(batch, seq, heads * head_size)`."""
        if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
            qkv = qkv.float()  # in which torch's attention takes less time
        qkv = qkv.unflatten(-1, (3, -1, self.inner.attention_head_size))
        return attend(qkv, mask, sentences, scale=self.inner.scaling)


class OptimizedDistilAttention(OptimizedAttention):
    """DistilBERT's attention, which leaves residual and norm to its layer."""

    q_lin: nn.Linear
    k_lin: nn.Linear
    v_lin: nn.Linear
    out_lin: nn.Linear
    dropout: nn.Module

    @property
    def inner(self) -> Any:
        """Return the module itself."""
        return self

    def replaced_linears(self) -> list[nn.Linear]:
        """Return queries, keys, values and the output projection."""
        return [self.q_lin, self.k_lin, self.v_lin, self.out_lin]

    def bypassed_modules(self) -> list[nn.Module]:
        """Return the dropout of attention weights."""
        return [self.dropout]

    def finish(self, projected: Tensor, hidden_states: Tensor) -> Tensor:
        """Return what was projected."""
        return projected

    def project(self, context: Tensor, hidden_states: Tensor) -> Tensor:
        """Apply the output projection."""
        return self.out_lin(context)


class OptimizedFeedForward(OptimizedModule):
    """BERT's layer, with the activation of its feed-forward network fused into the up-projection."""

    intermediate: Any
    output: Any

    def replaced_linears(self) -> list[nn.Linear]:
        """Return the up-projection and the down-projection."""
        return [self.intermediate.dense, self.output.dense]

    def bypassed_modules(self) -> list[nn.Module]:
        """Return the modules around them."""
        return [self.intermediate, self.output, self.output.dropout]

    def build_linears(self) -> InferenceLinears:
        """Build the up-projection with its activation, and the down-projection."""
        up, down = self.replaced_linears()
        activation = self.intermediate.intermediate_act_fn
        return (
            self.make_linear(up.weight, up.bias, activation, factors=smoothing_factors(self.peaks, up.weight)),
            self.make_linear(down.weight, down.bias, follows=activation),
        )

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """Apply the network, add the residual and normalise."""
        linears = self.inference_linears(attention_output)
        if linears is None:
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        up, down = linears
        output = down(down.prepare(up(up.prepare(attention_output))))
        return self.output.LayerNorm(output + attention_output)


class OptimizedDistilNetwork(OptimizedModule):
    """DistilBERT's feed-forward network, with its activation fused into the up-projection."""

    lin1: nn.Linear
    lin2: nn.Linear
    dropout: nn.Module
    activation: Callable[[Tensor], Tensor]

    def replaced_linears(self) -> list[nn.Linear]:
        """Return the up-projection and the down-projection."""
        return [self.lin1, self.lin2]

    def bypassed_modules(self) -> list[nn.Module]:
        """Return the dropout behind them."""
        return [self.dropout]

    def build_linears(self) -> InferenceLinears:
        """Build the up-projection with its activation, and the down-projection."""
        up, down = self.replaced_linears()
        factors = smoothing_factors(self.peaks, up.weight)
        return (
            self.make_linear(up.weight, up.bias, self.activation, factors=factors),
            self.make_linear(down.weight, down.bias, follows=self.activation),
        )

    def ff_chunk(self, input: Tensor) -> Tensor:
        """Apply the network, `(batch, seq, hidden)` to the same."""
        linears = self.inference_linears(input)
        if linears is None:
            return super().ff_chunk(input)  # type: ignore[misc]
        up, down = linears
        return down(down.prepare(up(up.prepare(input))))


class OptimizedExperts(OptimizedModule):
    """Stacked experts that multiply slices of tokens sorted by expert."""

    prefers_slices = True
    has_gate: bool
    stacks: tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    activate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]

    def source_tensors(self, linears: list[nn.Linear]) -> list[Tensor | None]:
        """Return the stacked weights and biases."""
        return [tensor for stack in self.stacks for tensor in stack]

    def build_linears(self) -> InferenceLinears:
        """Build what comes before the activation in all experts, followed by all down-projections."""
        before, behind = (zip(w, [None] * len(w) if b is None else b, strict=True) for w, b in self.stacks)
        fused = None if self.has_gate else self.act_fn
        factors = smoothing_factors(self.peaks, self.stacks[0][0])  # of all experts, which share what they read
        return (
            *(self.make_linear(w, b, fused, factors=factors) for w, b in before),
            *(self.make_linear(w, b, follows=fused) for w, b in behind),
        )

    def run_sorted(self, slots: Tensor, counts: list[int]) -> Tensor:
        """Apply each expert to its slice, `(slots, hidden)`."""
        linears = self.inference_linears(slots)
        if linears is None:
            return super().run_sorted(slots, counts)  # type: ignore[misc]
        ups, downs = linears[: len(counts)], linears[len(counts) :]
        hidden = apply_to_slices(ups, ups[0].prepare(slots), counts)
        if self.has_gate:
            hidden = self.activate(hidden)
        return apply_to_slices(downs, downs[0].prepare(hidden), counts).to(slots.dtype)


class OptimizedLinear(OptimizedModule):
    """A linear layer of any architecture."""

    weight: Tensor
    bias: Tensor | None

    def source_tensors(self, linears: list[nn.Linear]) -> list[Tensor | None]:
        """Return weight and bias."""
        return [self.weight, self.bias]

    def build_linears(self) -> InferenceLinears:
        """Build the one replacement."""
        return (self.make_linear(self.weight, self.bias, factors=smoothing_factors(self.peaks, self.weight)),)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        linears = self.inference_linears(input)
        if linears is None:
            return super().forward(input)  # type: ignore[misc]
        (linear,) = linears
        return linear(linear.prepare(input)).to(input.dtype)


def apply_to_slices(linears: Sequence[InferenceLinear], prepared: Any, counts: list[int]) -> Tensor:
    """Apply each linear layer to its slice of rows; one without rows is not called.

    oneDNN compiles a product for every number of rows, which takes longer than a small product does, and slices have
    another number with every batch. So a layer also gets a few of its neighbours' rows, whose results are dropped.
    """
    start, total, outputs = 0, sum(counts), []
    for linear, count in zip(linears, counts, strict=True):
        if count:
            rows = min(round_up_rows(count), total)
            first = min(start, total - rows)
            outputs.append(linear(prepared.narrow(0, first, rows)).narrow(0, start - first, count))
        start += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def round_up_rows(count: int) -> int:
    """Round a number of rows up to one of 32 for each power of two; numbers below 64 stay."""
    step = 1 << max(count.bit_length() - 6, 0)
    return -(-count // step) * step
