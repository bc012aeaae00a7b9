"""One file of weights as a model: original names, prefixes, pickles, whole checkpoints, and files that are refused."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import original_names

from longvid import ConvCache, ModelError, load_model
from longvid.cli.commands import main
from longvid.models.checkpoints import cogvideox, wan
from longvid.models.checkpoints.recognition import recognise
from longvid.models.checkpoints.tensors import Checkpoint
from longvid.models.loading import ARCHITECTURES, load_architecture

diffusers = pytest.importorskip("diffusers")
logging.getLogger("diffusers").setLevel(logging.ERROR)

PATCHES = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
CONFIGS = {
    "wan2.1": {"base_dim": 8, "num_res_blocks": 1},
    "wan2.1 deeper": {"base_dim": 8, "num_res_blocks": 2, "dim_mult": [1, 2, 2, 4]},
    "wan2.1 all time": {"base_dim": 8, "num_res_blocks": 1, "temperal_downsample": [True, True, False], "z_dim": 8},
    "wan2.2": {"base_dim": 8, "decoder_base_dim": 16, "z_dim": 48, "is_residual": True, "num_res_blocks": 1, **PATCHES},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def original(name, config):
    """The original name of a weight of a diffusers instance with this config."""
    residual = config.get("is_residual", False)
    return original_names.wan(name, blocks=config.get("num_res_blocks", 2), residual=residual)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each config, with weights that hide no mix-up: each tensor has one entry of its own beside noise."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(len(made))
        vae = diffusers.AutoencoderKLWan(**config).double()
        for number, weight in enumerate(vae.parameters()):
            weight.data.normal_(1 if weight.ndim == 4 else 0, 0.1)
            weight.data.view(-1)[torch.randint(weight.numel(), ())] = 1 + number / 1000
        made[name] = tmp_path_factory.mktemp("folders") / "vae"
        vae.save_pretrained(made[name])
    return made


@pytest.fixture
def nano(folders):
    """Weights of a small Wan 2.1 with original names."""
    return originals(folders, "wan2.1")


def originals(folders, name):
    return {original(key, CONFIGS[name]): t for key, t in load_file(folders[name] / WEIGHTS).items()}


def same_model(a, b):
    """Whether both have the same bits, architecture and record, except where they are from."""
    facts = [{**model.describe(), "name_or_path": None} for model in (a, b)]
    return facts[0] == facts[1] and facts[0]["weights_sha256"] is not None


# --------------------------------------------------------------------------------------------------------- names


def headers(model, rename):
    """A file with the weights of ``model`` as far as names and shapes go."""
    names = model.checkpoint_names()
    shapes = {rename(names[key]): tuple(t.shape) for key, t in model.state_dict().items()}
    return Checkpoint(where="a file", shapes=shapes, dtypes={}, read=None)


@pytest.mark.parametrize(("name", "number"), [("wan2.1", 194), ("wan2.2", 196)])
def test_all_names_of_the_full_size(name, number):
    model = load_model(name)
    file = headers(model, lambda key: original(key, ARCHITECTURES[name]))
    assert len(file.shapes) == number
    found = recognise(file, None)
    assert {theirs: ours for ours, theirs in found.names.items()} == {
        original(key, ARCHITECTURES[name]): key for key in model.checkpoint_names().values()
    }
    assert model.config == type(model.config).from_dict(found.config)
    # the names by which others tell the two apart
    known = {"conv2.weight", "encoder.conv1.weight", "decoder.head.0.gamma", "decoder.middle.0.residual.0.gamma"}
    assert known <= file.shapes.keys()
    assert ("decoder.upsamples.0.upsamples.0.residual.2.weight" in file.shapes) == (name == "wan2.2")


def test_names_agree_with_the_converter_of_diffusers():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    shapes = headers(load_model("wan2.1"), lambda key: original(key, {})).shapes
    marked = convert_wan_vae_to_diffusers({name: name for name in shapes})
    assert marked == {theirs: name for name, theirs in wan.diffusers_names(shapes).items()}


def test_all_names_of_cogvideox():
    model = load_model("cogvideox-2b")
    file = headers(model, original_names.cogvideox)
    assert "decoder.up.3.block.0.nin_shortcut.weight" not in file.shapes
    assert {"decoder.up.0.block.0.nin_shortcut.weight", "encoder.down.0.downsample.conv.weight"} <= file.shapes.keys()
    file.shapes["loss.logvar"] = ()  # of training
    found = recognise(file, None)
    assert {theirs: ours for ours, theirs in found.names.items()} == {
        original_names.cogvideox(key): key for key in model.checkpoint_names().values()
    }
    ours, theirs = model.config, type(model.config).from_dict(found.config)
    assert theirs.scaling_factor is None  # 2b and 5b share weights and differ in this
    assert ours.block_out_channels == theirs.block_out_channels
    assert recognise(headers(model, str), None).config == found.config


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("prefix", ["", "model.", "vae.", "first_stage_model.", "model.vae.", "_orig_mod."])
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_the_model_of_its_folder(name, spelling, prefix, folders, tmp_path):
    weights = load_file(folders[name] / WEIGHTS)
    if spelling == "original":
        weights = originals(folders, name)
    path = tmp_path / "any_name.safetensors"
    save_file({prefix + key: tensor for key, tensor in weights.items()}, path, {"config": '{"z_dim": 7}'})
    expected = load_model(folders[name])
    assert same_model(load_model(path), expected)
    assert load_architecture(str(path)).config == expected.config


@pytest.mark.parametrize(
    "nested", [(), ("state_dict",), ("model_state",), ("model", "state_dict"), ("module",)], ids=str
)
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_pickled_files(name, nested, folders, tmp_path):
    content = originals(folders, name)
    for key in nested:
        content = {key: content, "epoch": 3}
    path = tmp_path / "Wan_VAE.pth"
    torch.save(content, path)
    for load in (load_model, load_architecture):
        with pytest.raises(ModelError, match=r"pickled weights \(Wan_VAE.pth\).*allow_pickle_weights=True"):
            load(path)
    assert same_model(load_model(path, allow_pickle_weights=True), load_model(folders[name]))
    assert load_architecture(path, allow_pickle_weights=True).config == load_model(folders[name]).config


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_a_file_computes_what_diffusers_computes(name, folders, tmp_path):
    save_file(originals(folders, name), tmp_path / "vae.safetensors")
    model = load_model(tmp_path / "vae.safetensors")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(folders[name], torch_dtype=torch.float64).eval()
    x = torch.rand(1, 3, 5, *((32, 48) if name == "wan2.1" else (64, 96)), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        moments = theirs.encode(x).latent_dist.parameters
        pixels = theirs.decode(moments.chunk(2, dim=1)[0]).sample
    with ConvCache(model.encoder) as cache:
        ours = torch.cat([model.encode(part, cache) for part in x.split([1, 4], dim=2)], dim=2)
    assert torch.equal(ours, moments)
    with ConvCache(model.decoder) as cache:
        z = moments.chunk(2, dim=1)[0]
        assert torch.equal(torch.cat([model.decode(part, cache) for part in z.split(1, dim=2)], dim=2), pixels)


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_the_vae_of_a_whole_checkpoint(prefix, nano, folders, tmp_path):
    others = {"model.diffusion_model.blocks.0.weight": torch.zeros(3, dtype=torch.int8), "cond.x": torch.zeros(1)}
    save_file({**{prefix + key: tensor for key, tensor in nano.items()}, **others}, tmp_path / "all.safetensors")
    assert same_model(load_model(tmp_path / "all.safetensors"), load_model(folders["wan2.1"]))


def test_what_was_compiled_in_part(nano, folders, tmp_path):
    changed = {key.replace("encoder.", "encoder._orig_mod."): tensor for key, tensor in nano.items()}
    save_file(changed, tmp_path / "a.safetensors")
    assert same_model(load_model(tmp_path / "a.safetensors"), load_model(folders["wan2.1"]))


def test_a_config_of_the_family_beside_a_file_is_read_and_no_other(nano, folders, tmp_path):
    path = tmp_path / "Wan2.1_VAE.safetensors"
    save_file(nano, path)
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 5120}')  # as the authors' repositories
    assert same_model(load_model(path), load_model(folders["wan2.1"]))
    config = json.loads((folders["wan2.1"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latents_mean": [7.0] * 16}))
    assert load_model(path).describe()["latents_mean"] == (7.0,) * 16
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_dim": 16}))
    with pytest.raises(ModelError, match="do not fit its config"):
        load_model(path)


def test_statistics_are_the_published_ones(folders, tmp_path):
    save_file(originals(folders, "wan2.2"), tmp_path / "a.safetensors")
    facts = load_model(tmp_path / "a.safetensors").describe()
    assert (facts["latents_mean"][0], facts["latents_std"][-1]) == (-0.2289, 0.7744)
    save_file(originals(folders, "wan2.1 all time"), tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").describe()["latents_mean"] is None  # of 8 channels none are known


@pytest.mark.parametrize("spelling", [str, original_names.cogvideox], ids=["diffusers", "original"])
def test_cogvideox_files_of_other_widths_need_their_config(spelling, tmp_path):
    nano = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 16, 32), norm_num_groups=4, layers_per_block=1, scaling_factor=0.7
    )
    nano.save_pretrained(tmp_path / "vae")
    path = tmp_path / "cog.safetensors"
    save_file({spelling(key): tensor for key, tensor in nano.state_dict().items()}, path)
    with pytest.raises(ModelError, match=r"put its config\.json beside the file"):
        load_model(path)
    shutil.copy(tmp_path / "vae" / "config.json", tmp_path)
    assert same_model(load_model(path), load_model(tmp_path / "vae"))
    assert load_model(path).describe()["scaling_factor"] == 0.7


def test_any_file_of_a_folder_in_diffusers_format(tmp_path):
    """A model whose names are not known is read with the config beside it."""
    from longvid.models.loading import BUILT_IN

    assert same_model(load_model(BUILT_IN["tiny"] / WEIGHTS), load_model("tiny"))


# --------------------------------------------------------------------------------------------------------- refused


NAME = "decoder.head.2.bias"
MARK = "decoder.middle.0.residual.0.gamma"


def without(weights, *names):
    return {key: tensor for key, tensor in weights.items() if key not in names}


def quantized(weights, dtype):
    return {key: tensor.to(dtype) for key, tensor in weights.items()}


def resized(weights, name, shape):
    return {**weights, name: torch.zeros(shape, dtype=torch.float64)}


FILES = {
    "nothing": (lambda w: {}, "holds no VAE of CogVideoX or Wan, by its names .no tensors"),
    "another model": (lambda w: {"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, "holds no VAE of CogVideoX or Wan"),
    "an image VAE": (lambda w: {"decoder.mid.block_1.norm1.weight": torch.zeros(8)}, "holds no VAE of CogVideoX"),
    "another prefix": (lambda w: {f"ema.{k}": t for k, t in w.items()}, "names that begin with 'ema.'; only model."),
    "two of them": (
        lambda w: {f"{p}.{k}": t.clone() for p in ("vae", "first_stage_model") for k, t in w.items()},
        "holds several VAEs, with names that begin with 'first_stage_model.', 'vae.'",
    ),
    "its average too": (lambda w: {**w, **{f"ema.{k}": t.clone() for k, t in w.items()}}, "holds several VAEs"),
    "half of it": (lambda w: {k: t for k, t in w.items() if "encoder" not in k}, "holds part of a VAE only"),
    "one missing": (lambda w: without(w, NAME), "do not fit its config: missing decoder.conv_out.bias"),
    "one more": (lambda w: {**w, "decoder.x": w[NAME].clone()}, "unknown 'decoder.x'"),
    "a scale of quantized weights": (lambda w: {**w, "conv1.scale_weight": w[NAME].clone()}, "unknown 'quant_conv"),
    "both spellings": (
        lambda w: {**w, "decoder.conv_out.bias": w[NAME].clone()},
        "holds both .*decoder.*: the same weight",
    ),
    "compiled and not": (lambda w: {**w, f"_orig_mod.{NAME}": w[NAME].clone()}, "which are the same weight"),
    "a shape": (lambda w: resized(w, NAME, (4,)), r"decoder.conv_out.bias is \(4,\) instead of \(3,\)"),
    "a shape without axes": (lambda w: resized(w, "encoder.conv1.weight", ()), "part of a VAE only, or a dam"),
    "no width": (lambda w: resized(w, "encoder.conv1.weight", (0, 3, 3, 3, 3)), "part of a VAE only, or a dam"),
    "five channels": (lambda w: resized(w, "encoder.conv1.weight", (8, 5, 3, 3, 3)), "takes 5 channels, which are not"),
    "widths": (lambda w: resized(w, "encoder.conv1.weight", (7, 3, 3, 3, 3)), "are not multiples of 7"),
    "attention": (lambda w: resized(w, "encoder.downsamples.1.to_qkv.weight", (3, 1)), r"attn_scales.*not supported"),
    "int8": (lambda w: quantized(w, torch.int8), "has dtype I8; weights are F16, BF16, F32, F64, and quantized ones"),
    "float8": (lambda w: quantized(w, torch.float8_e4m3fn), "has dtype F8_E4M3"),
    "two dtypes": (lambda w: {**w, NAME: w[NAME].half()}, r"several dtypes \(F16, F64\)"),
    "a NaN": (lambda w: {**w, NAME: w[NAME] * torch.nan}, "decoder.conv_out.bias in .* not finite"),
}  # fmt: skip
VALUES = ("int8", "float8", "two dtypes", "a NaN")
"""what a plan does not look at"""


@pytest.mark.parametrize("case", FILES)
def test_bad_files(case, nano, tmp_path, capsys):
    change, said = FILES[case]
    path = tmp_path / "bad.safetensors"
    save_file(change(nano), path)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "neither" not in str(caught.value)
    if case not in VALUES:
        assert main(["plan", "--model", str(path), "--size", "48x32"]) == 6
        assert capsys.readouterr().err == f"longvid: {caught.value}\n"


def a_folder(path):
    path.mkdir()


PLACES = {
    "a.gguf": (
        lambda p: p.write_bytes(b"GGUF"),
        "without weights that longvid can read; weights are .safetensors, .bin",
    ),
    "config.json": (lambda p: p.write_text("{}"), "pass the folder that holds it"),
    "a.index.json": (lambda p: p.write_text("{}"), "pass the folder that holds it"),
    "a.safetensors": (lambda p: p.write_bytes(b"x"), "cannot be read as safetensors"),
    "b.SAFETENSORS": (lambda p: torch.save({}, p), "cannot be read as safetensors"),
    "fifo.safetensors": (os.mkfifo, "is not a regular file"),
    "a.pth": (lambda p: p.write_bytes(b"x"), "pickled weights"),
    "empty": (lambda p: p.write_bytes(b""), "without weights that longvid can read"),
    "folder.safetensors": (a_folder, "has no config.json: it holds nothing"),
}


@pytest.mark.parametrize("name", PLACES)
def test_other_things_that_exist(name, tmp_path, capsys):
    make, said = PLACES[name]
    make(tmp_path / name)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(tmp_path / name)
    assert "neither" not in str(caught.value)
    assert main(["plan", "--model", str(tmp_path / name), "--size", "48x32"]) == 6
    assert capsys.readouterr().err.startswith("longvid: ")


def several(weights):
    return {"state_dict": weights, "model": {key: tensor * 2 for key, tensor in weights.items()}}


PICKLES = {
    "several": (several, "holds several sets of the same weights .'state_dict', 'model'.; save one"),
    "an average too": (lambda w: {"state_dict": w, "ema": dict(w)}, "several sets of the same weights"),
    "a list": (lambda w: list(w.values()), "not a state dict"),
    "weights among others": (lambda w: {**w, "epoch": 3}, "not a state dict"),
    "another model": (lambda w: {"state_dict": {"x": w[NAME]}}, "holds no VAE of CogVideoX or Wan"),
    "int8": (lambda w: quantized(w, torch.int8), "has dtype torch.int8"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_bad_pickles(case, nano, tmp_path):
    change, said = PICKLES[case]
    torch.save(change(nano), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=said):
        load_model(tmp_path / "a.pt", allow_pickle_weights=True)


def test_cogvideox_levels_that_make_no_sense_are_unknown_names():
    names = ["decoder.up.0.block.0.x", "decoder.up.99999999.block.0.x", "decoder.up.x.y.z", "encoder.down", "a"]
    assert set(cogvideox.diffusers_names(names).values()) == {"decoder.up_blocks.2.resnets.0.x", *names[1:]}


# --------------------------------------------------------------------------------------------------------- programs


def test_the_command_takes_a_file(nano, tmp_path, capsys):
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(nano, path)
    plan = ["plan", "--model", str(path), "--size", "48x32", "--json"]
    assert main(plan) == 6
    assert "--allow-pickle-weights" in capsys.readouterr().err
    assert main([*plan, "--allow-pickle-weights"]) == 0
    assert json.loads(capsys.readouterr().out)["encode"]["weights_bytes"] > 0
