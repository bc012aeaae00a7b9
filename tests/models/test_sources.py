"""Folders with several weights or old configs, hub ids, and instances of diffusers as they are found in programs."""

import json
import logging
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longvid import ModelError, VideoSession, load_model, open_store
from longvid.cli.commands import main
from longvid.models.loading import load_architecture

diffusers = pytest.importorskip("diffusers")
huggingface_hub = pytest.importorskip("huggingface_hub")
logging.getLogger("diffusers").setLevel(logging.ERROR)

STEM = "diffusion_pytorch_model"
WAN = {"base_dim": 8, "num_res_blocks": 1}
WAN_22 = {**WAN, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
COG = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "vae"
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(**WAN).save_pretrained(path)
    return path


@pytest.fixture
def mine(wan_folder, tmp_path):
    """A copy of the model's folder, to be changed."""
    return shutil.copytree(wan_folder, tmp_path / "mine")


def digest(source, **options):
    return load_model(source, **options).describe()["weights_sha256"]


def write_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))


# --------------------------------------------------------------------------------------------------------- configs


NEW_KEYS = ("is_residual", "decoder_base_dim", "in_channels", "out_channels", "patch_size", "scale_factor_spatial")


def test_an_old_config_means_the_defaults(mine):
    expected = load_model(mine).config
    write_config(mine, lambda c: {k: v for k, v in c.items() if k not in (*NEW_KEYS, "scale_factor_temporal")})
    assert load_model(mine).config == expected
    write_config(mine, lambda c: {k: v for k, v in c.items() if not k.startswith("latents")})
    assert load_model(mine).config == expected


def test_keys_that_say_nothing_are_ignored(mine):
    expected = load_model(mine).config
    write_config(mine, lambda c: {**c, "clip_output": False, "dropout": 0.1, "x": {"y": [1]}, "non_linearity": "swish"})
    assert load_model(mine).config == expected


REFUSED = {
    "attention": ({"attn_scales": [0.5]}, r"attn_scales \[0.5\] is not supported"),
    "activation": ({"non_linearity": "gelu"}, "non_linearity = 'gelu'; this family is computed with silu only"),
    "no activation": ({"non_linearity": None}, "non_linearity = None"),
    "space": ({"scale_factor_spatial": 16}, "scale_factor_spatial = 16; these modules compress by 8"),
    "time": ({"scale_factor_temporal": 8}, "scale_factor_temporal = 8; these modules compress by 4"),
    "ratio": ({"spatial_compression_ratio": 16}, "spatial_compression_ratio = 16; these modules compress by 8"),
    "alpha": (
        {"_class_name": "AutoencoderKLQwenImage", "input_channels": 4},
        "in_channels 4 and out_channels 4 do not",
    ),
    "blocks without end": ({"num_res_blocks": 10**6}, "'num_res_blocks' = 1000000; at most 16"),
    "levels without end": ({"dim_mult": [1] * 1000}, "1,000 values for 'dim_mult'; at most 16"),
    "levels": ({"temperal_downsample": [True]}, "temperal_downsample has 1 entries; 4 widths"),
    "text": ({"base_dim": "96"}, "cannot be used"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_configs_of_wan_that_are_not_computed(change, said, mine, capsys):
    write_config(mine, lambda c: {**c, **change})
    for load in (load_model, load_architecture):
        with pytest.raises(ModelError, match=said):
            load(mine)
    assert main(["plan", "--model", str(mine), "--size", "48x32"]) == 6
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"act_fn": "relu"}, "act_fn = 'relu'; this family is computed with silu only"),
        ({"act_fn": ["silu"]}, "act_fn = "),
        ({"temporal_compression_ratio": 4.5}, "temporal_compression_ratio = 4.5; these modules compress by 4"),
        ({"spatial_compression_ratio": 4}, "spatial_compression_ratio = 4; these modules compress by 8"),
    ],
    ids=str,
)
def test_configs_of_cogvideox_that_are_not_computed(change, said, tmp_path):
    config = {"_class_name": "AutoencoderKLCogVideoX", **COG}
    (tmp_path / "config.json").write_text(json.dumps({**config, "act_fn": "SiLU", "temporal_compression_ratio": 4.0}))
    load_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=said):
        load_architecture(tmp_path)


# ---------------------------------------------------------------------------------------------- which file it is


