"""cluster.yaml is what Ray's launcher accepts, and what docs/cluster.md promises of it."""

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def launched(config: dict, demand: list[dict[str, float]]) -> set[str]:
    """The node types that Ray's autoscaler would start for tasks of these resources."""
    types = {
        name: NodeTypeConfig(name, t["min_workers"], t["max_workers"], resources=t["resources"])
        for name, t in config["available_node_types"].items()
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config["max_workers"] + 1,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(d) for d in demand]),
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    return {launch.instance_type for launch in reply.to_launch}


def test_it_is_valid_by_rays_own_schema(config):
    validate_config(prepare_config(config))


def test_a_misspelt_field_would_be_seen(config):
    broken = copy.deepcopy(config)
    broken["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(broken))


def test_head_is_on_demand_and_does_no_work(config):
    head = config["available_node_types"][config["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}


def test_gpu_workers_are_spot_and_go_to_zero(config):
    gpus = [t for t in config["available_node_types"].values() if t["resources"].get("GPU")]
    assert gpus
    for node_type in gpus:
        assert node_type["min_workers"] == 0
        assert node_type["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["idle_timeout_minutes"] <= 15


def test_cpu_work_starts_no_gpu_machine_even_when_cpu_machines_are_used_up(config):
    cpu_work = {"CPU": 1.0, "lectern_cpu": 0.001}
    assert launched(config, [cpu_work] * 1000) == {"cpu"}


def test_cpu_work_without_the_resource_would_start_gpu_machines(config):
    assert "gpu" in launched(config, [{"CPU": 1.0}] * 1000)


def test_a_group_starts_a_gpu_machine(config):
    assert launched(config, [{"CPU": 1.0, "GPU": 1.0}]) == {"gpu"}


def test_token_authentication_is_on_in_every_container(config):
    options = " ".join(config["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    token = options.partition("RAY_AUTH_TOKEN_PATH=/home/ray/")[2]
    assert f"~/{token}" in config["file_mounts"]


def test_dashboard_listens_to_nobody_outside(config):
    (start,) = [c for c in config["head_start_ray_commands"] if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in start


def test_everything_that_is_mounted_exists(config):
    mounted = [path for path in config["file_mounts"].values() if not path.startswith("~")]
    assert {"conf", "model", "stages", "ray_jobs"} <= set(mounted)
    assert [path for path in mounted if not (ROOT / path).exists()] == []


def test_images_hold_the_ray_that_is_pinned(config):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name: str(r.specifier) for r in map(Requirement, (x for x in lines if x and x[0] != "#"))}
    version = pins["ray"].removeprefix("==")
    docker = [config["docker"], *(t.get("docker", {}) for t in config["available_node_types"].values())]
    images = {value for section in docker for key, value in section.items() if key.endswith("image")}
    assert images
    assert all(image.startswith(f"rayproject/ray:{version}-py311") for image in images)
