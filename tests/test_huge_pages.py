"""Huge pages for weights and cache: tensors in shared chunks of memory, each of which is freed with its last tensor."""

import gc
import mmap
import sys
import weakref

import pytest
import torch

from flashpo import _huge_pages as huge_pages
from flashpo._huge_pages import CHUNK, HugePages

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's pages")


@linux
def test_tensors_do_not_overlap():
    memory = HugePages()
    shapes = [((3, 5), torch.float32), ((0, 7), torch.float32), ((7,), torch.bfloat16), ((2, 1, 9), torch.int64)]
    shapes += [((CHUNK // 3,), torch.uint8)] * 4 + [((2 * CHUNK + 1,), torch.uint8), ((), torch.float64)]
    tensors = [memory.empty(shape, dtype, CPU).fill_(i) for i, (shape, dtype) in enumerate(shapes)]
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert (tensor == i).all()
        assert tensor.data_ptr() % 64 == 0
        assert tensor._version == 1, "in-place changes of others do not count"


@linux
def test_pages_are_asked_for_and_aligned(monkeypatch):
    asked = []

    class Map(mmap.mmap):
        def madvise(self, option):
            asked.append(option)
            super().madvise(option)

    monkeypatch.setattr(huge_pages.mmap, "mmap", Map)
    first = HugePages().empty((1,), torch.float32, CPU)
    assert asked == [mmap.MADV_HUGEPAGE]
    assert first.data_ptr() % huge_pages.PAGE == 0


@linux
def test_a_chunk_goes_with_its_last_tensor():
    memory = HugePages()
    tensors = [memory.empty((5,), torch.float32, CPU) for _ in range(2)]
    chunk = weakref.ref(memory._chunk)
    del memory
    tensors.pop()
    gc.collect()
    assert chunk() is not None
    tensors.pop()
    gc.collect()
    assert chunk() is None


@linux
def test_without_memory():
    with pytest.raises(MemoryError, match="bytes of memory"):
        HugePages().empty((1 << 60,), torch.uint8, CPU)


def test_why_not(monkeypatch, tmp_path):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "enabled")
    assert huge_pages.why_not() == "not in this kernel"
    for text, reason in (("always [madvise] never", ""), ("[always] madvise never", ""),
                         ("always madvise [never]", f"{tmp_path}/enabled says never")):  # fmt: skip
        huge_pages.SETTING.write_text(text)
        assert huge_pages.why_not() == reason


def test_elsewhere_it_is_torch(monkeypatch):
    assert HugePages().empty((2, 3), torch.float32, torch.device("meta")).device.type == "meta"
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory = HugePages()
    assert memory.empty((2, 3), torch.bfloat16, CPU).shape == (2, 3)
    assert memory._chunk is None
