"""What a user may ask of where a model lives, in the words of the field: accelerate's, FlexGen's, vLLM's, llama.cpp's.

All of them become one `Wishes`; two that cannot both be meant are refused with both names.
"""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, cast

from offload.command import format_bytes, parse_bytes
from offload.errors import ResourceError, UsageError

Device = Literal["gpu", "cpu", "disk"]
DeviceMap = str | int | Mapping[str, str | int]
Size = int | str
KVFormat = Literal["int8"]

_WHOLE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_GPU_SHARES = ("n_gpu_layers", "gpu_weights_percent", "cpu_offload_gb")


class WishWords(TypedDict, total=False):
    """Keywords of `offload.load` that decide what lives where; None stands for a wish that was not made.

    cpu_memory: budget of the whole process, bytes or "8GiB". gpu_memory: budget on the GPU. max_memory: both of them as
    in accelerate, {"cpu": "60GiB", 0: "10GiB"}; one without a GPU leaves it out. device_map: "auto", "balanced",
    "balanced_low_0" (one GPU: all three spread what is kept between what is streamed), "sequential" (keep the first
    layers), or modules and their devices. gpu_weights_percent: share of the layers on the GPU (FlexGen).
    cpu_offload_gb: GiB of layers to leave in host memory (vLLM), 0 for none where there is a GPU. n_gpu_layers: layers
    on the GPU, -1 for all (llama.cpp). slots: of the ring that disk is read into.
    kv: "int8" for keys and values in 8 bits, else they are of the model's dtype. kv_memory: of those in 8 bits, what
    may lie in memory, the rest on disk, or of layers that a GPU computes what may lie there, the rest in host memory; 0
    for as little as can be. cache_implementation: both in transformers' words,
    "dynamic" for the model's dtype, "quantized" for 8 bits, "offloaded" for these with a kv_memory of 0.
    """

    cpu_memory: Size | None
    gpu_memory: Size | None
    max_memory: Mapping[int | str, Size] | None
    device_map: DeviceMap | None
    gpu_weights_percent: float | None
    cpu_offload_gb: float | None
    n_gpu_layers: int | None
    slots: int | None
    kv: str | None
    kv_memory: Size | None
    cache_implementation: str | None


