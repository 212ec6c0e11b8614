"""The whole service as a person starts it: `dit up` in a session of its own, over a tiny checkpoint of random weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint, CheckpointConfig, save
from model.config import DiTConfig, ObjectiveConfig, VAEConfig
from model.dit import DiT
from model.vae import VAE
from tests.e2e.service import Service, killed_at_the_end

ROOT = Path(__file__).parents[2]
LABELS = (("Cat", "house cat"), ("Dog",), ("Sneaker", "trainer"), ("Truck", "lorry"))


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, `tiny`, of 16 × 16 grey pixels; its steps are quick, and 64,000 of them take long enough to cancel."""
    architecture = DiTConfig(
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        depth=4,
        num_heads=2,
        num_classes=4,
        learn_sigma=False,
        time_factor=1000.0,
    )
    vae_config = VAEConfig(
        image_size=16,
        image_channels=1,
        latent_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_attention=False,
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        dit, vae = DiT(architecture), VAE(vae_config)
        for parameter in dit.parameters():  # what starts at zero shall do something too
            parameter += 0.1 * torch.randn(parameter.shape)
    config = CheckpointConfig(
        architecture=architecture,
        objective=ObjectiveConfig("flow"),
        image_size=16,
        image_channels=1,
        labels=LABELS,
        default_steps=4,
        default_guidance_scale=2.0,
        default_sampler="euler",
        vae=vae_config,
        provenance={"data": "none: random weights for tests"},
    )
    folder = tmp_path_factory.mktemp("registry")
    save(folder / "tiny", Checkpoint(config, dit.eval(), vae.eval()), card="# Tiny\n\nRandom weights for tests.\n")
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, registry: Path) -> Iterator[Service]:
    """One for all tests that do it no harm; at the end Ctrl-C must leave nothing behind."""
    with killed_at_the_end(Service(tmp_path_factory.mktemp("service"), registry)) as service:
        yield service.start().ready()
        assert service.interrupt() == 0, service.stderr
        assert service.processes() == {}
        assert "Traceback" not in service.stderr


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """What `make run` starts, on the bundled checkpoint, which examples speak of."""
    with killed_at_the_end(Service(tmp_path_factory.mktemp("bundled"), ROOT / "checkpoints")) as service:
        yield service.start().ready()


@pytest.fixture(scope="session")
def base_url(service: Service) -> str:
    return service.url


@pytest.fixture
def own_service(tmp_path: Path, registry: Path) -> Iterator[Callable[..., Service]]:
    """`own_service(DIT_X=…)`: a `dit up` of one's own, started."""
    started: list[Service] = []

    def start(**variables: str) -> Service:
        folder = tmp_path / f"service-{len(started)}"
        folder.mkdir()
        started.append(Service(folder, registry, **variables))
        return started[-1].start()

    yield start
    for service in started:
        service.kill()
        service.client.close()


@pytest.fixture(scope="session")
def long_job() -> dict[str, Any]:
    """A request that takes some seconds: time to do something in the middle of it."""
    return {"class_label": "Sneaker", "guidance_scale": 2.0, "steps": 1000, "seed": 7, "num_images": 8}


@pytest.fixture(scope="session")
def long_pictures(service: Service, long_job: dict[str, Any]) -> list[bytes]:
    """What that request gives when nothing disturbs it."""
    return service.pictures(service.submit(**long_job))
