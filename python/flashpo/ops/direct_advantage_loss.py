"""Direct Advantage Policy Optimization (arXiv 2412.18279), an offline loss per step; not the DAPO of `policy_loss`."""

from torch import Tensor

from flashpo.ops._check import check_beside, check_float, check_positive
from flashpo.ops._wide import wide_dtype


def direct_advantage_loss(logprob: Tensor, ref_logprob: Tensor, advantage: Tensor, *, beta: float) -> Tensor:
    """mean over steps of (advantage / beta - (logprob - ref_logprob))^2 / 2.

    A step is a piece of a completion, such as a line of reasoning. The policy that maximises advantage - beta KL has
    log(pi / pi_ref) = advantage / beta up to a constant of the state, and there the loss is 0. The reference is the
    policy that sampled the steps. The advantage is V(after the step) - V(before it), by a critic of that policy.

    Args:
        logprob, ref_logprob: (N,) float: for each step the sum of its tokens' log-probabilities under the policy and
            under the reference, for instance from `sequence_logprobs` with the steps' boundaries as `cu_seqlens`.
        advantage: (N,) float: the advantage of each step.
        beta: the coefficient of the KL, a positive number.

    Returns:
        The loss (), fp32 or wider; 0 if there is no step.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, or beta is not positive.
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
