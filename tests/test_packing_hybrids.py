"""Hybrid models on token trees: convolutions and recurrent states follow the branches, forward and backward."""

import copy

import pytest
import torch
from accuracy import assert_as_accurate
from packing_models import Batch, alone, backward, packed, padded
from peft import LoraConfig, get_peft_model
from test_tree_recurrence import last_branch

import flashpo
from flashpo import _recurrent, packable
from flashpo.bench.tiny_models import tiny_model
from flashpo.ops import _recurrence_reference as reference
from flashpo.ops._lineage import Lineage
from flashpo.packing.parity import why_wrong
from flashpo.packing.scoring import prepare

CONVOLUTIONS = ("lfm2", "lfm2_moe", "lfm3")
DELTA_NETS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "lara_mini")
STATE_SPACES = ("granitemoehybrid", "bamba", "nemotron_h", "falcon_h1")
WITHOUT_ATTENTION = ("mamba", "falcon_mamba", "mamba2")
FAMILIES = (*CONVOLUTIONS, *DELTA_NETS, *STATE_SPACES, "kimi_linear", "bailing_hybrid", "jamba", *WITHOUT_ATTENTION)
ONE_OF_EACH = ("lfm2", "qwen3_5_text", "granitemoehybrid", "kimi_linear", "jamba", "falcon_mamba")
TEMPERATURE = 0.9


def make(family, dtype=torch.float32):
    return tiny_model(family, initializer_range=0.1).to(dtype)


def in_fp64(model):
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # grouped products know no fp64
    return wide


def long_batch(left=True) -> Batch:
    """Rows of several chunks, branching inside of them, one by itself, one of two tokens."""

    def words(n):
        return torch.randint(2, 97, (n,)).tolist()

    prompt, turn = words(41), words(13)
    rows = [prompt + turn + words(n) for n in (25, 3)] + [prompt + words(1), words(37), words(2)]
    return Batch.of(rows, [38, 16, 1, 30, 1], left)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    assert_as_near_as_padded(make(family), long_batch())


def assert_as_near_as_padded(model, b: Batch) -> None:
    """Against each row alone in fp64 we err no more than a padded batch does, in log-probs and in every gradient."""
    assert packable(model, check=True) == (True, "")
    wide = in_fp64(model)
    exact, stock, ours = alone(wide, b, TEMPERATURE), padded(model, b, TEMPERATURE), packed(model, b, TEMPERATURE)
    for i in range(2):
        assert_as_accurate(ours[i], exact[i], stock[i])
    d_exact, d_stock, d_ours = (backward(m, b, x) for m, x in ((wide, exact), (model, stock), (model, ours)))
    size = torch.stack([x.norm() for x in d_exact.values() if x is not None]).norm()
    live = [name for name, x in d_exact.items() if x is not None and x.norm() > 1e-6 * size]
    assert len(live) > 0.5 * len(d_exact)
    for name in live:
        error, allowed = ((x[name] - d_exact[name]).norm() for x in (d_ours, d_stock))
        assert error <= 3 * allowed + 1e-5 * d_exact[name].norm(), name


def no_states(patch):
    patch.setattr(reference, "_handed_on", lambda behind, before: torch.zeros_like(behind[before]))


def state_of_a_neighbour(patch):
    patch.setattr(reference, "_handed_on", lambda behind, before: behind.roll(1, 0)[before])


def one_branch(patch):
    patch.setattr(reference, "_summed", last_branch)


def no_tail(patch):
    """A segment's convolution begins with zeros."""
    right = Lineage._ancestors

    def within(self, count):
        found = right(self, count)
        begin = torch.searchsorted(torch.tensor(self.stop), torch.arange(self.tokens), right=True)
        return found.where(found >= torch.tensor(self.begin)[begin], self.tokens)

    patch.setattr(Lineage, "_ancestors", within)


def tail_of_the_token_before(patch):
    """In the flat order, whatever branches there."""

    def shifted(self, count):
        i = torch.arange(self.tokens)
        return torch.stack([(i - n).where(i >= n, self.tokens) for n in range(1, count + 1)])

    patch.setattr(Lineage, "_ancestors", shifted)


def state_of_the_first(patch):
    """Every token of a wave goes on from the state of the first token of the wave before."""
    right = Lineage._waves

    def first(self):
        waves = right(self)
        return waves._replace(parents=[torch.zeros_like(parents) for parents in waves.parents])

    patch.setattr(Lineage, "_waves", first)


