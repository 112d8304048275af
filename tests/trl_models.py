"""Tiny models and a real tokenizer on disk, data sets, trainers for them, and the numbers of one training step."""

import contextlib
import functools
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import flashpo.trl
from flashpo.bench.tiny_models import tiny_config
from flashpo.trl.packed import groups_stay_together
from flashpo.trl.verify import Step, compare, compute_dtype, tolerance_for

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "yes", "no"]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
VOCAB = 97  # off every tile
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

# initializer_range 0.3: logits with a spread of a few nats, as a trained model has; the default 0.02 makes them all 0
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
    pad_token_id=0, eos_token_id=1, bos_token_id=1,
)  # fmt: skip
LIMIT = 10  # tokens, behind which rotary frequencies are others
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LIMIT, "factor": 4.0,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
IMAGE = 43  # behind the words
PAD = 41  # of Qwen's images, the first behind the words
TOWER = dict(hidden_size=32, intermediate_size=48, projection_dim=32)
QWEN_TOWER = dict(hidden_size=32, intermediate_size=48, depth=2, out_hidden_size=32, num_heads=2, patch_size=4)
CONFIGS = {
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=False),
    "qwen3_tied": lambda: transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=16, final_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "phi": lambda: transformers.PhiConfig(**{**SMALL, "num_key_value_heads": 2}),  # a head with a bias
    "gpt2": lambda: transformers.GPT2Config(  # its dropouts are those that it was published with
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    ),
    # multimodal classes
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config=SMALL | {"head_dim": 16, "rope_parameters": MROPE},
        vision_config={**QWEN_TOWER, "deepstack_visual_indexes": [0]}, image_token_id=PAD, video_token_id=PAD + 1,
        tie_word_embeddings=False, architectures=["Qwen3VLForConditionalGeneration"],
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
        vision_config={**TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4, image_token_id=IMAGE, architectures=["Gemma3ForConditionalGeneration"],
    ),
    "paligemma": lambda: transformers.PaliGemmaConfig(
        text_config=SMALL | {"model_type": "gemma", "head_dim": 16, "use_bidirectional_attention": False},
        vision_config={**TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
        image_token_id=VOCAB - 1, architectures=["PaliGemmaForConditionalGeneration"],
    ),
    # batches of a few words are on both sides of its limit
    "longrope": lambda: transformers.Phi3Config(
        **SMALL, original_max_position_embeddings=LIMIT, rope_parameters=LONGROPE
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False
    ),
}  # fmt: skip
HYBRIDS = ("qwen3_5_text", "lfm2", "granitemoehybrid", "nemotron_h", "kimi_linear")
CONFIGS |= {family: functools.partial(tiny_config, family, initializer_range=0.1) for family in HYBRIDS}
CONFIGS["qwen3_5"] = lambda: transformers.Qwen3_5Config(
    text_config=CONFIGS["qwen3_5_text"]().to_dict() | {"rope_parameters": MROPE},
    vision_config=QWEN_TOWER, image_token_id=PAD, video_token_id=PAD + 1,
    architectures=["Qwen3_5ForConditionalGeneration"],
)  # fmt: skip


@functools.cache
def model_path(kind: str = "qwen3") -> str:
    """A folder with the model and tokenizer: TRL loads the reference model again by path."""
    folder = tempfile.mkdtemp(prefix=f"flashpo-{kind}-")
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    model = _class_of(config)._from_config(config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def bidirectional_path() -> str:
    """A model that FlashPO does not run on trees: each token sees all tokens of its row."""
    folder = tempfile.mkdtemp(prefix="flashpo-bidirectional-")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL, head_dim=16, is_causal=False)
    _class_of(config)._from_config(config).save_pretrained(folder)
    return folder


def _class_of(config) -> type:
    """As TRL chooses it."""
    names = config.architectures
    return getattr(transformers, names[0]) if names else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def load(kind: str, dtype: torch.dtype = torch.float32):
    """The model of a kind of CONFIGS, or of a folder."""
    path = model_path(kind) if kind in CONFIGS else kind
    return _class_of(AutoConfig.from_pretrained(path)).from_pretrained(path, dtype=dtype)


def judge(kind: str = "qwen3", dtype: torch.dtype = torch.float32):
    """A reward model: the same weights every time, also of the head, which no checkpoint has."""
    path = model_path(kind) if kind in CONFIGS else kind
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    base = Tokenizer(words)
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def text(n: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator))


PROMPTS = [text(2 + i % 4, i) for i in range(16)]
DATA = {
    "SFT": [{"prompt": p + " ", "completion": text(3 + i % 5, 100 + i)} for i, p in enumerate(PROMPTS)],
    "DPO": [
        {"prompt": p + " ", "chosen": text(3 + i % 5, 200 + i), "rejected": text(7 - i % 5, 300 + i)}
        for i, p in enumerate(PROMPTS)
    ],
    "KTO": [
        {"prompt": p + " ", "completion": text(3 + i % 5, 400 + i), "label": i % 2 == 0} for i, p in enumerate(PROMPTS)
    ],
    "GRPO": [{"prompt": p} for p in PROMPTS],
    "RLOO": [{"prompt": p} for p in PROMPTS],
}


