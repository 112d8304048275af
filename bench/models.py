"""`python -m flashpo.bench.models`: which model families of transformers run on the rollout engine and on token trees.

Every family of causal language models that can be made small is built with random weights and tried. The engine's
self-check (flashpo.rollout.parity) and that of packed training (flashpo.packing.parity) compare it with plain forwards.
The same is done for every multimodal class that writes text, with text only and with images of random pixels, and, on
one of the families, for every kind of PEFT adapter (flashpo.bench.adapters). Writes docs/models.md.
"""

import argparse
import logging
import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import peft
import torch
import transformers
from transformers.utils import logging as transformers_logging

from flashpo._causal_lm import CausalLM
from flashpo.bench import adapters
from flashpo.bench.tiny_images import TOKEN, image_model, pictures, type_ids
from flashpo.bench.tiny_models import FAMILIES, MULTIMODAL, tiny_model, tiny_multimodal
from flashpo.packing import Images
from flashpo.packing.images import ImageRows
from flashpo.packing.parity import image_parity
from flashpo.packing.support import packable, why_no_images
from flashpo.rollout import RolloutEngine, parity, support

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "models.md"
UNTRIED = "not tried"
TEXT = """# Models

Which of the {total} causal language model families of transformers {version} FlashPO accelerates. Each was built
small with random weights and compared with plain forwards, in fp32, by `python -m flashpo.bench.models`, which wrote
this page.

| | families |
|---|---|
| rollout engine | {rollout} (of these {hybrid} hybrids, whose layers keep states beside keys and values) |
| refused by the engine for a reason that it names beforehand | {refused} |
| refused by the engine's self-check: only a comparison finds them | {found} |
| packed, prefix-shared training | {packed} |
| not built small, so not tried here | {untried} |

## What happens with a model that is refused

It still trains and generates, as in TRL.

- **Rollout engine.** `RolloutEngine` warns once, with the reason, and answers by transformers' `generate` with the same
  sampler. `fallback="error"` raises instead.
- **Packed training.** The model trains on padded rows after one warning with the reason. `share_prefix=True` raises
  instead.

A family that is not in these tables, or a model with code of its own, is not used wrongly: it is compared with its own
forward first. Before the first rollout of each class and configuration, a rollout is compared with a plain forward.
Before the first training step of each class, configuration, dtype and set of adapters, log-probs and gradients of a
token tree are compared with those of padded rows. Both are done on the model itself and on a small fp32 twin of it.
`flashpo.packable(model, check=True)` asks for the second comparison.

## What is refused for any family

By the rollout engine:

- adapters of PEFT that do more than change layers, see [below](#adapters);
- weights on several devices, tensor parallelism, FSDP1, offloaded weights, ZeRO-3 weights that have not been gathered;
- sequences longer than the positions of the model, or, with dynamic or longrope scaling, longer than the length from
  which rotary frequencies depend on the longest row of a batch.

In packed training:

- adapters of PEFT that do more than change layers; an adapter on the LM head raises, as it does in TRL;
- an LM head that FSDP1 wraps by itself;
- `neftune_noise_alpha`.

Dropout draws once for a token that several rows share. While attention has dropout, a tree goes through the attention
of the model itself, one segment at a time. Two kinds of families get the tree as one dense mask: those whose attention
does not use the interface of transformers (Bloom, Falcon, MPT, XGLM), and those that pick their keys by a mask
(DeepSeek V3.2). Of these, trainers leave a batch padded whose rows share so little that the mask has more scores than
the rows.

Single batches train padded if they have an input that says something beside token ids, mask, labels and images (see
[images](images.md)).
So do batches of SFT, DPO and KTO with a mask that has gaps or more than two dimensions, with position ids that do not
count each row of a padding-free batch from 0, or with a label on padding or on the first token of a row that is padded
on the left.

Layers of quantised bases (bitsandbytes, torchao and others) compute as they do in training, also below LoRA. An LM head
that ZeRO-3 or FSDP2 shards is gathered while it is read, in forward and again in backward.

{adapters}
{multimodal}
## Families

| family | rollout engine | packed training |
|---|---|---|
{rows}

Not built small: {names}.
"""

