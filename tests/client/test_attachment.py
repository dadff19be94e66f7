from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import msgspec
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

import lunashm.client
from lunashm import protocol as p
from lunashm.client import Attachment, Session, attach, rules_of
from lunashm.errors import (
    HostUnavailable,
    InvalidCheckpoint,
    LunashmError,
    ModelNotFound,
    ModelNotReady,
    PathNotAllowed,
    SettingsError,
    SourceChanged,
    UnsupportedFormat,
)
from lunashm.manifest import PRIVATE, DtypeRule, TensorSpec
from lunashm.memory import ON_CPU, rung_for
from tests import checkpoints
from tests.client.test_session import leases
from tests.hosting import Hosting
from tests.waiting import until


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# -- attaching ---------------------------------------------------------------------------------------------------------


def test_library_has_exactly_these_names() -> None:
    names = ["AppliedLora", "Attachment", "Session", "attach", "rules_of", "session_for"]
    assert sorted(lunashm.client.__all__) == names
    assert all(hasattr(lunashm.client, name) for name in lunashm.client.__all__)
    with pytest.raises(AttributeError):
        lunashm.client.nothing  # noqa: B018


def test_state_dict_is_the_files_own(hosting: Hosting, path: Path) -> None:
    save_file({"w": torch.randn(3, 5), "s": torch.tensor(2.5), "none": torch.zeros(0, 2)}, path, {"format": "pt"})
    with attach(path) as model:
        assert equal(model.state_dict(), load_file(path))
        assert model.metadata == {"format": "pt"}
        assert model.nbytes == 64 == model.manifest.nbytes
        assert model.manifest.digest == blake3(path.read_bytes()).hexdigest()
        assert (model.shared, model.attached, model.reason) == (True, True, "")
        assert model.lease > 0


def test_tensors_lie_in_the_hosts_memory_not_in_ours(hosting: Hosting, path: Path) -> None:
    with attach(path) as model, attach(path) as again:
        for name, tensor in model.state_dict().items():
            assert tensor.data_ptr() == again.state_dict()[name].data_ptr()


def test_state_dict_is_fresh_each_time(hosting: Hosting, path: Path) -> None:
    with attach(path) as model:
        model.state_dict().clear()
        assert len(model.state_dict()) == len(checkpoints.SMALL)


