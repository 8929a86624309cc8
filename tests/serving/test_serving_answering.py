"""`system_fingerprint`: all of a config that changes answers is in it, and what is not says why."""

import shutil
from dataclasses import fields, replace

import pytest

from adapter_models import make_adapter
from anabranch.depth.ftp import TokenSkipper
from anabranch.seen_files import SeenFile, SeenFiles
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.answering import CHANGES, IN_INFO, SAME, answer_settings, paths_of
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.sizes import sizes_of
from anabranch.serving.http.shape import NOT_ANSWERS, fingerprint
from anabranch.serving.rewiring import RewiringConfig
from depth_banks import saved_bank
from elastic_models import moe_config, save_moe
from serving_models import saved_moe, saved_streams, small_moe

CONFIGS = {"one": ServingConfig, "several": ElasticConfig}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_setting_changes_answers_or_says_why_not(config):
    tables = (set(IN_INFO), set(CHANGES), set(SAME))
    for path in paths_of(config):
        assert sum(path in table for table in tables) == 1, f"{path}: put it into one table of serving/answering.py"


def test_no_table_names_a_setting_that_is_not_there():
    known = {path for config in CONFIGS.values() for path in paths_of(config)}
    assert {*IN_INFO, *CHANGES, *SAME} <= known
    assert all(len(reason.split()) > 3 for reason in SAME.values())
    assert set(IN_INFO.values()) <= {field.name for field in fields(EngineInfo)} - set(NOT_ANSWERS)


INFO = EngineInfo(model="m", vocab_size=9, max_positions=100, block_tokens=4, num_blocks=10)
OTHER = {
    "model": "n",
    "vocab_size": 8,
    "max_positions": 99,
    "block_tokens": 5,
    "num_blocks": 11,
    "stop_tokens": (1,),
    "routed_layers": {0: 4},
    "num_streams": 2,
    "stream_choices": (1, 2),
    "pooling": "last",
    "width": 3,
    "experts": {"a": 1},
    "adapters": ("a",),
    "adapter_versions": {"a": "b"},
    "planned": ServingConfig(kv_memory="1B"),
    "num_layers": 1,
    "max_depth": 2,
    "routes_depth": True,
    "skips_tokens": True,
    "rewires": True,
    "depth": "routed",
    "tasks": ("a",),
    "files": SeenFiles((SeenFile("a", 1, 2, "b"),)),
    "beside": SeenFiles((SeenFile("s", 1, 2, "b"),)),
    "numbers": "float32 none",
    "settings": "{'deterministic': True}",
}


@pytest.mark.parametrize("name", [field.name for field in fields(EngineInfo)])
def test_all_that_an_engine_tells_of_its_answers_is_in_its_fingerprint(name):
    differs = fingerprint(replace(INFO, **{name: OTHER[name]})) != fingerprint(INFO)
    assert differs == (name not in NOT_ANSWERS)


def test_where_files_lie_and_when_they_were_written_is_nothing_of_theirs():
    one, other = (
        replace(INFO, files=SeenFiles((SeenFile(f"/{place}/a", 1, at, "b"),))) for place, at in (("x", 1), ("y", 2))
    )
    assert fingerprint(one) == fingerprint(other)


def skipper_at(place, model, schedule):
    TokenSkipper(model, schedule).save(place)
    return str(place)


def adapter_at(place, seed):
    make_adapter(place, {f"model.layers.{layer}.self_attn.q_proj": (16, 16) for layer in (0, 1)}, seed=seed)
    return AdaptersConfig(load=(f"a={place}",))


def test_servers_that_answer_otherwise_have_another_fingerprint(tmp_path):
    """Two with other depth routers, another skipper, other adapters of one name, or of other settings of these, had the same."""
    model = small_moe()
    banks = [saved_bank(tmp_path / f"bank {seed}", model, seed) for seed in (0, 1)]
    skippers = [skipper_at(tmp_path / f"skipper {share}", model, (0.0, share)) for share in (0.6, 0.4)]
    settings = [
        {},
        {"deterministic": True},
        {"num_blocks": 4},
        {"max_positions": 100},
        {"name": "other"},
        {"max_depth": 2},
        *({"depth": DepthConfig(routers=bank)} for bank in banks),
        {"depth": DepthConfig(routers=banks[0], control=0.5)},
        {"depth": DepthConfig(routers=banks[0], usual="full")},
        {"depth": DepthConfig(routers=banks[0]), "max_depth": 3},
        *({"depth": DepthConfig(skipper=skipper)} for skipper in skippers),
        {"depth": DepthConfig(skipper=skippers[0], usual="full")},
        *({"adapters": adapter_at(tmp_path / f"adapter {seed}", seed)} for seed in "xy"),
        {"rewiring": RewiringConfig(on=True)},
        {"rewiring": RewiringConfig(on=True, settings={"window": 64})},
    ]
    plain = ServingConfig(model=saved_moe(), num_blocks=64, dtype="float32", process=False)
    told = [fingerprint(plain.replace(**more).load()[0].info) for more in settings]
    assert len(set(told)) == len(settings)
    # The same files elsewhere, by another name, and what says nothing of answers.
    shutil.move(skippers[0], tmp_path / "moved")
    same = {"max_seqs": 2, "watchdog_s": 5.0, "prefix_cache": False, "seed": 5, "max_batched_tokens": 64}
    moved = plain.replace(depth=DepthConfig(skipper=str(tmp_path / "moved")), **same)
    assert fingerprint(moved.load()[0].info) == told[settings.index({"depth": DepthConfig(skipper=skippers[0])})]
    said = plain.replace(rewiring=RewiringConfig(on=True, settings={"window": 512}))
    assert fingerprint(said.load()[0].info) == told[settings.index({"rewiring": RewiringConfig(on=True)})]


def test_another_number_of_streams_is_another_fingerprint():
    plain = ServingConfig(model=saved_streams(), num_blocks=64, dtype="float32", process=False)
    three, two = (plain.replace(num_streams=num).load()[0].info for num in (3, 2))
    assert fingerprint(three) != fingerprint(two)


def test_a_group_of_devices_tells_its_numbers_and_its_skipper(tmp_path):
    """It told no type, and nothing of a skipper but that there is one."""
    place = save_moe(tmp_path / "moe")
    skippers = [
        skipper_at(tmp_path / f"{share}", moe_config().build(seed=0).eval(), (0.0, share)) for share in (0.6, 0.4)
    ]
    configs = [
        ElasticConfig(model=str(place)),
        *(ElasticConfig(model=str(place), depth=DepthConfig(skipper=one)) for one in skippers),
    ]
    infos = [sizes_of(config, layout_of(place))[1] for config in configs]
    assert [info.numbers for info in infos] == ["F32 stored"] * 3
    assert len({fingerprint(info) for info in infos}) == 3
    more = configs[0].replace(devices=2, threads=2, standby=0)
    assert fingerprint(sizes_of(more, layout_of(place))[1]) == fingerprint(infos[0])


def test_a_kind_of_device_is_told_and_not_which_of_its_kind():
    cpu, first, second = (answer_settings(ServingConfig(device=device)) for device in ("cpu", "cuda:0", "cuda:1"))
    assert cpu != first == second