def lay_out(folder, names):
    """Put weights that differ under each name; the names of an index have two shards. Return digests by name."""
    weights = load_file(folder / f"{STEM}.safetensors")
    (folder / f"{STEM}.safetensors").unlink()
    digests = {}
    for number, name in enumerate(names):
        changed = {key: tensor + number for key, tensor in weights.items()}
        if name.endswith(".json"):
            shards = [f"{STEM}-0000{i}-of-00002.v{number}.safetensors" for i in (1, 2)]
            keys = sorted(changed)
            for shard, part in zip(shards, (keys[:9], keys[9:]), strict=True):
                save_file({key: changed[key] for key in part}, folder / shard)
            places = {key: shards[key not in keys[:9]] for key in keys}
            (folder / name).write_text(json.dumps({"weight_map": places}))
        else:
            save_file(changed, folder / name)
        alone = folder.parent / f"alone{number}"
        alone.mkdir()
        shutil.copy(folder / "config.json", alone)
        save_file(changed, alone / f"{STEM}.safetensors")
        digests[name] = digest(alone)
    return digests


PLAIN, FP16, BF16, EMA, NON_EMA = (f"{STEM}{part}.safetensors" for part in ("", ".fp16", ".bf16", ".ema", ".non_ema"))
INDEX, INDEX_FP16, INDEX_OLD = f"{PLAIN}.index.json", f"{PLAIN}.index.fp16.json", f"{FP16}.index.json"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([PLAIN, FP16, BF16, EMA, INDEX_FP16, "other.safetensors"], PLAIN),
        ([EMA, PLAIN, NON_EMA], PLAIN),
        ([FP16], FP16),
        ([NON_EMA], NON_EMA),
        ([INDEX], INDEX),
        ([FP16, INDEX], INDEX),
        ([INDEX_FP16], INDEX_FP16),
        ([INDEX_OLD], INDEX_OLD),
    ],
    ids=lambda v: v if isinstance(v, str) else "+".join(name.removeprefix(STEM) for name in v),
)
def test_the_right_weights_are_chosen(names, chosen, mine):
    digests = lay_out(mine, names)
    assert digest(mine) == digests[chosen]
    for name in names:  # and each can be named, with the config beside it
        assert name.endswith(".json") or digest(mine / name) == digests[name]


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        ([EMA, NON_EMA], f"pass the file that you mean, such as .*{EMA}"),
        ([FP16, BF16], f"pass the file that you mean, such as .*{BF16}"),
        ([FP16, INDEX_FP16], f"pass the file that you mean, such as .*{FP16}"),
        ([PLAIN, INDEX], f"pass the file that you mean, such as .*{PLAIN}"),
        ([INDEX_FP16, INDEX_OLD], "leave one of them there"),
        ([INDEX_FP16, f"{PLAIN}.index.bf16.json"], "leave one of them there"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "+".join(name.removeprefix(STEM) for name in v),
)
def test_a_choice_that_is_the_user_s_is_refused(names, advice, mine):
    lay_out(mine, names)
    with pytest.raises(ModelError, match=f"holds several weights.*{advice}") as caught:
        load_model(mine)
    assert all(name in str(caught.value) for name in names)