ADAPTERS = """## Adapters

All {total} kinds of adapters of PEFT {version}, types and options of LoRA, on a small model in fp32 with random
adapter weights: most adapters are the identity before training, so that no mistake with them would show. "yes" says
that log-probs, and in training every gradient, are those of the forward of `PeftModel`. A model under an adapter that
is refused still trains: its rollouts come from transformers' `generate`, its rows are padded, after one warning that
names the reason.

What is refused is not looked up in a list. FlashPO calls a model's layers by itself, so it asks PEFT's own forward what
it does beside that: whether it changes the input, puts hooks on layers, switches adapters. And it tries one layer of
each kind on a copy with random weights: whether the output for a token depends on other tokens. The engine's self-check
is made again for every set of adapters.

| adapter | rollout engine | packed training | head of padded rows |
|---|---|---|---|
{rows}

Not tried: {untried}.
"""

MULTIMODAL_CLASSES = """## Multimodal classes

The {total} classes of AutoModelForImageTextToText. TRL loads them for their checkpoints also where the data are text
alone, so each was built small, with its towers, and tried with text: the rollout engine runs {rollout} of them, packed
training {packed}. What processors and TRL's collators add to text, such as token types of 0, is no obstacle where the
model says that it changes nothing. Then each was tried with images of random pixels, as far as it is known here how it
takes them ("not tried" says nothing of the class): the engine runs {rollout_images} with images, packed training
{packed_images} ([images.md](images.md)). A batch with images that a model does not take so is left to TRL's own code
after one warning: its prompts are answered by `generate`, its rows are padded. Batches of text in the same run are not.

| class | rollout engine | packed training | rollout with images | packed training with images |
|---|---|---|---|---|
{rows}

Not built small, or do not run without an image: {names}.
"""


class Row(NamedTuple):
    family: str
    rollout: str  # "yes", "yes, with states", or the reason against it
    packed: str  # "yes" or the reason against it
    found: bool  # whether only the self-check refused it


def try_family(family: str, build: Callable = tiny_model) -> Row:
    """Try one family. Raises if it cannot be built or does not run at all."""
    model = build(family)
    with torch.no_grad():
        model(input_ids=torch.arange(2, 12)[None], use_cache=False)
    answer = support(model)
    reason = parity._difference(model, _roll, None) if answer.ok else answer.reason
    rollout = reason or ("yes, with states" if answer.hybrid else "yes")
    return Row(family, rollout, _packed(model), found=answer.ok and bool(reason))


def _roll(model, prompts, params, images=None):
    engine = RolloutEngine(model, max_sequences=4, fallback="error", check=False)
    return engine.generate(prompts, params, images=images)


def _packed(model) -> str:
    answer = packable(model, check=True)
    return "yes" if answer.ok else answer.reason.split(": ", 1)[-1]


def cell(text: str) -> str:
    """A reason as it appears in the table, without the numbers of this particular run."""
    return " ".join(re.sub(r"\d\.\de[-+]\d+", "...", text).replace("|", "\\|").split())[:200]


def try_families(families: Sequence[str], build: Callable = tiny_model) -> tuple[list[Row], list[str]]:
    """Try all families; return the results, and the families that could not be built."""
    rows, untried = [], []
    for family in families:
        try:
            rows.append(try_family(family, build))
            print(*rows[-1][:3], sep=": ", flush=True)
        except Exception as error:
            untried.append(family)
            print(f"{family}: not built: {type(error).__name__}: {error}", flush=True)
    return rows, untried


