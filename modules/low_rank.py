"""Layers whose weight is a product of two narrow matrices: fewer parameters, fewer operations, a dense layer's place.

Sources: Khodak et al., "Initialization and Regularization of Factorized Neural Layers", 2021 (a factorised layer begins
as the truncated singular value decomposition of a dense one, the root of the singular values on either side); Wang et
al., "Cuttlefish: Low-Rank Model Training without All the Tuning", 2023 (stable ranks, convolutions as matrices).

State dict, frozen for good: where a dense layer has `weight` and `bias`, a factorised one has `u` (outputs, rank), `v`
(rank, inputs * kernel) and the same `bias`; `u @ v` is the weight, flattened behind its first axis.

Decisions that are not obvious:
* A convolution becomes one with *rank* outputs (same kernel, stride, dilation, padding) and a 1x1 convolution.
* The decomposition is made once, exactly, in float64 on the CPU, with a fixed sign, so that it is the same on every
  device and in every run.
* Only layers whose forward is known are replaced. `no_candidate` says why another one is not; nothing is passed over in
  silence.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modules.cpu_layers import Linear, PointwiseConv1d, linear, pointwise
from modules.spectrum import in_float64

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_AS_STOCK = (Linear, PointwiseConv1d)  # of modules/cpu_layers.py: their forward gives what the stock one does


class LowRankLayer(nn.Module):
    """What the two kinds share. *u*, *v*: as in the file's header. *dense*: the layer whose place this one takes.

    Of its weight only the shape is kept. The bias stays the dense layer's own parameter, and an optimiser its state.
    """

    bias: nn.Parameter | None

    def __init__(self, u: Tensor, v: Tensor, dense: nn.Module) -> None:
        super().__init__()
        trained = dense.get_parameter("weight").requires_grad
        self.u = nn.Parameter(u, requires_grad=trained)
        self.v = nn.Parameter(v, requires_grad=trained)
        self.register_parameter("bias", dense.get_parameter("bias") if dense.bias is not None else None)
        self._template = (copy.deepcopy(dense).to("meta"),)  # in a tuple: not a submodule
        self.train(dense.training)

    @property
    def dense(self) -> Any:
        """The dense layer without its values."""
        return self._template[0]

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    def weight_shape(self) -> torch.Size:
        """Of the weight that the factors stand for."""
        return self.dense.weight.shape

    def to_dense(self) -> nn.Module:
        """The dense layer with the weight u @ v. Its bias is the same parameter."""
        layer = copy.deepcopy(self.dense)
        weight = (in_float64(self.u) @ in_float64(self.v)).view(self.weight_shape())
        layer.weight = nn.Parameter(weight.to(self.u), requires_grad=self.u.requires_grad)
        layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, in the place of {self.dense}"


class LowRankLinear(LowRankLayer):
    """x -> x vᵀ uᵀ + bias. Shape: (…, inputs) -> (…, outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, linear(self, x, self.v), self.u, self.bias)


class LowRankConv(LowRankLayer):
    """A convolution with *rank* outputs, then a 1x1 convolution. Shape: (N, inputs, …) -> (N, outputs, …)."""

    def forward(self, x: Tensor) -> Tensor:
        front = _front_padding(self.dense)
        return self.convolve_padded(F.pad(x, front) if any(front) else x)

    def convolve_padded(self, x: Tensor) -> Tensor:
        """As forward, of what the dense layer's own forward has padded first."""
        dense, convolve = self.dense, _CONVOLUTIONS[_base(self.dense)]
        padding = dense.padding
        if dense.padding_mode != "zeros":
            x = F.pad(x, dense._reversed_padding_repeated_twice, mode=dense.padding_mode)
            padding = 0
        kernel = self.v.view(self.rank, *self.weight_shape()[1:])
        if isinstance(dense, PointwiseConv1d):
            x = pointwise(self, x, kernel)
        else:
            x = convolve(x, kernel, None, dense.stride, padding, dense.dilation)  # (N, rank, …)
        return pointwise(self, x, self.u.view(*self.u.shape, *([1] * (kernel.ndim - 2))), self.bias)


class Decomposition(NamedTuple):
    """weight = u[:, :r] * singular_values[:r] @ v[:r] for every rank r, in float64 on the CPU."""

    u: Tensor  # (outputs, K)
    singular_values: Tensor  # (K,), falling
    v: Tensor  # (K, inputs * kernel)