def test_shards_without_an_index(mine):
    (mine / PLAIN).rename(mine / f"{STEM}-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="without the index that names them all"):
        load_model(mine)


def test_a_folder_of_single_files_names_the_file_to_pass(mine, tmp_path):
    (mine / PLAIN).rename(mine / "wan_2.1_vae.safetensors")
    with pytest.raises(ModelError, match=r"has a config but no .*pass .*wan_2.1_vae.safetensors if that is the model"):
        load_model(mine)
    (mine / "config.json").unlink()
    (mine / "a_transformer.safetensors").touch()
    with pytest.raises(ModelError, match=r"has no config.json: .*pass .*/wan_2.1_vae.safetensors$"):
        load_model(mine)
    # the authors' repositories: the config is of the transformer
    (mine / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(
        ModelError, match=r"the class 'WanModel'.*if .*/wan_2.1_vae.safetensors is a VAE, pass that file"
    ):
        load_model(mine)


@pytest.mark.parametrize("within", ["", "vae"])
@pytest.mark.parametrize("names", [[PLAIN, FP16], [FP16], [INDEX], [INDEX_FP16]], ids=lambda v: v[0][len(STEM) :])
def test_a_hub_id_downloads_the_vae_and_nothing_else(names, within, mine, tmp_path, monkeypatch):
    """A hub client that copies what it is asked for from a local folder."""
    digests, snapshot, fetched = lay_out(mine, names), tmp_path / ("c" * 40), []
    for other in ("transformer/x.safetensors", f"transformer/{PLAIN}", "Wan2.1_VAE.pth"):
        (mine / other).parent.mkdir(exist_ok=True)
        (mine / other).touch()

    def snapshot_download(repo_id, *, revision, allow_patterns):
        assert repo_id == "owner/name"
        assert revision == ("c" * 40 if fetched else "main")
        for path in (p for p in mine.rglob("*") if p.is_file()):
            name = str(path.relative_to(mine) if path.parent != mine else within / path.relative_to(mine))
            if any(re.fullmatch(re.escape(p).replace(r"\*", ".*"), name) for p in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
                fetched.append(name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert digest("owner/name", revision="main") == digests[names[0]]
    assert not any("transformer" in name or "pth" in name for name in fetched)
    assert f"{within}/{FP16}".strip("/") not in fetched or PLAIN not in names


def test_a_hub_id_of_another_model_downloads_its_config_only(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for load in (load_model, load_architecture):
        with pytest.raises(
            ModelError, match=r"the class 'WanModel'.*If owner/name holds its VAE as one file, download"
        ):
            load("owner/name")
    assert asked == [["config.json", "vae/config.json"]] * 2


# --------------------------------------------------------------------------------------------------------- instances


@pytest.fixture
def vae(wan_folder):
    return diffusers.AutoencoderKLWan.from_pretrained(wan_folder)


def test_a_compiled_module_is_the_module(vae, wan_folder):
    assert digest(torch.compile(vae)) == digest(wan_folder)
    vae.encoder = torch.compile(vae.encoder)
    vae.decoder.mid_block = torch.compile(vae.decoder.mid_block)
    assert digest(vae) == digest(wan_folder)
    vae.compile()
    assert digest(vae) == digest(wan_folder)


def test_qwen_image(wan_folder, tmp_path):
    vae = diffusers.AutoencoderKLQwenImage(**WAN)
    vae.load_state_dict(load_file(wan_folder / PLAIN))
    vae.save_pretrained(tmp_path / "qwen")
    assert "input_channels" in json.loads((tmp_path / "qwen" / "config.json").read_text())
    expected = load_model(wan_folder)
    for source in (vae, tmp_path / "qwen"):
        model = load_model(source)
        facts = model.describe()
        assert model.config == expected.config
        assert facts["weights_sha256"] == expected.describe()["weights_sha256"]
        assert (facts["class_name"], facts["source_class"]) == ("AutoencoderKLWan", "AutoencoderKLQwenImage")
    assert "source_class" not in expected.describe()


@pytest.mark.slow
def test_a_store_records_the_class_that_its_model_was(tmp_path):
    frames = np.zeros((5, 32, 48, 3), dtype=np.uint8)
    with VideoSession(diffusers.AutoencoderKLQwenImage(**WAN), device="cpu") as session:
        session.encode(frames, tmp_path / "a.zarr")
    assert open_store(tmp_path / "a.zarr").vae["source_class"] == "AutoencoderKLQwenImage"


def on_meta(vae):
    vae.decoder.mid_block.to("meta")


def parametrized(vae):
    torch.nn.utils.parametrizations.weight_norm(vae.encoder.conv_in)


def old_weight_norm(vae):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(vae.encoder.conv_in)


def pruned(vae):
    from torch.nn.utils import prune

    prune.l1_unstructured(vae.encoder.conv_in, "weight", amount=0.5)


class Adapter(torch.nn.Module):
    """What peft puts in place of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(1, 1)})


def adapted(vae):
    vae.decoder.conv_out = Adapter(vae.decoder.conv_out)


def layerwise(vae):
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def grouped(vae):
    vae.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


class Wrapped(torch.Tensor):
    """What libraries of quantization and sharding put in place of a tensor."""


def wrapped(vae):
    vae.encoder.conv_in.weight = torch.nn.Parameter(vae.encoder.conv_in.weight.detach().as_subclass(Wrapped))


def sparse(vae):
    vae.encoder.conv_in.bias = torch.nn.Parameter(vae.encoder.conv_in.bias.detach().to_sparse())


def mixed(vae):
    vae.decoder.norm_out.half()


def int8(vae):
    vae.decoder.conv_out.weight = torch.nn.Parameter(
        torch.zeros_like(vae.decoder.conv_out.weight, dtype=torch.int8), False
    )


def double_wrapped(vae):
    vae.encoder._modules["_orig_mod"] = torch.nn.Module()
    vae.encoder._orig_mod.conv_in = torch.nn.Conv3d(1, 1, 1)


def more(vae):
    vae.extra = torch.nn.Linear(1, 1)


INSTANCES = {
    on_meta: "of the 1.. weights of this AutoencoderKLWan are on the meta device, such as decoder.mid_.*accelerate",
    parametrized: "the weights of encoder.conv_in are parametrized.*remove_parametrizations",
    old_weight_norm: "do not fit its config: missing encoder.conv_in.weight",
    pruned: "do not fit its config: missing encoder.conv_in.weight",
    adapted: r"has adapters \('decoder.conv_out.base_layer.weight'\); merge them",
    layerwise: "has hooks of diffusers .layerwise_casting.*pass its folder",
    grouped: "has hooks of diffusers .*group_offloading.*pass its folder",
    wrapped: "encoder.conv_in.weight of this AutoencoderKLWan is a Wrapped of layout torch.strided; quantized, sharded",
    sparse: "encoder.conv_in.bias of this AutoencoderKLWan is a .* of layout torch.sparse_coo",
    mixed: r"several dtypes \(torch.float16, torch.float32\)",
    int8: "decoder.conv_out.weight' in AutoencoderKLWan has dtype torch.int8",
    double_wrapped: "holds both 'encoder.*conv_in.weight' and .* which are the same weight",
    more: "unknown 'extra.weight'",
}


@pytest.mark.parametrize(("change", "said"), INSTANCES.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_instances_whose_weights_cannot_be_shared(change, said, vae):
    load_model(vae)
    change(vae)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(vae)
    assert "\n" not in str(caught.value)


def test_an_instance_of_a_subclass_is_refused(wan_folder):
    class Mine(diffusers.AutoencoderKLWan):
        pass

    with pytest.raises(ModelError, match=r"the class 'Mine'.*It is a subclass of AutoencoderKLWan and may compute"):
        load_model(Mine.from_pretrained(wan_folder))


def test_a_pipeline_is_not_its_vae(vae):
    pipeline = type("WanPipeline", (), {"vae": vae, "config": {}})()
    with pytest.raises(ModelError, match=r"a WanPipeline cannot be loaded; .* AutoencoderKLWan, here its vae, or"):
        load_model(pipeline)


def test_an_instance_with_another_activation_is_refused():
    with pytest.raises(ModelError, match="act_fn = 'mish'"):
        load_model(diffusers.AutoencoderKLCogVideoX(**COG, act_fn="mish"))


@pytest.mark.parametrize(
    ("make", "setting", "said"),
    [
        (lambda: diffusers.AutoencoderKLWan(**WAN), {"use_tiling": True}, "tiling is enabled on this AutoencoderKLWan"),
        (lambda: diffusers.AutoencoderKLQwenImage(**WAN), {"use_tiling": True}, "tiling is enabled on this Auto"),
        (lambda: diffusers.AutoencoderKLCogVideoX(**COG), {"use_tiling": True}, "longvid computes whole frames"),
        (
            lambda: diffusers.AutoencoderKLCogVideoX(**COG),
            {"num_sample_frames_batch_size": 16},
            "has num_sample_frames_batch_size = 16; longvid computes with 8",
        ),
        (
            lambda: diffusers.AutoencoderKLCogVideoX(**COG),
            {"num_latent_frames_batch_size": 4},
            "has num_latent_frames_batch_size = 4; longvid computes with 2",
        ),
        (lambda: diffusers.AutoencoderKLCogVideoX(**COG), {"use_slicing": True}, None),
        (lambda: diffusers.AutoencoderKLWan(**WAN_22), {"use_slicing": True}, None),
        (lambda: diffusers.AutoencoderKLWan(**WAN_22), {"tile_sample_min_height": 8}, None),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_settings_that_longvid_does_not_follow(make, setting, said):
    instance = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(instance)
    for name, value in setting.items():
        setattr(instance, name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(instance)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])
    assert all(warning.filename == __file__ for warning in caught)  # it points at who loads
