"""Clusters of experts: similarities by hand, groups that are found again, merged experts and routing in two levels against naive loops."""
# Shapes: N tokens, E experts, G clusters, C inputs

import json
import math
import shutil
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapter_models import ATTENTION, TOKENS, linear_layers, make_adapter, make_base
from anabranch.adapters import read_peft
from anabranch.adapters.glider import (
    GliderConfig,
    GliderPool,
    arrow_prototype,
    bias_rows,
    describe_expert,
    explain,
    merge_clusters,
    standardised,
)
from anabranch.adapters.glider.clusters import similarity, spectral_clusters
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import load_model
from anabranch.lm.shards import write_file

NAMES = ("first", "law", "other", "sql")
# Which have gates that are alike.
ALIKE = {"first": 0, "law": 1, "other": 0, "sql": 1}


def signed(*numbers):
    return torch.tensor(numbers), True


def test_similarity_by_hand():
    experts = [
        {"q": signed(1.0, 0.0), "k": signed(0.0, 2.0)},
        {"q": signed(3.0, 4.0)},
        {"q": (torch.tensor([-5.0, 0.0]), False), "k": signed(0.0, -1.0)},
        {"v": signed(1.0, 1.0)},
    ]
    found = similarity(experts)
    assert np.allclose(found, found.T)
    # cos 0.6, of the one matrix that both have.
    assert found[0, 1] == pytest.approx(0.8)
    # |cos| 1 of q, where one has no sign, and cos -1 of k.
    assert found[0, 2] == pytest.approx((1 + 0) / 2)
    assert found[1, 2] == pytest.approx(0.8)
    # Nothing to compare: as at right angles.
    assert found[3].tolist() == pytest.approx([0.5, 0.5, 0.5, 1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=12), st.integers(0, 99))
def test_groups_are_found_again(groups, seed):
    """Whatever their order, numbered as their first members come."""
    random = np.random.default_rng(seed)
    labels = np.array(groups)
    noise = random.uniform(0, 0.02, (len(labels), len(labels)))
    similar = np.where(labels[:, None] == labels, 0.95, 0.1) + (noise + noise.T) / 2
    found = spectral_clusters(similar, len(set(groups)))
    first = {label: number for number, label in enumerate(dict.fromkeys(groups))}
    assert found.tolist() == [first[label] for label in groups]


@pytest.mark.slow
def test_clusters_are_those_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(8):
        random = np.random.default_rng(seed)
        centre, label = random.normal(size=(4, 16)), random.integers(0, 4, 24)
        vectors = centre[label] + random.normal(size=(24, 16)) * 0.3
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        similar = (1 + unit @ unit.T) / 2
        theirs = cluster.SpectralClustering(4, affinity="precomputed", random_state=0).fit(similar).labels_
        assert metrics.adjusted_rand_score(theirs, spectral_clusters(similar, 4)) == pytest.approx(1)


def test_as_many_as_experts_and_one_for_all():
    similar = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    assert spectral_clusters(similar, 3).tolist() == [0, 1, 2]
    assert spectral_clusters(similar, 1).tolist() == [0, 0, 0]
    assert spectral_clusters(np.ones((1, 1)), 1).tolist() == [0]
    for clusters in (0, 4):
        with pytest.raises(ConfigError, match=f"clusters is {clusters}; of 3 experts there are 1 to 3"):
            spectral_clusters(similar, clusters)


