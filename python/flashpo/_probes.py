"""A small test case for every operator, with torch's plain formula for it. `flashpo doctor` and tests use them.

A check passes if, for every result and gradient, max |ours - exact| <= 2 max |torch - exact| + 1e-6 max |exact|, where
`torch` is the plain formula in the same dtype.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flashpo
from flashpo.ops import decode_layer, decode_step
from flashpo.ops._wide import wide, wide_dtype
from flashpo.ops.packed_linear import pack_linear, packed_linear
from flashpo.ops.recurrence_step import recurrence_step
from flashpo.ops.sample import uniform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Probe:
    """`ours(*inputs)` and `plain(*inputs)` compute the same function and return tensors."""

    # Float64 inputs are differentiable and cast to the dtype; others are left as they are
    make: Callable[[], list[Tensor]]
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = DTYPES


def _target(*shape: int, vocab: int) -> Tensor:
    return torch.randint(vocab, shape).masked_fill(torch.rand(shape) < 0.2, IGNORED)


def _eager(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = wide(z).log_softmax(-1)
    chosen = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    ignored = target == IGNORED
    return chosen.masked_fill(ignored, 0.0), -(logp.exp() * logp).sum(-1).masked_fill(ignored, 0.0)


def _divergences(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Forward KL, Jensen-Shannon with beta 0.3, and reverse KL; the teacher has the student's tensors, shifted by
    one."""
    teacher = wide(F.linear(hidden.roll(1, 0), weight.roll(1, 0))).log_softmax(-1).detach()
    student = wide(F.linear(hidden, weight)).log_softmax(-1)
    mixture = (0.7 * student.exp() + 0.3 * teacher.exp()).log()

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1).masked_fill(target == IGNORED, 0.0)

    return kl(teacher, student), 0.3 * kl(teacher, mixture) + 0.7 * kl(student, mixture), kl(student, teacher)


def _ppo(logprob: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor]:
    ratio, advantage = (logprob - old).exp(), advantage[:, None]
    loss = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.28) * advantage)
    return ((loss * mask).sum() / mask.sum(),)


def _grpo(rewards: Tensor, group: Tensor) -> tuple[Tensor, ...]:
    rewards = rewards.detach()
    mean, std = torch.empty_like(rewards), torch.empty_like(rewards)
    for key in group.unique():
        rows = group == key
        mean[rows], std[rows] = rewards[rows].mean(), rewards[rows].std()
    return (rewards - mean) / (std + 1e-4), mean, std


def _gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """verl's loop over the tokens, with whitening."""
    rewards, values = (wide(x).detach() for x in (rewards, values))
    value, advantage, columns = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for r, v, live in zip(*(x.flip(1).unbind(1) for x in (rewards, values, mask))):
        advantage = torch.where(live, r + 0.99 * value - v + 0.99 * 0.95 * advantage, advantage)
        value = torch.where(live, v, value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    white = (advantages - advantages[mask].mean()) * (advantages[mask].var() + 1e-8).rsqrt()
    return white * mask, (advantages + values) * mask


def _tree(device: torch.device) -> tuple[Tensor, Tensor]:
    """A prompt of 70 tokens and two completions of 60 and 20."""
    end = torch.tensor([150] * 70 + [130] * 60 + [150] * 20, dtype=torch.int32, device=device)
    position = torch.tensor([*range(130), *range(70, 90)], dtype=torch.int32, device=device)
    return end, position


def _masked_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    end, _ = _tree(q.device)
    i = torch.arange(len(q), device=q.device)[:, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
    s = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[2] ** -0.5
    s = s.masked_fill((i.t() > i) | (i >= end), -torch.inf)
    p = s.softmax(-1, dtype=wide_dtype(s.dtype)).to(s.dtype)
    return ((p @ v).transpose(0, 1),)


def _lineage(device: torch.device) -> flashpo.Lineage:
    """The lineage of the same tree."""
    return flashpo.Lineage(torch.tensor([[0, 70], [70, 130], [130, 150]]), torch.tensor([-1, 0, 0]), device)


def _before(token: int) -> int:
    return 69 if token == 130 else token - 1


def _recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    lineage = _lineage(q.device)
    return flashpo.tree_recurrence(q, k, v, decay, beta, lineage, scale=0.2, ends=True)  # type: ignore[return-value]


def _token_by_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    dtype, rep = v.dtype, v.shape[1] // q.shape[1]
    q, k, v, decay, beta = (wide(x) for x in (q, k, v, decay, beta))
    q, k, kept = *(x.repeat_interleave(rep, 1) for x in (q, k)), decay.exp()
    states: list[Tensor] = []
    for t in range(len(q)):
        state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2]) if t == 0 else states[_before(t)]
        state = state * kept[t, :, None, None]
        u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        states.append(state + k[t, :, :, None] * u[:, None])
    every = torch.stack(states)
    return (0.2 * torch.einsum("nhkv,nhk->nhv", every, q)).to(dtype), every[[69, 129, 149]]