@dataclass(frozen=True, slots=True)
class Wishes:
    """The same wishes, checked against each other.

    cpu_bytes, gpu_bytes: budgets, None for no limit and for no GPU. sequential: keep the first layers instead of
    spreading what is kept. devices: of modules by their name, None to choose; layers: the same of every decoder layer,
    once the model is known. gpu_layers, gpu_percent, cpu_offload_bytes: how much of the layers is to lie on the GPU or
    beside it; at most one of the three is not None. slots: of the ring that disk is read into, None to choose. kv: of
    keys and values, None for the model's dtype. kv_bytes: of them at hand, None for all; with a kv alone.
    """

    cpu_bytes: int | None = None
    gpu_bytes: int | None = None
    sequential: bool = False
    devices: tuple[tuple[str, Device], ...] | None = None
    gpu_layers: int | None = None
    gpu_percent: float | None = None
    cpu_offload_bytes: int | None = None
    slots: int | None = None
    layers: tuple[Device, ...] | None = None
    kv: KVFormat | None = None
    kv_bytes: int | None = None
    anywhere: bool = False

    @classmethod
    def of(cls, words: WishWords) -> "Wishes":
        """Check and combine. Raises UsageError naming the words that are wrong or contradict each other."""
        made: dict[str, Any] = {word: value for word, value in words.items() if value is not None}
        sizes = _budgets(made)
        device_map = made.get("device_map")
        devices = None
        if device_map is not None and device_map not in _WHOLE_MAPS:
            devices = _devices(device_map)
        shares = [word for word in _GPU_SHARES if word in made]
        if len(shares) > 1:
            raise _contradiction(shares[0], shares[1], "each of them says how many layers are on the GPU")
        if devices is not None and shares:
            raise _contradiction("device_map", shares[0], "both say which layers are on the GPU")
        if devices is not None and "gpu" in sizes and "gpu" not in dict(devices).values():
            raise _contradiction("device_map", "gpu_memory", "no module of the map is on the GPU")
        kv, kv_bytes = _kept(made)
        return cls(
            sizes.get("cpu"),
            sizes.get("gpu"),
            device_map == "sequential",
            devices,
            _bounded(made, "n_gpu_layers", -1, None, whole=True),
            _bounded(made, "gpu_weights_percent", 0, 100),
            _in_bytes(_bounded(made, "cpu_offload_gb", 0, None)),
            _bounded(made, "slots", 1, 3, whole=True),
            kv=kv,
            kv_bytes=kv_bytes,
            anywhere=_lets_a_gpu_be_used(made, "gpu" in sizes),
        )

    def within(self, device_bytes: int) -> "Wishes":
        """Return the wishes with a budget on a GPU of so many bytes. Raises ResourceError if it was to be larger."""
        if self.gpu_bytes is not None and self.gpu_bytes > device_bytes:
            raise ResourceError(
                f"{flag('gpu_memory')} {format_bytes(self.gpu_bytes)}: the GPU has {format_bytes(device_bytes)}"
            )
        return replace(self, gpu_bytes=self.gpu_bytes or device_bytes)

    def with_less(self, device_bytes: int, device_layers: int) -> "Wishes":
        """Return the wishes with a smaller budget on the GPU, and without numbers of layers that are to be there.

        device_layers: of a map, those that keep their place there; the others are in host memory.
        """
        layers, left = list(self.layers or ()), device_layers
        for at, device in enumerate(layers):
            if device == "gpu":
                left -= 1
                layers[at] = "gpu" if left >= 0 else "cpu"
        return replace(
            self,
            gpu_bytes=device_bytes,
            gpu_layers=None,
            gpu_percent=None,
            cpu_offload_bytes=None,
            layers=None if self.layers is None else tuple(layers),
        )

    def on(self, modules: Collection[str], layers: Sequence[str]) -> "Wishes":
        """Return the wishes with the device of each decoder layer, out of a device map.

        modules: names of all modules of the model, layers: those of its decoder layers. Raises UsageError unless the
        map places every layer as a whole, names modules that exist, and leaves what is no layer in memory.
        """
        if self.devices is None:
            return self
        placed = dict(self.devices)
        for name, device in placed.items():
            inside = [layer for layer in layers if name.startswith(f"{layer}.")]
            around = [layer for layer in layers if name in ("", layer) or layer.startswith(f"{name}.")]
            if name and name not in modules:
                raise UsageError(f"{flag('device_map')}: no module {name!r} in this model; its layers: {_some(layers)}")
            if inside:
                raise UsageError(f"{flag('device_map')}: {name!r}: a layer is placed as a whole; name {inside[0]!r}")
            if not around and device == "disk":
                raise UsageError(f"{flag('device_map')}: {name!r} cannot be on disk; only decoder layers can")
        found = [_placed(layer, placed) for layer in layers]
        missing = [layer for layer, device in zip(layers, found, strict=True) if device is None]
        if missing:
            raise UsageError(f"{flag('device_map')}: no device for {_some(missing)}")
        return replace(self, layers=tuple(device for device in found if device is not None))

    @property
    def gpu_word(self) -> str | None:
        """The first wish that only a GPU could grant, as it was spelled, or None."""
        if self.gpu_bytes is not None:
            return f"gpu_memory {format_bytes(self.gpu_bytes)}"
        if self.devices is not None and "gpu" in dict(self.devices).values():
            return "device_map"
        if self.gpu_layers:
            return f"n_gpu_layers {self.gpu_layers}"
        if self.gpu_percent:
            return f"gpu_weights_percent {self.gpu_percent:g}"
        return f"cpu_offload_gb {self.cpu_offload_bytes / (1 << 30):g}" if self.cpu_offload_bytes else None


