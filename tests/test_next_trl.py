"""The TRL after the newest one, simulated: a copy of it with one change at a time trains as it does itself.

Accelerated where that is still right, and where it is not, by TRL's own code after a warning that names the reason.
"""

import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

pytest.importorskip("trl")
import trl

SCRIPT = """
import sys, warnings
import trl
from trl_models import assert_same, make_trainer, train
import flashpo, flashpo.trl

folder, name, ours = sys.argv[1], sys.argv[2], eval(sys.argv[4])
settings = eval(sys.argv[3])
assert trl.__file__.startswith(folder), trl.__file__
stock = None if "old_logprobs" in ours else train(make_trainer(name, trl, **settings))
flashpo.stats(reset=True)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    steps = train(make_trainer(name, flashpo.trl, **settings, **ours))
if stock is not None:
    assert_same(stock, steps)
for step in steps:
    print("ratios", step.metrics.get("ratio/q01"), step.metrics.get("ratio/q99"))
for other in ("KTOTrainer", "DistillationConfig"):
    try:
        getattr(flashpo.trl, other)
    except ImportError as error:
        assert "has no" in str(error), error
from flashpo._hosts.report import of_trl
assert all("does not import" not in line for line in of_trl()), of_trl()
print("ops", *flashpo.stats())
print("said", *[str(w.message) for w in seen if "FlashPO" in str(w.message)], sep=" | ")
"""


class Change(NamedTuple):
    edits: tuple[tuple[str, str], ...]
    ran: set[str]  # operators of ours
    left: set[str]  # which TRL's code does without
    said: tuple[str, ...]  # in a warning each
    trainer: str = "GRPO"
    settings: str = "{}"
    ours: str = "{'rollout': 'generate'}"  # so that both train on the same completions
    file: str = "trainer/grpo_trainer.py"
    gone: tuple[str, ...] = ()  # other files


LOSS, TREES, ADVANTAGES, ENGINE = "policy_loss_fwd", "tree_attention_bwd", "group_advantages_fwd", "sample_rows"
OTHER_LOSS = r"the loss to TRL: .*_compute_loss is other code"
CHANGES = {
    "a loss more": Change(
        edits=(
            ('["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]', '["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "next"]'),
            ("per_token_loss1 = coef_1 * advantages\n", "per_token_loss1 = 1.5 * coef_1 * advantages\n"),
            ('if self.loss_type in ["grpo", "sapo"]', 'if self.loss_type in ["grpo", "sapo", "next"]'),
        ),
        ran={TREES, ADVANTAGES}, left={LOSS}, said=(OTHER_LOSS,), settings="{'loss_type': 'next'}",
    ),
    "an option that acts by its default": Change(
        edits=((
            "    def _compute_loss(self, model, inputs):\n",
            "    def _compute_loss(self, model, inputs):\n"
            "        inputs['advantages'] = inputs['advantages'] * getattr(self.args, 'credit', 0.5)\n",
        ),),
        ran={TREES, ADVANTAGES}, left={LOSS}, said=(OTHER_LOSS,),
    ),
    "advantages by another formula": Change(
        edits=(("advantages = rewards - mean_grouped_rewards", "advantages = 1.1 * (rewards - mean_grouped_rewards)"),),
        ran={TREES, LOSS}, left=set(), said=("the advantages to TRL: .* are not what FlashPO computes",),
    ),
    "a renamed method": Change(
        edits=(("_get_per_token_logps_and_entropies", "_score_tokens"),),
        ran={ADVANTAGES}, left={TREES, LOSS},
        said=("the loss to TRL", "prompts are not shared: .*_get_per_token_logps_and_entropies is missing"),
    ),
    "scores with another value": Change(
        edits=(
            ("return logps, entropies, aux_loss", "return logps, entropies, aux_loss, None"),
            ("old_per_token_logps, _, _ = ", "old_per_token_logps, _, _, _ = "),
            ("ref_per_token_logps, _, _ = ", "ref_per_token_logps, _, _, _ = "),
            ("per_token_logps, entropies, aux_loss = self", "per_token_logps, entropies, aux_loss, _ = self"),
        ),
        ran={ADVANTAGES}, left={TREES, LOSS},
        said=("the loss to TRL", "prompts are not shared: .*takes apart 4 values"),
    ),
    "a turn with another value": Change(
        edits=(
            ("return completion_ids, logprobs\n", "return completion_ids, logprobs, None\n"),
            ("completion_ids, logprobs = self._generate_s", "completion_ids, logprobs, _ = self._generate_s"),
            ("post_tool_ids, post_tool_logprobs = self", "post_tool_ids, post_tool_logprobs, _ = self"),
        ),
        ran={TREES, ADVANTAGES, LOSS}, left={ENGINE}, ours="{}",
        said=("does not generate here: .*takes apart 3 values",),
    ),
    "a turn with other arguments": Change(
        edits=(
            ("def _generate_single_turn(self, prompt_ids,", "def _generate_single_turn(self, rows, prompt_ids,"),
            ("self._generate_single_turn(\n", "self._generate_single_turn(\n                None,\n"),
        ),
        ran={TREES, ADVANTAGES, LOSS}, left={ENGINE}, ours="{}",
        said=("does not generate here: .*_generate_single_turn is",),
    ),
    "values of a generation in another order": Change(
        edits=(
            ("tool_mask, completions, logprobs, extra_fields", "tool_mask, logprobs, completions, extra_fields"),
            (
                "            completions,\n            sampling_per_token_logps_list,\n",
                "            sampling_per_token_logps_list,\n            completions,\n",
            ),
        ),
        ran={TREES, ADVANTAGES, LOSS, ENGINE}, left=set(), said=(),
        settings="{'gradient_accumulation_steps': 1, 'steps_per_generation': 2}", ours="{'old_logprobs': 'rollout'}",
    ),
    "a renamed head": Change(
        edits=(("add_fused_lm_head", "attach_fused_head"),),
        ran={"linear_logprob_bwd"}, left={TREES}, said=("prompts are not shared: .*does not call add_fused_lm_head",),
        trainer="SFT", ours="{}", file="trainer/sft_trainer.py",
    ),
    "two trainers less": Change(
        edits=(), ran={TREES, ADVANTAGES, LOSS}, left=set(), said=(),
        gone=tuple(f"trainer/{name}_{part}.py" for name in ("kto", "distillation") for part in ("trainer", "config")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_trains_as_it_does_itself(change, tmp_path):
    package = tmp_path / "trl"
    shutil.copytree(os.path.dirname(trl.__file__), package)
    path = package / change.file
    source = path.read_text()
    for before, after in change.edits:
        assert before in source, before
        source = source.replace(before, after)
    if change.trainer == "SFT":  # under whatever name, it is the same function
        source = source.replace("    attach_fused_head,\n", "    add_fused_lm_head as attach_fused_head,\n")
    path.write_text(source)
    for name in change.gone:
        (package / name).unlink()
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, change.trainer, change.settings, change.ours],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ratios, ran, said = done.stdout.strip().splitlines()[-3:]
    if "old_logprobs" in change.ours:  # the policy that sampled is the one that trains
        assert all(abs(float(x) - 1) < 1e-3 for x in ratios.split()[1:]), ratios
    assert change.ran <= set(ran.split())
    assert not change.left & set(ran.split())
    warnings = said.split(" | ")[1:]
    assert len(warnings) == len(change.said), warnings
    for text, pattern in zip(warnings, change.said):
        assert re.search(pattern, text), (pattern, text)
