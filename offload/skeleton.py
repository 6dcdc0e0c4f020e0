"""A transformers model without its weights: every parameter on the meta device, every buffer real.

Models come from transformers; nothing of an architecture is written here. Fused experts are taken apart
(`offload/experts.py`). Weights are assigned a layer at a time, by whoever walks the model.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from offload.checkpoint import CONFIG_NAME
from offload.errors import InputError
from offload.experts import make_plain
from offload.files import read_json


def read_config(directory: Path) -> PretrainedConfig:
    """Return the model's configuration without `quantization_config`, which is ours to act on, not transformers'.

    Raises InputError for an architecture that transformers does not know.
    """
    return config_of(read_json(directory / CONFIG_NAME), directory / CONFIG_NAME)


def config_of(values: dict[str, Any], path: Path) -> PretrainedConfig:
    """Return the configuration that values of a config.json describe; the error of `read_config` names `path`."""
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    model_type = values.pop("model_type", None)
    try:
        # JSON has no infinity: transformers writes {"__float__": "Infinity"}, which `for_model` does not read.
        return AutoConfig.for_model(model_type, **PretrainedConfig._decode_special_floats(values))
    except Exception as error:  # each family has its own ways to refuse a value
        raise InputError(
            f"{path}: transformers cannot build model_type {model_type!r} ({_reason(error)}); "
            "models that bring their own code are never run"
        ) from None


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model of `config` whose floating parameters would be `dtype`; nothing is allocated.

    Raises InputError if a value of the configuration is one that no model can be built with.
    """
    try:
        with init_empty_weights(include_buffers=False), _NothingDrawn():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        kind = type(config).__name__
        raise InputError(f"transformers cannot build a {kind} model ({_reason(error)}); check {CONFIG_NAME}") from None
    make_plain(model)
    model.requires_grad_(False)
    return model.eval()


class _NothingDrawn(TorchFunctionMode):
    """Leaves weights on the meta device alone that are to be drawn: torch would import its compiler to do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return a tensor on the meta device as it is from what would draw it, else call the function."""
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_):
            drawn: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if drawn.is_meta:
                return drawn
        return func(*args, **kwargs)


def _reason(error: Exception) -> str:
    """Say in one line of bounded length what transformers said in many."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder layers: the longest list of modules that holds linears.

    Lists within a list, of experts say, are parts of a layer. Raises InputError if the model has none.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():  # a list comes before what is in it
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer, _ in lists):
            continue
        if any(isinstance(inner, nn.Linear) for inner in module.modules()):
            lists.append((name, module))
    if not lists:
        raise InputError(f"{type(model).__name__}: no list of decoder layers was found in it")
    return max(lists, key=lambda item: len(item[1]))


def outer_names(model: nn.Module, prefix: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut the names of tensors outside the decoder layers into those before and those after them, none of them empty.

    prefix: of the layers' list. The order is that in which the model registers its parts.
    """
    order = [key for key, _ in model.named_parameters(remove_duplicate=False)]
    final = max(i for i, key in enumerate(order) if key.startswith(f"{prefix}."))
    last = [name for name in names if name in order and order.index(name) > final] or list(names[-1:])
    first = [name for name in names if name not in last] or last[:1]
    return first, [name for name in last if name not in first]


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of `module`, without copying it."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
