"""Continuing from existing weights."""

import logging
import pickle
from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from backfold import UserError
from backfold.backbone import create_backbone
from backfold.energy import EnergyModel
from backfold.training.init import initialise, read_weights
from backfold.training.run import save_checkpoint

NAME = "vit_tiny_patch16_224"
OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def backbone(size=32, channels=3, seed=0, **changes):
    torch.manual_seed(seed)
    return create_backbone(NAME, (size, size), channels, {**OPTIONS, **changes})


def classifier(seed=1, **changes):
    torch.manual_seed(seed)
    return timm.create_model(NAME, img_size=32, num_classes=10, **{**OPTIONS, **changes})


def same(given, expected):
    return all(torch.equal(given.state_dict()[name], t) for name, t in expected.items())


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "backfold")
    return caplog


def prefixed(prefix, weights):
    return {prefix + name: t for name, t in weights.items()}


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("w.safetensors", save_file),
        ("w.pth", torch.save),
        ("w.pth", lambda w, path: torch.save({"state_dict": w, "epoch": 3, "arch": NAME}, path)),
        ("w.pth", lambda w, path: torch.save({"model": prefixed("module.", w)}, path)),
        ("model.safetensors", lambda w, path: save_file(prefixed("timm_model.", w), path)),
    ],
    ids=["safetensors", "torch", "nested", "parallel", "exported"],
)
def test_a_classifier_s_weights_but_its_head(tmp_path, said, name, save):
    weights = classifier().state_dict()
    save(weights, tmp_path / name)
    path = tmp_path if name == "model.safetensors" else tmp_path / name
    ours = backbone()
    initialise(ours, path)
    assert same(ours, {name: t for name, t in weights.items() if not name.startswith("head.")})
    assert said.messages == [f"initialised with 100.0 % of the weights from {path}"]


def test_a_run_s_backbone_and_checkpoint(tmp_path, said):
    energy = EnergyModel(NAME, image_size=32, backbone_options=OPTIONS, seed=3)
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints" / "last.ckpt", {"model": energy.state_dict(), "x": 1})
    from_checkpoint = backbone()
    initialise(from_checkpoint, run)
    assert "run is not finished: its last checkpoint is taken" in said.text
    assert same(from_checkpoint, energy.backbone.state_dict())
    finished = {name: t + 1 for name, t in energy.backbone.state_dict().items()}
    save_file(finished, run / "backbone.safetensors")
    from_run = backbone()
    initialise(from_run, str(run))
    assert same(from_run, finished)


def test_positions_are_resampled_to_another_image_size_as_timm_does(tmp_path):
    weights = classifier().state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    ours = backbone(size=64)
    initialise(ours, tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 10}
    theirs = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, img_size=64, **OPTIONS
    )
    assert ours.pos_embed.shape == (1, 65, 24)
    assert same(ours, theirs.state_dict())


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_answer_grey_images_as_before(tmp_path, channels):
    theirs = classifier()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = backbone(channels=channels)
    initialise(ours, tmp_path / "w.safetensors")
    grey = torch.rand(2, 1, 32, 32)
    kernel = theirs.patch_embed.proj
    if channels == 1:  # timm adds the three up
        torch.testing.assert_close(
            ours.patch_embed(grey), theirs.patch_embed(grey.expand(-1, 3, -1, -1))
        )
    else:  # timm repeats them in turn, scaled to the same total
        expected = torch.stack([kernel.weight[:, c % 3] for c in range(channels)], dim=1)
        torch.testing.assert_close(ours.patch_embed.proj.weight, expected * 3 / channels)


def test_other_channel_counts_can_t_be_adapted(tmp_path):
    save_file(backbone(channels=2).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="for 2 channels, and the images have 3"):
        initialise(backbone(), tmp_path / "w.safetensors")


def test_what_does_not_fit_is_named_in_one_line(tmp_path, said):
    weights = classifier().state_dict()
    weights["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    del weights["norm.weight"]
    weights["decoder.weight"] = torch.zeros(2)
    torch.save(weights, tmp_path / "w.pth")
    ours = backbone()
    initialise(ours, tmp_path / "w.pth")
    (line,) = said.messages
    assert "; kept random: blocks.1.mlp.fc1.bias, norm.weight; not used: " in line
    assert line.endswith("blocks.1.mlp.fc1.bias, decoder.weight")
    assert torch.equal(ours.norm.weight, torch.ones(24))


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "w.safetensors")
    ours = backbone()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    with pytest.raises(UserError, match=r"has 0% of the backbone's weights \(missing: .* more"):
        initialise(ours, tmp_path / "w.safetensors")
    assert same(ours, before)


class Payload:
    def __reduce__(self):
        return print, ("the payload ran",)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_pickles_with_code_are_refused_and_do_not_run(tmp_path, capsys, save):
    save({"state_dict": {"a": torch.zeros(1)}, "payload": Payload()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="loading such a file can run any code; save its") as caught:
        read_weights(tmp_path / "w.pth")
    assert len(str(caught.value).splitlines()) == 1
    assert "payload ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "there is no .*missing.pth to start from; give"),
        ("w.safetensors", b"\x10", "can't be read .*: damaged or no weights"),
        ("w.npz", b"PK", "is a NumPy archive; give a safetensors"),
        ("", None, r"holds none of backbone\.safetensors"),
        ("w.pth", {"epoch": 3}, "holds no named tensors; give a state_dict"),
    ],
)
def test_unfit_files_are_refused(tmp_path, name, content, message):
    if isinstance(content, dict):
        torch.save(content, tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        initialise(backbone(), tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_timm_s_own_weights_by_name(said, monkeypatch):
    weights = classifier().state_dict()
    hub = Mock(return_value={name: t.clone() for name, t in weights.items()})
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    ours = backbone(size=64, channels=1)
    monkeypatch.setitem(ours.pretrained_cfg, "custom_load", False)
    monkeypatch.setitem(ours.pretrained_cfg, "url", "")
    monkeypatch.setitem(ours.pretrained_cfg, "hf_hub_id", "timm/some")
    initialise(ours, "timm")
    assert hub.call_args.args[0] == "timm/some"
    assert torch.equal(ours.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    assert ours.pos_embed.shape == (1, 65, 24)
    torch.testing.assert_close(
        ours.patch_embed.proj.weight, weights["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    )
    assert said.messages == ["initialised with timm's pretrained weights"]


def test_timm_s_weights_that_can_t_be_had(monkeypatch):
    offline = Mock(side_effect=ConnectionError("no route to host"))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    ours = backbone()
    monkeypatch.setitem(ours.pretrained_cfg, "hf_hub_id", "timm/some")
    with pytest.raises(UserError, match=f"'{NAME}' can't be had: no route to host; give --init"):
        initialise(ours, "timm")
    ours.pretrained_cfg = {"architecture": "mine"}
    with pytest.raises(UserError, match="timm has no pretrained weights for 'mine'"):
        initialise(ours, "timm")
