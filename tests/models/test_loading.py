import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longvid import ConvCache, ModelError, load_model, make_plan
from longvid.cli.commands import main
from longvid.models.loading import ARCHITECTURES

diffusers = pytest.importorskip("diffusers")
huggingface_hub = pytest.importorskip("huggingface_hub")

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
    numbers = {"wan2.1": 126_892_531, "wan2.2": 704_688_668}
    if "nano" not in name:
        assert sum(p.numel() for p in model.parameters()) == numbers.get(name, 215_583_907)


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
        empty: "has no config.json: it holds nothing; pass the folder",
        no_weights: "no diffusion_pytorch_model.safetensors",
        pickled: "pickled weights .diffusion_pytorch_model.bin.",
        other_class: "UNet2DConditionModel",
        not_json: "cannot be read",
        a_list: "holds a list",
        garbage: "cannot be read as safetensors",
        too_small: "do not fit its config: .*missing .*and [0-9]+ more",
    }


@pytest.mark.parametrize(("make", "said"), bad_folders().items(), ids=lambda v: getattr(v, "__name__", ""))
def test_bad_folders(make, said, tmp_path):
    make(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no-such-thing", "no model 'no-such-thing': there is no such file or folder, and it is neither a hub id"),
        ("/no/such/folder", "there is no such file or folder"),
        (__file__, r"test_loading.py is a file without weights that longvid can read; weights are .safetensors"),
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


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_plan_downloads_the_config_and_no_weights(subfolder, folder, tmp_path, monkeypatch):
    """A hub client that serves a local folder and records what it was asked for."""
    snapshot, asked = tmp_path / "snapshot", []
    (snapshot / subfolder).mkdir(parents=True)
    shutil.copy(folder / "config.json", snapshot / subfolder)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    expected = make_plan(load_model(folder), height=16, width=24)
    assert main(["plan", "--model", "owner/name", "--size", "24x16"]) == 0
    assert make_plan("owner/name", height=16, width=24).projected_bytes == expected.projected_bytes
    assert asked == [("owner/name", None, ["config.json", "vae/config.json"])] * 2


def test_a_plan_of_a_folder_reads_the_config_only(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    assert make_plan(tmp_path, height=16, width=24).encode.weights_bytes > 0
    with pytest.raises(ModelError, match="has a config but no"):
        load_model(tmp_path)


def test_one_frame_through_a_loaded_model(folder):
    model = load_model(folder)
    with ConvCache(model.encoder) as cache:
        assert model.encode(torch.zeros(1, 3, 1, 16, 16), cache).shape == (1, 32, 1, 2, 2)


# --------------------------------------------------------------------------------------------------- untrusted

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def mine(folder, tmp_path):
    """A copy of the model's folder, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "mine")


def rewrite(folder, change):
    """Change the weights: a dict of tensors."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def refused(source, said, **options):
    with pytest.raises(ModelError, match=said) as caught:
        load_model(source, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


NAME = "decoder.conv_out.conv.bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(dtype, mine):
    def put(place, value):
        weights = {name: tensor.clone().to(dtype) for name, tensor in intact.items()}
        weights[name].view(-1)[place] = value
        save_file(weights, mine / WEIGHTS)

    intact = load_file(mine / WEIGHTS)
    name = max(intact, key=lambda key: intact[key].numel())
    for place, value in ((0, torch.nan), (20_001, torch.inf), (-1, -torch.inf), (-1, torch.nan)):
        put(place, value)
        refused(mine, f"^{name} in .* not finite")
    put(-1, torch.finfo(dtype).max)
    assert next(load_model(mine).parameters()).dtype == dtype


def test_weights_of_an_instance_have_to_be_finite_too(folder):
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder)
    with torch.no_grad():
        vae.decoder.conv_out.conv.bias[1] = torch.nan
    refused(vae, f"{NAME} in AutoencoderKLCogVideoX .*not finite")


def test_names_shapes_and_dtypes_are_compared_before_weights_are_read(mine, monkeypatch):
    intact = (mine / WEIGHTS).read_bytes()
    for change, said in (
        (lambda w: w.pop(NAME), f"missing {NAME}"),
        (lambda w: w.update({"x\n\x1b": torch.zeros(1)}), r"unknown 'x\\n\\x1b'"),
        (lambda w: w.update({NAME: torch.zeros(4)}), rf"{NAME} is \(4,\) instead of \(3,\)"),
        (lambda w: w.update({NAME: w[NAME].half()}), r"several dtypes \(F16, F32\)"),
        (lambda w: w.update({NAME: w[NAME].to(torch.int64)}), f"'{NAME}' in .* has dtype I64; weights are F16"),
        (lambda w: w.update({NAME: w[NAME].to(torch.float8_e5m2)}), "has dtype F8_E5M2"),
    ):
        (mine / WEIGHTS).write_bytes(intact)
        rewrite(mine, change)
        with monkeypatch.context() as patch:
            patch.setattr("torch.frombuffer", None)  # what makes tensors of bytes
            patch.setattr("longvid.models.checkpoints.fit.assign", None)
            refused(mine, said)


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def overlapping(content):
    header, data = header_of(content)
    first, second = [name for name in header if header[name].get("shape") == [3]][:1] * 2
    other = next(n for n in header if n not in (first, "__metadata__"))
    header[other]["data_offsets"] = header[second]["data_offsets"]
    return file_of(header, data)


def beyond_the_end(content):
    header, data = header_of(content)
    header[NAME]["data_offsets"] = [len(data), len(data) + 12]
    return file_of(header, data)


def huge(content):
    header, data = header_of(content)
    header[NAME] |= {"shape": [2**62, 2**62], "data_offsets": [0, 2**63]}
    return file_of(header, data)


SPOILT = {
    "truncated": lambda c: c[:-1],
    "cut to the header": lambda c: c[: 8 + struct.unpack("<Q", c[:8])[0]],
    "padded": lambda c: c + b"\0",
    "a zip behind it": lambda c: c + b"PK\x05\x06" + bytes(18),
    "empty": lambda c: b"",
    "a header of 2 GB": lambda c: struct.pack("<Q", 2**31) + c[8:],
    "a header of 2**64": lambda c: b"\xff" * 8 + c[8:],
    "overlapping": overlapping,
    "beyond the end": beyond_the_end,
    "huge": huge,
    "deep": lambda c: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a pickle": lambda c: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_spoilt_safetensors_are_refused(spoil, mine):
    content = (mine / WEIGHTS).read_bytes()
    assert file_of(*header_of(content)) != spoil(content)
    (mine / WEIGHTS).write_bytes(file_of(*header_of(content)))
    load_model(mine)
    (mine / WEIGHTS).write_bytes(spoil(content))
    refused(mine, "cannot be read as safetensors|do not fit")


def test_random_damage_of_headers_is_a_model_error_or_harmless(mine):
    content, rng, refusals = (mine / WEIGHTS).read_bytes(), np.random.default_rng(0), 0
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(40):
        spoilt = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            spoilt[rng.integers(8 + length)] = rng.integers(256)
        (mine / WEIGHTS).write_bytes(spoilt)
        try:
            load_model(mine)
        except ModelError:
            refusals += 1
    assert refusals > 25


CONFIGS = {
    "layers": ({"layers_per_block": 10**9}, "'layers_per_block' = 1000000000; at most 16"),
    "width": ({"block_out_channels": [2**30] * 4}, "'block_out_channels' = 1073741824; at most 1,048,576"),
    "levels": ({"block_out_channels": [8] * 1000}, "1,000 values for 'block_out_channels'; at most 16"),
    "terabytes": ({"block_out_channels": [2**18] * 4, "norm_num_groups": 32}, "do not fit its config"),
    "infinite": ({"norm_eps": float("inf")}, "'norm_eps' = inf"),
    "not a number": ({"scaling_factor": float("nan")}, "'scaling_factor' = nan"),
    "a number of 4000 digits": ({"latent_channels": 10**4000}, "13288 bits"),
    "negative": ({"latent_channels": -4}, "cannot be used"),
    "no groups": ({"norm_num_groups": 0}, "cannot be used"),
    "text": ({"layers_per_block": "3"}, "cannot be used"),
    "one width": ({"block_out_channels": 8}, "cannot be used"),
    "widths of text": ({"block_out_channels": ["a"], "temporal_compression_ratio": 1}, "cannot be used"),
    "nested": ({"block_out_channels": [[8]], "temporal_compression_ratio": 1}, "cannot be used"),
    "a dict": ({"down_block_types": [{}]}, "cannot be used"),
    "a ratio of text": ({"temporal_compression_ratio": "x"}, "cannot be used"),
    "code": ({"_class_name": "os.system"}, "the class 'os.system'; this version can run"),
    "a class list": ({"_class_name": ["x" * 10_000]}, "this version can run"),
    "large": ({"comment": "x" * 2**20}, "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize(("change", "said"), CONFIGS.values(), ids=CONFIGS)
def test_absurd_configs_are_refused_before_memory_is_taken(change, said, mine):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, **change}))
    refused(mine, said)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff{}", b'{"a": ' + b"1" * 5000 + b"}"])
def test_configs_that_are_no_json(content, mine):
    (mine / "config.json").write_bytes(content)
    refused(mine, "config.json cannot be read")


# ------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def sharded(folder, tmp_path):
    path = tmp_path / "sharded"
    diffusers.AutoencoderKLCogVideoX.from_pretrained(folder).save_pretrained(path, max_shard_size="100KB")
    return path


SHARDS = [
    *("", "..", "../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", ".safetensors/..", "secret.bin"),
    *("a\\b.safetensors", "C:b.safetensors", "a\0.safetensors", "a\n.safetensors", "\u202e.safetensors"),
]


@pytest.mark.parametrize("name", SHARDS, ids=ascii)
def test_shards_lie_in_the_folder(name, sharded, tmp_path):
    path = sharded / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    (sharded / first).rename(tmp_path / "secret.safetensors")
    path.write_text(json.dumps({"weight_map": {k: name if v == first else v for k, v in index["weight_map"].items()}}))
    refused(sharded, "names")
    assert (tmp_path / "secret.safetensors").exists()
    (tmp_path / "secret.safetensors").rename(sharded / "good.safetensors")
    good = {k: "good.safetensors" if v == first else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps({"weight_map": good}))
    load_model(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}], ids=str)