# Of a pool


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base and pool, two and two of whose experts have gates that are alike; other adapts queries alone."""
    place = tmp_path_factory.mktemp("clusters")
    base = make_base(place / "base", "llama")
    for name in NAMES:
        words = ["q_proj"] if name == "other" else ATTENTION
        make_adapter(place / "pool" / name, linear_layers(base, words), rank=4, seed=name)
        describe_expert(
            place / "pool" / name, instruction=[f"It is about {name}.", f"{name}!"], gate=gates(place, name)
        )
    return place


def gates(root, name):
    made = {}
    for module, pair in read_peft(root / "pool" / name).pairs.items():
        shared, own = (
            torch.Generator().manual_seed(zlib.crc32(f"{of} {module}".encode())) for of in (ALIKE[name], name)
        )
        width = pair.a_RC.shape[1]
        made[module] = torch.randn(width, generator=shared) + 0.2 * torch.randn(width, generator=own)
    return made


def test_merged_experts_are_the_means_of_their_members(root, tmp_path):
    found = merge_clusters(root / "pool", 2, tmp_path / "small")
    assert found.members == {"cluster-1": ("first", "other"), "cluster-2": ("law", "sql")}
    assert found.similarity_EE[0, 2] > 0.9 > 0.7 > found.similarity_EE[0, 1]
    pairs = [read_peft(root / "pool" / name).pairs for name in ("law", "sql")]
    made = read_peft(tmp_path / "small" / "cluster-2").pairs
    assert made.keys() == pairs[0].keys()
    for module, pair in made.items():
        a, b = (sum(getattr(own[module], half) for own in pairs) / 2 for half in ("a_RC", "b_OR"))
        torch.testing.assert_close(pair.delta(), b @ a * pairs[0][module].scale, rtol=1e-5, atol=1e-6)
    pool = GliderPool.load(tmp_path / "small")
    assert pool.names == ("cluster-1", "cluster-2")
    assert pool.matcher.texts["cluster-2"] == (
        "It is about law.\nIt is about sql.",
        "It is about law.",
        "law!",
        "It is about sql.",
        "sql!",
    )
    # A gate where all members have one: of queries alone in the first.
    model = pool.onto(load_model(root / "base")[0].eval())
    score = pool.layers()["blocks.0.attention.q"].router.score
    module = "model.layers.0.self_attn.q_proj"
    mean = torch.stack([standardised(gates(root, name)[module]) for name in ("first", "other")]).mean(0)
    torch.testing.assert_close(score.vectors[0], standardised(mean))
    assert not score.unsigned_E.any()
    assert pool.layers()["blocks.0.attention.k"].router.score.unsigned_E.tolist() == [True, False]
    assert pool.retrieve("what is sql")[0].name == "cluster-2"
    with torch.no_grad():
        assert model(TOKENS).logits_BLV.isfinite().all()


def test_by_what_they_add_the_merged_expert_is_nearer(root, tmp_path):
    """And ranks may differ. Of a cluster of one, both ways keep what it adds."""
    mean = merge_clusters(root / "pool", 2, tmp_path / "mean").errors
    svd = merge_clusters(root / "pool", 2, tmp_path / "svd", method="svd").errors
    exact = merge_clusters(root / "pool", 2, tmp_path / "exact", method="svd", rank=8).errors
    for cluster in mean:
        assert exact[cluster] < 1e-5 < svd[cluster] < mean[cluster]
    alone = merge_clusters(root / "pool", 4, tmp_path / "alone")
    assert alone.members == {f"cluster-{number + 1}": (name,) for number, name in enumerate(NAMES)}
    assert max(alone.errors.values()) < 1e-6


def test_a_pool_of_clusters_of_one_is_calibrated_as_the_pool(root, tmp_path):
    """An instruction is no other wording of itself: its cosine of 1 drove the threshold up."""
    for name in NAMES:
        shutil.copytree(root / "pool" / name, tmp_path / "pool" / name)
        (tmp_path / "pool" / name / "glider.json").unlink()
        describe_expert(tmp_path / "pool" / name, instruction=f"It is about {name} and whatever belongs to it.")
    merge_clusters(tmp_path / "pool", 4, tmp_path / "alone")
    pools = {name: GliderPool.load(tmp_path / name) for name in ("pool", "alone")}
    assert pools["alone"].calibrate() == pools["pool"].calibrate()
    assert list(pools["alone"].matcher.texts.values()) == list(pools["pool"].matcher.texts.values())
    # Of two with the same words, too.
    for name in NAMES:
        describe_expert(tmp_path / "pool" / name, instruction="It is about all.")
    merge_clusters(tmp_path / "pool", 2, tmp_path / "same")
    assert set(GliderPool.load(tmp_path / "same").matcher.texts.values()) == {("It is about all.",)}


def test_where_nobody_has_learned_anything_a_merged_pool_works(root, tmp_path):
    """By ``svd`` A became 0 there too, which a pool took for a matrix that all experts lack."""
    base = make_base(tmp_path / "base", "llama")
    for name in NAMES:
        make_adapter(tmp_path / "pool" / name, linear_layers(base, ["q_proj", "v_proj"]), rank=4, seed=name)
        place = tmp_path / "pool" / name / "adapter_model.safetensors"
        tensors = load_file(place)
        save_file({key: value * ("v_proj.lora_B" not in key) for key, value in tensors.items()}, place)
    merge_clusters(tmp_path / "pool", 2, tmp_path / "small", method="svd")
    for folder in ("pool", "small"):
        pool = GliderPool.load(tmp_path / folder)
        model = pool.onto(load_model(tmp_path / "base")[0].eval())
        assert {layer.config.closed for layer in pool.layers().values()} == {()}
        with torch.no_grad():
            assert model(TOKENS).logits_BLV.isfinite().all()
    for pair in read_peft(tmp_path / "small" / "cluster-1").pairs.values():
        assert pair.a_RC.any()
    # Folders that were written before.
    for name in ("cluster-1", "cluster-2"):
        place = tmp_path / "small" / name / "adapter_model.safetensors"
        tensors = load_file(place)
        save_file({key: value * ("v_proj" not in key) for key, value in tensors.items()}, place)
    pool = GliderPool.load(tmp_path / "small")
    with torch.no_grad():
        assert pool.onto(load_model(tmp_path / "base")[0].eval())(TOKENS).logits_BLV.isfinite().all()


def test_prototypes_alone_are_compared_if_asked(root):
    found = merge_clusters(root / "pool", 2, local="arrow")
    assert found.errors == {}
    first, law = (read_peft(root / "pool" / name).pairs for name in ("first", "law"))
    cosines = [float(arrow_prototype(first[module]) @ arrow_prototype(law[module])) for module in first]
    assert found.similarity_EE[0, 1] == pytest.approx(sum((1 + abs(one)) / 2 for one in cosines) / len(cosines))


def test_a_token_chooses_a_cluster_and_then_its_members(root):
    """Naively: mean of members' scores, the best cluster, softmax and the best two inside; also where explained."""
    pool = GliderPool.load(root / "pool", GliderConfig(clusters=2, weight=5.0))
    model = pool.onto(load_model(root / "base")[0].eval())
    chosen = set()
    for word in ("q", "k"):
        layer, module = pool.layers()[f"blocks.1.attention.{word}"], f"model.layers.1.self_attn.{word}_proj"
        x_NC = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
        bias_E = torch.tensor([0.3, -0.2, 0.4, 0.1])
        pairs = [read_peft(root / "pool" / name).pairs.get(module) for name in NAMES]
        y_NO = torch.zeros(9, len(pairs[0].b_OR))
        for n, x_C in enumerate(x_NC):
            local = {
                e: float(F.layer_norm(x_C, (32,)) @ standardised(gates(root, name)[module])) / math.sqrt(32)
                for e, name in enumerate(NAMES)
                if pairs[e] is not None
            }
            means = [
                sum(own := [value for e, value in local.items() if ALIKE[NAMES[e]] == cluster]) / len(own)
                for cluster in (0, 1)
            ]
            best = int(means[1] > means[0])
            chosen.add(best)
            members = [e for e in local if ALIKE[NAMES[e]] == best]
            weights = torch.tensor([local[e] + bias_E[e] for e in members]).softmax(0)
            for weight, e in zip(weights, members, strict=True):
                y_NO[n] += weight * pairs[e].scale * (pairs[e].b_OR @ (pairs[e].a_RC @ x_C))
        context = model.context(torch.zeros(1, 9, dtype=torch.int64), state=bias_rows(bias_E.unsqueeze(0), 9))
        with torch.no_grad():
            found_NO = layer(x_NC.unsqueeze(0), context)[0]
        torch.testing.assert_close(found_NO, y_NO, rtol=1e-5, atol=1e-5)
    assert chosen == {0, 1}
    told = explain(pool, "which law is it", [1, 2, 3])
    assert sum(one.weight for one in told.experts) == pytest.approx(1, abs=1e-5)
    assert all(math.isfinite(one.local_logit) for one in told.experts)
    for matrix in told.weights.values():
        assert sum(matrix.values()) == pytest.approx(1, abs=1e-5)


