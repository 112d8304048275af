"""Every Triton kernel compiles ahead of time, without a GPU, for each family of them and fits in its shared memory."""

import collections
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled: unset TRITON_INTERPRET", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature

from flashpo.bench import cubin
from flashpo.kernels import (
    decode_attention,
    decode_layer,
    kv_append,
    linear_divergence,
    linear_logprob,
    policy_loss,
    recurrence_step,
    selective_log_softmax,
    token_stats,
    tree_attention,
    tree_attention_backward,
    tree_recurrence,
    tree_recurrence_backward,
    tree_tiles,
)
from flashpo.kernels.policy_terms import Numbers
from flashpo.ops.loss_spec import LOSSES, LossSpec
from flashpo.ops.tree_recurrence import CHUNK

# (target, shared memory a program may have, the instruction that multiplies 16-bit matrices)
TARGETS = {
    "A100": (GPUTarget("cuda", 80, 32), 163 * 1024, "mma.sync"),
    "RTX 4090": (GPUTarget("cuda", 89, 32), 99 * 1024, "mma.sync"),
    "H100": (GPUTarget("cuda", 90, 32), 227 * 1024, "wgmma.mma_async"),
    "B200": (GPUTarget("cuda", 100, 32), 227 * 1024, "tcgen05.mma"),
    "RTX 5090": (GPUTarget("cuda", 120, 32), 99 * 1024, "mma.sync"),
    "MI300": (GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The kernels that take long to compile leave out what another pair shows: the RTX 4090 has the A100's instructions and
# the RTX 5090's shared memory; fp32 is multiplied alike on all of NVIDIA's, so that only shared memory matters.
PAIRS = [
    *((name, "bf16") for name in ("A100", "H100", "B200", "RTX 5090", "MI300")),
    *((name, "fp32") for name in ("H100", "RTX 5090", "MI300")),
]
INTEGERS = {
    "index": "i64",
    "target": "i64",
    "order": "i64",
    "live": "i64",
    "cu_seqlens": "i64",
    "mask": "u8",
    "arrived": "i32",
    "slots": "i64",
    "ranges": "i32",
    "starts": "i32",
    "lengths": "i32",
    "block_table": "i32",
    "positions": "i32",
    "end": "i32",
    "position": "i32",
    "lists": "i32",
    "counts": "i32",
    "token": "i64",
    "before": "i64",
    "last": "i64",
}
OPERANDS = (
    "logits", "d_logits", "hidden", "weight", "bias", "q", "k", "v", "k_cache", "v_cache", "d_out", "dq", "dk", "dv",
    "s_hidden", "s_weight", "s_bias", "t_hidden", "t_weight", "t_bias",
    "x", "residual", "residual_out", "cos", "sin", "q_weight", "k_weight", "gate", "up",
)  # fmt: skip
FLOATS = (
    "out", "partials", "rows", "d_logprob", "d_entropy", "token_temperature", "logprob", "old_logprob", "advantage",
    "ref_logprob", "rollout_logprob", "importance_ratio", "entropy", "entropy_threshold", "num_items", "loss_out",
    "s_rows", "t_rows", "kl", "d_divergence", "stats", "grads", "factors", "d_loss", "sums", "parts", "sinks", "lse",
    "delta", "decay", "beta", "state", "states", "solved", "update", "read", "ends", "d_update", "d_ends", "d_before",
    "d_behind", "d_decay", "d_beta",
)  # fmt: skip
SCALES = (
    "eps", "scale", "mean_scale", "inverse_temperature", "temperature", "logit_scale", "softcap",
    "s_logit_scale", "s_softcap", "t_logit_scale", "t_softcap", "rest",
)  # fmt: skip


def compile(kernel, target, dtype, absent=(), num_warps=4, num_stages=3, numbers=None, debug=False, **constants):
    """As a launch with aligned tensors of `dtype` and long rows would; arguments named in `absent` are None."""
    types, aligned = {}, {}
    in_dtype = (linear_logprob.d_logits_kernel, decode_attention.merge_kernel, tree_attention.forward_kernel,
                decode_layer.norm_kernel, decode_layer.rope_kernel, decode_layer.gated_kernel,
                linear_divergence.d_logits_kernel)  # fmt: skip
    out = dtype if kernel in in_dtype else "fp32"
    scales = (*SCALES, "beta") if kernel.__module__.endswith("linear_divergence") else SCALES  # else one of each token
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            types[name] = "constexpr"
            constants.setdefault(name, None)
        elif name == "numbers":
            types[name] = Numbers(*("constexpr" if x is None else "fp32" for x in numbers))
            constants |= {(i, j): None for j, x in enumerate(numbers) if x is None}
        elif name in scales:
            types[name] = "fp32"
        elif name in INTEGERS:
            types[name] = "*" + INTEGERS[name]
        elif name in OPERANDS or name in FLOATS:
            types[name] = "*" + (dtype if name in OPERANDS else out if name == "out" else "fp32")
        else:
            types[name] = "i32"
        if types[name] != "constexpr" and (
            types[name][0] == "*" or name in ("H", "V", "s_H", "t_H") or "stride" in name
        ):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "debug": debug, "sanitize_overflow": False}
    return triton.compile(source, target=target, options=options)


def check_code(compiled, target, dtype, staged=True):
    """What ptxas made of 16-bit operands: no load of a single element, no spills between products; if staged, copies
    of 16 bytes."""
    if dtype == "fp32" or target.backend != "cuda" or target.arch not in cubin.MULTIPROCESSORS:
        return
    code = cubin.read(compiled.asm["cubin"], compiled.metadata.num_warps, compiled.metadata.shared)
    assert 2 not in code.widths(r"LDG\.", hot=True)
    assert code.spills_in_main_loops == 0
    if staged:
        assert set(code.widths("LDGSTS")) == {16}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_kernels(name, dtype):
    target, limit, _ = TARGETS[name]
    for longest, kernel, constants in (
        (8192, selective_log_softmax.forward_kernel, {"SIDE": True}),
        (4096, selective_log_softmax.backward_kernel, {}),
    ):
        block, warps = selective_log_softmax.block_and_warps(151_936, longest)
        compiled = compile(kernel, target, dtype, BLOCK=block, num_warps=warps, **constants)
        assert compiled.metadata.shared <= limit
        if target.backend == "cuda":  # 16 bytes a load
            assert "ld.global.v4.b32" in compiled.asm["ptx"] or "ld.global.v2.b64" in compiled.asm["ptx"]


@pytest.mark.parametrize("name", TARGETS)
def test_joining_kernels(name):
    target, limit, _ = TARGETS[name]
    for kernel in (token_stats.merge_partials_kernel, linear_logprob.join_kernel):
        for side in (False, True):
            assert compile(kernel, target, "fp32", SIDE=side, BLOCK=128).metadata.shared <= limit


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
def test_gemm_kernels(name, dtype, full):
    target, limit, instruction = TARGETS[name]
    block_n, block_v, block_h, stages, warps = linear_logprob.tiles(DTYPES[dtype], limit)
    tile = {
        "DTYPE": linear_logprob.TRITON_DTYPES[DTYPES[dtype]],
        "BLOCK_N": block_n,
        "BLOCK_V": block_v,
        "BLOCK_H": block_h,
        "num_stages": stages,
        "num_warps": warps,
    }
    absent = () if full else ("bias", "token_temperature", "softcap")
    for kernel, constants, gradient in (
        (linear_logprob.partial_kernel, {"SIDE": full, "SPLIT": linear_logprob.SPLIT}, ()),
        (linear_logprob.d_logits_kernel, {}, () if full else ("d_entropy",)),
    ):
        compiled = compile(kernel, target, dtype, absent + gradient, **constants, **tile)
        assert compiled.metadata.shared <= limit
        text = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
        if dtype == "fp32":
            assert "tf32" not in text  # fp32 is fp32
        else:
            assert instruction in text
            check_code(compiled, target, dtype)
            if target.backend == "cuda" and kernel is linear_logprob.d_logits_kernel:  # 16 bytes a store
                assert "st.global.v4.b32" in text


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@pytest.mark.parametrize("mode", [1, 2])
def test_kernels_of_two_heads(name, dtype, mode):
    target, limit, instruction = TARGETS[name]
    torch_dtype = DTYPES[dtype]
    tile = linear_divergence.tiles_of_two((torch_dtype, torch_dtype), limit, torch_dtype.itemsize)
    constants = dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_H", "num_stages", "num_warps"), tile))
    constants |= dict.fromkeys(("S_DTYPE", "T_DTYPE"), linear_logprob.TRITON_DTYPES[torch_dtype])
    full = mode != 1
    absent = () if full else ("s_bias", "t_bias", "s_softcap", "t_softcap")
    split = {"SPLIT": linear_logprob.SPLIT}
    kernels = {
        linear_divergence.partial_kernel: (absent, {"MODE": mode, "TOP1": full, **split}),
        linear_divergence.d_logits_kernel: (absent + (() if full else ("d_entropy", "d_logprob")), {"MODE": mode}),
    }
    if mode == 2:
        kernels[linear_divergence.mixture_kernel] = absent, split
    for kernel, (missing, own) in kernels.items():
        compiled = compile(kernel, target, dtype, missing, **own, **constants)
        assert compiled.metadata.shared <= limit
        text = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
        assert "tf32" not in text if dtype == "fp32" else instruction in text


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@pytest.mark.parametrize(
    ("rep", "features", "value_features", "full"),
    [(2, 128, 128, False), (8, 80, 64, True), (4, 256, 256, True)],
    ids=["plain", "every option", "wide, every option"],
)
def test_decode_kernels(name, dtype, rep, features, value_features, full):
    target, limit, _ = TARGETS[name]
    shape = {"heads": 8, "D": features, "DV": value_features}
    before, own = decode_attention.SPLITS
    split = {"rep": rep, "BEFORE": before, "OWN": own, "SEGMENTS": decode_attention.SEGMENTS, "WINDOWED": full}
    tile = decode_attention.tile(rep, features, value_features, DTYPES[dtype].itemsize, limit)
    absent = () if full else ("softcap", "sinks")
    compiled = compile(decode_attention.split_kernel, target, dtype, absent, **shape, **split, **tile)
    assert compiled.metadata.shared <= limit
    if target.backend == "cuda":
        ptx = compiled.asm["ptx"]
        assert "tf32" not in ptx  # fp32 is fp32
        assert dtype == "fp32" or "mma" in ptx
        assert "ld.global.v4.b32" in ptx or "cp.async.cg" in ptx  # 16 bytes a load
    check_code(compiled, target, dtype, tile["num_stages"] > 1)
    merge = {
        "DV": value_features,
        "PARTS": before + own,
        "BLOCK_PARTS": 16,
        "BLOCK_DV": tile["BLOCK_DV"],
        "CAPPED": full,
    }
    assert compile(decode_attention.merge_kernel, target, dtype, absent, **merge).metadata.shared <= limit
    append = {"BLOCK_D": tile["BLOCK_D"], "BLOCK_DV": tile["BLOCK_DV"]}
    compiled = compile(kv_append.append_kernel, target, dtype, num_warps=1, debug=True, **shape, **append)
    if target.backend == "cuda":
        assert "__assertfail" in compiled.asm["ptx"]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
def test_decode_layer_kernels(name, dtype, full):
    target, limit, _ = TARGETS[name]
    for kernel, absent, options in (
        (decode_layer.norm_kernel, ("residual",), {"H": 2560, "BLOCK_H": 4096, "UNIT_OFFSET": full, "num_warps": 16}),
        (
            decode_layer.rope_kernel,
            ("q_weight", "k_weight"),
            {"q_heads": 8, "heads": 2, "D": 128, "R": 64 if full else 128, "BLOCK_D": 128, "UNIT_OFFSET": full}
            | {"num_warps": 1, "debug": True},
        ),
        (decode_layer.gated_kernel, (), {"columns": 9728, "BLOCK": decode_layer.COLUMNS, "GELU": full}),
    ):
        compiled = compile(kernel, target, dtype, () if full else absent, **options)
        assert compiled.metadata.shared <= limit
        if target.backend == "cuda":
            assert ("__assertfail" in compiled.asm["ptx"]) == (kernel is decode_layer.rope_kernel)


POLICY = {  # spec -> arguments that it goes without
    "dapo": (LOSSES["dapo"], ("ref_logprob", "rollout_logprob", "importance_ratio", "entropy_threshold", "num_items")),
    "gspo": (LOSSES["gspo"], ("ref_logprob", "rollout_logprob", "importance_ratio", "entropy", "entropy_threshold")),
    "gmpo": (
        replace(LOSSES["gmpo"], top_entropy=0.2, entropy_coef=0.1, entropy_mean="loss", empty_sequences="excluded"),
        ("ref_logprob", "rollout_logprob", "num_items"),
    ),
    "vespo": (
        replace(LOSSES["vespo"], kl_coef=0.1, kl_ratio_correction=True, importance="token_mask", importance_max=2.0),
        ("old_logprob", "importance_ratio", "entropy_threshold"),
    ),
    "dppo_kl": (
        replace(
            LOSSES["dppo_kl"],
            importance="geometric_mask",
            importance_max=2.0,
            off_policy_threshold=0.1,
            kl="k2",
            kl_coef=0.1,
            entropy_coef=0.1,
        ),
        ("importance_ratio", "entropy_threshold", "num_items"),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("loss", POLICY)
def test_policy_kernels(name, loss):
    target, limit, _ = TARGETS[name]
    spec, absent = POLICY[loss]
    options = policy_loss.structure(spec) | {"ADVANTAGE_OF_SEQUENCE": True, "IMPORTANCE_OF_SEQUENCE": False}
    numbers = Numbers.of(spec, 1.0)
    compiled = compile(policy_loss.forward_kernel, target, "fp32", absent, numbers=numbers, **options)
    assert compiled.metadata.shared <= limit
    if target.backend == "cuda":  # the last program sees what the others wrote
        assert "atom.global.gpu.acq_rel" in compiled.asm["ptx"]
    assert compile(policy_loss.backward_kernel, target, "fp32", BLOCK=1024).metadata.shared <= limit


@pytest.mark.parametrize(
    ("name", "dtype", "dim", "full"),
    [(name, "bf16", dim, dim == 128) for name, dtype in PAIRS if dtype == "bf16" for dim in (128, 256)]
    + [("MI300", "fp32", 64, False)],  # for minutes, were it more
)
def test_tree_kernels(name, dtype, dim, full):
    target, limit, instruction = TARGETS[name]
    absent = () if full else ("sinks", "window", "softcap")
    heads = {"REPEAT": 2, "D": dim, "DV": dim, "BLOCK_D": dim, "BLOCK_DV": dim}
    backward = tree_attention_backward
    k_own, k_step, k_launch = backward.tile(backward.KEYS_16_BIT, DTYPES[dtype], dim, limit)
    q_own, q_step, q_launch = backward.tile(backward.QUERIES_16_BIT, DTYPES[dtype], dim, limit)
    for kernel, constants in (
        (tree_attention.forward_kernel, heads | tree_attention.tile(DTYPES[dtype], dim, limit)),
        (backward.keys_kernel, heads | k_launch | {"BLOCK_K": k_own, "BLOCK_Q": k_step}),
        (backward.queries_kernel, heads | q_launch | {"BLOCK_Q": q_own, "BLOCK_K": q_step}),
    ):
        compiled = compile(kernel, target, dtype, absent, **constants)
        assert compiled.metadata.shared <= limit
        text = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
        assert "tf32" not in text if dtype == "fp32" else instruction in text


@pytest.mark.parametrize(  # those with the least shared memory; for minutes, were it more
    ("name", "dtype", "dims", "delta"),
    [("RTX 4090", "bf16", (128, 128), True), ("MI300", "fp32", (128, 64), False)],
)
def test_recurrence_kernels(name, dtype, dims, delta):
    target, limit, _ = TARGETS[name]
    widths = {"DK": dims[0], "DV": dims[1], "C": CHUNK, "REPEAT": 2}
    options = widths | {"BLOCK_K": dims[0], "BLOCK_V": tree_recurrence.BLOCK_V} | tree_recurrence.LAUNCH
    absent = ("d_ends",) if delta else ("d_ends", "beta", "solved", "read", "d_beta")
    backward = tree_recurrence_backward
    forward_kernels = (tree_recurrence.terms_kernel, tree_recurrence.states_kernel, tree_recurrence.ends_kernel)
    for kernel in (
        *forward_kernels, tree_recurrence.out_kernel, backward.updates_kernel, backward.states_kernel,
        backward.inputs_kernel,
    ):  # fmt: skip
        compiled = compile(kernel, target, dtype, absent, **options)
        assert compiled.metadata.shared <= limit
        assert "tf32" not in compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]  # fp32 is fp32


@pytest.mark.parametrize("name", TARGETS)
def test_recurrence_step(name):
    """States are read and written 16 bytes at a time, in both layouts."""
    target, limit, _ = TARGETS[name]
    sizes = {"group": 2, "DK": 128, "DV": 128, "BLOCK_K": 128, "BLOCK_V": 32}
    for strides, features, absent in (((128, 1), False, ()), ((1, 128), True, ("beta",))):
        layout = {"STRIDE_K": strides[0], "STRIDE_V": strides[1], "DECAY_OF_FEATURES": features}
        compiled = compile(recurrence_step.step_kernel, target, "fp32", absent, **sizes, **layout)
        assert compiled.metadata.shared <= limit
        if target.backend == "cuda":
            assert "st.global.v4" in compiled.asm["ptx"]


@pytest.mark.parametrize("name", TARGETS)
def test_tree_helpers(name):
    target, limit, _ = TARGETS[name]
    for by_key, absent in ((False, ()), (True, ("window",))):
        options = {"ROWS_ARE_KEYS": by_key, "ROW": 128, "COLUMN": 64, "CHUNK": tree_tiles.CHUNK}
        assert compile(tree_tiles.lists_kernel, target, "bf16", absent, **options).metadata.shared <= limit
    delta = compile(tree_attention_backward.delta_kernel, target, "bf16", DV=128, BLOCK=32, BLOCK_DV=128)
    assert delta.metadata.shared <= limit


@pytest.fixture
def variants(monkeypatch):
    """Launches compile nothing here: they only record what Triton would compile, by kernel."""
    seen = collections.defaultdict(set)
    backend = triton.compiler.make_backend(TARGETS["H100"][0])

    def record(kernel, *args, grid, warmup, **options):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, key, rest = bind(*args, **options)
        seen[kernel.fn.__name__].add(str((key, rest)))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    return seen


@pytest.mark.parametrize("layout", ["whole", "tokens of a longer sequence"])
def test_one_compilation_for_all_lengths(layout, variants):
    """Lengths, batch sizes and temperatures are run-time values; 16 and 1 are the ones that Triton likes to fix."""
    for B, T in ((1, 1), (1, 2), (2, 1), (3, 7), (16, 16), (2, 48), (1, 100), (5, 33), (4, 160), (7, 17)):
        logits = torch.zeros(B, T, 1024) if layout == "whole" else torch.zeros(B, T + 1, 1024)[:, :-1]
        index, rows = torch.zeros(B * T, dtype=torch.int64), torch.zeros(7, B * T)
        temperature = 0.5 + T
        selective_log_softmax.forward(logits, index, temperature, -B, True)
        selective_log_softmax.backward(torch.empty(B, T, 1024), logits, index, temperature, -B, rows, rows[1], rows[2])
        hidden, weight = torch.zeros(B * T, 64), torch.zeros(1024 * T, 64)
        head = index, None, None, temperature, 1.0 / T, 30.0 * T, -B, T * 16
        linear_logprob.partial(hidden, weight, *head, 2**20, True, torch.float32)
        linear_logprob.backward(hidden, weight, *head, torch.float32, rows, rows[1], rows[2], True, True, False)
        token_stats.merge_partials(torch.zeros(T, 8, B), 1024 * T)
    assert len(variants) == 6
    assert {name: len(keys) for name, keys in variants.items()} == dict.fromkeys(variants, 1)


def test_one_compilation_for_all_decode_steps(variants):
    """Rows, segments, blocks and windows are run-time values."""
    for B, S, M in ((1, 1, 1), (2, 1, 16), (16, 16, 1), (33, 300, 7), (48, 64, 32)):
        tables = [torch.zeros(shape, dtype=torch.int32) for shape in ((S, 2), (S,), (S,), (S, M), (B,))]
        k_cache, v_cache = torch.zeros(M, 2, 64, 64), torch.zeros(M, 2, 64, 64)
        for window, softcap in ((1, 1.0), (16 * M, 2.5)):
            decode_attention.forward(torch.zeros(B, 4, 64), k_cache, v_cache, *tables, 1.0 / B, window, softcap, None)
        kv_append.append(torch.zeros(B, 2, 64), torch.zeros(B, 2, 64), k_cache, v_cache, torch.zeros(B).long())
        x, q, kv, turn, head = (torch.zeros(B, n) for n in (256, 256, 128, 64, 64))
        decode_layer.add_rms_norm(x, x, x[0], 1.0 / B, False, x, x)
        places = k_cache, v_cache, torch.zeros(B).long(), q.view(B, 4, 64)
        decode_layer.rope_append(q, kv, kv, turn, turn, head[0], head[0], 1.0 / B, False, *places)
        decode_layer.gated_activation(x, x, False, x)
    assert {name: len(keys) for name, keys in variants.items()} == dict.fromkeys(variants, 1)
    assert len(variants) == 6


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_compilation_for_all_policies(level, variants):
    """Lengths, parts of a sequence and hyper-parameters are run-time values, 1 too."""
    for S, T in ((1, 1), (1, 16), (16, 1), (3, 7), (1, 9000), (2, 5000), (16, 4096)):
        for epsilon in (0.2, 1.0, 2):
            spec = LossSpec(ratio=level, clip_low=epsilon, clip_high=epsilon, kl_coef=epsilon, kl_clamp=1 / epsilon)
            whole = torch.zeros(4, S * T + 1)
            for logprob, old, ref, entropy in (whole[:, :-1], whole[:, 1:]):
                mask, cu_seqlens = torch.ones(S * T, dtype=torch.bool), torch.arange(S + 1) * T
                policy_loss.forward(
                    logprob,
                    old,
                    torch.zeros(S, 1),
                    mask,
                    cu_seqlens,
                    ref,
                    None,
                    None,
                    entropy,
                    None,
                    None,
                    1.0,
                    spec.key,
                )
                policy_loss.backward(whole[:1, :-1], torch.ones(1), torch.ones(()))
    assert {name: len(keys) for name, keys in variants.items()} == {"forward_kernel": 1, "backward_kernel": 1}


@pytest.mark.parametrize("window", [0, 1])
def test_one_compilation_for_all_trees(window, variants):
    """Tokens, windows and scales are run-time values; a list of tiles is made for three kernels' tiles."""
    for N in (1, 2, 16, 100, 128, 1000):
        whole = torch.zeros(N + 1, 4, 64), torch.zeros(N + 1, 2, 64), torch.zeros(N + 1, 2, 64)
        tree = torch.full((N,), N, dtype=torch.int32), torch.arange(N, dtype=torch.int32)
        for q, k, v in ([x[:-1] for x in whole], [x[1:] for x in whole]):
            args = q, k, v, torch.zeros(4), *tree, 1 / N, window * N, 0.0
            out, lse = tree_attention.forward(*args)
            tree_attention_backward.backward(*args, out, lse, torch.zeros(N, 4, 64))
    assert {name: len(keys) for name, keys in variants.items()} == {
        "lists_kernel": 3,
        "forward_kernel": 1,
        "delta_kernel": 1,
        "keys_kernel": 1,
        "queries_kernel": 1,
    }
