"""The picture of depth routing."""

from anabranch.report.depth import LINES, depth_files, draw_depth


def measured(layers, agreement):
    return {"layers_per_token": layers, "agreement": agreement, "uses": [1.0, 0.25, 2.0, 0.0]}


def test_the_picture_is_drawn(tmp_path):
    rows = [
        {"control": control, **{name: measured(layers, 0.5) for name in LINES}}
        for control, layers in ((-0.75, 1.5), (-0.5, 3.25), (0.5, 4.0))
    ]
    draw_depth({"num_blocks": 4, "curve": rows}, tmp_path / "depth")
    png, svg = depth_files(tmp_path / "depth")
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = svg.read_text()
    for label in (*LINES.values(), "repeated", "runs per token"):
        assert label in text