def test_an_index_that_names_nothing(index, sharded):
    (sharded / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(sharded, "names no files")


def test_a_shard_is_there_and_no_link_to_elsewhere(sharded, tmp_path):
    shard = min(sharded.glob("*-of-*.safetensors"))
    shard.rename(tmp_path / "secret.safetensors")
    refused(sharded, f"has no {shard.name}: it holds")
    shard.symlink_to(tmp_path / "secret.safetensors")
    refused(sharded, f"{shard.name} is a link that leads out")


def test_a_tensor_is_in_one_shard(sharded):
    shards = sorted(sharded.glob("*-of-*.safetensors"))
    weights = load_file(shards[0])
    save_file({**weights, **dict([next(iter(load_file(shards[1]).items()))])}, shards[0])
    refused(sharded, "is in two files")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_links_stay_in_the_folder(name, mine, tmp_path):
    (mine / name).rename(tmp_path / "elsewhere")
    (mine / name).symlink_to(tmp_path / "elsewhere")
    refused(mine, f"{name} is a link that leads out of the folder")
    (tmp_path / "elsewhere").rename(mine / "here")
    (mine / name).unlink()
    (mine / name).symlink_to("here")
    load_model(mine)
    (tmp_path / "way").symlink_to(mine)
    load_model(tmp_path / "way")


def test_links_of_the_hub_cache_lead_into_its_blobs(mine, tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "main" / "vae"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, name in enumerate(("config.json", WEIGHTS)):
        (mine / name).rename(repo / "blobs" / str(i))
        (snapshot / name).symlink_to(f"../../../blobs/{i}")
    assert same(state(load_model(snapshot)), state(load_model(snapshot.parent)))
    (repo / "blobs" / "1").rename(repo / "1")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../1")
    refused(snapshot, "leads out of the folder")


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)], ids=["fifo", "folder", "loop"]
)
def test_weights_are_a_regular_file(make, mine):
    (mine / WEIGHTS).unlink()
    make(mine / WEIGHTS)
    refused(mine, "not a regular file|cannot be read")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "../" * 3000, "a\nb"], ids=lambda n: ascii(n[:8]))
