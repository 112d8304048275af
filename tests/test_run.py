"""`python -m flashpo.run` and `accelerate launch -m flashpo.run`: an unmodified script, and the report at the end."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

pytest.importorskip("trl")
from trl_models import model_path

from flashpo.run import main

# Its end: a process that leaves its group at exit may be aborted by gloo's threads, and where DDP's reducer is the last
# to leave a group, the group is destroyed with the GIL held, for which gloo's threads may be waiting.
SCRIPT = """
import gc, os, sys
assert "trl" not in sys.modules and "transformers" not in sys.modules, "a script may set its environment first"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import neighbour  # of the script's own folder
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer as stock

def main():
    rows = [{"prompt": "a b ", "completion": f"{w} d e"} for w in "abcdefgh"]
    settings = dict(use_cpu=True, bf16=False, max_steps=1, report_to="none", save_strategy="no")
    config = SFTConfig(output_dir=sys.argv[2], **settings)
    trainer = SFTTrainer(sys.argv[1], args=config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    accelerator = trainer.accelerator
    accelerator.free_memory()
    del trainer
    gc.collect()
    accelerator.end_training()
    print("trainers from", SFTTrainer.__module__, DPOTrainer.__module__, stock.__module__)
    open(os.path.join(sys.argv[2], "done by " + os.environ.get("RANK", "0")), "w").close()
    print("module", __name__, "argv", sys.argv[0].endswith("script.py"), len(sys.argv))
    if len(sys.argv) > 3:
        raise RuntimeError("the script failed")

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "neighbour.py").write_text("")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def run(*args, command=(sys.executable, "-m", "flashpo.run"), **env):
    command = [*command, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | env)


