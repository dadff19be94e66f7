from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lunashm import views
from lunashm.errors import UnsupportedFormat
from lunashm.manifest import CONVERTIBLE, ITEMSIZE, Manifest, Source, TensorSpec, aligned
from lunashm.views import DTYPES, NAMES, convert, dtype_name, state_dict, torch_dtype
from tests.fakes import heap_mapping


def manifest(*tensors: TensorSpec) -> Manifest:
    return Manifest("m", "", 1, Source("/m", 0, 0, 0), (), tensors, (4096,), {})


def one(dtype: str, shape: tuple[int, ...], nbytes: int, offset: int = 0) -> Manifest:
    return manifest(TensorSpec("a", dtype, dtype, shape, 0, offset, nbytes))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_has_its_torch_dtype_of_the_same_size() -> None:
    assert set(DTYPES) == set(ITEMSIZE)
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEMSIZE
    assert {NAMES[DTYPES[name]] for name in ITEMSIZE} == set(ITEMSIZE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_view_shows_the_buffers_bytes_in_every_dtype(dtype: str) -> None:
    size = ITEMSIZE[dtype]
    data = bytes([0, 1] * 3) if dtype == "BOOL" else bytes(range(6 * size))
    view = state_dict(one(dtype, (2, 3), 6 * size, offset=256), [heap_mapping(bytes(256) + data)])["a"]
    assert (view.dtype, view.shape) == (DTYPES[dtype], (2, 3))
    assert view.is_contiguous()
    assert bits(view) == data


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalar_and_empty_tensors_keep_their_shape(dtype: str) -> None:
    data = heap_mapping(bytes(64))
    scalar = state_dict(one(dtype, (), ITEMSIZE[dtype]), [data])["a"]
    empty = state_dict(one(dtype, (3, 0, 2), 0), [data])["a"]
    assert (scalar.shape, scalar.dtype) == ((), DTYPES[dtype])
    assert (empty.shape, empty.dtype) == ((3, 0, 2), DTYPES[dtype])


def test_tensor_keeps_its_buffer_alive_and_alone_does() -> None:
    data = heap_mapping(bytes(64))
    alive = weakref.ref(data)
    tensor = state_dict(one("F32", (4, 4), 64), [data])["a"][1:]
    del data
    gc.collect()
    assert alive() is not None
    assert tensor.sum() == 0
    del tensor
    gc.collect()
    assert alive() is None


def test_each_tensor_has_a_storage_of_its_own_size() -> None:
    """So that deepcopy and pickling take one tensor along, not the whole segment."""
    data = heap_mapping(bytes(4096))
    view = state_dict(one("F16", (8,), 16, offset=512), [data])["a"]
    assert view.untyped_storage().nbytes() == 16
    assert copy.deepcopy(view).untyped_storage().nbytes() == 16


def test_tensors_made_in_inference_mode_can_become_parameters() -> None:
    with torch.inference_mode():
        view = state_dict(one("F32", (2,), 8), [heap_mapping(bytes(64))])["a"]
    assert not view.is_inference()
    torch.nn.Parameter(view, requires_grad=True)


def test_no_warning_about_read_only_buffers_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state_dict(one("F32", (2,), 8), [heap_mapping(bytes(64))])


def test_dtype_that_this_torch_lacks_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(views.DTYPES, "F8_E8M0")
    with pytest.raises(UnsupportedFormat, match="newer torch"):
        torch_dtype("F8_E8M0")
    with pytest.raises(UnsupportedFormat, match="complex128"):
        dtype_name(torch.complex128)


@given(st.sampled_from(sorted(CONVERTIBLE)), st.sampled_from(sorted(CONVERTIBLE)), st.binary(min_size=8, max_size=256))
def test_conversion_is_torchs_own(source: str, target: str, data: bytes) -> None:
    data = data[: len(data) // 8 * 8]
    expected = torch.frombuffer(bytearray(data), dtype=DTYPES[source]).to(DTYPES[target])
    converted = bytes(convert(bytearray(data), source, target))
    assert len(converted) == expected.nbytes
    assert converted == bits(expected)


def test_views_of_one_segment_do_not_overlap() -> None:
    specs, offset = [], 0
    for number in range(5):
        specs.append(TensorSpec(f"t{number}", "U8", "U8", (100 + number,), 0, offset, 100 + number))
        offset = aligned(offset + 100 + number)
    tensors = state_dict(manifest(*specs), [heap_mapping(bytes(4096))])
    starts = [tensor.data_ptr() for tensor in tensors.values()]
    assert [start - starts[0] for start in starts] == [spec.offset for spec in specs]
