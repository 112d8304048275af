"""Rollouts against transformers' `generate` and its continuous batching, in TRL's setting: groups of completions, and
no cache from earlier calls.

The floor of a rollout is the sum of two times that are measured in the same run: its GEMMs at the rate of a large one
(or reading their weights once per step, if that takes longer), and reading every distinct key and value once per step
at the rate of a copy.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from flashpo.bench.shapes import random_model
from flashpo.bench.timing import Device, Tables, compare, dtype_name
from flashpo.rollout import RolloutEngine, SamplingParams


class Case(NamedTuple):
    dtype: torch.dtype
    prompt: int
    new: int
    ragged: bool = False  # stop tokens end completions at a third of `new` on average
    model: str = "42M"  # a name in SHAPES
    prompts: int = 4
    group: int = 8  # completions per prompt

    @property
    def title(self) -> str:
        marks = " ragged" * self.ragged + f" {self.model}" * (self.model != "42M")
        marks += f" batch={self.prompts * self.group}" * (self.prompts != 4)
        return f"rollout {dtype_name(self.dtype)} prompt={self.prompt} new={self.new}{marks}"


def _on_gpu(model: str, prompts: int, prompt: int, new: int = 128, ragged: bool = False) -> Case:
    return Case(torch.bfloat16, prompt, new, ragged, model, prompts, 8)


CASES = {
    "cpu": [
        *(Case(dtype, p, n) for dtype in (torch.float32, torch.bfloat16) for p in (256, 1024) for n in (64, 256)),
        Case(torch.float32, 256, 256, ragged=True),
        Case(torch.float32, 32, 64, model="tiny"),
    ],
    "cuda": [
        *(_on_gpu(model, *case) for case in ((8, 512), (8, 2048), (32, 512)) for model in ("1.7B", "0.6B", "4B")),
        _on_gpu("1.7B", 8, 512, new=1024, ragged=True),
    ],
}
LONG = {"cpu": 64, "cuda": 128}  # cases with more new tokens than this are long


def records(device: Device, case: Case, with_peers: bool) -> Iterator[dict]:
    torch.manual_seed(0)
    model = random_model(case.model, case.dtype, device.name)
    config = model.config
    prompts = torch.randint(config.vocab_size, (case.prompts, case.prompt)).tolist()
    stops = tuple(range(0, config.vocab_size, case.new // 3)) if case.ragged else ()
    engine = RolloutEngine(model, fallback="error")
    params = SamplingParams(n=case.group, max_new_tokens=case.new, stop_token_ids=stops)
    check(model, engine.generate(prompts[:1], params), case.dtype)

    repeated = [prompt for prompt in prompts for _ in range(case.group)]
    ids = torch.tensor(repeated, device=device.name)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": case.new, "pad_token_id": 0}
    settings |= {"eos_token_id": list(stops)} if stops else {}
    drawn: dict[str, int] = {}  # number of tokens that the last run of a variant sampled

    def ours():
        drawn["FlashPO"] = engine.generate(prompts, params).stats.tokens

    def generate():
        mask, settings_ = torch.ones_like(ids), GenerationConfig(**settings)
        new = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings_)[:, case.prompt :]
        ended = torch.isin(new, torch.tensor(stops or (-1,), device=new.device)).long().cumsum(1)
        drawn["generate"] = int(((ended == 0).sum(1) + 1).clamp(max=new.shape[1]).sum())

    def continuous_batching():
        out = model.generate_batch(repeated, GenerationConfig(**settings), ContinuousBatchingConfig())
        drawn["continuous batching"] = sum(len(x.generated_tokens) for x in out.values())

    variants = {"FlashPO": ours, "generate": generate}
    # Other cases take minutes
    affordable = case.new <= LONG[device.name] and case.prompt <= 1024 and len(repeated) <= 64
    if with_peers and not case.ragged and affordable:
        variants["continuous batching"] = continuous_batching
    gemm = torch.randn(2, 2048, 2048, device=device.name).to(case.dtype)
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    calibration = {"GEMM": lambda: torch.mm(gemm[0], gemm[1]), "copy": lambda: target.copy_(source)}
    rates = compare(device, calibration, budget=0.5)
    seconds = compare(device, variants, budget=0.0, rounds=2 if device.cuda else 3)
    flops, bandwidth = 2 * 2048**3 / rates["GEMM"], 2 * source.numel() / rates["copy"]

    stats = engine.generate(prompts, params).stats
    weights = sum(p.numel() for p in model.parameters())
    token_bytes = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * case.dtype.itemsize
    read = case.prompts * case.prompt + stats.mean_rows * case.new / 2  # distinct keys and values per step
    step = max(2 * weights * stats.mean_rows / flops, weights * case.dtype.itemsize / bandwidth)
    floor = 2 * weights * case.prompts * case.prompt / flops + stats.steps * (step + read * token_bytes / bandwidth)
    for name, time in seconds.items():
        rate = drawn[name] / time
        ours_rate = drawn["FlashPO"] / seconds["FlashPO"]
        yield {
            "variant": name,
            "tokens_per_s": rate,
            "times_flashpo": ours_rate / rate,
            "ms": time * 1e3,
            "ms_per_step": time / case.new * 1e3,
            "share_of_floor": floor / time if not case.ragged else None,
            "cache_mb": (
                stats.peak_cache_bytes if name == "FlashPO" else len(repeated) * (case.prompt + case.new) * token_bytes
            )
            / 2**20,
            "gemm_gflops": flops / 1e9,
            "copy_gb_per_s": bandwidth / 1e9,
        }


@torch.no_grad()
def check(model, rollouts, dtype: torch.dtype) -> None:
    """Compare the log-probs of two completions with those of a plain forward."""
    for i in range(2):
        prompt, completion = rollouts.prompt_ids[i], rollouts.completion_ids[i]
        logits = model(torch.tensor([prompt + completion], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
        exact = logits.log_softmax(-1).gather(1, torch.tensor(completion, device=model.device)[:, None])[:, 0]
        error = (torch.tensor(rollouts.logprobs[i], device=model.device) - exact).abs().max().item()
        if error > (1e-4 if dtype == torch.float32 else 0.3):
            raise AssertionError(f"log-probs of the rollout are off by {error} nats")


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    short = [case for case in CASES[device.name] if case.new <= LONG[device.name]]
    return tables_of(short, device, with_peers, quick)


def long_tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    long = [case for case in CASES[device.name] if case.new > LONG[device.name]]
    return tables_of(long, device, with_peers, quick)


def tables_of(cases: list[Case], device: Device, with_peers: bool, quick: bool) -> Tables:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for case in cases[: 1 if quick else None]:
        yield case.title, partial(records, device, case, with_peers)
        device.collect()