def test_one_cluster_is_none_and_as_many_as_experts_are_retrieval_by_token(root):
    found = {}
    for clusters in (None, 1, 4):
        pool = GliderPool.load(root / "pool", GliderConfig(clusters=clusters, instruction=False))
        model = pool.onto(load_model(root / "base")[0].eval())
        with torch.no_grad():
            found[clusters] = model(TOKENS).logits_BLV
    pool = GliderPool.load(root / "pool", GliderConfig(top_k=1, instruction=False))
    with torch.no_grad():
        alone = pool.onto(load_model(root / "base")[0].eval())(TOKENS).logits_BLV
    assert torch.equal(found[1], found[None])
    torch.testing.assert_close(found[4], alone)
    assert not torch.allclose(found[4], found[None])


def test_experts_come_and_go_among_clusters(root):
    """Clusters are made anew of who is there; fewer experts than clusters are refused, and all stays as it was."""
    pool = GliderPool.load(root / "pool", GliderConfig(clusters=2, top_k=1))
    model = pool.onto(load_model(root / "base")[0].eval())
    pool.remove("law")
    pool.remove("first")
    with torch.no_grad():
        before = model(TOKENS).logits_BLV
    with pytest.raises(ConfigError, match="clusters is 2; of 1 experts there are 1 to 1"):
        pool.remove("sql")
    assert pool.names == ("other", "sql")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits_BLV, before)
    pool.add(root / "pool" / "law")
    score = pool.layers()["blocks.0.attention.q"].router.score
    assert score.member_GE.tolist() == [[True, False, False], [False, True, True]]
    assert pool.layers()["blocks.0.attention.k"].router.score.member_GE.tolist() == [
        [False, False, False],
        [False, True, True],
    ]


