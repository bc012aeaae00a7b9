"""Every family keeps to what longvid relies on, by the checks of ``longvid check``; and every check can fail."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.models import RunningMean
from support.plans import fixed_plan
from torch import nn

import longvid as lv
from longvid.cli.commands import main
from longvid.models.wan import WanVAE
from longvid.planning import conformance
from longvid.planning.subject import Subject, state_of

PAGE = Path(__file__).parent.parent.parent / "docs" / "own-model.md"
FAMILIES = ["tiny", "cogvideox-nano", "wan2.1-nano", "wan2.2-nano", "own"]
WITH_NORMS_OVER_TIME = {"cogvideox-nano"}
LATENTS_OF_WARMUP = {
    "tiny": (6, 8), "cogvideox-nano": (28, 44), "wan2.1-nano": (20, 30), "wan2.2-nano": (20, 30), "own": (4, 4),
}  # fmt: skip
CONTEXT_BYTES = {"wan2.1": (1069, 1801), "wan2.2": (448, 1359)}
"MiB at 832x480 in 16 bits"
DIRECTIONS = ["encode", "decode"]


def own_model():
    """The model that docs/own-model.md builds."""
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[0]
    names = {}
    exec(compile(block.partition("video =")[0], PAGE.name, "exec"), names)
    return names["model"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def found(family):
    return lv.check_model(own_model() if family == "own" else family)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_causal_and_exact_at_any_cut_or_by_its_plan(family, found, direction):
    causal, cuts = found.finding("causal", direction), found.finding("cuts", direction)
    assert found.chunk_invariant == (family not in WITH_NORMS_OVER_TIME)
    if found.chunk_invariant:
        assert (causal.verdict, causal.figures["early"]) == ("ok", 0)
        assert cuts.verdict == "ok"
        assert max(cuts.figures["differences"].values()) <= 1e-5
    else:
        assert (causal.verdict, cuts.verdict) == ("note", "note")
        assert causal.figures["early"] > 0
        assert "the chunk plan is part of it" in cuts.text


def test_every_length_comes_back(found):
    lengths = found.finding("lengths")
    assert (lengths.verdict, lengths.figures["wrong"]) == ("ok", {})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_it_forgets(family, found, direction):
    warmup = found.finding("warm-up", direction)
    assert warmup.verdict == "ok"
    assert warmup.figures["latents"] == LATENTS_OF_WARMUP[family][DIRECTIONS.index(direction)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contexts_are_those_of_a_plan(found, family, direction):
    contexts = found.finding("contexts", direction)
    assert contexts.verdict == "ok"
    model = own_model() if family == "own" else family
    part = fixed_plan(model, height=480, width=832, dtype="bfloat16", directions=(direction,)).direction(direction)
    assert contexts.figures["bytes"] == part.cache_bytes
    assert contexts.figures["layers"] == {layer.name: layer.bytes for layer in part.layers}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 5e-2)])
def test_16_bits_are_enough(found, dtype, tolerance, direction):
    narrow = found.finding(dtype, direction)
    assert (narrow.verdict, narrow.figures["overflow"]) == ("ok", None)
    assert narrow.figures["difference"] <= tolerance


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_is_left_on_modules_and_two_videos_take_turns(found, direction):
    state = found.finding("state", direction)
    assert state.verdict == "ok"
    assert (state.figures["left"], state.figures["left_after_exception"]) == ([], [])
    assert found.finding("two videos", direction).figures["equal"] == [True, True]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_parity_with_diffusers(family, found, direction):
    pytest.importorskip("diffusers")
    parity = found.finding("diffusers", direction)
    if family in ("tiny", "own"):
        assert parity.verdict == "skipped"
    else:
        assert parity.verdict == "ok"
        assert parity.figures["difference"] <= 1e-5


@pytest.mark.parametrize("name", CONTEXT_BYTES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contexts_at_full_width(name, direction):
    found = conformance.contexts(lv.load_model(name), direction, (480, 832))
    assert round(found.figures["bytes"] / 2**20) == CONTEXT_BYTES[name][DIRECTIONS.index(direction)]
    assert len(found.figures["layers"]) == (24 if direction == "encode" else 32)


# ---------------------------------------------------------------------------------------------- negative controls


class Layer(nn.Module):
    """A convolution with a context, and something before and behind it. ``cause`` is called with (B, C, T, H, W)."""

    def __init__(self, channels_in, channels_out, before, after):
        super().__init__()
        self.conv = lv.CausalConv3d(channels_in, channels_out, 3)
        self.before, self.after = before, after

    def forward(self, x, context):
        return self.after(self.conv(self.before(x), context))


class Model(nn.Module):
    """One convolution in each direction, with the same fault before or behind it in both."""

    def __init__(self, *, before=nn.Identity, after=nn.Identity, chunk_invariant=True):
        super().__init__()
        torch.manual_seed(0)
        self.geometry = lv.LatentGeometry(
            latent_channels=4, frames_per_latent=1, pixels_per_latent=1, chunk_frames=2, chunk_invariant=chunk_invariant
        )
        self.encoder, self.decoder = Layer(3, 8, before(), after()), Layer(4, 3, before(), after())

    @torch.inference_mode()
    def encode(self, x, context):
        context = lv.ForwardContext.of(context)
        with context.chunk():
            return self.encoder(x, context)

    @torch.inference_mode()
    def decode(self, z, context):
        context = lv.ForwardContext.of(context)
        with context.chunk():
            return self.decoder(z, context)

    def describe(self):
        return {"class_name": "Model"}


class CentredConv(nn.Module):
    """A mean over a frame and its two neighbours, one of which is later."""

    def forward(self, x):
        return nn.functional.avg_pool3d(x, (3, 1, 1), stride=1, padding=(1, 0, 0))


class NormOverTime(nn.Module):
    def forward(self, x):
        return nn.functional.group_norm(x, 1)


class AttentionOverAllFrames(nn.Module):
    """Keeps every frame, and adds their mean."""

    def __init__(self):
        super().__init__()
        self.frames = []

    def forward(self, x):
        self.frames.append(x.clone())
        past = sum(frames.shape[2] for frames in self.frames[:-1])
        sums = torch.cat(self.frames, dim=2).cumsum(dim=2)[:, :, past:]
        return x + sums / torch.arange(past + 1, past + 1 + x.shape[2], device=x.device).view(-1, 1, 1)


class LastFrame(nn.Module):
    """Keeps a tensor that it does not read."""

    def forward(self, x):
        self.seen = x[:, :, -1:].clone()
        return x


class Unfinished(nn.Module):
    """Takes down its note at the end of a chunk only, so that it stays where a chunk fails."""

    def __init__(self):
        super().__init__()
        self.running = None

    def forward(self, x):
        self.running = None
        return x


class Square(nn.Module):
    """Has the right result in float32, and an infinite one in between in float16."""

    def forward(self, x):
        scaled = (x + 300) * 300
        return (scaled.square() / scaled.square().mean(dim=1, keepdim=True)).clamp(-1, 1)


class Flushed(nn.Module):
    """Adds what float16 cannot see."""

    def forward(self, x):
        return (x * 1e-9) * 1e9


class DropsTail(nn.Module):
    def forward(self, x):
        return x[:, :, : max(1, x.shape[2] - x.shape[2] % 2)]


def check(function, direction="encode", **model):
    return getattr(conformance, function)(Subject(Model(**model)), direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_control_without_a_fault_passes(direction):
    for function in ("causality", "cuts", "warmup_length", "state", "interleaving"):
        assert check(function, direction).verdict == "ok", function
    assert lv.check_model(Model()).conforms


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_model_that_is_not_causal(direction):
    found = check("causality", direction, before=CentredConv)
    assert (found.verdict, found.figures["early"]) == ("wrong", 1)
    assert "claims chunk_invariant" in found.text
    assert check("cuts", direction, before=CentredConv).verdict == "wrong"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_norm_over_time(direction):
    claimed = check("cuts", direction, after=NormOverTime)
    assert claimed.verdict == "wrong"
    assert "claims chunk_invariant" in claimed.text
    honest = check("cuts", direction, after=NormOverTime, chunk_invariant=False)
    assert honest.verdict == "note"
    assert min(honest.figures["differences"].values()) > 1e-2


def test_a_model_that_could_claim_more_is_told():
    assert "could declare chunk_invariant" in check("cuts", chunk_invariant=False).text


def test_attention_over_all_earlier_frames():
    never = check("warmup_length", before=AttentionOverAllFrames)
    assert (never.verdict, never.figures["latents"]) == ("note", None)
    assert "never forgets" in never.text
    left = check("state", before=AttentionOverAllFrames)
    assert left.verdict == "wrong"
    assert "encoder.before.frames" in left.text
    assert check("interleaving", before=AttentionOverAllFrames).verdict == "wrong"


@pytest.mark.parametrize(
    ("fault", "path"), [(RunningMean, "encoder.before.mean"), (LastFrame, "encoder.before.seen (new)")]
)
def test_state_that_is_left_on_a_module(fault, path):
    model = Model(before=fault)
    before = state_of(model)
    found = lv.check_model(model)
    assert not found.conforms
    assert path in found.finding("state", "encode").figures["left"]
    assert state_of(model) == before  # that of the model itself is not touched


def test_state_that_only_an_exception_leaves():
    model = Model(after=Unfinished)
    layer = type(model.encoder)

    class Leaves(layer):
        def forward(self, x, context):
            self.after.running = x.shape
            return super().forward(x, context)

    model.encoder.__class__ = Leaves
    found = conformance.state(Subject(model), "encode")
    assert found.verdict == "wrong"
    assert "an exception" in found.text
    assert found.figures["left"] == []


@pytest.mark.parametrize("own", [False, True])
def test_float16_that_overflows(own):
    subject = Subject(Model(after=Square))
    found = conformance.narrow_dtype(subject, "encode", torch.float16, own=own)
    assert found.verdict == ("wrong" if own else "note")
    assert "it overflows" in found.text
    assert found.figures["overflow"][1] == "conv"
    assert conformance.narrow_dtype(subject, "encode", torch.bfloat16).figures["overflow"] is None


def test_float16_that_loses_everything_without_an_overflow():
    found = conformance.narrow_dtype(Subject(Model(after=Flushed)), "encode", torch.float16)
    assert found.figures["overflow"] is None
    assert found.verdict == "note"
    assert "more than rounding explains" in found.text


def test_a_model_that_loses_the_tail():
    found = conformance.lengths(Subject(Model(before=DropsTail)))
    assert found.verdict == "wrong"
    assert found.figures["wrong"]
    assert not lv.check_model(Model(before=DropsTail)).conforms


def test_a_wrong_map_of_names_is_not_parity(monkeypatch):
    pytest.importorskip("diffusers")
    real = WanVAE.checkpoint_names

    def swapped(self):
        names = real(self)
        a, b = "encoder.mid_block.resnets.0.conv1.conv.weight", "encoder.mid_block.resnets.1.conv1.conv.weight"
        names[a], names[b] = names[b], names[a]
        return names

    model = lv.load_model("wan2.1-nano", random_weights=0)
    monkeypatch.setattr(WanVAE, "checkpoint_names", swapped)
    assert conformance.parity(Subject(model), "encode").verdict == "wrong"


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_what_the_call_returns(capsys):
    assert main(["check", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("tiny: conforms\nok      lengths ")
    assert main(["check", "tiny", "--json", "--size", "64x48"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["conforms"], facts["chunk_invariant"]) == ("tiny", True, True)
    (contexts,) = (f for f in facts["findings"] if (f["check"], f["direction"]) == ("contexts", "encode"))
    assert (contexts["figures"]["height"], contexts["figures"]["width"]) == (48, 64)


def test_a_model_that_does_not_conform_ends_with_exit_1(monkeypatch, capsys):
    monkeypatch.setattr("longvid.planning.check.load_model", lambda *_, **__: Model(before=CentredConv))
    assert main(["check", "my-model"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("Model: does not conform, ")
    assert "wrong   causal     encode  " in out


def test_what_cannot_be_checked_says_why(capsys):
    assert main(["check", "no-such-model"]) == 6
    with pytest.raises(lv.ModelError, match="no weights"):
        lv.check_model(lv.load_model("wan2.1-nano"))
    broken = Model()
    broken.encoder.conv = lv.CausalConv3d(5, 8, 3)
    found = lv.check_model(broken)
    assert not found.conforms
    assert found.finding("causal", "encode").text.startswith("it fails: RuntimeError")
    assert found.finding("causal", "decode").verdict == "ok"