def test_names_that_are_no_place(name):
    with pytest.raises(ModelError, match="no model"):
        load_model(name)


# ------------------------------------------------------------------------------------------------- pickles


class Canary:
    """Leaves a file when it is unpickled by something that runs what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(folder, suffix, content, **options):
    (folder / WEIGHTS).unlink(missing_ok=True)
    torch.save(content, folder / f"diffusion_pytorch_model{suffix}", **options)


SUFFIXES = [".bin", ".pt", ".pth", ".ckpt"]


@pytest.mark.parametrize(("suffix", "old"), [*((s, False) for s in SUFFIXES), (".pt", True)])
def test_pickled_weights_are_read_only_if_asked_for(suffix, old, mine):
    expected = state(load_model(mine))
    pickled(mine, suffix, load_file(mine / WEIGHTS), _use_new_zipfile_serialization=not old)
    refused(mine, f"pickled weights .diffusion_pytorch_model{suffix}.*allow_pickle_weights=True")
    assert same(state(load_model(mine, allow_pickle_weights=True)), expected)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(("suffix", "old"), [*((s, False) for s in (*SUFFIXES, ".pkl")), (".pt", True)])
def test_code_in_a_pickle_never_runs(suffix, old, allow, mine, monkeypatch):
    canary = mine.parent / "canary"
    weights = {**load_file(mine / WEIGHTS), "x": Canary(canary)}
    pickled(mine, suffix, weights, _use_new_zipfile_serialization=not old)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused(mine, "holds more than tensors" if allow else "pickled weights", allow_pickle_weights=allow)
    assert not canary.exists()
    with warnings.catch_warnings():  # the canary sings where it is let
        warnings.simplefilter("ignore")
        torch.load(next(mine.glob(f"*{suffix}")), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_bare_pickles_and_npz_never_run(protocol, allow, mine):
    canary = mine.parent / "canary"
    (mine / WEIGHTS).unlink()
    (mine / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Canary(canary)}, protocol=protocol))
    refused(mine, "holds more than tensors|as a checkpoint" if allow else "pickled", allow_pickle_weights=allow)
    (mine / "diffusion_pytorch_model.bin").unlink()
    np.savez(mine / "diffusion_pytorch_model.npz", x=np.array(Canary(canary), dtype=object))
    refused(mine, "has a config but no", allow_pickle_weights=allow)
    (mine / "diffusion_pytorch_model.npz").rename(mine / "diffusion_pytorch_model.bin")
    refused(mine, "as a checkpoint|holds more" if allow else "pickled", allow_pickle_weights=allow)
    assert not canary.exists()
    with np.load(mine / "diffusion_pytorch_model.bin", allow_pickle=True) as content:
        assert content["x"] is not None
    assert canary.exists()


def test_nothing_falls_back_from_safetensors_to_a_pickle(mine):
    torch.save(load_file(mine / WEIGHTS), mine / "diffusion_pytorch_model.bin")
    (mine / WEIGHTS).write_bytes((mine / WEIGHTS).read_bytes()[:-1])
    refused(mine, "cannot be read as safetensors", allow_pickle_weights=True)
    (mine / f"{WEIGHTS}.index.json").write_text("{}")
    refused(mine, "names no files", allow_pickle_weights=True)


PICKLES = {
    "a list": ([1], "not a state dict"),
    "numbers": ({"a": 1}, "not a state dict"),
    "sparse": ({"a": torch.zeros(2, 2).to_sparse()}, "not a state dict"),
    "other names": ({"a": torch.zeros(1)}, "do not fit its config: missing"),
}


@pytest.mark.parametrize(("content", "said"), PICKLES.values(), ids=PICKLES)
def test_pickles_that_are_no_weights(content, said, mine):
    pickled(mine, ".bin", content)
    refused(mine, said, allow_pickle_weights=True)


def test_checkpoints_of_trainers_several_files_and_spoilt_values(mine):
    weights = load_file(mine / WEIGHTS)
    expected = state(load_model(mine))
    pickled(mine, ".ckpt", {"state_dict": weights, "epoch": 3})
    assert same(state(load_model(mine, allow_pickle_weights=True)), expected)
    pickled(mine, ".bin", weights)
    refused(mine, "several pickled files", allow_pickle_weights=True)
    (mine / "diffusion_pytorch_model.ckpt").unlink()
    pickled(mine, ".bin", {**weights, NAME: torch.full((3,), torch.nan)})
    refused(mine, f"{NAME} in .* not finite", allow_pickle_weights=True)
    # of the right shape, but one number in memory: made whole
    pickled(mine, ".bin", {**weights, NAME: torch.ones(1).expand(3)})
    assert load_model(mine, allow_pickle_weights=True).state_dict()[NAME].stride() == (1,)
    huge = {**weights, NAME: torch.ones(1).expand(2**40)}
    pickled(mine, ".bin", huge)
    refused(mine, "instead of", allow_pickle_weights=True)


def test_a_checkpoint_that_is_a_zip_bomb(mine):
    path = mine / "diffusion_pytorch_model.bin"
    pickled(mine, ".bin", {"a": torch.zeros(2**20)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    refused(mine, "is compressed inside", allow_pickle_weights=True)


def test_random_damage_of_pickles_is_a_model_error_or_harmless(mine):
    pickled(mine, ".bin", {**load_file(mine / WEIGHTS)}, _use_new_zipfile_serialization=False)
    path = mine / "diffusion_pytorch_model.bin"
    content, rng, refusals = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(40):
        spoilt = bytearray(content)
        for _ in range(3):
            spoilt[rng.integers(20_000)] = rng.integers(256)
        path.write_bytes(spoilt)
        try:
            load_model(mine, allow_pickle_weights=True)
        except ModelError:
            refusals += 1
    assert refusals > 10
