"""linear_divergence on the CPU. For each tile, the logits of both heads are computed for the same vocabulary entries
and tokens (see `_linear_logprob_cpu` for tiles). While the two tiles are in cache, C++ folds them into a partial, or
turns the student's into gradients in place."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flashpo._op import native
from flashpo.ops import divergence_stats as stats
from flashpo.ops._check import check_range
from flashpo.ops._linear_logprob_cpu import DTYPES, Gradients, Tiles

STATE_ROWS = 15  # rows that C++ keeps between tiles; four more when the most probable tokens are wanted


def takes(heads) -> bool:
    return heads.target.device.type == "cpu" and {heads.student.dtype, heads.teacher.dtype} <= {*DTYPES}


class Pairs:
    """The tiles of both heads."""

    def __init__(self, heads):
        def tiles(head, buffer):
            transforms = heads.temperature, head.logit_scale, head.softcap, heads.ignore_index, heads.start
            return Tiles(
                head.hidden, head.weight, heads.target, head.bias, None, *transforms, head.dtype, heads=2, buffer=buffer
            )

        self.student, self.teacher = tiles(heads.student, "tile"), tiles(heads.teacher, "teacher_tile")
        self.student.width = self.teacher.width = min(self.student.width, self.teacher.width)
        self.of_heads = [(tiles, *tiles.scalars[1:]) for tiles in (self.student, self.teacher)]
        self.shared = self.student.scalars[0], heads.beta
        # Factors that turn logits into bits. C++ applies them either after the head's transforms or before.
        self.units = [
            self.shared[0] * (scale if tiles.bias is None and softcap == 0 else 1.0)
            for tiles, scale, softcap in self.of_heads
        ]

    def parts(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        for (part, rows), (_, teacher_rows) in zip(self.student.parts(), self.teacher.parts()):
            yield part, (rows, teacher_rows)

    def logits(self, part: slice, rows: tuple[Tensor, Tensor], block: slice) -> tuple[Tensor, tuple]:
        """Compute both tiles. Returns the student's tile and the arguments by which C++ reads the two."""
        made = [
            (tiles.logits(of, block), tiles.bias_of(part), scale, softcap)
            for (tiles, scale, softcap), of in zip(self.of_heads, rows)
        ]
        return made[0][0], (*made[0], *made[1], *self.shared)

    def place(self, part: slice, block: slice) -> tuple[Tensor, int]:
        return self.student.target[block], self.student.start + part.start


def partial(heads, vocab, top1) -> Tensor:
    check_range("target", heads.target, vocab, heads.ignore_index)
    pairs, threads = Pairs(heads), torch.get_num_threads()
    state_rows = STATE_ROWS + (4 if top1 else 0)
    states = [
        (block, torch.empty(state_rows, block.stop - block.start, dtype=torch.float32, device="cpu"))
        for block in pairs.student.blocks()
    ]
    for part, rows in pairs.parts():
        for block, state in states:
            _, described = pairs.logits(part, rows, block)
            place = pairs.place(part, block)
            native.linear_divergence_fold(*described, *place, state, part.start == 0, threads)
    whole = stats.neutral_partial(top1, len(heads.target), pairs.student.buffer)
    for block, state in states:
        column = state.new_empty(len(whole), state.shape[1])
        native.linear_divergence_finish(state, *pairs.units, heads.beta, column)
        pairs.student.spread(column, block, whole)
    return whole


def mixture(heads, student_rows, teacher_rows) -> Tensor:
    pairs, threads = Pairs(heads), torch.get_num_threads()
    whole = student_rows.new_zeros(2, len(heads.target))
    of_blocks = [
        (block, rows, rows[0].new_empty(4, block.stop - block.start))
        for block, rows in pairs.student.rows_of_blocks(student_rows, teacher_rows)
    ]
    for part, rows in pairs.parts():
        for block, of_block, sums in of_blocks:
            _, described = pairs.logits(part, rows, block)
            native.linear_divergence_mixture(*described, *of_block, sums, part.start == 0, threads)
    for block, _, sums in of_blocks:
        pairs.student.spread(sums[:2], block, whole)
    return whole


def backward(heads, *rest) -> tuple[Tensor, Tensor, Tensor]:
    *of_tokens, want_hidden, want_weight, want_bias = rest
    pairs, threads = Pairs(heads), torch.get_num_threads()
    of_blocks = pairs.student.rows_of_blocks(*of_tokens)
    gradients = Gradients(pairs.student, want_hidden, want_weight, want_bias)
    for part, rows in pairs.parts():
        for block, of_block in of_blocks:
            tile, described = pairs.logits(part, rows, block)
            place, flipped = pairs.place(part, block), gradients.transposed_of(tile)
            native.linear_divergence_grad(*described, *place, *of_block, flipped, threads)
            gradients.add(tile, part, rows[0], block)
    return gradients.results(heads.student.hidden, heads.student.bias)
