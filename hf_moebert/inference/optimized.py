"""The classes that modules have while they are optimised for inference: each looks for a faster way first.

Where there is none, in training, under a compiler, or with modules that somebody changed, they do what their original
class does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .caching import Derived
from .linears import LinearForm
from .unpadding import BEYOND, Sentences, attend, is_free


Forms = tuple[LinearForm, ...]


class Optimized:
    """What a module's class gains while it is optimised: forms of its linear layers, made anew when weights change."""

    training: bool
    make_linear: Callable[..., LinearForm]
    made_for: torch.device
    made: Derived[Forms]

    def linears(self) -> list[nn.Linear]:
        """Name the linear layers whose forms are used in their place."""
        return []

    def others(self) -> list[nn.Module]:
        """Name the other modules that are not called while forms are used."""
        return []

    def sources(self) -> list[Tensor | None]:
        """Name the tensors that the forms are made from."""
        return [tensor for linear in self.linears() for tensor in (linear.weight, linear.bias)]

    def make_forms(self) -> Forms:
        """Make the forms of the weights as they are now."""
        raise NotImplementedError

    def forms(self, x: Tensor) -> Forms | None:
        """Return the forms where they apply: in plain inference in float32, with modules nobody has wrapped or hooked.

        They are made again after a weight was trained, loaded, merged or moved.
        """
        if torch.is_grad_enabled() or self.training or x.dtype != torch.float32 or not x.numel():
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled(x.device.type):
            return None
        if not all(map(is_plain, self.linears())) or not all(map(is_untouched, self.others())):
            self.made.clear()
            return None
        sources = [source for source in self.sources() if source is not None]
        return self.made.get(sources, lambda: self.make_forms() if self.fits(x) else ()) or None

    def fits(self, x: Tensor) -> bool:
        """Whether weights and input are in float32, and where the model was optimised."""
        tensors = [x, *(source for source in self.sources() if source is not None)]
        return all(tensor.dtype == torch.float32 and tensor.device == self.made_for for tensor in tensors)


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is torch's own linear layer and nobody watches or changes it."""
    return type(linear) is nn.Linear and is_free(linear) and not (linear._forward_hooks or linear._forward_pre_hooks)


def is_untouched(module: nn.Module) -> bool:
    """Whether a module does in inference what its class does, and nobody watches or changes it."""
    return is_free(module) and not (module.training or module._forward_hooks or module._forward_pre_hooks)


