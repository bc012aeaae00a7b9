import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from longvid import ConvCache, ModelError, load_model
from longvid.models.loading import ARCHITECTURES

diffusers = pytest.importorskip("diffusers")

NANO = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vae"
    diffusers.AutoencoderKLCogVideoX(**NANO).save_pretrained(path)
    return path


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_folder_pipeline_folder_shards_and_hub_cache_give_the_same_model(folder, tmp_path, monkeypatch):
    expected = state(load_model(folder))
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "vae").symlink_to(folder)
    assert same(state(load_model(str(pipeline))), expected)

    sharded = tmp_path / "sharded"
    diffusers.AutoencoderKLCogVideoX.from_pretrained(folder).save_pretrained(sharded, max_shard_size="100KB")
    assert (sharded / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert same(state(load_model(sharded)), expected)

    # the hub's own cache layout, read by the hub's own client without a network
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "vae").symlink_to(folder)
    refs = tmp_path / "hub" / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c" * 40)
    code = (
        "import longvid, json; m = longvid.load_model('owner/name'); d = m.describe();"
        "print(json.dumps([d['name_or_path'], d['revision'], d['weights_sha256']]))"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == ["owner/name", "c" * 40, load_model(folder).describe()["weights_sha256"]]


def test_loading_does_not_import_diffusers(folder):
    code = f"import sys, longvid; longvid.load_model({str(folder)!r}); print('diffusers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_digest_is_of_the_weights(folder):
    first = load_model(folder).describe()["weights_sha256"]
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder)
    assert load_model(vae).describe()["weights_sha256"] == first
    with torch.no_grad():
        vae.decoder.conv_out.conv.bias[0] += 1e-3
    assert load_model(vae).describe()["weights_sha256"] != first


def test_random_weights_are_a_function_of_the_seed():
    before = torch.random.get_rng_state()
    a, b, c = (load_model("cogvideox-nano", random_weights=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(state(a), state(b))
    assert not same(state(a), state(c))
    assert a.describe()["random_weights"] == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_without_weights_is_on_meta(name):
    model = load_model(name)
    assert all(p.is_meta for p in model.parameters())
    if name != "cogvideox-nano":
        assert sum(p.numel() for p in model.parameters()) == 215_583_907


def test_a_causal_vae_of_the_user_s_own_is_taken_as_it_is(vae):
    assert load_model(vae) is vae


def bad_folders():
    def empty(path):
        pass

    def no_weights(path):
        (path / "config.json").write_text('{"_class_name": "AutoencoderKLCogVideoX"}')

    def pickled(path):
        no_weights(path)
        torch.save({}, path / "diffusion_pytorch_model.bin")

    def other_class(path):
        (path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')

    def not_json(path):
        (path / "config.json").write_text("{")

    def a_list(path):
        (path / "config.json").write_text("[]")

    def garbage(path):
        no_weights(path)
        (path / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)

    def too_small(path):
        no_weights(path)
        save_file({"encoder.conv_in.conv.weight": torch.zeros(1)}, path / "diffusion_pytorch_model.safetensors")

    return {
        empty: "holds nothing and no config.json",
        no_weights: "no diffusion_pytorch_model.safetensors",
        pickled: "pickled weights .diffusion_pytorch_model.bin.",
        other_class: "UNet2DConditionModel",
        not_json: "cannot be read",
        a_list: "holds a list",
        garbage: "cannot be read as safetensors",
        too_small: "do not fit its config: missing .*and [0-9]+ more",
    }


@pytest.mark.parametrize(("make", "said"), bad_folders().items(), ids=lambda v: getattr(v, "__name__", ""))
def test_bad_folders(make, said, tmp_path):
    make(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no-such-thing", "neither a folder, nor a hub id"),
        ("/no/such/folder", "neither a folder"),
        (42, "a int cannot be loaded"),
        (torch.nn.Linear(1, 1), "a Linear cannot be loaded"),
    ],
)
def test_what_is_no_model_is_refused(source, said):
    with pytest.raises(ModelError, match=said):
        load_model(source)


def test_random_weights_go_with_an_architecture(folder, vae):
    for source in (folder, vae):
        with pytest.raises(ModelError, match="random_weights"):
            load_model(source, random_weights=0)


def test_one_frame_through_a_loaded_model(folder):
    model = load_model(folder)
    with ConvCache(model.encoder) as cache:
        assert model.encode(torch.zeros(1, 3, 1, 16, 16), cache).shape == (1, 32, 1, 2, 2)
