"""The examples: their data, tokenizers and models, and two steps of each script, stock and in `flashpo run`."""

import argparse
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sys.path.insert(0, str(EXAMPLES))
    import arithmetic

    sys.path.remove(str(EXAMPLES))
    return arithmetic.save(tmp_path_factory.mktemp("model"), vocab_size=64, hidden_size=32, layers=1)


def run(python, script, out, model, *args):
    small = ["--model", model, "--output-dir", out, "--max-steps", "2", "--batch-size", "8"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *python, EXAMPLES / script, *small, *args],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row], result.stderr


def test_problems_are_right_and_reproducible():
    import arithmetic

    assert arithmetic.problems(5, seed=3) == arithmetic.problems(5, seed=3)
    finished = 0
    for row in arithmetic.problems(200, seed=0):
        terms = [int(term) for term in row["prompt"].rstrip("=").split("+")]
        assert int(row["answer"]) == sum(terms)
        totals = [int(total) for total in row["completion"].split(",")]
        assert totals == [sum(terms[:n]) for n in range(2, len(totals) + 2)]
        finished += len(totals) == len(terms) - 1
    assert 70 < finished < 130


def test_tokenizer_gives_the_text_back():
    import arithmetic

    tokens = arithmetic.tokenizer()
    row = arithmetic.problem(random.Random(0))
    text = row["prompt"] + row["completion"]
    ids = tokens(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokens.decode(ids) == text
    assert tokens.unk_token_id not in ids


def test_head_has_the_share_of_qwen3():
    import arithmetic

    model = arithmetic.model()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    assert 0.24 < head / (head + layers) < 0.28  # Qwen3-0.6B: 0.26


def test_reward_is_for_the_last_number():
    import grpo

    completions = ["7,13", "7", "", "13,7", [{"role": "assistant", "content": "so it is 13"}]]
    assert grpo.exact_answer(completions, answer=["13"] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_sft(model, tmp_path):
    stock, _ = run([], "sft.py", tmp_path / "stock", model)
    ours, said = run(["-m", "flashpo", "run"], "sft.py", tmp_path / "flashpo", model)
    assert "token trees, LM head by FlashPO" in said
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in stock], rel=1e-4)


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_dataset_from_a_file(script, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+2=", "completion": "3", "answer": "3"}\n' * 16)
    rows = importlib.import_module(script).load(argparse.Namespace(dataset=str(data)))
    assert len(rows) == 16
    assert rows[0] == {"prompt": "1+2=", "completion": "3", "answer": "3"}


def test_grpo(model, tmp_path):
    few = "--num-generations", "4", "--max-completion-length", "8"
    for python in [], ["-m", "flashpo", "run"]:
        out = tmp_path / (python[-1] if python else "stock")
        history, said = run(python, "grpo.py", out, model, *few)
        assert [0 <= row["reward"] <= 1 for row in history] == [True, True]
        assert ("rollout engine, token trees, LM head, loss, advantages by FlashPO" in said) == bool(python)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ppo(critic, model, tmp_path):
    history, _ = run([], "ppo.py", tmp_path, model, "--critic", critic, "--max-completion-length", "8")
    assert "reward" in history[0]
    assert "reward" not in history[1]  # the second minibatch of the same generations
    assert (tmp_path / "critic.safetensors").exists()


def test_colours(tmp_path):
    """TRL's own script trains on the pictures, and is told that they were shared."""
    import colours

    assert colours.named([[{"content": "red red ."}], [{"content": ""}]], ["red", "blue"]) == [2 / 3, 0.0]
    colours.save(tmp_path, rows=16)
    few = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4"]
    command = [sys.executable, "-m", "flashpo", "run", "trl", "grpo", "--config", tmp_path / "grpo.yaml", *few]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=EXAMPLES.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rollout engine, token trees, LM head, loss, advantages by FlashPO" in done.stderr
    assert "equal images once in generation and in token trees" in done.stderr
    assert "left to TRL" not in done.stderr


NOTEBOOKS = """
import json, sys
for path in sys.argv[1:]:
    cells, names = json.load(open(path))["cells"], {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path, "exec"), names)
"""


def test_notebooks():
    """Their code cells, one after the other, in one process for both."""
    paths = sorted(EXAMPLES.glob("*.ipynb"))
    assert [path.name for path in paths] == ["dpo.ipynb", "grpo.ipynb"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NOTEBOOKS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=EXAMPLES, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, parts in (("DPO", "token trees, LM head"), ("GRPO", "rollout engine, token trees, LM head, loss, adv")):
        assert f"flashpo: flashpo.trl.{name}Trainer runs in the place of trl.{name}Trainer\n" in done.stderr
        assert re.search(rf"flashpo: {name}Trainer \(flashpo.trl.\w+\): {parts}", done.stderr)
    assert "all agree" in done.stdout