class OptimizedAttention(Optimized):
    """BERT's attention: one product for queries, keys and values, and sentences without their padding."""

    self: Any  # the host's name for queries, keys and values
    output: Any

    def linears(self) -> list[nn.Linear]:
        """Queries, keys, values, and the output."""
        return [self.self.query, self.self.key, self.self.value, self.output.dense]

    def others(self) -> list[nn.Module]:
        """What is around them."""
        return [self.self.dropout, self.output, self.output.dropout]

    def make_forms(self) -> Forms:
        """One form for the three, and one for the output."""
        *three, output = self.linears()
        weight = torch.cat([linear.weight.detach() for linear in three])  # (3 * heads * head_size, hidden)
        biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in three]
        return self.make_linear(weight, torch.cat(biases)), self.make_linear(output.weight, output.bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        sentences: Sentences | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, add the residual and normalise; like the host's sdpa, without returning the weights of attention."""
        within = not args and all(kwargs.get(name) is None for name in BEYOND)
        forms = self.forms(hidden_states) if within and self.self.config._attn_implementation == "sdpa" else None
        if forms is not None:
            project, close = forms
            qkv = project(project.prepare(hidden_states))
            context = self.attend(qkv, attention_mask, sentences)
            return self.output.LayerNorm(close(close.prepare(context)) + hidden_states), None
        if sentences is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        three = (self.self.query, self.self.key, self.self.value)
        context = self.attend(torch.cat([linear(hidden_states) for linear in three], dim=-1), None, sentences)
        return self.output(context, hidden_states), None

    def attend(self, qkv: Tensor, mask: Tensor | None, sentences: Sentences | None) -> Tensor:
        """Split into heads and attend, `(batch, seq, 3 * heads * head_size)` to `(batch, seq, heads * head_size)`."""
        if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
            qkv = qkv.float()  # in which torch's attention takes less time
        qkv = qkv.unflatten(-1, (3, -1, self.self.attention_head_size))
        return attend(qkv, mask, sentences, scale=self.self.scaling)


class OptimizedFeedForward(Optimized):
    """BERT's layer, whose feed-forward network has its activation within the first product."""

    intermediate: Any
    output: Any

    def linears(self) -> list[nn.Linear]:
        """Up and down."""
        return [self.intermediate.dense, self.output.dense]

    def others(self) -> list[nn.Module]:
        """What is around them."""
        return [self.intermediate, self.output, self.output.dropout]

    def make_forms(self) -> Forms:
        """Up with its activation, and down."""
        up, down = self.linears()
        activation = self.intermediate.intermediate_act_fn
        return self.make_linear(up.weight, up.bias, activation), self.make_linear(down.weight, down.bias)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """Apply the network, add the residual and normalise."""
        forms = self.forms(attention_output)
        if forms is None:
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        up, down = forms
        output = down(down.prepare(up(up.prepare(attention_output))))
        return self.output.LayerNorm(output + attention_output)


class OptimizedExperts(Optimized):
    """Stacked experts that multiply slices of tokens sorted by expert."""

    prefers_slices = True
    up_proj: Tensor
    up_proj_bias: Tensor
    down_proj: Tensor
    down_proj_bias: Tensor
    act_fn: Callable[[Tensor], Tensor]

    def sources(self) -> list[Tensor | None]:
        """Name the stacks."""
        return [self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias]

    def make_forms(self) -> Forms:
        """All experts' ups, and then all their downs."""
        ups = [self.make_linear(w, b, self.act_fn) for w, b in zip(self.up_proj, self.up_proj_bias, strict=True)]
        downs = [self.make_linear(w, b) for w, b in zip(self.down_proj, self.down_proj_bias, strict=True)]
        return *ups, *downs

    def run_sorted(self, slots: Tensor, counts: list[int]) -> Tensor:
        """Apply each expert to its slice, `(slots, hidden)`."""
        forms = self.forms(slots)
        if forms is None:
            return super().run_sorted(slots, counts)  # type: ignore[misc]
        ups, downs = forms[: len(counts)], forms[len(counts) :]
        hidden = run_slices(ups, ups[0].prepare(slots), counts)
        return run_slices(downs, downs[0].prepare(hidden), counts).to(slots.dtype)


class OptimizedLinear(Optimized):
    """A linear layer of any architecture."""

    weight: Tensor
    bias: Tensor | None

    def sources(self) -> list[Tensor | None]:
        """Name weight and bias."""
        return [self.weight, self.bias]

    def make_forms(self) -> Forms:
        """One form."""
        return (self.make_linear(self.weight, self.bias),)

    def forward(self, input: Tensor) -> Tensor:
        """Map, `(..., in)` to `(..., out)`."""
        forms = self.forms(input)
        if forms is None:
            return super().forward(input)  # type: ignore[misc]
        return forms[0](forms[0].prepare(input)).to(input.dtype)


def run_slices(forms: Sequence[LinearForm], prepared: Any, counts: list[int]) -> Tensor:
    """Apply each form to its slice of rows; one that has none is not called.

    oneDNN compiles a product for every number of rows, which takes longer than a small product does, and slices have
    another number with every batch. So a form gets a few of its neighbours' rows too, and their results are dropped.
    """
    start, total, outputs = 0, sum(counts), []
    for form, count in zip(forms, counts, strict=True):
        if count:
            rows = min(round_up(count), total)
            first = min(start, total - rows)
            outputs.append(form(prepared.narrow(0, first, rows)).narrow(0, start - first, count))
        start += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def round_up(count: int) -> int:
    """Round a number of rows up to one of 32 for each power of two; those below 64 stay."""
    step = 1 << max(count.bit_length() - 6, 0)
    return -(-count // step) * step
