"""FlashPO under verl 0.9's registries: `algorithm.adv_estimator=flashpo_rloo`, `policy_loss.loss_mode=flashpo_gspo`.

verl loads `flashpo.verl.plugin` in each of its processes by itself (entry point "verl.plugins"). verl knows some
estimators by name and hands them more than others: gae, gdpo and, in its v1 trainer, grpo. For ours to run there, they
have to go by verl's own names: `VERL_USE_EXTERNAL_MODULES=flashpo.verl.replace`.
"""

from verl.trainer.ppo import core_algos

from flashpo.verl.advantages import ADV_ESTIMATORS
from flashpo.verl.losses import POLICY_LOSSES

__all__ = ["register"]

# compute_advantage calls these by their names in the module, past verl's registry
CALLED_BY_NAME = {"gae": "compute_gae_advantage_return", "grpo": "compute_grpo_outcome_advantage"}


def register(*, replace: bool = False) -> None:
    """Put our losses and estimators under verl's registries, as "flashpo_" and verl's name; a second call does nothing.

    With `replace=True` they stand under verl's own names too: an unchanged configuration runs on them.
    """
    for name, loss in POLICY_LOSSES.items():
        core_algos.register_policy_loss(f"flashpo_{name}")(loss)
        if replace:
            core_algos.POLICY_LOSS_REGISTRY[name] = loss
    for name, estimator in ADV_ESTIMATORS.items():
        core_algos.register_adv_est(f"flashpo_{name}")(estimator)
        if replace:  # register_adv_est refuses a name that is taken
            core_algos.ADV_ESTIMATOR_REGISTRY[name] = estimator
            if name in CALLED_BY_NAME:
                setattr(core_algos, CALLED_BY_NAME[name], estimator)
