"""TRL's trainers on hybrid models: loss, metrics and gradients on token trees equal those of stock TRL."""

import pytest

pytest.importorskip("trl")
from datasets import Dataset
from test_trl_trees import SHARED
from trl_models import HYBRIDS, assert_same_training, make_trainer, train

import flashpo.trl


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_step_is_that_of_stock_trl(family, name):
    data = {} if name == "GRPO" else {"train_dataset": Dataset.from_list(SHARED[name])}
    if family == "granitemoehybrid":
        data["router_aux_loss_coef"] = 0.0  # TRL's own head does not find the number of its experts
    assert_same_training(name, model=family, **data)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_a_step_of_the_engine_and_of_token_trees(family, caplog):
    trainer = make_trainer("GRPO", flashpo.trl, model=family, share_prefix=True, rollout="engine")
    (step,) = train(trainer)
    assert step.metrics["rollout/mismatch/max"] < 1e-4
    assert not [record for record in caplog.records if record.levelname == "WARNING" and "flashpo" in record.name]
