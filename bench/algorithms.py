"""The table of docs/algorithms.md: for each algorithm its operators and trainer, the source whose results it reproduces
and the test that shows it, and how much it learned in `make zoo`."""

from typing import NamedTuple


class Algorithm(NamedTuple):
    name: str
    operators: str
    trainer: str
    same_as: str
    test: str  # file::function in tests/
    zoo: str | None = None  # its name in the zoo


GRPO, VERL = "test_trl_policy.py::test_grpo", "test_verl_losses.py::test_same_as_verl"


def _loss(name: str) -> str:
    return f'`group_advantages`, `policy_loss(loss="{name}")`'


def _grpo(title: str, name: str, same_as: str, test: str) -> Algorithm:
    return Algorithm(title, _loss(name), f'`GRPOTrainer`, `loss="{name}"`', same_as, test, name)


ALGORITHMS = (
    Algorithm("SFT", "`linear_logprob`", "`SFTTrainer`", "TRL", "test_trl_steps.py::test_sft", "sft"),
    Algorithm("PPO", "`gae`, `policy_loss`, `value_loss`", "`PPOTrainer`", "a step by hand; verl's GAE and loss",
              "test_trl_ppo.py::test_a_step_by_hand", "ppo"),
    Algorithm("DPO and TRL's 14 variants", '`preference_loss(loss="sigmoid")` ...', "`DPOTrainer`", "TRL",
              "test_trl_preference.py::test_dpo", "dpo"),
    _grpo("GRPO", "grpo", "TRL, verl", GRPO),
    Algorithm("DAPO", f'{_loss("dapo")}, `overlong_penalty`', '`GRPOTrainer`, `loss="dapo"`, `dynamic_sampling=...`',
              "TRL", GRPO, "dapo"),
    _grpo("GSPO", "gspo", "TRL, verl", GRPO),
    Algorithm("RLOO", _loss("rloo"), "`RLOOTrainer`", "TRL, verl", "test_trl_policy.py::test_rloo", "rloo"),
    _grpo("CISPO", "cispo", "TRL, verl", GRPO),
    _grpo("Dr. GRPO", "dr_grpo", "TRL", GRPO),
    _grpo("BNPO", "bnpo", "TRL", GRPO),
    _grpo("SAPO", "sapo", "TRL, verl", GRPO),
    _grpo("VESPO", "vespo", "TRL", GRPO),
    _grpo("LUSPO", "luspo", "TRL", GRPO),
    _grpo("GMPO", "gmpo", "TRL, verl", "test_trl_policy.py::test_gmpo"),
    _grpo("GSPO-token", "gspo_token", "verl", VERL),
    _grpo("DPPO, total variation", "dppo_tv", "verl", VERL),
    _grpo("DPPO, KL", "dppo_kl", "verl", VERL),
    Algorithm("REINFORCE++", '`group_advantages(lengths=...)`, `policy_loss(loss="ppo")`', "verl's",
              "verl", "test_verl_advantages.py::test_same_as_verl"),
    Algorithm("On-policy distillation", "`linear_divergence`", "`DistillationTrainer`", "TRL",
              "test_trl_distillation.py::test_a_step_is_that_of_stock_trl", "distil"),
    Algorithm("Reward model", "`tree_attention`", "`RewardTrainer`", "TRL",
              "test_trl_reward.py::test_a_step_is_that_of_stock_trl", "judged"),
    Algorithm("KTO", "`kto_loss`", "`KTOTrainer`", "TRL", "test_trl_preference.py::test_kto"),
    Algorithm("ORPO", '`preference_loss(loss=["odds_ratio", "sft"])`', "TRL's, under `patch()`", "TRL",
              "test_trl_reference_free.py::test_orpo"),
    Algorithm("CPO, SimPO, AlphaPO", '`preference_loss(loss="simpo")` ...', "TRL's, under `patch()`", "TRL",
              "test_trl_reference_free.py::test_cpo_and_simpo"),
    Algorithm("Direct Advantage PO (2412.18279)", "`direct_advantage_loss`", "", "its formula",
              "test_preference_loss.py::test_direct_advantage"),
)  # fmt: skip


def records(learned: dict[str, dict]) -> list[dict]:
    """The rows of the table, given the zoo's newest record of each name."""
    rows = []
    for algorithm in ALGORITHMS:
        found = learned.get(algorithm.zoo or "")
        reward, tokens = "", ""
        if found is not None:
            reward = f"{found['reward at start']:.2f} → {found['reward at end']:.2f}"
            tokens = f"{found['tokens']:,.0f} in {found['steps']}"
        row = {"variant": algorithm.name, "operators": algorithm.operators, "trainer": algorithm.trainer}
        row |= {"same results as": algorithm.same_as, "shown by": f"`{algorithm.test}`", "reward in `make zoo`": reward}
        row |= {"tokens in steps": tokens}
        rows.append(row)
    return rows
