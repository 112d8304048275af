"""How the time of a training pass grows with the completions per prompt and with the prompt's length: token trees and
TRL.

Ours should grow with the number of distinct tokens, TRL's with the number of all tokens in the padded rows.
"""

from functools import partial

from flashpo.bench.packing import DTYPES, Samples, Workload, make_models
from flashpo.bench.timing import Device, Tables, compare

TITLE = "training pass over"
COMPLETION = 128  # tokens at most
OVER_COMPLETIONS = {"cpu": (512, (2, 4, 8, 16, 32)), "cuda": (2048, (2, 4, 8, 16, 32))}  # (prompt length, completions)
OVER_PROMPTS = {"cpu": (4, (128, 256, 512, 1024, 2048, 4096)), "cuda": (8, (512, 1024, 2048, 4096, 8192))}


def record(device: Device, models: tuple, workload: Workload) -> dict:
    model, stock = models
    samples = Samples(workload, model.config.vocab_size, device.name)
    ways = {"ours": partial(samples.train, samples.packed, model), "trl": partial(samples.train, samples.padded, stock)}
    seconds = compare(device, ways, budget=0.0, rounds=3)
    return {
        "variant": workload.title,
        "tokens": len(samples.tree().tokens),
        "tokens_padded": samples.input_ids.numel(),
        "ms": seconds["ours"] * 1e3,
        "ms_trl": seconds["trl"] * 1e3,
        "times_flashpo": seconds["trl"] / seconds["ours"],
    }


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    models = make_models(device, DTYPES[device.name][0])
    prompt, sizes = OVER_COMPLETIONS[device.name]
    size, prompts = OVER_PROMPTS[device.name]
    over_sizes = [Workload(f"{n} completions", 1, n, prompt, COMPLETION) for n in sizes]
    over_prompts = [Workload(f"prompt of {n} tokens", 1, size, n, COMPLETION) for n in prompts]
    for what, workloads in (
        (f"completions of a prompt of {prompt} tokens", over_sizes),
        (f"the prompt's length with {size} completions", over_prompts),
    ):
        yield f"{TITLE} {what}", partial(map, partial(record, device, models), workloads[: 2 if quick else None])


def draw(axes, records: list[dict]) -> None:
    names = [record["variant"] for record in records]
    for column, name, colour in (("ms_trl", "TRL, padded", "tab:gray"), ("ms", "FlashPO, token tree", "tab:blue")):
        axes.plot(names, [record[column] / 1e3 for record in records], "o-", color=colour, label=name)
    axes.set(ylabel="seconds, forward and backward", ylim=(0, None))
    axes.tick_params("x", rotation=20)
    axes.legend()
