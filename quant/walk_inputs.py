"""What the decoder layers are called with during calibration, from the model's own code around them.

Axes: S samples, T tokens, D hidden, B samples of a batch.
"""

import inspect
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from offload.skeleton import assign, decoder_layers
from offload.source_weights import SourceWeights
from quant.hidden_states import HiddenStates, fill, new_states
from quant.layer import LayerInputs

HELD_OUT_SHARE = 8
"""One in so many samples, the last ones, is what a layer is judged by and no method sees."""

_BATCH_SAMPLES, _BATCH_TOKENS = 4, 512
"""Samples and tokens at most that go through a layer at once, enough for products to run at their full speed. Not a
matter of the budget: another batch sums in another order, and bytes would depend on how much memory there
was."""


@dataclass(frozen=True, slots=True)
class WalkInputs:
    """The inputs of the layer the walk stands at, and the arguments that each later layer will be called with.

    spill_to: a directory for the hidden states, which are kept in memory without one.
    """

    at_layer: LayerInputs
    arguments_by_layer: tuple[dict[str, Any], ...]

    spill_to: Path | None = None

    def original_outputs(self, layer: nn.Module) -> HiddenStates:
        """Run `layer`, as yet unquantized, on what the unquantized model would give it; keep what comes out."""
        inputs = self.at_layer.original()
        first_BTD = next(iter(inputs.hidden_STD.split(1)))
        return fill(new_states(len(inputs.hidden_STD), first_BTD, self.spill_to), inputs.outputs(layer))

    def towards(self, target_STD: HiddenStates) -> "WalkInputs":
        """Return the same inputs with what the unquantized layer makes of what it is given, for all samples."""
        return replace(self, at_layer=replace(self.at_layer, target_STD=target_STD))

    def following(
        self, layer: nn.Module, index: int, original_STD: HiddenStates | None, held_out_STD: HiddenStates | None = None
    ) -> "WalkInputs":
        """Run `layer` and return the inputs of layer `index`, which comes after it, beside the unquantized model's.

        These inputs are overwritten. held_out_STD: what the layer makes of the held-out samples, where that is known;
        they run apart from the others, in the batches that they were judged in, and it changes no bit.
        """
        arguments = self.arguments_by_layer[index]
        fit, held_out = self.at_layer.split_held_out(HELD_OUT_SHARE)
        known = held_out.outputs(layer) if held_out_STD is None else held_out_STD.split(held_out.batch_samples)
        alone = len(self.at_layer.hidden_STD) == 1
        hidden_STD = fill(self.at_layer.hidden_STD, known if alone else chain(fit.outputs(layer), known))
        inputs = LayerInputs(hidden_STD, arguments, batch_samples(arguments, hidden_STD.shape[-2]), original_STD)
        return replace(self, at_layer=replace(inputs, pass_dtype=self.at_layer.pass_dtype))


def first_inputs(
    model: PreTrainedModel,
    source: SourceWeights,
    windows: Tensor,
    spill_to: Path | None = None,
    pass_dtype: torch.dtype = torch.float32,
) -> WalkInputs:
    """Run everything before the decoder layers on windows [S, T] and return what the layers would be called with.

    The tensors needed for that, embeddings mostly, are read for this call and dropped again.
    """
    prefix, layers = decoder_layers(model)
    parent_name, _, list_name = prefix.rpartition(".")
    base_name = model.base_model_prefix if model.base_model is not model else ""
    parent, base = model.get_submodule(parent_name), model.get_submodule(base_name)
    around = {
        name: state
        for name, state in model.state_dict().items()
        if name.startswith(base_name) and not name.startswith(f"{prefix}.")
    }
    for name in around:
        assign(model, name, source.read_as_float(name))
    recorders = [_Recorder(layer) for layer in layers]
    parent._modules[list_name] = nn.ModuleList(recorders)
    try:
        _find_out_what_layers_return(base, recorders, windows[:1])
        states = new_states(len(windows), recorders[0].hidden_BTD, spill_to)
        fill(states, (_recorded(base, recorders, window_T[None]) for window_T in windows))
    finally:
        parent._modules[list_name] = layers
    for name, state in around.items():
        assign(model, name, state)
    arguments = tuple(recorder.arguments for recorder in recorders)
    at_first = LayerInputs(states, arguments[0], batch_samples(arguments[0], windows.shape[1]), pass_dtype=pass_dtype)
    return WalkInputs(at_first, arguments, spill_to)


def _recorded(base: nn.Module, recorders: list["_Recorder"], input_ids: Tensor) -> Tensor:
    """Run the model around the recorders and return what the first layer would be called with."""
    base(input_ids=input_ids, use_cache=False)
    return recorders[0].hidden_BTD


def _find_out_what_layers_return(base: nn.Module, recorders: list["_Recorder"], input_ids: Tensor) -> None:
    """Let the recorders return a tuple if the model takes the first of what a layer returns: the next one shows it."""
    try:
        _recorded(base, recorders, input_ids)
        fits = all(recorder.hidden_BTD.shape == recorders[0].hidden_BTD.shape for recorder in recorders)
    except Exception:  # a hidden state that lost an axis can fail anywhere
        fits = False
    if not fits:
        for recorder in recorders:
            recorder.returns_tuple = True
        _recorded(base, recorders, input_ids)


def most_batch_samples(tokens: int) -> int:
    """Return how many samples of `tokens` tokens go through a layer at once, at least one."""
    return max(1, min(_BATCH_SAMPLES, _BATCH_TOKENS // tokens))


def batch_samples(arguments: dict[str, Any], tokens: int) -> int:
    """Return how many samples of `tokens` tokens may go through a layer at once with the arguments of a call for one.

    A tensor of several axes whose first is not 1 is not one for every sample, the biases of BLOOM's heads say: it would
    have to be repeated, and how is not to be seen from here.
    """
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    shared = all(tensor.dim() < 2 or len(tensor) == 1 for tensor in tensors)
    return most_batch_samples(tokens) if shared else 1


class _Recorder(nn.Module):
    """Stands where a decoder layer was, passes hidden states on, and remembers how the layer would have been called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.hidden_BTD, self.returns_tuple = torch.empty(0), False
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Answer for the layer where the model asks for an attribute of it, its kind of attention say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Record the call by the names of the layer's own signature; the hidden states are its first argument."""
        bound = inspect.signature(type(self.layer).forward).bind(self.layer, *args, **kwargs)
        named = {key: value for key, value in bound.arguments.items() if key != "kwargs"}
        named |= bound.arguments.get("kwargs", {})
        _, first, *_ = named
        hidden_BTD: Tensor = named.pop("hidden_states" if "hidden_states" in named else first)
        self.hidden_BTD, self.arguments = hidden_BTD, {key: value for key, value in named.items() if key != "self"}
        return (hidden_BTD,) if self.returns_tuple else hidden_BTD