def _step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    inputs = (x.detach() for x in (q, k, v, decay, beta))
    state = state.detach().clone()
    return recurrence_step(state, *inputs, scale=0.2), state


def _plain_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    state, q, k, v, decay, beta = (x.detach() for x in (state, q, k, v, decay, beta))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    kept = decay.exp()[..., None, None] * state
    state = kept + k[..., None] * (beta[..., None] * (v - (kept.mT @ k[..., None])[..., 0]))[..., None, :]
    return 0.2 * (state.mT @ q[..., None])[..., 0], state


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    dtype, (x, weight, bias) = x.dtype, (wide(y) for y in (x, weight, bias))
    out, token = bias, list(range(len(x)))
    for w in weight.flip(1).unbind(1):
        out = out + w * x[[max(t, 0) for t in token]] * torch.tensor([[t >= 0] for t in token], device=x.device)
        token = [_before(t) if t >= 0 else t for t in token]
    return (out.to(dtype),)


def _decode(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Six rows share all tokens except the last six; each row has one of these."""
    q, k, v = q.detach(), k.detach(), v.detach()
    tokens, rows = k.shape[0], q.shape[0]
    k_cache, v_cache = k.new_zeros(11, *k.shape[1:], 64), v.new_zeros(11, v.shape[1], 64, v.shape[2])
    slot = torch.arange(tokens, device=q.device) + 64
    slot[-rows:] = torch.arange(5, 5 + rows, device=q.device) * 64
    flashpo.kv_append(k, v, k_cache, v_cache, slot)
    ranges = [(0, rows), *((i, i + 1) for i in range(rows))]
    blocks = [[1, 2, 3], *([i, 0, 0] for i in range(5, 5 + rows))]
    start, length = [0] + [tokens - rows] * rows, [tokens - rows] + [1] * rows
    tables = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in (ranges, start, length, blocks, start[1:])]
    return flashpo.decode_attention(q, k_cache, v_cache, *tables, scale=0.2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype, wide = q.dtype, wide_dtype(q.dtype)
    rep = q.shape[1] // k.shape[1]
    q, k, v = q.detach().to(wide), *(x.detach().to(wide).repeat_interleave(rep, 1) for x in (k, v))
    y = 0.2 * torch.einsum("bhd,khd->bhk", q, k)
    own = torch.arange(len(k) - len(q), len(k), device=q.device)
    y[..., own] = y[..., own].masked_fill(~torch.eye(len(q), dtype=torch.bool, device=q.device)[:, None], -torch.inf)
    return torch.einsum("bhk,khd->bhd", y.softmax(-1), v).to(dtype), y.logsumexp(-1)


def _layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Norm, rotation and activation, each applied to the previous result."""
    normed, total = decode_layer.add_rms_norm(x.detach(), residual.detach(), weight.detach(), eps=1e-6)
    k_cache, v_cache = x.new_zeros(1, 1, 64, 64), x.new_zeros(1, 1, 64, 64)
    angle = total.detach()[:, :64].tanh()
    qkv = normed[:, :128], normed[:, 128:192], normed[:, 192:]
    q = decode_layer.rope_append(*qkv, angle, angle, k_cache, v_cache, torch.arange(len(x), device=x.device))
    return total, q, k_cache, v_cache, decode_layer.gated_activation(*normed.chunk(2, 1))


def _plain_layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x.detach() + residual.detach()
    normed = F.rms_norm(total, total.shape[-1:], weight.detach(), 1e-6)
    angle, heads = total[:, :64].tanh(), normed.unflatten(1, (4, 64))
    turned = heads * angle[:, None] + torch.cat([-heads[..., 32:], heads[..., :32]], -1) * angle[:, None]
    k_cache, v_cache = x.new_zeros(1, 1, 64, 64), x.new_zeros(1, 1, 64, 64)
    k_cache[0, 0, :, : len(x)], v_cache[0, 0, : len(x)] = turned[:, 2].t(), heads[:, 3]
    return total, turned[:, :2], k_cache, v_cache, F.silu(normed[:, :128]) * normed[:, 128:]


def _layers_at_once(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """One head without rotation. Each row has one token, so that its attention is that token's value."""
    n, h = x.shape
    x, caches = x.detach(), ([x.new_zeros(1 + n, 1, h, 64)], [x.new_zeros(1 + n, 1, 64, h)])
    linears = [pack_linear(weight) for weight in w.detach().split(h)]
    i = torch.arange(n, dtype=torch.int32, device=x.device)
    tables = torch.stack((i, i + 1), 1), i, i * 0 + 1, i[:, None] + 1, i
    norms, turn = [torch.ones_like(x[0])] * 2 + [None] * 2, (torch.ones_like(x), torch.zeros_like(x))
    options = norms, [1e-6] * 3, linears, [None] * 7, "silu", *turn, *caches, (i + 1).long() * 64, *tables
    return decode_step.decode_layers_(x, None, *options, h**-0.5, [0])


def _plain_layers_at_once(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    x, (_, _, v, o, gate, up, down) = x.detach(), w.detach().split(x.shape[1])
    total = x + F.linear(F.linear(F.rms_norm(x, x.shape[1:], None, 1e-6), v), o)
    y = F.rms_norm(total, x.shape[1:], None, 1e-6)
    return F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down), total


def _sample(logits: Tensor, seed: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    z = wide(logits.detach()) / 0.8
    full = z.log_softmax(-1)
    mass = full.exp().where(full.exp() >= 0.02 * full.exp().amax(-1, keepdim=True), 0.0)
    sums = mass.cumsum(-1)
    token = (sums <= (uniform(seed, offset) * sums[:, -1]).to(z.dtype)[:, None]).sum(-1)
    logprob = full.gather(-1, token[:, None])[:, 0]
    return token, logprob - sums[:, -1].log(), logprob, sums[:, -1]


PROBES = {
    "selective_log_softmax": Probe(
        lambda: [4 * torch.randn(2, 33, 1031, dtype=torch.float64), _target(2, 33, vocab=1031)],
        lambda z, target: flashpo.selective_log_softmax(z, target)[:2],
        _eager,
    ),
    "selective_log_softmax, in-place backward": Probe(
        lambda: [4 * torch.randn(2, 33, 1031, dtype=torch.float64), _target(2, 33, vocab=1031)],
        lambda z, target: flashpo.selective_log_softmax(z.clone(), target, inplace_backward=True)[:2],
        _eager,
    ),
    "linear_logprob": Probe(
        lambda: [
            torch.randn(67, 48, dtype=torch.float64),
            torch.randn(2051, 48, dtype=torch.float64) * 4 / 48**0.5,
            _target(67, vocab=2051),
        ],
        lambda hidden, weight, target: flashpo.linear_logprob(hidden, weight, target)[:2],
        lambda hidden, weight, target: _eager(F.linear(hidden, weight), target),
    ),
    "linear_divergence": Probe(
        lambda: [
            torch.randn(67, 48, dtype=torch.float64),
            torch.randn(2051, 48, dtype=torch.float64) * 4 / 48**0.5,
            _target(67, vocab=2051),
        ],
        lambda hidden, weight, target: tuple(
            flashpo.linear_divergence(
                hidden, weight, hidden.roll(1, 0), weight.roll(1, 0), target, beta=beta
            ).divergence
            for beta in (0.0, 0.3, 1.0)
        ),
        _divergences,
    ),
    "group_advantages": Probe(
        lambda: [torch.randn(300, dtype=torch.float64), (torch.arange(300) ** 2 % 61) << 40],
        lambda rewards, group: flashpo.group_advantages(rewards, group)[:3],
        _grpo,
        (torch.float32,),
    ),
    "gae": Probe(
        lambda: [*torch.randn(2, 5, 301, dtype=torch.float64), torch.rand(5, 301) < 0.8],
        lambda rewards, values, mask: flashpo.gae(rewards, values, mask, gamma=0.99, lam=0.95, whiten=True),
        _gae,
    ),
    "add_rms_norm, rope_append, gated_activation": Probe(
        lambda: [torch.randn(shape, dtype=torch.float64) for shape in ((7, 256), (7, 256), (256,))],
        _layer,
        _plain_layer,
    ),
    "pack_linear, packed_linear": Probe(
        lambda: [torch.randn(shape, dtype=torch.float64) for shape in ((33, 96), (101, 96))],
        lambda x, weight: (packed_linear(x.detach(), pack_linear(weight), columns=weight.shape[0]),),
        lambda x, weight: (F.linear(x.detach(), weight.detach()),),
    ),
    "decode_layers": Probe(
        lambda: [torch.randn(7, 64, dtype=torch.float64), torch.randn(448, 64, dtype=torch.float64) / 8],
        _layers_at_once,
        _plain_layers_at_once,
    ),
    "decode_attention": Probe(
        lambda: [torch.randn(n, heads, 64, dtype=torch.float64) for n, heads in ((6, 4), (160, 2), (160, 2))],
        _decode,
        _softmax_attention,
    ),
    "sample": Probe(
        lambda: [4 * torch.randn(33, 1031, dtype=torch.float64), torch.arange(33), torch.arange(33) ** 9],
        lambda logits, seed, offset: flashpo.sample(logits, temperature=0.8, min_p=0.02, seed=seed, offset=offset),
        _sample,
    ),
    "policy_loss": Probe(
        lambda: [
            -torch.rand(9, 133, dtype=torch.float64),
            -torch.rand(9, 133, dtype=torch.float64),
            torch.randn(9, dtype=torch.float64),
            torch.rand(9, 133) < 0.7,
        ],
        lambda logprob, old, advantage, mask: (
            flashpo.policy_loss(logprob, old.detach(), advantage.detach(), mask, loss="dapo").loss,
        ),
        lambda logprob, old, advantage, mask: _ppo(logprob, old.detach(), advantage.detach(), mask),
        (torch.float32,),
    ),
    "tree_attention": Probe(
        lambda: [torch.randn(150, heads, 24, dtype=torch.float64) for heads in (4, 2, 2)],
        lambda q, k, v: (flashpo.tree_attention(q, k, v, *_tree(q.device)),),
        _masked_attention,
    ),
    "tree_recurrence": Probe(
        lambda: [
            torch.randn(150, 2, 24, dtype=torch.float64),
            F.normalize(torch.randn(150, 2, 24, dtype=torch.float64), dim=-1),
            torch.randn(150, 4, 20, dtype=torch.float64),
            -torch.rand(150, 4, dtype=torch.float64),
            torch.rand(150, 4, dtype=torch.float64),
        ],
        _recurrence,
        _token_by_token,
    ),
    "recurrence_step": Probe(
        lambda: [
            torch.randn(7, 4, 24, 20, dtype=torch.float64),
            torch.randn(7, 2, 24, dtype=torch.float64),
            F.normalize(torch.randn(7, 2, 24, dtype=torch.float64), dim=-1),
            torch.randn(7, 4, 20, dtype=torch.float64),
            -torch.rand(7, 4, dtype=torch.float64),
            torch.rand(7, 4, dtype=torch.float64),
        ],
        _step,
        _plain_step,
        (torch.float32,),
    ),
    "tree_conv": Probe(
        lambda: [torch.randn(shape, dtype=torch.float64) for shape in ((150, 40), (40, 4), (40,))],
        lambda x, weight, bias: (flashpo.tree_conv(x, weight, bias, _lineage(x.device)),),
        _convolution,
    ),
}


def run(fn: Callable, inputs: list[Tensor], device: str, dtype: torch.dtype, wide: torch.dtype) -> list[Tensor]:
    """Results and gradients for random upstream gradients. Inputs are rounded to `dtype` and held in `wide`."""
    cast = [x.to(dtype).to(device, wide).requires_grad_() if x.dtype == torch.float64 else x.to(device) for x in inputs]
    results = fn(*cast)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float32).to(r) for r in results]
    wanted = [x for x in cast if x.requires_grad]
    differentiable = any(r.requires_grad for r in results)
    grads = torch.autograd.grad(results, wanted, upstream, allow_unused=True) if differentiable else ()
    return [x.detach().double().cpu() for x in (*results, *grads) if x is not None]


class Checked(NamedTuple):
    error: float  # the largest of all results and gradients, relative to the largest exact value
    of_torch: float
    passed: bool


def check(probe: Probe, backend: str, device: str, dtype: torch.dtype) -> Checked:
    """Compare one backend with the exact results. Raises NotImplementedError if it cannot run on these tensors."""
    torch.manual_seed(0)
    inputs = probe.make()
    with flashpo.backend(backend):
        ours = run(probe.ours, inputs, device, dtype, dtype)
    plain = run(probe.plain, inputs, device, dtype, dtype)
    exact = run(probe.plain, inputs, "cpu", dtype, torch.float64)
    worst = Checked(0.0, 0.0, True)
    for x, y, e in zip(ours, plain, exact):
        scale = e.abs().max().item()
        error, of_torch = (a.sub(e).abs().max().item() / scale for a in (x, y))
        passed = error <= 2 * of_torch + 1e-6  # False for NaN
        if not passed or error >= worst.error:
            worst = Checked(error, of_torch, passed)
        if not passed:
            break
    return worst
