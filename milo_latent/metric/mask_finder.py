"""The mask finder of MILO: five convolutions, shared by all levels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.checks import autocast_is_on


class MaskFinder(nn.Sequential):
    """3x3 convolutions with ReLU between and a sigmoid after, which see one level of both inputs and the mask so far.

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

    def ref_features(self, ref: Tensor) -> Tensor:
        """Return the share of `ref`, (1, C, h, w), in the first layer, (1, widths[0], h, w)."""
        return F.conv2d(ref, self._convolutions[0].weight[:, self.channels : 2 * self.channels], padding=1)

    def layers(self, *, without_ref: bool) -> _Layers:
        """Return what `find` needs of the parameters; made once for all levels.

        Args:
            without_ref: whether the share of `ref` is given as features, and not as an input.
        """
        convolutions = self._convolutions
        weights = [convolution.weight for convolution in convolutions]
        if without_ref:
            first, channels = weights[0], self.channels
            weights[0] = torch.cat([first[:, :channels], first[:, 2 * channels :]], dim=1)
        trained = any(parameter.requires_grad for parameter in self.parameters())
        # made anew each time, which costs 0.1 ms: what is kept would be wrong after a change through `.data`
        needed = torch.is_grad_enabled() and not trained and not torch.compiler.is_compiling()
        transposed = [_transposed(convolution.weight.detach()) for convolution in convolutions[1:]] if needed else []
        return _Layers(weights, [convolution.bias for convolution in convolutions], transposed)

    def find(self, layers: _Layers, inputs: list[Tensor], features: Tensor | None = None) -> Tensor:
        """Find what is visible at one level.

        Args:
            layers: from `layers`.
            inputs: [dist, ref, mask], (B, C, h, w) and (B, 1, h, w), or [dist, mask] where `features` stand for `ref`.
            features: from `ref_features`, (1, widths[0], h, w).

        Returns:
            Visibility of the level, (B, 1, h, w), in (0, 1).
        """
        followed = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*inputs, features) if tensor is not None
        )
        # autograd's own then
        plain = torch.compiler.is_compiling() or autocast_is_on(inputs[0]) or is_transforming()
        if followed and layers.transposed and not plain:
            return _FrozenFind.apply(layers, features, *inputs)
        return _find(layers, features, inputs)[-1]

    @property
    def _convolutions(self) -> list[nn.Conv2d]:
        return [layer for layer in self if isinstance(layer, nn.Conv2d)]


@dataclass(frozen=True)
class _Layers:
    weights: list[Tensor]  # (out, in, 3, 3) each
    biases: list[Tensor | None]
    transposed: list[Tensor]  # (in, out, 3, 3) of all but the first; empty where nobody needs them


def is_transforming() -> bool:
    """Return whether this runs inside a transformation of `torch.func`, such as `grad`, `jvp` or `vmap`."""
    return torch._C._are_functorch_transforms_active()


def _find(layers: _Layers, features: Tensor | None, inputs: list[Tensor]) -> list[Tensor]:
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
    """The same, with gradients to the inputs only.

    Autograd would keep every layer's input, and look at it again for the weights; where these are frozen, the signs of
    the outputs are enough. The gradient of a convolution is one with the transposed, flipped weights, which runs at the
    speed of the forward pass; channels of the first layer whose gradient nobody needs are left out.
    """

    @staticmethod
    def forward(ctx: Any, layers: _Layers, features: Tensor | None, *inputs: Tensor) -> Tensor:
        outputs = _find(layers, features, list(inputs))
        ctx.layers, ctx.has_features = layers, features is not None
        ctx.save_for_backward(*outputs, *inputs, *([features] if features is not None else []))
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, count = ctx.layers, len(ctx.layers.weights)
        outputs, rest = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        inputs, features = (rest[:-1], rest[-1]) if ctx.has_features else (rest, None)
        if torch.is_grad_enabled() or is_transforming():  # second derivatives were asked for: leave them to autograd
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
    if torch._C._functorch.is_legacy_batchedtensor(grad):  # of `is_grads_batched`, which cannot work in place
        return grad * (output > 0)
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


def _transposed(weight: Tensor) -> Tensor:
    """Return the weights of the convolution that is the gradient of the one with `weight`, (in, out, 3, 3)."""
    return weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)


def _differentiable_gradients(
    ctx: Any, layers: _Layers, inputs: tuple[Tensor, ...], features: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    arguments = [features, *inputs]
    wanted = [
        tensor for tensor, need in zip(arguments, ctx.needs_input_grad[1:], strict=True) if tensor is not None and need
    ]
    gradients = iter(torch.autograd.grad(_find(layers, features, list(inputs))[-1], wanted, grad, create_graph=True))
    return None, *(next(gradients) if need else None for need in ctx.needs_input_grad[1:])
