"""What FlashPO relies on in TRL: it is found where it exists and named where it is missing, each need by itself."""

import ast
import dataclasses
import importlib.metadata
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
import trl
import trl.trainer.utils as utils
from trl.trainer import distillation_trainer

import flashpo
from flashpo import doctor
from flashpo._hosts import Seam, code, report, versions
from flashpo._hosts import trl as host
from flashpo.trl import PatchError, patch, patched, start, unpatch
from flashpo.trl.patch import active

TRAINERS = [(name, what) for name, needs in host.TRAINERS.items() for what in needs]


@pytest.mark.parametrize(("name", "what"), TRAINERS, ids=str)
def test_the_installed_trl_has_it(name, what):
    assert host.why_not(host.trainer_class(name), what) == ""


def changed(name: str, **attributes) -> type:
    """A trainer class of a TRL that is not the one we know."""
    cls = host.trainer_class(name)
    return type(name, (cls,), {"__module__": cls.__module__} | attributes)


METHODS = [(name, what, method) for name, what in TRAINERS for method in host.TRAINERS[name][what].methods]


@pytest.mark.parametrize(("name", "what", "method"), METHODS, ids=str)
def test_a_changed_method(name, what, method):
    """It costs what needs it. Behind the parameters that we know there may be more only where we pass them on."""
    wanted = host.TRAINERS[name][what].methods[method]
    reason = host.why_not(changed(name, **{method: lambda itself, other: None}), what)
    assert f"{name}.{method} is (itself other), FlashPO knows ({wanted})" in reason
    assert reason.startswith(f"TRL {trl.__version__}: ")
    missing = host.why_not(changed(name, **{method: None}), what)
    assert f"{name}.{method} is missing" in missing


def one_value_less(self, prompts):
    prompt_ids = completion_ids = tool_mask = completions = 0
    return prompt_ids, completion_ids, tool_mask, completions


def in_another_order(self, prompts):
    prompt_ids = logprobs = tool_mask = completions = 0
    return prompt_ids, logprobs, tool_mask, completions


def no_shuffle(self, generation_batch):
    return generation_batch


def another_loss(self, model, inputs):
    return inputs["loss"]


def three_of_a_turn(self, prompts):
    ids, logprobs, reasons = self._generate_single_turn(prompts, None, {})
    return ids, logprobs, reasons


OTHERS = {
    "a value that a tuple lacks": ("GRPOTrainer", host.OLD_LOGPROBS, {"_generate": one_value_less}, "without logprobs"),
    "another length": ("GRPOTrainer", host.ROLLOUTS, {"_generate": three_of_a_turn}, "takes apart 3 values of"),
    "a function": ("RLOOTrainer", host.GROUPS, {"_prepare_inputs": no_shuffle}, "does not call shuffle_sequence_dict"),
    "attributes": ("RLOOTrainer", host.ROLLOUTS, {"__init__": lambda self: None}, "does not set _dist, "),
    "a head": ("SFTTrainer", host.TREES, {"__init__": lambda self: None}, "call add_fused_lm_head"),
    "other code": ("GRPOTrainer", host.LOSS, {"_compute_loss": another_loss}, "is other code than"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "what", "attributes", "reason"), OTHERS.values(), ids=OTHERS)
def test_other_changes(name, what, attributes, reason):
    cls = changed(name, **attributes)
    assert reason in host.why_not(cls, what)
    others = [need for need in host.TRAINERS[name] if need != what and "__init__" not in attributes]
    assert [need for need in others if host.why_not(cls, need)] == []


def test_a_place_in_a_tuple_is_told_by_its_name():
    assert host.place_of(trl.GRPOTrainer, "_generate", "logprobs") == 4
    assert host.place_of(changed("GRPOTrainer", _generate=in_another_order), "_generate", "logprobs") == 1


def test_an_output_with_another_field(monkeypatch):
    fields = [(f, object, None) for f in ("loss", "log_probs", "label_mask", "entropy", "certainty")]
    monkeypatch.setattr(utils, "FusedCausalLMOutput", dataclasses.make_dataclass("FusedCausalLMOutput", fields))
    reason = host.why_not(changed("SFTTrainer"), host.TREES)
    assert "FusedCausalLMOutput differs from the one that FlashPO knows in aux_loss, certainty" in reason


OURS = sorted(path for path in Path(flashpo.__file__).parent.rglob("*.py") if "_hosts" not in path.parts)
PRIVATE = (
    "_attn_implementation_internal", "get_layer_types_and_kwargs", "_prepare_generation_config",
    "_get_default_generation_params", "_can_set_attn_implementation", "_get_fsdp_state", "_mp_policy", "ds_status",
    "BaseTunerLayer", "AuxiliaryTrainingWrapper",
)  # fmt: skip
PUBLIC = ("trl.trainer", "trl.trainer.grpo_trainer")  # the second for type checkers alone


def test_nobody_else_has_private_names():
    found = []
    for path in OURS:
        if "bench" in path.parts:
            continue
        text = path.read_text()
        found += [f"{path}: {name}" for name in PRIVATE if name in text]
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("trl.")
                and node.module not in PUBLIC
            ):
                found.append(f"{path}: {node.module}")
    assert found == []
    assert len(OURS) > 80


# code


def first():
    def function(self, x):
        """A docstring."""
        y = x + 1  # a comment
        return "# none", y

    return function


