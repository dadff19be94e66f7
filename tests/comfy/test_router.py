"""The Luna loader nodes: the same picture as stock's loaders, from the host, or locally with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench.comfy_server import ComfyServer, PromptFailed
from bench.workflows import Graph, pixels, txt2img_checkpoint
from tests.comfy.conftest import Host, running_host, shared_server
from tests.comfy.luna import ROUTER, SD15, drawn, routed, show

pytestmark = pytest.mark.comfy

UNET = "sd15-unet.safetensors"
PRECISIONS = ["auto", "as stored", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"]


@pytest.fixture(scope="module")
def own_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the session's models: a bare UNet, and a second checkpoint with other weights and encoders of its own."""
    folder = tmp_path_factory.mktemp("router") / "models"
    whole = load_file(models / "checkpoints" / SD15)
    prefix = "model.diffusion_model."
    (folder / "diffusion_models").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    unet = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    save_file(unet, folder / "diffusion_models" / UNET)
    save_file({name: -tensor if tensor.is_floating_point() else tensor for name, tensor in whole.items()},
              folder / "checkpoints" / "second.safetensors")  # fmt: skip
    no_encoder = {name: tensor for name, tensor in whole.items() if not name.startswith("cond_stage_model.")}
    save_file(no_encoder, folder / "checkpoints" / "no-encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def own_host(models: Path, own_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with running_host(tmp_path_factory.mktemp("run"), [models, own_models]) as host:
        yield host


@pytest.fixture(scope="module")
def luna(models: Path, own_models: Path, own_host: Host) -> Iterator[ComfyServer]:
    server = shared_server(models, own_host.environment)
    server.models.append(own_models)
    with server as running:
        yield running


def graph(seed: int) -> Graph:
    return txt2img_checkpoint(SD15, seed=seed)


def test_checkpoint_draws_as_with_stocks_loader_and_says_where_each_part_is_from(
    luna: ComfyServer, stock: ComfyServer, own_host: Host
) -> None:
    picture, status = drawn(luna, routed(graph(1)))
    assert (pixels(picture) == pixels(stock.render(graph(1)))).all()
    model, clip, vae, mode = status.splitlines()
    for line, what in ((model, "MODEL"), (clip, "CLIP"), (vae, "VAE")):
        assert line.startswith(f"{what} {SD15}: ")
        assert f"from the host at ipc://{own_host.runtime}/cpu.sock (posix, cpu)" in line
        assert f"[LunaModelRouter] ✓ {line}; daemon_mode auto" in luna.log_text()
    assert "0.0 MB private" in model
    assert mode == "daemon_mode auto"


def test_name_is_handed_on(luna: ComfyServer) -> None:
    shown = routed(graph(2)) | {"status": show(["checkpoint", 3])}
    assert drawn(luna, shown)[1] == SD15


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_is_converted_by_the_host_as_comfyui_would(
    luna: ComfyServer, own_host: Host, precision: str
) -> None:
    seed = 10 + PRECISIONS.index(precision)
    theirs, local = drawn(luna, routed(graph(seed), precision=precision, daemon_mode="force_local"))
    ours, status = drawn(luna, routed(graph(seed), precision=precision, daemon_mode="force_daemon"))
    assert (pixels(ours) == pixels(theirs)).all()
    assert status.count("0.0 MB private") == 2, "the text encoder computes a buffer of its own"
    assert local.splitlines()[0] == f"MODEL {SD15}: local: mode force_local"
    if precision.startswith("fp8"):
        dtype = {"fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}[precision]
        assert any(dtype in model["dtypes"] for model in own_host.models())


def test_as_stored_takes_the_files_own_dtype(luna: ComfyServer, own_host: Host) -> None:
    luna.free()
    drawn(luna, routed(graph(19), precision="as stored"))
    in_use = [model for model in own_host.models() if model["clients"]]
    assert [set(model["dtypes"]) for model in in_use] == [{"F16", "F32"}], "the VAE runs in float32"
    assert "MODEL sd15-tiny.safetensors: 51.6 MB from" in luna.log_text(), "two bytes each"


def test_bare_diffusion_model_with_chosen_parts(luna: ComfyServer, own_host: Host) -> None:
    """The VAE is one of 16 channels: only what is loaded is looked at."""
    parts = {"clip_1": "clip-l.safetensors", "vae_name": "vae-tiny.safetensors"}
    bare = routed(graph(20), model_source="diffusion_models", model_name=UNET, daemon_mode="force_daemon", **parts)
    status = luna.run({name: bare[name] for name in ("checkpoint", "status")})["outputs"]["status"]["text"][0]
    assert [line.split(":")[0] for line in status.splitlines()[:3]] == [
        f"MODEL {UNET}", "CLIP clip-l.safetensors", "VAE vae-tiny.safetensors",
    ]  # fmt: skip
    assert status.count("from the host at") == 3


@pytest.mark.parametrize("kind", ["auto", "SD1.5"])
def test_missing_text_encoder_lists_what_the_type_needs(luna: ComfyServer, kind: str) -> None:
    bare = routed(graph(21), model_source="unet", model_name=UNET, model_type=kind, vae_name="vae-tiny.safetensors")
    with pytest.raises(PromptFailed, match=r"SD1\.5 needs CLIP-L as text encoders of sd15-unet.*clip_1 to clip_4"):
        luna.render(bare)


def test_checkpoint_without_an_encoder_takes_the_chosen_one(luna: ComfyServer) -> None:
    alone = routed(graph(22), model_name="no-encoder.safetensors")
    with pytest.raises(PromptFailed, match=r"SD1\.5 needs CLIP-L"):
        luna.render(alone)
    _, status = drawn(luna, routed(graph(22), model_name="no-encoder.safetensors", clip_1="clip-l.safetensors"))
    assert "CLIP clip-l.safetensors: 0.25 GB from the host" in status


def test_flux_needs_two_and_says_so_before_anything_is_read(luna: ComfyServer, own_host: Host) -> None:
    flux = routed(
        graph(23), model_source="diffusion_models", model_name="flux-tiny.safetensors", model_type="Flux",
        clip_1="clip-l.safetensors",
    )  # fmt: skip
    with pytest.raises(PromptFailed, match=r"Flux needs CLIP-L and T5-XXL.*chosen: clip-l\.safetensors"):
        luna.render(flux)
    assert not any("flux-tiny" in model["name"] for model in own_host.models())


def test_another_type_than_said_is_refused_with_both(luna: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match=r"sd15-tiny\.safetensors is SD1\.5, not SDXL: set model_type"):
        luna.render(routed(graph(24), model_type="SDXL"))


def test_name_in_another_folder_says_which(luna: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match="is not in checkpoints; it is in diffusion_models"):
        luna.render(routed(graph(25), model_name=UNET))


def test_force_daemon_without_a_host_loads_nothing_and_auto_goes_on(
    models: Path, tmp_path: Path, stock: ComfyServer
) -> None:
    outside = tmp_path / "outside"
    (outside / "checkpoints").mkdir(parents=True)
    shutil.copy(models / "checkpoints" / SD15, outside / "checkpoints" / "outside.safetensors")
    server = shared_server(models, {"LUNASHM_RUNTIME_DIR": str(tmp_path)})
    server.models.append(outside)
    with server:
        with pytest.raises(PromptFailed) as failed:
            server.render(routed(graph(30), daemon_mode="force_daemon"))
        said = failed.value.exception_message
        assert "[LunaModelRouter] daemon_mode is 'force_daemon'" in said
        assert f"ipc://{tmp_path}/cpu.sock" in said and "lunashm serve" in said
        assert "model weight dtype" not in server.log_text(), "nothing was built"
        picture, status = drawn(server, routed(graph(30)))
        assert (pixels(picture) == pixels(stock.render(graph(30)))).all()
        assert status.count("local: no lunashm host at") == 3
        assert f"[LunaModelRouter] ⚠ MODEL {SD15}: local: no lunashm host" in server.log_text()
        with running_host(tmp_path, [models]):
            _, status = drawn(server, routed(graph(31), model_name="outside.safetensors"))
            assert "is outside the host's roots" in status
            with pytest.raises(PromptFailed, match="is outside the host's roots"):
                server.render(routed(graph(32), model_name="outside.safetensors", daemon_mode="force_daemon"))


# -- the other two -----------------------------------------------------------------------------------------------------


def second(name: str, seed: int, **inputs: object) -> Graph:
    """Drawn with the second model, encoders and VAE as that loader gives them."""
    both = routed(graph(seed))
    both["first"] = both["checkpoint"]
    given = ROUTER | {"model_name": name, "first_model": ["first", 0], "clip": ["first", 1], "vae": ["first", 2]}
    given = {key: value for key, value in (given | inputs).items() if value is not None}
    return both | {"checkpoint": {"class_type": "LunaSecondaryModelLoader", "inputs": given}}


def test_second_model_uses_the_firsts_encoders_and_vae(luna: ComfyServer) -> None:
    picture, status = drawn(luna, second("second.safetensors", 40))
    model, clip, vae, _ = status.splitlines()
    assert model.startswith("MODEL second.safetensors: ")
    assert clip.startswith("CLIP the first model's, ") and vae.startswith("VAE the first model's, ")
    other = ROUTER | {"model_name": "second.safetensors"}
    mixed = routed(graph(40)) | {"other": {"class_type": "LunaModelRouter", "inputs": other}}
    mixed["sampler"]["inputs"]["model"] = ["other", 0]
    assert (pixels(picture) == pixels(drawn(luna, mixed)[0])).all()


def test_second_model_brings_its_own_where_nothing_is_connected(luna: ComfyServer) -> None:
    picture, status = drawn(luna, second("second.safetensors", 41, clip=None, vae=None))
    assert status.count("second.safetensors: ") == 3
    assert (pixels(picture) == pixels(luna.render(txt2img_checkpoint("second.safetensors", seed=41)))).all()


def test_encoders_and_vae_of_another_kind_are_not_used(luna: ComfyServer) -> None:
    given = second("sd3-tiny.safetensors", 42)
    status = luna.run({name: given[name] for name in ("first", "checkpoint", "status")})["outputs"]["status"]["text"][0]
    assert status.count("sd3-tiny.safetensors: ") == 3
    assert "the first model's CLIP (SD1Tokenizer) does not fit sd3-tiny.safetensors" in luna.log_text()
    assert "the first model's VAE (SD15) does not fit sd3-tiny.safetensors" in luna.log_text()


def test_host_status_names_models_clients_and_what_is_shown_here(luna: ComfyServer, own_host: Host) -> None:
    asked = routed(graph(50)) | {
        "host": {"class_type": "LunaHostStatus", "inputs": {"model": ["checkpoint", 0]}},
        "json": show(["host", 1]),
    }
    outputs = luna.run(asked)["outputs"]
    text, state = outputs["host"]["text"][0], json.loads(outputs["json"]["text"][0])
    assert f"host at ipc://{own_host.runtime}/cpu.sock: cpu, posix" in text
    assert f"here: {SD15}: " in text
    assert state["clients"] == 1 and SD15 in {model["name"] for model in state["models"]}
    assert {here["model"] for here in state["here"]} >= {SD15}
    again = luna.run(asked | {"seed": show(["checkpoint", 3])})["outputs"]
    assert "host" in again, "it asks each time"
