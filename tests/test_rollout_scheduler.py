"""The scheduler and its prefix tree, under a simulated engine that checks everything it reads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rollout_simulation import Engine

from flashpo.rollout import prefix_tree
from flashpo.rollout.prefix_tree import BlockAllocator, blocks_for
from flashpo.rollout.scheduler import Scheduler

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


CALLS = st.lists(st.tuples(TOKENS.filter(len), LENGTHS, SPACES), min_size=1, max_size=8)
ROOMY = dict(blocks=1000, max_rows=100)


def run(calls, *, steps=1, **options):
    engine = Engine(**options)
    for prompt, lengths, space in calls:
        engine.add(prompt, lengths, space=space)
    engine.run(steps)
    return engine


@settings(deadline=None, derandomize=True)
@given(calls=CALLS, steps=st.integers(1, 5), max_rows=st.integers(1, 6), expected=st.none() | st.integers(1, 8))
def test_a_tight_cache_decides_the_same_each_time_and_completes_the_same(calls, steps, max_rows, expected):
    options = dict(blocks=8, max_rows=max_rows, expected_tokens=expected, steps=steps)
    engine = run(calls, **options)
    assert engine.log == run(calls, **options).log
    assert engine.finished == run(calls, **ROOMY).finished


@settings(deadline=None, derandomize=True)
@given(calls=CALLS, hybrid=st.booleans())
def test_every_distinct_token_is_prefilled_once(calls, hybrid):
    """Up to the block boundary before the point where prompts part."""
    computed = sum(len(entry) - 2 for entry in run(calls, hybrid=hybrid, **ROOMY).log if entry[0] == "prefill")
    distinct = {(space, prompt[:i]) for prompt, _, space in calls for i in range(1, len(prompt) + 1)}
    prompts = {(space, prompt) for prompt, _, space in calls}
    assert len(distinct) <= computed <= len(distinct) + (prefix_tree.BLOCK - 1) * (len(prompts) - 1)


@settings(deadline=None, derandomize=True)
@given(calls=CALLS, blocks=st.integers(8, 40), max_rows=st.integers(1, 6))
def test_rows_start_in_the_order_added_and_none_is_preempted(calls, blocks, max_rows):
    log = run(calls, blocks=blocks, max_rows=max_rows).log
    order = [(i, j) for i, (_, lengths, _) in enumerate(calls) for j in range(len(lengths))]
    assert [entry[1:] for entry in log if entry[0] == "start"] == order
    assert not any(entry[0] == "preempted" for entry in log)


def segments(engine):
    return [(x.node.tokens, x.begin, x.end) for x in engine.scheduler.shared]


def prefills(engine):
    """What has been prefilled since the last call."""
    log, engine.log = engine.log, []
    return [entry[2:] for entry in log if entry[0] == "prefill"]


def test_prompts_share_nodes_over_several_levels():
    system, question = (1, 2, 3, 4), (5, 6, 7, 8)
    engine = Engine(**ROOMY)
    for prompt in (
        (*system, *question, 9),
        (*system, 9, 9),
        (*system, *question, 7, 7),
        (*system, *question, 9),
        system,
        (*system, 9, 9, 8),
        (1, 2, 3),
    ):
        engine.add(prompt, [3])
    engine.start()
    assert prefills(engine) == [system, question, (9,), (9, 9), (7, 7), (8,), (1, 2, 3)]
    assert [row.prompt_index for row in engine.scheduler.rows] == [4, 1, 5, 0, 3, 2, 6]
    assert segments(engine) == [
        (system, 0, 6),
        ((9, 9), 1, 3),  # ends within a block: what continues it begins in the next one
        ((8,), 2, 3),
        (question, 3, 6),
        ((9,), 3, 5),
        ((7, 7), 5, 6),
        ((1, 2, 3), 6, 7),  # parts from `system` before a block is full
    ]
    counts = engine.scheduler.take_counts()
    assert (counts.prompt_tokens, counts.prefill_tokens, counts.peak_rows) == (9 + 6 + 10 + 9 + 4 + 7 + 3, 17, 7)
    assert counts.peak_blocks == 7 + 7
    engine.run()


def test_a_row_that_takes_a_free_place_needs_no_prefill_but_new_tables():
    engine = Engine(blocks=100, max_rows=2)
    engine.add((1, 2, 3, 4, 5), [2, 6, 6])
    engine.round()
    assert prefills(engine) == [(1, 2, 3, 4, 5)]
    version = engine.scheduler.version
    engine.round()
    assert [row.index for row in engine.scheduler.rows] == [1, 2]
    assert engine.scheduler.version != version
    version = engine.scheduler.version
    engine.round()
    assert engine.scheduler.version == version
    assert prefills(engine) == []


def test_spaces_share_nothing():
    engine = Engine(**ROOMY)
    for space in ("adapter", None, "adapter"):
        engine.add((1, 2, 3, 4, 5), [3], space=space)
    engine.start()
    assert segments(engine) == [((1, 2, 3, 4, 5), 0, 2), ((1, 2, 3, 4, 5), 2, 3)]


@pytest.mark.parametrize("hybrid", [False, True])
def test_in_a_session_a_turn_costs_its_new_tokens(hybrid):
    engine = Engine(blocks=100, max_rows=4, hybrid=hybrid)
    text = (1, 2, 3, 4, 5)
    with engine.scheduler.keeping():
        engine.add(text, [7, 6])
        engine.run()
        prefills(engine)
        for turn in range(1, 4):
            text += (*engine.finished[turn - 1, 0], 8, 9)
            engine.add(text, [7])
            engine.run()
            assert prefills(engine) == [text[-3:]]  # the last sampled token was never fed
            engine.check()
        used = engine.scheduler._allocator.used
        assert used == 2 + 2 + 2 + 3 * (1 + 2)
    assert engine.scheduler._allocator.used == 0


def test_without_a_session_nothing_stays():
    engine = Engine(**ROOMY)
    for _ in range(2):
        engine.add((1, 2, 3), [3])
        engine.run()
        assert prefills(engine) == [(1, 2, 3)]


def test_a_row_is_kept_only_if_wanted():
    scheduler = Scheduler(10, 4)
    with scheduler.keeping():
        rows = scheduler.add((1, 2, 3), prompt_index=0, n=3, max_new_tokens=6)
        scheduler.plan()
        for row, tokens in zip(rows, ([1, 2], [3, 4], [5])):
            row.tokens.extend(tokens)
        kept = [scheduler.finish(row, keep=row is not rows[1]) for row in rows]
        assert kept[0].tokens == (1,)
        assert kept[1:] == [None, None]  # of the third nothing has been fed
        assert scheduler._allocator.used == 1 + 1
    with pytest.raises(ValueError, match="completion 1 of prompt 0 does not run"):
        scheduler.finish(rows[1])


def test_a_prompt_that_ends_where_a_cached_node_has_no_logits_computes_its_last_tokens():
    prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    for hybrid in (False, True):
        engine = Engine(**ROOMY, hybrid=hybrid)
        with engine.scheduler.keeping():
            engine.add(prompt, [2])
            engine.run()
            (again,) = engine.add(prompt, [2])
            engine.run()
            assert prefills(engine) == [prompt]
            engine.add((*prompt[:8], 0), [2])  # splits it, unless it is a hybrid's
            engine.run()
            assert prefills(engine) == [(*prompt[:8], 0) if hybrid else (0,)]
            engine.add(prompt[:8], [2])
            engine.run()
            assert prefills(engine) == [prompt[:8] if hybrid else prompt[4:8]]
            engine.add((*prompt, *engine.finished[0, 0][:1]), [2])  # ends where a kept completion does
            engine.run()
            assert prefills(engine) == [(engine.finished[0, 0][0],)]
            again.parent.ends = False  # the engine has dropped its logits
            engine.add(prompt, [2])
            engine.run()
            assert prefills(engine) == [(9,)]


def test_what_was_used_last_stays_longest():
    engine = Engine(blocks=1 + 8, max_rows=4)
    with engine.scheduler.keeping():
        for text in ((1,), (2,), (1, 2, 3, 4, 5, 6, 7, 8), (1,)):  # 1 + 1 + 2 blocks, each row 1 more
            engine.add(text, [1])
            engine.run()
        prefills(engine)
        engine.add((3,) * 16, [1])  # wants 5 of 8
        engine.run()
        for text, prefilled in (((1,), False), ((2,), True)):
            prefills(engine)
            engine.add(text, [1])
            engine.run()
            assert bool(prefills(engine)) == prefilled


def test_a_kept_completion_counts_as_just_used():
    engine = Engine(blocks=1 + 6, max_rows=4)
    with engine.scheduler.keeping():
        engine.add((1,), [1])
        engine.add((2,), [3])
        engine.run()
        engine.add((3,) * 8, [1])  # wants 3 of 6, where the three nodes leave 3; then the next wants one of them
        engine.run()
        engine.add((4,), [1])
        engine.run()
        prefills(engine)
        engine.add((2, *engine.finished[1, 0]), [1])
        engine.run()
        assert prefills(engine) == [engine.finished[1, 0][-1:]]


def test_prompts_that_do_not_all_fit_run_in_waves():
    engine = Engine(blocks=1 + 7, max_rows=100)
    for i in range(5):
        engine.add((i,) * 5, [8, 8])  # 2 + 2 * 2 blocks each
    engine.round()
    assert [(row.prompt_index, row.index) for row in engine.scheduler.rows] == [(0, 0), (0, 1)]
    engine.run()
    assert len(prefills(engine)) == 5


def test_a_path_of_partly_filled_blocks_that_would_not_fit_is_not_shared():
    engine = Engine(blocks=1 + 4, max_rows=4)
    with engine.scheduler.keeping():
        text = (1,)
        for turn in range(4):  # sharing all, the last would want a block for each turn
            text += (turn,)
            engine.add(text, [1])
            engine.run()
            engine.check()
        engine.add((*text, 5, 6, 7, 8, 9), [3])
        engine.add((*text, 5, 6, 7, 8, 9), [3])
        engine.run()
        assert prefills(engine)[-1] == (*text, 5, 6, 7, 8, 9)


def test_optimistic_admission_runs_more_rows_and_preempts_the_shortest():
    lengths = [3, 14, 14, 14]
    cautious, bold = Engine(blocks=1 + 12, max_rows=4), Engine(blocks=1 + 12, max_rows=4, expected_tokens=4)
    for engine in (cautious, bold):
        engine.add((1, 2, 3), lengths)
        engine.start()
    assert len(cautious.scheduler.rows) == 2
    assert len(bold.scheduler.rows) == 4
    assert bold.scheduler.grow(1) == []
    bold.run()
    assert bold.finished == cautious.run()
    preempted = [entry for entry in bold.log if entry[0] == "preempted"]
    assert preempted == [("preempted", 0, 3)]  # of equal ones, the last
    assert bold.scheduler.take_counts().preemptions == 1
    assert [len(entry) - 2 for entry in bold.log if entry[0] == "prefill"][1] > 1


def test_preempted_rows_are_the_first_to_start_again():
    engine = Engine(blocks=100, max_rows=3)
    engine.add((1, 2, 3), [5, 5, 5, 5])
    engine.round()
    for row in list(engine.scheduler.rows[1:]):
        engine.preempt(row)
    engine.scheduler.max_rows = 2  # after an out-of-memory, say
    engine.run()
    assert [entry[1:] for entry in engine.log if entry[0] == "start"] == [(0, i) for i in (0, 1, 2, 2, 1, 3)]


def test_reset_forgets_everything():
    engine = Engine(blocks=10, max_rows=2)
    with engine.scheduler.keeping():
        engine.add((1, 2, 3), [5, 5, 5])
        engine.round()
        engine.reset()
        assert engine.scheduler.unfinished == engine.scheduler._allocator.used == 0
        engine.finished.clear()
        engine.requests.clear()
        engine.add((1, 2, 3), [5, 5, 5])
        assert len(engine.run()) == 3
        engine.check()


def test_a_request_that_never_fits_is_refused_in_blocks_and_leaves_the_rest_alone():
    engine = Engine(blocks=1 + 6, max_rows=2)
    engine.add((1, 2), [9])
    with pytest.raises(MemoryError, match=r"prompt 1 of 9 tokens and 13 new tokens needs 3 \+ 4 blocks .* has 6"):
        engine.add((1,) * 9, [13])
    assert len(engine.run()) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(blocks=1, max_rows=1), "blocks"),
        (dict(blocks=2, max_rows=0), "max_rows"),
        (dict(blocks=2, max_rows=1, expected_tokens=0), "expected_tokens"),
    ],
)
def test_a_wrong_option_is_named(options, name):
    with pytest.raises(ValueError, match=name):
        Scheduler(**options)


@pytest.mark.parametrize("name", ["n", "max_new_tokens"])
def test_a_request_for_nothing_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Scheduler(9, 9).add((1,), prompt_index=0, **{"n": 1, "max_new_tokens": 1, name: 0})


def test_blocks_have_one_owner():
    allocator = BlockAllocator(4)
    blocks = allocator.take(2)
    with pytest.raises(MemoryError, match="2 blocks are wanted, 1 are free"):
        allocator.take(2)
    allocator.release(blocks)
    with pytest.raises(ValueError, match=f"block {blocks[0]} is released, but nobody owns it"):
        allocator.release(blocks)
    assert sorted(allocator.take(3)) == [1, 2, 3]
    assert allocator.peak == 3
