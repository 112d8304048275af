"""README's table of what to expect: one line per measurement, including small gains, from the newest records.

A line names a title of `flashpo bench` and two of its variants that are compared. The numbers come from the records.
"""

from typing import NamedTuple


class Line(NamedTuple):
    what: str
    model: str
    prompt: str  # tokens
    group: str  # completions per prompt
    device: str
    title: str
    stock: str = "stock TRL"
    ours: str = "flashpo run"


CPU, GPU = "2 CPU threads", "H200"
FP32, AUTOCAST, BF16 = "42M, float32", "1.7B, autocast to bfloat16", "1.7B, bfloat16"
PASS = {"stock": "TRL, padded pass", "ours": "FlashPO pass"}
GROWTH = "training pass over the prompt's length with 4 completions"


def _of_growth(prompt: int) -> Line:
    return Line("training pass", FP32, f"{prompt:,}", "4", CPU, GROWTH, ours=f"prompt of {prompt} tokens")


LINES = (
    Line("GRPO step", AUTOCAST, "2,048", "8", GPU,
         "GRPO step, 1.7B model, prompt=2048, completions mean length 256 on gpu-h200"),
    Line("GRPO step", FP32, "1,024", "8", CPU, "GRPO step, 42M model, prompt=1024, completions mean length 48"),
    Line("GRPO step", FP32, "256", "8", CPU, "GRPO step, 42M model, prompt=256, completions mean length 48"),
    Line("GRPO step, completions of full length", FP32, "256", "8", CPU,
         "GRPO step, 42M model, prompt=256, completions all of 128 tokens"),
    Line("training pass", BF16, "2,048", "8", GPU, "training pass, GRPO, prompt 2048 on gpu-h200", **PASS),
    _of_growth(4096),
    _of_growth(128),
    Line("training pass of a hybrid", "35M, float32", "1,024", "8", CPU, "training pass of a hybrid, prompt 1024",
         **PASS),
    Line("DPO pass, answers of one length", FP32, "512", "a pair", CPU, "training pass, DPO, prompt 512", **PASS),
    Line("training pass, nothing shared, no padding", FP32, "256", "1", CPU,
         "training pass, nothing shared, no padding", **PASS),
    Line("the same, TRL with FlashPO's LM head ÷ FlashPO", FP32, "256", "1", CPU,
         "training pass, nothing shared, no padding", "padded, FlashPO's head pass", "FlashPO pass"),
)  # fmt: skip


def rows(tables: dict) -> list[str]:
    """The rows in Markdown; `tables` maps a title to (document, records)."""
    head = [
        "what",
        "model",
        "prompt",
        "completions of a prompt",
        "device",
        "time, TRL ÷ FlashPO",
        "memory, TRL ÷ FlashPO",
    ]
    lines = [head, ["---", "---", "---:", "---:", "---", "---:", "---:"]]
    for line in LINES:
        records = {record["variant"]: record for record in tables[line.title][1]}
        ours = records[line.ours]
        time, memory = ours["times_flashpo"], ""
        if "peak_mb" in ours:
            stock = records[line.stock]
            time, memory = stock["times_flashpo"], f"{stock['peak_mb'] / ours['peak_mb']:.2g}"
        lines.append([line.what, line.model, line.prompt, line.group, line.device, f"{time:.3g}", memory])
    return ["| " + " | ".join(row) + " |" for row in lines]
