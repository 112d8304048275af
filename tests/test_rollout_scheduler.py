"""The scheduler and its prefix tree, under a simulated engine that checks all it reads."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rollout_simulation import Engine

from flashpo.rollout import prefix_tree
from flashpo.rollout.prefix_tree import blocks_for

TOKENS = st.lists(st.integers(0, 1), max_size=14).map(tuple)
LENGTHS = st.lists(st.integers(1, 11), min_size=1, max_size=4)  # of a prompt's completions
SPACES = st.sampled_from(["a", "b"])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 4 tokens: short sequences meet every case."""
    monkeypatch.setattr(prefix_tree, "BLOCK", 4)


class Rollouts(RuleBasedStateMachine):
    """Calls in any order that an engine may make them in."""

    @initialize(
        blocks=st.integers(8, 40),
        max_rows=st.integers(1, 6),
        hybrid=st.booleans(),
        expected_tokens=st.none() | st.integers(1, 8),
    )
    def begin(self, **options):
        self.engine = Engine(**options)
        self.session = None
        self.texts = [()]  # what a later prompt may begin with
        self.wanted = set()  # completions

    @rule(data=st.data(), rest=TOKENS, lengths=LENGTHS, spare=st.integers(0, 6), space=SPACES)
    def add(self, data, rest, lengths, spare, space):
        text = data.draw(st.sampled_from(self.texts))
        prompt = text[: data.draw(st.integers(0, len(text)) | st.just(len(text)))] + rest
        own, capacity = blocks_for(max(lengths) + spare), self.engine.scheduler._allocator.capacity
        if not prompt:
            with pytest.raises(ValueError, match="is empty"):
                self.engine.add(prompt, lengths)
        elif blocks_for(len(prompt)) + own > capacity:
            with pytest.raises(
                MemoryError, match=rf"needs {blocks_for(len(prompt))} \+ {own} blocks .* has {capacity}"
            ):
                self.engine.add(prompt, lengths, spare=spare, space=space)
        else:
            rows = self.engine.add(prompt, lengths, spare=spare, space=space)
            self.texts.append(prompt)
            self.wanted |= {(row.prompt_index, row.index) for row in rows}

    @rule(steps=st.integers(1, 5))
    def round(self, steps):
        before = len(self.engine.finished)
        self.engine.round(steps)
        for (prompt_index, _), completion in list(self.engine.finished.items())[before:]:
            self.texts.append(self.engine.requests[prompt_index][1] + completion)

    @precondition(lambda self: self.engine.scheduler.rows)
    @rule(data=st.data())
    def preempt(self, data):
        self.engine.preempt(data.draw(st.sampled_from(self.engine.scheduler.rows)))

    @rule()
    def open_or_close_session(self):
        if self.session is None:
            self.session = self.engine.scheduler.keeping()
            self.session.__enter__()
        else:
            self.session.__exit__(None, None, None)
            self.session = None

    @invariant()
    def consistent(self):
        self.engine.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        assert self.engine.run().keys() == self.wanted
        self.engine.check()
        if self.session is not None:
            self.session.__exit__(None, None, None)
        assert self.engine.scheduler._allocator.used == 0


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
