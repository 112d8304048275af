"""The code blocks of the documentation. Python blocks run on tiny models; where they cannot run, their imports and
keyword arguments are checked. Commands and their options must exist.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex

import pytest
import torch
from pages import PAGES, ROOT, Block, blocks, name_of

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_SHELL = [page for page in PAGES if blocks(page, "sh")]


# What blocks may take for granted. A page's text says what such a name is where that is not obvious.


def tensors() -> dict:
    """Of a batch of 4 sequences with 5 completion tokens, in 2 groups."""
    torch.manual_seed(0)
    numbers = lambda *shape: torch.randn(*shape)  # noqa: E731
    prompts = torch.randint(5, 40, (2, 4)).repeat_interleave(2, 0)
    ids = torch.cat([prompts, torch.randint(5, 40, (4, 5))], 1)
    mask = torch.ones(4, 5, dtype=torch.long)
    return {
        "hidden": numbers(4, 5, 16), "lm_head": torch.nn.Linear(16, 40), "target": torch.randint(40, (4, 5)),
        "teacher_hidden": numbers(4, 5, 8), "teacher_head": torch.nn.Linear(8, 40), "logits": numbers(4, 5, 40),
        "logprob": -numbers(4, 5).exp(), "old_logprob": -numbers(4, 5).exp(), "mask": mask,
        "rewards": torch.tensor([0.0, 1.0, 0.5, 0.5]), "group": torch.tensor([0, 0, 1, 1]), "advantage": numbers(4),
        "token_rewards": numbers(4, 5), "values": numbers(4, 5), "ref_chosen": numbers(4), "ref_rejected": numbers(4),
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
        "prompts": prompts.tolist(), "eos": 1,
    }  # fmt: skip


def _model(seed: int = 0):
    from trl_models import load

    torch.manual_seed(seed)
    return load("qwen3")


def _trainer():
    from trl_models import make_trainer

    import flashpo.trl

    return make_trainer("GRPO", flashpo.trl)


def _dataset():
    from datasets import Dataset
    from trl_models import DATA

    return Dataset.from_list(DATA["GRPO"])


def _reward(completion_ids, **kwargs):
    from trl_models import reward

    return reward(None, completion_ids)


def _engine():
    from flashpo.rollout import RolloutEngine

    return RolloutEngine(_model())


MADE = {  # when a block asks for it
    "model": _model,
    "teacher": _model,
    "trainer": _trainer,
    "dataset": _dataset,
    "reward": lambda: _reward,
    "engine": _engine,
}


def namespace(code: list[ast.Module]) -> dict:
    nodes = [node for tree in code for node in ast.walk(tree) if isinstance(node, ast.Name)]
    first = {node.id: node for node in reversed(nodes)}  # a name that a block binds before it is read is the block's
    wanted = {name for name, node in first.items() if isinstance(node.ctx, ast.Load)}
    return tensors() | {name: make() for name, make in MADE.items() if name in wanted}


def parsed(block: Block, page) -> ast.Module:
    return ast.increment_lineno(ast.parse(block.code, name_of(page)), block.line)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, with the names of those before."""
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    code = [parsed(block, page) for block in found]
    for tree, block in zip(code, found):
        if not block.runs:
            check(tree)
    code = [tree for tree, block in zip(code, found) if block.runs]
    text = "".join(map(ast.unparse, code))
    if "flashpo.verl" in text:
        pytest.importorskip("verl")
    if "flashpo.trl" in text or "model" in text:
        pytest.importorskip("trl")
        import transformers.training_args as arguments

        # TRL's default is bfloat16, which a configuration without use_cpu=True wants a GPU for
        monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: True)
    names = namespace(code)
    for tree in code:
        exec(compile(tree, name_of(page), "exec"), names)


