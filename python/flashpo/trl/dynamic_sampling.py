"""DAPO's dynamic sampling (arXiv 2503.14476): fresh prompts replace groups of equal rewards, whose advantages are 0."""

from collections.abc import Callable

import torch
from torch import Tensor

LEFT_PADDED = ("prompt_ids", "prompt_mask")
TOKENS = ("prompt_ids", "completion_ids")  # padded with the padding token; other tensors are padded with 0


def replace_degenerate(
    trainer, batch: dict, degenerate: Tensor, generate: Callable[[list[dict]], tuple[dict, Tensor]]
) -> dict:
    """`batch` with the rows of degenerate groups replaced, in at most `args.dynamic_sampling` rounds of generation.

    Each rank replaces its own groups. In each round all ranks generate the same number of groups: as many as the rank
    with the most degenerate groups needs. The metrics `dynamic_sampling/degenerate` (before the first round),
    `/generated`, `/replaced` and `/left` count groups of all ranks.

    Args:
        degenerate: (rows of all ranks,) bool.
        generate: takes rows of the dataset; returns their batch, and `degenerate` for the rows of all ranks.
    """
    size, ranks, rank = trainer.num_generations, trainer.accelerator.num_processes, trainer.accelerator.process_index
    if (rows := len(degenerate) // ranks) % size:
        raise ValueError(
            f"dynamic_sampling needs whole groups on each process: {rows} completions a process are "
            f"no multiple of num_generations={size}"
        )
    flags = degenerate.view(ranks, -1, size).all(-1).tolist()  # [rank][group]
    wanted = [[g for g, dead in enumerate(groups) if dead] for groups in flags]
    before, generated = sum(map(len, wanted)), 0
    for turn in range(trainer.args.dynamic_sampling):
        needed = max(map(len, wanted))
        if needed == 0:
            break
        fresh, dead = generate(_fresh_rows(trainer, needed, turn))
        generated += needed * ranks
        good = [
            [g for g, d in enumerate(groups) if not d] for groups in dead.view(ranks, needed, size).all(-1).tolist()
        ]
        pairs = list(zip(wanted[rank], good[rank]))
        batch = _replace_groups(batch, fresh, pairs, size, trainer._tokenizer.pad_token_id)
        wanted = [groups[len(found) :] for groups, found in zip(wanted, good)]
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    batch["num_items_in_batch"] = trainer.accelerator.gather(mask.sum()).sum()
    left = sum(map(len, wanted))
    counts = {"degenerate": before, "generated": generated, "replaced": before - left, "left": left}
    for name, count in counts.items():
        trainer._metrics["train"][f"dynamic_sampling/{name}"].append(float(count))
    return batch


def _fresh_rows(trainer, groups: int, turn: int) -> list[dict]:
    """Prompts of this rank. They depend only on seed, step and round, so that a resumed run draws the same ones."""
    rank, dataset = trainer.accelerator.process_index, trainer.train_dataset
    generator = torch.Generator().manual_seed(hash((trainer.args.seed, trainer._step, turn)) % 2**63)
    total = groups * trainer.accelerator.num_processes
    drawn = torch.randint(len(dataset), (total,), generator=generator)[rank * groups : (rank + 1) * groups].tolist()
    return [dict(dataset[i]) for i in drawn for _ in range(trainer.num_generations)]


def _replace_groups(batch: dict, fresh: dict, pairs: list[tuple[int, int]], size: int, pad_token: int) -> dict:
    """Replace groups of `batch` by groups of `fresh`. Tensors are padded to the longer of the two.

    pairs: (index of the group in `batch`, index of the group in `fresh`).
    """
    if not pairs:
        return batch
    to, of = (torch.tensor([g * size + i for g in groups for i in range(size)]) for groups in zip(*pairs))
    merged = dict(batch)
    for name, rows in batch.items():
        if isinstance(rows, Tensor) and rows.dim() == 0:
            continue  # a count for the whole batch, which the caller computes again
        if not isinstance(rows, Tensor) or rows.dim() > 2:
            raise ValueError(f"dynamic_sampling cannot replace rows of {name}: text prompts only")
        if name not in fresh:  # such as log-probs of the engine, if TRL generated this round
            del merged[name]
            continue
        ours, theirs = rows, fresh[name]
        if rows.dim() == 2 and ours.shape[1] != theirs.shape[1]:
            pad = pad_token if name in TOKENS else 0
            width = max(ours.shape[1], theirs.shape[1])
            ours, theirs = (_pad(x, width, name in LEFT_PADDED, pad) for x in (ours, theirs))
        merged[name] = ours.index_copy(0, to.to(ours.device), theirs[of.to(theirs.device)].to(ours.dtype))
    return merged


def _pad(x: Tensor, width: int, left: bool, value: int) -> Tensor:
    missing = width - x.shape[1]
    return torch.nn.functional.pad(x, (missing, 0) if left else (0, missing), value=value)