def test_path_may_be_relative_and_of_any_kind(hosting: Hosting, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    for form in (path, str(path), path.name, Path(path.name), os.fsencode(path)):
        with attach(form) as model:  # type: ignore[arg-type]
            assert model.manifest.source.path == str(path)


def test_link_to_a_content_addressed_store_is_attached_by_its_own_name(hosting: Hosting, path: Path) -> None:
    path.rename(path.with_name("0a1b2c"))
    path.symlink_to("0a1b2c")
    with attach(path) as model:
        assert model.manifest.name == "m.safetensors"
        with model.reattached(10.0) as again:
            assert again.manifest.digest == model.manifest.digest


def test_shared_tensors_become_parameters(hosting: Hosting, path: Path) -> None:
    checkpoints.write(path, {"weight": ("F32", (4, 8)), "bias": ("F32", (4,))})
    with attach(path) as model, torch.device("meta"):
        layer = torch.nn.Linear(8, 4)
        layer.load_state_dict(model.state_dict(), assign=True)
        assert layer.weight.data_ptr() == model.state_dict()["weight"].data_ptr()
    assert layer(torch.ones(1, 8)).shape == (1, 4)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_dtypes_are_converted_in_the_host_as_torch_would(hosting: Hosting, path: Path) -> None:
    stored = load_file(path)
    with attach(path, dtypes=torch.float16) as model:
        assert equal(model.state_dict(), {name: tensor.to(torch.float16) for name, tensor in stored.items()})
    with attach(path, dtypes={"layer0.": "F64"}) as model:
        expected = {name: t.double() if name.startswith("layer0.") else t for name, t in stored.items()}
        assert equal(model.state_dict(), expected)


@pytest.mark.parametrize(
    ("dtypes", "rules"),
    [
        (None, (DtypeRule("", ""),)),
        ("BF16", (DtypeRule("", "BF16"),)),
        (torch.float8_e4m3fn, (DtypeRule("", "F8_E4M3"),)),
        ({"vae.": torch.float32}, (DtypeRule("", ""), DtypeRule("vae.", "F32"))),
        ({"": torch.float16, "vae.": None}, (DtypeRule("", "F16"), DtypeRule("vae.", ""))),
    ],
)
def test_dtypes_have_one_wire_form(dtypes: object, rules: tuple[DtypeRule, ...]) -> None:
    assert rules_of(dtypes) == rules  # type: ignore[arg-type]


@pytest.mark.parametrize("dtypes", [torch.int8, torch.complex128, "float32", {"a": "I64"}])
def test_dtype_that_nothing_is_converted_to_is_unsupported(dtypes: object) -> None:
    with pytest.raises(UnsupportedFormat):
        attach("/anything.safetensors", dtypes=dtypes)  # type: ignore[arg-type]


# -- letting go --------------------------------------------------------------------------------------------------------


def test_lease_ends_with_the_last_tensor(hosting: Hosting, path: Path) -> None:
    with attach(path) as model:
        kept = model.state_dict()["layer0.weight"]
    total = kept.sum().item()
    del model
    gc.collect()
    assert leases(hosting) == 1
    assert kept.sum().item() == total
    del kept
    gc.collect()
    until(lambda: leases(hosting) == 0, "the lease ends")


def test_closed_attachment_says_so(hosting: Hosting, path: Path) -> None:
    model = attach(path)
    model.close()
    model.close()
    with pytest.raises(LunashmError, match="closed; attach again"):
        model.state_dict()
    with pytest.raises(LunashmError, match="not mapped"):
        model.checksum()


def test_model_that_is_unloaded_stays_usable(hosting: Hosting, path: Path) -> None:
    expected = load_file(path)
    with attach(path) as model, hosting.client() as client:
        client.request(p.Unload("m.safetensors", True))
        assert equal(model.state_dict(), expected)
        checksum = model.checksum()
        path.unlink()
        assert model.checksum() == checksum


# -- reattaching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", ON_CPU)
def test_reattaching_gives_the_same_bytes_from_the_new_host(tmp_path: Path, rung: str) -> None:
    path = tmp_path / "m.safetensors"
    checkpoints.write(path)
    first, second = (Hosting(tmp_path, rung=rung_for(rung, "cpu")) for _ in range(2))
    first.start()
    model = attach(path)
    checksum = model.checksum()
    first.stop()
    second.start()
    assert model.checksum() == checksum  # memory of these rungs outlives its host
    again = model.reattached(10.0)
    assert not model.attached
    assert (again.attached, again.checksum()) == (True, checksum)
    assert again.state_dict()["scale"].data_ptr() != model.state_dict()["scale"].data_ptr()
    model.close()
    del model
    gc.collect()
    assert leases(second) == 1  # the old host's leases are no business of the new one
    again.close()
    second.stop()


def test_reattaching_to_a_changed_file_is_refused_and_leaves_no_lease(hosting: Hosting, path: Path) -> None:
    model = attach(path)
    checkpoints.write(path, seed=1)
    checkpoints.touch(path)
    with pytest.raises(SourceChanged, match="other bytes now"):
        model.reattached(10.0)
    gc.collect()
    until(lambda: leases(hosting) == 1, "only the old lease is left")
    model.close()


def test_reattaching_uses_the_path_that_was_attached_not_its_twin(hosting: Hosting, path: Path) -> None:
    with attach(path):
        twin = path.with_name("twin.safetensors")
        twin.write_bytes(path.read_bytes())
        with attach(twin) as model:
            path.unlink()
            model.reattached(10.0).close()


# -- what the host says is checked -------------------------------------------------------------------------------------


def reply_changed(hosting: Hosting, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    reply = hosting.server.service._outbox.reply

    def lie(route: bytes, number: int, message: p.Message) -> bool:
        if isinstance(message, p.Attached):
            message = msgspec.structs.replace(message, manifest=msgspec.structs.replace(message.manifest, **changes))
        return reply(route, number, message)

    monkeypatch.setattr(hosting.server, "reply", lie)


def test_manifest_that_does_not_fit_its_segments_is_refused_and_its_lease_ends(
    hosting: Hosting, path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(path).close()
    for segments in ((1 << 30,), (), (1, 2)):
        reply_changed(hosting, monkeypatch, segments=segments)
        with pytest.raises(InvalidCheckpoint):
            Attachment.open(session, str(path), (), 10.0)
        monkeypatch.undo()
    gc.collect()
    until(lambda: leases(hosting) == 0, "the leases end")


def test_host_that_sees_another_file_under_the_same_name_is_refused(
    hosting: Hosting, path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with a volume of its own at the same place."""
    with attach(path) as model:
        source = msgspec.structs.replace(model.manifest.source, size=model.manifest.source.size + 1)
    reply_changed(hosting, monkeypatch, source=source)
    with pytest.raises(SourceChanged, match="the one seen here"):
        Attachment.open(session, str(path), (), 10.0)


# -- fallbacks ---------------------------------------------------------------------------------------------------------


def test_no_host_is_an_error_unless_local_is_allowed(path: Path, hosting: Hosting) -> None:
    hosting.stop()
    for fallback in ("wait", "fail"):
        with pytest.raises(HostUnavailable):
            attach(path, fallback=fallback)  # type: ignore[arg-type]
    assert not attach(path, fallback="local").shared


def test_fail_does_not_wait_for_a_load(hosting: Hosting, path: Path) -> None:
    with pytest.raises(ModelNotReady):
        attach(path, fallback="fail")
    until(lambda: hosting.counters() and not hosting.server.service.busy, "the load goes on and ends")
    attach(path, fallback="fail").close()


def test_local_copy_is_the_files_bytes_described_honestly_and_its_reason_is_logged(
    hosting: Hosting, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), attach(path, fallback="local", dtypes={"layer0.": torch.float16}) as model:
        tensors, manifest = model.state_dict(), model.manifest
    stored = load_file(path)
    assert equal(tensors, {n: t.half() if n.startswith("layer0.") else t for n, t in stored.items()})
    assert (model.shared, model.attached, model.lease) == (False, False, 0)
    assert model.reason == "still loading in the host"
    assert "not shared" in caplog.text
    assert (manifest.digest, manifest.generation, manifest.segments) == ("", 0, ())
    specs = {spec.name: spec for spec in manifest.tensors}
    assert specs["layer0.weight"] == TensorSpec("layer0.weight", "F32", "F16", (8, 16), PRIVATE, 0, 256)
    assert specs["scale"] == TensorSpec("scale", "BF16", "BF16", (), PRIVATE, 0, 2)
    assert manifest.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert manifest.source.size == path.stat().st_size


def test_local_copy_is_private_and_can_be_neither_summed_nor_reattached(path: Path, hosting: Hosting) -> None:
    hosting.stop()
    model = attach(path, fallback="local")
    model.state_dict()["scale"].fill_(7)
    assert load_file(path)["scale"] != 7
    with pytest.raises(LunashmError):
        model.checksum()
    with pytest.raises(LunashmError, match="loaded locally"):
        model.reattached(1.0)
    model.close()
    assert model.nbytes == sum(t.nbytes for t in load_file(path).values())


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("missing.safetensors", None, ModelNotFound),
        ("model.ckpt", b"\x80\x04.", UnsupportedFormat),
        ("bad.safetensors", b"12345678 no header", InvalidCheckpoint),
    ],
)
def test_what_the_host_refuses_for_its_content_is_not_loaded_locally_either(
    hosting: Hosting, name: str, content: bytes | None, error: type[LunashmError]
) -> None:
    if content is not None:
        (hosting.root / name).write_bytes(content)
    with pytest.raises(error):
        attach(hosting.root / name, fallback="local")


def test_file_outside_the_roots_is_refused_or_loaded_locally(
    hosting: Hosting, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "m.safetensors"
    path.rename(outside)
    with pytest.raises(PathNotAllowed, match="--root"):
        attach(outside)
    assert "outside the host's roots" in attach(outside, fallback="local").reason


def test_path_that_no_message_can_hold_is_an_error_of_ours(hosting: Hosting) -> None:
    for path in ("/models/\udcff.safetensors", "/models/a\0b.safetensors"):
        with pytest.raises(LunashmError):
            attach(path)
    attach_still_works = hosting.counters()
    assert attach_still_works


@pytest.mark.parametrize("wrong", [{"fallback": "hope"}, {"endpoint": "tcp://host:1"}, {"wait_s": -1.0}])
def test_setting_that_makes_no_sense_is_an_error_whatever_the_fallback(path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        attach(path, **({"fallback": "local"} | wrong))  # type: ignore[arg-type]
