"""Splits a batch into micro-batches of a limited number of tokens, where a shared token counts once."""

from itertools import pairwise

from torch import Tensor

from flashpo.packing.images import Images
from flashpo.packing.tree import MIN_SAVED, Rows, branches, check_count, shared_with_previous


def split_by_tokens(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    max_tokens: int,
    *,
    min_saved: int = MIN_SAVED,
    prune: bool = True,
    images: Images | None = None,
) -> list[Tensor]:
    """Split the rows of a batch so that the token tree of each part has at most `max_tokens` tokens.

    Rows with the same prompt (the tokens before a row's first scored token) stay in one part, unless they are too many
    for one part by themselves. Prompts that begin alike come one after the other.

    Args:
        input_ids, attention_mask, completion_mask, min_saved, prune, images: as for `pack`, which has to be called with
            the same options.
        max_tokens: the largest number of tokens of a tree.

    Returns:
        For each part the indices of its rows, int64, on the batch's device. Each row is in exactly one part.

    Raises:
        TypeError, ValueError: as in `pack`, and if a single row has more than `max_tokens` tokens.
    """
    check_count("max_tokens", max_tokens)
    check_count("min_saved", min_saved)
    rows = Rows.of(input_ids, attention_mask, completion_mask, prune, images)
    sorted_ids, of_row = rows.distinct()
    length, shared = (sorted_ids >= 0).sum(1).tolist(), shared_with_previous(sorted_ids)
    prompts = of_row.new_full((len(length),), sorted_ids.shape[1]).scatter_reduce(0, of_row, rows.prompt(), "amin")
    prompt = prompts.tolist()

    def tokens(begin: int, stop: int) -> int:
        return sum(length[begin:stop]) - sum(branches([0, *shared[begin + 1 : stop]], min_saved))

    starts = [i for i in range(len(length)) if i == 0 or prompt[i] != prompt[i - 1] or shared[i] < prompt[i]]
    cuts = [0]
    for start, stop in pairwise([*starts, len(length)]):
        if tokens(cuts[-1], stop) <= max_tokens:
            continue
        cuts.append(start)
        if tokens(start, stop) <= max_tokens:
            continue
        for row in range(start, stop):
            if length[row] > max_tokens:
                raise ValueError(f"max_tokens must be at least the length of a row, {length[row]}, got {max_tokens}")
            if tokens(cuts[-1], row + 1) > max_tokens:
                cuts.append(row)
    ranges = [(begin, stop) for begin, stop in pairwise([*cuts, len(length)]) if begin < stop]
    return [((of_row >= begin) & (of_row < stop)).nonzero()[:, 0].to(input_ids.device) for begin, stop in ranges]
