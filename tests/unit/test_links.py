"""`edgemm inspect --links`: the map of every family, as a table, JSON and a picture; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from edgemm.cli import build_app
from edgemm.inspection import link_map
from edgemm.models import read_model, reasoner
from edgemm.pruners._scores import magnitude
from tests import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments], prog_name="edgemm")


def test_without_data_links_are_weighed_by_their_weights(tiny_model: Path) -> None:
    result = call("inspect", tiny_model, "--links", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["score"] == "magnitude" and found["fused"] == []
    expected = magnitude(reasoner.attentions(read_model(reasoner, tiny_model)))
    assert {x["name"]: x["heads"] for x in found["layers"]} == expected
    assert [x["queries"] + x["keys"] for x in found["layers"] if x["kind"] == "cross"] == ["textimage"] * 2


def test_with_data_they_are_weighed_by_what_they_carry(tiny_model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "links.png"
    result = call("inspect", tiny_model, "--links", "--data", "random:4", "--plot", picture)
    assert result.exit_code == 0, result.stderr
    assert "links by attention" in result.stdout and "text -> image" in result.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    again = tmp_path / "again.svg"
    assert call("inspect", tiny_model, "--links", "--plot", again).exit_code == 0
    assert "fusion.layers.1.cross_attention" in again.read_text()


@pytest.mark.parametrize("name", ["vilt", "blip", "clip"])
def test_every_edge_of_a_family_has_its_row(name: str, tmp_path: Path) -> None:
    directory = checkpoints.write(name, tmp_path)
    found = link_map(str(directory), "random:3")
    edges = {(x["kind"], x["queries"], x["keys"]) for x in found["layers"]}
    assert (
        edges
        == {
            "vilt": {("merged", a, b) for a in ("text", "image") for b in ("text", "image")},
            "blip": {
                ("self", "image", "image"),
                ("self", "text", "text"),
                ("cross", "text", "image"),
                ("cross", "text", "text+image"),
            },
            "clip": {("self", "text", "text"), ("self", "image", "image")},
        }[name]
    )
    assert all(len(x["heads"]) == 4 and min(x["heads"]) > 0 for x in found["layers"])
    assert not found["fused"]


def test_layers_whose_heads_cannot_be_told_apart_are_named(tmp_path: Path) -> None:
    checkpoints.bare("vit-gpt2").save_pretrained(tmp_path)
    found = link_map(str(tmp_path), None)
    assert found["fused"] and all(name.startswith("decoder.transformer.h.") for name in found["fused"])
    assert not {x["name"] for x in found["layers"]} & {*found["fused"]}


def test_the_parts_of_a_merged_layer_are_those_of_its_sequence(tmp_path: Path) -> None:
    """Where patches are pushed to say nothing, only the edges to them carry nothing."""
    directory = checkpoints.write("vilt", tmp_path)
    from edgemm.models import find_family

    family = find_family(directory)
    model = read_model(family, directory)
    with torch.no_grad():
        first = model.vilt.encoder.layer[0]
        first.attention.attention.value.bias.zero_()
        for parameter in (first.layernorm_before.bias, *model.vilt.embeddings.patch_embeddings.parameters()):
            parameter.zero_()
        for part in ("cls_token", "position_embeddings"):
            getattr(model.vilt.embeddings, part).zero_()
        model.vilt.embeddings.token_type_embeddings.weight[1] = 0
    model.save_pretrained(directory)
    rows = {(x["queries"], x["keys"]): x["heads"] for x in link_map(str(directory), "random:3")["layers"][:4]}
    for queries in ("text", "image"):
        assert max(rows[queries, "image"]) < 1e-4 < 1e-3 < min(rows[queries, "text"])


def test_what_has_no_links_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    resnet = checkpoints.write("resnet", tmp_path / "resnet")
    for arguments, said in (
        ((resnet, "--links"), "there is no attention layer"),
        ((tiny_model, "--links", "--plot", tmp_path / "x.jpg"), "no picture ends in '.jpg'"),
        ((tiny_model, "--links", "--plot", resnet / "config.json" / "x.png"), "cannot write"),
        ((tiny_model, "--links", "--data", "none.jsonl"), "no data 'none.jsonl'"),
        ((tiny_model, "--plot", tmp_path / "x.png"), "--plot is about links"),
        ((tiny_model, "--data", "random:4"), "--data is about links"),
        ((tmp_path / "x.edgemm", "--links"), "is a bundle"),
    ):
        result = call("inspect", *arguments)
        assert result.exit_code == 2 and said in result.stderr and "fix: " in result.stderr, result.stderr
