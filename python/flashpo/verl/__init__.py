"""Policy losses and advantage estimators of FlashPO in the registries of verl 0.9.

In a configuration of verl they are chosen as `algorithm.adv_estimator=flashpo_rloo` and
`policy_loss.loss_mode=flashpo_gspo`, for example. verl loads `flashpo.verl.plugin` in each of its processes by itself
(entry point "verl.plugins"). verl calls some estimators by their own names and hands them more arguments than others:
gae, gdpo and, in its v1 trainer, grpo. Ours get these arguments only under verl's own names, which
`VERL_USE_EXTERNAL_MODULES=flashpo.verl.replace` gives them.
"""

from verl.trainer.ppo import core_algos

from flashpo.verl.advantages import ADV_ESTIMATORS
from flashpo.verl.losses import POLICY_LOSSES

__all__ = ["register"]

# compute_advantage calls these functions by their names in the module, without verl's registry
CALLED_BY_NAME = {"gae": "compute_gae_advantage_return", "grpo": "compute_grpo_outcome_advantage"}


def register(*, replace: bool = False) -> None:
    """Registers FlashPO's policy losses and advantage estimators in verl, as "flashpo_" followed by verl's name.

    A second call changes nothing.

    Args:
        replace: Register them under verl's own names, too, so that an unchanged configuration uses them.
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