def try_images(row: Row) -> tuple[str, str]:
    """Try rollout and packed training of a multimodal class with images. What failed with text only is not tried
    again."""
    if row.packed != "yes" and not row.rollout.startswith("yes"):
        return row.rollout, row.packed
    try:
        model = image_model(row.family)
    except Exception:  # of any kind, because it is transformers' own code
        return UNTRIED, UNTRIED
    if reason := why_no_images(CausalLM.of(model).backbone):
        return reason, reason
    try:
        fields, tokens = pictures(model, [[0], [1]])
    except ValueError:
        return UNTRIED, UNTRIED
    ids = torch.tensor([[5, 6, *[TOKEN] * tokens, *range(7, 20)]] * 2)
    live = torch.ones_like(ids)
    try:
        images = Images.of(model, ids, live, fields | type_ids(model, ids))
    except ValueError as error:
        return str(error), str(error)
    sample = ImageRows.of(images, ids, live)
    assert sample is not None
    rollout, packed = row.rollout, row.packed
    if rollout.startswith("yes"):
        rollout = parity.check_images(model, _roll, None, sample) or rollout
    if packed == "yes":
        packed = (image_parity(model, sample) or packed).split(": ", 1)[-1]
    return rollout, packed


def try_multimodal() -> str:
    """The page's section on multimodal classes."""
    rows, untried = try_families(MULTIMODAL, tiny_multimodal)
    found = [try_images(row) for row in rows]
    lines = [f"| {' | '.join(map(cell, (*row[:3], *images)))} |" for row, images in zip(rows, found)]
    counts = {
        "rollout_images": sum(rollout.startswith("yes") for rollout, _ in found),
        "packed_images": sum(packed == "yes" for _, packed in found),
    }
    return MULTIMODAL_CLASSES.format(**facts(rows, untried) | {"rows": "\n".join(lines)}, **counts)


def try_adapters() -> str:
    """The page's section on adapters."""
    rows, untried = [], []
    for name in adapters.NAMES:
        try:
            rows.append(adapters.try_adapter(name))
            print(*rows[-1], sep=": ", flush=True)
        except adapters.Untried as error:
            untried.append(f"{name} ({error})")
            print(untried[-1], flush=True)
    return ADAPTERS.format(
        total=len(adapters.NAMES),
        version=peft.__version__,
        rows="\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows),
        untried="; ".join(untried),
    )


def facts(rows: list[Row], untried: list[str]) -> dict[str, object]:
    """What the page says about a table of families: numbers, rows and names."""
    return dict(
        total=len(rows) + len(untried),
        rollout=sum(row.rollout.startswith("yes") for row in rows),
        packed=sum(row.packed == "yes" for row in rows),
        rows="\n".join(f"| {row.family} | {cell(row.rollout)} | {cell(row.packed)} |" for row in rows),
        names=", ".join(untried),
    )


def page(rows: list[Row], untried: list[str], about_adapters: str, about_multimodal: str) -> str:
    return TEXT.format(
        **facts(rows, untried),
        version=transformers.__version__,
        hybrid=sum(row.rollout == "yes, with states" for row in rows),
        refused=sum(not row.rollout.startswith("yes") and not row.found for row in rows),
        found=sum(row.found for row in rows),
        untried=len(untried),
        adapters=about_adapters,
        multimodal=about_multimodal,
    )


def write_section(section: str) -> None:
    """Replace the section of the page that has the same heading; another section must follow it."""
    before, heading, rest = PAGE.read_text().partition(section.splitlines(keepends=True)[0])
    if not heading:
        raise SystemExit(f"{PAGE} has no section {section.splitlines()[0]!r}")
    PAGE.write_text(before + section + "\n" + rest[rest.index("## ") :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="print these; default: try all and write docs/models.md")
    parser.add_argument("--adapters", action="store_true", help="try adapters only, and write their section")
    parser.add_argument(
        "--multimodal", action="store_true", help="try multimodal classes only, and write their section"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if args.adapters:
        write_section(try_adapters())
    if args.multimodal:
        write_section(try_multimodal())
    if args.adapters or args.multimodal:
        return
    rows, untried = try_families(args.families or FAMILIES)
    if not args.families:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows, untried, try_adapters(), try_multimodal()))


if __name__ == "__main__":
    main()
