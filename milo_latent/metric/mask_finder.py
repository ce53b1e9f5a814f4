"""The mask finder of MILO: five convolutions, shared by all levels, and their gradient written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.checks import autocast_is_on


class MaskFinder(nn.Sequential):
    """3x3 convolutions, ReLU between and a sigmoid at the end, from one level of both inputs and the mask so far.

    Args:
        channels: C of `ref` and `dist`.
        widths: of the hidden layers.

    Source: `netBasic` of the official network.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise((2 * channels + 1, *widths)):
            layers += [nn.Conv2d(width_in, width_out, 3, padding=1), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1), nn.Sigmoid())
        self.channels = channels

    def prepare(self, *, shared_ref: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Prepare the parameters once for all levels.

        Args:
            shared_ref: whether one reference serves all items, so that its share of the first layer is computed once.

        Returns:
            A function of `dist`, `ref` and `mask` at one level, (B, C, h, w), (B or 1, C, h, w) and (B, 1, h, w), to
            the visibility at that level, (B, 1, h, w), in (0, 1).
        """
        convolutions = [layer for layer in self if isinstance(layer, nn.Conv2d)]
        weights = [convolution.weight for convolution in convolutions]
        of_dist, of_ref, of_mask = weights[0].split([self.channels, self.channels, 1], dim=1)
        if shared_ref:
            weights[0] = torch.cat([of_dist, of_mask], dim=1)
        trained = any(parameter.requires_grad for parameter in self.parameters())
        # transposing anew at each call costs 0.1 ms; kept weights would be wrong after a change through `.data`
        needed = torch.is_grad_enabled() and not trained and not torch.compiler.is_compiling()
        transposed = [_transposed(convolution.weight.detach()) for convolution in convolutions[1:]] if needed else []
        layers = _Layers(weights, [convolution.bias for convolution in convolutions], transposed)

        def find(dist: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
            if shared_ref:
                return _find(layers, [dist, mask], F.conv2d(ref, of_ref, padding=1))
            return _find(layers, [dist, ref, mask], None)

        return find


@dataclass(frozen=True)
class _Layers:
    weights: list[Tensor]  # (out, in, 3, 3) each
    biases: list[Tensor | None]
    transposed: list[Tensor]  # (in, out, 3, 3) of all but the first; empty where the gradient is left to autograd


def _find(layers: _Layers, inputs: list[Tensor], features: Tensor | None) -> Tensor:
    """Return the visibility; `features`, (1, widths[0], h, w), are added to the first layer's output."""
    differentiated = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*inputs, features) if tensor is not None
    )
    left_to_autograd = torch.compiler.is_compiling() or autocast_is_on(inputs[0]) or is_transforming()
    if differentiated and layers.transposed and not left_to_autograd:
        return _FrozenFind.apply(layers, features, *inputs)
    return _outputs(layers, features, inputs)[-1]


def is_transforming() -> bool:
    """Return whether this runs inside a transformation of `torch.func`, such as `grad`, `jvp` or `vmap`."""
    return torch._C._are_functorch_transforms_active()


def _outputs(layers: _Layers, features: Tensor | None, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output of every layer, hidden ones after ReLU, the last after the sigmoid."""
    hidden, outputs = torch.cat(inputs, dim=1), []
    last = len(layers.weights) - 1
    for index, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        hidden = F.conv2d(hidden, weight, bias, padding=1)
        if index == 0 and features is not None:
            hidden = hidden + features
        hidden = hidden.sigmoid_() if index == last else hidden.relu_()
        outputs.append(hidden)
    return outputs


class _FrozenFind(torch.autograd.Function):
    """Frozen layers, whose gradient goes to the inputs only.

    For the gradients of the weights, autograd would keep every layer's input. Where the weights are frozen, the signs
    of the outputs are enough. The gradient of a convolution is a convolution with the transposed, flipped weights and
    runs at the speed of the forward pass. Channels of the first layer whose gradient nobody needs are left out.
    """

    @staticmethod
    def forward(ctx: Any, layers: _Layers, features: Tensor | None, *inputs: Tensor) -> Tensor:
        outputs = _outputs(layers, features, list(inputs))
        ctx.layers, ctx.has_features = layers, features is not None
        ctx.save_for_backward(*outputs, *inputs, *([features] if features is not None else []))
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, count = ctx.layers, len(ctx.layers.weights)
        outputs, rest = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        inputs, features = (rest[:-1], rest[-1]) if ctx.has_features else (rest, None)
        if torch.is_grad_enabled() or is_transforming():  # autograd computes second derivatives
            return _differentiable_gradients(ctx, layers, inputs, features, grad)
        needed = ctx.needs_input_grad[2:]
        grad = torch.ops.aten.sigmoid_backward(grad, outputs[-1])
        for index in range(count - 1, 0, -1):
            grad = F.conv2d(grad, layers.transposed[index - 1], padding=1)
            grad = _relu_backward(grad, outputs[index - 1])
        grad_features = grad.sum(dim=0, keepdim=True) if ctx.needs_input_grad[1] else None
        widths = [tensor.shape[1] for tensor in inputs]
        chosen = [part for part, need in zip(layers.weights[0].split(widths, dim=1), needed, strict=True) if need]
        if not chosen:
            return None, grad_features, *(None for _ in inputs)
        grad = F.conv2d(grad, _transposed(torch.cat(chosen, dim=1)), padding=1)
        parts = iter(grad.split([width for width, need in zip(widths, needed, strict=True) if need], dim=1))
        return None, grad_features, *(next(parts) if need else None for need in needed)


def _relu_backward(grad: Tensor, output: Tensor) -> Tensor:
    if torch._C._functorch.is_legacy_batchedtensor(grad):  # made by `is_grads_batched`; it refuses work in place
        return grad * (output > 0)
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


def _transposed(weight: Tensor) -> Tensor:
    """Return the weights, (in, out, 3, 3), of the convolution that computes the gradient of one with `weight`."""
    return weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)


def _differentiable_gradients(
    ctx: Any, layers: _Layers, inputs: tuple[Tensor, ...], features: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    arguments = [features, *inputs]
    wanted = [
        tensor for tensor, need in zip(arguments, ctx.needs_input_grad[1:], strict=True) if tensor is not None and need
    ]
    gradients = iter(torch.autograd.grad(_outputs(layers, features, list(inputs))[-1], wanted, grad, create_graph=True))
    return None, *(next(gradients) if need else None for need in ctx.needs_input_grad[1:])