MISTAKES = [
    *((family, mistake) for family in ONE_OF_EACH for mistake in (no_tail, tail_of_the_token_before)),
    *((family, mistake) for family in ONE_OF_EACH[1:4] for mistake in (no_states, state_of_a_neighbour, one_branch)),
    *((family, state_of_the_first) for family in ONE_OF_EACH[4:]),
]


@pytest.mark.parametrize(("family", "mistake"), MISTAKES, ids=[f"{f}-{m.__name__}" for f, m in MISTAKES])
def test_a_mistake_is_found(family, mistake, monkeypatch):
    model = make(family)
    assert not why_wrong(model)
    mistake(monkeypatch)
    with flashpo.backend("torch"):  # whose functions the mistakes replace
        reason = why_wrong(model)
    assert ("gradients" if mistake is one_branch else "log-probs") in reason
    assert "of a token tree differ from those of padded rows" in reason


def test_a_family_that_loses_the_tree_is_found(monkeypatch):
    model = make("lfm2")
    monkeypatch.setattr(_recurrent, "keywords", lambda *args: {})
    monkeypatch.setattr(_recurrent, "is_tree", lambda mask: False)
    assert "log-probs of a token tree differ" in why_wrong(model)


@pytest.mark.parametrize(
    ("family", "reason"), [("zaya", "layers of hybrid"), ("minimax", "layers of linear_attention")]
)
def test_a_recurrence_that_is_not_known_is_refused(family, reason):
    ok, why = packable(tiny_model(family))
    assert not ok
    assert reason in why


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_rows_without_common_beginnings_are_apart(family):
    model = make(family)
    rows = [torch.randint(2, 97, (n,)).tolist() for n in (40, 9, 3)]
    rows = [[i + 2, *row] for i, row in enumerate(rows)]
    b = Batch.of(rows, [len(row) - 1 for row in rows])
    assert len(b.pack(prune=False).tokens) == sum(map(len, rows))
    one_at_a_time = alone(model, b, TEMPERATURE)
    exact = alone(in_fp64(model), b, TEMPERATURE)
    assert_as_accurate(packed(model, b, TEMPERATURE)[0], exact[0], one_at_a_time[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_lora_with_checkpointing(family, reentrant):
    """The layers run again in backward, where the tree must reach them, too."""
    names = ["in_proj", "x_proj"] if family == "falcon_mamba" else "all-linear"  # PEFT refuses its out_proj
    targets = LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    model, b = get_peft_model(make(family), targets), long_batch()
    expected = backward(model, b, packed(model, b, TEMPERATURE))
    stock = backward(model, b, padded(model, b, TEMPERATURE))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ours = backward(model.train(), b, packed(model, b, TEMPERATURE))
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_bfloat16(family):
    model, b = make(family, torch.bfloat16), long_batch()
    exact = alone(copy.deepcopy(model).float(), b, TEMPERATURE)
    assert_as_accurate(packed(model, b, TEMPERATURE)[0], exact[0], padded(model, b, TEMPERATURE)[0])


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_autocast(family):
    """TRL's default precision."""
    model, b = make(family), long_batch()
    exact = alone(model, b, TEMPERATURE)
    with torch.autocast("cpu", torch.bfloat16):
        assert packable(model, check=True) == (True, "")
        ours, stock = packed(model, b, TEMPERATURE), padded(model, b, TEMPERATURE)
    assert_as_accurate(ours[0], exact[0], stock[0])


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_without_a_tree_a_family_is_what_it_was(family):
    model, b = make(family), long_batch()
    before = padded(model, b, TEMPERATURE)[0], model.generate(b.input_ids[:1, -5:], max_new_tokens=6, do_sample=False)
    prepare(model)
    flashpo.stats(reset=True)
    assert torch.equal(padded(model, b, TEMPERATURE)[0], before[0])
    assert torch.equal(model.generate(b.input_ids[:1, -5:], max_new_tokens=6, do_sample=False), before[1])
    assert torch.equal(padded(copy.deepcopy(model), b, TEMPERATURE)[0], before[0])


def test_compile():
    model, b = tiny_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]), long_batch()
    expected = packed(model, b, TEMPERATURE)
    ours = packed(torch.compile(model, dynamic=True, backend="eager"), b, TEMPERATURE)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
