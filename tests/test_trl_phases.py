"""The clock and token counts of a trainer's phases: what is logged of them, and that nothing else changes."""

import pytest
import torch

pytest.importorskip("trl")
from test_trl_distillation import make as make_distillation
from test_trl_reward import make_reward_trainer
from trl_models import make_trainer

import flashpo.trl
from flashpo.trl import _phases, report, switches
from flashpo.trl._phases import EVALUATION, GENERATION, HEAD, REST, SCORING, TRAINING, Phases


class Clock:
    """A second passes with every look."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        self.time += 1
        return self.time


class Event:
    """Of a device that is `behind` by so many events."""

    made: list["Event"] = []  # noqa: RUF012
    behind = 0

    def __init__(self):
        self.index = len(self.made)
        self.made.append(self)

    def query(self):
        if self.behind is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.index < len(self.made) - self.behind

    def elapsed_time(self, end):
        assert end.query(), "it would have to wait"
        return 1000.0 * (end.index - self.index)


def phases(mark=None) -> Phases:
    made = Phases()
    made._mark = mark or Clock()
    return made


def test_a_phase_within_another_stops_it():
    clock = phases()
    with clock.of(REST), clock.of(TRAINING):
        with clock.of(HEAD):
            pass
        with clock.within(REST, SCORING):  # it does not stand in it
            pass
        with pytest.raises(KeyError), clock.within(TRAINING, REST):
            raise KeyError
    assert clock.read() == {REST: 2, TRAINING: 3, HEAD: 1} | {REST: 3}
    assert sum(clock.read().values()) == clock._mark.time - 1, "from the first look to the last"


def test_an_evaluation_is_one_phase():
    clock = phases()
    with clock.of(EVALUATION), clock.of(GENERATION):
        clock.count(sampled=3)
        clock.ran(1, of=2)
    assert dict(clock.read()) == {EVALUATION: 1}
    assert not clock.counts
    assert not clock.on_trees


def test_stopped():
    clock = phases()
    with clock.of(TRAINING):
        before = vars(clock) | {"counts": clock.counts.copy(), "seconds": clock.seconds.copy()}
        with clock.stopped(), clock.of(GENERATION), torch.no_grad():
            clock.ran(1, of=2)
            clock.reference_ends(clock.reference_begins())
        assert vars(clock) == before


def test_events_are_read_when_the_device_has_passed_them(monkeypatch):
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(Event, "behind", 0)
    clock = phases(Event)
    with clock.of(TRAINING), clock.of(HEAD):
        pass
    Event.behind = 2
    assert dict(clock.read()) == {TRAINING: 1}
    Event.behind = None
    assert dict(clock.read()) == {TRAINING: 1}, "the device has failed"
    Event.behind = 0
    assert dict(clock.read()) == {TRAINING: 2, HEAD: 1}


@pytest.mark.gpu
def test_events_of_a_gpu():
    clock, x = Phases(on_cuda=True), torch.randn(1024, 1024, device="cuda")
    with clock.of(TRAINING):
        x = x @ x
        with clock.of(HEAD):
            x @ x
    torch.cuda.synchronize()
    assert set(clock.read()) == {TRAINING, HEAD}
    assert all(seconds > 0 for seconds in clock.seconds.values())


def test_a_graph_that_is_captured_has_no_time():
    clock = phases(lambda: None)
    with clock.of(TRAINING):
        pass
    assert not clock.read()


def test_seconds_are_of_a_step_and_begin_where_a_checkpoint_ends():
    clock = phases()
    assert clock.metrics(0) == {}
    clock.step_begins(100)
    with clock.of(TRAINING):
        clock.ran(1, of=4)
        clock.ran(4, of=4, on_tree=False)
    assert clock.metrics(102) == {"flashpo/seconds/training": 0.5, "flashpo/tokens_saved": 3 / 8}
    assert clock.metrics(102) == {}, "the last log of a training, with no step since"
    with clock.of(TRAINING):
        clock.ran(4, of=4, on_tree=False)
    assert clock.metrics(103) == {"flashpo/seconds/training": 1, "flashpo/tokens_saved": 0}


def reward(tmp_path, **options):
    return make_reward_trainer(flashpo.trl, tmp_path, **options)


def distillation(tmp_path, **options):
    return make_distillation(flashpo.trl, **options)


POLICY = {GENERATION, TRAINING, HEAD, "rewards", REST}
TRAINERS = {  # how it is made, its options, the phases that it has
    "SFT": ({}, {TRAINING, HEAD, REST}),
    "DPO": ({}, {SCORING, TRAINING, HEAD, REST}),
    "KTO": ({}, {SCORING, TRAINING, HEAD, REST}),
    "Reward": ({}, {TRAINING, REST}),
    "GRPO": ({}, POLICY),
    "GRPO with a reference": (dict(beta=0.04), POLICY | {SCORING}),
    "RLOO": ({}, POLICY | {SCORING}),
    "PPO": (dict(num_iterations=1), POLICY | {SCORING}),
    "Distillation": ({}, {GENERATION, SCORING, TRAINING, HEAD, REST}),
}


def make(name: str, tmp_path, **options):
    special = {"Reward": reward, "Distillation": distillation}
    kind = name.split()[0]
    return special[kind](tmp_path, **options) if kind in special else make_trainer(kind, flashpo.trl, **options)


@pytest.fixture(autouse=True)
def switches_as_before(monkeypatch):
    monkeypatch.setattr(switches, "_current", switches.Switches())


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_logs_its_phases_and_tokens(name, tmp_path, monkeypatch):
    """And what it counts is what goes into the models' embeddings."""
    monkeypatch.setattr(report, "ran", {})
    report.watch_trainers()
    options, expected = TRAINERS[name]
    trainer = make(name, tmp_path, **options)
    embedded = []

    def noted(module, args, out):
        if trainer._phases._now in (SCORING, TRAINING) and args[0].dim() == 2:
            embedded.append(args[0].numel())

    models = [trainer.model, getattr(trainer, "ref_model", None), getattr(trainer, "teacher_model", None)]
    for model in models:
        if model is not None:
            model.get_input_embeddings().register_forward_hook(noted)
    trainer.train()
    log = trainer.state.log_history[0]
    assert {k.removeprefix("flashpo/seconds/") for k in log if k.startswith("flashpo/seconds/")} == expected
    assert all(log[f"flashpo/seconds/{phase}"] > 0 for phase in expected)
    counts = trainer._phases.counts
    assert 0 < counts["tokens_saved"] < counts["tokens"]
    assert counts["tokens"] - counts["tokens_saved"] == sum(embedded)
    assert log["flashpo/tokens_saved"] == pytest.approx(counts["tokens_saved"] / counts["tokens"])
    table = "\n".join(report.lines())
    assert f"{type(trainer).__name__} ({type(trainer).__module__}): " in table
    assert all(_phases.LABELS[phase] in table for phase in expected)
    assert "computed of" in table
    assert "see below" not in table or name == "Distillation", "everything runs"


