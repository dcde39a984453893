"""Checkpoints of a few small tensors, and how to damage them."""

import torch


def tensors(step):
    return {
        "weights": torch.full((1000,), float(step)),
        "half": torch.arange(6).view(2, 3).to(torch.bfloat16) * step,
        "scalar": torch.tensor(step),
    }


def values(step):
    return {"step": step, "nested": [{"a": [1, 0.1 + 0.2, "x", None]}]}


def save(store, step, **options):
    return store.save(step, tensors(step), values(step), rng={"seed": step}, **options)


def assert_holds(store, step):
    found = store.latest()
    assert found is not None
    assert found.step == step
    assert found.values == values(step)
    assert found.rng(0) == {"seed": step}
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors(step).items()}
    found.read_into(read)
    for name, tensor in tensors(step).items():
        assert torch.equal(read[name], tensor)


def damage(path, kind):
    file, manifest = path / "rank-00000.safetensors", path / "manifest.json"
    content = bytearray(file.read_bytes())
    match kind:
        case "truncate":
            file.write_bytes(content[: len(content) // 2])
        case "flip":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "empty":
            file.write_bytes(b"")
        case "no file":
            file.unlink()
        case "unreadable file":
            file.unlink()
            file.mkdir()
        case "no manifest":
            manifest.unlink()
        case "garbage manifest":
            manifest.write_text("{")
        case "changed manifest":
            manifest.write_text(manifest.read_text().replace('"nested"', '"nexted"'))