def add_wish_flags(parser: argparse.ArgumentParser) -> None:
    """Give a command the flags of every word in WishWords."""
    add = parser.add_argument_group("placement").add_argument
    add("--cpu-memory", help='budget for the whole process, such as "540MiB"; default: no limit', metavar="SIZE")
    add("--gpu-memory", help="budget on the GPU", metavar="SIZE")
    add("--max-memory", metavar="DEVICE=SIZE,...", help='both, as in accelerate: "0=10GiB,cpu=60GiB"')
    add("--device-map", metavar="MAP", help="auto, balanced, balanced_low_0, sequential, a device, or a JSON object")
    add("--gpu-weights-percent", type=float, metavar="PERCENT", help="share of the layers on the GPU, as in FlexGen")
    add("--cpu-offload-gb", type=float, metavar="GIB", help="GiB of layers to leave in host memory, as in vLLM")
    add("--n-gpu-layers", type=int, metavar="N", help="layers on the GPU, -1 for all, as in llama.cpp")
    add("--slots", type=int, metavar="N", help="of the ring that disk is read into, 1 to 3; default: as planned")
    add("--kv", metavar="FORMAT", help="int8: keys and values in half of their bytes; default: the model's dtype")
    add(
        "--kv-memory",
        metavar="SIZE",
        help="of keys and values in int8, what may lie in memory, the rest on disk; with a GPU, what may lie there, "
        "the rest in memory",
    )
    add("--cache-implementation", metavar="KIND", help="the same in transformers' words: dynamic, quantized, offloaded")


def words_of(options: argparse.Namespace) -> WishWords:
    """Read the flags of `add_wish_flags`. Raises UsageError if one cannot be read."""
    words: dict[str, Any] = {word: getattr(options, word) for word in WishWords.__annotations__}
    if options.max_memory is not None:
        words["max_memory"] = _parse_max_memory(options.max_memory)
    if options.device_map is not None and options.device_map.lstrip().startswith("{"):
        try:
            words["device_map"] = json.loads(options.device_map)
        except ValueError as error:
            raise UsageError(f"--device-map {options.device_map!r}: not valid JSON ({error})") from None
    return cast(WishWords, words)


def flag(word: str) -> str:
    """Return the flag of a word: "--cpu-memory" for "cpu_memory"."""
    return f"--{word.replace('_', '-')}"


def _parse_max_memory(text: str) -> dict[int | str, Size]:
    entries = [part.partition("=") for part in text.split(",")]
    if not all(equals and device.strip() and size.strip() for device, equals, size in entries):
        raise UsageError(f'--max-memory {text!r}: expected devices and sizes, such as "0=10GiB,cpu=60GiB"')
    devices = [device.strip() for device, _, _ in entries]
    if len(set(devices)) < len(devices):
        raise UsageError(f"--max-memory {text!r}: a device stands twice")
    return {
        int(device) if device.isdigit() else device: size for device, (_, _, size) in zip(devices, entries, strict=True)
    }


def _budgets(made: dict[str, Any]) -> dict[Device, int]:
    sizes: dict[Device, int] = {}
    for device, word in (("cpu", "cpu_memory"), ("gpu", "gpu_memory")):
        if word in made:
            sizes[cast(Device, device)] = _size(made[word], flag(word))
    if not isinstance(made.get("max_memory", {}), Mapping):
        raise UsageError(f'{flag("max_memory")}: expected devices and sizes, such as {{"cpu": "60GiB", 0: "10GiB"}}')
    for key, value in made.get("max_memory", {}).items():
        device = _device(key, "max_memory")
        if device == "disk":
            raise UsageError(f"{flag('max_memory')}: disk has no budget; it holds what fits nowhere else")
        if device in sizes:
            raise _contradiction(f"{device}_memory", "max_memory", f"both are a budget for the {device.upper()}")
        sizes[device] = _size(value, f"{flag('max_memory')} {key}")
    return sizes


