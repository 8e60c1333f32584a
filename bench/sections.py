"""The sections of `bench/gpu.py`: what is measured, at full size and at a size to try the script itself."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.denoise import SETTINGS, compile_layers, denoise, random_dit, table
from bench.dimensions import TINY, TINY_VAE, WAN_14B
from bench.measure import Product, Spread, building, mib, peak_bytes, seconds
from bench.report import Report
from conf.spec import VaeSpec
from model import flops, memory, vae
from model.config import DiTConfig
from model.dit import CausalDiT
from model.golden import Check
from model.golden import dit as recorded_dit


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    config: DiTConfig
    vae: VaeSpec
    dtype: torch.dtype
    sizes: dict[str, tuple[int, int]]
    """Name -> true width and height in pixels."""
    products: list[tuple[int, int, int]]
    repeats: int
    compiler: str


FULL = Plan(
    config=WAN_14B,
    vae=VaeSpec(),
    dtype=torch.bfloat16,
    sizes={"704*384": (704, 384), "688*368": (640, 384), "384*256": (384, 256)},
    products=[(8192, 8192, 8192), (16384, 8192, 8192), (3168, 5120, 13824)],
    repeats=8,
    compiler="inductor",
)
SMALL = Plan(
    config=TINY,
    vae=TINY_VAE,
    dtype=torch.float32,
    sizes={"64*64": (64, 64)},
    products=[(64, 64, 64)],
    repeats=2,
    compiler="aot_eager",
)


def environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"free_bytes": free, "total_bytes": total, "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version()}
    print(found)
    return found


def check(checks: Callable[[], list[Check]]) -> dict[str, Any]:
    """A golden set's largest differences. Raises AssertionError if one is out of tolerance."""
    found = checks()
    for name in dict.fromkeys(each.set for each in found):
        of_set = [each for each in found if each.set == name]
        worst = max(of_set, key=lambda each: (not each.passed, each.difference))
        verdict = "pass" if worst.passed else "FAIL"
        print(f"{name:16} {worst.difference:9.2e} of {worst.tolerance:.0e}  {worst.quantity}  {verdict}")
    wrong = [f"{each.set} {each.quantity}: {each.difference:.2e}" for each in found if not each.passed]
    if wrong or not found:
        raise AssertionError("; ".join(wrong) or "the folder holds no golden set")
    return {"checks": [asdict(each) for each in found]}


def golden_transformer(folder: Path, device: torch.device) -> dict[str, Any]:
    return check(lambda: recorded_dit.checks(folder, str(device)))


def golden_encoders(folder: Path) -> dict[str, Any]:
    """On the CPU."""
    # Needs ftfy and omegaconf, which a bare machine may lack: then this section fails alone.
    from model.golden import encoders

    return check(lambda: encoders.checks(folder))


def products(plan: Plan, device: torch.device, made: list[Product]) -> dict[str, Any]:
    """Each of the plan's matrix products at its fastest; the best one is left in `made`."""
    rates = {}
    for shape in plan.products:
        product = Product(device, plan.dtype, *shape)
        rates[product.name] = max(product.rate() for _ in range(5))
        print(f"{product.name:20} {rates[product.name] / 1e12:8.2f} TFLOP/s")
        if rates[product.name] == max(rates.values()):
            made[:] = [product]
    return {"flops": rates}


def build(plan: Plan, device: torch.device, made: list[CausalDiT]) -> dict[str, Any]:
    """The transformer, straight on the device."""
    growth = peak_bytes(device, lambda: made.append(random_dit(plan.config, device, plan.dtype)))
    predicted = memory.dit_parameters(plan.config).total * plan.dtype.itemsize
    print(f"parameters   predicted {mib(predicted)}, measured {mib(growth)}")
    return {"predicted_bytes": predicted, "measured_bytes": growth}


def speed(
    plan: Plan, dit: CausalDiT, size: tuple[int, int], product: Product, compiled: bool
) -> dict[str, Any]:
    width, height = size
    times = denoise(dit, SETTINGS, height // 8, width // 8, product, plan.repeats, 20, compiled)
    print(table(times))
    return asdict(times)


@torch.inference_mode()
def decode(plan: Plan, device: torch.device, size: tuple[int, int]) -> dict[str, Any]:
    """The video decoder, one latent frame per call."""
    width, height = size
    with building(torch.device("meta"), plan.dtype):
        meta = vae.build(plan.vae)
    with building(device, plan.dtype):
        on_device = vae.build(plan.vae).eval().requires_grad_(False)
    model = vae.Vae(on_device)
    predicted = memory.vae(meta, height, width, 1)
    stream = model.stream()
    latent = torch.randn(model.z_dim, 1, *model.latent_hw(height, width))

    def begin() -> None:
        for _ in range(3):
            stream.push(latent)

    measured = peak_bytes(device, begin)
    spread = Spread.of([seconds(device, lambda: stream.push(latent)) for _ in range(4 * plan.repeats)])
    fps = vae.FRAMES_PER_LATENT / spread.median
    rate = flops.vae_decode(meta, height, width) * fps
    print(f"decode       {fps:8.2f} FPS  {rate / 1e12:8.3f} TFLOP/s  (noise {spread.noise:.0%})")
    print(f"memory       predicted {mib(predicted.stream + predicted.decode)}, measured {mib(measured)}")
    result = {"fps": fps, "tflops": rate / 1e12, "seconds_per_latent": asdict(spread)}
    return {**result, "predicted": asdict(predicted), "measured_bytes": measured}


def run(plan: Plan, device: torch.device, folder: Path, report: Report) -> None:
    yardstick: list[Product] = []
    made: list[CausalDiT] = []
    report.section("environment", 10, partial(environment, device))
    report.section("golden transformer", 60, partial(golden_transformer, folder, device))
    report.section("golden encoders", 60, partial(golden_encoders, folder))
    report.section("matrix products", 30, partial(products, plan, device, yardstick))
    for name, size in plan.sizes.items():
        report.section(f"decode {name}", 30, partial(decode, plan, device, size))
    report.section("build", 60, partial(build, plan, device, made))
    if not (made and yardstick):
        return
    dit, product = made[0], yardstick[0]
    for name, size in plan.sizes.items():
        report.section(f"eager {name}", 90, partial(speed, plan, dit, size, product, False))
    compile_layers(dit, plan.compiler)
    for name, size in plan.sizes.items():
        report.section(f"compiled {name}", 120, partial(speed, plan, dit, size, product, True))