def decompose(weight: Tensor) -> Decomposition:
    """The exact singular value decomposition of a weight flattened behind its first axis; each vector's largest entry
    in u is positive, so that it is unique.
    """
    u, s, v = torch.linalg.svd(in_float64(weight).flatten(1), full_matrices=False)
    sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))  # (1, K)
    return Decomposition(u * sign, s, v * sign.mT)


def factorised(layer: nn.Module, rank: int) -> LowRankLayer:
    """The layer that takes the place of a dense one: u = U √S, v = √S V of the best approximation of that rank.

    The dense layer is left as it is; both share the bias.

    Raises ValueError for a layer that has no factorised form, and for a rank that is not from 1 to the weight's.
    """
    if reason := no_candidate(layer):
        raise ValueError(f"{type(layer).__name__} cannot be factorised: {reason}")
    weight: Any = layer.weight
    _check_rank(rank, weight)
    u, s, v = decompose(weight)
    root = s[:rank].sqrt()
    return _layer(u[:, :rank] * root, root[:, None] * v[:rank], layer)


def blank(layer: nn.Module, rank: int) -> LowRankLayer:
    """A factorised layer for a dense one's place whose factors are zero, with a bias of its own."""
    weight: Any = layer.weight
    u, v = weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight[0].numel())
    return copy.deepcopy(_layer(u, v, layer))


def _check_rank(rank: Any, weight: Tensor) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise ValueError(f"its rank is {rank!r:.100}, not a whole number")
    full = min(weight.flatten(1).shape)
    if not 1 <= rank <= full:
        raise ValueError(f"its rank is {rank!r:.100}, not from 1 to {full}")


def _layer(u: Tensor, v: Tensor, dense: nn.Module) -> LowRankLayer:
    weight: Any = dense.weight
    cls = LowRankLinear if isinstance(dense, nn.Linear) else LowRankConv
    return cls(u.to(weight).contiguous(), v.to(weight).contiguous(), dense)


class Resized(NamedTuple):
    """Factors of another rank: u' = u @ right, v' = left @ v, which is how the optimiser's state follows."""

    u: Tensor  # (outputs, rank')
    v: Tensor  # (rank', inputs * kernel)
    right: Tensor  # (rank, rank')
    left: Tensor  # (rank', rank)


def resized(u: Tensor, v: Tensor, rank: int) -> Resized:
    """Factors of a smaller rank with the best approximation of u @ v, in O((outputs + inputs) rank²).

    Columns of trained factors are not sorted, so leaving out the last ones is several times worse.
    In float64 on the CPU. Shape: u (outputs, r), v (r, inputs); *rank* from 1 to r.
    """
    q_u, r_u = torch.linalg.qr(in_float64(u))
    q_v, r_v = torch.linalg.qr(in_float64(v).mT)
    a, s, b = torch.linalg.svd(r_u @ r_v.mT)  # u v = q_u (a s b) q_vᵀ
    root = s[:rank].sqrt()
    a, b = a[:, :rank] * root, root[:, None] * b[:rank]
    # Least squares, since factors of a rank below their width have singular triangles.
    right = torch.linalg.lstsq(r_u, a, driver="gelsd").solution
    left = torch.linalg.lstsq(r_v, b.mT, driver="gelsd").solution.mT
    return Resized(q_u @ a, b @ q_v.mT, right, left)


# The module tree


def no_candidate(layer: nn.Module) -> str | None:
    """Why a layer that has a weight cannot be factorised; None: it can."""
    if isinstance(layer, LowRankLayer):
        return "is factorised already"
    if reason := _without_form(layer):
        return reason
    return None if layer.get_parameter("weight").requires_grad else "frozen"


def _without_form(layer: nn.Module) -> str | None:
    """Why there is no factorised layer for the place of a dense one."""
    if isinstance(layer, nn.RNNBase):
        return "recurrent: its matrices are not layers"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return "embedding: its rows are looked up, not multiplied"
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "not a linear layer or a convolution"
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return "its weight is computed from others"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups > 1:
        return f"convolution in {layer.groups} groups"
    if type(layer) not in (_base(layer), *_AS_STOCK) and not hasattr(layer, "front_padding"):
        return f"{type(layer).__name__} has a forward of its own"
    if layer.weight.shape[0] == 1 or layer.weight.shape[1] == 1:
        return "one input or output channel"
    return None


def _base(layer: nn.Module) -> Any:
    return next(base for base in (nn.Linear, *_CONVOLUTIONS) if isinstance(layer, base))


