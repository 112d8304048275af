"""TRL's trainers reduced to their losses, and the comparison of our losses with them."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from accuracy import assert_as_accurate

PAIRS, TOKENS = 6, 11
BETA = 0.3


def trainer_of(cls, **attributes):
    """A trainer that was never set up: just what its loss reads. One process, no metrics kept."""
    trainer = object.__new__(cls)
    model = torch.nn.Module()  # trains, by default
    model.is_gradient_checkpointing = False
    one_process = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, num_processes=1
    )
    defaults = dict(
        model=model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        accelerator=one_process,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
    )
    vars(trainer).update(defaults | attributes)
    return trainer


def outputs(log_probs, log_sum_sq_probs=None):
    """What a model with a fused LM head returns; the statistics that only metrics read are zeros."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(
        log_probs=log_probs, log_sum_sq_probs=log_sum_sq_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def completions(sequences: int) -> torch.Tensor:
    """(S, TOKENS) bool: a prompt of one or two tokens, completions of 0 to 7, padding on the right."""
    start = torch.randint(1, 3, (sequences, 1))
    length = torch.randint(1, 8, (sequences, 1))
    length[0], length[-1] = 0, 7
    position = torch.arange(TOKENS)
    return (position >= start) & (position < start + length)


def inputs_of(mask: torch.Tensor) -> dict:
    whole = torch.nn.functional.pad(mask.long(), (1, 0))  # TRL's mask is of the tokens, its first is never predicted
    return dict(input_ids=torch.ones_like(whole), attention_mask=torch.ones_like(whole), completion_mask=whole)


def assert_same(ours, trl, leaf: torch.Tensor, fp64: bool = True) -> None:
    """`ours(x)` and `trl(x)` are one function: in fp64 to its last digits, in fp32 as accurately; gradients too."""

    def run(f, dtype):
        torch.set_default_dtype(dtype)  # TRL makes tensors of its own
        try:
            x = leaf.to(dtype).requires_grad_()
            loss = f(x)
            (gradient,) = torch.autograd.grad(loss, x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert gradient.abs().max() > 0
        return loss, gradient

    theirs = run(trl, torch.float32)
    if not fp64:
        for a, b in zip(run(ours, torch.float32), theirs):
            torch.testing.assert_close(a, b)
        return
    exact = run(trl, torch.float64)
    for a, b in zip(run(ours, torch.float64), exact):
        torch.testing.assert_close(a, b)
    for a, b, baseline in zip(run(ours, torch.float32), exact, theirs):
        assert_as_accurate(a, b, baseline)