def with_other_words():
    def function(self, x):
        """Another one,

        and a longer one."""

        y = x + 1
        # and nothing else
        return "# none", y

    return function


def with_another_sign():
    def function(self, x):
        """A docstring."""
        y = x - 1  # a comment
        return "# none", y

    return function


def with_another_text():
    def function(self, x):
        """A docstring."""
        y = x + 1  # a comment
        return "# some", y

    return function


def test_a_fingerprint_is_of_the_code_alone():
    assert code.fingerprint(first()) == code.fingerprint(with_other_words()) != ""
    assert code.fingerprint(first()) != code.fingerprint(with_another_sign())
    assert code.fingerprint(first()) != code.fingerprint(with_another_text())


def test_a_fingerprint_without_a_source():
    assert code.fingerprint(lambda: 0) == ""
    scope: dict = {}
    exec("def function(x):\n    return x", scope)
    assert code.fingerprint(scope["function"]) == ""


# what `patch()` replaces


class Changed(types.ModuleType):
    def __init__(self, **attributes):
        super().__init__("trl.trainer.utils")
        self.__dict__.update({**utils.__dict__, **attributes})


def add_fused_lm_head(model, temperature=1.0):
    def forward(hidden, weight, targets):
        return utils._ChunkedLogProbFunction.apply(hidden, weight, targets)

    model.forward = forward


def test_a_head_that_is_called_otherwise():
    assert "calls _ChunkedLogProbFunction with []" in host.why_no_head(Changed(add_fused_lm_head=add_fused_lm_head))
    assert host.why_no_logits(Changed(add_fused_lm_head=add_fused_lm_head)) == ""


def test_a_reader_that_left_the_name():
    """A TRL that keeps the name but does not use it any more would make the patch do nothing, in silence."""
    theirs = Changed(entropy_from_logits=lambda logits, chunk_size=128: logits.sum(-1))
    assert "entropy_from_logits does not read _supports_trl_loss_kernel" in host.why_no_logits(theirs)
    assert host.why_no_head(theirs) == ""


def test_a_divergence_that_is_another():
    theirs = types.ModuleType("trl.trainer.distillation_trainer")
    theirs.__dict__.update(distillation_trainer.__dict__)
    assert host.why_no_divergence(theirs) == ""
    theirs.ChunkedDivergenceFunction = type("Changed", (), {"forward": lambda ctx, hidden: hidden})
    assert "ChunkedDivergenceFunction.forward is (ctx hidden), FlashPO knows" in host.why_no_divergence(theirs)
    theirs.ChunkedDivergenceFunction = None
    assert "ChunkedDivergenceFunction is missing" in host.why_no_divergence(theirs)
    theirs._chunked_divergence_loss = lambda *states: sum(states)
    assert "_chunked_divergence_loss does not read ChunkedDivergenceFunction" in host.why_no_divergence(theirs)


def test_patch_does_what_it_can(monkeypatch):
    """Without the one kernel the other is replaced; without both, patch() says what it lacks and changes nothing."""
    monkeypatch.setattr(utils, "add_fused_lm_head", add_fused_lm_head)
    before = dict(utils.__dict__)
    patch()
    try:
        assert utils._ChunkedLogProbFunction is before["_ChunkedLogProbFunction"]
        assert utils._supports_trl_loss_kernel is not before["_supports_trl_loss_kernel"]
    finally:
        unpatch()
    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits, chunk_size=128: logits.sum(-1))
    before = dict(utils.__dict__)
    with pytest.raises(
        PatchError, match=rf"TRL {trl.__version__} has nothing that patch\(\) replaces: add_fused.*trl 1.14"
    ):
        patch()
    with patched():  # what our trainers do beyond that goes on
        assert active()
        assert utils.__dict__ == before
    assert utils.__dict__ == before


# words


def test_versions():
    assert versions.standing("trl", "1.16.3") == "supported"
    assert versions.standing("torch", "2.13.0+cpu") == "supported"
    assert versions.standing("trl", "1.10.0").startswith("older than the oldest")
    assert versions.standing("trl", "1.17.0").startswith("newer than the newest")
    assert versions.standing("trl", "2.0.0.dev0").startswith("newer than the newest")
    assert versions.MATRIX[-1].trl == trl.__version__
    assert not versions.older(torch.__version__, versions.FLOORS["torch"])


def test_packages_without_metadata_say_their_version(monkeypatch):
    """Copied or bundled packages, as in an image or a build system that vendors them."""

    def none(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", none)
    versions_said = f"flashpo {flashpo.__version__}, torch {torch.__version__}, trl {trl.__version__}, transformers "
    assert start.machine("cpu").startswith(versions_said)
    assert dict(doctor.machine())["trl"] == f"{trl.__version__}, supported"
    assert report.of_trl()[0].startswith(f"TRL {trl.__version__}: supported")
    assert versions.installed("no_such_package") is None


def test_seams_are_said_in_a_line_each():
    first, *lines = report.of_trl()
    everyone = ", ".join(host.TRAINERS)
    assert first == f"TRL {trl.__version__}: supported; {everyone} accelerated"
    assert len(lines) == 3 + len(TRAINERS)
    assert "  divergence of distillation: used, linear_divergence" in lines
    assert all(": used, " in line for line in lines)
    missing = str(Seam("GRPOTrainer, loss", "policy_loss", "TRL computes the loss", "it is another one"))
    assert missing == "GRPOTrainer, loss: not used, TRL computes the loss: it is another one"
