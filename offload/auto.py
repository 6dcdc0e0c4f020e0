"""`AutoModelForCausalLM.from_pretrained` on our checkpoints, once `offload` has been imported.

transformers' registry of quantizers replaces modules, but every weight is then read and stays: nothing in it returns a
model whose layers come and go. So the one class method is wrapped: a directory with our manifest goes to
`offload.load`, everything else where it went before. Nothing is imported for that: the wrapping waits until
transformers imports the class.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from offload.import_hooks import around_import

_MODULE = "transformers.models.auto.modeling_auto"
_OURS = ("device_map", "max_memory", "dtype", "torch_dtype")
_WITHOUT_EFFECT = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "use_auth_token"),
    *("low_cpu_mem_usage", "offload_buffers", "offload_folder", "offload_state_dict"),
    *("trust_remote_code", "use_safetensors", "weights_only"),
)
"""Options that ask for nothing that could differ on a complete directory which is streamed."""


def register() -> None:
    """Have `AutoModelForCausalLM.from_pretrained` know our checkpoints, now or when transformers is imported."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _wrap(module)
    else:
        around_import(_MODULE, _wrapped)


@contextmanager
def _wrapped(module: ModuleType) -> Iterator[None]:
    yield
    _wrap(module)


def _wrap(module: Any) -> None:
    auto = module.AutoModelForCausalLM
    original = auto.from_pretrained.__func__
    if hasattr(original, "__wrapped__") and original.__module__ == __name__:
        return

    @wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        chosen = options.get("quantization_config") is not None  # by whom the weights are to be read
        if cls is auto and not arguments and not chosen and _is_ours(pretrained_model_name_or_path):
            return _load(Path(pretrained_model_name_or_path), options)
        return original(cls, pretrained_model_name_or_path, *arguments, **options)

    from_pretrained.__module__ = __name__
    auto.from_pretrained = classmethod(from_pretrained)


def _is_ours(name: Any) -> bool:
    from offload.checkpoint import CONFIG_NAME, MANIFEST_NAME

    return isinstance(name, str | Path) and all((Path(name) / file).is_file() for file in (MANIFEST_NAME, CONFIG_NAME))


def _load(directory: Path, options: Mapping[str, Any]) -> Any:
    """Return the streamed model. Raises UsageError for options it cannot honour, and what `offload.load` raises."""
    import torch

    from offload.errors import UsageError
    from offload.executor import load

    foreign = {name for name, value in options.items() if value is not None} - {*_OURS, *_WITHOUT_EFFECT}
    if foreign:
        raise UsageError(
            f"from_pretrained of {directory}: {', '.join(sorted(foreign))} cannot be had of a streamed model; leave it "
            "out, or load in a process that does not import offload"
        )
    dtype = options.get("dtype") or options.get("torch_dtype")
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype, dtype)
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise UsageError(f"dtype {dtype!r}: expected 'auto' or a floating dtype of torch")
    return load(directory, dtype=dtype, device_map=options.get("device_map"), max_memory=options.get("max_memory"))