def _lets_a_gpu_be_used(made: dict[str, Any], has_budget: bool) -> bool:
    """Whether a GPU is taken where there is one, and missed by nobody where there is none."""
    if "max_memory" in made and not has_budget:  # accelerate uses the devices that are named
        return False
    return made.get("device_map") in _WHOLE_MAPS or made.get("cpu_offload_gb") == 0


def _size(value: Size, where: str) -> int:
    return parse_bytes(str(value), where)


def _devices(device_map: DeviceMap) -> tuple[tuple[str, Device], ...]:
    entries = device_map.items() if isinstance(device_map, Mapping) else [("", device_map)]
    if not entries:
        raise UsageError(f"{flag('device_map')}: an empty map; it has to place every layer")
    return tuple((str(module), _device(device, "device_map")) for module, device in entries)


def _device(name: object, word: str) -> Device:
    text = str(name)
    if text in ("cpu", "disk"):
        return cast(Device, text)
    if text in ("0", "cuda", "cuda:0"):
        return "gpu"
    if text.removeprefix("cuda:").isdigit():
        raise UsageError(f"{flag(word)}: device {text}: only one GPU is used, 0")
    choices = "0, cpu or disk" if word == "max_memory" else f"{', '.join(_WHOLE_MAPS)}, 0, cpu or disk"
    raise UsageError(f"{flag(word)}: device {text!r}: expected {choices}")


def _bounded(made: dict[str, Any], word: str, least: int, most: int | None, whole: bool = False) -> Any:
    """Return a number that was asked for if it is one between the bounds."""
    value = made.get(word)
    if value is None:
        return None
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= (float("inf") if most is None else most) or value == float("inf"):
        kind = "a whole number" if whole else "a number"
        bounds = f"from {least} up" if most is None else f"between {least} and {most}"
        raise UsageError(f"{flag(word)} {value}: expected {kind} {bounds}")
    return value


def _kept(made: dict[str, Any]) -> tuple[KVFormat | None, int | None]:
    """Return how keys and values are kept, and how much of them in memory."""
    kind, kv = made.get("cache_implementation"), made.get("kv")
    if kv not in (None, "int8"):
        raise UsageError(f"{flag('kv')} {kv}: expected int8")
    if kind not in (None, "dynamic", "quantized", "offloaded"):
        raise UsageError(f"{flag('cache_implementation')} {kind}: expected dynamic, quantized or offloaded")
    if kind == "dynamic" and kv is not None:
        raise _contradiction("kv", "cache_implementation", "both say how keys and values are kept")
    if kind == "offloaded" and "kv_memory" in made:
        raise _contradiction("kv_memory", "cache_implementation", "both say how much of them lies in memory")
    in_8_bits = kv == "int8" or kind in ("quantized", "offloaded")
    if "kv_memory" in made and not in_8_bits:
        raise UsageError(f"{flag('kv_memory')}: only keys and values in 8 bits can lie elsewhere; add --kv int8")
    kv_bytes = 0 if kind == "offloaded" else None
    if "kv_memory" in made:
        kv_bytes = _size(made["kv_memory"], flag("kv_memory")) if str(made["kv_memory"]) != "0" else 0
    return "int8" if in_8_bits else None, kv_bytes


def _in_bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * (1 << 30))


def _placed(layer: str, placed: Mapping[str, Device]) -> Device | None:
    """Return the device of a layer: that of the longest name that it is, or is inside of."""
    parts = layer.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next((placed[name] for name in names if name in placed), None)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _contradiction(one: str, other: str, why: str) -> UsageError:
    return UsageError(f"{flag(one)} and {flag(other)}: {why}; leave one of them out")
