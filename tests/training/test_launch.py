import jax
import pytest

import wsekern as wk
from training.config import TrainingConfig
from training.launch import make_wafer, prepare


def test_the_wafer_is_the_one_that_the_configuration_names():
    wafer = make_wafer(TrainingConfig(wafer="2x2x4"))
    assert wafer == wk.Wafer.devices(height=2, width=4, wafers=2)


def test_a_virtual_wafer_needs_one_device():
    wafer = make_wafer(TrainingConfig(wafer="40x50", virtual=True))
    assert (wafer.backend, wafer.height, wafer.width) == ("virtual", 40, 50)


def test_preparing_for_fewer_devices_leaves_those_that_there_are():
    before = jax.devices()
    prepare(TrainingConfig(wafer="1x2"))
    assert jax.devices() == before


def test_too_few_devices_are_refused_with_the_mend():
    with pytest.raises(ValueError, match="'4x8' needs 32 devices, there are 16.*smaller --wafer"):
        make_wafer(TrainingConfig(wafer="4x8"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_platform_that_is_not_there_is_refused_by_name(platform):
    with pytest.raises(ValueError, match=f"platform='{platform}' cannot be used here"):
        make_wafer(TrainingConfig(wafer="1x1", platform=platform))
