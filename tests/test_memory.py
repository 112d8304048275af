"""The memory that the process may still take: the host's, within the limits of all control groups above the process."""

import pytest

from flashpo._memory import available_bytes

GIB = 1 << 30


def files(root, tree):
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def v2(group, limit, used, file=0):
    top = f"sys/fs/cgroup/{group}"
    stat = f"anon 5\ninactive_file {file}\nactive_file 7\n"
    return {f"{top}memory.max": limit, f"{top}memory.current": used, f"{top}memory.stat": stat}


def v1(group, limit, used, file=0):
    top = f"sys/fs/cgroup/memory/{group}"
    stat = f"inactive_file 1\ntotal_inactive_file {file}\n"
    return {f"{top}memory.limit_in_bytes": limit, f"{top}memory.usage_in_bytes": used, f"{top}memory.stat": stat}


HOST = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {32 << 20} kB\n"}
V1 = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n"
CASES = {
    "no control groups": ({}, 32),
    "v2 without a limit": ({"proc/self/cgroup": "0::/a/b\n"} | v2("a/b/", "max\n", 5 * GIB), 32),
    "v2": ({"proc/self/cgroup": "0::/a/b\n"} | v2("a/b/", f"{8 * GIB}\n", f"{5 * GIB}\n"), 3),
    "v2 with files in memory": ({"proc/self/cgroup": "0::/a/b\n"} | v2("a/b/", 8 * GIB, 5 * GIB, 2 * GIB), 5),
    "v2, a parent's": ({"proc/self/cgroup": "0::/a/b\n"} | v2("a/b/", 8 * GIB, 1) | v2("a/", 4 * GIB, 2 * GIB), 2),
    "v2, own namespace": ({"proc/self/cgroup": "0::/\n"} | v2("", 6 * GIB, 2 * GIB), 4),
    "v2, host's path": ({"proc/self/cgroup": "0::/docker/abc\n"} | v2("", 6 * GIB, 2 * GIB), 4),
    "v1": ({"proc/self/cgroup": V1} | v1("docker/abc/", 8 * GIB, 5 * GIB, GIB), 4),
    "v1, unlimited": ({"proc/self/cgroup": V1} | v1("docker/abc/", 9223372036854771712, 5 * GIB), 32),
    "v1, a parent's": ({"proc/self/cgroup": V1} | v1("docker/abc/", 8 * GIB, 0) | v1("", 2 * GIB, GIB), 1),
    "v1, host's path": ({"proc/self/cgroup": V1} | v1("", 2 * GIB, GIB), 1),
    "v1 beside an empty v2": ({"proc/self/cgroup": V1 + "0::/\n"} | v1("docker/abc/", 8 * GIB, 5 * GIB), 3),
    "above its limit": ({"proc/self/cgroup": "0::/a\n"} | v2("a/", GIB, 2 * GIB), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_available_bytes(case, tmp_path):
    tree, gib = CASES[case]
    left = available_bytes(files(tmp_path, HOST | tree))
    assert left == pytest.approx(gib * GIB, abs=8)


def test_this_machine():
    assert 0 < available_bytes() < 1 << 50
