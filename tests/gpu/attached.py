"""What a client sees of an attached model: ``python -m tests.gpu.attached WHAT FILE DEVICE`` prints one JSON value.

``DEVICE`` may be ``cpu``: then the same steps run without a GPU, but for the capture.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lunashm.client
from lunashm.memory import ending


def compare(path: str, device: str) -> dict[str, object]:
    """Every tensor against the file's, read by safetensors."""
    model = lunashm.client.attach(path, device=device)
    mapped, file = model.state_dict(), load_file(path)
    wrong = [name for name in file if not _same(mapped[name], file[name])]
    return {
        "rungs": sorted({mapping.handle.rung for mapping in model._mappings}),
        "devices": sorted({str(tensor.device) for tensor in mapped.values()}),
        "wrong": wrong + sorted(file.keys() ^ mapped.keys()),
    }


def _same(mapped: torch.Tensor, file: torch.Tensor) -> bool:
    here = mapped.cpu()
    return here.dtype == file.dtype and here.shape == file.shape and _bytes(here) == _bytes(file)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def compute(path: str, device: str) -> dict[str, object]:
    """A module on the shared weights, bare and with a LoRA, against one on weights of its own."""
    shared, own = Net().to(device), Net().to(device)
    own.load_state_dict({n: t.to(device) for n, t in load_file(path).items() if n.startswith("layer.")})
    torch.manual_seed(1)
    x, down, up = torch.randn(5, 64).to(device), torch.randn(4, 64), torch.randn(64, 4) / 16
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        lora = Path(folder) / "lora.safetensors"
        save_file({"layer.lora_A.weight": down, "layer.lora_B.weight": up}, lora)
        with lunashm.client.attach(path, device=device) as model:
            model.load_into(shared.layer, "layer.")
            before = model.checksum()
            equal = torch.equal(shared(x), own(x))
            with model.apply_lora(lora, 0.5, module=shared):
                close = torch.allclose(shared(x), own(x) + 0.5 * (x @ down.T.to(device) @ up.T.to(device)), atol=1e-3)
            return {"equal": equal and torch.equal(shared(x), own(x)), "lora": close,
                    "unchanged": model.checksum() == before}  # fmt: skip


def capture(path: str, device: str) -> dict[str, object]:
    """A second model ends while a CUDA graph is being captured."""
    first = lunashm.client.attach(path, device=device)
    weight = first.state_dict()["a"]
    gone: list[int] = []
    second = lunashm.client.attach(path, device=device, dtypes={"b": "F32"})
    for mapping in second._mappings:
        mapping.when_gone(lambda: gone.append(1))
    x = torch.randn(1000, 8, device=device)
    weight @ x  # what is made at first use is made now
    torch.cuda.synchronize()
    spoilt = ""
    meanwhile = False
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            weight @ x
            del mapping
            second.close()
            del second
            gc.collect()
            meanwhile = bool(gone)
    except RuntimeError as exc:
        spoilt = str(exc)
    torch.cuda.synchronize()
    ending.finish_parked()
    works = torch.equal((weight @ x).cpu(), (weight @ x).cpu())
    return {"gone_meanwhile": meanwhile, "gone_afterwards": bool(gone), "works": works, "spoilt": spoilt}


if __name__ == "__main__":
    what, path, device = sys.argv[1:]
    print(json.dumps({"compare": compare, "compute": compute, "capture": capture}[what](path, device)))