def half_idle(completions, prompts, **kwargs) -> list[float]:
    """Every second prompt's completions have equal rewards."""
    return [i % 2.0 if i // 4 % 2 else 1.0 for i in range(len(completions))]


def test_rows_that_run_in_two_forwards_are_counted_once():
    """TRL runs a row without an advantage with the others."""
    counted = {}
    for skip in (True, False):
        options = dict(reward_funcs=half_idle, per_device_train_batch_size=8, skip_zero_advantage=skip)
        trainer = make_trainer("GRPO", flashpo.trl, **options)
        trainer.train()
        counted[skip] = trainer._phases.counts
    assert counted[True] == counted[False]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(trees="no"), TypeError, "trees must be True or False, got 'no'"),
        (dict(verify=-1), ValueError, "verify must be a number of steps, 0 for none, got -1"),
        (dict(report=3), TypeError, "report must be a path or None, got 3"),
    ],
)
def test_accelerate_refuses_what_is_no_switch(arguments, error, says):
    before = switches.current()
    with pytest.raises(error, match=says):
        flashpo.trl.accelerate(**arguments)
    assert switches.current() is before


OFF = {
    "rollout": ({"rollout engine"}, {"generation", "rollout engine"}),
    "trees": ({"token trees"}, {"tree_attention_bwd"}),
    "head": ({"token trees", "LM head"}, {"tree_attention_bwd", "linear_logprob_bwd"}),
}


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
@pytest.mark.parametrize("switch", OFF)
def test_a_switch_turns_its_part_off(switch, name, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ran", {})
    report.watch_trainers()
    switches.use(**{switch: False})
    flashpo.stats(reset=True)
    trainer = make(name, tmp_path)
    trainer.train()
    parts = trainer._why_not_parts()
    gone, operators = OFF[switch]
    assert {part for part, reason in parts.items() if reason == f"--no-{switch}"} == gone & parts.keys()
    assert not operators & flashpo.stats().keys()
    assert ("decode_attention_fwd" in flashpo.stats()) == (name == "GRPO" and switch != "rollout")
    table = "\n".join(report.lines())
    assert all(f"not {part}: --no-{switch}" in table for part in gone & parts.keys())
    assert "flashpo/tokens_saved" not in trainer.state.log_history[0] or switch == "rollout"
