"""What it takes to run what a plan makes: by anyone, with its layers on disk, and for `--kv`, once it is written."""

from dataclasses import dataclass, replace

from offload.planning.needs import CODE_BYTES, Needs, activation_bytes, cache_bytes
from offload.skeleton import decoder_layers
from quant.cost import Windows
from quant.plan import Plan, around_bytes

RUNTIME_BYTES = CODE_BYTES + (220 << 20)
"""Python and libraries in the command that runs a checkpoint: 206 MiB of their own were measured with torch 2.13."""

CONTEXT_TOKENS = 2048
_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class CacheRun:
    """Windows that are run through the result, for `--kv`.

    samples: windows. least_bytes: of memory besides Python and libraries, with the layers on disk; most_bytes: with all
    of them in memory; given_bytes: what it has of that. layers_bytes: of all layers, read once, or for every window
    where one of them is not in memory. operations: in all, about.
    """

    samples: int
    least_bytes: int
    most_bytes: int
    given_bytes: int
    layers_bytes: int
    operations: float

    @classmethod
    def of(cls, plan: Plan, windows: Windows) -> "CacheRun":
        """Return what it takes with all in memory, with room for as much context as anyone has."""
        needs = _needs(plan, 0, max(CONTEXT_TOKENS, windows.tokens), windows.tokens)
        layers_bytes = sum(plan.layers_bytes)
        weights = sum(p.numel() for layer in decoder_layers(plan.model)[1] for p in layer.parameters())
        most_bytes = needs.around_bytes + layers_bytes
        return cls(
            samples=windows.samples,
            least_bytes=needs.around_bytes + max(plan.layers_bytes),
            most_bytes=most_bytes,
            given_bytes=most_bytes,
            layers_bytes=layers_bytes,
            operations=2.0 * weights * windows.samples * windows.tokens,
        )

    def given(self, nbytes: int) -> "CacheRun":
        """Return the same with as much memory as there is, if it needs so much, but not less than it needs."""
        return replace(self, given_bytes=max(self.least_bytes, min(nbytes, self.most_bytes)))

    @property
    def read_bytes(self) -> int:
        """Bytes of layers that are read from disk."""
        return self.layers_bytes * (1 if self.given_bytes == self.most_bytes else self.samples)


def smallest_memory(plan: Plan, runtime_bytes: int = RUNTIME_BYTES) -> int:
    """Return the bytes that a process needs to run the checkpoint, its layers on disk."""
    return _needs(plan, runtime_bytes, CONTEXT_TOKENS, _CHUNK_TOKENS).around_bytes + max(plan.layers_bytes)


def _needs(plan: Plan, runtime_bytes: int, context_tokens: int, chunk_tokens: int) -> Needs:
    config = plan.model.config
    return Needs(
        runtime_bytes=runtime_bytes,
        fixed_bytes=around_bytes(plan, as_floats=False),
        cache_bytes=cache_bytes(config, context_tokens, 2),
        activation_bytes=activation_bytes(config, chunk_tokens),
        layers_bytes=plan.layers_bytes,
    )
