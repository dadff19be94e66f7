"""One of each message, with every field set to something that shows in its bytes."""

from __future__ import annotations

from lunashm import protocol as p
from lunashm.manifest import DtypeRule, Manifest, Source, TensorSpec

HOST = p.HostInfo(
    "h0st", 4242, 4026531836, "cpu", "cpu", "posix", "", "ipc:///run/cpu.sock", "0.1.0", ("/models",), 1700000000.5
)  # fmt: skip
CLIENT = p.ClientInfo(777, 4026531836, 123456, "comfyui", "ComfyUI :8188", "0.1.0")
RULES = (DtypeRule("", ""), DtypeRule("first_stage_model.", "F32"))
LEASE = p.LeaseInfo(41, "c1", 777, "comfyui", "ComfyUI :8188", "sd15.safetensors", 3, 1.5)
MODEL = p.ModelInfo(
    "sd15.safetensors", "/models/sd15.safetensors", "ab12", 3, "ready", "posix", {"F16": 512}, 2, 512, 768, 512, 2,
    512, "unload", 0.25, RULES,
)  # fmt: skip
MANIFEST = Manifest(
    "sd15.safetensors", "ab12", 3, Source("/models/sd15.safetensors", 640, 1700000000000000000, 99), RULES,
    (TensorSpec("a.weight", "F32", "F16", (2, 64), 0, 0, 256), TensorSpec("b", "F16", "F16", (), 0, 256, 2)),
    (768,), {"format": "pt"},
)  # fmt: skip
HANDLE = p.Handle("posix", "cpu", 768, b"/lunashm-0-0123456789abcdef")
STATUS = p.ClientStatus("c1", CLIENT, "process", 10.0, 0.5, (LEASE,))

REQUESTS: list[p.Message] = [
    p.Register(CLIENT),
    p.Renew("c1"),
    p.Unregister("c1"),
    p.Attach("c1", "/models/sd15.safetensors", RULES, 600.0),
    p.Detach("c1", 41),
    p.Load("/models/sd15.safetensors", RULES, 0.0),
    p.Unload("sd15.safetensors", True),
    p.ListModels(),
    p.ShowModel("sd15.safetensors"),
    p.ListClients(),
    p.GetStatus(),
    p.Shutdown(),
]
REPLIES: list[p.Message] = [
    p.Registered("c1", HOST, 15.0, 5.0),
    p.Done(),
    p.Attached(41, MANIFEST, (HANDLE,), b"\x01" * 32),
    p.Loaded(MODEL, False),
    p.Unloaded(MODEL, False, (LEASE,)),
    p.Models((MODEL,)),
    p.ModelDetail(MODEL, MANIFEST, (LEASE,)),
    p.Clients((STATUS,)),
    p.Status(HOST, 60.0, (MODEL,), 2, 3, 768, 512, 1 << 34, {"request.Attach": 3}),
    p.ErrorReply("model_in_use", "sd15.safetensors is in use by ComfyUI :8188 (pid 777)"),
]
EVENTS: list[p.Message] = [
    p.LoadProgress("/models/sd15.safetensors", "sd15.safetensors", 256, 640, 0.125),
    p.LoadFailed("/models/sd15.safetensors", "source_changed", "it changed"),
    p.ModelReady(MODEL),
    p.UnloadRequested("sd15.safetensors", 3),
    p.ModelFreed("sd15.safetensors", 3, 768),
    p.ClientJoined("c1", CLIENT),
    p.ClientLeft("c1", 777, "process ended"),
    p.LeaseGranted(LEASE),
    p.LeaseEnded(41, "sd15.safetensors", "released"),
    p.HostStopping("h0st", "signal SIGTERM"),
]
HANDOVER: list[p.Message] = [p.Redeem(b"\x01" * 32), p.HandedOver(128, 200)]
ALL = [*REQUESTS, *REPLIES, *EVENTS, *HANDOVER]
MESSAGE_ID = 0x0102030405060708