DATA["PPO"] = DATA["Distillation"] = DATA["GRPO"]
DATA["ORPO"] = DATA["CPO"] = DATA["DPO"]
DATA["Reward"] = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in DATA["DPO"]]


def reward(completions, completion_ids, **kwargs) -> list[float]:
    """Varied enough that no group is without an advantage."""
    return [sum((7 * token) % 11 for token in ids) / 20 - 0.1 * len(ids) for ids in completion_ids]


NOT_OF_CONFIGS = (
    "peft_config", "eval_dataset", "reward_funcs", "critic_model", "train_dataset", "rollout_func", "processing_class",
    "teacher_model", "tools",
)  # fmt: skip


def make_trainer(name: str, package=trl, model: str = "qwen3", dtype=torch.float32, **options):
    """`package.<name>Trainer` on a tiny model (a kind of CONFIGS or a folder), without autocast or checkpointing."""
    settings = dict(
        output_dir=tempfile.mkdtemp(prefix="flashpo-out-"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, max_steps=1, seed=1,
        per_device_train_batch_size=4, learning_rate=1e-3, dataloader_pin_memory=False,
    )  # fmt: skip
    if name in ("GRPO", "RLOO", "PPO"):
        settings |= dict(num_generations=4, max_completion_length=8, temperature=0.9)
    extra = {}
    for key in NOT_OF_CONFIGS:
        if key in options:
            extra[key] = options.pop(key)
    config = getattr(package if hasattr(package, f"{name}Config") else trl, f"{name}Config")(**settings | options)
    if name in ("GRPO", "RLOO", "PPO"):
        extra.setdefault("reward_funcs", reward)
    return getattr(package, f"{name}Trainer")(
        model=judge(model, dtype) if name == "Reward" else load(model, dtype),
        args=config,
        **{"processing_class": tokenizer(), "train_dataset": Dataset.from_list(DATA[name])} | extra,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class Recorder(TrainerCallback):
    """The gradients of every optimizer step, as the optimizer gets them."""

    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
        self.gradients.append({n: g.detach().clone() for n, g in whole.items()})


# of the log line: not the same twice
CLOCKS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "epoch", "total_flos")


def is_clock(name: str) -> bool:
    """Of a metric: whether it is never the same twice."""
    return name in CLOCKS or name.startswith("flashpo/seconds/")


def train(trainer) -> list[Step]:
    """`trainer.train()`; each logged step's loss, metrics and gradients."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    with contextlib.ExitStack() as stack:
        for stock in (trl.GRPOTrainer, trl.RLOOTrainer):  # as ours: which rows meet in a micro-batch changes the step
            if isinstance(trainer, stock):
                stack.enter_context(groups_stay_together(stock, trainer.num_generations))
        trainer.train()
    steps = []
    for log, gradients in zip(trainer.state.log_history, recorder.gradients):
        metrics = {k: float(v) for k, v in log.items() if not is_clock(k) and v is not None}
        steps.append(Step(metrics.pop("loss"), metrics, gradients))
    assert steps, "the trainer logged no step"
    return steps


def assert_same(stock: list[Step], ours: list[Step], dtype: torch.dtype = torch.float32) -> None:
    assert len(stock) == len(ours)
    for i, (a, b) in enumerate(zip(stock, ours)):
        assert any(g.abs().max() > 0 for g in a.gradients.values()), "every gradient is 0: nothing is compared"
        wrong = [line for line in compare(i, a, b, tolerance_for(dtype)) if not line.agrees]
        assert not wrong, "\n".join(map(str, wrong))


SAMPLED_BY_TRL = {name: {"rollout": "generate"} for name in ("GRPO", "RLOO", "Distillation")}  # for the same samples


def assert_same_training(name: str, packed: bool = True, **options) -> list[Step]:
    """One `train()` of TRL's own class and one of ours agree, and ours ran our operator on token trees, unless they are
    not `packed`; returns TRL's steps."""
    flashpo.stats(reset=True)
    stock_trainer = make_trainer(name, trl, **options)
    stock = train(stock_trainer)
    assert not flashpo.stats(), "TRL's own trainer must stay as it is"
    ours = train(make_trainer(name, flashpo.trl, **options, **SAMPLED_BY_TRL.get(name, {})))
    assert_ran("linear_logprob_partial", "linear_logprob_bwd")
    assert bool(flashpo.stats().get("tree_attention_fwd")) == packed
    assert_same(stock, ours, compute_dtype(stock_trainer, stock_trainer.model))
    return stock


def assert_ran(*ops: str) -> None:
    counts = flashpo.stats()
    assert all(counts.get(op) for op in ops), f"expected {ops}, ran: {counts}"
