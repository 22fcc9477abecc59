"""Files laid out as the published ones, from golden numbers or at full size with random weights.

    cd tests; python -m helpers.published titok_s128 flextok_d12_d12 flextok_d18_d28:load

builds each full-size model, loads it in a fresh process, encodes and decodes one picture (with
:load, only reads every weight once), and prints seconds and peak memory against the weights' size.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from golden.titok.load import published_shapes
from safetensors.torch import load_file, save_file

from flextok.vae import KLVAE

GOLDEN = Path(__file__).parents[1] / "golden"


def write_safetensors(path, shapes, metadata=None, random=True):
    """A float32 file with tensors of these shapes, written without holding them: N(0, 0.02) from
    one repeated block, or zeros that take no disk space."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).numpy()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if random:
            for start in range(0, end, block.nbytes):
                file.write(memoryview(block).cast("B")[: end - start])
        file.truncate(8 + len(text) + end)
    return end


def flextok_tree(encoder=(768, 12), decoder=(768, 12), grid=16, registers=256):
    """A published config tree for sizes (dim, depth)."""
    tree = json.loads((GOLDEN / "flextok" / "config_d12_d12.json").read_text())
    for part, (dim, depth) in (("encoder", encoder), ("decoder", decoder)):
        for section in tree[part]["module_dict"].values():
            sizes = {"dim": dim, "depth": depth, "n_min": registers, "n_max": registers}
            section |= {key: value for key, value in sizes.items() if key in section}
            if "max_sizes" in section:
                section["max_sizes"] = [grid] * 2 if len(section["max_sizes"]) == 2 else [registers]
    return tree


def tiny_tree():
    """The golden FlexTok's tree."""
    return flextok_tree(encoder=(64, 2), decoder=(128, 2), grid=8, registers=64)


def metadata_of(tree, layout="one"):
    """A tree as safetensors metadata: one JSON document, or for each of its "sections" a document,
    or a Python literal, as published."""
    if layout == "one":
        return {"format": "pt", "config": json.dumps(tree)}
    written = str if layout == "literals" else json.dumps
    return {"format": "pt", **{key: written(value) for key, value in tree.items()}}


def titok_document(name, **changes):
    """The config.json of a published TiTok of the first release."""
    sizes = {"s": "small", "b": "base", "l": "large"}
    vq_model = {
        "codebook_size": 4096,
        "token_size": 12,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": sizes[name[0]],
        "vit_dec_model_size": sizes[name[0]],
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": int(name[1:]),
        "finetune_decoder": True,
    }
    model = {"vq_model": {**vq_model, **changes}}
    return {"model": model, "dataset": {"preprocessing": {"crop_size": 256}}}


def golden_flextok_weights():
    """The golden FlexTok's published state dict, with a small VAE that does not downsample."""
    torch.manual_seed(0)
    vae = KLVAE(channels=16, block_channels=(32,))
    state = load_file(GOLDEN / "flextok" / "tokenizer_state_dict.safetensors")
    return state | {f"vae.{key}": value for key, value in vae.state_dict().items()}


def write_flextok(folder, weights, tree=None, layout="one"):
    """layout: the config tree is "one" document of the metadata, its "sections" or the same as
    "literals", or "beside"."""
    folder.mkdir(exist_ok=True)
    tree = tree or tiny_tree()
    metadata = {"format": "pt"} if layout == "beside" else metadata_of(tree, layout)
    save_file(weights, folder / "model.safetensors", metadata)
    if layout == "beside":
        (folder / "config.json").write_text(json.dumps({"config": tree}))
    return folder


def write_titok(folder, name, weights, **changes):
    """A golden case (TiTok or MaskGIT) with its config.json, whose ViT sizes have no published name
    and are left out; changes are of the vq_model section."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    document = json.loads((GOLDEN / "titok" / "configs.json").read_text())[name]
    section = document["model"]["vq_model"]
    for key in ("vit_enc_model_size", "vit_dec_model_size"):
        section.pop(key, None)
    section |= changes
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def write_full_size(folder, name, random=True):
    """A full-size published model (flextok_d12_d12, titok_s128, ...). Returns its bytes."""
    family, _, size = name.partition("_")
    path = Path(folder) / "model.safetensors"
    if family == "titok":
        shapes = published_shapes()[f"tokenizer_{name}"]
        (Path(folder) / "config.json").write_text(json.dumps(titok_document(size)))
        return write_safetensors(path, {k: v.shape for k, v in shapes.items()}, random=random)
    keys = json.loads((GOLDEN / "flextok" / f"keys_{size}.json").read_text())
    encoder, decoder = ((64 * int(d[1:]), int(d[1:])) for d in size.split("_"))
    metadata = metadata_of(flextok_tree(encoder, decoder))
    return write_safetensors(path, keys["state_dict"], metadata, random)


CHILD = """
import json, sys, time
import torch
from flextok.pipeline import load
from helpers.published import memory

folder, work, family = sys.argv[1:]
if family == "flextok":  # an import is no part of a load
    from diffusers import AutoencoderKL
before, start = memory("VmRSS"), time.perf_counter()
model = load(folder)
result = {"load_s": time.perf_counter() - start}
for parameter in model.parameters():
    assert parameter.sum().isfinite()
result |= {"read_s": time.perf_counter() - start, "before": before, "peak": memory("VmHWM")}
result["compiler"] = "torch._inductor" in sys.modules
if work == "run":
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    start = time.perf_counter()
    indices = model.encode(images)
    result["encode_s"] = time.perf_counter() - start
    flow = {"num_steps": 1, "guidance_scale": 1.0} if model.model_type == "flextok" else {}
    start = time.perf_counter()
    pictures = model.decode(indices, **flow)
    result["decode_s"] = time.perf_counter() - start
    assert indices.shape == (1, model.num_tokens) and 0 <= indices.min()
    assert indices.max() < model.vocab_size and len(indices.unique()) > 1
    assert pictures.shape == images.shape and pictures.isfinite().all()
print(json.dumps(result))
"""


def memory(field):
    """Bytes under a field of Linux's process status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(folder, name, work="run"):
    """Load a model in a fresh process; work: "run" encodes and decodes, "load" only reads."""
    command = [sys.executable, "-c", CHILD, str(folder), work, name.partition("_")[0]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(names):
    for name in names:
        name, _, work = name.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            size = write_full_size(folder, name, random=work != "load")
            result = measure(folder, name, work or "run")
        times = ", ".join(f"{k[:-2]} {v:.1f} s" for k, v in result.items() if k.endswith("_s"))
        print(
            f"{name}: weights {size / 1e9:.2f} GB; {times}; peak memory {result['peak'] / 1e9:.2f} "
            f"GB = {result['peak'] / size:.3f} of the weights, all told, and "
            f"{(result['peak'] - result['before']) / size:.3f} without the libraries",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
