"""Packers of other tools' layouts, written from their descriptions, code by code: slow, plain, and nobody else's."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A quantized weight by its definition: W[n, k] = (codes[n, k] - zero[n, group[k]]) * scale[n, group[k]]."""

    codes: Tensor  # int64 [N, K]
    zero: Tensor  # int64 [N, groups]
    scale: Tensor  # float16 [N, groups]
    group: Tensor  # int64 [K]
    bits: int = 4

    def weight(self) -> Tensor:
        zero, scale = self.zero[:, self.group].double(), self.scale[:, self.group].double()
        return (self.codes.double() - zero) * scale


def random_grid(
    rows: int, inputs: int, group_size: int, symmetric: bool, act_order: bool = False, bits: int = 4
) -> Grid:
    groups = inputs // group_size
    group = torch.arange(inputs) // group_size
    if act_order:
        group = group[torch.randperm(inputs)]
    top = 1 << bits
    zero = torch.full((rows, groups), top // 2) if symmetric else torch.randint(0, top, (rows, groups))
    scale = (torch.rand(rows, groups) * 0.02 + 0.005).half()
    return Grid(torch.randint(0, top, (rows, inputs)), zero, scale, group, bits)


def words_along_last(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """int32 [..., n * bits / 32] of values [..., n]: place i of a word holds value order[i] of its 32 / bits."""
    per_word = 32 // bits
    out = torch.zeros(*values.shape[:-1], values.shape[-1] // per_word, dtype=torch.int64)
    for word in range(out.shape[-1]):
        for place in range(per_word):
            out[..., word] += values[..., word * per_word + order[place]] << bits * place
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def to_awq(grid: Grid) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words_along_last(grid.codes.t().contiguous(), 4, order),
        "qzeros": words_along_last(grid.zero.t().contiguous(), 4, order),
        "scales": grid.scale.t().contiguous(),
    }


def to_gptq(grid: Grid, first_version: bool) -> dict[str, Tensor]:
    natural = tuple(range(32 // grid.bits))
    zero = grid.zero - 1 & (1 << grid.bits) - 1 if first_version else grid.zero
    return {
        "qweight": words_along_last(grid.codes, grid.bits, natural).t().contiguous(),
        "qzeros": words_along_last(zero.t().contiguous(), grid.bits, natural),
        "scales": grid.scale.t().contiguous(),
        "g_idx": grid.group.to(torch.int32),
    }


def to_compressed_tensors(grid: Grid, symmetric: bool) -> dict[str, Tensor]:
    natural = tuple(range(32 // grid.bits))
    tensors = {
        "weight_packed": words_along_last(grid.codes, grid.bits, natural),
        "weight_scale": grid.scale.clone(),
        "weight_shape": torch.tensor(grid.codes.shape),
    }
    if not symmetric:
        padded = torch.zeros(-(-len(grid.zero) // len(natural)) * len(natural), grid.zero.shape[1], dtype=torch.int64)
        padded[: len(grid.zero)] = grid.zero
        tensors["weight_zero_point"] = words_along_last(padded.t().contiguous(), grid.bits, natural).t().contiguous()
    return tensors