def check(tree: ast.Module) -> None:
    """Imports what the block imports, and compares the keywords of its calls with the signatures."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = _imported(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                _imported(alias.name)
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = importlib.import_module(alias.name if alias.asname else root)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := _resolved(node.func, names)) is not None:
            unknown = {keyword.arg for keyword in node.keywords} - _keywords(called) - {None}
            assert not unknown, f"{ast.unparse(node.func)} takes no {', '.join(sorted(unknown))}"


def _imported(module: str):
    for root in (module.partition(".")[0], *(["verl"] if module.startswith("flashpo.verl") else [])):
        if importlib.util.find_spec(root) is None:
            pytest.skip(f"{root} is not installed")
    return importlib.import_module(module)


def _resolved(func: ast.expr, names: dict):
    if isinstance(func, ast.Name):
        return names.get(func.id)
    if isinstance(func, ast.Attribute) and (owner := _resolved(func.value, names)) is not None:
        return getattr(owner, func.attr)
    return None


def _keywords(called) -> set[str]:
    """Of a class also those of the constructors that it passes its keywords on to."""
    functions = [called]
    if inspect.isclass(called):
        functions = [vars(cls)["__init__"] for cls in called.__mro__[:-1] if "__init__" in vars(cls)]
    found: set[str] = set()
    for function in functions:
        parameters = inspect.signature(function).parameters
        found |= parameters.keys()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def test_a_keyword_that_does_not_exist_is_found():
    with pytest.raises(AssertionError, match="policy_loss takes no losss"):
        check(ast.parse("import flashpo\nflashpo.policy_loss(1, 2, 3, 4, losss='dapo')"))
    with pytest.raises(AttributeError, match="policy_los"):
        check(ast.parse("from flashpo import policy_los"))


# Commands

PACKAGE = ROOT / "python" / "flashpo"
SOURCES = "".join(file.read_text() for file in sorted(PACKAGE.rglob("*.py")))
CLI = (PACKAGE / "cli.py").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
OF_OTHERS = {"VERL_USE_EXTERNAL_MODULES", "CMAKE_ARGS", "TRITON_INTERPRET"}


def checked_command(line: str) -> None:
    """Raises an AssertionError where a command, an option, a file or a variable of ours does not exist."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        variable = words.pop(0).partition("=")[0]
        text = SOURCES + (ROOT / "CMakeLists.txt").read_text()
        assert variable in OF_OTHERS or variable in text, f"nobody reads {variable}"
    if not words:
        return
    command, *rest = words
    if command == "make":
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make has no target {target}"
    elif command == "flashpo":
        _check_flashpo(*rest)
    elif command == "pip":
        for extra in re.findall(r"\[(\w+)\]", line.partition("#")[0]):
            assert re.search(rf"^{extra} = ", PROJECT, re.MULTILINE), f"there is no extra {extra}"
    elif command == "accelerate":
        assert rest[0] == "launch"
        assert "-m" not in rest or importlib.util.find_spec(rest[rest.index("-m") + 1])
    elif command.endswith("python") and rest[0] == "-m":
        if rest[1].startswith("flashpo"):
            assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
    else:
        script = ROOT / (rest[0] if command.endswith("python") else command)
        assert script.exists(), f"unknown command {line!r}"


def _check_flashpo(command: str, *rest: str) -> None:
    assert f'"{command}"' in CLI, f"flashpo has no command {command}"
    options = [word for word in rest if word.startswith("--")]
    if command == "run":
        script = next((i for i, word in enumerate(rest) if not word.startswith("-")), len(rest))
        options = [word for word in rest[:script] if word.startswith("--")]
        examples = [word for word in rest[script : script + 1] if word.startswith("examples/")]
        assert all((ROOT / example).exists() for example in examples)
    text = SOURCES
    if command == "bench":
        from flashpo.bench import cases, run

        text = inspect.getsource(run)
        assert not rest or rest[0].startswith("-") or rest[0] in cases.SUITES, f"no suite {rest[0]}"
    for option in options:
        written = re.search(rf"(?<![\w-]){option}(?![\w-])", text)
        assert option == "--help" or written, f"flashpo {command} has no option {option}"


@pytest.mark.parametrize("page", WITH_SHELL, ids=name_of)
def test_commands(page):
    for block in blocks(page, "sh"):
        for line in block.code.splitlines():
            checked_command(line)


def test_inline_commands():
    """`flashpo ...` in a sentence."""
    found = {text for page in PAGES for text in re.findall(r"`(flashpo [a-z][^`]*)`", page.read_text())}
    assert len(found) > 5
    for line in sorted(found):
        checked_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "flashpo fly", "flashpo doctor --chekc", "flashpo bench linear_logprobs", "flashpo bench rollout --peer",
        "make coffee", "pip install '.[trll]'", "python tools/no.py", "FLASHPO_BAKEND=torch flashpo doctor",
        "python -m flashpo.bench.no",
    ],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(line):
    with pytest.raises(AssertionError):
        checked_command(line)
