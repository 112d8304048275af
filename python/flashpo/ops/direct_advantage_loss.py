"""Direct Advantage Policy Optimization (arXiv 2412.18279): offline, by steps. Not the DAPO of `policy_loss`."""

from torch import Tensor

from flashpo.ops._check import check_beside, check_float, check_positive
from flashpo.ops._wide import wide_dtype


def direct_advantage_loss(logprob: Tensor, ref_logprob: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """mean over steps of (advantage / beta - (logprob - ref_logprob))^2 / 2.

    A step is a piece of a completion, such as a line of reasoning. The policy that maximises advantage - beta KL has
    log(pi / pi_ref) = advantage / beta up to a constant of the state: the loss is 0 there. The reference is the policy
    that the steps were sampled from, the advantage is V(after the step) - V(before it) by a critic of that policy.

    Args:
        logprob, ref_logprob: (N,) float, sums of the log-probabilities of each step's tokens, for instance from
            `sequence_logprobs` with the boundaries of the steps as `cu_seqlens`.
        advantage: (N,) float.
        beta: a positive number.

    Returns:
        The loss (), 0 without any step.

    Raises:
        TypeError: a dtype is wrong. ValueError: shapes or devices disagree, beta is not positive.
    """
    check_positive("beta", beta)
    check_float("logprob", logprob)
    if logprob.dim() != 1:
        raise ValueError(f"logprob must have shape (N,), got {tuple(logprob.shape)}")
    for name, x in (("ref_logprob", ref_logprob), ("advantage", advantage)):
        check_float(name, x)
        check_beside(name, x, "logprob", logprob)
    wide = wide_dtype(logprob.dtype)
    missing = advantage.to(wide) / beta - (logprob.to(wide) - ref_logprob.to(wide))
    return 0.5 * (missing * missing).sum() / max(missing.shape[0], 1)