def _front_padding(layer: nn.Module) -> tuple[int, ...]:
    """Zeros that a convolution's own forward adds first, as F.pad takes them: our causal ones have this attribute."""
    return getattr(layer, "front_padding", ())


def layers_with_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a weight with more than one axis, or several, by name: all that could be asked for."""
    return {name: layer for name, layer in model.named_modules() if name and _matrices(layer)}


def _matrices(layer: nn.Module) -> list[nn.Parameter]:
    """Of the layer itself; those that a parametrisation holds are its layer's."""
    if isinstance(layer, parametrize.ParametrizationList):
        return []
    own = list(layer.parameters(recurse=False))
    if parametrize.is_parametrized(layer):
        own += layer.get_submodule("parametrizations").parameters()
    return [parameter for parameter in own if parameter.ndim >= 2]


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Names of layers whose weight stands in another place too -> that one; such layers cannot be replaced alone."""
    places: dict[int, list[str]] = {}
    for name, parent in model.named_modules():  # each once, whatever other names it has
        for child, layer in parent._modules.items():
            for parameter in _matrices(layer) if layer is not None else ():
                places.setdefault(id(parameter), []).append(f"{name}.{child}" if name else child)
    return {name: next(n for n in names if n != name) for names in places.values() if len(names) > 1 for name in names}


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put *layer* where the layer *name* stands, at the same place among its parent's children."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).register_module(child, layer)


def ranks(model: nn.Module) -> dict[str, int]:
    """The factorised layers of a model with their ranks."""
    return {name: layer.rank for name, layer in model.named_modules() if isinstance(layer, LowRankLayer)}


def restructure(model: nn.Module, wanted: dict[str, int]) -> None:
    """Give a model exactly the factorised layers *wanted* (name -> rank), for weights that are loaded next.

    Layers that change their form have no meaningful values afterwards.

    Raises ValueError for a name or a rank that the model cannot have; the model is then as it was.
    """
    layers: dict[Any, Any] = {**layers_with_matrices(model)}  # get_submodule would find private attributes too
    shared = shared_weights(model)
    for name, rank in wanted.items():
        if (layer := layers.get(name)) is None:
            raise ValueError(f"{name!r:.100}: no such layer")
        dense = layer.dense if isinstance(layer, LowRankLayer) else layer
        if reason := _without_form(dense) or (f"its weight is also that of {shared[name]}" if name in shared else None):
            raise ValueError(f"{name}: {reason}")
        try:
            _check_rank(rank, dense.weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, rank in ranks(model).items():
        if wanted.get(name) != rank:
            replace_layer(model, name, layers[name].to_dense())
    present = ranks(model)
    for name, rank in wanted.items():
        if name not in present:
            replace_layer(model, name, blank(model.get_submodule(name), rank))


def dense_state(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose factors are multiplied where *wanted*, that of a model, has a weight in their place."""
    taken = dict(state)
    for name in state:
        stem = name.removesuffix(".u")
        weight, u, v = f"{stem}.weight", f"{stem}.u", f"{stem}.v"
        if name != u or v not in state or u in wanted or weight not in wanted or wanted[weight].ndim < 2:
            continue
        left, right = state[u], state[v]
        if left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]:
            product = (in_float64(taken.pop(u)) @ in_float64(taken.pop(v))).to(left)
            shape = wanted[weight].shape
            taken[weight] = product.view(shape) if product.shape == wanted[weight].flatten(1).shape else product
    return taken


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with a weight in the place of each factorised layer's factors."""
    wanted = {
        f"{name}.weight": layer.dense.weight
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LowRankLayer)
    }
    return dense_state(model.state_dict(), wanted)


# What it costs


def num_parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters(recurse=False))


def break_even_rank(weight_shape: torch.Size | tuple[int, ...]) -> int:
    """The largest rank at which u and v have fewer numbers than the weight; 0 when there is none."""
    outputs, inputs = weight_shape[0], math.prod(weight_shape[1:])
    return (outputs * inputs - 1) // (outputs + inputs)


def multiply_adds(weight_shape: torch.Size | tuple[int, ...], rank: int | None = None) -> int:
    """Of the forward pass, for each position of the output (a row of a linear layer's, a pixel, a frame).

    *rank*: of a factorised layer; None: dense.
    """
    outputs, inputs = weight_shape[0], math.prod(weight_shape[1:])
    return outputs * inputs if rank is None else rank * (outputs + inputs)
