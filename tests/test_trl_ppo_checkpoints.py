"""PPOTrainer saves actor and critic separately, and a resumed run equals an uninterrupted one."""

import os

import pytest
import torch

pytest.importorskip("trl")
from test_trl_ppo import LORA, make
from transformers import AutoModelForCausalLM
from trl_models import weights


@pytest.mark.parametrize("options", [{}, {"critic": "separate"}, LORA], ids=["shared", "separate", "lora"])
def test_resuming_gives_an_uninterrupted_run(options, tmp_path):
    settings = dict(
        save_strategy="steps", save_steps=4, max_steps=8, per_device_train_batch_size=4, steps_per_generation=2,
        num_iterations=2, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    whole = make(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    expected = weights(whole.model)
    again = make(output_dir=str(tmp_path / "again"), **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    again.train(resume_from_checkpoint=checkpoint)
    got = weights(again.model)
    assert got.keys() == expected.keys()
    assert any(".critic." in f".{name}" for name in got)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0, msg=name)
    os.remove(os.path.join(checkpoint, "critic.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"critic\.safetensors is missing"):
        make(output_dir=str(tmp_path / "third"), **settings).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_saved_policy_is_a_plain_causal_lm(critic, tmp_path):
    trainer = make(critic=critic)
    trainer.train()
    trainer.save_model(str(tmp_path))
    model, info = AutoModelForCausalLM.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = weights(trainer.model)
    assert all(torch.equal(p, ours[n]) for n, p in model.named_parameters())
    another = make(critic=critic)
    another.load_critic(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(another.critic.parameters(), trainer.critic.parameters()))
