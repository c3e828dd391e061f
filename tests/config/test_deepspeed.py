import json
from pathlib import Path

import pytest

from dsdistill.config.deepspeed import fill_auto, read_deepspeed_json
from dsdistill.config.offload import check_machine
from dsdistill.config.sections import OptimizationSettings

JSONS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NVME = {"device": "nvme", "nvme_path": "/tmp"}
OPTIMIZATION = OptimizationSettings(steps=10, global_batch=24, learning_rate=1e-3, gradient_clipping=0.5)


def write(tmp_path, content) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.stem)
def test_shipped_jsons_are_filled_for_deepspeed(path):
    filled, _ = fill_auto(read_deepspeed_json(path), OPTIMIZATION, world_size=2, device_type="cuda", row_length=128)
    assert "auto" not in json.dumps(filled)
    assert filled["train_batch_size"] == 24
    assert filled["gradient_clipping"] == 0.5
    assert not filled["timers"]["throughput"]["enabled"]
    assert filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"] * 2 == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimizaton": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stagee": 2}}, "zero_optimization.stagee: unknown key (did you mean 'stage'?)"),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3"),
        ({"torch_compile": "yes"}, "torch_compile: must be true or false, got 'yes'"),
        ({"torch_compile": True, "zero_optimization": {"stage": 3}}, "torch_compile: cannot be used with ZeRO 3"),
        ({"cuda_graphs": 1}, "cuda_graphs: must be true or false, got 1"),
        ({"cuda_graphs": True, "zero_optimization": {"stage": 3}}, "cuda_graphs: cannot be used with ZeRO 3"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.devise: unknown key"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: ZeRO 0 cannot"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param: ZeRO 2 cannot"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, "only ZeRO 3 can use NVMe"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "nvme_path: missing"),
        ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, "nvme needs offload_optimizer too"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio: not supp"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size: its optimizer state cannot"),
        ({"zero_optimization": 2}, "zero_optimization: must be an object"),
        ({"fp16": {"enabled": True, "lossscale": 0}}, "fp16.lossscale: unknown key (did you mean 'loss_scale'?)"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"aio": {"blok_size": 1}}, "aio.blok_size: unknown key (did you mean 'block_size'?)"),
        ({"flops_profiler": {"enable": True}}, "flops_profiler.enable: unknown key (did you mean 'enabled'?)"),
        ({"comms_logger": {"verbos": True}}, "comms_logger.verbos: unknown key (did you mean 'verbose'?)"),
        ({"compile": {"deepcompil": True}}, "compile.deepcompil: unknown key (did you mean 'deepcompile'?)"),
        ({"data_types": "fp32"}, "data_types: must be an object, got 'fp32'"),
        ({"fp16": {"enabled": "perhaps"}}, "fp16.enabled: "),
        ({"checkpoint": {"writer": {}}}, "checkpoint: not set here"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: not set here"),
        ({"gradient_clipping": 1.0}, "optimization.gradient_clipping"),
        ({"train_batch_size": 7}, "optimization.global_batch"),
    ],
)
def test_keys_that_deepspeed_would_ignore_or_that_live_elsewhere_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match="problem") as error:
        read_deepspeed_json(write(tmp_path, content))
    assert message in str(error.value)


def test_an_offloaded_optimizer_is_torchs(tmp_path):
    content = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    filled, _ = fill_auto(content, OPTIMIZATION, world_size=1, device_type="cpu", row_length=128)
    assert filled["zero_force_ds_cpu_optimizer"] is False


def test_nvme_is_refused_where_it_cannot_work(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    check_machine({"stage": 3, "offload_optimizer": {"device": "cpu"}})
    monkeypatch.setattr("shutil.which", lambda name: None if name == "ninja" else f"/usr/bin/{name}")
    with pytest.raises(ValueError, match="there is no ninja; install a C\\+\\+ compiler and ninja-build"):
        check_machine({"stage": 3, "offload_optimizer": NVME})
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(ValueError, match="install them \\(libaio-dev on Debian"):
        check_machine({"stage": 3, "offload_param": NVME})


@pytest.mark.parametrize("content", ["{", "[]", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")])
def test_files_that_are_no_json_object_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"ds\.json"):
        read_deepspeed_json(write(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "world_size", "message"),
    [
        ({}, 5, "cannot be split over 5 processes"),
        ({"train_micro_batch_size_per_gpu": 7}, 2, "does not divide the 12 rows"),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 3}, 2, "contradicts global_batch 24"),
        ({"train_micro_batch_size_per_gpu": "many"}, 2, "'many'"),
    ],
)
def test_batch_arithmetic_that_does_not_come_out_is_refused(content, world_size, message):
    with pytest.raises(ValueError, match="global_batch") as error:
        fill_auto(content, OPTIMIZATION, world_size=world_size, device_type="cpu", row_length=128)
    assert message in str(error.value)


def test_a_cpu_trains_in_float32_and_says_so():
    filled, notes = fill_auto(
        {"fp16": {"enabled": True}}, OPTIMIZATION, world_size=1, device_type="cpu", row_length=128
    )
    assert filled["fp16"] == {"enabled": False}
    assert sum("float32" in note for note in notes) == 1


@pytest.mark.parametrize(
    ("stage", "world_size", "overlaps"), [(1, 1, False), (2, 1, False), (2, 2, True), (3, 1, True)]
)
def test_one_process_overlaps_no_messages(stage, world_size, overlaps):
    content = {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    filled, notes = fill_auto(content, OPTIMIZATION, world_size=world_size, device_type="cuda", row_length=128)
    assert filled["zero_optimization"]["overlap_comm"] == overlaps
    assert any("overlap_comm is off" in note for note in notes) != overlaps
    assert content["zero_optimization"]["overlap_comm"]


def test_a_key_given_twice_is_refused(tmp_path):
    content = '{"zero_optimization": {"stage": 1, "stage": 2}}'
    with pytest.raises(ValueError, match="has the key 'stage' twice in one section"):
        read_deepspeed_json(write(tmp_path, content))
