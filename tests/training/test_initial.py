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
from backfold.training.init import initialise
from backfold.training.run import save_checkpoint

NAME = "vit_tiny_patch16_224"
OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def backbone(size=32, channels=3, seed=0, **changes):
    torch.manual_seed(seed)
    return create_backbone(NAME, (size, size), channels, {**OPTIONS, **changes})


def classifier(seed=1, **changes):
    torch.manual_seed(seed)
    return timm.create_model(NAME, img_size=32, num_classes=10, **{**OPTIONS, **changes})


def started(path, **changes):
    made = backbone(**changes)
    initialise(made, path)
    return made


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
    assert same(
        started(path), {name: t for name, t in weights.items() if not name.startswith("head.")}
    )
    assert said.messages == [f"initialised with 100.0% of the weights from {path}"]


def test_a_run_s_backbone_and_checkpoint(tmp_path, said):
    energy = EnergyModel(NAME, image_size=32, backbone_options=OPTIONS, seed=3)
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints" / "last.ckpt", {"model": energy.state_dict(), "x": 1})
    assert same(started(run), energy.backbone.state_dict())
    assert "run is not finished: its last checkpoint is taken" in said.text
    finished = {name: t + 1 for name, t in energy.backbone.state_dict().items()}
    save_file(finished, run / "backbone.safetensors")
    assert same(started(str(run)), finished)


@pytest.mark.parametrize(("size", "channels"), [(64, 3), (32, 1), (32, 5)])
def test_other_image_sizes_and_channels_are_as_timm_has_them(tmp_path, size, channels):
    save_file(classifier().state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 10}
    given = {"num_classes": 0, "img_size": size, "in_chans": channels, **OPTIONS}
    theirs = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **given)
    ours = started(tmp_path / "w.safetensors", size=size, channels=channels)
    assert same(ours, theirs.state_dict())


def test_what_does_not_fit_is_named_in_one_line(tmp_path, said):
    weights = classifier().state_dict()
    weights["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    del weights["norm.weight"]
    weights["decoder.weight"] = torch.zeros(2)
    torch.save(weights, tmp_path / "w.pth")
    ours = started(tmp_path / "w.pth")
    (line,) = said.messages
    assert "; kept random: blocks.1.mlp.fc1.bias, norm.weight; not used: " in line
    assert line.endswith("blocks.1.mlp.fc1.bias, decoder.weight")
    assert torch.equal(ours.norm.weight, torch.ones(24))


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "w.safetensors")
    ours = backbone()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    with pytest.raises(
        UserError, match=r"has 0% of the backbone's weights \(missing: .*; in the file: "
    ):
        initialise(ours, tmp_path / "w.safetensors")
    assert same(ours, before)


class Payload:
    def __reduce__(self):
        return print, ("the payload ran",)


PAYLOAD = {"state_dict": {"a": torch.zeros(1)}, "payload": Payload()}
UNREADABLE = r"can't be read .*: damaged, .* loading such a file can run any code; save its"


@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        ("missing.pth", lambda _: None, "there is no .*missing.pth to start from; give"),
        ("w.safetensors", lambda path: path.write_bytes(b"\x10"), UNREADABLE),
        ("w.npz", lambda path: path.write_bytes(b"PK"), UNREADABLE),
        ("", lambda _: None, r"holds none of backbone\.safetensors"),
        ("w.pth", lambda path: torch.save({"epoch": 3}, path), "holds no named tensors; give"),
        ("w.pth", lambda path: torch.save(PAYLOAD, path), UNREADABLE),
        ("w.pth", lambda path: path.write_bytes(pickle.dumps(PAYLOAD)), UNREADABLE),
        (
            "w.pth",
            lambda path: torch.save(backbone(channels=2).state_dict(), path),
            "for 2 channels, and the images have 3",
        ),
    ],
)
def test_unfit_files_are_refused_and_run_nothing(tmp_path, capsys, name, save, message):
    save(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        initialise(backbone(), tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    assert "payload ran" not in capsys.readouterr().out


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