def test_script_is_accelerated_and_reported(script, tmp_path):
    switches = ["--no-rollout", "--verbose", "--verify", "1", "--report", tmp_path / "report.json"]
    done = run(*switches, script, model_path(), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    start = (
        "flashpo.trl.SFTTrainer runs in the place of trl.SFTTrainer, with --no-rollout",
        "SFTTrainer: token trees yes",
    )
    for line in (
        *start,
        "flashpo 0.1.0, torch ",
        "  1 steps in ",
        "  training pass ",
        "  tokens scored and trained on: ",
    ):
        assert done.stderr.count(f"flashpo: {line}") == 1, line
    assert re.search(r"flashpo: \d+ comparisons, all agree", done.stderr)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["finished"]
    assert report["switches"]["rollout"] is False
    (trainer,) = report["trainers"]
    assert trainer["class"] == "flashpo.trl.sft.SFTTrainer"
    assert trainer["steps"] == 1
    assert set(trainer["phases"]) == {"training", "head", "rest"}
    assert report["operators"]["linear_logprob_bwd"]
    assert "module __main__ argv True 3" in done.stdout
    assert "trainers from flashpo.trl.sft flashpo.trl.dpo trl.trainer.sft_trainer" in done.stdout
    assert "flashpo: in the place of TRL's classes: DPOTrainer, SFTTrainer" in done.stderr
    assert "flashpo: linear_logprob_partial: " in done.stderr
    assert "flashpo: linear_logprob_bwd: " in done.stderr
    assert "WARNING: none" not in done.stderr


def test_the_command_line_of_trl(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "a b ", "completion": "c d"}\n' * 8)
    config = tmp_path / "sft.yaml"
    config.write_text(f"model_name_or_path: {model_path()}\ndataset_name: {data}\noutput_dir: {tmp_path / 'out'}\n")
    settings = ["--use_cpu", "--bf16", "false", "--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    done = run("trl", "sft", "--config", config, *settings)
    assert done.returncode == 0, done.stderr
    assert "flashpo: in the place of TRL's classes: SFTTrainer" in done.stderr
    assert "flashpo: SFTTrainer (flashpo.trl.sft): token trees, LM head by FlashPO\n" in done.stderr
    assert "linear_logprob_bwd" not in done.stderr, "operators are told under --verbose"


GRPO_SCRIPT = """
import sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

settings = dict(use_cpu=True, bf16=False, max_steps=1, report_to="none", save_strategy="no", num_generations=4)
config = GRPOConfig(sys.argv[2], per_device_train_batch_size=4, max_completion_length=8, **settings)
data = Dataset.from_list([{"prompt": "a b c"}])
reward = lambda completions, **_: [0.0, 1.0, 0.0, 1.0]
GRPOTrainer(sys.argv[1], reward_funcs=reward, args=config, train_dataset=data).train()
"""


def test_a_grpo_script_generates_with_the_engine_and_trains_on_trees(tmp_path):
    path = tmp_path / "grpo.py"
    path.write_text(GRPO_SCRIPT)
    done = run(path, model_path(), tmp_path / "out", FLASHPO_OPTIONS="--verbose")
    assert done.returncode == 0, done.stderr
    for line in (
        "GRPOTrainer (flashpo.trl.grpo): rollout engine, token trees, LM head, loss, advantages by FlashPO\n",
        "in the place of TRL's classes: GRPOTrainer",
        "decode_attention_fwd: ",
        "sample_rows: ",
        "tree_attention_bwd: ",
    ):
        assert f"flashpo: {line}" in done.stderr


def test_trls_own_distillation_script(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "a b c"}\n' * 8)
    models = ["--model_name_or_path", model_path(), "--teacher_model_name_or_path", model_path("gemma2")]
    settings = ["--use_cpu", "--bf16", "false", "--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    options = ["--max_completion_length", "6", "--dataset_name", data, "--output_dir", tmp_path / "out"]
    done = run("trl", "distillation", *models, *settings, *options)
    assert done.returncode == 0, done.stderr
    said = "DistillationTrainer (flashpo.trl.distillation): rollout engine, token trees, LM head by FlashPO\n"
    assert f"flashpo: {said}" in done.stderr


UNKNOWN = """
import sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import trl.trainer.utils

class Mine(Trainer):
    pass

data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8)
args = TrainingArguments(sys.argv[2], use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
Mine(AutoModelForCausalLM.from_pretrained(sys.argv[1]), args, train_dataset=data).train()
"""


def test_a_trainer_that_is_not_known(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(UNKNOWN)
    done = run(path, model_path(), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "flashpo: Mine (__main__): nothing by FlashPO; FlashPO does not know this trainer\n" in done.stderr
    assert "flashpo: Mine (__main__) is not replaced: FlashPO does not know this trainer\n" in done.stderr
    assert "WARNING: none of its operators ran in this process: see the trainers" in done.stderr


def test_report_comes_after_an_exception_too(script, tmp_path):
    done = run(script, model_path(), tmp_path / "out", "fail")
    assert done.returncode == 1
    assert "RuntimeError: the script failed" in done.stderr
    assert "flashpo: the script did not come to its end; what ran until then\n" in done.stderr
    assert "flashpo: SFTTrainer (flashpo.trl.sft): token trees, LM head by FlashPO\n" in done.stderr


def test_warns_when_nothing_ran(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("import sys; print(sys.argv[1:]); sys.exit()")
    done = run(path, "--flag", "-m")
    assert done.returncode == 0
    assert "['--flag', '-m']" in done.stdout
    assert "WARNING: none of its operators ran" in done.stderr
    assert "did not import a TRL trainer" in done.stderr


@pytest.mark.parametrize(("end", "status"), [("sys.exit('wrong')", 1), ("1 / 0", 1)])
def test_no_diagnosis_of_a_script_that_failed(tmp_path, end, status):
    """Its own error is the cause that nothing ran."""
    path = tmp_path / "fails.py"
    path.write_text(f"import sys; {end}")
    done = run(path)
    assert done.returncode == status
    assert "did not come to its end; none of its operators ran in this process until then" in done.stderr
    assert "did not import" not in done.stderr
    assert "WARNING" not in done.stderr


TOLD_TO_STOP = """
import os, signal, sys, time
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        print("a step")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

settings = dict(use_cpu=True, bf16=False, max_steps=9, report_to="none", save_strategy="no")
rows = [{"prompt": "a b ", "completion": f"{w} d e"} for w in "abcdefgh"]
data = Dataset.from_list(rows)
SFTTrainer(sys.argv[1], args=SFTConfig(sys.argv[2], **settings), train_dataset=data, callbacks=[Stops()]).train()
"""


def test_report_comes_after_sigterm(tmp_path):
    """And whoever started the process sees that a signal has ended it."""
    path = tmp_path / "stops.py"
    path.write_text(TOLD_TO_STOP)
    done = run(path, model_path(), tmp_path / "out")
    assert done.returncode == -signal.SIGTERM
    assert "a step" in done.stdout
    assert "flashpo: the script did not come to its end; what ran until then\n" in done.stderr
    assert "flashpo: SFTTrainer (flashpo.trl.sft): token trees, LM head by FlashPO\n" in done.stderr
    assert "flashpo:   1 steps in " in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_alone(script, tmp_path):
    """It ends before the training, with the verdict."""
    done = run("verify", script, model_path(), tmp_path / "out", command=(sys.executable, "-m", "flashpo"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"flashpo: \d+ comparisons, all agree; .*", done.stderr.splitlines()[-1])
    assert "train_runtime" not in done.stdout
    path = tmp_path / "plain.py"
    path.write_text("")
    done = run("verify", path, command=(sys.executable, "-m", "flashpo"))
    assert done.returncode == 1
    assert done.stderr == "flashpo verify: the script trained nothing, so that nothing was verified\n"


WRONG = {
    "a command that TRL does not have": (["trl", "foo"], "trl has no command 'foo'; it has "),
    "a helper of TRL's": (["trl", "utils"], "trl has no command 'utils'"),
    "no switch": (["--no-tree", "script.py"], "unrecognized arguments: --no-tree"),
    "no number": (["--verify", "x", "script.py"], "argument --verify: invalid int value: 'x'"),
    "a negative number": (["--verify", "-1", "script.py"], "verify must be a number of steps"),
    "a variable": (["script.py"], "FLASHPO_OPTIONS: unrecognized arguments: --fast"),
    "no backend": (["script.py"], "FLASHPO_BACKEND must be one of ('native', 'triton', 'torch') or None, got 'cuda'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_one_line(case, monkeypatch, capsys):
    args, message = WRONG[case]
    if case == "no backend":
        monkeypatch.setenv("FLASHPO_BACKEND", "cuda")
    if case == "a variable":
        monkeypatch.setenv("FLASHPO_OPTIONS", "--no-head --fast")
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flashpo run: {message}")
    assert len(said.splitlines()) == 1


def test_no_such_module():
    done = run("-m", "json.such")
    assert done.returncode == 2
    assert done.stderr == "flashpo run: no such module: json.such\n"


def test_an_option_that_only_our_configurations_have(tmp_path):
    """TRL's script refuses it; a line says where it belongs."""
    settings = ["--use_cpu", "--bf16", "false", "--output_dir", tmp_path, "--dataset_name", "x"]
    done = run("trl", "grpo", "--model_name_or_path", "x", *settings, "--rollout", "generate")
    assert done.returncode == 1
    assert "flashpo: --rollout is an option of the configurations in flashpo.trl" in done.stderr
    assert "did not import" not in done.stderr


def test_module(tmp_path):
    done = run("-m", "trl.scripts.sft", "--help")
    assert done.returncode == 0
    assert "--model_name_or_path" in done.stdout


def test_usage():
    assert run().returncode == 2
    missing = run("missing.py")
    assert missing.returncode == 2
    assert "no such file: missing.py" in missing.stderr


def test_accelerate_launch(script, tmp_path):
    launch = os.path.join(os.path.dirname(sys.executable), "accelerate")
    options = ("launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "-m", "flashpo.run")  # fmt: skip
    done = run(script, model_path(), tmp_path / "out", command=(launch, *options))
    assert done.returncode == 0, done.stderr
    assert "module __main__" in done.stdout
    assert "token trees, LM head by FlashPO" in done.stderr


def test_two_processes_and_one_report(script, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(script, model_path(), tmp_path / "out", command=(*torchrun, "-m", "flashpo.run"))
    assert done.returncode == 0, done.stderr
    assert {"done by 0", "done by 1"} <= set(os.listdir(tmp_path / "out"))
    assert done.stderr.count("token trees, LM head by FlashPO") == 1, "by the first process"