def test_what_cannot_be_clustered(root, tmp_path):
    with pytest.raises(ConfigError, match="clusters is 2, and local 'none' gives tokens no vectors to choose one by"):
        GliderConfig(clusters=2, local="none")
    with pytest.raises(ConfigError, match="clusters is 5; of 4 experts there are 1 to 4"):
        GliderPool.load(root / "pool", GliderConfig(clusters=5)).onto(load_model(root / "base")[0])
    with pytest.raises(ConfigError, match="clusters is 9; of 4 experts"):
        merge_clusters(root / "pool", 9, tmp_path / "never")
    with pytest.raises(CheckpointError, match="no pool at"):
        merge_clusters(root / "nowhere", 1, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"mine\.txt"):
        merge_clusters(root / "pool", 2, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    wide = {"model.layers.0.self_attn.q_proj": (48, 32)}
    make_adapter(tmp_path / "odd" / "a", {"model.layers.0.self_attn.q_proj": (32, 32)}, seed="a")
    make_adapter(tmp_path / "odd" / "b", wide, rank=6, seed="b")
    with pytest.raises(CheckpointError, match="q_proj has 32 inputs in expert 'a' and 48 in 'b'"):
        merge_clusters(tmp_path / "odd", 1, tmp_path / "never")
    make_adapter(tmp_path / "ranks" / "a", {"model.layers.0.self_attn.q_proj": (32, 32)}, rank=2, seed="a")
    make_adapter(tmp_path / "ranks" / "b", {"model.layers.0.self_attn.q_proj": (32, 32)}, rank=3, seed="b")
    with pytest.raises(ConfigError, match=r"has ranks \[2, 3\]; method 'mean' needs one, 'svd' does not"):
        merge_clusters(tmp_path / "ranks", 1, tmp_path / "never")
    assert merge_clusters(tmp_path / "ranks", 1, tmp_path / "made", method="svd").members == {"cluster-1": ("a", "b")}
    assert json.loads((tmp_path / "made" / "cluster-1" / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize("local", ["phatgoose", "arrow"])
@pytest.mark.parametrize("trial", range(4))
def test_what_is_shown_is_what_tokens_choose_among(tmp_path, trial, local):
    """Of experts without gates others were shown, and merged, than a pool used."""
    base = make_base(tmp_path / "base", "llama")
    for name in "abcdefgh":
        make_adapter(tmp_path / "pool" / name, linear_layers(base, ["q_proj", "v_proj"]), rank=4, seed=f"{trial}{name}")
    pool = GliderPool.load(tmp_path / "pool", GliderConfig(clusters=3, local=local))
    pool.onto(load_model(tmp_path / "base")[0])
    member_GE = next(iter(pool.layers().values())).router.score.member_GE
    used = [tuple(name for name, is_one in zip(pool.names, row, strict=True) if is_one) for row in member_GE.tolist()]
    shown = merge_clusters(tmp_path / "pool", 3, local=local).members
    assert sorted(used) == sorted(shown.values())


@pytest.mark.parametrize("likeness", [1e-3, 1e-6, 1e-9, 0])
def test_one_that_is_like_nobody_leaves_the_others_their_groups(likeness):
    """Beside it all others were the same to k-means."""
    near = np.arange(9) < 5
    found_EE = np.where(near[:, None] == near, 0.9, 0.2)
    found_EE[8] = found_EE[:, 8] = likeness
    found_EE[8, 8] = 1.0
    assert spectral_clusters(found_EE, 3).tolist() == [0] * 5 + [1] * 3 + [2]


def pool_of(folder, bases):
    for name, base in bases.items():
        words = {"base_model_name_or_path": str(base)}
        make_adapter(folder / name, {"model.layers.0.self_attn.q_proj": (32, 32)}, seed=name, **words)
    return folder


def test_a_pool_of_what_may_be_several_bases_says_so_once(tmp_path, caplog):
    """The last words say nothing of the model, and one that does is what the others are compared with."""
    pool = pool_of(tmp_path / "pool", {"a": "/runs/one/base", "b": "/runs/two/base", "c": "step-00000010"})
    for read in (lambda: merge_clusters(pool, 1), lambda: GliderPool.load(pool)):
        caplog.clear()
        read()
        assert [record.getMessage() for record in caplog.records] == [
            "expert 'b' was trained on '/runs/two/base', and 'a' on '/runs/one/base' (1 more like it); whether these are one model cannot "
            "be told here, and a pool is of one"
        ]
    # Another name is no other model: it may be packed, converted or copied.
    loaded = GliderPool.load(
        pool_of(tmp_path / "named", {"a": "meta-llama/Llama-3.1-8B", "b": "Meta-Llama-3.1-8B-GPTQ"})
    )
    pool_of(pool, {"d": "org/one"})
    caplog.clear()
    assert loaded.add(pool / "d") == "d"
    assert ["cannot be told here, and a pool is of one" in record.getMessage() for record in caplog.records] == [True]


def test_bases_that_are_here_are_compared_by_what_they_hold(tmp_path, caplog):
    base = make_base(tmp_path / "one" / "base", "llama")
    for place in ("two/base", "three/other-name"):
        shutil.copytree(tmp_path / "one" / "base", tmp_path / place)
    pool = pool_of(tmp_path / "pool", {"a": tmp_path / "one" / "base", "b": tmp_path / "three" / "other-name"})
    GliderPool.load(pool)
    assert ["cannot be told" in record.getMessage() for record in caplog.records] == [True]
    changed = {**base, "model.embed_tokens.weight": base["model.embed_tokens.weight"] + 1}
    save_file(changed, tmp_path / "two" / "base" / "model.safetensors", metadata={"format": "pt"})
    pool_of(pool, {"b": tmp_path / "two" / "base"})
    # Whatever is named before.
    for more in ({}, {"0": "org/one"}):
        pool_of(pool, more)
        for refused in (lambda: merge_clusters(pool, 1), lambda: GliderPool.load(pool)):
            with pytest.raises(
                ConfigError, match=r"expert 'b' was trained on .*two/base', and 'a' on .*one/base'; a pool is of"
            ):
                refused()
    loaded = GliderPool.load(pool_of(tmp_path / "fewer", {"0": "org/one", "a": tmp_path / "one" / "base"}))
    with pytest.raises(
        ConfigError, match=r"expert 'b' was trained on .*two/base', and 'a' on .*one/base'; a pool is of"
    ):
        loaded.add(pool / "b")


def test_of_several_adapters_of_peft_one_lies_above_the_others(tmp_path):
    pool = pool_of(tmp_path / "pool", {"law": "base", "sql": "base"})
    pool_of(tmp_path, {"pool": "base"})
    assert GliderPool.load(pool).names == ("default", "law", "sql")
    # Steps of one adapter are no pool.
    steps = pool_of(tmp_path / "run", {"checkpoint-10": "base", "checkpoint-20": "base"})
    pool_of(tmp_path, {"run": "base"})
    with pytest.raises(CheckpointError, match=r"run is one adapter .*; give the one above it"):
        GliderPool.load(steps)
    # Nor are they experts beside others.
    pool_of(pool, {"checkpoint-10": "base"})
    assert GliderPool.load(pool).names == ("default", "law", "sql")
    # Where none lies above, a pool may be of them, and of one called default.
    assert GliderPool.load(pool_of(tmp_path / "plain", {"default": "base", "checkpoint-10": "base"})).names == (
        "checkpoint-10",
        "default",
    )
    pool_of(pool, {"default": "base"})
    with pytest.raises(
        CheckpointError, match=r"pool has an adapter itself .* which peft calls default, and another in"
    ):
        GliderPool.load(pool)


def test_a_gate_too_great_to_be_compared_is_told_by_its_folder(tmp_path):
    module = "model.layers.0.self_attn.q_proj"
    make_adapter(tmp_path / "pool" / "a", {module: (32, 32)}, seed="a")
    great = torch.tensor([3e38, -3e38] * 16)
    with pytest.raises(ConfigError, match="has numbers whose variance is not finite"):
        describe_expert(tmp_path / "pool" / "a", gate={module: great})
    write_file(tmp_path / "pool" / "a" / "glider.safetensors", {module: great})
    with pytest.raises(CheckpointError, match=r"pool/a/glider\.safetensors: the gate of .* variance is not finite"):
        merge_clusters(tmp_path / "pool", 1)


def test_what_others_keep_beside_an_instruction_stays(tmp_path):
    make_adapter(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (32, 32)}, seed="a")
    (tmp_path / "a" / "glider.json").write_text(json.dumps({"author": "ann", "instructions": ["old"]}))
    describe_expert(tmp_path / "a", instruction="new")
    told = json.loads((tmp_path / "a" / "glider.json").read_text())
    assert told == {"author": "ann", "schema": 1, "instructions": ["new"]}
